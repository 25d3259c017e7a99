"""Events with features → events with a score, a decision and, for flagged ones, reasons."""

from __future__ import annotations

from collections.abc import Iterable

import bytewax.operators as op
import numpy as np
from bytewax.dataflow import Stream, operator

from dataflows.measure import measured
from dataflows.metrics import METRICS
from dataflows.steps.short_answer import LastScores
from features.batch import EventBatch
from features.declare import FeatureSet
from model.package import Thresholds
from model.scorer import Scorer


@operator
def score(
    step_id: str,
    up: Stream[EventBatch],
    features: FeatureSet,
    scorer: Scorer,
    thresholds: Thresholds,
    reasons: int,
    last: LastScores | None = None,
) -> Stream[EventBatch]:
    """Score each batch with the model, in process.

    Adds ``score`` (float64 probability of fraud), ``decision`` (position in DECISIONS),
    ``#features`` (rows × features, model order) and, for rows not approved, ``#reasons`` and
    ``#contributions`` (rows × `reasons`; feature −1 where there is none, as for a score of NaN).
    `last` keeps each card's score.
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
            METRICS.score.observe(scores)
            missing = np.isnan(matrix)
            if missing.any():
                for feature, n in zip(features.names, missing.sum(axis=0).tolist(), strict=True):
                    METRICS.features_missing.labels(feature).inc(n)
            if last is not None:
                last.put(batch["card_id"], scores)
            yield batch.with_columns(
                {
                    "score": scores,
                    "decision": decisions,
                    "#features": matrix,
                    "#reasons": why,
                    "#contributions": contributions,
                }
            )

    return op.flat_map_batch("score", up, measured("score", run))
