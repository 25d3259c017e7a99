"""Events → events with the windowed features of one key.

Bytewax keeps state by *virtual shard*, not by entity: a shard holds all entities whose keys hash
to it, so there are few keys to route, wake and snapshot, and rescaling moves whole shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import get_ident
from typing import Any, NamedTuple

import bytewax.operators as op
import numpy as np
import structlog
from bytewax.dataflow import Stream, operator
from bytewax.operators import KeyedStream, StatefulBatchLogic

from dataflows.metrics import METRICS
from features.batch import EventBatch, in_order
from features.declare import FeatureView
from features.events import DTYPES, Event, column_kinds
from features.keys import group_by_shard
from features.state_dir import StateDir
from features.windows import (
    Int,
    Layout,
    WindowShards,
    WindowState,
    evaluate,
)

log = structlog.get_logger()

_NO_STATE = -1


@dataclass(frozen=True)
class Shards:
    """How window state is kept: over how many virtual shards, and where a new one starts from."""

    count: int
    start: StateDir | None = None


@operator
def windows(
    step_id: str,
    up: Stream[EventBatch],
    view: FeatureView,
    sources: Sequence[type[Event]],
    shards: Shards,
) -> Stream[EventBatch]:
    """Add the view's features to each event, in order of arrival.

    `sources` are the event types by source code. Events that the view does not answer update it
    and pass through.
    """
    layout = Layout.of(view, sources, shards.count)
    _warm_up(layout)
    names = [f"s{shard:03d}" for shard in range(shards.count)]
    # By thread. Not `threading.local`: the engine's threads are not Python's, and what is local to
    # them is gone at the next call.
    workers: dict[int, _Worker] = {}
    woken = False

    def worker() -> _Worker:
        found = workers.get(get_ident())
        if found is None:
            found = workers[get_ident()] = _Worker(layout, shards.start)
        return found

    def split(batches: list[EventBatch]) -> Iterable[tuple[str, _Part]]:
        nonlocal woken
        batch = in_order(batches)
        if batch is None:
            return
        if not woken:
            # Every shard takes its first state now, so that the first snapshot holds them all and
            # a later life never looks at `shards.start`, which may be gone or newer by then.
            woken = True
            nobody = _Grouped.of(batch.take(slice(0)), view.key, shards.count)
            for shard, name in enumerate(names):
                yield name, _Part(nobody, shard)
        grouped = _Grouped.of(batch, view.key, shards.count)
        for shard, (start, end) in enumerate(pairwise(grouped.bounds)):
            if start < end:
                yield names[shard], _Part(grouped, shard)

    def merge(_: list[tuple[str, None]]) -> Iterable[EventBatch]:
        return worker().finished()

    def build(snapshot: bytes | None) -> _ShardLogic:
        return _ShardLogic(worker(), snapshot)

    sharded: KeyedStream[_Part] = op.flat_map_batch("split", up, split)
    answered = op.stateful_batch("state", sharded, build)
    return op.flat_map_batch("merge", answered, merge)


class _Grouped(NamedTuple):
    """A batch, its row numbers grouped by shard, and where each shard's begin (twice: numbers out
    of a list cost less)."""

    batch: EventBatch
    rows: Int
    starts: Int
    bounds: list[int]

    @staticmethod
    def of(batch: EventBatch, key: str, shards: int) -> _Grouped:
        rows, starts = group_by_shard(batch[key], shards)
        return _Grouped(batch, rows, starts, starts.tolist())


class _Part:
    """The rows of one shard in a batch, which the parts of one worker share: nothing is copied
    unless it goes to another process."""

    __slots__ = ("shard", "whole")

    def __init__(self, whole: _Grouped, shard: int) -> None:
        self.whole = whole
        self.shard = shard

    def __len__(self) -> int:
        bounds = self.whole.bounds
        return bounds[self.shard + 1] - bounds[self.shard]

    @property
    def rows(self) -> Int:
        bounds = self.whole.bounds
        return self.whole.rows[bounds[self.shard] : bounds[self.shard + 1]]

    def __reduce__(self) -> tuple[Any, ...]:
        shards = len(self.whole.bounds) - 1
        return _part_alone, (self.whole.batch.take(self.rows), self.shard, shards)


def _part_alone(batch: EventBatch, shard: int, shards: int) -> _Part:
    starts = np.zeros(shards + 1, np.int64)
    starts[shard + 1 :] = len(batch)
    return _Part(_Grouped(batch, np.arange(len(batch)), starts, starts.tolist()), shard)


class _Worker:
    """A worker's shards. Their logics only collect what is due: one call of the kernel does it for
    all of them, at the latest when one of them has to give its snapshot."""

    def __init__(self, layout: Layout, start: StateDir | None) -> None:
        self.states = WindowShards(layout)
        self._layout = layout
        self._start = start
        self._until = _NO_STATE
        self._due: list[_Part] = []
        self._finished: list[EventBatch] = []
        # Whether `merge` will be called for what is due. It comes before the next epoch's rows do:
        # the source waits until an epoch is durable (dataflows/kafka/source.py, rule 1).
        self._called = False
        self._late = METRICS.late_events.labels(layout.view.name, "yes")
        self._too_late = METRICS.late_events.labels(layout.view.name, "no")

    def restored(self, snapshot: bytes) -> WindowState:
        return WindowState.restore(self._layout, snapshot)

    def begin(self, shard: int, state: WindowState | None) -> None:
        """Go on with a shard's state, or begin it where new ones start."""
        if state is None and self._start is not None:
            self._until = self._start.manifest.until
            snapshot = self._start.read(self._layout.view.name, shard)
            state = None if snapshot is None else self.restored(snapshot)
        self.states[shard] = state or WindowState(self._layout)

    def collect(self, parts: list[_Part]) -> list[None]:
        """Note what is due; return what calls `merge`."""
        self._due += parts
        if self._called:
            return []
        self._called = True
        return [None]

    def process(self) -> None:
        """Process what is due."""
        due, self._due = self._due, []
        grouped = self._together(due)
        if grouped is None:
            return
        if self._until != _NO_STATE:
            _count_overlap(grouped.batch, self._layout, self._until)
        states = self.states
        late, too_late = states.late, states.too_late
        batch = states.update(grouped.batch, grouped.rows, grouped.starts)
        if states.late > late:
            self._too_late.inc(states.too_late - too_late)
            self._late.inc(states.late - late - (states.too_late - too_late))
        self._finished.append(evaluate(self._layout, batch))

    def _together(self, due: list[_Part]) -> _Grouped | None:
        """Return the parts' rows as one batch in order; None if there are none."""
        by_batch: dict[int, list[_Part]] = {}
        for part in due:
            by_batch.setdefault(id(part.whole), []).append(part)
        batches = []
        for parts in by_batch.values():
            whole = parts[0].whole
            if sum(map(len, parts)) == len(whole.batch):
                if len(by_batch) == 1 and len(whole.batch):
                    return whole
                batches.append(whole.batch)
            else:  # the others went to other workers
                rows = np.concatenate([part.rows for part in parts])
                batches.append(whole.batch.take(np.sort(rows)))
        batch = in_order(batches)
        if batch is None:
            return None
        return _Grouped.of(batch, self._layout.view.key, len(self.states))

    def finished(self) -> list[EventBatch]:
        """Return what has been processed since the last time, all that is due included."""
        self.process()
        self._called = False
        finished, self._finished = self._finished, []
        return finished


class _ShardLogic(StatefulBatchLogic[_Part, None, bytes]):
    def __init__(self, worker: _Worker, snapshot: bytes | None) -> None:
        self._worker = worker
        self._shard = -1  # Bytewax does not tell a logic its key; the items do
        self._state = None if snapshot is None else worker.restored(snapshot)  # until then

    def on_batch(self, values: list[_Part]) -> tuple[list[None], bool]:
        if self._shard < 0:
            self._shard = values[0].shard
            self._worker.begin(self._shard, self._state)
            self._state = None
        return self._worker.collect(values), StatefulBatchLogic.RETAIN

    def snapshot(self) -> bytes:
        if self._state is not None:  # resumed, and no part has come: so it is when an input ends
            return self._state.snapshot()
        self._worker.process()
        return self._worker.states[self._shard].snapshot()


def _count_overlap(batch: EventBatch, layout: Layout, until: int) -> None:
    """Tell of events from before the end of the state given, which may hold them already."""
    asking = batch["source"] == layout.sources.index(layout.view.of)
    n = int((batch["event_time"][asking] < until).sum())
    if n:
        METRICS.before_state.labels(layout.view.name).inc(n)
        log.warning(
            "events are from before the end of the window state given; if it holds them, they "
            "count twice: begin the topics where the state ends",
            view=layout.view.name,
            events=n,
            until=until,
        )


def _warm_up(layout: Layout) -> None:
    """Compile the kernel, or load it from numba's cache, before the first event waits for it."""
    state = WindowState(layout, entities=1, entries=4)
    kinds = {k: v for event in layout.sources for k, v in column_kinds(event).items()}
    n = 8
    columns = {name: np.ones(n, DTYPES[kind]) for name, kind in kinds.items()}
    columns |= {"source": np.full(n, layout.rule().answered, np.uint8), "seq": np.arange(n)}
    state.update(EventBatch(columns))
    WindowState.restore(layout, state.snapshot())
