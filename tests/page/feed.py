"""A made-up flow: scored batches, and the metrics of one that does 500 events/s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dataflows.page.recent import Recent
from dataflows.page.status import STAGES, Health, Samples, Status, status_of
from features.batch import EventBatch
from features.fraud import FRAUD

TOPICS = ("fraud_reports", "transactions")
VERSION = "7ea6cf0dcc58"
BEGAN_S = 1_700_000_000.0
#: Of the made-up flow.
RATE = 500
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


def recent(capacity: int = 500) -> Recent:
    return Recent(FRAUD.names, TOPICS, FRAUD.schema_hash, capacity, now_s=lambda: BEGAN_S + 1)


def scored(rows: Sequence[Mapping[str, Any]], first: int = 0) -> EventBatch:
    """Return a batch as the step `score` leaves it. What a row does not name is made up."""
    n = len(rows)
    number = np.arange(first, first + n)

    def column(name: str, made_up: Any, dtype: Any = None) -> Any:
        return np.array(
            [row.get(name, value) for row, value in zip(rows, made_up, strict=True)], dtype
        )

    texts = {
        name: np.array([text.encode() for text in column(name, made_up).tolist()], dtype="S")
        for name, made_up in {
            "transaction_id": [f"T{i:06d}" for i in number],
            "card_id": [f"C{i * 37 % 90:04d}" for i in number],
            "terminal_id": [f"M{i * 53 % 70:04d}" for i in number],
        }.items()
    }
    scores = column("score", 0.2 + 0.75 * (number * 29 % 100) / 100, float)
    decisions = column("decision", 1 + (scores > 0.6), np.int8)
    matrix = np.tile(np.arange(len(FRAUD.names)) * 1.25, (n, 1))
    matrix[:, 0] = (number * 7919 % 30_000) / 100
    matrix[:, -2] = scores
    for row, own in enumerate(rows):
        if "features" in own:
            matrix[row] = own["features"]
    risk, night, amount = (
        FRAUD.names.index(name) for name in ("terminal_risk_7d", "during_night", "amount")
    )
    reasons = column("reasons", [[risk, amount, night]] * n, np.int64)
    contributions = column(
        "contributions",
        [[s * 0.8, s * 0.1, -0.02] for s in scores.tolist()],
        float,
    )
    columns = {
        **texts,
        "event_time": column("event_time", 1_533_700_000_000 + number * 61_000, np.int64),
        "append_time": column("append_time", round(BEGAN_S * 1000) + number, np.int64),
        "source": column("source", [1] * n, np.uint8),
        "partition": column("partition", number % 4, np.int32),
        "offset": column("offset", number * 10, np.int64),
        "amount": column("amount", number * 7919 % 30_000, np.int64),
        "score": scores,
        "decision": decisions,
        "score_mode": column("score_mode", number % 23 // 21, np.uint8),
        "#features": matrix,
        "#reasons": reasons.reshape(n, -1),
        "#contributions": contributions.reshape(n, -1),
    }
    return EventBatch(columns)


def samples(n: int, **other: Any) -> Samples:
    """Return the metrics after `n` seconds; `other` replaces some, by name without its prefix."""
    read = RATE * n
    one: dict[str, Any] = {
        "model_info": [({"version": VERSION, "schema_hash": FRAUD.schema_hash}, 1)],
        "flow_info": [({"delivery": "exactly_once", "overload_policy": "degrade"}, 1)],
        "overload_level": [({}, 0)],
        "events_total": [
            ({"topic": topic, "outcome": outcome}, count)
            for topic, outcomes in {
                "transactions": {
                    "read": read - 5 * n,
                    "scored": read - 9 * n,
                    "dead_lettered": 2 * n,
                    "duplicate": n,
                    "shed": n,
                },
                "fraud_reports": {"read": 5 * n, "applied": 5 * n},
            }.items()
            for outcome, count in outcomes.items()
        ],
        "dead_letters_total": [
            ({"topic": "transactions", "reason": "malformed_json"}, n),
            ({"topic": "transactions", "reason": "event_time_in_future"}, n),
        ],
        "decisions_total": [
            ({"decision": "approve"}, read - 9 * n - n),
            ({"decision": "review"}, n * 3 // 4),
            ({"decision": "block"}, n - n * 3 // 4),
        ],
        "predictions_total": [
            ({"score_mode": "full"}, read - 9 * n - 40),
            ({"score_mode": "cached"}, 30),  # before the first reading
            ({"score_mode": "rule"}, 10),
        ],
        "end_to_end_latency_seconds_bucket": [
            ({"le": f"{bound:g}"}, latency_below(bound, read)) for bound in (*BOUNDS, np.inf)
        ],
        "record_age_seconds": [({}, 0.004)],
        "lag_records": [
            ({"topic": "transactions", "partition": str(p)}, 30 + 7 * p + 11 * (n % 5))
            for p in range(4)
        ],
        "lag_seconds": [
            ({"topic": "transactions", "partition": str(p)}, 0.05 * p) for p in range(4)
        ],
        "retention_headroom_seconds": [
            ({"topic": "transactions", "partition": str(p)}, 500_000.0) for p in range(4)
        ],
        "stage_seconds_sum": [
            ({"stage": stage}, read * cost * 1e-6)
            for stage, cost in zip(STAGES, (1.1, 1.6, 1.9, 0.4, 4.2, 1.2, 2.1, 0.6), strict=True)
        ],
        "stage_seconds_count": [({"stage": stage}, 40 * n) for stage in STAGES],
        "batch_events_count": [({}, 40 * n)],
        "batch_events_sum": [({}, read)],
        "worker_busy_seconds_total": [({}, 0.37 * n)],
        "throttled_seconds_total": [({}, 0.0)],
        "brokers_reachable": [({}, 1)],
        "last_epoch_timestamp_seconds": [({}, BEGAN_S + n - n % 10)],
        "epoch_seconds_count": [({}, n / 10)],
        "epoch_seconds_sum": [({}, n)],
        "recovery_store_bytes": [({}, 48_300_000)],
        "recovery_volume_free_bytes": [({}, 63e9)],
        "recovery_volume_bytes": [({}, 100e9)],
        "store_breaker_open": [({"view": "customer_profile"}, 0)],
        "last_record_timestamp_seconds": [
            ({"topic": "transactions"}, BEGAN_S + n - 0.2),
            ({"topic": "fraud_reports"}, BEGAN_S + n - 1),
        ],
    }
    return {
        "process_start_time_seconds": [({}, BEGAN_S)],
        "process_resident_memory_bytes": [({}, 412e6)],
        **{f"scoring_{name}": found for name, found in (one | other).items()},
    }


def latency_below(bound: float, events: int) -> int:
    """Return how many of the events took so long at most: from 2 to 22 ms, evenly."""
    return round(events * min(max((bound - 0.002) / 0.020, 0.0), 1.0))


class Feed:
    """A second passes with every look."""

    def __init__(self, capacity: int = 500) -> None:
        self.seconds = 0
        self.other: dict[str, Any] = {}
        self.checks = [Health("epoch", True, "the last epoch ended 3 s ago")]
        self.recent = recent(capacity)
        self._flagged = self._born = 0

    def status(self) -> Status:
        self.seconds += 1
        started: Samples = {"process_start_time_seconds": [({}, BEGAN_S + self._born)]}
        found = {**samples(self.seconds - self._born, **self.other), **started}
        return status_of(found, BEGAN_S + self.seconds, checks=self.checks)

    def restart(self) -> None:
        """Begin to count anew, in a new process; its page is another one, too."""
        self._born = self.seconds
        self.recent, self._flagged = recent(self.recent.capacity), 0

    def flag(self, *rows: Mapping[str, Any]) -> None:
        """Flag transactions."""
        self.recent.add(scored(rows, self._flagged), VERSION)
        self._flagged += len(rows)
