"""The image: its Dockerfile is linted, its steps are replayed, and its flow runs as it would there.

No engine is needed: see `tests.deploy.replay` for what is as in one, and what is not.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml

from dataflows.kafka.dev_broker import DevBroker
from tests.conftest import CACHE
from tests.deploy.replay import Replay, Stage, process_1, unavailable
from tests.integration import flow
from tests.integration.flow import FlowEnv, environment, tiny_feast, tiny_model
from tests.kafka.client import TestBroker, await_that

__all__ = ["tiny_feast", "tiny_model"]

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github/workflows/image.yml"
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)


def locked(name: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Return what a lock pins: name → version, and hashes."""
    found = _PINNED.finditer((ROOT / name).read_text())
    return {
        one[1]: (one[2], frozenset(re.findall(r"sha256:[0-9a-f]{64}", one[3]))) for one in found
    }


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_hadolint_finds_nothing(tools: Path) -> None:
    found = subprocess.run(
        [tools / "hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True
    )
    assert not found.returncode, found.stdout


def test_the_workflows_are_what_github_takes(tools: Path) -> None:
    for schema, path in (("github-workflows", WORKFLOW), ("dependabot", ".github/dependabot.yml")):
        found = subprocess.run(
            [tools / "check-jsonschema", "--builtin-schema", f"vendor.{schema}", path],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert not found.returncode, found.stdout


def test_actions_are_pinned_and_may_little() -> None:
    text = WORKFLOW.read_text()
    for used in re.findall(r"uses: (\S+)", text):
        assert re.fullmatch(r"[\w./-]+@v?\d+\.\d+\.\d+", used), used
    assert "permissions:\n  contents: read\n" in text


def test_the_image_has_the_versions_that_are_tested() -> None:
    ours, tested = locked("requirements-runtime.lock"), locked("requirements.lock")
    assert len(ours) > 50
    assert {name: tested.get(name) for name in ours} == ours
    assert {"pytest", "scikit-learn", "matplotlib"}.isdisjoint(ours)


# The replay


@pytest.fixture(scope="module")
def replay(
    tools: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replay]:
    """The Dockerfile, to be replayed (two minutes; what pip has loaded is kept in .cache)."""
    if reason := unavailable():
        pytest.skip(f"the image's steps cannot be replayed: {reason}")
    scratch = tmp_path_factory.mktemp("image")
    replay = Replay(ROOT, scratch, tools / "python", CACHE / "image")
    shutil.rmtree(replay.context / "data", ignore_errors=True)  # whatever somebody has trained
    shutil.copytree(tiny_model, replay.context / "data/model")
    yield replay
    shutil.rmtree(scratch)  # 5 GB


@pytest.fixture(scope="module")
def image(replay: Replay) -> Stage:
    """What a build without --target makes."""
    return replay.stage(replay.default)


def test_the_builder_gets_no_more_than_it_needs(replay: Replay) -> None:
    files = {str(path.relative_to(replay.context)) for path in replay.context.rglob("*")}
    tops = {name.partition("/")[0] for name in files}
    wanted = {".ci", "dataflows", "features", "model", "pyproject.toml", "waxctl"}
    wanted |= {"requirements-runtime.lock"}
    # The engine always gets these two; data/model is the user's.
    assert tops - {"Dockerfile", ".dockerignore"} == wanted | {"data"}
    assert {name for name in files if name.startswith(".ci/")} == {".ci/sbom.lock"}
    assert not [name for name in files if "__pycache__" in name or "feast_repo/data" in name]


def test_sbom_lists_what_is_installed(image: Stage) -> None:
    bom = json.loads(image.path("/app/sbom.cdx.json").read_text())
    assert bom["bomFormat"] == "CycloneDX"
    listed = {canonical(part["name"]): part["version"] for part in bom["components"]}
    packages = image.path("/app/.venv/lib")
    installed = {
        canonical(path.name.split("-")[0]): path.name.removesuffix(".dist-info").split("-")[1]
        for path in packages.glob("python*/site-packages/*.dist-info")
    }
    assert listed == installed
    versions = {
        canonical(name): version
        for name, (version, _) in locked("requirements-runtime.lock").items()
    }
    assert {name: versions[name] for name in installed} == installed
    assert "pip" not in installed


@dataclass
class Container:
    """A running flow, as the engine would run it."""

    process: subprocess.Popen[bytes]
    log_file: Path
    port: int
    volumes: dict[str, Path]

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


class Engine:
    """Starts containers, and ends them."""

    def __init__(self, replay: Replay, env: FlowEnv) -> None:
        self._replay, self._env = replay, env
        self._all: list[Container] = []

    def start(
        self,
        image: Stage,
        volumes: Sequence[str],
        command: Sequence[str] = (),
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> Container:
        """Start a flow with the model, the profiles, and writable `volumes`."""
        directory = Path(tempfile.mkdtemp(dir=self._env.directory))
        variables = dict(self._env.variables)
        mounts = {
            "/models/fraud": Path(variables.pop("MODEL_DIR")),
            "/app/features/feast_repo/data": Path(variables.pop("FEAST_REPO")) / "data",
        }
        port = flow.free_port()
        places = {path: directory / path.strip("/").replace("/", "_") for path in volumes}
        variables |= {"METRICS_PORT": str(port), **more}
        log = directory / "log"
        process = self._replay.container(image, variables, mounts, places, log, command)
        self._all.append(Container(process, log, port, places))
        return self._all[-1]

    def close(self) -> None:
        for container in self._all:
            container.process.kill()  # --kill-child: process 1, too
            container.process.wait()


@pytest.fixture(scope="module")
def env(
    tiny_model: Path, tiny_feast: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FlowEnv]:
    with DevBroker() as dev:
        broker = TestBroker(dev.bootstrap_servers, dev)
        directory = tmp_path_factory.mktemp("containers")
        with environment(broker, tiny_model, tiny_feast, directory) as found:
            yield found
        broker.close()


@pytest.fixture
def engine(replay: Replay, env: FlowEnv) -> Iterator[Engine]:
    started = Engine(replay, env)
    yield started
    started.close()


def send(env: FlowEnv, count: int = 20) -> None:
    """Send as many transactions."""
    events = [
        {
            "transaction_id": f"tx{n}",
            "card_id": flow.CARDS[n],
            "terminal_id": flow.TERMINALS[n],
            "event_time": flow.MIDNIGHT + n,
            "amount": 27.9,
        }
        for n in range(count)
    ]
    topic = env.topics["transactions"]
    flow.send(env.broker, [flow.Sent(topic, json.dumps(event).encode()) for event in events])


def healthcheck(image: Stage, container: Container) -> int:
    """Return the exit code of the image's health check."""
    _, *arguments = image.healthcheck
    env = {"METRICS_PORT": str(container.port)}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True).returncode


def ready(container: Container) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{container.port}/readyz", timeout=5):
            return True
    except OSError:
        return False


def stop(image: Stage, container: Container) -> int:
    """Tell process 1 to stop, as an engine does; return the exit code."""
    pid = str(process_1(container.process))
    subprocess.run(["kill", "-s", image.stopsignal.removeprefix("SIG"), pid], check=True)
    return container.process.wait(60)


def assert_unprivileged_process_1(container: Container) -> None:
    status = Path(f"/proc/{process_1(container.process)}/status").read_text()
    for line in ("Name:\tpython.*", "NSpid:\t\\d+\t1", "CapEff:\t0+", "Uid:\t10001\t.*"):
        assert re.search(f"^{line}$", status, re.MULTILINE), status


def test_from_the_first_prediction_to_a_drained_stop(
    image: Stage, env: FlowEnv, engine: Engine
) -> None:
    """Read-only, unprivileged, as process 1: it answers, is healthy, and drains when told to."""
    before = env.count("predictions")
    send(env, 20)
    container = engine.start(image, image.volumes)
    await_that(
        lambda: not container.running or env.count("predictions") >= before + 20,
        "a prediction for each event",
        90,
    )
    assert container.running, container.log
    assert ready(container)
    assert healthcheck(image, container) == 0
    assert_unprivileged_process_1(container)
    assert stop(image, container) == 0, container.log
    assert healthcheck(image, container) != 0
    # Every kernel was compiled when the image was built.
    baked = {path.name for path in image.path("/app/.kernels").rglob("*.nbc")}
    used = {path.name for path in container.volumes["/tmp"].rglob("*.nbc")}
    assert used == baked != set()
    assert (container.volumes["/var/lib/fraud"] / "recovery/store.json").is_file()


@pytest.mark.parametrize(
    ("missing", "says"),
    [("/tmp", "no locator available"), ("/var/lib/fraud", "Read-only file system")],
)
def test_each_volume_is_needed(image: Stage, engine: Engine, missing: str, says: str) -> None:
    """What is not on a volume cannot be written: whoever writes elsewhere is found out, too."""
    container = engine.start(image, [path for path in image.volumes if path != missing])
    assert container.process.wait(60) not in (0, -signal.SIGKILL)
    assert says in container.log


def test_the_chart_of_waxctl_has_python_as_process_1(
    replay: Replay, env: FlowEnv, engine: Engine
) -> None:
    """Started as the chart does, which wraps it into two shells: it still drains."""
    image = replay.stage("waxctl")
    values = yaml.safe_load((ROOT / "waxctl/values.yaml").read_text())
    given = {name: values["env"][name] for name in ("NUMBA_CACHE_DIR", "TMPDIR")}
    given |= {
        "BYTEWAX_POD_NAME": "fraud-scoring-0",
        "BYTEWAX_STATEFULSET_NAME": "fraud-scoring",
        "BYTEWAX_HOSTFILE_PATH": "/etc/bytewax/hostfile.txt",
        "BYTEWAX_REPLICAS": "1",
        "BYTEWAX_RECOVERY_DIRECTORY": "/var/recovery",
        "BYTEWAX_SNAPSHOT_INTERVAL": str(values["configuration"]["recovery"]["snapshotInterval"]),
        "BYTEWAX_RECOVERY_BACKUP_INTERVAL": "0",
    }
    command = ["sh", "-c", "sh ./entrypoint.sh"]
    container = engine.start(image, ["/var/bytewax", "/var/recovery"], command, given)
    await_that(lambda: not container.running or ready(container), "it reads", 90)
    assert container.running, container.log
    assert_unprivileged_process_1(container)
    send(env, 5)
    assert stop(image, container) == 0, container.log
