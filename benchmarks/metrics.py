"""What being observed costs: the worker's time per event with metrics and without.

    python -m benchmarks.metrics

The real graph in one process, behind prepared micro-batches and before the embedded broker (what
goes over the network costs the same either way), with a scrape every second. Without: counters,
gauges and histograms take what they are told and do nothing. Pairs of runs, each in a process of
its own, in turn; CPU time of the worker's thread, because this machine's clock on the wall is
noisier than what is looked for. Not in it: the scrape's own time, 2 ms of another thread, and what
the Kafka source counts, four times a second.

Ends with 1 if it costs more than 2 %. Writes benchmarks/results/metrics.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.testing import run_main
from prometheus_client import Counter, Gauge, Histogram, generate_latest
from rich.console import Console

from benchmarks.harness import PARTITIONS, RESULTS, ROOT, machine
from benchmarks.load import CARDS, TERMINALS, event_times_ms
from dataflows.demo.prepare import plan, prepare
from dataflows.demo.processes import Guard
from dataflows.fraud import graph
from dataflows.kafka.dev_broker import MockCluster
from dataflows.kafka.records import Records
from dataflows.kafka.sink import poll_sinks
from dataflows.metrics import METRICS, ArrayHistogram
from dataflows.runtime import Runtime
from dataflows.settings import load
from features.online_store import freeze_gc

MOST_COST = 0.02
EVENTS, WARM_UP = 200_000, 0.2


class _Message:
    """As much of a consumed record as the flow looks at."""

    __slots__ = ("_at", "_key", "_value")

    def __init__(self, value: bytes, key: bytes, at: int) -> None:
        self._value, self._key, self._at = value, key, at

    def value(self) -> bytes:
        return self._value

    def key(self) -> bytes:
        return self._key

    def timestamp(self) -> tuple[int, int]:
        return 1, self._at

    def headers(self) -> None:
        return None


def batches_of(size: int) -> list[Records]:
    """Return `EVENTS` transactions in micro-batches."""
    rng, now_ms = np.random.default_rng(1), time.time() * 1000
    card, terminal = rng.integers(0, CARDS, EVENTS), rng.integers(0, TERMINALS, EVENTS)
    amount, at = rng.gamma(2.0, 30.0, EVENTS).round(2) + 0.01, event_times_ms(EVENTS, CARDS, now_ms)
    messages: list[Any] = [
        _Message(
            b'{"transaction_id":"tx%d","card_id":"C%05d","terminal_id":"T%05d","event_time":%d,'
            b'"amount":%.2f}' % (n, card[n], terminal[n], at[n], amount[n]),
            b"C%05d" % card[n],
            int(now_ms),
        )
        for n in range(EVENTS)
    ]
    found = []
    for start in range(0, EVENTS, size):
        rows = np.arange(start, min(start + size, EVENTS))
        found.append(
            Records(
                messages[start : start + size],
                np.ones(len(rows), np.uint8),
                (rows % 4).astype(np.int32),
                rows // 4,
                np.full(len(rows), int(now_ms)),
                at[rows],
            )
        )
    return found


def run(size: int) -> float:
    """Run the graph over all of it; return the worker's CPU time per event, in µs."""
    batches = batches_of(size)
    marks: list[float] = []

    class Part(StatefulSourcePartition[Records, int]):
        def __init__(self) -> None:
            self.next = 0

        def next_batch(self) -> list[Records]:
            poll_sinks()
            if self.next in (round(WARM_UP * len(batches)), len(batches)):
                marks.append(time.thread_time())
            if self.next == len(batches):
                raise StopIteration
            self.next += 1
            return [batches[self.next - 1]]

        def snapshot(self) -> int:
            return self.next

    class Source(FixedPartitionedSource[Records, int]):
        def list_parts(self) -> list[str]:
            return ["all"]

        def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> Part:
            return Part()

    broker = MockCluster(1)
    for topic, count in PARTITIONS.items():
        broker.create_topic(topic, count)
    settings = load(kafka_bootstrap_servers=broker.bootstrap_servers)
    runtime = Runtime.of(settings)
    freeze_gc()
    run_main(graph(dataclasses.replace(runtime, source=Source())))  # type: ignore[arg-type]
    return (marks[1] - marks[0]) / (EVENTS * (1 - WARM_UP)) * 1e6


def nothing(*_: object, **__: object) -> None:
    """Take what is told, and do nothing."""


def child(size: int, metrics: bool) -> None:
    """Run once and print the result."""
    if metrics:
        threading.Thread(target=_scrape, daemon=True).start()
    else:
        for kind in (Counter, Gauge):
            kind.inc = nothing  # type: ignore[method-assign]
        Gauge.set = Histogram.observe = nothing  # type: ignore[method-assign]
        ArrayHistogram.observe = nothing  # type: ignore[method-assign]
    print(run(size))


def _scrape() -> None:
    while True:
        generate_latest(METRICS.registry)
        time.sleep(1)


def main() -> int:
    """Run the command line; return 1 if metrics cost too much."""
    parser = argparse.ArgumentParser("python -m benchmarks.metrics", description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--size", type=int, default=256, help="events of a micro-batch")
    parser.add_argument("--child", choices=("with", "without"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.size, options.child == "with")
        return 0
    home = ROOT / ".demo"
    home.mkdir(exist_ok=True)
    prepared = plan(home, "2018-08-08")
    with Guard() as guard:
        prepare(prepared, home, guard, Console(stderr=True))
    environment = {"MODEL_DIR": str(prepared.model), "FEAST_REPO": str(prepared.feast)}
    found: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(options.pairs):
        for kind, values in found.items():
            command = [sys.executable, "-m", "benchmarks.metrics", "--child", kind]
            command += ["--size", str(options.size)]
            ended = subprocess.run(
                command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
            )
            if ended.returncode:
                raise SystemExit(ended.stderr[-3000:])
            values.append(float(ended.stdout.splitlines()[-1]))
    ratios = np.array(found["with"]) / np.array(found["without"]) - 1
    cost = float(np.median(ratios))
    page = "\n".join(
        [
            "# What metrics cost",
            "",
            f"`python -m benchmarks.metrics --pairs {options.pairs} --size {options.size}`",
            "",
            machine(),
            "",
            "CPU time of the worker per event, the graph without its source; micro-batches of "
            f"{options.size}; one scrape a second.",
            "",
            "| | µs/event, median (least) |",
            "|---|---|",
            *(
                f"| {kind} metrics | {np.median(values):.2f} ({min(values):.2f}) |"
                for kind, values in found.items()
            ),
            f"| cost, median of {options.pairs} pairs | {cost:+.1%} (at most {MOST_COST:.0%}); "
            f"pairs from {ratios.min():+.1%} to {ratios.max():+.1%} |",
            "",
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "metrics.md").write_text(page)
    print(page)
    return 0 if cost <= MOST_COST else 1


if __name__ == "__main__":
    sys.exit(main())
