"""The workers of a cluster on a backlog: none runs far ahead of another. Simulated engine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from dataflows.kafka import source as module
from dataflows.kafka.peers import Peers, SharedDirectory
from dataflows.kafka.source import KafkaSource
from tests.unit.test_kafka_source import TOPICS, Broker, FakeConsumer, value

SKEW_MS = 40
PARTITIONS = {"transactions": 4, "reports": 2}
_MOST_EPOCHS = 400


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    print(f"seed {request.param}")
    return random.Random(request.param)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> Broker:
    """A backlog: some partitions are empty, or begin with records that have no time."""
    logs: dict[tuple[str, int], list[bytes | None]] = {}
    for topic, partitions in PARTITIONS.items():
        for partition in range(partitions):
            begin, end = sorted(rng.sample(range(1001), 2))
            times = sorted(rng.randint(begin, end) for _ in range(rng.choice([0, 30, 300])))
            broken: list[bytes | None] = [b"?"] * rng.choice([0, 0, 1, 40])
            logs[topic, partition] = broken + [value(topic, time) for time in times]
    FakeConsumer.broker, FakeConsumer.rng = Broker(logs), rng
    monkeypatch.setattr(module, "Consumer", FakeConsumer)
    module._drain.clear()
    return FakeConsumer.broker


class Worker:
    """A worker of its own process, with some of the partitions, as Bytewax runs it."""

    def __init__(self, source: KafkaSource, names: list[str]) -> None:
        source._readers.clear()
        source.list_parts()
        self.parts = [source.build_part("step", name, None) for name in sorted(names)]
        self.epoch = 0
        #: (epoch, stream time) of each record that has one.
        self.emitted: list[tuple[int, int]] = []
        self.count = 0

    def call(self) -> None:
        for part in self.parts:
            for records in part.next_batch():
                self.count += len(records)
                times = records.stream_time[records.stream_time >= 0].tolist()
                self.emitted += [(self.epoch, time) for time in times]

    def end_epoch(self) -> None:
        for part in self.parts:
            part.snapshot()
        self.epoch += 1


def run(broker: Broker, rng: random.Random, directory: Path, **options: Any) -> list[Worker]:
    """Run a cluster until everything has been emitted; return its workers."""
    names = [f"{topic}/{n:05d}" for topic, count in PARTITIONS.items() for n in range(count)]
    processes = rng.randint(2, 4)
    peers = [
        Peers(SharedDirectory(directory, n, processes, lambda _: True), n, processes)
        for n in range(processes)
    ]
    assert all(each.shared() for each in peers)
    rng.shuffle(names)
    owners = [rng.randrange(processes) for _ in names]
    workers = []
    for number in set(owners):  # the others have no partitions, and are never called
        source = KafkaSource(
            TOPICS,
            {"bootstrap.servers": "fake"},
            group_id="g",
            batch_size=7,
            max_hold_s=1e9,
            peers=peers[number],
            phase_keeping=False,
            **options,
        )
        source._watches = True  # threads are for real processes
        mine = [name for name, owner in zip(names, owners, strict=True) if owner == number]
        workers.append(Worker(source, mine))
    total = sum(map(len, broker.logs.values()))
    for epoch in range(_MOST_EPOCHS):
        # A worker has its own speed, and ends the epoch when it likes; some later than all calls.
        turns = [worker for worker in workers for _ in range(rng.choice([1, 5, 60]))]
        rng.shuffle(turns)
        for worker in turns:
            if worker.epoch == epoch:
                worker.call()
                if rng.random() < 0.02:
                    worker.end_epoch()
        for worker in workers:
            if worker.epoch == epoch:
                worker.end_epoch()
        if sum(worker.count for worker in workers) == total:
            return workers
    raise AssertionError(f"not done after {_MOST_EPOCHS} epochs")


def skew(workers: list[Worker]) -> int:
    """Return by how much, at most, a record was behind one of its own epoch or an earlier one."""
    emitted = sorted((at for worker in workers for at in worker.emitted), key=lambda at: at[0])
    worst, newest, begin = 0, 0, 0
    while begin < len(emitted):
        epoch = emitted[begin][0]
        end = begin
        while end < len(emitted) and emitted[end][0] == epoch:
            end += 1
        newest = max(newest, *(time for _, time in emitted[begin:end]))
        worst = max(worst, newest - min(time for _, time in emitted[begin:end]))
        begin = end
    return worst


@pytest.mark.parametrize("rng", range(60), indirect=True)
def test_in_a_backlog_no_worker_runs_ahead(
    broker: Broker, rng: random.Random, tmp_path: Path
) -> None:
    workers = run(broker, rng, tmp_path, max_skew_ms=SKEW_MS)
    assert skew(workers) <= SKEW_MS


@pytest.mark.parametrize("rng", [7], indirect=True)
def test_the_test_above_bites(broker: Broker, rng: random.Random, tmp_path: Path) -> None:
    """Without a bound most runs break it."""
    broken = 0
    for seed in range(20):
        rng.seed(seed)
        directory = tmp_path / str(seed)
        directory.mkdir()
        workers = run(broker, rng, directory, max_skew_ms=10**12)
        broken += len(workers) > 1 and skew(workers) > SKEW_MS
    assert broken >= 5
