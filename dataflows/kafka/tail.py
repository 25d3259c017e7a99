"""Read what was published to an output partition since a snapshot: the ids of the open epoch."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaError, TopicPartition

from dataflows.kafka.errors import StartupError
from dataflows.kafka.topics import STARTUP_TIMEOUT_S, watermarks

MOST_RECORDS = 2_000_000
"""Default bound of a tail, in records; each takes some 400 bytes until it has come again."""

_logger = logging.getLogger(__name__)


class Published:
    """The records of an output partition that its next owner must not write again.

    Each is known by its event id and its *origin*, the ``topic/partition/offset`` of the input
    record that caused it. An event that comes again takes its id away. What can never come again
    is forgotten, by `forget_passed`: the inputs of one partition come in order, so a record whose
    origin lies behind one that has come was published for an event that is now answered otherwise,
    or is no longer read.

    >>> published = Published()
    >>> published.add(b"tx1", b"in/0/7"); published.add(b"tx1", b"in/0/9")
    >>> published.take(b"tx1", b"in/0/9"), published.take(b"tx2", b"in/0/10"), len(published)
    (True, False, 1)
    >>> published.forget_passed(); len(published)
    0
    """

    def __init__(self) -> None:
        self._origins: dict[bytes, list[bytes]] = {}
        self._count = 0
        # Input partition → (offset, event id, origin) of its records, the first ones last.
        self._queues: dict[bytes, list[tuple[int, bytes, bytes]]] = {}
        self._sorted = True
        self._passed: dict[bytes, int] = {}  # input partition → newest offset that has come

    def __len__(self) -> int:
        return self._count

    def add(self, event_id: bytes, origin: bytes) -> None:
        """Note a record. O(1)."""
        self._origins.setdefault(event_id, []).append(origin)
        self._count += 1
        partition, _, offset = origin.rpartition(b"/")
        if partition:
            self._queues.setdefault(partition, []).append((int(offset), event_id, origin))
            self._sorted = False

    def take(self, event_id: bytes, origin: bytes) -> bool:
        """Tell whether a record with this id was published, and note that it has come. O(1).

        An id that was published twice is taken twice, its own origin first.
        """
        partition, _, offset = origin.rpartition(b"/")
        if partition:
            self._passed[partition] = max(self._passed.get(partition, -1), int(offset))
        origins = self._origins.get(event_id)
        if origins is None:
            return False
        self._remove(event_id, origin if origin in origins else origins[0])
        return True

    def _remove(self, event_id: bytes, origin: bytes) -> None:
        origins = self._origins[event_id]
        origins.remove(origin)
        self._count -= 1
        if not origins:
            del self._origins[event_id]

    def forget_passed(self) -> None:
        """Forget what can never come again; call it when an epoch is complete.

        Amortised O(log n) a record.
        """
        if not self._sorted:
            for queue in self._queues.values():
                queue.sort(reverse=True)
            self._sorted = True
        for partition, newest in self._passed.items():
            queue = self._queues.get(partition, [])
            while queue and queue[-1][0] <= newest:
                _, event_id, origin = queue.pop()
                if origin in self._origins.get(event_id, ()):
                    self._remove(event_id, origin)

    def pack(self) -> bytes:
        """Return the records as bytes, empty if there are none."""
        return msgspec.msgpack.encode(self._origins) if self._count else b""

    def unpack(self, packed: bytes) -> None:
        """Add what `pack` returned."""
        if packed:
            decoded = msgspec.msgpack.decode(packed, type=dict[bytes, list[bytes]])
            for event_id, origins in decoded.items():
                for origin in origins:
                    self.add(event_id, origin)


@dataclass(frozen=True, slots=True)
class Tail:
    """What a partition holds after an offset, and where it ends."""

    published: Published
    next_offset: int


def read_tail(
    topic: str,
    partition: int,
    start: int | None,
    config: Mapping[str, Any],
    *,
    past_retention: bool = False,
    most_records: int = MOST_RECORDS,
    timeout_s: float = STARTUP_TIMEOUT_S,
) -> Tail:
    """Return the committed records of a partition from an offset on. O(records).

    Args:
        topic, partition: of the output.
        start: offset after the last record of a snapshot. None: there is no snapshot of this
            partition, and any record of it may be of a life that left none: read it whole.
        config: librdkafka consumer settings.
        past_retention: go on if records after `start` have been deleted, though they may have been
            published by the flow and are then published again.
        most_records: bound; more than this is not read.
        timeout_s: longest silence of the brokers.

    Raises:
        StartupError: records after `start` are gone, there are too many, or the brokers are silent.
    """
    name = f"{topic}/{partition}"
    consumer = Consumer(
        {
            "fetch.wait.max.ms": 10,
            **config,
            "group.id": "tail",  # never joined, nothing is committed
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "allow.auto.create.topics": False,
        },
        logger=logging.getLogger("librdkafka"),
    )
    began = time.monotonic()
    try:
        servers = config.get("bootstrap.servers")
        low, high = watermarks(consumer, topic, partition, servers, timeout_s=timeout_s)
        if start is not None and start > high:
            raise StartupError(
                f"{name} ends at {high}, before the snapshot's {start}: the topic was recreated, "
                "or lost records. Start with a new recovery directory, or restore the topic"
            )
        if start is not None and start < low:
            if not past_retention:
                raise StartupError(
                    f"{name}: records {start} to {low} are gone, by retention, and some may be "
                    "predictions that would now be published again. Go on with "
                    "RESUME_PAST_RETENTION=true, and keep output longer than the longest stop"
                )
            _logger.error("%s: %d published records are gone and unknown", name, low - start)
        offset = low if start is None else max(start, low)
        if high - offset > most_records:
            raise StartupError(
                f"{name} holds {high - offset:,} records "
                + ("and the recovery store knows none of them" if start is None else "to compare")
                + f", more than TAIL_MAX_RECORDS ({most_records:,}): raise it (400 bytes of memory "
                "each), write to a new topic, or restore the recovery directory that belongs to "
                "this one"
            )
        published = _published(consumer, TopicPartition(topic, partition, offset), high, timeout_s)
    finally:
        consumer.close()
    if published:
        _logger.info(
            "%s: %d records published since the last snapshot, read in %.2f s",
            name,
            len(published),
            time.monotonic() - began,
        )
    return Tail(published, high)


def _published(consumer: Consumer, begin: TopicPartition, end: int, timeout_s: float) -> Published:
    """Note the records from `begin` up to offset `end`, which may be a transaction's marker."""
    found = Published()
    if begin.offset >= end:
        return found
    consumer.assign([begin])
    heard = time.monotonic()
    while True:
        for message in consumer.consume(10_000, timeout=0.1):
            error = message.error()
            if error is None:
                heard = time.monotonic()
                headers: dict[str, Any] = dict(message.headers() or ())
                event_id = headers.get("event_id")
                if event_id is not None:
                    found.add(event_id, headers.get("origin") or b"")
            elif error.code() == KafkaError._PARTITION_EOF:
                if (message.offset() or 0) >= end:
                    return found
            elif error.code() == KafkaError._AUTO_OFFSET_RESET or (
                not error.retriable() and error.code() >= 0
            ):
                raise StartupError(
                    f"reading {begin.topic}/{begin.partition} failed: {error.str()} "
                    f"({error.name()})"
                )
        if time.monotonic() - heard > timeout_s:
            raise StartupError(
                f"{begin.topic}/{begin.partition} was silent for {timeout_s:g} s before its end "
                f"({end}): see to the brokers; a transaction of a foreign writer may be open"
            )
