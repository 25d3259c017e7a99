"""Events → events that did not come before: what a producer sent twice is dropped and counted.

It stands before the windows, so a duplicate neither moves one nor is answered a second time. The
rule, and how far it holds, are in ``features/seen.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import bytewax.operators as op
import numpy as np
import structlog
from bytewax.dataflow import Stream, operator
from bytewax.operators import KeyedStream, StatefulBatchLogic

from dataflows.metrics import METRICS
from features.batch import EventBatch, in_order
from features.events import Event
from features.keys import shards_of
from features.seen import FINGERPRINT, SeenIds, fingerprints, identities

log = structlog.get_logger()

_WARN_EVERY_S = 60


@dataclass(frozen=True)
class Dedupe:
    """How far apart duplicates may be (ms of broker time), and how many ids are held at most."""

    horizon_ms: int
    #: Over all shards, each of which holds its share.
    max_ids: int


@operator
def distinct(
    step_id: str,
    up: Stream[EventBatch],
    key: str,
    sources: Sequence[type[Event]],
    topics: Sequence[str],
    dedupe: Dedupe,
    shards: int,
    now_s: Callable[[], float] = time.monotonic,
) -> Stream[EventBatch]:
    """Drop events whose type, business id and time say that they came before.

    `sources` are the event types by source code, each with an ``identity``, and `topics` their
    topics. Ids are kept by virtual shard of the column `key`; their number is fixed for the life
    of the state. Give it the key of the next step: in a cluster, events of one key then take one
    way through both, and none overtakes another. The same id under two keys may pass. Events
    without the key are spread by their id.
    """
    identities(sources)  # a type without one is refused now
    bound = _Bound(dedupe, now_s)
    # Compile the kernel, or load it from numba's cache, before the first event waits for it.
    _new(dedupe, shards).fresh(np.zeros(0, FINGERPRINT), np.zeros(0, np.int64))

    def split(batches: list[EventBatch]) -> Iterable[tuple[str, EventBatch]]:
        batch = in_order(batches)
        if batch is None:
            return
        ids = fingerprints(batch, sources)
        # Who has no such key takes the way of its id: there is nobody not to overtake.
        keyless = batch[key] == b""
        spread = ids["rest"].astype(np.int64) % shards
        shard_of = np.where(keyless, spread, shards_of(batch[key], shards))
        for shard, part in batch.with_columns({"#id": ids}).split(shard_of):
            yield f"s{shard:03d}", part

    def merge(items: list[tuple[str, EventBatch]]) -> Iterable[EventBatch]:
        batch = in_order([part for _, part in items])
        if batch is not None:
            yield batch

    def build(snapshot: bytes | None) -> _ShardLogic:
        return _ShardLogic(_new(dedupe, shards, snapshot), topics, bound)

    sharded: KeyedStream[EventBatch] = op.flat_map_batch("split", up, split)
    judged = op.stateful_batch("state", sharded, build)
    return op.flat_map_batch("merge", judged, merge)


class _ShardLogic(StatefulBatchLogic[EventBatch, EventBatch, bytes]):
    def __init__(self, seen: SeenIds, topics: Sequence[str], bound: _Bound) -> None:
        self._seen = seen
        self._topics = topics
        self._bound = bound
        self._forgotten = 0

    def on_batch(self, values: list[EventBatch]) -> tuple[list[EventBatch], bool]:
        batch = in_order(values)
        if batch is None:
            return [], StatefulBatchLogic.RETAIN
        ids = batch["#id"]
        batch = EventBatch({name: batch[name] for name in batch if name != "#id"})
        fresh = self._seen.fresh(ids, batch["append_time"])
        self._bound.forgot(self._seen.forgotten - self._forgotten)
        self._forgotten = self._seen.forgotten
        if fresh.all():
            return [batch], StatefulBatchLogic.RETAIN
        again = np.bincount(batch["source"][~fresh], minlength=len(self._topics)).tolist()
        for topic, n in zip(self._topics, again, strict=True):
            METRICS.count(topic, "duplicate", n)
        return [batch.take(fresh)], StatefulBatchLogic.RETAIN

    def snapshot(self) -> bytes:
        seen = self._seen.snapshot()
        METRICS.given_bytes += len(seen)
        return seen


class _Bound:
    """Counts ids that all shards forgot for the bound, and says so, once a minute at most."""

    def __init__(self, dedupe: Dedupe, now_s: Callable[[], float]) -> None:
        self._dedupe = dedupe
        self._now_s = now_s
        self._quiet_until = -np.inf
        self._untold = 0

    def forgot(self, n: int) -> None:
        if n == 0:
            return
        METRICS.dedupe_forgotten.inc(n)
        self._untold += n
        now = self._now_s()
        if now < self._quiet_until:
            return
        log.warning(
            "the dedupe horizon is not held, later duplicates pass: more ids come within it than "
            "are kept; raise DEDUPE_MAX_IDS (36 bytes of memory and 24 of every snapshot each) or "
            "lower DEDUPE_HORIZON_S",
            forgotten=self._untold,
            max_ids=self._dedupe.max_ids,
            horizon_s=self._dedupe.horizon_ms / 1000,
        )
        self._untold = 0
        self._quiet_until = now + _WARN_EVERY_S


def _new(dedupe: Dedupe, shards: int, snapshot: bytes | None = None) -> SeenIds:
    most = max(1, dedupe.max_ids // shards)
    if snapshot is None:
        return SeenIds(horizon_ms=dedupe.horizon_ms, most=most, shards=shards)
    return SeenIds.restore(snapshot, horizon_ms=dedupe.horizon_ms, most=most, shards=shards)
