"""Read what was published to an output partition since a snapshot: the ids of the open epoch."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from dataflows.kafka.errors import StartupError
from dataflows.kafka.topics import STARTUP_TIMEOUT_S

MOST_RECORDS = 5_000_000
"""Default bound of a tail, in records; each takes about 150 bytes until it is suppressed."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tail:
    """What a partition holds after an offset.

    Attributes:
        event_ids: how often each event id (header ``event_id``) was published.
        next_offset: the partition's end; -1 if it was not looked at.
    """

    event_ids: Counter[bytes]
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
        low, high = _watermarks(consumer, topic, partition, timeout_s)
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
                + f", more than TAIL_MAX_RECORDS ({most_records:,}): raise it (150 bytes of memory "
                "each), write to a new topic, or restore the recovery directory that belongs to "
                "this one"
            )
        event_ids = _event_ids(consumer, TopicPartition(topic, partition, offset), high, timeout_s)
    finally:
        consumer.close()
    if event_ids:
        _logger.info(
            "%s: %d records published since the last snapshot, read in %.2f s",
            name,
            event_ids.total(),
            time.monotonic() - began,
        )
    return Tail(event_ids, high)


def _watermarks(
    consumer: Consumer, topic: str, partition: int, timeout_s: float
) -> tuple[int, int]:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            found = consumer.get_watermark_offsets(
                TopicPartition(topic, partition), timeout=max(0.1, deadline - time.monotonic())
            )
            if found is not None:
                return int(found[0]), int(found[1])
            reason = "timed out"
        except KafkaException as error:
            reason = error.args[0].str()
        if time.monotonic() >= deadline:
            raise StartupError(
                f"the leader of {topic}/{partition} gave no offsets within {timeout_s:g} s "
                f"({reason}): see to the brokers"
            )
        time.sleep(0.1)


def _event_ids(
    consumer: Consumer, begin: TopicPartition, end: int, timeout_s: float
) -> Counter[bytes]:
    """Count the ids from `begin` up to offset `end`, which may be a transaction's marker."""
    found: Counter[bytes] = Counter()
    if begin.offset >= end:
        return found
    consumer.assign([begin])
    heard = time.monotonic()
    while True:
        for message in consumer.consume(10_000, timeout=0.1):
            error = message.error()
            if error is None:
                heard = time.monotonic()
                for header, content in message.headers() or ():
                    if header == "event_id":
                        found[content if isinstance(content, bytes) else str(content).encode()] += 1
                        break
            elif error.code() == KafkaError._PARTITION_EOF:
                if (message.offset() or 0) >= end:
                    return found
            elif not error.retriable() and error.code() >= 0:
                raise StartupError(
                    f"reading {begin.topic}/{begin.partition} failed: {error.str()} "
                    f"({error.name()})"
                )
        if time.monotonic() - heard > timeout_s:
            raise StartupError(
                f"{begin.topic}/{begin.partition} was silent for {timeout_s:g} s before its end "
                f"({end}): see to the brokers; a transaction of a foreign writer may be open"
            )
