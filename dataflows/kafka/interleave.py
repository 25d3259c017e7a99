"""Merge partitions into one stream ordered by stream time. Pure: no broker, no clock.

A backlog must not run one partition hours ahead of another: windows would close over gaps, and a
fraud report would come before its transaction. So rows wait for the partition that is furthest
behind, as long as that partition is known to have more.

The rule. Each lane (a partition) knows the latest stream time it has seen. A lane *holds* the
others while it is not at its end; whoever calls `release` says which lanes hold. Rows are released
up to the smallest ``(latest stream time, rank)`` of the holding lanes, that lane's own rows
included: nothing that it may still deliver can sort before them. With no holding lane everything
goes.

Within a lane the order of offsets is never changed: a row's stream time counts as at least that of
the row before it. Ties between lanes go by rank, which is the lanes' order in the constructor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numba as nb
import numpy as np
import numpy.typing as npt
from confluent_kafka import Message

from dataflows.kafka.records import Int64s, Records

NO_TIME = np.iinfo(np.int64).min
"""Stream time of a row that has none of its own; it takes the one before it in its lane."""


@dataclass(slots=True)
class _Rows:
    """Consecutive rows of one lane, or (with `lane` filled in) merged rows of several."""

    messages: list[Message]
    offset: Int64s
    append_time: Int64s
    stream_time: Int64s
    lane: npt.NDArray[np.intp]

    def take(self, rows: npt.NDArray[np.intp]) -> _Rows:
        return _Rows(
            [self.messages[row] for row in rows.tolist()],
            self.offset[rows],
            self.append_time[rows],
            self.stream_time[rows],
            self.lane[rows],
        )

    def cut(self, count: int) -> tuple[_Rows, _Rows]:
        head, tail = slice(count), slice(count, None)
        return self._slice(head), self._slice(tail)

    def _slice(self, rows: slice) -> _Rows:
        return _Rows(
            self.messages[rows],
            self.offset[rows],
            self.append_time[rows],
            self.stream_time[rows],
            self.lane[rows],
        )


def _join(parts: Sequence[_Rows]) -> _Rows:
    if len(parts) == 1:
        return parts[0]
    messages: list[Message] = []
    for part in parts:
        messages += part.messages
    return _Rows(
        messages,
        np.concatenate([part.offset for part in parts]),
        np.concatenate([part.append_time for part in parts]),
        np.concatenate([part.stream_time for part in parts]),
        np.concatenate([part.lane for part in parts]),
    )


@nb.njit(cache=True)
def _admit(lane, offset, stream_time, received, latest, counts, times, kept):  # type: ignore[no-untyped-def]
    """Note which rows are new, how many of each lane, and from which time on each counts."""
    new = 0
    for row in range(len(lane)):
        at = lane[row]
        if offset[row] < received[at]:
            continue
        latest[at] = max(latest[at], stream_time[row])
        times[row] = latest[at]
        received[at] = offset[row] + 1
        counts[at] += 1
        kept[new] = row
        new += 1
    return new


class Interleaver:
    """Hold what has been read of each lane, and release it in stream-time order.

    Args:
        lanes: (source, partition) of each lane, in the order that breaks ties.

    Attributes:
        latest: int64 per lane, the largest stream time seen (`NO_TIME`: none yet).
        received: int64 per lane, offset after the last row pushed.
        emitted: int64 per lane, offset after the last row that `take` returned.
        appended: int64 per lane, when the broker appended that row, in ms; −1: none yet.
        waiting: int per lane, rows pushed and not yet chosen for release.
    """

    def __init__(self, lanes: Sequence[tuple[int, int]], start: Sequence[int]) -> None:
        self._source = np.array([source for source, _ in lanes], dtype=np.uint8)
        self._partition = np.array([partition for _, partition in lanes], dtype=np.int32)
        self.latest = np.full(len(lanes), NO_TIME, dtype=np.int64)
        self.received = np.array(start, dtype=np.int64)
        self.emitted = self.received.copy()
        self.appended = np.full(len(lanes), -1, np.int64)
        self.waiting = [0] * len(lanes)
        self._lanes: list[deque[_Rows]] = [deque() for _ in lanes]
        self._fresh: _Rows | None = None  # what came last, of all lanes
        self._ready: deque[_Rows] = deque()
        self._ready_rows = 0
        nothing = np.empty(0, np.int64)
        _admit(nothing, nothing, nothing, self.received, self.latest, nothing, nothing, nothing)

    @property
    def buffered(self) -> int:
        """Rows pushed and not yet taken."""
        return sum(self.waiting) + self._ready_rows

    @property
    def ready(self) -> int:
        """Rows released and not yet taken."""
        return self._ready_rows

    def push(
        self,
        messages: list[Message],
        lane: npt.NDArray[np.intp],
        offset: Int64s,
        append_time: Int64s,
        stream_time: Int64s,
    ) -> None:
        """Add rows as read: any mix of lanes, offsets ascending within each.

        Rows below `received` are dropped (a broker client may deliver a row twice after a pause).
        A `stream_time` of `NO_TIME` means that the row has none. O(rows).
        """
        if not messages:
            return
        self._sort_out()
        times, kept = np.empty(len(messages), np.int64), np.empty(len(messages), np.intp)
        counts = np.zeros(len(self._lanes), np.intp)
        new = _admit(lane, offset, stream_time, self.received, self.latest, counts, times, kept)
        if not new:
            return
        rows = _Rows(messages, offset, append_time, times, lane)
        self._fresh = rows if new == len(messages) else rows.take(kept[:new])
        for index, count in enumerate(counts.tolist()):
            self.waiting[index] += count

    def bound(self, holding: Collection[int]) -> tuple[int, int] | None:
        """Return the largest (stream time, lane) that may go while `holding` lanes hold."""
        return min(((int(self.latest[lane]), lane) for lane in holding), default=None)

    def next_times(self, holding: Collection[int]) -> list[int]:
        """Return lower bounds of the stream times to come, of rows that have one.

        Of the rows that are here, and of those that `holding` lanes may deliver; `NO_TIME` for a
        lane of these that has not delivered any.
        """
        times = [
            int(self.latest[lane])
            for lane in holding
            if not self.waiting[lane] or self.latest[lane] == NO_TIME
        ]
        self._sort_out()
        for parts in (self._ready, *self._lanes):
            for rows in parts:
                first = int(np.searchsorted(rows.stream_time, NO_TIME, side="right"))
                if first < len(rows.messages):
                    times.append(int(rows.stream_time[first]))
                    break
        return times

    def release(self, limit: int, bound: tuple[int, int] | None) -> bool:
        """Put rows in order until `limit` of them are ready; tell whether that many are.

        Args:
            limit: number of rows, at least 1.
            bound: of `bound`; None lets everything go.
        """
        fresh = self._fresh
        if fresh is not None:
            count = len(fresh.messages)
            if bound is None and count <= limit and sum(self.waiting) == count:
                # Everything may go, and there is nothing else: as it is most of the time.
                self._fresh = None
                self.waiting = [0] * len(self.waiting)
                order = np.lexsort((fresh.lane, fresh.stream_time))
                self._make_ready([fresh.take(order) if count > 1 else fresh])
            else:
                self._sort_out()
        while self._ready_rows < limit and self._release(limit, bound):
            pass
        return self._ready_rows >= limit

    def next_lanes(self, limit: int) -> npt.NDArray[np.intp]:
        """Return the lane of each of the next ready rows, in order, at most `limit`."""
        lanes = [rows.lane for rows in self._ready]
        return np.concatenate(lanes)[:limit] if lanes else np.empty(0, np.intp)

    def oldest(self) -> Int64s:
        """Return when the broker appended the first row of each lane that was not taken, in ms.

        int64 per lane; −1: none is here. O(lanes + ready rows).
        """
        self._sort_out()
        found = np.full(len(self._lanes), -1, np.int64)
        for lane, waiting in enumerate(self._lanes):
            if waiting:
                found[lane] = waiting[0].append_time[0]
        for rows in reversed(self._ready):
            lanes, first = np.unique(rows.lane, return_index=True)
            found[lanes] = rows.append_time[first]
        return found

    def take(self, limit: int) -> Records | None:
        """Return the next ready rows, in order, at most `limit`; None if there are none."""
        if not self._ready_rows or not limit:
            return None
        parts: list[_Rows] = []
        missing = limit
        while missing and self._ready:
            rows = self._ready.popleft()
            if len(rows.messages) > missing:
                rows, rest = rows.cut(missing)
                self._ready.appendleft(rest)
            parts.append(rows)
            missing -= len(rows.messages)
        self._ready_rows -= limit - missing
        taken = _join(parts)
        np.maximum.at(self.emitted, taken.lane, taken.offset + 1)
        self.appended[taken.lane] = taken.append_time  # of equal lanes the last stays
        return Records(
            taken.messages,
            self._source[taken.lane],
            self._partition[taken.lane],
            taken.offset,
            taken.append_time,
            taken.stream_time,
        )

    def _release(self, limit: int, bound: tuple[int, int] | None) -> bool:
        """Sort a next stretch of the waiting rows into `_ready`; False if none may go.

        The stretch is about `limit` rows long, however many wait, and ends at one stream time in
        all lanes, so that every row is sorted once and later stretches sort behind it.
        """
        free = [
            (lane, count)
            for lane, waiting in enumerate(self.waiting)
            if waiting and (count := self._count_up_to(lane, bound))
        ]
        if not free:
            return False
        if len(free) == 1:
            lane, count = free[0]
            self._make_ready(self._pop(lane, min(count, limit)))
            return True
        quota = -(-limit // len(free))
        until = min(
            (self._time_at(lane, quota - 1) for lane, count in free if count > quota),
            default=None,
        )
        parts: list[_Rows] = []
        for lane, count in free:
            if until is not None:
                count = min(count, self._count_up_to(lane, (until, len(self._lanes))))
            if count:
                parts += self._pop(lane, count)
        if len(parts) > 1:
            joined = _join(parts)
            order = np.argsort(joined.stream_time, kind="stable")
            parts = [joined.take(order)]
        self._make_ready(parts)
        return True

    def _sort_out(self) -> None:
        """Move the rows that came last to their lanes."""
        rows, self._fresh = self._fresh, None
        if rows is None:
            return
        starts = np.flatnonzero(rows.lane[1:] != rows.lane[:-1]) + 1
        if len(starts) >= len(self._lanes):
            rows = rows.take(np.argsort(rows.lane, kind="stable"))
            starts = np.flatnonzero(rows.lane[1:] != rows.lane[:-1]) + 1
        edges = [0, *starts.tolist(), len(rows.messages)]
        for start, stop in pairwise(edges):
            self._lanes[int(rows.lane[start])].append(rows._slice(slice(start, stop)))

    def _make_ready(self, parts: list[_Rows]) -> None:
        self._ready += parts
        self._ready_rows += sum(len(part.messages) for part in parts)

    def _count_up_to(self, lane: int, bound: tuple[int, int] | None) -> int:
        """Count the lane's waiting rows with (stream time, lane) ≤ `bound`."""
        if bound is None:
            return self.waiting[lane]
        time, rank = bound
        if self.latest[lane] < time or (self.latest[lane] == time and lane <= rank):
            return self.waiting[lane]
        count = 0
        for rows in self._lanes[lane]:
            free = int(
                np.searchsorted(rows.stream_time, time, side="right" if lane <= rank else "left")
            )
            count += free
            if free < len(rows.messages):
                break
        return count

    def _time_at(self, lane: int, row: int) -> int:
        for rows in self._lanes[lane]:
            if row < len(rows.messages):
                return int(rows.stream_time[row])
            row -= len(rows.messages)
        raise IndexError(row)

    def _pop(self, lane: int, count: int) -> list[_Rows]:
        self.waiting[lane] -= count
        parts: list[_Rows] = []
        waiting = self._lanes[lane]
        while count:
            rows = waiting.popleft()
            if len(rows.messages) > count:
                rows, rest = rows.cut(count)
                waiting.appendleft(rest)
            parts.append(rows)
            count -= len(rows.messages)
        return parts
