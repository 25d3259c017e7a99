"""Keep what the flow refuses, as it came, with the reason; list it; send it back.

A dead letter is the original record, its key, its bytes (a tombstone stays a tombstone) and its
headers, plus headers that say why and where from:

==================  ==================================================================
``dlq.reason``      a short word to count and filter by, such as ``invalid_json``
``dlq.detail``      what exactly was wrong, in a sentence
``dlq.topic``       where the record was read from (or, if it never was, meant to go)
``dlq.partition``   decimal
``dlq.offset``      decimal; -1 if the record was never in the topic
``dlq.timestamp``   the record's own timestamp, decimal milliseconds since the epoch
``dlq.truncated``   only if the value was cut to fit: its full length in bytes
``dlq.sha256``      with ``dlq.truncated``: hash of the full value
``dlq.replayed``    on a record sent back by a replay: how many times it has been
==================  ==================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from confluent_kafka import Message

from dataflows.kafka.records import Header, OutRecords

REASON = "dlq.reason"
DETAIL = "dlq.detail"
TOPIC = "dlq.topic"
PARTITION = "dlq.partition"
OFFSET = "dlq.offset"
TIMESTAMP = "dlq.timestamp"
TRUNCATED = "dlq.truncated"
SHA256 = "dlq.sha256"
REPLAYED = "dlq.replayed"

MAX_VALUE_BYTES = 900_000
"""Longest value kept whole: Kafka's default record limit of 1 MB, less key and headers."""

_MAX_DETAIL_BYTES = 1_000
_SENT_BY_SINK = frozenset({"event_id", "origin"})


@dataclass(frozen=True, slots=True)
class DeadLetterSettings:
    """Say where dead letters go and how long a value they may hold, in bytes."""

    topic: str
    max_value_bytes: int = MAX_VALUE_BYTES


def reason_headers(
    reason: str, detail: str, topic: str, partition: int, offset: int, timestamp: int
) -> list[Header]:
    """Return the headers that make a record a dead letter."""
    return [
        (REASON, reason.encode()),
        (DETAIL, detail.encode("utf-8", "replace")[:_MAX_DETAIL_BYTES]),
        (TOPIC, topic.encode()),
        (PARTITION, b"%d" % partition),
        (OFFSET, b"%d" % offset),
        (TIMESTAMP, b"%d" % timestamp),
    ]


def fit(value: bytes | None, limit: int) -> tuple[bytes | None, list[Header]]:
    """Cut `value` to `limit` bytes; return it with the headers that say so, if any.

    >>> fit(b"abcdef", 4)[0], fit(b"abcdef", 4)[1][0]
    (b'abcd', ('dlq.truncated', b'6'))
    >>> fit(None, 4)
    (None, [])
    """
    if value is None or len(value) <= limit:
        return value, []
    digest = hashlib.sha256(value).hexdigest().encode()
    return value[:limit], [(TRUNCATED, b"%d" % len(value)), (SHA256, digest)]


def dead_letters(
    messages: Sequence[Message],
    reasons: Sequence[str],
    details: Sequence[str],
    *,
    max_value_bytes: int = MAX_VALUE_BYTES,
) -> OutRecords:
    """Return the dead letters of refused `messages`, ready for `dataflows.kafka.sink.output`.

    Args:
        messages: as consumed; topic, partition, offset and timestamp are read from them.
        reasons: one word for each.
        details: one sentence for each; cut to 1000 bytes.
        max_value_bytes: longer values are cut; a replay then reads them from the source topic.

    The event id of a dead letter is its origin, ``topic/partition/offset``. Its ``append_time``
    is the refused record's, so the latency of refusals is measured too.
    """
    values: list[bytes | None] = []
    keys: list[bytes | None] = []
    times: list[int] = []
    ids: list[bytes] = []
    headers: list[list[Header]] = []
    for message, reason, detail in zip(messages, reasons, details, strict=True):
        topic, partition, offset = message.topic(), message.partition(), message.offset()
        if topic is None or partition is None or offset is None:
            raise ValueError("a dead letter needs a consumed message: this one has no offset")
        _, timestamp = message.timestamp()
        value, truncation = fit(message.value(), max_value_bytes)
        original = [
            (name, content if content is None or isinstance(content, bytes) else content.encode())
            for name, content in message.headers() or []
            if name not in _SENT_BY_SINK
        ]
        values.append(value)
        keys.append(message.key())
        times.append(timestamp)
        ids.append(f"{topic}/{partition}/{offset}".encode())
        headers.append(
            original
            + reason_headers(reason, detail, topic, partition, offset, timestamp)
            + truncation
        )
    return OutRecords(keys, values, np.array(times, dtype=np.int64), ids, headers=headers)
