"""Events → events with what Feast knows of their entities as of last midnight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import bytewax.operators as op
import numpy as np
import structlog
from bytewax.dataflow import Stream, operator

from dataflows.metrics import METRICS
from features.batch import Column, EventBatch
from features.online_store import OnlineStore, StoreUnavailable
from features.profiles import ProfileView

log = structlog.get_logger()


@operator
def lookup(
    step_id: str,
    up: Stream[EventBatch],
    store: OnlineStore,
    views: Sequence[ProfileView],
) -> Stream[EventBatch]:
    """Add each view's fields (NaN if missing or older than its TTL) and ``<view>__age_ms``.

    A store that fails does not stop the flow: what the cache holds is used, however old, and the
    failure is counted.
    """

    def run(batches: list[EventBatch]) -> Iterable[EventBatch]:
        for batch in batches:
            for view in views:
                batch = batch.with_columns(_profile(store, view, batch))
            yield batch

    return op.flat_map_batch("read", up, run)


def _profile(store: OnlineStore, view: ProfileView, batch: EventBatch) -> dict[str, Column]:
    keys, times = batch[view.key], batch["event_time"]
    try:
        values, age_ms = store.lookup(view, keys, times)
    except StoreUnavailable as error:
        METRICS.store_failures.labels(view.name).inc()
        log.warning(
            "online store unavailable, using the cache alone", view=view.name, why=str(error)
        )
        values, age_ms = store.lookup(view, keys, times, read=False)
    missing = int(np.isnan(values).all(axis=1).sum())
    METRICS.profiles_missing.labels(view.name).inc(missing)
    columns = {name: values[:, i] for i, name in enumerate(view.columns)}
    return {**columns, f"{view.name}__age_ms": age_ms}
