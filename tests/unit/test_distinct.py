"""The step that drops duplicates, in real Bytewax."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import bytewax.operators as op
import numpy as np
import pytest
from bytewax.dataflow import Dataflow, Stream
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import TestingSink, TestingSource, run_main
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflows.metrics import Metrics
from dataflows.steps import distinct as distinct_step
from dataflows.steps.distinct import Dedupe, distinct
from features.batch import EventBatch
from features.events import Event, EventTime
from features.fraud import SOURCES
from tests.unit.test_seen import HORIZON, Row, naive

TOPICS = ["fraud_reports", "transactions"]
DEDUPE = Dedupe(HORIZON, 1_000_000)


@pytest.fixture(autouse=True)
def metrics(monkeypatch: pytest.MonkeyPatch) -> Metrics:
    """Metrics of the test's own."""
    own = Metrics()
    monkeypatch.setattr(distinct_step, "METRICS", own)
    return own


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the step has warned of."""
    said: list[dict[str, Any]] = []

    class Log:
        def warning(self, event: str, **more: Any) -> None:
            said.append({"event": event, **more})

    monkeypatch.setattr(distinct_step, "log", Log())
    return said


def events(rows: Sequence[Row], first_seq: int = 0) -> EventBatch:
    n = len(rows)
    return EventBatch(
        {
            "transaction_id": np.array([name.encode() for _, name, _ in rows], "S"),
            "card_id": np.array([name.encode() for _, name, _ in rows], "S"),
            "event_time": np.arange(n),
            "source": np.array([code for code, _, _ in rows], np.uint8),
            "append_time": np.array([t for _, _, t in rows], np.int64),
            "seq": np.arange(first_seq, first_seq + n),
        }
    )


def cut(rows: list[Row], cuts: list[int]) -> list[Any]:
    edges = [0, *sorted(c for c in cuts if c < len(rows)), len(rows)]
    return [events(rows[a:b], first_seq=a) for a, b in pairwise(edges) if b > a]


def run(
    items: Sequence[Any],
    dedupe: Dedupe = DEDUPE,
    shards: int = 16,
    *,
    recovery: Path | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> list[EventBatch]:
    """Send batches through the step; return what comes out. With a store, every batch is kept."""
    engine: dict[str, Any] = {}
    if recovery is not None:
        config: Any = RecoveryConfig
        engine = {"epoch_interval": timedelta(0), "recovery_config": config(recovery)}
    out: list[EventBatch] = []
    flow = Dataflow("test")
    came: Stream[EventBatch] = op.input("in", flow, TestingSource(items))
    fresh = distinct("distinct", came, "card_id", SOURCES, TOPICS, dedupe, shards, now_s)
    op.output("out", fresh, TestingSink(out))
    run_main(flow, **engine)
    return out


def accepted(batches: Sequence[EventBatch]) -> list[int]:
    return [int(seq) for batch in batches for seq in batch["seq"]]


ROWS = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 1]),
        st.integers(0, 30).map(lambda n: f"id{n}"),
        st.sampled_from([0, 1, 50, 100, 400, 1000, 1001]),
    ),
    min_size=1,
    max_size=80,
).map(
    lambda rows: [
        (code, name, int(t))
        for (code, name, _), t in zip(rows, np.cumsum([row[2] for row in rows]), strict=True)
    ]
)
CUTS = st.lists(st.integers(0, 80), max_size=6)


@settings(max_examples=30, deadline=None)
@given(ROWS, CUTS, st.integers(0, 80), st.sampled_from([1, 3, 16]))
def test_the_rule_holds_whatever_the_batches_and_across_a_restart(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Row],
    cuts: list[int],
    stop: int,
    shards: int,
) -> None:
    recovery = tmp_path_factory.mktemp("recovery")
    init_db_dir(recovery, 1)
    items = cut(rows, cuts)
    items.insert(min(stop, len(items)), TestingSource.EOF())
    out = []
    for _ in range(2):
        out += run(items, shards=shards, recovery=recovery)
    assert accepted(out) == [i for i, first in enumerate(naive(rows)) if first]
    for batch in out:
        assert list(batch) == list(events(rows))
        whole = events(rows)
        for name in batch:
            if name != "event_time":  # counts from 0 in every batch
                assert (batch[name] == whole[name][batch["seq"]]).all()


def test_duplicates_are_counted_by_topic(metrics: Metrics) -> None:
    rows = [(1, "a", 0), (0, "a", 0), (1, "a", 1), (1, "a", 2), (0, "a", 3), (1, "b", 4)]
    assert accepted(run([events(rows)])) == [0, 1, 5]
    account = metrics.account()
    assert {topic: account[topic]["duplicate"] for topic in TOPICS} == {
        "fraud_reports": 1,
        "transactions": 2,
    }


def test_a_batch_of_nothing_but_duplicates(metrics: Metrics) -> None:
    rows = [(1, "a", 0), (1, "a", 1), (1, "a", 2)]
    assert accepted(run(cut(rows, [1, 2]))) == [0]
    assert metrics.account()["transactions"]["duplicate"] == 2


def test_the_bound_is_told_once_a_minute_and_counted(
    metrics: Metrics, warnings: list[dict[str, Any]]
) -> None:
    """Ten batches of 100 new ids, 10 s apart; 64 are held."""
    seconds = count(0, 10)
    rows = [(1, f"id{n}", n // 10) for n in range(1000)]
    run(
        cut(rows, list(range(100, 1000, 100))),
        Dedupe(HORIZON, 64),
        shards=1,
        now_s=lambda: next(seconds),
    )
    assert metrics.dedupe_forgotten._value.get() == 1000 - 64
    assert [line["forgotten"] for line in warnings] == [36, 600]
    assert "raise DEDUPE_MAX_IDS" in warnings[0]["event"]
    assert (warnings[0]["max_ids"], warnings[0]["horizon_s"]) == (64, HORIZON / 1000)


def test_the_bound_is_over_all_shards(metrics: Metrics) -> None:
    rows = [(1, f"id{n}", 0) for n in range(5000)]
    run([events(rows)], Dedupe(HORIZON, 1600), shards=16)
    assert metrics.dedupe_forgotten._value.get() == 5000 - 1600


def test_a_state_of_another_number_of_shards_is_refused(tmp_path: Path) -> None:
    init_db_dir(tmp_path, 1)
    items = [events([(1, "a", 0)]), TestingSource.EOF(), events([(1, "b", 0)], 1)]
    run(items, shards=16, recovery=tmp_path)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - what it is, is looked at below
        run(items, shards=8, recovery=tmp_path)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, ValueError):
        error = error.__cause__
    assert "one of 16 shards, the flow has 8" in str(error)


def test_an_event_type_without_a_business_id_is_refused() -> None:
    class Nameless(Event):
        event_time: EventTime

    flow = Dataflow("test")
    came: Stream[EventBatch] = op.input("in", flow, TestingSource([]))
    with pytest.raises(TypeError, match="Nameless declares no business id"):
        distinct("distinct", came, "card_id", [Nameless], ["nameless"], DEDUPE, 16)


def test_events_without_the_key_are_spread_and_still_known(metrics: Metrics) -> None:
    rows: list[Row] = [(0, f"id{n}", n) for n in range(400)]
    items = [events([*rows, *rows])]
    for batch in items:
        batch["card_id"][:] = b""
    # 25 ids a shard fit, if they are spread; 400 of one shard would not.
    assert accepted(run(items, Dedupe(HORIZON, 16 * 60), shards=16)) == list(range(400))
