"""EventBatch: splitting, taking and joining rows loses none and keeps their order."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.batch import EventBatch, in_order

SETTINGS = settings(deadline=None)


@st.composite
def batches(draw: st.DrawFn, least: int = 0, most: int = 40) -> EventBatch:
    n = draw(st.integers(least, most))
    keys = draw(st.lists(st.binary(max_size=9), min_size=n, max_size=n))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return EventBatch(
        {
            "card_id": np.array(keys, "S") if n else np.empty(0, "S1"),
            "seq": np.arange(n) * 3 + 5,
            "amount": rng.integers(-5, 5, n),
            "score": rng.random(n),
            "#features": rng.random((n, 3)),
        }
    )


def rows_of(batch: EventBatch) -> list[tuple[Any, ...]]:
    """Return rows as plain tuples: the oracle's form."""
    columns = [batch[name].tolist() for name in sorted(batch)]
    return [
        tuple(tuple(v) if isinstance(v, list) else v for v in row)
        for row in zip(*columns, strict=True)
    ]


@SETTINGS
@given(batches(), st.data())
def test_split_groups_stably_and_loses_nothing(batch: EventBatch, data: st.DataObject) -> None:
    shards = st.lists(st.integers(0, 5), min_size=len(batch), max_size=len(batch))
    parts = np.array(data.draw(shards), np.int64)
    rows = rows_of(batch)
    expected = {
        part: [row for row, p in zip(rows, parts, strict=True) if p == part]
        for part in sorted(set(parts.tolist()))
    }
    found = batch.split(parts)
    assert [part for part, _ in found] == list(expected)
    assert {part: rows_of(b) for part, b in found} == expected


@SETTINGS
@given(batches(), st.data())
def test_split_shuffled_and_put_in_order_is_the_batch(
    batch: EventBatch, data: st.DataObject
) -> None:
    shards = st.lists(st.integers(0, 5), min_size=len(batch), max_size=len(batch))
    parts = [part for _, part in batch.split(np.array(data.draw(shards), np.int64))]
    merged = in_order(data.draw(st.permutations(parts)))
    assert (rows_of(merged) if merged is not None else []) == rows_of(batch)


@SETTINGS
@given(batches(), st.data())
def test_take_by_indices_mask_and_slice(batch: EventBatch, data: st.DataObject) -> None:
    rows, n = rows_of(batch), len(batch)
    indices = data.draw(st.lists(st.integers(0, n - 1)) if n else st.just([]))
    assert rows_of(batch.take(np.array(indices, np.int64))) == [rows[i] for i in indices]
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    assert rows_of(batch.take(np.array(mask, np.bool_))) == [
        row for row, chosen in zip(rows, mask, strict=True) if chosen
    ]
    cut = data.draw(st.slices(n + 2))
    assert rows_of(batch.take(cut)) == rows[cut]


@SETTINGS
@given(batches(), st.lists(st.integers(0, 40), max_size=4))
def test_concat_undoes_cutting(batch: EventBatch, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), max(40, len(batch))]
    pieces = [batch.take(slice(begin, end)) for begin, end in pairwise(edges)]
    assert rows_of(EventBatch.concat(pieces)) == rows_of(batch)


def test_concat_widens_keys() -> None:
    short, long = (EventBatch({"k": np.array([key])}) for key in (b"a", b"abcdef"))
    assert EventBatch.concat([short, long])["k"].tolist() == [b"a", b"abcdef"]
    assert EventBatch.concat([long, short])["k"].tolist() == [b"abcdef", b"a"]


@SETTINGS
@given(batches())
def test_pickling_gives_the_same_columns(batch: EventBatch) -> None:
    back = pickle.loads(pickle.dumps(batch, protocol=5))
    assert rows_of(back) == rows_of(batch)
    assert {n: back[n].dtype for n in back} == {n: batch[n].dtype for n in batch}


def test_pickling_costs_little_more_than_the_columns() -> None:
    """What crosses an exchange is the rows taken, not the arrays that they are views of."""
    n = 1000
    batch = EventBatch({f"c{i}": np.arange(n) for i in range(10)})
    raw = sum(column.nbytes for column in batch.columns.values())
    assert len(pickle.dumps(batch, protocol=5)) < raw + 2_000
    few = batch.take(slice(10, 20))
    assert len(pickle.dumps(few, protocol=5)) < raw / 100 + 2_000
    parts = batch.split(np.arange(n) % 16)
    assert sum(len(pickle.dumps(part, protocol=5)) for _, part in parts) < raw + 16 * 2_000


def test_arrays_are_shared_and_never_changed() -> None:
    batch = EventBatch({"x": np.arange(3)})
    more = batch.with_columns({"y": np.ones((3, 2))})
    assert more["x"] is batch["x"]
    assert "y" in more and "y" not in batch
    replaced = batch.with_columns({"x": np.zeros(3)})
    assert batch["x"].tolist() == [0, 1, 2] and replaced["x"].tolist() == [0, 0, 0]
    assert np.shares_memory(batch.take(slice(1, 2))["x"], batch["x"])


def test_multi_dimensional_columns_keep_their_width() -> None:
    batch = EventBatch({"seq": np.arange(4), "#features": np.arange(8.0).reshape(4, 2)})
    assert batch.take(np.array([3, 0]))["#features"].tolist() == [[6, 7], [0, 1]]
    assert batch.take(np.zeros(4, np.bool_))["#features"].shape == (0, 2)
    parts = batch.split(np.array([1, 0, 1, 0]))
    assert [part["#features"].tolist() for _, part in parts] == [[[2, 3], [6, 7]], [[0, 1], [4, 5]]]


def test_nothing_is_a_batch_too() -> None:
    empty = EventBatch({})
    assert len(empty) == 0 and list(empty) == []
    assert empty.split(np.empty(0, np.int64)) == []
    assert in_order([]) is None
    assert in_order([EventBatch({"seq": np.empty(0, np.int64)})]) is None


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"one length, got \{'a': 2, 'b': 3\}"):
        EventBatch({"a": np.arange(2), "b": np.arange(3)})
    batch = EventBatch({"a": np.arange(2), "c": np.arange(2)})
    with pytest.raises(KeyError, match="no column 'b'; it has: a, c"):
        batch["b"]
    with pytest.raises(ValueError, match=r"different columns.*\['a', 'c'\] and \['a'\]"):
        EventBatch.concat([batch, EventBatch({"a": np.arange(1)})])
    with pytest.raises(ValueError, match="zero batches"):
        EventBatch.concat([])


def test_repr_shows_names_and_size_and_no_values() -> None:
    batch = EventBatch({"card_id": np.array([b"4111-1111"])})
    assert repr(batch) == "EventBatch(1 rows: card_id)"
