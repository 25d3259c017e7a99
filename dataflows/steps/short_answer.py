"""Events that are not scored in full → the card's last score, what a rule says, or no answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import bytewax.operators as op
import numpy as np
from bytewax.dataflow import Stream, operator

from dataflows.overload import Way
from dataflows.steps.encode import SCORE_MODES
from features.batch import Column, EventBatch
from features.column_cache import ColumnCache
from model.package import Thresholds

_CACHED, _RULE, _SHED = map(SCORE_MODES.index, ("cached", "rule", "shed"))


class LastScores:
    """The last score of each card that was scored in full, for some time; not part of a snapshot.

    One per worker, on its thread.
    """

    def __init__(
        self, cards: int, ttl_s: float, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._cache = ColumnCache(1, cards, ttl_s)
        self._now_s = now_s

    def put(self, cards: Column, scores: Column) -> None:
        """Keep the scores (float64 [n], in order of arrival; NaN is none) of cards (S [n])."""
        known = np.flatnonzero(~np.isnan(scores))
        scores = scores[known]
        self._cache.put(cards[known], scores[:, None], scores, self._now_s())

    def get(self, cards: Column) -> Column:
        """Return each card's last score, float64 [n]; NaN where there is none."""
        return self._cache.fetch(cards, self._now_s())[0][:, 0]


@operator
def short_answer(
    step_id: str,
    up: Stream[EventBatch],
    last: LastScores,
    thresholds: Thresholds,
    suspicious: Callable[[EventBatch], Column],
) -> Stream[EventBatch]:
    """Answer without look-up and model, by each event's ``way``.

    Adds ``score`` (float64, the card's last; NaN if there is none), ``decision`` (by that score, or
    else: review where `suspicious` says so; −1 for what is shed) and ``score_mode`` (position in
    `SCORE_MODES`).
    """

    def run(batches: list[EventBatch]) -> Iterable[EventBatch]:
        for batch in batches:
            shed = batch["way"] > Way.REDUCED
            scores = last.get(batch["card_id"])
            scores[shed] = np.nan
            unknown = np.isnan(scores)
            decisions = np.where(unknown, suspicious(batch), thresholds.decide(scores))
            decisions[shed] = -1
            modes = np.where(shed, _SHED, np.where(unknown, _RULE, _CACHED))
            yield batch.with_columns(
                {
                    "score": scores,
                    "decision": decisions.astype(np.int8),
                    "score_mode": modes.astype(np.uint8),
                }
            )

    return op.flat_map_batch("answer", up, run)
