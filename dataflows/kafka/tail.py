"""Read what was published to an output partition since a snapshot: the ids of the open epoch."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import msgspec
import numpy as np
from confluent_kafka import Consumer, KafkaError, TopicPartition

from dataflows.kafka import access
from dataflows.kafka.errors import StartupError
from dataflows.kafka.partitioner import partitions_of
from dataflows.kafka.topics import STARTUP_TIMEOUT_S, watermarks

MOST_RECORDS = 2_000_000
"""Default bound of a tail, in records; each takes some 400 bytes until it has come again."""

_logger = logging.getLogger(__name__)


class Published:
    """The records of an output partition that its next owner must not write again.

    Each is known by its event id and key, and its *origin*, the ``topic/partition/offset`` of the
    input record that caused it. An event that comes again takes its record away. What can never
    come again is forgotten, by `forget_passed`: the inputs of one partition come in order, so a
    record whose origin lies behind one that has come was published for an event that is now
    answered otherwise, or is no longer read.

    Args:
        either_copy: events with one id and key are copies of one event, of which either may be the
            one that is answered (deduplication is on). Otherwise they are two events, and only an
            equal origin, or one that is not known, says that it is the same.

    >>> published = Published()
    >>> published.add(b"tx1", b"C1", b"in/0/7"); published.add(b"tx1", b"C1", b"in/0/9")
    >>> published.take(b"tx1", b"C1", b"in/1/3"), published.take(b"tx1", b"C1", b"in/0/9")
    (False, True)
    >>> len(published), published.forget_passed(), len(published)
    (1, None, 0)
    """

    def __init__(self, *, either_copy: bool = False) -> None:
        self._either_copy = either_copy
        # By `_name`: the origin of its first record, and how many more it has of each origin, in
        # the order of noting. Few names have more than one, so few take the memory of a mapping.
        self._first: dict[bytes, bytes] = {}
        self._others: dict[bytes, OrderedDict[bytes, int]] = {}
        self._count = 0
        # Input partition → (offset, name, origin) of its records, the first ones last.
        self._queues: dict[bytes, list[tuple[int, bytes, bytes]]] = {}
        self._sorted = True
        self._passed: dict[bytes, int] = {}  # input partition → newest offset that has come

    def __len__(self) -> int:
        return self._count

    def add(self, event_id: bytes, key: bytes | None, origin: bytes) -> None:
        """Note a record. O(1)."""
        self._add(_name(event_id, key), origin)

    def _add(self, name: bytes, origin: bytes) -> None:
        if name in self._first:
            others = self._others.setdefault(name, OrderedDict())
            others[origin] = others.get(origin, 0) + 1
            if origin == self._first[name]:
                others.move_to_end(origin, last=False)
        else:
            self._first[name] = origin
        self._count += 1
        partition, _, offset = origin.rpartition(b"/")
        if partition:
            self._queues.setdefault(partition, []).append((int(offset), name, origin))
            self._sorted = False

    def take(self, event_id: bytes, key: bytes | None, origin: bytes) -> bool:
        """Tell whether this record was published, and note that it has come.

        What was published twice is taken twice. Where any origin will do, the one that was noted
        first is taken. O(1), however many records have this id and key.
        """
        partition, _, offset = origin.rpartition(b"/")
        if partition:
            self._passed[partition] = max(self._passed.get(partition, -1), int(offset))
        name = _name(event_id, key)
        if name not in self._first:
            return False
        if not self._holds(name, origin):
            if self._either_copy or not origin:
                origin = self._first[name]
            elif self._holds(name, b""):
                origin = b""
            else:
                return False
        self._remove(name, origin)
        return True

    def _holds(self, name: bytes, origin: bytes) -> bool:
        return self._first.get(name) == origin or origin in self._others.get(name, ())

    def _remove(self, name: bytes, origin: bytes) -> None:
        self._count -= 1
        others = self._others.get(name)
        if others is None:
            del self._first[name]
            return
        if origin == self._first[name]:
            origin = self._first[name] = next(iter(others))  # O(1), unlike a dict's
        others[origin] -= 1
        if not others[origin]:
            del others[origin]
        if not others:
            del self._others[name]

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
                _, name, origin = queue.pop()
                if self._holds(name, origin):
                    self._remove(name, origin)

    def moved(self, partition: int, partitions: int) -> int:
        """Count the records that belong to another partition now that there are `partitions`."""
        names = list(self._first)
        if not names:
            return 0
        elsewhere = partitions_of(list(map(_routed_by, names)), partitions) != partition
        moved = [names[row] for row in np.flatnonzero(elsewhere).tolist()]
        return len(moved) + sum(sum(self._others.get(name, {}).values()) for name in moved)

    def pack(self) -> bytes:
        """Return the records as bytes, empty if there are none. O(records)."""
        origins: dict[bytes, tuple[bytes, ...]]
        origins = {name: (first,) for name, first in self._first.items()}
        for name, others in self._others.items():
            origins[name] += tuple(chain.from_iterable(map(repeat, others, others.values())))
        return msgspec.msgpack.encode(origins) if origins else b""

    def unpack(self, packed: bytes) -> None:
        """Add what `pack` returned."""
        if packed:
            decoded = msgspec.msgpack.decode(packed, type=dict[bytes, list[bytes]])
            for name, origins in decoded.items():
                for origin in origins:
                    self._add(name, origin)


def _name(event_id: bytes, key: bytes | None) -> bytes:
    return event_id + b"\0" if key is None else event_id + b"\0k" + key


def _routed_by(name: bytes) -> bytes:
    """Return what decides on the output partition: the key, or without one the event id."""
    event_id, _, key = name.partition(b"\0")
    return key[1:] if key else event_id


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
    either_copy: bool = False,
    fenced: bool = True,
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
        either_copy: see `Published`.
        fenced: the predecessor's transaction has ended, so one that is open is a foreign writer's,
            and hides what we committed after it: it is waited for. False: read what can be read.

    Raises:
        StartupError: records after `start` are gone, there are too many, or the brokers are silent.
    """
    name = f"{topic}/{partition}"
    began = time.monotonic()
    low, high = _bounds(topic, partition, config, timeout_s, "uncommitted")
    end = (
        high if fenced else min(high, _bounds(topic, partition, config, timeout_s, "committed")[1])
    )
    consumer = _consumer(config, "committed")
    try:
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
        published = Published(either_copy=either_copy)
        _read(published, consumer, TopicPartition(topic, partition, offset), end, timeout_s)
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


def _consumer(config: Mapping[str, Any], isolation: str) -> Consumer:
    return Consumer(
        {
            "fetch.wait.max.ms": 10,
            **config,
            "group.id": "tail",  # never joined, nothing is committed
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "isolation.level": f"read_{isolation}",
            "allow.auto.create.topics": False,
        },
        logger=logging.getLogger("librdkafka"),
    )


def _bounds(
    topic: str, partition: int, config: Mapping[str, Any], timeout_s: float, isolation: str
) -> tuple[int, int]:
    """Return the first offset and the end: committed, that is where the first open transaction is;
    uncommitted, behind all that was written."""
    consumer = _consumer(config, isolation)
    try:
        servers = config.get("bootstrap.servers")
        return watermarks(consumer, topic, partition, servers, timeout_s=timeout_s)
    finally:
        consumer.close()


def _read(
    found: Published, consumer: Consumer, begin: TopicPartition, end: int, timeout_s: float
) -> None:
    """Note the records from `begin` up to offset `end`, which may be a transaction's marker."""
    if begin.offset >= end:
        return
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
                    found.add(event_id, message.key(), headers.get("origin") or b"")
            elif error.code() == KafkaError._PARTITION_EOF:
                if (message.offset() or 0) >= end:
                    return
            elif error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                pass  # the group is a name that a client has to have
            elif error.code() == KafkaError._AUTO_OFFSET_RESET or (
                not error.retriable() and error.code() >= 0
            ):
                raise StartupError(
                    f"reading {begin.topic}/{begin.partition} failed: {error.str()} "
                    f"({error.name()}). {access.not_allowed(error)}".rstrip()
                )
        if time.monotonic() - heard > timeout_s:
            raise StartupError(
                f"{begin.topic}/{begin.partition} was silent for {timeout_s:g} s before its end "
                f"({end}): see to the brokers; a transaction of a foreign writer may be open"
            )
