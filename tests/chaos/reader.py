"""What is on the brokers and in the store, read with nothing of the flow's own code."""

from __future__ import annotations

import pickle
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, TopicPartition

_SILENCE_S = 30.0

#: A topic and a partition.
Place = tuple[str, int]


class Record(NamedTuple):
    """A record as it is on the broker."""

    topic: str
    partition: int
    offset: int
    value: bytes | None
    headers: dict[str, bytes | None]

    @property
    def place(self) -> Place:
        return self.topic, self.partition


class Reader:
    """Read topics as a reader of committed records does, and keep all that was read."""

    def __init__(self, servers: str, topics: Iterable[str]) -> None:
        self._address = {"bootstrap.servers": servers}
        self._consumer = Consumer(
            {
                "bootstrap.servers": servers,
                "group.id": "chaos-reader",  # nothing is committed
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": 10,
            }
        )
        known = self._consumer.list_topics(timeout=30).topics
        self._next = {(topic, p): 0 for topic in topics for p in known[topic].partitions}
        self.records: dict[str, list[Record]] = {topic: [] for topic in topics}

    def catch_up(self) -> None:
        """Read every partition to its end as of now."""
        left = set(self._next)
        self._consumer.assign([TopicPartition(*place, at) for place, at in self._next.items()])
        deadline = time.monotonic() + _SILENCE_S
        while left:
            assert time.monotonic() < deadline, f"no end of {left} for {_SILENCE_S:g} s"
            for message in self._consumer.consume(1000, timeout=0.05):
                deadline = time.monotonic() + _SILENCE_S
                topic, partition, offset = message.topic(), message.partition(), message.offset()
                error = message.error()
                assert topic is not None and partition is not None and offset is not None
                if error is None:
                    headers = dict(message.headers() or [])
                    record = Record(topic, partition, offset, message.value(), headers)
                    self.records[topic].append(record)
                    self._next[topic, partition] = offset + 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard((topic, partition))
                else:
                    assert error.retriable(), error
        self._consumer.unassign()

    def ends(self, topics: Iterable[str]) -> dict[Place, int]:
        """Return the end of each partition, uncommitted records included."""
        wanted = set(topics)
        consumer = Consumer(
            {**self._address, "group.id": "chaos-ends", "isolation.level": "read_uncommitted"}
        )
        try:
            return {
                (topic, p): consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=30)[1]
                for topic, p in self._next
                if topic in wanted
            }
        finally:
            consumer.close()

    def close(self) -> None:
        self._consumer.close()


def resume_offsets(*stores: Path) -> dict[Place, int]:
    """Return where a flow on this recovery store goes on reading, by input partition.

    `stores`: the directories that its parts are in. As Bytewax 0.21.1 reckons it: the newest
    snapshots from before the first epoch that is not stored by every worker of the last execution.
    """
    parts = [part for store in stores for part in store.glob("part-*.sqlite3")]
    executions: dict[int, tuple[int, int]] = {}
    fronts: dict[tuple[int, int], int] = {}
    for part in parts:
        with _read(part) as opened:
            for number, workers, began in opened.execute(
                "SELECT ex_num, worker_count, resume_epoch FROM exs"
            ):
                executions[number] = workers, began
            for number, worker, front in opened.execute(
                "SELECT ex_num, worker_index, worker_frontier FROM fronts"
            ):
                fronts[number, worker] = front
    if not executions:
        return {}
    last = max(executions)
    workers, began = executions[last]
    epoch = min(fronts.get((last, worker), began) for worker in range(workers))
    offsets: dict[Place, int] = {}
    for part in parts:
        with _read(part) as opened:
            for key, change in opened.execute(
                "SELECT state_key, ser_change FROM snaps JOIN (SELECT step_id, state_key, "
                "MAX(snap_epoch) AS snap_epoch FROM snaps WHERE snap_epoch < ? AND "
                "step_id = 'fraud.records' GROUP BY step_id, state_key) "
                "USING (step_id, state_key, snap_epoch)",
                (epoch,),
            ):
                topic, _, partition = key.rpartition("/")
                offsets[topic, int(partition)] = pickle.loads(change)
    return offsets


@contextmanager
def _read(part: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"{part.as_uri()}?mode=ro", uri=True)) as opened:
        opened.execute("BEGIN")
        yield opened
