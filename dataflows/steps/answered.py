"""Only the events that ask for an answer go on; news has done its work in the windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import bytewax.operators as op
import numpy as np
from bytewax.dataflow import Stream, operator

from dataflows.metrics import METRICS
from features.batch import Column, EventBatch
from features.declare import FeatureSet
from features.events import Event


@operator
def answered(
    step_id: str,
    up: Stream[EventBatch],
    features: FeatureSet,
    sources: Sequence[type[Event]],
    topics: Sequence[str],
) -> Stream[EventBatch]:
    """Pass events of the feature set's own type; the others are counted as applied.

    What an earlier life has answered (column ``known``, if there is one) is counted as rebuilt.
    """
    code = sources.index(features.of)

    def run(batches: list[EventBatch]) -> Iterable[EventBatch]:
        for batch in batches:
            if "known" in batch:
                count_rebuilt(batch["source"][batch["known"]], topics)
                batch = batch.take(~batch["known"])
            counts = np.bincount(batch["source"], minlength=len(sources))
            for other, topic in enumerate(topics):
                if other != code:
                    METRICS.count(topic, "applied", int(counts[other]))
            if counts[code] == len(batch):
                yield batch
            elif counts[code]:
                yield batch.take(batch["source"] == code)

    return op.flat_map_batch("select", up, run)


def count_rebuilt(source: Column, topics: Sequence[str]) -> None:
    """Count events, by their source codes, that have done nothing but move the windows again."""
    for topic, n in zip(topics, np.bincount(source, minlength=len(topics)).tolist(), strict=True):
        METRICS.count(topic, "rebuilt", n)
