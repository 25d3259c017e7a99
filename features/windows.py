"""The window kernel: exact answers for every event, at a cost that does not grow with the windows.

For each entity (one value of the view's key) and event type the kernel keeps a *log*: the
entries that some window may still need, ordered by time (equal times: by arrival), with
*exclusive prefix sums* of their values. The sum over any window is then the difference of two
prefix sums, exact because all values are integers. The two ends of a window are found from where
they were for the entity's previous event and only walk forward, so an in-order event costs
O(windows) amortised, however many events the windows hold. A late event is answered by binary
search and inserted by shifting the entries newer than it.

Maxima and minima come from one *staircase* per log and column: the entries not dominated by a
newer one, shared by all windows of the view. A late event's extremum is found by scanning its
window.

All entries of a shard live in pooled arrays, a region of power-of-two size per log. Everything
hot is compiled; see ``features/declare.py`` for the window rule that all of this implements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numba as nb
import numpy as np
import numpy.typing as npt
from numba.core import cgutils
from numba.extending import intrinsic

from features.batch import EventBatch
from features.declare import At, FeatureView, milliseconds
from features.events import Event
from features.keys import find, hash_of, key_bytes, occupy, shards_of
from features.packed import Format

Int = npt.NDArray[np.int64]

#: Virtual shards that a view's entities are spread over, unless the deployment says otherwise. The
#: number is part of the state: a snapshot of 32 shards cannot be resumed with 64.
SHARDS = 32

_FORMAT = Format(b"WINDOWS\0", 2, "a window snapshot")

_NONE = np.iinfo(np.int64).min  # no extremum
_NO_PREVIOUS = -1

# Columns of `meta`, per entity and log; window w's lower end follows at _LO + w. All but _OFFSET
# count from the region's start.
_OFFSET, _CAPACITY, _START, _END, _HI, _LO = 0, 1, 2, 3, 4, 5
# Columns of `stairs`, per entity, log and extremum; window w's pointer follows at _POINTER + w.
_FIRST, _LAST, _POINTER = 0, 1, 2
# Slots of `counters`.
_CLOCK, _ENTITIES, _TOP, _LATE, _TOO_LATE = 0, 1, 2, 3, 4
_NEVER = -(2**62)
#: How far one event may advance its shard's clock, ms: one with a wrong date must not make the
#: others' entities look idle.
CLOCK_STEP_MS = 3_600_000
_SMALLEST_REGION = 4

_DONE, _GROW_ENTITIES, _GROW_POOL = 0, 1, 2


class _Arrays(NamedTuple):
    """The state of one shard of one view."""

    slots: npt.NDArray[np.int32]  # hash table: entity or −1; length a power of two
    hashes: npt.NDArray[np.uint64]  # per entity
    keys: npt.NDArray[np.uint8]  # per entity: the key's bytes, zero padded
    newest: Int  # per entity: its newest event time, or _NEVER
    meta: Int  # entity × log × (offset, capacity, start, end, hi, lo…)
    stairs: Int  # entity × log × extremum × (first, last, pointer…)
    times: Int  # pool
    prefix: Int  # sum × pool: sum of the log's values before this entry
    peaks: Int  # extremum × pool: the entry's own value (negated for a minimum)
    stair_times: Int  # extremum × pool
    stair_values: Int  # extremum × pool
    free: Int  # size class → offset of a free region or −1; linked through `times`
    counters: Int


class _Rule(NamedTuple):
    """What the kernel needs of the declaration."""

    log_of: npt.NDArray[np.int8]  # source code → log or −1
    answered: int  # source code of the rows that are answered
    windows: Int  # lengths in ms
    delay: int
    horizon: int
    lateness: int
    idle: int
    tick: int
    merges: bool  # sum 0 of every log is then its entries' number of events


# What `_run` calls for every event is inlined, and the arrays are passed without their owners: to
# count references to each of them took four fifths of an event's time.


@nb.njit(cache=True)
def _add(state, h, key):  # type: ignore[no-untyped-def]
    """Append an entity; the caller has made sure of room."""
    entity = state.counters[_ENTITIES]
    state.counters[_ENTITIES] += 1
    state.hashes[entity] = h
    state.keys[entity, :] = 0
    for j in range(min(len(key), state.keys.shape[1])):
        state.keys[entity, j] = key[j]
    state.newest[entity] = _NEVER
    state.meta[entity] = 0
    state.stairs[entity] = 0
    occupy(state, h, entity)
    return entity


@nb.njit(cache=True)
def _size_class(size):  # type: ignore[no-untyped-def]
    k = 0
    while (1 << k) < size:
        k += 1
    return k


@nb.njit(cache=True)
def _allocate(state, size):  # type: ignore[no-untyped-def]
    """Return the offset of a free region of this power-of-two size, or −1 if the pool is full."""
    k = _size_class(size)
    offset = state.free[k]
    if offset >= 0:
        state.free[k] = state.times[offset]
        return offset
    offset = state.counters[_TOP]
    if offset + size > len(state.times):
        return np.int64(-1)
    state.counters[_TOP] = offset + size
    return offset


@nb.njit(cache=True, inline="always")
def _make_room(state, m, stairs, limit):  # type: ignore[no-untyped-def]
    """Make room for one more entry in a log: forget what expired, shift down, or move to a region
    twice the size. False if the pool has none."""
    capacity = m[_CAPACITY]
    # One slot stays free: prefix sums need one more place than there are entries.
    if m[_END] + 1 < capacity:
        return True
    offset = m[_OFFSET]
    start, end = m[_START], m[_END]
    while start < end and state.times[offset + start] <= limit:
        start += 1
    m[_START] = start
    live = end - start
    target = offset
    size = capacity
    if live * 2 > capacity or capacity == 0:
        size = max(capacity * 2, _SMALLEST_REGION)
        target = _allocate(state, size)
        if target < 0:
            return False
    for i in range(live):
        state.times[target + i] = state.times[offset + start + i]
    if capacity > 0:
        for v in range(state.prefix.shape[0]):
            for i in range(live + 1):
                state.prefix[v, target + i] = state.prefix[v, offset + start + i]
    else:
        for v in range(state.prefix.shape[0]):
            state.prefix[v, target] = 0
    for x in range(state.peaks.shape[0]):
        for i in range(live):
            state.peaks[x, target + i] = state.peaks[x, offset + start + i]
        # The staircase: keep what some window may still point at.
        first, last = stairs[x, _FIRST], stairs[x, _LAST]
        while first < last and state.stair_times[x, offset + first] <= limit:
            first += 1
        for i in range(last - first):
            state.stair_times[x, target + i] = state.stair_times[x, offset + first + i]
            state.stair_values[x, target + i] = state.stair_values[x, offset + first + i]
        for w in range(_POINTER, stairs.shape[1]):
            stairs[x, w] = max(stairs[x, w] - first, 0)
        stairs[x, _FIRST] = 0
        stairs[x, _LAST] = last - first
    if target != offset and capacity > 0:
        k = _size_class(capacity)
        state.times[offset] = state.free[k]
        state.free[k] = offset
    m[_OFFSET] = target
    m[_CAPACITY] = size
    m[_START] = 0
    m[_END] = live
    for j in range(_HI, len(m)):
        m[j] = max(m[j] - start, 0)
    return True


@nb.njit(cache=True, inline="always")
def _first_after(times, begin, end, bound):  # type: ignore[no-untyped-def]
    """Binary search: the first index in [begin, end] whose time is > bound."""
    while begin < end:
        middle = (begin + end) >> 1
        if times[middle] <= bound:
            begin = middle + 1
        else:
            end = middle
    return begin


@nb.njit(cache=True, inline="always")
def _insert(state, m, stairs, t, values, peaks, merges):  # type: ignore[no-untyped-def]
    """Put an entry into its log, after entries of the same time; room has been made."""
    base = m[_OFFSET]
    start, end = m[_START], m[_END]
    at = end
    if end > start and state.times[base + end - 1] > t:
        at = _first_after(state.times[base : base + end], start, end, t)
    merged = merges and at > start and state.times[base + at - 1] == t
    if merged:
        at -= 1
        for v in range(state.prefix.shape[0]):
            for i in range(at + 1, end + 1):
                state.prefix[v, base + i] += values[v]
        for x in range(state.peaks.shape[0]):
            if at < m[_HI] and peaks[x] > state.peaks[x, base + at]:
                _step_in(state, base, stairs[x], x, t, peaks[x])
            state.peaks[x, base + at] = max(state.peaks[x, base + at], peaks[x])
    else:
        for i in range(end, at, -1):
            state.times[base + i] = state.times[base + i - 1]
        state.times[base + at] = t
        for v in range(state.prefix.shape[0]):
            for i in range(end, at - 1, -1):
                state.prefix[v, base + i + 1] = state.prefix[v, base + i] + values[v]
        for x in range(state.peaks.shape[0]):
            for i in range(end, at, -1):
                state.peaks[x, base + i] = state.peaks[x, base + i - 1]
            state.peaks[x, base + at] = peaks[x]
        m[_END] = end + 1
        if at < m[_HI]:  # windows have already gone past this time
            for x in range(state.peaks.shape[0]):
                _step_in(state, base, stairs[x], x, t, peaks[x])
        for j in range(_HI, len(m)):
            if at < m[j]:
                m[j] += 1


@nb.njit(cache=True)
def _step_in(state, base, stair, x, t, peak):  # type: ignore[no-untyped-def]
    """Put a late entry into a staircase: falling values, ascending times."""
    times, values = state.stair_times[x], state.stair_values[x]
    first, last = stair[_FIRST], stair[_LAST]
    q = last
    while q > first and times[base + q - 1] > t:
        q -= 1
    if q < last and values[base + q] >= peak:
        return  # a newer entry dominates it
    r = q
    while r > first and values[base + r - 1] <= peak:
        r -= 1
    # Entries [r, q) are dominated by the new one, which takes their place.
    shift = 1 - (q - r)
    if shift == 1:
        for i in range(last, q, -1):
            times[base + i] = times[base + i - 1]
            values[base + i] = values[base + i - 1]
    elif shift < 0:
        for i in range(q, last):
            times[base + i + shift] = times[base + i]
            values[base + i + shift] = values[base + i]
    times[base + r] = t
    values[base + r] = peak
    stair[_LAST] = last + shift
    for w in range(_POINTER, len(stair)):
        stair[w] = min(stair[w], r)


@nb.njit(cache=True, inline="always")
def _climb(state, base, stair, x, begin, end):  # type: ignore[no-untyped-def]
    """Append entries [begin, end) of the log to a staircase, dropping those they dominate."""
    times, values = state.stair_times[x], state.stair_values[x]
    first, last = stair[_FIRST], stair[_LAST]
    for i in range(begin, end):
        peak = state.peaks[x, base + i]
        while last > first and values[base + last - 1] <= peak:
            last -= 1
        times[base + last] = state.times[base + i]
        values[base + last] = peak
        last += 1
        for w in range(_POINTER, len(stair)):
            stair[w] = min(stair[w], last - 1)
    stair[_LAST] = last


@nb.njit(cache=True, inline="always")
def _answer(state, m, stairs, rule, t, limit, own, counts, sums, peaks):  # type: ignore[no-untyped-def]
    """Fill in one row's answers from one log; return the ms since the previous event or −1."""
    base = m[_OFFSET]
    start, end = m[_START], m[_END]
    upper = t - rule.delay
    times = state.times[base : base + end]
    hi = max(m[_HI], start)
    late = hi > start and times[hi - 1] > upper
    if late:
        hi = _first_after(times, start, hi, upper)
    else:
        before = hi
        while hi < end and times[hi] <= upper:
            hi += 1
        m[_HI] = hi
        for x in range(state.peaks.shape[0]):
            _climb(state, base, stairs[x], x, before, hi)
    for w in range(len(rule.windows)):
        bound = max(upper - rule.windows[w], limit)
        lo = max(m[_LO + w], start)
        if lo > start and times[lo - 1] > bound:
            lo = _first_after(times, start, lo, bound)
        else:
            while lo < end and times[lo] <= bound:
                lo += 1
            m[_LO + w] = lo
        lo = min(lo, hi)
        if rule.merges:
            counts[w] = state.prefix[0, base + hi] - state.prefix[0, base + lo] if end > 0 else 0
        else:
            counts[w] = hi - lo
        for v in range(state.prefix.shape[0]):
            sums[v, w] = state.prefix[v, base + hi] - state.prefix[v, base + lo] if end > 0 else 0
        for x in range(state.peaks.shape[0]):
            best = np.int64(_NONE)
            if late:
                for i in range(lo, hi):
                    best = max(best, state.peaks[x, base + i])
            else:
                p = max(stairs[x, _POINTER + w], stairs[x, _FIRST])
                last = stairs[x, _LAST]
                if p > stairs[x, _FIRST] and state.stair_times[x, base + p - 1] > bound:
                    p = _first_after(
                        state.stair_times[x, base : base + last], stairs[x, _FIRST], p, bound
                    )
                else:
                    while p < last and state.stair_times[x, base + p] <= bound:
                        p += 1
                    stairs[x, _POINTER + w] = p
                if p < last:
                    best = state.stair_values[x, base + p]
            peaks[x, w] = best
    previous = hi - 1
    if own:
        if rule.merges and state.prefix[0, base + hi] - state.prefix[0, base + hi - 1] > 1:
            return np.int64(0)  # another event of the same tick
        previous -= 1
    if previous >= start and times[previous] > limit:
        return t - times[previous]
    return np.int64(_NO_PREVIOUS)


@nb.njit(cache=True, inline="always")
def _forget(logs, stairs):  # type: ignore[no-untyped-def]
    """Empty an entity's logs; their regions stay."""
    for j in range(len(logs)):
        logs[j, _START] = logs[j, _END]
        logs[j, _HI:] = logs[j, _END]
        for x in range(stairs.shape[1]):
            stairs[j, x, :] = stairs[j, x, _LAST]


@nb.njit(cache=True)
def _look_up(state, keys, rows, hashes, entities):  # type: ignore[no-untyped-def]
    """Find the entity of each row, or −1, and bring what `_run` will need of it into the cache.

    Here no row waits for another, so the processor fetches the memory of many at once: with
    100,000 entities an event takes 0.4 instead of 0.9 µs.
    """
    for k in range(len(rows)):
        key = keys[rows[k]]
        hashes[k] = hash_of(key, keys.shape[1])
    mask = np.uint64(len(state.slots) - 1)
    touched = np.int64(0)
    for k in range(len(rows)):
        touched += state.slots[np.int64(hashes[k] & mask)]
    for k in range(len(rows)):
        entities[k] = find(state, hashes[k], keys[rows[k]])
    for k in range(len(rows)):
        e = entities[k]
        if e >= 0:
            touched += state.newest[e]
            for j in range(state.meta.shape[1]):
                touched += state.meta[e, j, _OFFSET]
                if state.stairs.shape[2]:
                    touched += state.stairs[e, j, 0, _LAST]
    for k in range(len(rows)):
        e = entities[k]
        if e >= 0:
            for j in range(state.meta.shape[1]):
                base = state.meta[e, j, _OFFSET]
                for c in range(_END, state.meta.shape[2]):
                    at = base + state.meta[e, j, c]
                    if at < len(state.times):
                        touched += state.times[at]
                        for v in range(state.prefix.shape[0]):
                            touched += state.prefix[v, at]
    return touched


@nb.njit(cache=True, inline="always")
def _run(state, rule, keys, source, t, values, peaks, counts, sums, best, since, rows):  # type: ignore[no-untyped-def]
    """Process these rows in order; return (how many, _DONE or what must grow first)."""
    counters = state.counters
    hashes = np.empty(len(rows), np.uint64)
    entities = np.empty(len(rows), np.int64)
    _look_up(state, keys, rows, hashes, entities)
    for k in range(len(rows)):
        i = rows[k]
        log = rule.log_of[source[i]]
        answered = source[i] == rule.answered
        if log < 0 and not answered:
            continue  # of no concern to this view
        tick = t[i] // rule.tick * rule.tick
        h = hashes[k]
        entity = entities[k]
        if entity < 0:  # unless a row before it was the first of this key
            entity = find(state, h, keys[i])
        if entity < 0:
            n = counters[_ENTITIES]
            if n >= len(state.hashes) or (n + 1) * 2 > len(state.slots):
                return k, _GROW_ENTITIES
            entity = _add(state, h, keys[i])
        clock = counters[_CLOCK]
        clock = tick if clock == _NEVER else max(clock, min(tick, clock + CLOCK_STEP_MS))
        newest = state.newest[entity]
        if newest != _NEVER and clock - newest > rule.idle:
            _forget(state.meta[entity], state.stairs[entity])
            newest = _NEVER
        late = newest - tick if newest != _NEVER else 0
        newest = max(newest, tick)
        limit = min(newest, clock) - rule.horizon
        enters = log >= 0 and tick > limit
        if enters and not _make_room(
            state, state.meta[entity, log], state.stairs[entity, log], limit
        ):
            return k, _GROW_POOL
        counters[_CLOCK] = clock
        state.newest[entity] = newest
        if answered and late > 0:
            counters[_LATE] += 1
            if late > rule.lateness:
                counters[_TOO_LATE] += 1
        if enters:
            _insert(
                state,
                state.meta[entity, log],
                state.stairs[entity, log],
                tick,
                values[i],
                peaks[i],
                rule.merges,
            )
        if answered:
            for j in range(state.meta.shape[1]):
                since[i, j] = _answer(
                    state,
                    state.meta[entity, j],
                    state.stairs[entity, j],
                    rule,
                    tick,
                    limit,
                    j == log and rule.delay == 0 and enters,
                    counts[i, j],
                    sums[i, j],
                    best[i, j],
                )
    return len(rows), _DONE


@intrinsic
def _lent(_, array):  # type: ignore[no-untyped-def]
    """Return the same array without its owner, so that passing it on counts no references."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lent = context.make_array(array)(context, builder, arguments[0])
        lent.meminfo = cgutils.get_null_value(lent.meminfo.type)
        lent.parent = cgutils.get_null_value(lent.parent.type)
        return lent._getvalue()

    return array(array), codegen


# What is done with the list of states is compiled here, and so cached. Its own methods are compiled
# anew in every process, which takes two seconds.


@nb.njit(cache=True)
def _list_of(state):  # type: ignore[no-untyped-def]
    states = nb.typed.List()
    states.append(state)
    return states


@nb.njit(cache=True)
def _append(states, state):  # type: ignore[no-untyped-def]
    states.append(state)


@nb.njit(cache=True)
def _replace(states, shard, state):  # type: ignore[no-untyped-def]
    states[shard] = state


@nb.njit(cache=True)
def _run_shards(  # type: ignore[no-untyped-def]
    states, rule, keys, source, t, values, peaks, counts, sums, best, since, rows, starts, at
):
    """Process `rows`, grouped by shard: those of shard s from ``starts[s]`` on; those before place
    `at` are done. Return (place, shard, _DONE or what must grow first, late, too late), the last
    two of all shards since they were made."""
    late, too_late = 0, 0
    rule = _Rule(
        _lent(rule.log_of), rule.answered, _lent(rule.windows), rule.delay, rule.horizon,
        rule.lateness, rule.idle, rule.tick, rule.merges,
    )  # fmt: skip
    keys, source, t = _lent(keys), _lent(source), _lent(t)
    values, peaks = _lent(values), _lent(peaks)
    counts, sums, best, since = _lent(counts), _lent(sums), _lent(best), _lent(since)
    rows = _lent(rows)
    if at == 0:
        counts[:], sums[:], best[:], since[:] = 0, 0, _NONE, _NO_PREVIOUS
    for shard in range(len(starts) - 1):
        begin = max(at, starts[shard])
        end = starts[shard + 1]
        if begin >= end:
            continue
        state = states[shard]
        lent = _Arrays(
            _lent(state.slots), _lent(state.hashes), _lent(state.keys), _lent(state.newest),
            _lent(state.meta), _lent(state.stairs), _lent(state.times), _lent(state.prefix),
            _lent(state.peaks), _lent(state.stair_times), _lent(state.stair_values),
            _lent(state.free), _lent(state.counters),
        )  # fmt: skip
        done, needed = _run(
            lent, rule, keys, source, t, values, peaks, counts, sums, best, since,
            rows[begin:end],
        )  # fmt: skip
        if needed != _DONE:
            return begin + done, shard, needed, late, too_late
    for shard in range(len(states)):
        late += states[shard].counters[_LATE]
        too_late += states[shard].counters[_TOO_LATE]
    return len(rows), 0, _DONE, late, too_late


@nb.njit(cache=True)
def _measure(state, rule, lengths, alive):  # type: ignore[no-untyped-def]
    """Tell which entities are not forgotten, and count the entries of their logs that some window
    may still need; return their total."""
    total = 0
    clock = state.counters[_CLOCK]
    for e in range(state.counters[_ENTITIES]):
        newest = state.newest[e]
        alive[e] = newest != _NEVER and clock - newest <= rule.idle
        if not alive[e]:
            continue
        limit = min(newest, clock) - rule.horizon
        for j in range(state.meta.shape[1]):
            m = state.meta[e, j]
            at = m[_START]
            while at < m[_END] and state.times[m[_OFFSET] + at] <= limit:
                at += 1
            lengths[e, j] = m[_END] - at
            total += m[_END] - at
    return total


@nb.njit(cache=True)
def _export(state, lengths, times, values, peaks):  # type: ignore[no-untyped-def]
    """Copy the newest `lengths` entries of each log out of the pool, in order of entity and log."""
    k = 0
    for e in range(state.counters[_ENTITIES]):
        for j in range(state.meta.shape[1]):
            m = state.meta[e, j]
            for i in range(m[_END] - lengths[e, j], m[_END]):
                at = m[_OFFSET] + i
                times[k] = state.times[at]
                for v in range(values.shape[0]):
                    values[v, k] = state.prefix[v, at + 1] - state.prefix[v, at]
                for x in range(peaks.shape[0]):
                    peaks[x, k] = state.peaks[x, at]
                k += 1


@nb.njit(cache=True)
def _import(state, keys, newest, lengths, times, values, peaks):  # type: ignore[no-untyped-def]
    """Fill an empty state; the inverse of `_export`."""
    k = 0
    for e in range(len(keys)):
        entity = _add(state, hash_of(keys[e], keys.shape[1]), keys[e])
        state.newest[entity] = newest[e]
        for j in range(lengths.shape[1]):
            n = lengths[e, j]
            if n == 0:
                continue
            size = max(1 << _size_class(n + 1), _SMALLEST_REGION)
            base = _allocate(state, size)
            m = state.meta[entity, j]
            m[_OFFSET] = base
            m[_CAPACITY] = size
            m[_END] = n
            for v in range(values.shape[0]):
                state.prefix[v, base] = 0
            for i in range(n):
                state.times[base + i] = times[k]
                for v in range(values.shape[0]):
                    state.prefix[v, base + i + 1] = state.prefix[v, base + i] + values[v, k]
                for x in range(peaks.shape[0]):
                    state.peaks[x, base + i] = peaks[x, k]
                k += 1


@dataclass(frozen=True)
class Layout:
    """How a view's declaration maps onto the kernel's arrays; the same for all of its shards.

    ``sources`` are the event types by source code, as in the batches that will come.
    """

    view: FeatureView
    sources: tuple[type[Event], ...]
    logs: tuple[type[Event], ...]
    sums: tuple[tuple[str, ...], ...]  # per log: the columns summed
    extrema: tuple[tuple[tuple[str, int], ...], ...]  # per log: (column, sign)
    shards: int

    @staticmethod
    def of(view: FeatureView, sources: Sequence[type[Event]], shards: int = SHARDS) -> Layout:
        logs = view.sources
        missing = [source.__name__ for source in logs if source not in sources]
        if missing:
            raise ValueError(
                f"feature view {view.name!r} aggregates {', '.join(missing)}, which the flow does "
                "not read"
            )
        sums: dict[type[Event], dict[str, None]] = {log: {} for log in logs}
        extrema: dict[type[Event], dict[tuple[str, int], None]] = {log: {} for log in logs}
        for feature in view.features:
            peaks = list(feature.extrema(view))
            for source, column, sign in peaks:
                extrema[source][(column, sign)] = None
            for source, summed in feature.sums(view):
                if summed is not None and not peaks:
                    sums[source][summed] = None
        return Layout(
            view,
            tuple(sources),
            logs,
            tuple(tuple(sums[log]) for log in logs),
            tuple(tuple(extrema[log]) for log in logs),
            shards,
        )

    @property
    def n_sums(self) -> int:
        return max(map(len, self.sums)) + (self.view.resolution_ms is not None)

    @property
    def n_extrema(self) -> int:
        return max(map(len, self.extrema))

    def rule(self) -> _Rule:
        view = self.view
        log_of = np.full(256, -1, np.int8)
        for log, source in enumerate(self.logs):
            log_of[self.sources.index(source)] = log
        windows = np.array([milliseconds(window) for window in view.windows], np.int64)
        return _Rule(
            log_of,
            self.sources.index(view.of),
            windows,
            view.delay_ms,
            view.horizon_ms,
            view.lateness_ms,
            view.idle_ms,
            view.resolution_ms or 1,
            view.resolution_ms is not None,
        )

    def description(self) -> dict[str, Any]:
        """What must agree between a snapshot and the view that resumes from it."""
        return {
            "view": self.view.name,
            "key": self.view.key,
            "logs": [log.__name__ for log in self.logs],
            "sums": self.sums,
            "extrema": self.extrema,
            "resolution_ms": self.view.resolution_ms,
            "horizon_ms": self.view.horizon_ms,
            "shards": self.shards,
        }


#: Columns of the kernel's raw answers, which `WindowState.update` adds and `evaluate` turns into
#: features: rows × logs × windows, × sums × windows, × extrema × windows, and rows × logs.
RAW = ("#counts", "#sums", "#extrema", "#since")


def evaluate(layout: Layout, batch: EventBatch) -> EventBatch:
    """Replace the raw answers in a batch by the view's features, float64 columns.

    Separate from `WindowState.update` so that shards can be merged first and features evaluated
    once for all rows.
    """
    features = layout.view.evaluate(_Answers(layout, batch))
    kept = {name: column for name, column in batch.columns.items() if name not in RAW}
    return EventBatch({**kept, **features})


class _Answers:
    """The kernel's answers, as the declarations ask for them."""

    def __init__(self, layout: Layout, batch: EventBatch) -> None:
        self.layout = layout
        self._counts, self._sums, self._extrema, self._since = (batch[name] for name in RAW)

    def count(self, source: type[Event], at: At) -> Int:
        return self._counts[:, self._log(source), at].T

    def total(self, source: type[Event], column: str, at: At) -> Int:
        log = self._log(source)
        sum_ = self.layout.sums[log].index(column) + (self.layout.view.resolution_ms is not None)
        return self._sums[:, log, sum_, at].T

    def smallest(self, source: type[Event], column: str, at: At) -> npt.NDArray[np.float64]:
        return self._extremum(source, column, -1, at)

    def largest(self, source: type[Event], column: str, at: At) -> npt.NDArray[np.float64]:
        return self._extremum(source, column, 1, at)

    def since_previous(self, source: type[Event]) -> npt.NDArray[np.float64]:
        since = self._since[:, self._log(source)]
        return np.where(since == _NO_PREVIOUS, np.nan, since)

    def _extremum(
        self, source: type[Event], column: str, sign: int, at: At
    ) -> npt.NDArray[np.float64]:
        log = self._log(source)
        extremum = self.layout.extrema[log].index((column, sign))
        values = self._extrema[:, log, extremum, at].T
        return np.where(values == _NONE, np.nan, values * sign)

    def _log(self, source: type[Event]) -> int:
        return self.layout.logs.index(source)


#: Columns of a snapshot: of each entity its key, newest event time and number of entries by log; of
#: each entry, by entity and log, its time, values to sum and to compare.
_LIVE = ("keys", "newest", "lengths", "times", "values", "peaks")


def _used(keys: npt.NDArray[np.uint8]) -> int:
    """Return the length of the longest key, 1 or more."""
    used = np.flatnonzero(keys.any(axis=0))
    return int(used[-1]) + 1 if len(used) else 1


def _plain(column: npt.NDArray[Any], dtype: Any) -> npt.NDArray[Any]:
    flags = column.flags
    if column.dtype == dtype and flags.c_contiguous and flags.writeable:
        return column
    return np.require(column, dtype, ["C", "W"])


class WindowState:
    """The windows of one shard of one view: feed it batches in order, take answers.

    >>> from features.fraud import CARD, FraudReport, Transaction
    >>> layout = Layout.of(CARD, [Transaction, FraudReport])
    >>> state = WindowState(layout)
    >>> day = 86_400_000
    >>> batch = EventBatch({
    ...     "source": np.zeros(3, np.uint8),
    ...     "card_id": np.array([b"a", b"a", b"b"]),
    ...     "event_time": np.array([20_000 * day, 20_001 * day, 20_001 * day]),
    ...     "amount": np.array([1000, 3000, 500]),
    ... })
    >>> batch = evaluate(layout, state.update(batch))
    >>> batch["card_count_1d"].tolist(), batch["card_mean_amount_7d"].tolist()
    ([1.0, 1.0, 1.0], [10.0, 20.0, 5.0])
    >>> WindowState.restore(layout, state.snapshot()).entities
    2
    """

    def __init__(self, layout: Layout, *, entities: int = 64, entries: int = 1024) -> None:
        self.layout = layout
        self._rule = layout.rule()
        self._arrays = self._empty(entities, entries, key_width=8)

    @property
    def entities(self) -> int:
        """Number of entities held, those with only expired entries included."""
        return int(self._arrays.counters[_ENTITIES])

    @property
    def clock(self) -> int:
        """The shard's time (ms): its newest event time, but for jumps; very small if none."""
        return int(self._arrays.counters[_CLOCK])

    @property
    def late(self) -> int:
        """Answered events that arrived behind the newest of their key, since this was made."""
        return int(self._arrays.counters[_LATE])

    @property
    def too_late(self) -> int:
        """Of those, the ones further behind than the view's lateness."""
        return int(self._arrays.counters[_TOO_LATE])

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for array in self._arrays)

    def update(self, batch: EventBatch) -> EventBatch:
        """Process a batch in order and return it with the raw answers; see `WindowShards.update`.

        Whatever the shard of the keys: all rows are this shard's.
        """
        rows = np.arange(len(batch), dtype=np.int64)
        shards = WindowShards(self.layout, [self])
        return shards.update(batch, rows, np.array([0, len(rows)], np.int64))

    def snapshot(self) -> bytes:
        """Return the state as versioned bytes: a described header and trimmed arrays."""
        live = dict(zip(_LIVE, self._live(), strict=True))
        live["keys"] = live["keys"][:, : _used(live["keys"])]
        head = {
            **self.layout.description(),
            "clock": self.clock,
            "entities": len(live["keys"]),
            "entries": len(live["times"]),
        }
        return _FORMAT.pack(head, live)

    @staticmethod
    def describe(snapshot: bytes) -> dict[str, Any]:
        """Return a snapshot's header: view, key, logs, clock, entities, entries and so on.

        Raises ValueError for bytes that are not a snapshot, or of another format.
        """
        return _FORMAT.describe(snapshot)

    @staticmethod
    def check(layout: Layout, snapshot: bytes) -> dict[str, Any]:
        """Return a snapshot's header (see `describe`) after checking that it fits the view.

        Looks at the header only. Raises ValueError if it is of another format, view or shard count.
        """
        head = WindowState.describe(snapshot)
        expected = msgspec.json.decode(msgspec.json.encode(layout.description()))
        for name, value in expected.items():
            if head[name] != value:
                raise ValueError(
                    f"the snapshot's {name} is {head[name]!r}, the declared view "
                    f"{layout.view.name!r} has {value!r}; the state of a changed view must be "
                    "computed anew, by python -m features.offline --state"
                )
        return head

    @staticmethod
    def restore(layout: Layout, snapshot: bytes) -> WindowState:
        """Return the state that `snapshot` was taken of.

        Raises ValueError if it is of another format or another view, or if it is truncated.
        """
        head = WindowState.check(layout, snapshot)
        columns = _FORMAT.unpack(snapshot)
        state = WindowState(layout)
        state._fill(*(columns[name] for name in _LIVE), clock=head["clock"])
        return state

    def _empty(self, entities: int, entries: int, key_width: int) -> _Arrays:
        layout = self.layout
        n_logs, n_windows = len(layout.logs), len(layout.view.windows)
        slots = 1 << max(4, (2 * entities).bit_length())
        counters = np.zeros(5, np.int64)
        counters[_CLOCK] = _NEVER
        return _Arrays(
            slots=np.full(slots, -1, np.int32),
            hashes=np.zeros(entities, np.uint64),
            keys=np.zeros((entities, key_width), np.uint8),
            newest=np.full(entities, _NEVER, np.int64),
            meta=np.zeros((entities, n_logs, _LO + n_windows), np.int64),
            stairs=np.zeros((entities, n_logs, layout.n_extrema, _POINTER + n_windows), np.int64),
            times=np.zeros(entries, np.int64),
            prefix=np.zeros((layout.n_sums, entries), np.int64),
            peaks=np.zeros((layout.n_extrema, entries), np.int64),
            stair_times=np.zeros((layout.n_extrema, entries), np.int64),
            stair_values=np.zeros((layout.n_extrema, entries), np.int64),
            free=np.full(63, -1, np.int64),
            counters=counters,
        )

    def _live(self) -> tuple[npt.NDArray[Any], ...]:
        """Return what some window may still need: the columns `_LIVE`."""
        state = self._arrays
        n = self.entities
        lengths = np.zeros((n, state.meta.shape[1]), np.int64)
        alive = np.zeros(n, np.bool_)
        total = _measure(state, self._rule, lengths, alive)
        times = np.empty(total, np.int64)
        values = np.empty((state.prefix.shape[0], total), np.int64)
        peaks = np.empty((state.peaks.shape[0], total), np.int64)
        _export(state, lengths, times, values, peaks)
        return state.keys[:n][alive], state.newest[:n][alive], lengths[alive], times, values, peaks

    def _fill(
        self,
        keys: npt.NDArray[np.uint8],
        newest: Int,
        lengths: Int,
        times: Int,
        values: Int,
        peaks: Int,
        *,
        clock: int,
        headroom: int = 0,
    ) -> None:
        """Replace the arrays by ones that hold just this, with room for a quarter more."""
        counters = self._arrays.counters
        sizes = np.maximum(2.0 ** np.ceil(np.log2(lengths + 1)), _SMALLEST_REGION)
        regions = int(sizes[lengths > 0].sum())
        self._arrays = self._empty(
            max(64, len(keys) + len(keys) // 4),
            max(1024, regions + regions // 4 + headroom),
            key_width=max(8, keys.shape[1]),
        )
        _import(self._arrays, keys, newest, lengths, times, values, peaks)
        self._arrays.counters[_CLOCK] = clock
        self._arrays.counters[_LATE:] = counters[_LATE:]

    def _grow(self, needed: int) -> None:
        """Drop what expired and make room, a quarter more: amortised O(1) an event."""
        largest = int(self._arrays.meta[..., _CAPACITY].max(initial=0))
        live = self._live()
        self._fill(*live, clock=self.clock, headroom=4 * max(largest, _SMALLEST_REGION))

    def _widen(self, width: int) -> None:
        """Make room for keys of this many bytes, which are more than now."""
        held = self._arrays.keys
        wider = np.zeros((len(held), -(-width // 8) * 8), np.uint8)
        wider[:, : held.shape[1]] = held
        self._arrays = self._arrays._replace(keys=wider)


class WindowShards:
    """The windows of several shards of one view, all processed in one call of the kernel.

    A call costs some 20 µs before it has looked at an event, and a micro-batch has rows of most
    shards: one call each was the largest part of the time that a small batch took.

    All shards are there from the beginning, empty; set those that are resumed.

    Args:
        states: those of shards 0, 1, …, if not all empty.

    >>> from features.fraud import CARD, FraudReport, Transaction
    >>> from features.keys import group_by_shard
    >>> shards = WindowShards(Layout.of(CARD, [Transaction, FraudReport], 6))
    >>> batch = EventBatch({
    ...     "source": np.zeros(3, np.uint8),
    ...     "card_id": np.array([b"C0001", b"C0002", b"C0001"]),
    ...     "event_time": np.array([1_000, 2_000, 3_000]),
    ...     "amount": np.array([1000, 3000, 500]),
    ... })
    >>> rows, starts = group_by_shard(batch["card_id"], 6)
    >>> evaluate(shards.layout, shards.update(batch, rows, starts))["card_count_1d"].tolist()
    [1.0, 1.0, 2.0]
    """

    def __init__(self, layout: Layout, states: Sequence[WindowState] = ()) -> None:
        self.layout = layout
        #: Answered events that arrived behind the newest of their key, since the states were made.
        self.late = 0
        #: Of those, the ones further behind than the view's lateness.
        self.too_late = 0
        self._rule = layout.rule()
        self._shape = len(layout.logs), len(layout.view.windows), layout.n_sums, layout.n_extrema
        # Per log that has any: its source code, and which columns go where.
        merges = layout.view.resolution_ms is not None
        self._columns = [
            (
                layout.sources.index(event),
                list(enumerate(layout.sums[log], start=int(merges))),
                [(x, name, sign) for x, (name, sign) in enumerate(layout.extrema[log])],
            )
            for log, event in enumerate(layout.logs)
            if layout.sums[log] or layout.extrema[log]
        ]
        self._states = list(states) or [WindowState(layout) for _ in range(layout.shards)]
        self._arrays = _list_of(self._states[0]._arrays)
        for state in self._states[1:]:
            _append(self._arrays, state._arrays)
        self._key_width = 0  # at most that of the state with the narrowest keys

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, shard: int) -> WindowState:
        return self._states[shard]

    def __setitem__(self, shard: int, state: WindowState) -> None:
        """Hold this shard's state from now on; nobody else may update it."""
        self._states[shard] = state
        _replace(self._arrays, shard, state._arrays)
        self._key_width = 0

    def update(self, batch: EventBatch, rows: Int, starts: Int) -> EventBatch:
        """Process a batch and return it with the raw answers (columns `RAW`), rows as they were.

        `rows` and `starts` say which row is of which shard, see `group_by_shard`. Rows of a shard
        are processed in order.

        Needs the columns ``source``, ``event_time``, the view's key and the columns it
        aggregates. Rows of event types that the view does not answer get blanks, and those that
        it does not aggregate either change nothing. Amortised O(windows) a row; O(entries newer
        than it) for a late one.
        """
        layout, n = self.layout, len(batch)
        n_logs, n_windows, n_sums, n_extrema = self._shape
        # One memory layout, so that one compiled signature serves all callers.
        source = _plain(batch["source"], np.uint8)
        times = _plain(batch["event_time"], np.int64)
        values = np.zeros((n, n_sums), np.int64)
        peaks = np.zeros((n, n_extrema), np.int64)
        if layout.view.resolution_ms is not None:
            values[:, 0] = 1
        for code, summed, peaking in self._columns:
            mine: Any = slice(None) if n_logs == 1 else source == code
            for v, name in summed:
                values[mine, v] = batch[name][mine]
            for x, name, sign in peaking:
                peaks[mine, x] = batch[name][mine] * sign
        keys = key_bytes(batch[layout.view.key])
        if keys.shape[1] > self._key_width:
            self._widen(keys)
        out: dict[str, npt.NDArray[np.int64]] = {
            "#counts": np.empty((n, n_logs, n_windows), np.int64),
            "#sums": np.empty((n, n_logs, n_sums, n_windows), np.int64),
            "#extrema": np.empty((n, n_logs, n_extrema, n_windows), np.int64),
            "#since": np.empty((n, n_logs), np.int64),
        }
        at = 0
        while True:
            at, shard, needed, self.late, self.too_late = _run_shards(
                self._arrays,
                self._rule,
                keys,
                source,
                times,
                values,
                peaks,
                *out.values(),
                rows,
                starts,
                at,
            )
            if needed == _DONE:
                return batch.with_columns(out)
            self._states[shard]._grow(needed)
            _replace(self._arrays, shard, self._states[shard]._arrays)

    def _widen(self, keys: npt.NDArray[np.uint8]) -> None:
        width = _used(keys)
        for shard, state in enumerate(self._states):
            if width > state._arrays.keys.shape[1]:
                state._widen(width)
                _replace(self._arrays, shard, state._arrays)
        self._key_width = min(state._arrays.keys.shape[1] for state in self._states)


def reshard(states: Sequence[WindowState], layout: Layout) -> list[WindowState]:
    """Spread the entities of a view's shards over another number of shards, `layout.shards`.

    `states` are all shards, of one layout that differs from `layout` in the number only. Features
    of events within the allowed lateness are the same from either. All new shards have the newest
    clock of the old ones. O(entries); needs memory for all of them twice.
    """
    live = [state._live() for state in states]
    width = max(8, *(keys.shape[1] for keys, *_ in live))
    keys = np.concatenate(
        [np.pad(found, ((0, 0), (0, width - found.shape[1]))) for found, *_ in live]
    )
    newest = np.concatenate([found[1] for found in live])
    lengths = np.concatenate([found[2] for found in live])
    times, values, peaks = (np.concatenate([found[n] for found in live], -1) for n in (3, 4, 5))
    ends = np.cumsum(lengths.sum(axis=1))
    begins = ends - lengths.sum(axis=1)
    shard_of = shards_of(np.ascontiguousarray(keys).view(f"S{width}")[:, 0], layout.shards)
    clock = max(state.clock for state in states)
    spread = []
    for shard in range(layout.shards):
        mine = np.flatnonzero(shard_of == shard)
        ranges = [np.arange(begins[e], ends[e]) for e in mine.tolist()]
        entries = np.concatenate([np.empty(0, np.int64), *ranges])
        state = WindowState(layout)
        columns = (keys[mine], newest[mine], lengths[mine])
        state._fill(*columns, times[entries], values[:, entries], peaks[:, entries], clock=clock)
        spread.append(state)
    return spread
