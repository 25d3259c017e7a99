"""The real fraud flow as a user runs it: a process, a broker, a model package, a Feast repository.

Fixtures (import them): `tiny_model`, `tiny_feast`, and `flow_env`, which makes topics of the test's
own and runs flows on them; `environment` does so on any broker. What takes seconds to build is kept
in `.cache`, by content.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bytewax.recovery import init_db_dir
from confluent_kafka import Message, Producer
from prometheus_client.parser import text_string_to_metric_families

from dataflows.metrics import OUTCOMES
from dataflows.settings import Settings
from features import online_store, profiles
from features.fraud import FRAUD
from tests.conftest import CACHE
from tests.kafka.client import TestBroker, await_that

ROOT = Path(__file__).parents[2]
#: Partitions of each topic, by its name in the settings.
PARTITIONS = {
    "transactions": 4,
    "fraud_reports": 2,
    "predictions": 3,
    "dead_letters": 1,
    "audit": 1,
}
#: The largest record that a topic takes, bytes, where that is not Kafka's own limit of 1 MiB: a
#: producer can be given more room than the flow's own topics have.
MAX_MESSAGE_BYTES = {"transactions": 20_000_000, "fraud_reports": 20_000_000}
#: The midnight that `tiny_feast` is filled as of, and the entities it knows.
MIDNIGHT = profiles.parse_day("2018-08-08")
CARDS = tuple(f"C{n:04d}" for n in range(50))
TERMINALS = tuple(f"T{n:04d}" for n in range(50))


def cached(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return `.cache/<name>/<hash of key>`, building it there first if it is not."""
    directory = CACHE / name / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=directory.parent))
        try:
            build(staging / "new")
            (staging / "new").rename(directory)
        except OSError:
            if not directory.exists():  # else another run was first, with the same content
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return directory


def sources_of(*modules: Any) -> str:
    return "".join(Path(module.__file__).read_text() for module in modules)


# Model


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A package of a small forest over the flow's own inputs; it flags amounts above 220."""
    return model_package()


def model_package() -> Path:
    """Return what `tiny_model` gives."""
    from model import export, package, scorer  # scikit-learn takes a second to import

    key = sources_of(export, package, scorer) + FRAUD.schema_hash + Path(__file__).read_text()
    return cached("tiny_model", key, _write_model)


def _write_model(directory: Path) -> None:
    import sklearn
    from sklearn.ensemble import RandomForestClassifier

    from model import export, package
    from model.package import Manifest, Thresholds, TrainingRange

    rng = np.random.default_rng(0)
    rows = rng.gamma(1.5, 4.0, (6000, len(FRAUD.names)))
    rows[:, FRAUD.names.index("amount")] = rng.gamma(2.0, 60.0, len(rows))
    for name in FRAUD.names:
        if name.startswith("during"):
            rows[:, FRAUD.names.index(name)] = rng.integers(0, 2, len(rows))
        if "risk" in name:
            rows[:, FRAUD.names.index(name)] = rng.beta(0.1, 2.0, len(rows))
    fraud = rows[:, FRAUD.names.index("amount")] > 220
    fraud |= rows[:, FRAUD.names.index("terminal_risk_7d")] > 0.6
    rows = rows.astype(np.float32)
    forest = RandomForestClassifier(10, max_depth=6, random_state=0).fit(rows, fraud.astype(int))
    onnx, parity = export.export(forest, rows)
    golden_rows, golden_scores = export.golden(forest, rows, count=64)
    golden = io.BytesIO()
    np.savez(golden, rows=golden_rows, scores=golden_scores)
    manifest = Manifest(
        name="tiny forest of the tests",
        features=list(FRAUD.names),
        dtypes=["float32"] * len(FRAUD.names),
        schema_hash=FRAUD.schema_hash,
        training=TrainingRange(0, 1, len(rows), int(fraud.sum())),
        metrics={},
        thresholds=Thresholds(review=0.3, block=0.7, rule="by hand"),
        baseline=[float(value) for value in np.median(rows[~fraud], axis=0)],
        libraries={"scikit-learn": sklearn.__version__},
        parity=parity,
    )
    package.write(directory, manifest, {package.MODEL: onnx, package.GOLDEN: golden.getvalue()})


# Feast


@pytest.fixture(scope="session")
def tiny_feast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filled Feast repository that knows `CARDS` and `TERMINALS` as of `MIDNIGHT`."""
    return profiles_repo(tmp_path_factory.mktemp("tiny_history"))


def profiles_repo(history: Path) -> Path:
    """Return what `tiny_feast` gives; `history` is an empty directory."""
    write_history(history)
    return feast_repo(history, MIDNIGHT, Path(__file__).read_text())


def feast_repo(history: Path, midnight_ms: int, content: str) -> Path:
    """Return a repository filled from the four files in `history` as of one midnight.

    `content` stands for what the files hold, for the cache. For the handbook's data:
    ``feast_repo(handbook_dir, midnight, handbook_dir.name)``.
    """

    def build(directory: Path) -> None:
        fill_repo(directory, history, midnight_ms)

    key = f"{content}{midnight_ms}{sources_of(profiles, online_store)}"
    return cached("tiny_feast", key, build)


def fill_repo(directory: Path, history: Path, midnight_ms: int, online: str = "sqlite") -> None:
    """Make a repository with this online store, filled from `history` as of one midnight."""
    names = ("transactions", "fraud_reports", "customers", "terminals")
    profiles.build(
        **{name: history / f"{name}.parquet" for name in names},
        out=directory / "data" / "profiles",
        created_ms=midnight_ms,
        from_ms=midnight_ms,
        until_ms=midnight_ms,
    )
    online_store.write_repo(directory, online)
    # In another process: Feast takes 6 s and 200 MB to import.
    command = [sys.executable, "-m", "features.profiles", "materialize"]
    command += ["--repo", str(directory), "--until", profiles.day_name(midnight_ms)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def write_history(folder: Path) -> None:
    """Write the four files that `CARDS`' and `TERMINALS`' profiles are made of."""
    rng = np.random.default_rng(3)
    count = 2_000
    moment = np.sort(rng.integers(MIDNIGHT - 30 * profiles.DAY_MS, MIDNIGHT, count))
    ids = np.array([f"old{n:05d}" for n in range(count)])
    terminal = rng.choice(TERMINALS, count)
    fraud = np.arange(0, count, 50)
    frames: dict[str, dict[str, Any]] = {
        "transactions": {
            "transaction_id": ids,
            "card_id": rng.choice(CARDS, count),
            "terminal_id": terminal,
            "event_time": moment,
            "amount_cents": rng.integers(0, 30_000, count),
        },
        "fraud_reports": {
            "transaction_id": ids[fraud],
            "terminal_id": terminal[fraud],
            "event_time": moment[fraud],
            "report_time": moment[fraud] + 3_600_000,
        },
        "customers": {"card_id": CARDS, "x": rng.random(50) * 100, "y": rng.random(50) * 100},
        "terminals": {
            "terminal_id": TERMINALS,
            "x": rng.random(50) * 100,
            "y": rng.random(50) * 100,
        },
    }
    for name, columns in frames.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


# Records


@dataclass(frozen=True)
class Sent:
    """A record to produce: to the partition given, or to the one of its key."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    partition: int = -1
    headers: Sequence[tuple[str, bytes | None]] = ()
    #: The producer's timestamp, ms; 0: now.
    timestamp: int = 0


def send(broker: TestBroker, records: Iterable[Sent], **config: Any) -> None:
    """Produce records in order, and wait until the broker has them all."""
    failures: list[Any] = []
    producer = Producer(
        {**broker.config, "linger.ms": 5, "message.max.bytes": 20_000_000, **config}
    )
    for record in records:
        while True:
            try:
                producer.produce(
                    record.topic,
                    record.value,
                    record.key,
                    record.partition,
                    lambda error, _: failures.append(error) if error else None,
                    timestamp=record.timestamp,
                    headers=list(record.headers),
                )
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(60) == 0
    assert not failures, failures


# Flow


class Flow:
    """`python -m bytewax.run dataflows.fraud -r … -s 1 -b 0`: one life of it.

    Each start after the first is another life on the same recovery store; the log goes on.
    """

    def __init__(self, variables: Mapping[str, str], recovery: Path, log: Path) -> None:
        self.variables = dict(variables)
        self.recovery = recovery
        self.log_file = log
        self._process: subprocess.Popen[bytes] | None = None
        self._life_begins = 0

    def start(self, *, wait: bool = True, timeout_s: float = 90.0) -> "Flow":
        """Start; unless told otherwise, wait until it reads."""
        assert self._process is None, "this flow is running"
        self.log_file.touch()
        self._life_begins = self.log_file.stat().st_size
        clean = {k: v for k, v in os.environ.items() if k.lower() not in Settings.model_fields}
        clean.pop("SETTINGS_FILE", None)
        self._port = free_port()
        command = [sys.executable, "-m", "bytewax.run", "dataflows.fraud"]
        command += ["-r", str(self.recovery), "-s", "1", "-b", "0"]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={
                    **clean,
                    "PYTHONPATH": str(ROOT),
                    "LOG_FORMAT": "json",
                    "METRICS_PORT": str(self._port),
                    **self.variables,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if wait:
            await_that(self._reads_or_ended, "the flow reads", timeout_s)
            assert self._process.poll() is None, self.log
        return self

    def _reads_or_ended(self) -> bool:
        assert self._process is not None
        return '"reading {' in self.log or self._process.poll() is not None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for the end of this life; return its exit code."""
        assert self._process is not None, "this flow was not started"
        try:
            return self._process.wait(timeout_s)
        finally:
            self.kill()

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Send SIGTERM (or another signal), wait, and return the exit code."""
        assert self._process is not None, "this flow was not started"
        self._process.send_signal(number)
        return self.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def log(self) -> str:
        """What this life has said so far."""
        with self.log_file.open("rb") as file:
            file.seek(self._life_begins)
            return file.read().decode(errors="replace")

    def log_lines(self) -> list[dict[str, Any]]:
        """What this life has said in JSON."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    def metrics(self) -> str:
        """What it serves for Prometheus now."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as page:
            return str(page.read().decode())

    def asked(self, path: str) -> tuple[int, str]:
        """Return what ``/healthz`` or ``/readyz`` answer now: status code and text."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=10) as page:
                return page.status, page.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def samples(self) -> dict[str, float]:
        """Return the metrics by name and labels, in order: ``a_total{b="c",d="e"}``."""
        found = {}
        for family in text_string_to_metric_families(self.metrics()):
            for name, labels, value, *_ in family.samples:
                sorted_labels = ",".join(f'{key}="{labels[key]}"' for key in sorted(labels))
                found[f"{name}{{{sorted_labels}}}" if labels else name] = value
        return found

    def account(self) -> dict[str, dict[str, int]]:
        """Topic → outcome → events of this life: served while it runs, logged at its end.

        A life that was killed leaves none.
        """
        if not self.running:
            ends = [line for line in self.log_lines() if line["event"] == "stopped"]
            assert ends, f"the flow left no account:\n{self.log}"
            return dict(ends[-1]["account"])
        account: dict[str, dict[str, int]] = {}
        for family in text_string_to_metric_families(self.metrics()):
            for sample in family.samples if family.name == "scoring_events" else ():
                if sample.name == "scoring_events_total":
                    blank = dict.fromkeys(OUTCOMES, 0)
                    outcomes = account.setdefault(sample.labels["topic"], blank)
                    outcomes[sample.labels["outcome"]] = int(sample.value)
        return account


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class FlowEnv:
    """What a flow runs on: topics of the test's own, a recovery store, and the variables.

    Change `variables` before `flow()` as the test needs. Topics by their name in the settings:
    ``env.topics["transactions"]``.
    """

    broker: TestBroker
    topics: dict[str, str]
    variables: dict[str, str]
    directory: Path
    flows: list[Flow] = field(default_factory=list)

    def flow(self, **more: str) -> Flow:
        """Return a flow, not started, that the fixture kills in the end."""
        recovery = self.directory / "recovery"
        if not recovery.exists():
            recovery.mkdir()
            init_db_dir(recovery, 1)
        log = self.directory / f"flow_{len(self.flows)}.log"
        self.flows.append(Flow({**self.variables, **more}, recovery, log))
        return self.flows[-1]

    def read(self, name: str) -> list[Message]:
        """Read a topic, by its name in the settings, from its beginning to its end as of now."""
        return self.broker.read(self.topics[name])

    def count(self, name: str) -> int:
        """Return how many records a topic holds."""
        return len(self.read(name))

    def await_count(self, name: str, count: int, timeout_s: float = 60.0) -> list[Message]:
        """Wait until a topic holds this many records; return them."""
        found: list[Message] = []

        def enough() -> bool:
            found[:] = self.read(name)
            return len(found) >= count or not all(flow.running for flow in self.flows[-1:])

        await_that(enough, f"{count} records in {name}", timeout_s)
        assert len(found) >= count, self.flows[-1].log
        return found


@contextmanager
def environment(broker: TestBroker, model: Path, feast: Path, directory: Path) -> Iterator[FlowEnv]:
    """Make fresh topics on a broker (see `PARTITIONS`); the flows end with the block."""
    topics = {}
    for name, count in PARTITIONS.items():
        limit = MAX_MESSAGE_BYTES.get(name)
        config = {"max.message.bytes": str(limit)} if limit else {}
        topics[name] = broker.topic(name, count, config=config)
    consumer = {k: v for k, v in broker.consumer_config.items() if k not in broker.config}
    variables = {
        "KAFKA_BOOTSTRAP_SERVERS": broker.config["bootstrap.servers"],
        "KAFKA_CONSUMER_OPTIONS": json.dumps(consumer),
        "GROUP_ID": f"group_{topics['transactions']}",
        "MODEL_DIR": str(model),
        "FEAST_REPO": str(feast),
        **{f"{name.upper()}_TOPIC": topic for name, topic in topics.items()},
    }
    env = FlowEnv(broker, topics, variables, directory)
    try:
        yield env
    finally:
        for flow in env.flows:
            flow.kill()


@pytest.fixture
def flow_env(
    broker: TestBroker, tiny_model: Path, tiny_feast: Path, tmp_path: Path
) -> Iterator[FlowEnv]:
    """Return an `environment` on the broker that tests share."""
    with environment(broker, tiny_model, tiny_feast, tmp_path) as env:
        yield env
