"""Events → events with the windowed features of one key.

Bytewax keeps state by *virtual shard*, not by entity: a shard holds all entities whose keys hash
to it, so there are few keys to route, wake and snapshot, and rescaling moves whole shards.

It writes, at every snapshot, the whole state of the keys that got an item in the epoch. With one
worker, all rows of an epoch go to one key, a page of the journal, and a shard's key gets an item
only when its turn has come to be written (features/journal.py). In a cluster, a page's key could
belong to another worker than the shards of its rows, so there every shard's rows go to its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from threading import get_ident
from time import perf_counter
from typing import Any, NamedTuple

import bytewax.operators as op
import numpy as np
import structlog
from bytewax.dataflow import Stream, operator
from bytewax.operators import KeyedStream, StatefulBatchLogic

from dataflows import measure
from dataflows.metrics import METRICS
from features.batch import EventBatch, in_order
from features.declare import FeatureView
from features.events import DTYPES, Event, column_kinds
from features.journal import (
    SEED,
    Base,
    Journal,
    Page,
    Stored,
    in_turn,
    page_key,
    resume,
    shard_key,
)
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
_ALL = -1  # shards


@dataclass(frozen=True)
class Shards:
    """How window state is kept.

    Attributes:
        count: virtual shards.
        start: where a shard without a snapshot starts from; None: empty.
        journal: whether snapshots write a journal of rows and some shards, instead of all shards
            that had any. Needs a recovery store, one worker, and a source that does not go on
            before a snapshot is taken.
        stored: of views that are resumed, how far what is stored goes, by name. To be filled in
            before the flow runs.
    """

    count: int
    start: StateDir | None = None
    journal: bool = False
    stored: dict[str, Stored] = field(default_factory=dict)


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
    # By thread. Not `threading.local`: the engine's threads are not Python's, and what is local to
    # them is gone at the next call.
    workers: dict[int, _Worker] = {}

    def worker() -> _Worker:
        found = workers.get(get_ident())
        if found is None:
            found = workers[get_ident()] = _Worker(layout, shards)
        return found

    def split(batches: list[EventBatch]) -> Iterable[tuple[str, _Part]]:
        batch = in_order(batches)
        return () if batch is None else worker().parts(batch)

    def merge(_: list[tuple[str, None]]) -> Iterable[EventBatch]:
        return worker().finished()

    def build(stored: Base | Page | None) -> _KeyLogic:
        return _KeyLogic(worker(), stored)

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
    """The rows of one shard in a batch, or of all, which the parts of one worker share: nothing is
    copied unless it goes to another process."""

    __slots__ = ("shard", "whole")

    def __init__(self, whole: _Grouped, shard: int) -> None:
        self.whole = whole
        self.shard = shard

    def __len__(self) -> int:
        if self.shard == _ALL:
            return len(self.whole.batch)
        bounds = self.whole.bounds
        return bounds[self.shard + 1] - bounds[self.shard]

    @property
    def rows(self) -> Int:
        """Row numbers; not of all."""
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

    def __init__(self, layout: Layout, shards: Shards) -> None:
        self.states = WindowShards(layout)
        self._layout = layout
        self._shards = shards
        self._begun: set[int] = set()
        self._until = _NO_STATE
        self._due: list[_Part] = []
        self._finished: list[EventBatch] = []
        # Whether `merge` will be called for what is due. It comes before the next epoch's rows do:
        # the source waits until an epoch is durable (dataflows/kafka/source.py, rule 1).
        self._called = False
        self._late = METRICS.late_events.labels(layout.view.name, "yes")
        self._took = measure.clock(layout.view.name)
        self._too_late = METRICS.late_events.labels(layout.view.name, "no")
        # What is stored, until it is resumed: when the first rows come, or the input ends.
        self._bases: list[Base] | None = []
        self._pages: list[Page] = []
        self._journal = Journal(layout)
        # The engine may split rows before it has loaded what is stored.
        nothing = Stored(SEED, [SEED] * shards.count)
        self._expected = shards.stored.get(layout.view.name, nothing)
        # This epoch's page; without a journal all that matters is that rows are no seed.
        self._page = self._expected.last if shards.journal else max(self._expected.last, 1)
        self._as_of = list(self._expected.as_of)
        self._base_bytes = [0] * shards.count
        self._rows = 0  # of the last page
        self._begins = layout.view.name not in shards.stored  # until all shards are awake
        self._epoch_over = True  # its snapshot has been taken
        self._all_bases = True  # whether all shards are written at its end, and no rows

    def parts(self, batch: EventBatch) -> Iterable[tuple[str, _Part]]:
        """Return a batch's rows by key, and what wakes the keys that are to be written."""
        view, shards = self._layout.view, self._shards
        whole = _Grouped.of(batch, view.key, shards.count)
        woken = self._wake()
        if woken:
            nobody = _Grouped.of(batch.take(slice(0)), view.key, shards.count)
            for shard in woken:
                yield shard_key(shard), _Part(nobody, shard)
        if shards.journal:
            yield page_key(self._page), _Part(whole, _ALL)
            return
        for shard, (start, end) in enumerate(pairwise(whole.bounds)):
            if start < end:
                yield shard_key(shard), _Part(whole, shard)

    def _wake(self) -> Sequence[int]:
        """Return the shards that are to be written at this epoch's end, if rows do not wake them.

        Where nothing is stored, all: a later life then never looks at the state that new shards
        start from, which may be gone or newer by then. Later, with a journal, those whose turn it
        is; or all, when the rows have become more than the state.
        """
        everything = range(self._shards.count)
        if self._epoch_over:
            self._epoch_over = False
            self._all_bases, self._begins = self._begins, False
            if self._shards.journal:
                self._page += 1
                if not self._all_bases:
                    return in_turn(self._as_of, self._rows)
            return everything if self._all_bases else ()
        outweighs = self._journal.nbytes // 2 > sum(self._base_bytes)
        if self._shards.journal and not self._all_bases and outweighs:
            self._all_bases = True
            return everything
        return ()

    def remember(self, stored: Base | Page) -> int:
        """Note what is stored under a key until it is needed; return its shard, or `_ALL`."""
        assert self._bases is not None, "the engine loads all keys before it calls any"
        if stored[0] == "page":
            self._pages.append(stored)
            return _ALL
        self._bases.append(stored)
        return stored[1]

    def resume(self) -> None:
        """Restore what is stored, if that was not done."""
        if self._bases is None:
            return
        if self._pages and not self._shards.journal:
            raise RuntimeError("a journal is stored, and this flow keeps none: fold it first")
        last = resume(self.states, self._bases, self._pages)
        if self._shards.journal and last != self._expected.last:
            raise RuntimeError(
                f"the journal of view {self._layout.view.name!r} was to end with page "
                f"{self._expected.last}, but ends with {last}"
            )
        for _, shard, as_of, data in self._bases:
            self._begun.add(shard)
            self._base_bytes[shard] = len(data)
            if as_of == SEED and self._shards.start is not None:
                self._until = self._shards.start.manifest.until
        self._bases, self._pages = None, []

    def begin(self, shard: int) -> None:
        """Begin a shard where new ones start, unless it was stored, or begun before."""
        self.resume()
        if shard in self._begun or shard == _ALL:
            return
        self._begun.add(shard)
        if self._shards.start is not None:
            self._until = self._shards.start.manifest.until
            snapshot = self._shards.start.read(self._layout.view.name, shard)
            if snapshot is not None:
                self.states[shard] = WindowState.restore(self._layout, snapshot)

    def collect(self, parts: list[_Part]) -> list[None]:
        """Note what is due; return what calls `merge`."""
        if self._shards.journal:
            if self._epoch_over:
                raise RuntimeError("rows of an epoch came before the last one's snapshot was taken")
            if not self._all_bases:
                for part in parts:
                    if part.shard == _ALL:
                        self._journal.add(part.whole.batch)
        self._due += parts
        if self._called:
            return []
        self._called = True
        return [None]

    def base(self, shard: int) -> Base:
        """Return what to store of a shard."""
        self.resume()
        self.process()
        self._epoch_over = True
        data = self.states[shard].snapshot()
        self._base_bytes[shard], self._as_of[shard] = len(data), self._page
        METRICS.given_bytes += len(data)
        return ("base", shard, self._page, data)

    def page(self) -> Page:
        """Return what to store of the journal."""
        self.resume()
        self._epoch_over = True
        self._rows = len(self._journal)
        if self._all_bases:
            self._journal.clear()
            return ("page", self._page, b"")
        rows = self._journal.page(self._page)
        METRICS.given_bytes += len(rows)
        return ("page", self._page, rows)

    def end(self) -> None:
        """Note that the input has ended: every key is written once more."""
        self._all_bases = True

    def process(self) -> None:
        """Process what is due."""
        due, self._due = self._due, []
        began = perf_counter()
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
        finished = evaluate(self._layout, batch)
        self._finished.append(finished)
        self._took(perf_counter() - began, [finished])

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


class _KeyLogic(StatefulBatchLogic[_Part, None, Base | Page]):
    """A shard, or a page of the journal."""

    def __init__(self, worker: _Worker, stored: Base | Page | None) -> None:
        self._worker = worker
        # Bytewax does not tell a logic its key; what is stored, or else the items, do.
        self._shard = None if stored is None else worker.remember(stored)

    def on_batch(self, values: list[_Part]) -> tuple[list[None], bool]:
        if self._shard is None:
            self._shard = values[0].shard
        self._worker.begin(self._shard)
        return self._worker.collect(values), StatefulBatchLogic.RETAIN

    def on_eof(self) -> tuple[list[None], bool]:
        self._worker.end()
        return [], StatefulBatchLogic.RETAIN

    def snapshot(self) -> Base | Page:
        assert self._shard is not None
        if self._shard == _ALL:
            return self._worker.page()
        return self._worker.base(self._shard)


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
