"""Events with features → events with a score, a decision and, for flagged ones, reasons."""

from __future__ import annotations

from collections.abc import Iterable

import bytewax.operators as op
import numpy as np
from bytewax.dataflow import Stream, operator

from dataflows.metrics import METRICS
from features.batch import EventBatch
from features.declare import FeatureSet
from model.package import DECISIONS, Thresholds
from model.scorer import Scorer


@operator
def score(
    step_id: str,
    up: Stream[EventBatch],
    features: FeatureSet,
    scorer: Scorer,
    thresholds: Thresholds,
    reasons: int,
) -> Stream[EventBatch]:
    """Score each batch with the model, in process.

    Adds ``score`` (float64 probability of fraud), ``decision`` (position in DECISIONS),
    ``#features`` (rows × features, model order) and, for rows not approved, ``#reasons`` and
    ``#contributions`` (rows × `reasons`; feature −1 where there is none, as for a score of NaN).
    """

    def run(batches: list[EventBatch]) -> Iterable[EventBatch]:
        for batch in batches:
            matrix = features.matrix(batch)
            scores = scorer.score(matrix)
            decisions = thresholds.decide(scores)
            why = np.full((len(batch), reasons), -1, np.int64)
            contributions = np.zeros((len(batch), reasons))
            flagged = np.flatnonzero((decisions > 0) & ~np.isnan(scores))
            if reasons and len(flagged):
                why[flagged], contributions[flagged] = scorer.explain(matrix[flagged], reasons)
            for decision, n in enumerate(np.bincount(decisions, minlength=len(DECISIONS)).tolist()):
                METRICS.decisions.labels(DECISIONS[decision]).inc(n)
            yield batch.with_columns(
                {
                    "score": scores,
                    "decision": decisions,
                    "#features": matrix,
                    "#reasons": why,
                    "#contributions": contributions,
                }
            )

    return op.flat_map_batch("score", up, run)
