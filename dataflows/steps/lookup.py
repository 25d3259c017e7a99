"""Events → events with what Feast knows of their entities as of last midnight."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import bytewax.operators as op
import numpy as np
import structlog
from bytewax.dataflow import Stream, operator

from dataflows.measure import measured
from dataflows.metrics import METRICS
from features.batch import Column, EventBatch
from features.guarded_reads import GuardedReads, Profiles, Served
from features.profiles import ProfileView

log = structlog.get_logger()

#: How often, at most, a view's store is complained about (s).
COMPLAIN_S = 10.0
_RESULTS = ("fresh", "stale", "missing")


@operator
def lookup(
    step_id: str,
    up: Stream[EventBatch],
    store: GuardedReads,
    views: Sequence[ProfileView],
    now_s: Callable[[], float] = time.monotonic,
) -> Stream[EventBatch]:
    """Add each view's fields (NaN if missing or older than its TTL), their age and provenance.

    ``<view>__age_ms`` is float64, NaN where no row is known; ``<view>__served`` is uint8, one of
    `Served`: 0 fresh, 1 stale, 2 missing, 3 unavailable; odd where the store did not answer. It
    never stops the flow, nor holds a batch up for longer than the store's budget.
    """
    complaints = {view.name: _Complaints(view.name, now_s) for view in views}

    for view in views:
        for result in _RESULTS:  # exported as 0 from the start
            METRICS.profile_lookups.labels(view.name, result)

    def run(batches: list[EventBatch]) -> Iterable[EventBatch]:
        for batch in batches:
            asked = [(view, batch[view.key]) for view in views]
            columns: dict[str, Column] = {}
            for view, found in zip(views, store.lookup(asked, batch["event_time"]), strict=True):
                columns |= {name: found.values[:, i] for i, name in enumerate(view.columns)}
                columns[f"{view.name}__age_ms"] = found.age_ms
                columns[f"{view.name}__served"] = found.served
                is_open = store.is_open(view)
                _count(view, found, is_open)
                complaints[view.name].hear(found, is_open)
            yield batch.with_columns(columns)

    return op.flat_map_batch("read", up, measured("profiles", run))


def _count(view: ProfileView, found: Profiles, is_open: bool) -> None:
    fresh, stale, missing, unavailable = np.bincount(found.served, minlength=len(Served)).tolist()
    for result, n in zip(_RESULTS, (fresh, stale, missing + unavailable), strict=True):
        if n:
            METRICS.profile_lookups.labels(view.name, result).inc(n)
    METRICS.breaker_open.labels(view.name).set(is_open)
    if found.read is not None:
        METRICS.store_reads.labels(view.name, found.read).inc()
    if fresh or stale:
        used = found.age_ms[found.served < Served.MISSING]
        METRICS.profile_age.labels(view.name).set(float(used.mean()) / 1000)


class _Complaints:
    """Log that a view's store does not answer, at most every COMPLAIN_S, and once that it does."""

    def __init__(self, view: str, now_s: Callable[[], float]) -> None:
        self._view = view
        self._now_s = now_s
        self._said = -np.inf
        #: Since when the store has been out, of what was complained about.
        self._since: float | None = None
        self._events = 0

    def hear(self, found: Profiles, is_open: bool) -> None:
        """Take note of how one batch was served."""
        if found.read is None:
            return
        if found.read != "ok":
            now = self._now_s()
            self._events += int(np.count_nonzero(found.served & 1))
            if now - self._said >= COMPLAIN_S:
                self._said = now
                self._since = now if self._since is None else self._since
                log.warning(
                    "online store does not answer in time: profiles from the cache, or none",
                    view=self._view,
                    read=found.read,
                    why=found.why,
                    events=self._events,
                )
                self._events = 0
        elif self._since is not None and not is_open:
            log.info(
                "online store answers again",
                view=self._view,
                after_s=round(self._now_s() - self._since, 1),
                events=self._events,
            )
            self._since, self._events = None, 0
