"""The manifests in k8s/ are valid, restricted, and say the same as the flow's code and settings."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bytewax.run
import pytest
import yaml
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from dataflows import parts
from dataflows.health import Health, endpoints
from dataflows.settings import Settings, SettingsError, load
from tests.deploy.manifests import (
    K8S,
    KUSTOMIZATIONS,
    OPERATOR_KINDS,
    ROOT,
    Container,
    Manifests,
    build,
    matches,
)

#: The oldest that has all that is used (ReadWriteOncePod for good), one between, and the newest.
KUBERNETES = ["1.29", "1.33", "1.37"]
#: Variables that are not settings of the flow: who reads them.
OTHERS = {
    "SECRETS_DIR": "dataflows.settings",
    "FEAST_REDIS": "features/feast_repo/feature_store.redis.yaml",
    "REDIS_PASSWORD": "FEAST_REDIS",
    "BYTEWAX_POD_NAME": "bytewax.run",
    "BYTEWAX_STATEFULSET_NAME": "bytewax.run",
    "BYTEWAX_HOSTFILE_PATH": "bytewax.run",
    "PROCESS": "arguments of dataflows.parts",
    "PROCESSES": "arguments of dataflows.parts",
}
#: How long what was written is waited for beyond MESSAGE_TIMEOUT_S, by either side.
SLACK_S = 5

_built: dict[str, Manifests] = {}


@pytest.fixture(params=KUSTOMIZATIONS)
def manifests(request: pytest.FixtureRequest, tools: Path) -> Manifests:
    """Return what `kustomize build` makes of the base, and of each overlay."""
    return built(tools, request.param)


@pytest.fixture
def base(tools: Path) -> Manifests:
    return built(tools, "base")


@pytest.fixture
def cluster(tools: Path) -> Manifests:
    return built(tools, "overlays/cluster")


def built(tools: Path, name: str) -> Manifests:
    if name not in _built:
        _built[name] = build(tools / "kubectl", name)
    return _built[name]


# Schemas and scanners


@pytest.mark.parametrize("version", KUBERNETES)
def test_fits_the_strict_schemas(
    manifests: Manifests, version: str, tools: Path, tmp_path: Path
) -> None:
    file = tmp_path / "resources.yaml"
    resources = [r for r in manifests.resources if r["kind"] not in OPERATOR_KINDS]
    file.write_text(yaml.safe_dump_all(resources))
    program = [tools / "kubernetes-validate", "--strict", "--kubernetes-version", version, file]
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("passed") == len(resources)


@pytest.fixture(scope="session")
def operator_schemas(tools: Path) -> dict[str, Any]:
    """Return the JSON schemas of Prometheus Operator's resources, closed: no unknown field."""
    script = (
        "import json; from cloudcoil.models.prometheus_operator import v1; "
        f"kinds = {sorted(OPERATOR_KINDS)}; "
        "print(json.dumps({k: getattr(v1, k).model_json_schema(by_alias=True) for k in kinds}))"
    )
    made = subprocess.run([tools / "python", "-c", script], capture_output=True, check=True)
    schemas: dict[str, Any] = json.loads(made.stdout)
    for schema in schemas.values():
        for part in [schema, *schema["$defs"].values()]:
            if "properties" in part:
                part["additionalProperties"] = False
    return schemas


@pytest.mark.parametrize("name", ["base", "overlays/cluster", "overlays/redis"])
def test_fits_the_operators_schemas(
    name: str, tools: Path, operator_schemas: dict[str, Any], tmp_path: Path
) -> None:
    found = [r for r in built(tools, name).resources if r["kind"] in OPERATOR_KINDS]
    assert {resource["kind"] for resource in found} == OPERATOR_KINDS
    for resource in found:
        schema, file = tmp_path / "schema.json", tmp_path / f"{resource['kind']}.json"
        # Go lets flags come after the anchor.
        text = json.dumps(operator_schemas[resource["kind"]]).replace('"^(?i)', '"(?i)^')
        schema.write_text(text)
        file.write_text(json.dumps(resource))
        program = [tools / "check-jsonschema", "--regex-variant", "python"]
        program += ["--schemafile", schema, file]
        run = subprocess.run(program, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


def test_checkov_finds_nothing_and_each_exception_is_argued(tools: Path, tmp_path: Path) -> None:
    for name in KUSTOMIZATIONS:
        (tmp_path / f"{name.replace('/', '-')}.yaml").write_text(built(tools, name).text)
    program = [tools / "checkov", "--directory", tmp_path, "--framework", "kubernetes"]
    program += ["--skip-download", "--compact", "--output", "json"]
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    results = json.loads(run.stdout)["results"]
    failed = [
        f"{c['check_id']} {c['check_name']}: {c['resource']}" for c in results["failed_checks"]
    ]
    assert failed == []
    assert len(results["passed_checks"]) > 500
    for check in results["skipped_checks"]:
        assert len(check["check_result"]["suppress_comment"].split()) > 5, check["check_id"]


# Monitoring


def test_the_rule_resource_is_made_of_the_rules(base: Manifests) -> None:
    rules = yaml.safe_load((K8S / "monitoring" / "rules.yaml").read_text())
    assert base.one("PrometheusRule", "fraud-scoring")["spec"] == rules
    check = [sys.executable, "-m", "k8s.monitoring.prometheusrule", "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0


def test_the_rules_load(base: Manifests, tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool on PATH (Debian: apt install prometheus)")
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(base.one("PrometheusRule", "fraud-scoring")["spec"]))
    run = subprocess.run(
        [promtool, "check", "rules", file], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0 and "SUCCESS" in run.stdout, run.stdout + run.stderr


def test_the_dashboard_is_the_one_in_the_repository(manifests: Manifests) -> None:
    text = manifests.one("ConfigMap", "fraud-scoring-dashboard")["data"]["dashboard.json"]
    assert text == (K8S / "monitoring" / "dashboard.json").read_text()


def test_the_scraped_job_is_the_one_that_the_rules_ask_for(base: Manifests) -> None:
    monitor = base.one("PodMonitor", "fraud-scoring")["spec"]
    ((owner, pod),) = base.selected(monitor["selector"])
    assert owner["kind"] == "StatefulSet"
    config = yaml.safe_load((K8S / "monitoring" / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    assert pod["metadata"]["labels"][monitor["jobLabel"]] == job["job_name"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in base.flow.ports
    assert endpoint["path"] in served_paths()


# Names


def test_what_selects_pods_finds_those_it_is_for(manifests: Manifests) -> None:
    for owner in manifests.of("StatefulSet"):
        labels = owner["spec"]["template"]["metadata"]["labels"]
        assert matches(owner["spec"]["selector"], labels)
        assert len(manifests.selected(owner["spec"]["selector"])) == 1
        for constraint in owner["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert matches(constraint["labelSelector"], labels)
        service = manifests.one("Service", owner["spec"]["serviceName"])
        assert matches({"matchLabels": service["spec"]["selector"]}, labels)
    (budget,) = manifests.of("PodDisruptionBudget")
    (found,) = manifests.selected(budget["spec"]["selector"])
    assert found[0] == manifests.flow.owner
    for service in manifests.of("Service"):
        assert len(manifests.selected({"matchLabels": service["spec"]["selector"]})) == 1


def test_network_policies_find_pods_and_ports(manifests: Manifests) -> None:
    for policy in manifests.of("NetworkPolicy"):
        name, spec = policy["metadata"]["name"], policy["spec"]
        to = manifests.selected(spec["podSelector"])
        assert to, f"{name} is for no pod"
        for rule in spec.get("ingress", []):
            assert rule["from"], f"{name} lets everybody in"
            for _, template in to:
                for port in rule["ports"]:
                    assert port["port"] in ports_of(template), f"{name}: {port}"
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            assert rule["ports"], f"{name} allows every port"
            for peer in rule.get("from", rule.get("to", [])):
                outside = "namespaceSelector" in peer or peer["podSelector"] == broker_of_dev()
                assert outside or manifests.selected(peer["podSelector"]), f"{name}: {peer}"


def test_every_pod_is_denied_what_is_not_allowed(manifests: Manifests) -> None:
    denied: list[str] = []
    for policy in manifests.of("NetworkPolicy"):
        if set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}:
            found = manifests.selected(policy["spec"]["podSelector"])
            denied += [owner["metadata"]["name"] for owner, _ in found]
    assert set(denied) == {owner["metadata"]["name"] for owner, _ in manifests.pods}


def test_brokers_and_store_may_be_reached(manifests: Manifests) -> None:
    servers = manifests.values(manifests.flow)["KAFKA_BOOTSTRAP_SERVERS"].split(",")
    assert {int(server.rpartition(":")[2]) for server in servers} == allowed(manifests, "brokers")
    if manifests.name != "overlays/dev":  # whose store is a file
        assert allowed(manifests, "feast") == {6379}
    store = manifests.values(manifests.flow).get("FEAST_REDIS")
    if store is not None:
        name, _, port = store.partition(",")[0].partition(":")
        service = manifests.one("Service", name)
        assert [p["port"] for p in service["spec"]["ports"]] == [int(port)]


def test_what_is_named_is_there(manifests: Manifests) -> None:
    kinds = {
        kind: {r["metadata"]["name"]: r for r in manifests.of(kind)}
        for kind in ("ConfigMap", "Secret", "PersistentVolumeClaim", "ServiceAccount")
    }
    for owner, template in manifests.pods:
        spec = template["spec"]
        assert spec["serviceAccountName"] in kinds["ServiceAccount"]
        templates = owner["spec"].get("volumeClaimTemplates", [])
        volumes = {claim["metadata"]["name"] for claim in templates}
        for volume in spec["volumes"]:
            volumes.add(volume["name"])
            for key, field, kind in (
                ("configMap", "name", "ConfigMap"),
                ("secret", "secretName", "Secret"),
                ("persistentVolumeClaim", "claimName", "PersistentVolumeClaim"),
            ):
                assert key not in volume or volume[key][field] in kinds[kind], volume
        mounted = set()
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            mounted |= {mount["name"] for mount in container["volumeMounts"]}
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in kinds["ConfigMap"]
            for variable in container.get("env", []):
                for key, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                    if named := variable.get("valueFrom", {}).get(key):
                        found = kinds[kind][named["name"]]
                        assert named["key"] in found.get("stringData", found.get("data", {}))
        assert mounted == volumes, owner["metadata"]["name"]
    for service in manifests.of("Service"):
        ((_, template),) = manifests.selected({"matchLabels": service["spec"]["selector"]})
        for port in service["spec"]["ports"]:
            assert ports_of(template)[port["targetPort"]] == port["port"]


def test_every_variable_is_a_setting(manifests: Manifests) -> None:
    settings = {name.upper() for name in Settings.model_fields}
    for container in manifests.containers:
        if container.spec["image"].startswith("fraud-scoring:"):
            named = set(container.variables) | set(manifests.values(container))
            assert named <= settings | OTHERS.keys(), str(container)
    mounted = manifests.one("Secret", "fraud-kafka")["data"]
    assert set(mounted) <= settings


def test_the_settings_are_accepted(
    manifests: Manifests, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in os.environ:
        if name.upper() in {field.upper() for field in Settings.model_fields}:
            monkeypatch.delenv(name)
    for name, value in manifests.values(manifests.flow).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    placeholders = manifests.one("Secret", "fraud-kafka")["data"]
    for name, value in placeholders.items():
        (tmp_path / name).write_text(base64.b64decode(value).decode())
    if placeholders:  # nobody runs without a password unawares
        with pytest.raises(SettingsError, match="nothing is in KAFKA_SASL_PASSWORD"):
            load()
    for name in placeholders:
        (tmp_path / name).write_text("swordfish")
    settings = load()
    secured = settings.consumer().get("security.protocol") == "SASL_SSL"
    assert secured == (manifests.name != "overlays/dev")
    assert settings.delivery == "exactly_once"
    repo = Path("/") / settings.feast_repo
    assert (ROOT / repo.relative_to("/app")).exists()


def test_a_correction_reaches_a_pod_that_was_never_ready(manifests: Manifests) -> None:
    """In order, it would be waited for. https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#forced-rollback"""
    assert manifests.flow.owner["spec"]["podManagementPolicy"] == "Parallel"


# Secrets and images


def test_no_configuration_is_secret(manifests: Manifests) -> None:
    secret = {
        name.upper()
        for name, field in Settings.model_fields.items()
        if SecretStr in types_of(field)
    }
    assert {"KAFKA_SASL_PASSWORD", "PAGE_TOKEN", "KAFKA_CONSUMER_OPTIONS"} <= secret
    secret |= {"FEAST_REDIS", "REDIS_PASSWORD"}
    for config in manifests.of("ConfigMap"):
        assert not secret & config["data"].keys(), config["metadata"]["name"]
        for name, text in config["data"].items():
            if name != "dashboard.json":
                assert not re.search(r"(?i)passw|token=|-----BEGIN", text), name
    for container in manifests.containers:
        for name in secret & container.variables.keys():
            value = container.variables[name].get("value", "")
            assert re.sub(r"\$\(\w+\)", "", value).endswith(("", "password=")[bool(value)])
    for placeholder in manifests.of("Secret"):
        assert set(placeholder["data"].values()) <= {""}


def test_secrets_are_mounted_as_files(manifests: Manifests) -> None:
    in_environment = {
        name
        for container in manifests.containers
        for name, variable in container.variables.items()
        if "secretKeyRef" in variable.get("valueFrom", {})
    }
    assert in_environment <= {"FEAST_REDIS", "REDIS_PASSWORD"}
    flow = manifests.flow
    (mount,) = [m for m in flow.spec["volumeMounts"] if m["name"] == "kafka-secrets"]
    assert mount["mountPath"] == flow.variables["SECRETS_DIR"]["value"]


def test_images_are_pinned(manifests: Manifests) -> None:
    ours = set()
    for container in manifests.containers:
        name, _, tag = container.spec["image"].rpartition(":")
        assert name and tag, f"{container} has no tag"
        assert (tag == "latest") == (manifests.name == "overlays/dev"), f"{container}: {tag}"
        if name == "fraud-scoring":
            ours.add(tag)
    assert len(ours) == 1


# What runs


def test_what_is_written_is_a_volume(manifests: Manifests) -> None:
    for container in manifests.containers:
        assert container.spec["securityContext"]["readOnlyRootFilesystem"], str(container)
        assert Path("/tmp") in container.writable, str(container)
        for argument in re.findall(r"--out (\S+)", " ".join(container.spec.get("args", []))):
            assert any(Path(argument).is_relative_to(w) for w in container.writable), argument
    declared = re.search(r"^VOLUME (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert declared is not None
    flow = manifests.flow
    assert sorted(flow.writable) == sorted(map(Path, json.loads(declared[1])))
    assert any(recovery_directory(flow).is_relative_to(path) for path in flow.writable)
    (kept,) = flow.owner["spec"]["volumeClaimTemplates"]
    (mount,) = [m for m in flow.spec["volumeMounts"] if m["name"] == kept["metadata"]["name"]]
    assert recovery_directory(flow).parent == Path(mount["mountPath"])
    access = "ReadWriteOnce" if manifests.name == "overlays/dev" else "ReadWriteOncePod"
    assert kept["spec"]["accessModes"] == [access]


def test_the_grace_period_lasts_for_an_epoch_and_a_drain(manifests: Manifests) -> None:
    settings = manifests.values(manifests.flow)
    timeout_s = float(settings.get("MESSAGE_TIMEOUT_S", default("message_timeout_s")))
    grace_s = manifests.flow.pod["terminationGracePeriodSeconds"]
    assert grace_s >= interval_s(manifests.flow) + timeout_s + SLACK_S


def test_probes_ask_what_is_served(manifests: Manifests) -> None:
    flow, settings = manifests.flow, manifests.values(manifests.flow)
    assert settings["METRICS_HOST"] == "0.0.0.0"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = flow.spec[probe]["httpGet"]
        assert asked["path"] in served_paths()
        assert flow.ports[asked["port"]] == int(settings["METRICS_PORT"])
    # Nobody who waits for brokers is restarted, and a start ends when the flow has begun to read.
    assert flow.spec["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert flow.spec["startupProbe"]["httpGet"]["path"] == "/readyz"
    starts = flow.spec["startupProbe"]
    startup_s = float(settings.get("STARTUP_TIMEOUT_S", default("startup_timeout_s")))
    assert starts["periodSeconds"] * starts["failureThreshold"] >= 10 * startup_s


@pytest.mark.parametrize(
    ("job", "container"),
    [("fraud-profiles", "build"), ("fraud-profiles", "materialize"), ("fraud-skew-audit", "audit")],
)
def test_the_jobs_say_what_their_commands_take(base: Manifests, job: str, container: str) -> None:
    (found,) = [
        c.spec
        for c in base.containers
        if c.owner["metadata"]["name"] == job and c.spec["name"] == container
    ]
    said = " ".join([*found["command"], *found["args"]])
    command = re.search(r"python,? -m,? (features\.\w+)(?: (build|materialize))?", said)
    assert command is not None
    program = [sys.executable, "-m", *filter(None, command.groups()), "--help"]
    shown = subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    usage = shown.partition("\n\n")[0]
    given = set(re.findall(r"--[a-z][a-z-]*", said))
    assert given and given <= set(re.findall(r"--[a-z][a-z-]*", usage))


# The cluster


def test_the_number_of_processes_is_said_alike(cluster: Manifests) -> None:
    stateful = cluster.flow.owner
    config = cluster.one("ConfigMap", "fraud-cluster")["data"]
    name, service = stateful["metadata"]["name"], stateful["spec"]["serviceName"]
    port = cluster.flow.ports["workers"]
    hosts = [f"{name}-{n}.{service}:{port}" for n in range(stateful["spec"]["replicas"])]
    assert config["hosts"].split() == hosts
    assert int(config["PROCESSES"]) == len(hosts)


def test_processes_find_each_other_and_end_together(cluster: Manifests) -> None:
    flow = cluster.flow
    service = cluster.one("Service", flow.owner["spec"]["serviceName"])["spec"]
    assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"]
    assert flow.owner["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert int(cluster.values(flow)["PEERS_PORT"]) == flow.ports["peers"]
    policy = cluster.one("NetworkPolicy", "processes")["spec"]
    for direction in ("ingress", "egress"):
        (rule,) = policy[direction]
        assert {port["port"] for port in rule["ports"]} == {"workers", "peers"}
        (peer,) = rule.get("from") or rule.get("to")
        assert list(peer) == ["podSelector"]


def test_bytewax_knows_which_process_it_is(
    cluster: Manifests, base: Manifests, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flow, config = cluster.flow, cluster.one("ConfigMap", "fraud-cluster")["data"]
    values = cluster.values(flow)
    hosts = Path(values["BYTEWAX_HOSTFILE_PATH"])
    assert hosts.parent in [Path(m["mountPath"]) for m in flow.spec["volumeMounts"]]
    (tmp_path / hosts.name).write_text(config[hosts.name])
    monkeypatch.setenv("BYTEWAX_HOSTFILE_PATH", str(tmp_path / hosts.name))
    monkeypatch.setenv("BYTEWAX_STATEFULSET_NAME", values["BYTEWAX_STATEFULSET_NAME"])
    monkeypatch.setenv("BYTEWAX_POD_NAME", f"{flow.owner['metadata']['name']}-1")
    given = launched(flow, monkeypatch)
    assert given.process_id == 1
    assert given.addresses == ";".join(config["hosts"].split())
    # One process alone is no cluster: these would make it one.
    assert not any(name.startswith("BYTEWAX_") for name in base.values(base.flow))


def test_each_process_makes_its_parts_once(cluster: Manifests, tmp_path: Path) -> None:
    (init,) = cluster.flow.pod["initContainers"]
    container = Container(init, cluster.flow.pod, cluster.flow.owner)
    values, made = cluster.values(container), []
    assert init["command"] == ["python", "-m", "dataflows.parts"]
    assert init["args"][1] == str(recovery_directory(cluster.flow))
    for process in range(int(values["PROCESSES"])):
        arguments = [
            argument.replace("$(PROCESS)", str(process)).replace(
                "$(PROCESSES)", values["PROCESSES"]
            )
            for argument in init["args"]
        ]
        arguments[1] = str(tmp_path / str(process))
        assert parts.main(arguments) == 0
        first = {path: path.stat().st_mtime_ns for path in (tmp_path / str(process)).glob("part*")}
        assert parts.main(arguments) == 0
        assert {path: path.stat().st_mtime_ns for path in first} == first
        made += [path.name for path in first]
    assert sorted(made) == [f"part-{n}.sqlite3" for n in range(8)]


# Readers


def served_paths() -> set[str]:
    app = endpoints(CollectorRegistry(), Health())
    return {route.path for route in app.routes}  # type: ignore[attr-defined]


def launched(flow: Container, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what Bytewax makes of the container's arguments and the environment."""
    monkeypatch.setattr(sys, "argv", ["bytewax.run", "dataflows.fraud", *flow.spec["args"]])
    return bytewax.run._parse_args()  # type: ignore[no-untyped-call]


def interval_s(flow: Container) -> float:
    arguments = flow.spec["args"]
    return float(arguments[arguments.index("-s") + 1])


def recovery_directory(flow: Container) -> Path:
    arguments = flow.spec["args"]
    return Path(arguments[arguments.index("-r") + 1])


def default(setting: str) -> float:
    return float(Settings.model_fields[setting].default)


def types_of(field: Any) -> tuple[Any, ...]:
    return getattr(field.annotation, "__args__", (field.annotation,))


def ports_of(template: dict[str, Any]) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"]
        for container in template["spec"]["containers"]
        for port in container.get("ports", [])
    }


def allowed(manifests: Manifests, policy: str) -> set[int]:
    """Return the ports that a policy lets the flow reach."""
    spec = manifests.one("NetworkPolicy", policy)["spec"]
    assert manifests.flow.owner in [owner for owner, _ in manifests.selected(spec["podSelector"])]
    return {port["port"] for rule in spec["egress"] for port in rule["ports"]}


def broker_of_dev() -> dict[str, Any]:
    return {"matchLabels": {"app": "kafka"}}
