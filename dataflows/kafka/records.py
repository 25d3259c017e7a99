"""The two things that cross the edge: `Records` come in, `OutRecords` go out.

Both are micro-batches, so that Bytewax's price per item is paid once for hundreds of events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from confluent_kafka import Message

Int64s: TypeAlias = npt.NDArray[np.int64]
Int32s: TypeAlias = npt.NDArray[np.int32]
UInt8s: TypeAlias = npt.NDArray[np.uint8]

Header: TypeAlias = tuple[str, bytes | None]

# Magic 2: 61 bytes of batch header, up to 27 of varints, and the header "event_id".
_BYTES_A_RECORD = 128
_BYTES_A_HEADER = 10
_CLOCK_BYTES = 20  # of any 64-bit integer


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Carry a micro-batch of consumed records, in stream-time order, and where each came from.

    Attributes:
        messages: the records as confluent-kafka gave them; ``value()`` may be None (tombstone).
        source: uint8, index of the record's topic in the source's list of topics.
        partition: int32.
        offset: int64.
        append_time: int64 milliseconds since the epoch, the broker's (or producer's) timestamp.
        stream_time: int64 milliseconds, the key of the order: the record's own stream time, or the
            latest one seen before it in its partition if that is later or it has none.
        known: optional bool, which records an earlier life has answered, and are read again only
            for the windows (``START_AT=rebuild``); None: none is.
    """

    messages: list[Message]
    source: UInt8s
    partition: Int32s
    offset: Int64s
    append_time: Int64s
    stream_time: Int64s
    known: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.messages)


@dataclass(slots=True, eq=False)
class OutRecords:
    """Carry a micro-batch of records to produce; all columns have the same length.

    Attributes:
        keys: bytes of each key, or None for a record without one.
        values: bytes of each value, or None for a tombstone.
        append_time: int64 milliseconds, when the broker appended the event that caused the record;
            the start of its end-to-end latency. Negative: unknown, not measured.
        event_ids: business identity of the cause, sent as header ``event_id``. It is stable across
            replays, which is what exactly-once output compares.
        origins: optional ``topic/partition/offset`` of the cause, sent as header ``origin``; what
            exactly-once output forgets its earlier publications by.
        headers: optional further headers of each record.
        clock_bytes: optional int64, how many bytes of each value depend on when it was made, such
            as the digits of an age: a later life must judge its size as this one did.
        shed: optional bool, which records say that their event is not answered; None: none does.
            They are counted where they are delivered, which may be in another process.

    >>> out = OutRecords([b"a", b"b"], [b"1", None], np.array([0, 0]), [b"tx1", b"tx2"])
    >>> out.take(np.array([1])).event_ids
    [b'tx2']
    """

    keys: list[bytes | None]
    values: list[bytes | None]
    append_time: Int64s
    event_ids: list[bytes]
    origins: list[bytes] | None = None
    headers: list[list[Header]] | None = None
    clock_bytes: Int64s | None = None
    shed: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: npt.NDArray[np.intp]) -> OutRecords:
        """Return the given rows, in the given order. O(rows)."""
        index = rows.tolist()
        return OutRecords(
            _pick(self.keys, index),
            _pick(self.values, index),
            self.append_time[rows],
            _pick(self.event_ids, index),
            None if self.origins is None else _pick(self.origins, index),
            None if self.headers is None else _pick(self.headers, index),
            None if self.clock_bytes is None else self.clock_bytes[rows],
            None if self.shed is None else self.shed[rows],
        )

    @staticmethod
    def concatenate(batches: Sequence[OutRecords]) -> OutRecords:
        """Return the rows of several batches as one. O(rows).

        >>> a = OutRecords([b"a"], [b"1"], np.array([0]), [b"tx1"])
        >>> b = OutRecords([b"b"], [b"2"], np.array([0]), [b"tx2"], headers=[[("h", b"x")]])
        >>> OutRecords.concatenate([a, b]).headers
        [[], [('h', b'x')]]
        """
        if len(batches) == 1:
            return batches[0]
        plain = all(batch.origins is None and batch.headers is None for batch in batches)
        origins: list[bytes] | None = []
        for batch in batches:
            origins = None if origins is None or batch.origins is None else origins + batch.origins
        before = 1 if origins is None else 2  # headers of `headers_of` that are columns here
        return OutRecords(
            [key for batch in batches for key in batch.keys],
            [value for batch in batches for value in batch.values],
            np.concatenate([batch.append_time for batch in batches]),
            [event_id for batch in batches for event_id in batch.event_ids],
            origins,
            None
            if plain or (all(batch.headers is None for batch in batches) and origins is not None)
            else [batch.headers_of(row)[before:] for batch in batches for row in range(len(batch))],
            None
            if all(batch.clock_bytes is None for batch in batches)
            else np.concatenate(
                [
                    np.full(len(batch), _CLOCK_BYTES)
                    if batch.clock_bytes is None
                    else batch.clock_bytes
                    for batch in batches
                ]
            ),
            None
            if all(batch.shed is None for batch in batches)
            else np.concatenate(
                [
                    np.zeros(len(batch), np.bool_) if batch.shed is None else batch.shed
                    for batch in batches
                ]
            ),
        )

    def count_shed(self, start: int = 0, stop: int | None = None) -> int:
        """Return how many of these rows say that their event is not answered.

        >>> out = OutRecords([b"a"] * 3, [b""] * 3, np.zeros(3), [b"x"] * 3)
        >>> out.shed = np.array([True, False, True])
        >>> out.count_shed(), out.count_shed(1)
        (2, 1)
        """
        return 0 if self.shed is None else int(np.count_nonzero(self.shed[start:stop]))

    def largest(self) -> int:
        """Return an upper bound of what any record takes, larger than `most_bytes` but cheaper.

        >>> OutRecords([b"kk", b"k"], [b"1", b"22"], np.array([0]), [b"a", b"b"]).largest()
        133
        """
        if self.headers is not None:
            return int(self.most_bytes().max(initial=0))
        columns: list[Sequence[bytes | None]] = [self.keys, self.values, self.event_ids]
        bytes_ = _BYTES_A_RECORD + (0 if self.clock_bytes is None else _CLOCK_BYTES)
        if self.origins is not None:
            columns.append(self.origins)
            bytes_ += _BYTES_A_HEADER
        return bytes_ + sum(max(map(len, filter(None, each)), default=0) for each in columns)

    def most_bytes(self) -> Int64s:
        """Return int64, an upper bound of what each record takes in a batch of its own. O(rows).

        >>> OutRecords([b"k"], [b"12345"], np.array([0]), [b"tx1"]).most_bytes()
        array([137])
        """
        sizes = np.array([len(value or b"") for value in self.values], dtype=np.int64)
        sizes += [len(key or b"") for key in self.keys]
        sizes += [len(event_id) for event_id in self.event_ids]
        if self.origins is not None:
            sizes += [len(origin) + _BYTES_A_HEADER for origin in self.origins]
        if self.headers is not None:
            sizes += [
                sum(len(name) * 4 + len(content or b"") + _BYTES_A_HEADER for name, content in row)
                for row in self.headers
            ]
        if self.clock_bytes is not None:
            sizes += _CLOCK_BYTES - self.clock_bytes
        return sizes + _BYTES_A_RECORD

    def each_headers(self) -> Iterator[Any]:
        """Yield the headers that each record is sent with, in order."""
        if self.headers is not None:
            return map(self.headers_of, range(len(self)))
        if self.origins is None:
            return ([("event_id", event_id)] for event_id in self.event_ids)
        pairs = zip(self.event_ids, self.origins, strict=True)
        return ([("event_id", event_id), ("origin", origin)] for event_id, origin in pairs)

    def headers_of(self, row: int) -> list[Header]:
        """Return every header that the record of `row` is sent with."""
        headers: list[Header] = [("event_id", self.event_ids[row])]
        if self.origins is not None:
            headers.append(("origin", self.origins[row]))
        if self.headers is not None:
            headers.extend(self.headers[row])
        return headers


def _pick(column: Sequence[Any], index: list[int]) -> list[Any]:
    if len(index) == 1:
        return [column[index[0]]]
    return list(itemgetter(*index)(column)) if index else []
