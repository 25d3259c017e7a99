"""Ids seen lately: which of the arriving events came before, as producers that retry send them.

**The rule.** An event is a *duplicate* if and only if an accepted event of the same type and
business id (``Event.identity``) arrived before it and the broker times (``append_time``) of the
two differ by at most the horizon. So the first to arrive wins, and a duplicate does not prolong
the horizon. Broker times, because a retry is a matter of when it was sent; a duplicate's event
time is the original's anyway.

**What is remembered.** A shard's *clock* is the largest median of 15 consecutive broker times:
never ahead of the newest, and no single wrong time (a producer may set any) moves it. An id is
kept until the clock has gone further than the horizon and a quarter since it arrived, a step of
the clock counting as an eighth of the horizon at most. So the rule holds exactly

* while no broker time lies more than an eighth of the horizon behind the newest that came before
  it (partitions are interleaved by when things happened, so broker times need not ascend); and
* whatever the distance between the times of partitions and topics, as long as the clock goes no
  further than the horizon, a leap aside, between the arrivals of an event and its duplicate.

**The bound.** A shard holds at most so many ids; beyond that the oldest arrival is forgotten
early, and counted.

Ids are compared by 96 bits of MurmurHash3: with a million ids held, an event is taken for
another's duplicate with a probability of 1e-23.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple
from zlib import crc32

import mmh3
import msgspec
import numba as nb
import numpy as np
import numpy.typing as npt

from features.batch import EventBatch
from features.events import Event, column_kinds

Int = npt.NDArray[np.int64]

#: Version of the snapshot's bytes.
FORMAT = 1
_MAGIC = b"SEENIDS\x00"
_HEADER = struct.Struct("<8sHI")  # magic, format, length of the description that follows

#: Ids are kept for the horizon and this part of it: half for a leap of the clock, half for times
#: out of order.
SLACK = 0.25
#: Longest horizon: the snapshot keeps ages as 32-bit milliseconds.
MAX_HORIZON_MS = 7 * 86_400_000

#: Fingerprint of a business id and its type: 96 of its 128 bits tell ids apart; the rest
#: may choose a shard.
FINGERPRINT = np.dtype([("word", "<u8"), ("tail", "<u4"), ("rest", "<u4")])

_BLOCK = 15  # the clock is moved by medians of this many broker times
_NEVER = -(2**62)
_FARTHEST = 2**61  # times beyond are clipped, so that differences do not overflow
_SMALLEST = 64

# Slots of `counters`.
_CLOCK, _PROGRESS, _FIRST, _IDS, _RECENT, _FORGOTTEN = 0, 1, 2, 3, 4, 5


def identities(events: Sequence[type[Event]]) -> list[str]:
    """Return the field that is each type's business id.

    Raises TypeError for a type that declares none, or one that is not a `Key`.
    """
    for event in events:
        if event.identity is None:
            raise TypeError(
                f"{event.__name__} declares no business id, by which duplicates are known; add "
                '`identity: ClassVar[str] = "<field>"`'
            )
        if column_kinds(event).get(event.identity) != "key":
            raise TypeError(
                f"{event.__name__}.identity: {event.identity!r} is no field of type Key"
            )
    return [str(event.identity) for event in events]


def fingerprints(batch: EventBatch, events: Sequence[type[Event]]) -> npt.NDArray[Any]:
    """Return each row's `FINGERPRINT`: the same for the same id of the same type, always.

    Needs the column ``source`` (index into `events`) and the types' identities.

    >>> from features.fraud import FraudReport, Transaction
    >>> batch = EventBatch({
    ...     "source": np.array([0, 0, 1], np.uint8),
    ...     "transaction_id": np.array([b"a", b"a", b"a"]),
    ... })
    >>> a, again, other = fingerprints(batch, [FraudReport, Transaction])
    >>> bool(a == again), bool(a == other)
    (True, False)
    """
    seeds = np.array([crc32(event.__name__.encode()) for event in events], np.uint32)
    out = np.empty(len(batch), FINGERPRINT)
    for name in dict.fromkeys(identities(events)):
        codes = [code for code, event in enumerate(events) if event.identity == name]
        rows = slice(None) if len(codes) == len(events) else np.isin(batch["source"], codes)
        ids, source = batch[name][rows], batch["source"][rows]
        digests = map(mmh3.mmh3_x64_128_digest, ids.tolist(), seeds[source].tolist())
        out[rows] = np.frombuffer(b"".join(digests), FINGERPRINT)
    return out


class _Arrays(NamedTuple):
    """A queue of ids in order of arrival, in a circle of slots, and a hash table over it."""

    buckets: npt.NDArray[np.int32]  # as many as slots: newest slot of the chain, or −1
    chained: npt.NDArray[np.int32]  # per slot: the next one of its chain, or −1
    words: npt.NDArray[np.uint64]  # per slot, as `tails`: the id's fingerprint
    tails: npt.NDArray[np.uint32]
    times: Int  # per slot: broker time
    stamps: Int  # per slot: the clock's progress at arrival; ascending along the queue
    recent: Int  # broker times since the clock was last looked at
    counters: Int


@nb.njit(cache=True, inline="always")
def _bucket(word, buckets):  # type: ignore[no-untyped-def]
    return np.int64(((word >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32))


@nb.njit(cache=True, inline="always")
def _seen(state, word, tail, t, horizon):  # type: ignore[no-untyped-def]
    slot = state.buckets[_bucket(word, len(state.buckets))]
    while slot >= 0:
        same = state.words[slot] == word and state.tails[slot] == tail
        if same and abs(state.times[slot] - t) <= horizon:
            return True
        slot = state.chained[slot]
    return False


@nb.njit(cache=True)
def _arrive(state, word, tail, t, slack):  # type: ignore[no-untyped-def]
    """Put an id at the end of the queue; the caller has made sure of room.

    The clock lags by some events, and the id's own time tells how far, within reason.
    """
    counters = state.counters
    stamp = counters[_PROGRESS]
    if counters[_CLOCK] != _NEVER:
        stamp += min(max(t - counters[_CLOCK], 0), slack)
    if counters[_IDS] > 0:
        last = (counters[_FIRST] + counters[_IDS] - 1) % len(state.words)
        stamp = max(stamp, state.stamps[last])
    _append(state, word, tail, t, stamp)


@nb.njit(cache=True)
def _append(state, word, tail, t, stamp):  # type: ignore[no-untyped-def]
    counters = state.counters
    slot = (counters[_FIRST] + counters[_IDS]) % len(state.words)
    counters[_IDS] += 1
    bucket = _bucket(word, len(state.buckets))
    state.words[slot] = word
    state.tails[slot] = tail
    state.times[slot] = t
    state.stamps[slot] = stamp
    state.chained[slot] = state.buckets[bucket]
    state.buckets[bucket] = slot


@nb.njit(cache=True)
def _forget_first(state):  # type: ignore[no-untyped-def]
    counters = state.counters
    first = counters[_FIRST]
    bucket = _bucket(state.words[first], len(state.buckets))
    slot = state.buckets[bucket]
    # Chains go from new to old, so the oldest of all is the last of its own.
    if slot == first:
        state.buckets[bucket] = -1
    else:
        while state.chained[slot] != first:
            slot = state.chained[slot]
        state.chained[slot] = -1
    counters[_FIRST] = (first + 1) % len(state.words)
    counters[_IDS] -= 1


@nb.njit(cache=True)
def _forget_old(state, keep):  # type: ignore[no-untyped-def]
    """Forget what the clock has left behind: as stamps ascend, the queue's beginning."""
    counters = state.counters
    while counters[_IDS] > 0 and state.stamps[counters[_FIRST]] + keep < counters[_PROGRESS]:
        _forget_first(state)


@nb.njit(cache=True)
def _run(state, words, tails, times, horizon, slack, most, fresh, begin):  # type: ignore[no-untyped-def]
    """Judge rows from `begin` in order; return the row before which room must be made, or the
    number of rows."""
    counters = state.counters
    keep = horizon + slack
    for i in range(begin, len(times)):
        if counters[_IDS] == len(state.words) and counters[_IDS] < most:
            return i
        t = times[i]
        fresh[i] = not _seen(state, words[i], tails[i], t, horizon)
        state.recent[counters[_RECENT]] = t
        counters[_RECENT] += 1
        if counters[_RECENT] == _BLOCK:
            counters[_RECENT] = 0
            state.recent.sort()
            median = state.recent[_BLOCK // 2]
            if median > counters[_CLOCK]:
                if counters[_CLOCK] != _NEVER:
                    counters[_PROGRESS] += min(median - counters[_CLOCK], slack // 2)
                counters[_CLOCK] = median
                _forget_old(state, keep)
        if fresh[i]:
            while counters[_IDS] >= most:
                if state.stamps[counters[_FIRST]] + horizon >= counters[_PROGRESS]:
                    counters[_FORGOTTEN] += 1
                _forget_first(state)
            _arrive(state, words[i], tails[i], t, slack)
    return len(times)


class SeenIds:
    """The ids seen lately of one shard: show it events in order, it tells the fresh from the seen.

    Args:
        horizon_ms: how far the broker times of duplicates may be apart; at most `MAX_HORIZON_MS`.
        most: most ids held, at 36 bytes each (24 in a snapshot).
        shards: how many shards there are; a snapshot is of one of so many.

    >>> from features.fraud import Transaction
    >>> batch = EventBatch({
    ...     "source": np.zeros(4, np.uint8),
    ...     "transaction_id": np.array([b"a", b"b", b"a", b"a"]),
    ...     "append_time": np.array([0, 10, 60, 61]),
    ... })
    >>> seen = SeenIds(horizon_ms=60, most=100)
    >>> seen.fresh(fingerprints(batch, [Transaction]), batch["append_time"]).tolist()
    [True, True, False, True]
    """

    def __init__(self, *, horizon_ms: int, most: int, shards: int = 1) -> None:
        if not 1 <= horizon_ms <= MAX_HORIZON_MS:
            raise ValueError(f"horizon_ms is {horizon_ms}; accepted: [1, {MAX_HORIZON_MS}]")
        if not 1 <= most < 2**31:
            raise ValueError(f"most is {most}; accepted: [1, {2**31})")
        self.horizon_ms = horizon_ms
        self.slack_ms = max(2, round(SLACK * horizon_ms))
        self.most = most
        self.shards = shards
        self._arrays = _empty(min(_SMALLEST, most))

    def __len__(self) -> int:
        """Return the number of ids held."""
        return int(self._arrays.counters[_IDS])

    @property
    def clock(self) -> int:
        """The shard's clock, ms; very small before the fifteenth event."""
        return int(self._arrays.counters[_CLOCK])

    @property
    def forgotten(self) -> int:
        """Ids forgotten within the horizon, for the bound, since this was made."""
        return int(self._arrays.counters[_FORGOTTEN])

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for array in self._arrays)

    def fresh(self, ids: npt.NDArray[Any], append_time: Int) -> npt.NDArray[np.bool_]:
        """Judge events in order of arrival: True for the accepted ones, False for duplicates.

        Takes `fingerprints` and broker times (ms). Amortised O(1) an event; however the events
        are cut into batches, the answers are the same.
        """
        times = np.clip(append_time, -_FARTHEST, _FARTHEST)
        words, tails = np.ascontiguousarray(ids["word"]), np.ascontiguousarray(ids["tail"])
        fresh = np.empty(len(times), np.bool_)
        row = 0
        while True:
            row = _run(
                self._arrays,
                words,
                tails,
                times,
                self.horizon_ms,
                self.slack_ms,
                self.most,
                fresh,
                row,
            )
            if row == len(times):
                return fresh
            held = len(self)
            self._resize(min(self.most, held + max(held // 2, _SMALLEST)))

    def snapshot(self) -> bytes:
        """Return the state as versioned bytes: a described header, and 24 bytes an id."""
        words, tails, times, stamps = self._queue()
        counters = self._arrays.counters
        description = {
            "shards": self.shards,
            "horizon_ms": self.horizon_ms,
            "clock": self.clock,
            "ids": len(self),
            "recent": self._arrays.recent[: counters[_RECENT]].tolist(),
        }
        head = msgspec.json.encode(description)
        # What is older has been forgotten, so ages fit.
        ages = (counters[_PROGRESS] - stamps).astype(np.int32)
        parts = [_HEADER.pack(_MAGIC, FORMAT, len(head)), head]
        parts += [array.tobytes() for array in (words, tails, times, ages)]
        return b"".join(parts)

    @staticmethod
    def describe(snapshot: bytes) -> dict[str, Any]:
        """Return a snapshot's header: shards, horizon_ms, clock, ids.

        Raises ValueError for bytes that are not a snapshot, or of another format.
        """
        if len(snapshot) < _HEADER.size or not snapshot.startswith(_MAGIC):
            raise ValueError("these bytes are not a snapshot of seen ids")
        _, version, length = _HEADER.unpack_from(snapshot)
        if version != FORMAT:
            raise ValueError(
                f"the snapshot of seen ids has format {version}, this version reads {FORMAT}; "
                "resume it with the version that wrote it"
            )
        head: dict[str, Any] = msgspec.json.decode(snapshot[_HEADER.size : _HEADER.size + length])
        head["body"] = _HEADER.size + length
        return head

    @staticmethod
    def check(snapshot: bytes, *, shards: int) -> dict[str, Any]:
        """Return a snapshot's header (see `describe`) after checking that it fits the flow.

        Raises ValueError if it is of another format or number of shards, or damaged.
        """
        head = SeenIds.describe(snapshot)
        if head["shards"] != shards:
            raise ValueError(
                f"the snapshot of seen ids is one of {head['shards']} shards, the flow has "
                f"{shards}; the number of shards is fixed for the life of the state"
            )
        if head["body"] + 24 * head["ids"] != len(snapshot):
            raise ValueError("the snapshot of seen ids is damaged: its length is not what it says")
        return head

    @staticmethod
    def restore(snapshot: bytes, *, horizon_ms: int, most: int, shards: int = 1) -> SeenIds:
        """Return the state that `snapshot` was taken of.

        Horizon and bound may be others than it was taken with: a longer horizon holds from when
        it has gone by, as ids beyond the old one are forgotten; for a smaller bound the oldest go.
        Raises ValueError if it is of another format or number of shards, or damaged.
        """
        head = SeenIds.check(snapshot, shards=shards)
        n, at, arrays = head["ids"], head["body"], []
        for dtype in (np.uint64, np.uint32, np.int64, np.int32):
            arrays.append(np.frombuffer(snapshot, dtype, n, at))
            at += arrays[-1].nbytes
        words, tails, times, ages = arrays
        stamps = 0 - ages.astype(np.int64)
        seen = SeenIds(horizon_ms=horizon_ms, most=most, shards=shards)
        counters = seen._arrays.counters
        counters[_CLOCK], counters[_RECENT] = head["clock"], len(head["recent"])
        seen._arrays.recent[: len(head["recent"])] = head["recent"]
        extra = max(0, n - most)
        counters[_FORGOTTEN] = np.count_nonzero(stamps[:extra] >= -horizon_ms)
        seen._fill(n - extra, words[extra:], tails[extra:], times[extra:], stamps[extra:])
        _forget_old(seen._arrays, horizon_ms + seen.slack_ms)
        return seen

    def _queue(self) -> tuple[npt.NDArray[Any], ...]:
        state = self._arrays
        slots = (state.counters[_FIRST] + np.arange(len(self))) % len(state.words)
        return state.words[slots], state.tails[slots], state.times[slots], state.stamps[slots]

    def _resize(self, slots: int) -> None:
        """Lay the same ids out over more slots; amortised O(1) an id, since they grow by half."""
        self._fill(slots, *self._queue())

    def _fill(self, slots: int, *queue: npt.NDArray[Any]) -> None:
        counters, recent = self._arrays.counters, self._arrays.recent
        counters[_FIRST] = counters[_IDS] = 0
        self._arrays = _empty(max(slots, min(_SMALLEST, self.most)))
        self._arrays.counters[:] = counters
        self._arrays.recent[:] = recent
        _append_all(self._arrays, *queue)


@nb.njit(cache=True)
def _append_all(state, words, tails, times, stamps):  # type: ignore[no-untyped-def]
    for i in range(len(words)):
        _append(state, words[i], tails[i], times[i], stamps[i])


def _empty(slots: int) -> _Arrays:
    counters = np.zeros(6, np.int64)
    counters[_CLOCK] = _NEVER
    return _Arrays(
        buckets=np.full(slots, -1, np.int32),
        chained=np.full(slots, -1, np.int32),
        words=np.zeros(slots, np.uint64),
        tails=np.zeros(slots, np.uint32),
        times=np.zeros(slots, np.int64),
        stamps=np.zeros(slots, np.int64),
        recent=np.zeros(_BLOCK, np.int64),
        counters=counters,
    )
