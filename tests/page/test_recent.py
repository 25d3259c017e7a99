"""The latest flagged transactions, against a plain list of them."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflows.page.recent import Recent
from dataflows.steps.encode import SCORE_MODES
from features.batch import EventBatch
from features.fraud import FRAUD
from model.package import DECISIONS
from tests.page.feed import BEGAN_S, TOPICS, VERSION, recent, scored

ROWS = st.fixed_dictionaries(
    {
        "card_id": st.sampled_from(["C1", "C12", "AC1", "D", "é", "C*"]),
        "terminal_id": st.sampled_from(["T1", "T11", "X"]),
        "decision": st.integers(-1, len(DECISIONS) - 1),
    }
)
BATCHES = st.lists(st.lists(ROWS, max_size=8), max_size=12)


def filled(batches: list[list[dict[str, Any]]], capacity: int) -> tuple[Recent, list[Any]]:
    """Return what was kept, and the oracle: every flagged row, newest first."""
    kept = recent(capacity)
    naive: list[dict[str, Any]] = []
    offset = 0
    for rows in batches:
        if rows:
            kept.add(scored(rows, offset), VERSION)
        for i, row in enumerate(rows, offset):
            if row["decision"] > 0:
                naive.insert(0, {**row, "offset": i * 10})
        offset += len(rows)
    return kept, naive


@settings(deadline=None)
@given(
    BATCHES,
    st.integers(1, 12),
    st.sampled_from(["", "C1", "C*", "é", "nobody", "C12"]),
    st.sampled_from(["", "C", "C1", "C*", "*"]),
    st.sampled_from(["", "T1", "X"]),
    st.sampled_from(["", "T", "T1"]),
    st.sampled_from(["", *DECISIONS[1:]]),
    st.integers(1, 12),
)
def test_what_is_found_is_what_a_list_finds(
    batches: list[list[dict[str, Any]]],
    capacity: int,
    card: str,
    card_prefix: str,
    terminal: str,
    terminal_prefix: str,
    decision: str,
    limit: int,
) -> None:
    kept, naive = filled(batches, capacity)
    expected = [
        row
        for row in naive[:capacity]
        if card in ("", row["card_id"])
        and row["card_id"].startswith(card_prefix)
        and terminal in ("", row["terminal_id"])
        and row["terminal_id"].startswith(terminal_prefix)
        and decision in ("", DECISIONS[row["decision"]])
    ]
    found = kept.find(
        card=card,
        card_prefix=card_prefix,
        terminal=terminal,
        terminal_prefix=terminal_prefix,
        decision=decision,
        limit=limit,
    )
    assert [(row.card_id, row.terminal_id, row.decision, row.offset) for row in found.flagged] == [
        (row["card_id"], row["terminal_id"], DECISIONS[row["decision"]], row["offset"])
        for row in expected[:limit]
    ]
    assert found.matching == len(expected)
    assert (found.kept, found.total) == (min(len(naive), capacity), len(naive))
    assert kept.total == len(naive)


@settings(deadline=None)
@given(BATCHES, st.integers(1, 12))
def test_numbers_count_what_was_flagged(batches: list[list[dict[str, Any]]], capacity: int) -> None:
    kept, naive = filled(batches, capacity)
    numbers = [row.number for row in kept.find(limit=100).flagged]
    assert numbers == list(range(len(naive), max(len(naive) - capacity, 0), -1))


def test_a_record_is_whole() -> None:
    kept = recent()
    vector = [None if i == 3 else i * 1.5 for i in range(len(FRAUD.names))]
    row = {
        "transaction_id": "T7",
        "card_id": "C1",
        "terminal_id": "M1",
        "event_time": 1_533_700_000_123,
        "append_time": round(BEGAN_S * 1000) + 988,
        "source": 1,
        "partition": 3,
        "offset": 99,
        "amount": 12_345,
        "score": 0.875,
        "decision": 2,
        "score_mode": 1,
        "features": [np.nan if value is None else value for value in vector],
        "reasons": [13, 0, -1],
        "contributions": [0.5, -0.25, 0.0],
    }
    kept.add(scored([row]), "abc")
    found = kept.get("T7")
    assert found is not None
    assert (found.number, found.transaction_id, found.card_id, found.terminal_id) == (
        1, "T7", "C1", "M1",
    )  # fmt: skip
    assert (found.event_time, found.append_time) == (row["event_time"], row["append_time"])
    assert found.flagged_time == round((BEGAN_S + 1) * 1000)
    assert (found.topic, found.partition, found.offset) == (TOPICS[1], 3, 99)
    assert (found.amount, found.score) == (123.45, 0.875)
    assert (found.decision, found.score_mode) == ("block", "cached")
    assert (found.model_version, found.schema_hash) == ("abc", FRAUD.schema_hash)
    assert [(reason.feature, reason.contribution) for reason in found.reasons] == [
        (FRAUD.names[13], 0.5),
        (FRAUD.names[0], -0.25),
    ]
    assert found.features == dict(zip(FRAUD.names, vector, strict=True))
    assert list(found.features) == list(FRAUD.names)


def test_a_row_without_a_score_is_kept() -> None:
    kept = recent()
    kept.add(scored([{"score": np.nan, "decision": 1, "reasons": [-1, -1, -1]}]), VERSION)
    (found,) = kept.find().flagged
    assert found.score is None
    assert found.reasons == []


def without(batch: EventBatch, *names: str) -> EventBatch:
    return EventBatch({n: column for n, column in batch.columns.items() if n not in names})


def test_without_a_mode_the_model_answered() -> None:
    kept = recent()
    kept.add(without(scored([{"decision": 1}]), "score_mode", "amount"), VERSION)
    (found,) = kept.find().flagged
    assert (found.score_mode, found.amount) == (SCORE_MODES[0], None)


def test_answers_without_the_model_have_no_features() -> None:
    """As the step `short_answer` leaves them."""
    kept = recent()
    rows = [
        {"decision": 1, "score": np.nan, "score_mode": SCORE_MODES.index("rule")},
        {"decision": -1, "score": np.nan, "score_mode": SCORE_MODES.index("shed")},
        {"decision": 2, "score": 0.75, "score_mode": SCORE_MODES.index("cached")},
    ]
    kept.add(without(scored(rows), "#features", "#reasons", "#contributions"), VERSION)
    assert [
        (row.decision, row.score, row.score_mode, row.features, row.reasons)
        for row in kept.find().flagged
    ] == [("block", 0.75, "cached", {}, []), ("review", None, "rule", {}, [])]


def test_of_two_with_one_id_the_newer_is_got() -> None:
    kept = recent()
    kept.add(scored([{"transaction_id": "T", "offset": 1}, {"transaction_id": "U"}]), VERSION)
    kept.add(scored([{"transaction_id": "T", "offset": 2}]), VERSION)
    found = kept.get("T")
    assert found is not None
    assert found.offset == 2
    assert kept.get("V") is None


def test_what_fell_out_is_not_got() -> None:
    kept = recent(2)
    kept.add(scored([{"transaction_id": name} for name in "ABC"]), VERSION)
    assert kept.get("A") is None
    assert kept.get("B") is not None


def test_nothing_of_the_batch_is_held_on_to() -> None:
    """A view would keep thousands of rows alive for one."""
    kept = recent()
    batch = scored([{"decision": 0}] * 200 + [{"decision": 1}])
    kept.add(batch, VERSION)
    (chunk,) = kept._chunks
    assert all(column.base is None for column in chunk.rows.columns.values())
    assert {len(column) for column in chunk.rows.columns.values()} == {1}


@pytest.mark.parametrize("size", [1, 7, 50, 400])
def test_memory_is_bounded_whatever_comes(size: int) -> None:
    kept = recent(100)
    for i in range(500):
        kept.add(scored([{"decision": 1}] * size, i * size), VERSION)
        rows = sum(len(chunk.rows) for chunk in kept._chunks)
        assert rows <= 2 * kept.capacity
    assert kept.find(limit=1000).kept == 100
    assert len(kept.find(limit=1000).flagged) == 100


def test_a_reader_meets_few_chunks_whatever_the_batches_were() -> None:
    """Each costs a reader some microseconds, in which the flow cannot run."""
    kept = recent(500)
    for i in range(2000):
        kept.add(scored([{"decision": 1}], i), VERSION if i < 1900 else "newer")
        assert len(kept._chunks) < 30
    found = kept.find(limit=500).flagged
    assert [row.transaction_id for row in found] == [f"T{i:06d}" for i in range(1999, 1499, -1)]
    assert [row.model_version for row in found] == ["newer"] * 100 + [VERSION] * 400


def test_readers_see_whole_states_while_another_thread_adds() -> None:
    kept = recent(64)
    batches = [scored([{"decision": 1}] * 9, i * 9) for i in range(50)]
    done = threading.Event()

    def add() -> None:
        for _ in range(20):
            for batch in batches:
                kept.add(batch, VERSION)
        done.set()

    writer = threading.Thread(target=add)
    writer.start()
    looks = 0
    try:
        while not done.is_set() or not looks:
            found = kept.find(limit=1000)
            numbers = [row.number for row in found.flagged]
            assert len(numbers) == found.matching == found.kept
            assert all(newer == older + 1 for newer, older in pairwise(numbers))
            assert not numbers or numbers[0] == found.total
            looks += 1
    finally:
        writer.join()
    assert kept.total == 20 * 50 * 9


def test_a_capacity_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1; got 0"):
        recent(0)
