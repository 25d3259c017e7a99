"""Events → events with the windowed features of one key.

Bytewax keeps state by *virtual shard*, not by entity: a shard holds all entities whose keys hash
to it, so there are few keys to route, wake and snapshot, and rescaling moves whole shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import bytewax.operators as op
import numpy as np
import structlog
from bytewax.dataflow import Stream, operator
from bytewax.operators import KeyedStream, StatefulBatchLogic

from dataflows.metrics import METRICS
from features.batch import EventBatch, in_order
from features.declare import FeatureView
from features.events import DTYPES, Event, column_kinds
from features.state_dir import StateDir
from features.windows import Layout, WindowState, evaluate, shards_of

log = structlog.get_logger()

_Item = tuple[int, EventBatch]  # a shard and its rows
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

    woken = False

    def split(batches: list[EventBatch]) -> Iterable[tuple[str, _Item]]:
        nonlocal woken
        batch = in_order(batches)
        if batch is None:
            return
        if not woken:
            # Every shard takes its first state now, so that the first snapshot holds them all and
            # a later life never looks at `shards.start`, which may be gone or newer by then.
            woken = True
            for shard in range(shards.count):
                yield f"s{shard:03d}", (shard, batch.take(slice(0)))
        for shard, part in batch.split(shards_of(batch[view.key], shards.count)):
            yield f"s{shard:03d}", (shard, part)

    def merge(items: list[tuple[str, EventBatch]]) -> Iterable[EventBatch]:
        batch = in_order([part for _, part in items])
        if batch is not None:
            yield evaluate(layout, batch)

    def build(snapshot: bytes | None) -> _ShardLogic:
        return _ShardLogic(layout, shards.start, snapshot)

    sharded: KeyedStream[_Item] = op.flat_map_batch("split", up, split)
    answered = op.stateful_batch("state", sharded, build)
    return op.flat_map_batch("merge", answered, merge)


class _ShardLogic(StatefulBatchLogic[_Item, EventBatch, bytes]):
    def __init__(self, layout: Layout, start: StateDir | None, snapshot: bytes | None) -> None:
        self._layout = layout
        self._start = start
        self._state = None if snapshot is None else WindowState.restore(layout, snapshot)
        self._until = _NO_STATE
        self._late = METRICS.late_events.labels(layout.view.name, "yes")
        self._too_late = METRICS.late_events.labels(layout.view.name, "no")

    def on_batch(self, values: list[_Item]) -> tuple[list[EventBatch], bool]:
        state = self._state
        if state is None:  # Bytewax does not tell a new logic its key; the items do
            state = self._state = self._first_state(values[0][0])
        late, too_late = state.late, state.too_late
        batch = in_order([part for _, part in values])
        if batch is None:
            return [], StatefulBatchLogic.RETAIN
        if self._until != _NO_STATE:
            _count_overlap(batch, self._layout, self._until)
        answered = state.update(batch)
        self._too_late.inc(state.too_late - too_late)
        self._late.inc(state.late - late - (state.too_late - too_late))
        return [answered], StatefulBatchLogic.RETAIN

    def _first_state(self, shard: int) -> WindowState:
        snapshot = None
        if self._start is not None:
            snapshot = self._start.read(self._layout.view.name, shard)
            self._until = self._start.manifest.until
        if snapshot is None:
            return WindowState(self._layout)
        return WindowState.restore(self._layout, snapshot)

    def snapshot(self) -> bytes:
        assert self._state is not None, "a logic exists only once it has seen an event"
        return self._state.snapshot()


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
