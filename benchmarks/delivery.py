"""What exactly-once costs: throughput, latency and the start after a crash, on real Kafka.

    make bench-delivery

The real flow (the demo's model and profiles; cards and terminals uniform), a broker of its own
(`tests.kafka.cluster`), a load generator and a reader of committed records, all on this machine.
The broker is warm: a run of each guarantee, for as long as a latency run, goes before and does not
count. (A new JVM compiles its code on one of two cores for about a minute; p99 is then seconds.)

* Throughput: how fast a backlog is scored, both guarantees in turn; the steady part, from the
  first tenth of the predictions to the last, as the reader receives them.
* Latency: from an event's intended time of sending to the reader's receiving its prediction, both
  guarantees in turn. Percentiles are of all runs; what exactly-once adds is the median over the
  pairs.
* Tail scan: the flow is killed when it has published an epoch's worth of predictions, and started
  again; the time is that of the slowest partition, from the log.

Writes benchmarks/results/delivery.md. Budgets are asserted here, not in tests; a miss ends the
command with 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from confluent_kafka import Consumer, TopicPartition
from hdrh.histogram import HdrHistogram
from rich.console import Console

from dataflows.demo.prepare import Prepared, plan, prepare
from dataflows.demo.processes import Guard
from tests.kafka.cluster import KafkaCluster

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MODES = ("at_least_once", "exactly_once")
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
    prepared: Prepared
    guard: Guard
    folder: Path
    runs: int = 0

    def run(self, delivery: str) -> Run:
        """Return a run with topics and a recovery store of its own."""
        self.runs += 1
        topics = {name: f"{name}_{self.runs}" for name in PARTITIONS}
        for name, topic in topics.items():
            self.cluster.create_topic(topic, PARTITIONS[name])
        return Run(self, delivery, topics, self.folder / f"run{self.runs}")


@dataclass
class Run:
    """A flow on topics of its own."""

    bench: Bench
    delivery: str
    topics: dict[str, str]
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, snapshot_s: int) -> subprocess.Popen[bytes]:
        """Start the flow; return when it reads."""
        self.folder.mkdir(exist_ok=True)
        log = self.log
        before = log.stat().st_size if log.exists() else 0
        process = self.bench.guard.start(
            "bytewax.run",
            [
                *("dataflows.fraud", "-r", str(self.folder / "recovery")),
                *("-s", str(snapshot_s), "-b", "0"),
            ],
            log=log,
            env={
                "KAFKA_BOOTSTRAP_SERVERS": self.bench.cluster.bootstrap_servers,
                "GROUP_ID": f"bench{self.topics['transactions']}",
                "DELIVERY": self.delivery,
                "MODEL_DIR": str(self.bench.prepared.model),
                "FEAST_REPO": str(self.bench.prepared.feast),
                "LOG_FORMAT": "json",
                **{f"{name.upper()}_TOPIC": topic for name, topic in self.topics.items()},
            },
        )
        self.processes.append(process)
        await_that(lambda: '"reading {' in self.text(before) or process.poll() is not None)
        if process.poll() is not None:
            raise SystemExit(f"the flow did not start:\n{self.text(before)[-3000:]}")
        return process

    @property
    def log(self) -> Path:
        return self.folder / "flow.log"

    def text(self, after: int = 0) -> str:
        return self.log.read_bytes()[after:].decode() if self.log.exists() else ""

    def load(self, count: int, rate: float | None = None) -> subprocess.Popen[bytes]:
        """Start to send events."""
        self.folder.mkdir(exist_ok=True)
        arguments = ["--bootstrap-servers", self.bench.cluster.bootstrap_servers]
        arguments += ["--topic", self.topics["transactions"], "--count", str(count)]
        arguments += ["--rate", str(rate)] if rate else []
        return self.bench.guard.start("benchmarks.load", arguments, log=self.folder / "load.log")

    def stop(self, number: int = signal.SIGTERM) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)
            process.wait(120)
            self.bench.guard.ended(process)
        self.processes.clear()


def await_that(condition: Callable[[], bool], timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("waited too long")
        time.sleep(0.05)


@contextmanager
def reader(run: Run) -> Iterator[Consumer]:
    """Yield a consumer of the committed predictions, from now on."""
    consumer = Consumer(
        {
            "bootstrap.servers": run.bench.cluster.bootstrap_servers,
            "group.id": "bench-reader",
            "isolation.level": "read_committed",
            "fetch.wait.max.ms": 10,
            "enable.auto.commit": False,
        }
    )
    topic = run.topics["predictions"]
    consumer.assign([TopicPartition(topic, n, 0) for n in range(PARTITIONS["predictions"])])
    try:
        yield consumer
    finally:
        consumer.close()


def receive(
    consumer: Consumer, count: int, timeout_s: float
) -> Iterator[tuple[float, list[bytes]]]:
    """Yield (wall clock, values) until `count` predictions have come."""
    deadline, heard = time.monotonic() + timeout_s, 0
    while heard < count:
        if time.monotonic() > deadline:
            raise SystemExit(f"{heard} of {count} predictions came in {timeout_s:g} s")
        messages = consumer.consume(10_000, 0.02)
        now = time.time()
        values = [m.value() for m in messages if m.error() is None]
        heard += len(values)
        if values:
            yield now, values


def throughput(bench: Bench, delivery: str, count: int) -> float:
    """Return events/s scored from a backlog."""
    run = bench.run(delivery)
    run.load(count).wait()
    run.start(snapshot_s=10)
    seen, times, counts = 0, [], []
    with reader(run) as consumer:
        for now, values in receive(consumer, count, 300):
            seen += len(values)
            times.append(now)
            counts.append(seen)
    run.stop()
    first = int(np.searchsorted(counts, count / 10))
    return (counts[-1] - counts[first]) / (times[-1] - times[first])


_EVENT_TIME = re.compile(rb'"event_time":(\d+)')


def latency(bench: Bench, delivery: str, rate: float, seconds: float) -> HdrHistogram:
    """Return latencies in units of 0.1 ms, of the events after the first fifth."""
    run = bench.run(delivery)
    count = int(rate * seconds)
    histogram = HdrHistogram(1, 36_000_000, 3)
    run.start(snapshot_s=10)
    with reader(run) as consumer:
        consumer.consume(1, 1.0)
        load = run.load(count, rate)
        warm_after_ms = None
        for now, values in receive(consumer, count, seconds + 120):
            for value in values:
                found = _EVENT_TIME.search(value)
                assert found is not None
                at_ms = int(found[1])
                warm_after_ms = warm_after_ms or at_ms + seconds * 200
                if at_ms >= warm_after_ms:
                    histogram.record_value(max(1, round((now * 1000 - at_ms) * 10)))
        load.wait()
    run.stop()
    return histogram


def tail_scan(bench: Bench, count: int) -> tuple[int, float]:
    """Return how many records were read, and the seconds that took."""
    run = bench.run("exactly_once")
    run.load(count).wait()
    run.start(snapshot_s=3600)
    with reader(run) as consumer:
        for _ in receive(consumer, count, 300):
            pass
    run.stop(signal.SIGKILL)
    before = len(run.text())
    run.start(snapshot_s=3600)
    pattern = re.compile(r"predictions_\d+/\d+: (\d+) records published .* read in ([\d.]+) s")
    found: list[tuple[str, str]] = []

    def complete() -> bool:
        found[:] = pattern.findall(run.text(before))
        return sum(int(records) for records, _ in found) >= count

    await_that(complete)
    run.stop(signal.SIGKILL)  # a drain would wait for the epoch's end
    return sum(int(records) for records, _ in found), max(float(s) for _, s in found)


def main() -> int:
    """Run the command line; return 1 if a budget is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.delivery", description=__doc__)
    parser.add_argument("--backlog", type=int, default=400_000, help="events of a throughput run")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each guarantee")
    parser.add_argument("--rate", type=float, default=10_000, help="events/s of the latency runs")
    parser.add_argument("--seconds", type=float, default=30, help="length of the latency runs")
    parser.add_argument("--tail", type=int, default=200_000, help="records of the tail scan")
    options = parser.parse_args()
    home = ROOT / ".demo"
    home.mkdir(exist_ok=True)
    console = Console(stderr=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=home))
    try:
        with Guard() as guard:
            prepared = plan(home, "2018-08-08")
            prepare(prepared, home, guard, console)
            with KafkaCluster(heap="1g") as cluster:
                report, missed = measure(Bench(cluster, prepared, guard, folder), options, console)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "delivery.md").write_text(report)
    print(report)
    for each in missed:
        print(f"over budget: {each}", file=sys.stderr)
    return 1 if missed else 0


def measure(bench: Bench, options: argparse.Namespace, console: Console) -> tuple[str, list[str]]:
    """Take all measurements; return the report and the budgets missed."""
    for mode in MODES:
        latency(bench, mode, options.rate, options.seconds)
    console.print("the broker is warm")
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(options.pairs):
        for mode in MODES:
            rates[mode].append(throughput(bench, mode, options.backlog))
            console.print(f"{mode}: {rates[mode][-1]:,.0f} events/s")
    # In pairs, one after the other: what else the machine does changes slowly.
    ratio = statistics.median(
        once / least
        for least, once in zip(rates["at_least_once"], rates["exactly_once"], strict=True)
    )
    p99s: dict[str, list[float]] = {mode: [] for mode in MODES}
    histograms = {mode: HdrHistogram(1, 36_000_000, 3) for mode in MODES}
    for _ in range(options.pairs):
        for mode in MODES:
            histogram = latency(bench, mode, options.rate, options.seconds)
            histograms[mode].add(histogram)
            p99s[mode].append(histogram.get_value_at_percentile(99) / 10)
            console.print(f"{mode}: p99 {p99s[mode][-1]:.1f} ms")
    more_ms = statistics.median(
        once - least for least, once in zip(*(p99s[mode] for mode in MODES), strict=True)
    )
    records, scan_s = tail_scan(bench, options.tail)
    rows = []
    for mode in MODES:
        percentiles = [histograms[mode].get_value_at_percentile(p) / 10 for p in (50, 95, 99, 99.9)]
        cells = [f"{value:,.1f}" for value in percentiles]
        runs = " / ".join(f"{rate:,.0f}" for rate in rates[mode])
        tails = " / ".join(f"{each:,.1f}" for each in p99s[mode])
        rows.append(f"| {mode} | {runs} | " + " | ".join(cells) + f" | {tails} |")
    budgets = [
        ("throughput, exactly-once over at-least-once", f"{ratio:.2f}", "≥ 0.75", ratio >= 0.75),
        (
            f"p99 at {options.rate:,.0f} events/s, exactly-once over at-least-once",
            f"{more_ms:+.0f} ms",
            "≤ +150 ms",
            more_ms <= 150,
        ),
        (f"tail scan of {records:,} records", f"{scan_s:.1f} s", "< 5 s", scan_s < 5),
    ]
    lines = [
        "# What exactly-once costs",
        "",
        f"`python -m benchmarks.delivery {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        machine(),
        "",
        f"Backlog of {options.backlog:,} events; latency at {options.rate:,.0f} events/s over "
        f"{options.seconds:g} s, from the intended sending to a reader of committed records, in "
        "ms. The broker was warm.",
        "",
        "| guarantee | events/s, each run | p50 | p95 | p99 | p99.9 | p99, each run |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "| budget | measured | wanted | |",
        "|---|---|---|---|",
        *(
            f"| {what} | {value} | {wanted} | {'met' if met else '**missed**'} |"
            for what, value, wanted, met in budgets
        ),
    ]
    missed = [
        f"{what}: {value}, wanted {wanted}" for what, value, wanted, met in budgets if not met
    ]
    return "\n".join(lines) + "\n", missed


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


if __name__ == "__main__":
    sys.exit(main())
