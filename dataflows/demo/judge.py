"""What the demo's scores are worth: against the labels, and against the offline half."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataflows.demo.observe import Truth

ENDS = ("scored", "dead_lettered", "duplicate", "shed")


def truth(handbook: Path, start: int) -> Truth:
    """Read what the simulator knows of the transactions from `start` (ms) on."""
    table = pq.read_table(
        handbook / "transactions.parquet",
        columns=["transaction_id", "label", "amount_cents"],
        filters=pc.field("event_time") >= start,
    )
    ids = np.asarray(table["transaction_id"].to_numpy(), dtype="S")
    return Truth(ids, table["label"].to_numpy(), table["amount_cents"].to_numpy())


def score_offline(
    handbook: Path, state: Path, model: Path, start: int, last: int
) -> Iterable[tuple[Any, Any]]:
    """Score the transactions with event times in [start, last], ms, by replaying offline.

    Yields ids (bytes array) and scores (float64), chunk by chunk.
    """
    from dataflows.demo.replay import events
    from features.fraud import FRAUD, SOURCES
    from features.offline import Replay
    from features.state_dir import StateDir
    from features.windows import SHARDS
    from model.scorer import Scorer

    replay = Replay(FRAUD, SOURCES, start=StateDir(state, FRAUD, SHARDS))
    scorer = Scorer.load(model, names=FRAUD.names, schema_hash=FRAUD.schema_hash)
    for batch in events(handbook, start, until=last + 1):
        answered = replay(batch)
        yield answered["transaction_id"], scorer.score(FRAUD.matrix(answered))


def compare(
    online: Mapping[str, float | None], offline: Iterable[tuple[Any, Any]], truth: Truth
) -> dict[str, Any]:
    """Return the average precision of the same transactions' scores, online and offline.

    Both are None when none of them is fraud.
    """
    from sklearn.metrics import average_precision_score  # seconds to import

    scored = {key.encode(): value for key, value in online.items() if value is not None}
    here: list[float] = []
    there: list[float] = []
    ids: list[bytes] = []
    for chunk_ids, scores in offline:
        for key, score in zip(chunk_ids.tolist(), scores.tolist(), strict=True):
            if key in scored:
                ids.append(key)
                here.append(scored[key])
                there.append(score)
    fraud = truth.frauds(np.array(ids, "S")) if ids else np.zeros(0, np.bool_)

    def precision(scores: list[float]) -> float | None:
        return round(float(average_precision_score(fraud, scores)), 6) if fraud.any() else None

    return {
        "average_precision_online": precision(here),
        "average_precision_offline": precision(there),
        "transactions_compared": len(ids),
        "scores_different": sum(a != b for a, b in zip(here, there, strict=True)),
        "frauds": int(fraud.sum()),
    }


def imbalance(account: Mapping[str, int]) -> str | None:
    """Say by how much read ≠ scored + dead-lettered + duplicate + shed; None if they are equal.

    >>> imbalance({"read": 3, "scored": 2, "dead_lettered": 1, "duplicate": 0, "shed": 0})
    >>> imbalance({"read": 3, "scored": 2, "dead_lettered": 0, "duplicate": 0, "shed": 0})
    '3 read ≠ 2 scored + 0 dead_lettered + 0 duplicate + 0 shed'
    """
    if account["read"] == sum(account[end] for end in ENDS):
        return None
    return f"{account['read']} read ≠ " + " + ".join(f"{account[end]} {end}" for end in ENDS)
