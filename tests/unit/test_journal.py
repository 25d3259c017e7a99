"""Shards from bases and pages: the state that was there, bit for bit, whatever was written when."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import journal, windows
from features.journal import Base, Journal, Page
from features.keys import group_by_shard
from features.packed import Format
from features.windows import Layout, WindowShards, WindowState
from tests.unit.test_windows import CUTS, ROWS, SOURCES, VIEWS, Row, batch_of

SHARDS = 3


def layout_of(name: str) -> Layout:
    return Layout.of(VIEWS[name], SOURCES, SHARDS)


def contents(states: WindowShards) -> list[Any]:
    """Return each shard's clock, and by key what it holds, exactly.

    Their order depends on history: who was forgotten and came again stands where it stood, unless
    the state was restored in between.
    """
    found: list[Any] = []
    for shard in range(SHARDS):
        data = states[shard].snapshot()
        columns = windows._FORMAT.unpack(data)
        ends = np.cumsum(columns["lengths"].sum(axis=1))
        held = {}
        for row, key in enumerate(columns["keys"]):
            mine = slice(ends[row] - columns["lengths"][row].sum(), ends[row])
            held[key.tobytes().rstrip(b"\0")] = (
                columns["newest"][row],
                columns["lengths"][row].tolist(),
                columns["times"][mine].tolist(),
                columns["values"][:, mine].tolist(),
                columns["peaks"][:, mine].tolist(),
            )
        found.append((WindowState.describe(data)["clock"], held))
    return found


@pytest.fixture(scope="module")
def chunked() -> Iterator[None]:
    """Pages are processed some rows at a time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal, "_CHUNK_ROWS", 7)
        yield


@pytest.mark.parametrize("name", VIEWS)
@settings(max_examples=60, deadline=None)
@given(rows=ROWS, epochs=CUTS, inner=CUTS, data=st.data())
def test_bases_and_pages_give_the_state_that_was_there(
    chunked: None,
    name: str,
    rows: list[Row],
    epochs: list[int],
    inner: list[int],
    data: st.DataObject,
) -> None:
    layout = layout_of(name)
    states, kept = WindowShards(layout), Journal(layout)
    bases: dict[int, Base] = {}
    pages: list[Page] = []
    ends = {*(cut for cut in epochs if cut < len(rows)), len(rows)}
    edges = sorted({0, *ends, *(cut for cut in inner if cut < len(rows))})
    for begin, end in pairwise(edges):
        batch = batch_of(rows[begin:end])
        states.update(batch, *group_by_shard(batch["shop"], SHARDS))
        kept.add(batch)
        if end in ends:
            number = 1 + len(pages)
            pages.append(("page", number, kept.page(number)))
            for shard in data.draw(st.frozensets(st.integers(0, SHARDS - 1)), "written"):
                bases[shard] = ("base", shard, number, states[shard].snapshot())
    needless = min((bases[s][2] if s in bases else 0) for s in range(SHARDS))
    there = data.draw(st.permutations(pages[data.draw(st.integers(0, needless), "gone") :]))

    resumed = WindowShards(layout)
    assert journal.resume(resumed, bases.values(), there) == len(pages)
    assert contents(resumed) == contents(states)


def test_an_empty_page_says_that_all_bases_are_as_of_it() -> None:
    layout = layout_of("plain")
    states = WindowShards(layout)
    batch = batch_of([Row(next(iter(SOURCES)), "a", 1_000_000, 5)])
    states.update(batch, *group_by_shard(batch["shop"], SHARDS))
    bases: list[Base] = [
        ("base", n, 7, data) for n, data in enumerate(states[s].snapshot() for s in range(SHARDS))
    ]
    resumed = WindowShards(layout)
    assert journal.resume(resumed, bases, [("page", 7, b""), ("page", 6, b"out of use")]) == 7
    assert contents(resumed) == contents(states)


def test_a_missing_page_is_told() -> None:
    layout = layout_of("plain")
    kept = Journal(layout)
    pages: list[Page] = []
    for number in (1, 2, 3):
        kept.add(batch_of([Row(next(iter(SOURCES)), "a", number, 5)]))
        pages.append(("page", number, kept.page(number)))
    with pytest.raises(ValueError, match="page 2 of the journal of rows is missing"):
        journal.resume(WindowShards(layout), [], [pages[2], pages[0]])


def test_the_first_page_needed_may_not_be_missing_either() -> None:
    layout = layout_of("plain")
    data = WindowShards(layout)[0].snapshot()
    bases: list[Base] = [("base", shard, 3 + shard, data) for shard in range(SHARDS)]
    pages: list[Page] = [("page", number, b"") for number in range(1, 7)]
    found = journal.needed(bases, reversed(pages), SHARDS)
    assert [number for _, number, _ in found] == [4, 5, 6]
    with pytest.raises(ValueError, match="page 4 of the journal of rows is missing"):
        journal.needed(bases, pages[4:], SHARDS)


@given(
    st.integers(1, 70),
    st.lists(st.sampled_from([0, 10, journal.MOST_ROWS // 3, 2 * journal.MOST_ROWS]), max_size=150),
)
def test_no_page_is_written_over_that_a_shard_needs(count: int, rows: list[int]) -> None:
    as_of = [0] * count
    for page, had in enumerate(rows, start=1):
        for shard in journal.in_turn(as_of, had):
            as_of[shard] = page
        assert min(as_of) >= page - journal.PAGES
        if page > 4 and min(rows[page - 4 : page]) >= journal.MOST_ROWS // 3 and count >= 3:
            assert min(as_of) >= page - 3  # so at most three such pages are processed again


def test_a_page_of_other_event_types_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows say by number what they are."""
    layout = layout_of("plain")
    kept = Journal(layout)
    kept.add(batch_of([Row(next(iter(SOURCES)), "a", 1, 5)]))
    page: Page = ("page", 1, kept.page(1))
    other = Layout.of(VIEWS["plain"], list(reversed(SOURCES)), SHARDS)
    with pytest.raises(ValueError, match=r"the sources of the journal's page are \['Sale"):
        journal.check(other, page)
    monkeypatch.setattr(journal, "PAGES", 16)
    with pytest.raises(ValueError, match="the pages of the journal's page are 32"):
        journal.check(layout, page)


def test_what_is_stored_is_checked_against_the_view() -> None:
    layout, other = layout_of("plain"), layout_of("delayed")
    kept = Journal(layout)
    kept.add(batch_of([Row(next(iter(SOURCES)), "a", 1, 5)]))
    page: Page = ("page", 1, kept.page(1))
    base: Base = ("base", 2, 1, WindowShards(layout)[2].snapshot())
    journal.check(layout, page)
    journal.check(layout, base)
    with pytest.raises(ValueError, match="there is no shard 3, but 3 of them"):
        journal.check(layout, ("base", 3, 1, base[3]))
    with pytest.raises(ValueError, match="horizon_ms is"):
        journal.check(other, base)
    with pytest.raises(ValueError, match="of format 9, this version reads 1"):
        journal.check(layout, ("page", 1, page[2][:8] + b"\x09" + page[2][9:]))
    for foreign in (base[3], 5, ("base", 1, base[3]), ("page", 1), ("leaf", 1, b"")):
        with pytest.raises(TypeError, match="neither a shard's base nor a page"):
            journal.check(layout, foreign)  # type: ignore[arg-type]


INTEGERS = st.sampled_from(["<i8", "<i4", "|u1", "|i1", "<u8"]).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.lists(
            st.integers(int(np.iinfo(kind).min), int(np.iinfo(kind).max))
            | st.integers(0, 100).map(lambda n: n + int(np.iinfo(kind).max) - 100),
            max_size=20,
        ),
    )
)


@given(st.dictionaries(st.sampled_from("abc"), INTEGERS), st.booleans())
def test_packed_columns_come_back_as_they_were(given_columns, twice: bool) -> None:
    kind = Format(b"EXAMPLE.", 3, "an example")
    columns = {name: np.array(values, dtype) for name, (dtype, values) in given_columns.items()}
    if twice:
        columns = {name: np.stack([column, column]) for name, column in columns.items()}
    data = kind.pack({"more": 5}, columns)
    assert kind.describe(data)["more"] == 5
    found = kind.unpack(data)
    assert found.keys() == columns.keys()
    for name, column in columns.items():
        assert found[name].dtype == column.dtype and found[name].shape == column.shape
        assert found[name].tobytes() == column.tobytes()
    if any(column.size for column in columns.values()):
        with pytest.raises(ValueError, match="the bytes of an example are truncated"):
            kind.unpack(data[:-1])


def test_times_and_amounts_take_half() -> None:
    times = 1_600_000_000_000 + np.arange(1000) * 86_400
    assert len(Format(b"EXAMPLE.", 3, "an example").pack({}, {"t": times})) < times.nbytes * 0.6
