"""What the benchmarks share: a broker, the flow, a load and a reader, each its own process.

Everything runs on this machine. The broker is Apache Kafka (`tests.kafka.cluster`), the flow the
real one with the demo's model and profiles.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from confluent_kafka import Consumer, TopicPartition
from rich.console import Console

from dataflows.demo.prepare import plan, prepare
from dataflows.demo.processes import Guard
from tests.kafka.cluster import KafkaCluster

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PARTITIONS = {
    "transactions": 4,
    "fraud_reports": 1,
    "predictions": 4,
    "dead_letters": 1,
    "audit": 1,
}


@dataclass
class Bench:
    """What all measurements share."""

    cluster: KafkaCluster
    guard: Guard
    folder: Path
    model: Path
    feast: Path
    runs: int = 0

    def run(self, delivery: str, *, retention_bytes: int | None = None) -> Run:
        """Return a run with topics and a recovery store of its own.

        A long one should say how many bytes a partition keeps, or the disk fills.
        """
        self.runs += 1
        topics = {name: f"{name}_{self.runs}" for name in PARTITIONS}
        config = {}
        if retention_bytes is not None:
            segment = max(1_048_576, retention_bytes // 4)
            config = {"retention.bytes": str(retention_bytes), "segment.bytes": str(segment)}
        for name, topic in topics.items():
            self.cluster.create_topic(topic, PARTITIONS[name], config=config)
        return Run(self, delivery, topics, self.folder / f"run{self.runs}")


@dataclass
class Run:
    """A flow on topics of its own."""

    bench: Bench
    delivery: str
    topics: dict[str, str]
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, snapshot_s: int = 10, *, flow: str = "dataflows.fraud", **variables: str
    ) -> subprocess.Popen[bytes]:
        """Start the flow, with more settings if given; return when it reads."""
        self.folder.mkdir(exist_ok=True)
        log = self.log
        before = log.stat().st_size if log.exists() else 0
        process = self.bench.guard.start(
            "bytewax.run",
            [
                *(flow, "-r", str(self.folder / "recovery")),
                *("-s", str(snapshot_s), "-b", "0"),
            ],
            log=log,
            env={
                "KAFKA_BOOTSTRAP_SERVERS": self.bench.cluster.bootstrap_servers,
                "GROUP_ID": f"bench{self.topics['transactions']}",
                "DELIVERY": self.delivery,
                "MODEL_DIR": str(self.bench.model),
                "FEAST_REPO": str(self.bench.feast),
                "LOG_FORMAT": "json",
                **{f"{name.upper()}_TOPIC": topic for name, topic in self.topics.items()},
                **variables,
            },
        )
        self.processes.append(process)
        await_that(lambda: '"reading {' in self.text(before) or process.poll() is not None)
        if process.poll() is not None:
            raise SystemExit(f"the flow did not start:\n{self.text(before)[-3000:]}")
        return process

    def start_bare(self) -> subprocess.Popen[bytes]:
        """Start the bare loop in place of the flow; return when it reads."""
        self.folder.mkdir(exist_ok=True)
        arguments = ["--bootstrap-servers", self.bench.cluster.bootstrap_servers]
        arguments += ["--source", self.topics["transactions"], "--sink", self.topics["predictions"]]
        arguments += ["--partitions", str(PARTITIONS["transactions"])]
        process = self.bench.guard.start("benchmarks.bare", arguments, log=self.log)
        self.processes.append(process)
        await_that(lambda: "reading" in self.text() or process.poll() is not None)
        return process

    @property
    def log(self) -> Path:
        return self.folder / "flow.log"

    def text(self, after: int = 0) -> str:
        return self.log.read_bytes()[after:].decode() if self.log.exists() else ""

    def load(
        self, count: int, rate: float | None = None, **options: object
    ) -> subprocess.Popen[bytes]:
        """Start to send events; `options` are those of `benchmarks.load`."""
        self.folder.mkdir(exist_ok=True)
        arguments = ["--bootstrap-servers", self.bench.cluster.bootstrap_servers]
        arguments += ["--topic", self.topics["transactions"], "--count", str(count)]
        arguments += ["--rate", str(rate)] if rate else []
        for name, value in options.items():
            arguments += [f"--{name}", str(value)]
        return self.bench.guard.start("benchmarks.load", arguments, log=self.folder / "load.log")

    def stop(self, number: int = signal.SIGTERM) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)
            process.wait(120)
            self.bench.guard.ended(process)
        self.processes.clear()

    def forget(self) -> None:
        """Delete its topics and its recovery store: many runs would fill the disk."""
        for topic in self.topics.values():
            self.bench.cluster.delete_topic(topic)
        shutil.rmtree(self.folder / "recovery", ignore_errors=True)


def await_that(condition: Callable[[], bool], timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("waited too long")
        time.sleep(0.05)


@contextmanager
def reader(run: Run, *, from_end: bool = False) -> Iterator[Consumer]:
    """Yield a consumer of the committed predictions, from the first one or from now on."""
    consumer = Consumer(
        {
            "bootstrap.servers": run.bench.cluster.bootstrap_servers,
            "group.id": "bench-reader",
            "isolation.level": "read_committed",
            "fetch.wait.max.ms": 10,
            # By default a consumer whose queue is full waits for a second: 118,000 records/s.
            "fetch.queue.backoff.ms": 2,
            "enable.auto.commit": False,
        }
    )
    topic = run.topics["predictions"]
    start = [TopicPartition(topic, n, 0) for n in range(PARTITIONS["predictions"])]
    if from_end:
        for each in start:
            each.offset = consumer.get_watermark_offsets(each, 10)[1]
    consumer.assign(start)
    try:
        yield consumer
    finally:
        consumer.close()


def published(consumer: Consumer, run: Run) -> int:
    """Return how many predictions a reader could have by now; ends of transactions included."""
    topic = run.topics["predictions"]
    ends = (
        consumer.get_watermark_offsets(TopicPartition(topic, n), 10)
        for n in range(PARTITIONS["predictions"])
    )
    return sum(high for _, high in ends)


def receive(
    consumer: Consumer, count: int, timeout_s: float
) -> Iterator[tuple[float, list[bytes]]]:
    """Yield (wall clock, values) until `count` predictions have come, as soon as they are here."""
    deadline, heard = time.monotonic() + timeout_s, 0
    while heard < count:
        if time.monotonic() > deadline:
            raise SystemExit(f"{heard} of {count} predictions came in {timeout_s:g} s")
        first = consumer.poll(0.1)
        if first is None:
            continue
        messages = [first, *consumer.consume(10_000, 0)]
        now = time.time()
        values = [m.value() for m in messages if m.error() is None]
        heard += len(values)
        if values:
            yield now, values


@contextmanager
def bench(console: Console) -> Iterator[Bench]:
    """Yield everything that a benchmark needs, with the demo's model and profiles, which it makes
    if they are not there; take it down afterwards."""
    home = ROOT / ".demo"
    home.mkdir(exist_ok=True)
    prepared = plan(home, "2018-08-08")
    with Guard() as guard:
        prepare(prepared, home, guard, console)
    with bench_with(prepared.model, prepared.feast, home) as ready:
        yield ready


@contextmanager
def bench_with(model: Path, feast: Path, home: Path) -> Iterator[Bench]:
    """Yield everything that a benchmark needs, with this model and these profiles."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=home))
    try:
        with Guard() as guard, KafkaCluster(heap="1g") as cluster:
            yield Bench(cluster, guard, folder, model, feast)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def machine() -> str:
    """Say what this was measured on."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("bytewax", "confluent-kafka")
    )
    return (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores shared by broker, generator, "
        f"flow and reader; Python {platform.python_version()}, {versions}; revision "
        f"{revision or 'unknown'}, {time.strftime('%Y-%m-%d')}."
    )
