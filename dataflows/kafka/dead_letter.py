"""Keep what the flow refuses, as it came, with the reason; list it; send it back.

A dead letter is the original record, its key, its bytes (a tombstone stays a tombstone) and its
headers, plus headers that say why and where from:

=====================  =================================================================
``dlq.reason``         a short word to count and filter by, such as ``invalid_json``
``dlq.detail``         what exactly was wrong, in a sentence
``dlq.topic``          where the record was read from (or, if it never was, meant to go)
``dlq.partition``      decimal
``dlq.offset``         decimal; -1 if the record was never in the topic
``dlq.timestamp``      the record's own timestamp, decimal milliseconds since the epoch
``dlq.truncated``      only if the value was cut to fit: its full length in bytes
``dlq.sha256``         with ``dlq.truncated``: hash of the full value
``dlq.key_truncated``  only if the key was cut to fit: its full length in bytes
``dlq.headers``        only if the record's own headers are missing: ``omitted: N bytes``
                       (too long to fit) or ``unreadable`` (a name is not UTF-8)
``dlq.replayed``       on a record sent back by a replay: how many times it has been
=====================  =================================================================

What of a record's own headers begins with ``dlq.`` is not kept, except ``dlq.replayed``.

Key, own headers and value share one budget, so that the dead-letter topic takes every dead letter.
If its limit is lower still, the sink writes a `stub`: the reasons and no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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
KEY_TRUNCATED = "dlq.key_truncated"
HEADERS = "dlq.headers"
REPLAYED = "dlq.replayed"
PREFIX = "dlq."

MAX_VALUE_BYTES = 900_000
"""Budget of key, own headers and value: Kafka's default record limit of 1 MB, less what we add."""

_MAX_DETAIL_BYTES = 1_000
_HEADER_OVERHEAD_BYTES = 10  # at most: the lengths of a header's name and content on the wire
_SENT_BY_SINK = frozenset({"event_id", "origin"})


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


def read_headers(message: Message) -> list[Header] | None:
    """Return a record's headers; None if they cannot be read, as a name that is not UTF-8."""
    try:
        return [
            (name, content.encode() if isinstance(content, str) else content)
            for name, content in message.headers() or []
        ]
    except Exception:  # confluent-kafka raises SystemError, or UnicodeDecodeError
        return None


def fit(
    key: bytes | None, value: bytes | None, headers: list[Header] | None, budget: int
) -> tuple[bytes | None, bytes | None, list[Header]]:
    """Cut a record to `budget` bytes; return key, value and headers, with those that say so.

    Headers that take more than a quarter are left out, a longer key is cut to a quarter, and the
    value gets what is left. Headers that say what is missing are not counted. None for `headers`:
    they cannot be read.

    >>> fit(b"key", b"abcdef", [], 8)
    (b'ke', b'abcdef', [('dlq.key_truncated', b'3')])
    >>> key, value, headers = fit(b"k", b"abcdef", [("name", b"content")], 5)
    >>> value, headers[:2]
    (b'abcd', [('dlq.headers', b'omitted: 21 bytes'), ('dlq.truncated', b'6')])
    >>> fit(None, None, None, 4)
    (None, None, [('dlq.headers', b'unreadable')])
    """
    quarter = budget // 4
    size = sum(
        len(name.encode()) + len(content or b"") + _HEADER_OVERHEAD_BYTES
        for name, content in headers or []
    )
    if headers is None:
        headers = [(HEADERS, b"unreadable")]
    elif size > quarter:
        headers, size = [(HEADERS, b"omitted: %d bytes" % size)], 0
    else:
        headers = list(headers)
    if key is not None and len(key) > quarter:
        headers.append((KEY_TRUNCATED, b"%d" % len(key)))
        key = key[:quarter]
    left = budget - size - len(key or b"")
    if value is not None and len(value) > left:
        headers.append((TRUNCATED, b"%d" % len(value)))
        headers.append((SHA256, hashlib.sha256(value).hexdigest().encode()))
        value = value[:left]
    return key, value, headers


def stub(letters: OutRecords, row: int) -> OutRecords | None:
    """Return a dead letter without the record: only its ``dlq.`` headers say what it was.

    None if the record of `row` is no dead letter, or there is nothing left to take away.
    """
    before = [] if letters.headers is None else letters.headers[row]
    if all(name != REASON for name, _ in before):
        return None
    own: list[Header] = []
    kept: list[Header] = []
    for each in before:
        (kept if each[0].startswith(PREFIX) and each[0] != REPLAYED else own).append(each)
    known = {name for name, _ in kept}  # if it was cut before, that is what counts
    key, value, added = fit(letters.keys[row], letters.values[row], own, 0)
    headers = kept + [each for each in added if each[0] not in known]
    if (key, value, headers) == (letters.keys[row], letters.values[row], before):
        return None
    least = letters.take(np.array([row]))
    least.keys, least.values, least.headers = [key], [value], [headers]
    return least


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
        max_value_bytes: what is longer is cut, see `fit`; a replay then reads it from the source
            topic.

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
        own = read_headers(message)
        if own is not None:
            own = [each for each in own if _is_kept(each[0])]
        key, value, kept = fit(message.key(), message.value(), own, max_value_bytes)
        values.append(value)
        keys.append(key)
        times.append(timestamp)
        ids.append(f"{topic}/{partition}/{offset}".encode())
        headers.append(kept + reason_headers(reason, detail, topic, partition, offset, timestamp))
    return OutRecords(
        keys, values, np.array(times, dtype=np.int64), ids, origins=ids, headers=headers
    )


def _is_kept(name: str) -> bool:
    return name == REPLAYED or not (name in _SENT_BY_SINK or name.startswith(PREFIX))
