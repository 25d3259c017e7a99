"""What is not scored in full: sent the right way, answered in short, or shed with a reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import bytewax.operators as op
import numpy as np
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink, TestingSource, run_main

from dataflows.kafka.records import OutRecords
from dataflows.kafka.writer import Delivery
from dataflows.overload import Overload, Policy, Way
from dataflows.steps.encode import SCORE_MODES, Prediction, encode
from dataflows.steps.short_answer import LastScores, short_answer
from dataflows.steps.triage import Shedding, triage
from features.batch import EventBatch
from features.fraud import FRAUD, at_least, suspicious
from model.package import DECISIONS, Thresholds

NOW_S = 1_700_000_000.0
TOPICS = ["fraud_reports", "transactions"]
THRESHOLDS = Thresholds(0.3, 0.7, "by hand")


class Clock:
    s = NOW_S - 60

    def __call__(self) -> float:
        return self.s


def events(amounts: Sequence[float], ages_s: Sequence[float], first: int = 0) -> EventBatch:
    n = len(amounts)
    return EventBatch(
        {
            "transaction_id": np.array([b"tx%04d" % (first + i) for i in range(n)]),
            "card_id": np.array([b"C%d" % (i % 3) for i in range(n)]),
            "terminal_id": np.full(n, b"T1"),
            "event_time": np.arange(n, dtype=np.int64),
            "amount": np.round(np.array(amounts) * 100).astype(np.int64),
            "source": np.ones(n, np.uint8),
            "partition": np.zeros(n, np.int32),
            "offset": np.arange(first, first + n),
            "append_time": np.round((NOW_S - np.array(ages_s)) * 1000).astype(np.int64),
            "seq": np.arange(first, first + n),
            "terminal_risk_7d": np.linspace(0, 1, n),
        }
    )


def triaged(
    batches: list[EventBatch], control: Overload
) -> tuple[list[EventBatch], list[EventBatch]]:
    full: list[EventBatch] = []
    short: list[EventBatch] = []
    flow = Dataflow("test")
    up = op.input("in", flow, TestingSource(batches))
    ways = triage("triage", up, Shedding(control, at_least(200), LastScores(10, 60)))
    op.output("full", ways.full, TestingSink(full))
    op.output("short", ways.short, TestingSink(short))
    run_main(flow)
    return full, short


def control(policy: Policy, level: int, **more: Any) -> Overload:
    clock = Clock()
    found = Overload(policy, target_s=0.5, deadline_s=5, now_s=clock, elapsed_s=lambda: 0.0, **more)
    clock.s = NOW_S
    found.level = level
    return found


def ids(batches: list[EventBatch]) -> list[bytes]:
    return [each for batch in batches for each in batch["transaction_id"].tolist()]


@pytest.mark.parametrize("policy", ["sample", "degrade", "drop"])
def test_every_event_goes_one_way_in_order_and_critical_ones_are_scored(policy: Policy) -> None:
    rng = np.random.default_rng(3)
    batches = [
        events(rng.gamma(2, 80, 50).tolist(), rng.uniform(0, 9, 50).tolist(), first)
        for first in range(0, 500, 50)
    ]
    full, short = triaged(batches, control(policy, 2))
    assert sorted(ids(full) + ids(short)) == ids(batches)
    for way in (full, short):
        assert ids(way) == sorted(ids(way)), "in order"
        assert way
    critical = [one for batch in batches for one in ids([batch.take(batch["amount"] >= 20_000)])]
    assert set(critical) <= set(ids(full))
    assert all((batch["way"] > 0).all() for batch in short)


def test_without_an_overload_batches_pass_as_they_are() -> None:
    batch = events([10, 20], [0.1, 0.1])
    full, short = triaged([batch], control("degrade", 0))
    assert full == [batch]
    assert not short


def answered(batch: EventBatch, last: LastScores, *ways: Way) -> EventBatch:
    out: list[EventBatch] = []
    flow = Dataflow("test")
    way = np.array(ways or [Way.REDUCED] * len(batch), np.uint8)
    up = op.input("in", flow, TestingSource([batch.with_columns({"way": way})]))
    op.output("out", short_answer("short", up, last, THRESHOLDS, suspicious), TestingSink(out))
    run_main(flow)
    (found,) = out
    return found


def encoded(batch: EventBatch) -> OutRecords:
    out: list[OutRecords] = []
    flow = Dataflow("test")
    up = op.input("in", flow, TestingSource([batch]))
    records = encode("encode", up, FRAUD, "v1", TOPICS, now_s=lambda: NOW_S)
    op.output("out", records, TestingSink(out))
    run_main(flow)
    (found,) = out
    return found


def test_a_short_answer_is_the_last_score_or_the_rule() -> None:
    now = [0.0]
    last = LastScores(100, ttl_s=60, now_s=lambda: now[0])
    cards = np.array([b"C0", b"C1", b"C0", b"C1"])
    last.put(cards, np.array([0.1, 0.9, 0.8, np.nan]))
    batch = events([10, 10, 10, 250, 10, 250], [1] * 6)  # C0 C1 C2 C0 C1 C2, risk 0 to 1
    found = answered(batch, last)
    expected = [0.8, 0.9, np.nan]
    np.testing.assert_array_equal(found["score"], expected * 2)
    assert [SCORE_MODES[mode] for mode in found["score_mode"]] == ["cached", "cached", "rule"] * 2
    decisions = [DECISIONS[code] for code in found["decision"]]
    assert decisions == ["block", "block", "approve", "block", "block", "review"]

    now[0] = 60.0
    forgotten = answered(batch, last)
    assert np.isnan(forgotten["score"]).all()
    by_rule = ["approve"] * 3 + ["review"] * 3  # risk of half and more, or above 220
    assert [DECISIONS[code] for code in forgotten["decision"]] == by_rule


def test_what_is_shed_has_no_answer_and_says_why() -> None:
    last = LastScores(100, ttl_s=60)
    last.put(np.array([b"C0", b"C1"]), np.array([0.9, 0.9]))
    batch = answered(
        events([10] * 4, [3.0] * 4, first=40), last, Way.SAMPLED, Way.REDUCED, Way.DROPPED,
        Way.SKIPPED,
    )  # fmt: skip
    out = encoded(batch)
    found = [json.loads(value) for value in out.values]
    assert found[0] == {
        "transaction_id": "tx0040",
        "card_id": "C0",
        "terminal_id": "T1",
        "event_time": 0,
        "score": None,
        "decision": None,
        "model_version": "v1",
        "schema_hash": FRAUD.schema_hash,
        "latency_ms": 3000,
        "score_mode": "shed",
        "shed": "sampled",
    }
    assert [each.get("shed") for each in found] == ["sampled", None, "dropped", "skipped"]
    # What is not answered has no latency among those of what is.
    assert (out.append_time < 0).tolist() == [True, False, True, True]
    assert [each["decision"] for each in found] == [None, "block", None, None]


def test_what_is_shed_is_counted_with_the_records_that_are_delivered() -> None:
    """Wherever that is: the split over partitions, a large batch's rest, a transaction."""
    shed = np.array([True, False, True, False])
    batch = OutRecords([b"a"] * 4, [b"v"] * 4, np.zeros(4), [b"1", b"2", b"3", b"4"], shed=shed)
    plain = OutRecords([b"b"], [b"v"], np.zeros(1), [b"5"])
    whole = OutRecords.concatenate([plain, batch])
    assert [whole.count_shed(start, stop) for start, stop in ((0, 5), (0, 2), (2, 5))] == [2, 1, 1]
    assert whole.take(np.array([1, 0, 3])).count_shed() == 2
    assert OutRecords.concatenate([plain, plain]).shed is None
    parts = [Delivery("p", n, np.empty(0), shed=s) for n, s in ((3, 1), (2, 2))]
    assert Delivery.sum(parts).shed == 3


def test_a_prediction_says_how_it_was_made_and_what_failed() -> None:
    batch = events([10, 10, 10], [1, 1, 1]).with_columns(
        {
            "score": np.array([0.1, 0.8, np.nan]),
            "decision": np.array([0, 2, 1], np.int8),
            "score_mode": np.array([0, 1, 2], np.uint8),
            "card_profile__served": np.array([0, 1, 2], np.uint8),
            "terminal_profile__served": np.array([3, 0, 1], np.uint8),
        }
    )
    found = [json.loads(value) for value in encoded(batch).values]
    assert [each["score_mode"] for each in found] == ["full", "cached", "rule"]
    assert [each["score"] for each in found] == [0.1, 0.8, None]
    assert [each.get("without") for each in found] == [
        ["terminal_profile"],
        ["card_profile"],
        ["terminal_profile"],
    ]
    assert set(found[0]) <= set(Prediction.__struct_fields__)
