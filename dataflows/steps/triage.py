"""Events that ask for an answer → those scored in full, and those that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import bytewax.operators as op
from bytewax.dataflow import Stream, operator

from dataflows.overload import Overload, Way
from dataflows.steps.short_answer import LastScores
from features.batch import Column, EventBatch
from features.keys import shards_of

_DRAWS = 1 << 16


@dataclass(frozen=True)
class Shedding:
    """What becomes of events when there are too many.

    Attributes:
        overload: says which are scored in full.
        critical: marks those that always are, bool [n].
        last: the last score of each card.
    """

    overload: Overload
    critical: Callable[[EventBatch], Column]
    last: LastScores


@dataclass(frozen=True)
class Triaged:
    """Streams returned from `triage`."""

    full: Stream[EventBatch]
    short: Stream[EventBatch]


@operator
def triage(
    step_id: str,
    up: Stream[EventBatch],
    shedding: Shedding,
) -> Triaged:
    """Send each event the way that the overload control says, unless it is critical.

    Events on the short way carry ``way`` (uint8, a `dataflows.overload.Way`). The windows have seen
    them all. A batch keeps its order on each way.
    """

    overload = shedding.overload

    def split(batches: list[EventBatch]) -> Iterable[EventBatch]:
        for batch in batches:
            draws = shards_of(batch["transaction_id"], _DRAWS)
            ways = overload.ways(batch["append_time"], shedding.critical(batch), draws)
            if ways is None:
                yield batch
                continue
            full = ways == Way.FULL
            if full.any():
                yield batch.take(full)
            yield batch.with_columns({"way": ways}).take(~full)

    branches = op.branch(
        "full", op.flat_map_batch("split", up, split), lambda batch: "way" not in batch
    )
    return Triaged(branches.trues, branches.falses)
