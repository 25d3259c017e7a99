"""The public chart with our values: what waxctl deploys, and what of it is as it should be.

The chart is fetched from its repository, or read from the directory that BYTEWAX_CHART names; it is
not ours to keep here. waxctl itself is closed and in no registry: it is not run.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflows.settings import Settings

ROOT = Path(__file__).parents[2]
WAXCTL = ROOT / "waxctl"
REPOSITORY = "https://bytewax.github.io/helm-charts"
VERSION = "0.8.1"
#: What our image, or Feast, Python and numba in it, read besides the settings.
_OTHERS = {"NUMBA_CACHE_DIR", "PYTHONUNBUFFERED", "RUST_BACKTRACE", "RUST_LOG", "TMPDIR"}

_FETCH = """
import sys, helm_python as helm
helm.pull("bytewax", repo_url=sys.argv[1], version=sys.argv[2], destination=sys.argv[3])
"""
_RENDER = """
import json, sys, helm_python as helm
with helm.Chart.load(sys.argv[1]) as chart:
    rendered = chart.render(json.load(sys.stdin), name=sys.argv[2], namespace=sys.argv[3])
    json.dump([chart.version, rendered], sys.stdout)
"""


VALUES: dict[str, Any] = yaml.safe_load((WAXCTL / "values.yaml").read_text())
FLAGS: dict[str, Any] = yaml.safe_load((WAXCTL / "waxctl.yaml").read_text())


@pytest.fixture(scope="module")
def chart(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart: the directory that BYTEWAX_CHART names, or fetched from where users get it."""
    if local := os.environ.get("BYTEWAX_CHART"):
        return Path(local)
    directory = tmp_path_factory.mktemp("chart")
    command = [tools / "python", "-c", _FETCH, REPOSITORY, VERSION, directory]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        failed = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        failed = ["no answer within 60 s"]
    if failed:
        pytest.skip(f"the chart cannot be fetched from {REPOSITORY}: {failed[0]}")
    return next(directory.glob("*.tgz"))


@pytest.fixture(scope="module")
def rendered(tools: Path, chart: Path) -> list[dict[str, Any]]:
    """What the chart makes of our values."""
    done = subprocess.run(
        [tools / "python", "-c", _RENDER, chart, FLAGS["name"], FLAGS["namespace"]],
        input=json.dumps(VALUES),
        capture_output=True,
        text=True,
        check=True,
    )
    version, files = json.loads(done.stdout)
    assert version == VERSION
    return [
        document
        for name, text in files.items()
        if not name.endswith("NOTES.txt") and "/tests/" not in name
        for document in yaml.safe_load_all(text)
        if document
    ]


def of_kind(rendered: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (document for document in rendered if document["kind"] == kind)
    return found


@pytest.fixture
def pod(rendered: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = of_kind(rendered, "StatefulSet")["spec"]["template"]["spec"]
    return found


@pytest.fixture
def flow(pod: dict[str, Any]) -> dict[str, Any]:
    """The container of the flow, which is the only one."""
    (found,) = pod["containers"]
    return dict(found)


def test_flags_and_values_name_the_same_image() -> None:
    image = VALUES["image"]
    assert (FLAGS["image-repository"], FLAGS["image-tag"]) == (image["repository"], image["tag"])
    assert VALUES["imagePullSecrets"] == [{"name": FLAGS["image-pull-secret"]}]
    assert FLAGS["processes"] == VALUES["configuration"]["processesCount"] == 1
    assert FLAGS["workers"] == VALUES["configuration"]["workersPerProcess"] == 1
    assert image["tag"] not in ("", "latest")


def test_the_readme_gives_the_command_for_these_files() -> None:
    text = (WAXCTL / "README.md").read_text()
    for path in re.findall(r"waxctl/[\w.-]+", text):
        assert (ROOT / path).exists(), path
    command = "waxctl df deploy waxctl/placeholder.py -V waxctl/values.yaml -v waxctl/waxctl.yaml"
    assert f"{command} --dry-run" in text
    assert f"{command}\n" in text


def test_selectors_match(rendered: list[dict[str, Any]]) -> None:
    stateful_set, service = of_kind(rendered, "StatefulSet"), of_kind(rendered, "Service")
    labels = stateful_set["spec"]["template"]["metadata"]["labels"]
    for selector in (stateful_set["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        assert selector.items() <= labels.items()
    assert stateful_set["spec"]["serviceName"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"


def test_one_process_has_the_volume(rendered: list[dict[str, Any]]) -> None:
    """All replicas would share the one claim of the chart."""
    assert of_kind(rendered, "StatefulSet")["spec"]["replicas"] == 1
    claim = of_kind(rendered, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    volumes = of_kind(rendered, "StatefulSet")["spec"]["template"]["spec"]["volumes"]
    claims = [v["persistentVolumeClaim"] for v in volumes if "persistentVolumeClaim" in v]
    assert claims == [{"claimName": claim["metadata"]["name"]}]


def test_the_pod_is_restricted(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    ids = ("runAsUser", "runAsGroup", "fsGroup")
    assert {pod["securityContext"][name] for name in ids} == {10001}
    for container in (*pod["initContainers"], *pod["containers"]):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, container["name"]
        assert context["readOnlyRootFilesystem"] is True, container["name"]
        assert context["capabilities"]["drop"] == ["ALL"], container["name"]
        # The chart's own of `init-recovery`, which the restricted profile lets pass.
        assert set(context["capabilities"]["add"]) <= {"NET_BIND_SERVICE"}, container["name"]


def test_what_is_written_is_on_a_volume(pod: dict[str, Any], flow: dict[str, Any]) -> None:
    mounts = {mount["mountPath"].rstrip("/"): mount for mount in flow["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} <= {v["name"] for v in pod["volumes"]}
    env = {variable["name"]: variable.get("value") for variable in flow["env"]}
    written = ("BYTEWAX_RECOVERY_DIRECTORY", "NUMBA_CACHE_DIR", "TMPDIR")
    for name in written:
        places = [Path(mount) for mount in mounts if Path(env[name]).is_relative_to(mount)]
        assert places, f"{name}={env[name]} is on no volume"
        assert not mounts[str(places[0])].get("readOnly"), name
    assert mounts["/app/features/feast_repo/data"]["readOnly"] is True


def test_variables_are_settings_and_set_once(flow: dict[str, Any]) -> None:
    names = [variable["name"] for variable in flow["env"]]
    assert len(names) == len(set(names))
    unknown = {
        name
        for name in names
        if name.lower() not in Settings.model_fields and not name.startswith("BYTEWAX_")
    }
    assert unknown <= _OTHERS
    secret = {name for name in names if re.search("PASSWORD|SECRET|TOKEN|KEY|FEAST_REDIS", name)}
    assert not secret
    assert flow["envFrom"] == [{"secretRef": {"name": VALUES["envFromSecret"]}}]


def test_nothing_listens_but_us(rendered: list[dict[str, Any]], flow: dict[str, Any]) -> None:
    """No nginx beside the flow, and no API of Bytewax's, which anything in this variable opens."""
    assert "BYTEWAX_DATAFLOW_API_ENABLED" not in {variable["name"] for variable in flow["env"]}
    ports = {port["name"]: port["containerPort"] for port in flow["ports"]}
    assert ports["api"] == 9100
    assert {document["kind"] for document in rendered} == {
        "ConfigMap",
        "PersistentVolumeClaim",
        "Service",
        "ServiceAccount",
        "StatefulSet",
    }


def test_prometheus_finds_the_flow_under_the_name_that_alerts_know(
    rendered: list[dict[str, Any]], flow: dict[str, Any]
) -> None:
    monitor = yaml.safe_load((WAXCTL / "podmonitor.yaml").read_text())
    labels = of_kind(rendered, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert monitor["metadata"]["namespace"] == FLAGS["namespace"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in flow["ports"]}
    rules = (ROOT / "k8s" / "monitoring" / "rules.yaml").read_text()
    (job,) = set(re.findall(r'job="([^"]+)"', rules))
    assert labels[monitor["spec"]["jobLabel"]] == job


def test_values_name_the_target_that_the_readme_builds() -> None:
    (target,) = set(re.findall(r"--target (\w+)", (WAXCTL / "README.md").read_text()))
    assert f"the Dockerfile's target {target}," in (WAXCTL / "values.yaml").read_text()
    assert f" AS {target}\n" in (ROOT / "Dockerfile").read_text()


def test_the_grace_period_covers_a_drain(pod: dict[str, Any], flow: dict[str, Any]) -> None:
    """A drain waits for the end of the epoch, and for the brokers to take what is under way."""
    env = {variable["name"]: variable.get("value") for variable in flow["env"]}
    interval_s = int(env["BYTEWAX_SNAPSHOT_INTERVAL"])
    assert interval_s + 5 <= pod["terminationGracePeriodSeconds"]
    assert env["BYTEWAX_RECOVERY_BACKUP_INTERVAL"] == "0"


def test_the_limits_named_in_the_readme_are_still_there(
    pod: dict[str, Any], flow: dict[str, Any]
) -> None:
    """If one of these fails, the chart has become better, and README.md should say so."""
    assert not {"livenessProbe", "readinessProbe", "startupProbe"} & flow.keys()
    assert pod["terminationGracePeriodSeconds"] == 10
    assert flow["command"] == ["sh", "-c", "sh ./entrypoint.sh"]
    assert "busybox" in {container["image"] for container in pod["initContainers"]}
    assert "automountServiceAccountToken" not in pod


def test_scripts_are_posix_shell() -> None:
    for script in WAXCTL.glob("*.sh"):
        subprocess.run(["sh", "-n", script], check=True)
