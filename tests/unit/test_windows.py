"""The window kernel against the naive rule: every answer, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from features.batch import EventBatch
from features.declare import (
    Count,
    FeatureView,
    Max,
    Mean,
    Min,
    Ratio,
    SincePrevious,
    Sum,
)
from features.events import Event, EventTime, Key, Money
from features.keys import group_by_shard, shards_of
from features.windows import (
    Layout,
    WindowShards,
    WindowState,
    evaluate,
    reshard,
)
from tests.unit.naive_windows import Row, naive_features


class Sale(Event):
    shop: Key
    event_time: EventTime
    amount: Money


class Claim(Event):
    shop: Key
    event_time: EventTime
    amount: Money


SOURCES = (Sale, Claim)
OVER = ("10ms", "25ms", "100ms")
EVERYTHING = FeatureView(
    "shop",
    key="shop",
    of=Sale,
    lateness="40ms",
    features=[
        Count(over=OVER),
        Sum("amount", over=OVER),
        Mean("amount", over=OVER),
        Min("amount", over=OVER),
        Max("amount", over=OVER),
        SincePrevious(over=OVER),
        Count(source=Claim, over=OVER),
        Max("amount", source=Claim, over=("25ms",)),
        SincePrevious(source=Claim, over=("25ms",)),
        Ratio(Count(source=Claim), Count(), over=OVER, empty=-1.0, name="claims_per_sale"),
        Ratio(Sum("amount", source=Claim), Sum("amount"), over=OVER, name="claimed_share"),
    ],
)
VIEWS = {
    "plain": EVERYTHING,
    "delayed": replace(EVERYTHING, delay="15ms"),
    "merged": replace(EVERYTHING, resolution="1ms"),
    "coarse": replace(EVERYTHING, resolution="7ms"),
    "coarse and delayed": replace(EVERYTHING, resolution="7ms", delay="15ms"),
    "answers other events": replace(
        EVERYTHING,
        features=[Count(source=Claim, over=OVER), Min("amount", source=Claim, over=OVER)],
    ),
}


def batch_of(rows: list[Row]) -> EventBatch:
    return EventBatch(
        {
            "source": np.array([SOURCES.index(row.source) for row in rows], np.uint8),
            "shop": np.array([row.key.encode() for row in rows], "S"),
            "event_time": np.array([row.event_time for row in rows], np.int64),
            "amount": np.array([row.amount for row in rows], np.int64),
        }
    )


def kernel_features(
    view: FeatureView,
    rows: list[Row],
    cuts: list[int],
    restarts: frozenset[int] = frozenset(),
    shards: int = 1,
) -> list[dict[str, float] | None]:
    """Feed rows in batches cut at `cuts`, going through bytes after those in `restarts`."""
    layout = Layout.of(view, SOURCES, shards)
    small = [WindowState(layout, entities=1, entries=4) for _ in range(shards)]
    states = WindowShards(layout, small)
    out: list[dict[str, float] | None] = []
    edges = [0, *sorted(cut for cut in cuts if cut < len(rows)), len(rows)]
    for i, (begin, end) in enumerate(pairwise(edges)):
        batch = batch_of(rows[begin:end])
        if len(batch) == 0:
            continue
        grouped = group_by_shard(batch["shop"], shards)
        answered_batch = evaluate(layout, states.update(batch, *grouped))
        for j, row in enumerate(rows[begin:end]):
            answered = row.source is view.of
            features = {name: float(answered_batch[name][j]) for name in view.names}
            out.append(features if answered else None)
        if i in restarts:
            for shard in range(shards):
                states[shard] = WindowState.restore(layout, states[shard].snapshot())
    return out


def assert_identical(
    found: list[dict[str, float] | None], expected: list[dict[str, float] | None]
) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a is None or b is None:
            assert a is b, f"row {i}"
            continue
        assert a.keys() == b.keys()
        wrong = {
            n: (a[n], b[n])
            for n in a
            if np.float64(a[n]).tobytes() != np.float64(b[n]).tobytes()
            and not (np.isnan(a[n]) and np.isnan(b[n]))
        }
        assert not wrong, f"row {i}: {wrong}"


# Steps that hit window edges (t − w, t − w + 1, t), ties, late events and idle gaps.
STEPS = st.sampled_from(
    [0, 0, 0, 1, 1, 2, 3, 7, 9, 10, 11, 15, 24, 25, 26, 90, 400, -1, -5, -30, 5_000_000, -5_000_000]
)
ROWS = st.lists(
    st.builds(
        lambda source, key, step, amount: (source, key, step, amount),
        st.sampled_from([Sale, Sale, Sale, Claim]),
        st.sampled_from(["hot", "hot", "hot", "cold", "a-shop-with-a-long-name", "é"]),
        STEPS,
        st.integers(0, 5) | st.integers(0, 10**11),
    ),
    min_size=1,
    max_size=120,
).map(
    lambda steps: [
        Row(source, key, 1_000_000_000 + int(time), amount)
        for (source, key, _, amount), time in zip(
            steps, np.cumsum([step for _, _, step, _ in steps]), strict=True
        )
    ]
)
CUTS = st.lists(st.integers(0, 120), max_size=12)
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", VIEWS)
@SETTINGS
@given(rows=ROWS, cuts=CUTS, restarts=st.frozensets(st.integers(0, 12)))
def test_any_split_and_any_restart_equals_the_naive_rule(
    name: str, rows: list[Row], cuts: list[int], restarts: frozenset[int]
) -> None:
    view = VIEWS[name]
    assert_identical(kernel_features(view, rows, cuts, restarts), naive_features(view, rows))


@pytest.mark.parametrize("name", VIEWS)
@SETTINGS
@given(rows=ROWS, cuts=CUTS, restarts=st.frozensets(st.integers(0, 12)))
def test_shards_processed_in_one_call_do_not_touch_each_other(
    name: str, rows: list[Row], cuts: list[int], restarts: frozenset[int]
) -> None:
    view, shards = VIEWS[name], 3
    shard_of = shards_of(batch_of(rows)["shop"], shards).tolist()
    alone = [
        iter(naive_features(view, [row for row, s in zip(rows, shard_of, strict=True) if s == n]))
        for n in range(shards)
    ]
    expected = [next(alone[shard]) for shard in shard_of]
    assert_identical(kernel_features(view, rows, cuts, restarts, shards), expected)


@pytest.mark.parametrize("name", VIEWS)
@settings(SETTINGS, max_examples=40)
@given(
    rows=ROWS.map(lambda rows: sorted(rows, key=lambda row: row.event_time)),
    cuts=CUTS,
    shards=st.lists(st.integers(1, 9), min_size=1, max_size=12),
)
def test_entities_spread_anew_give_the_same_answers(
    name: str, rows: list[Row], cuts: list[int], shards: list[int]
) -> None:
    """After each batch, over another number of shards."""
    view, found = VIEWS[name], []
    layout = Layout.of(view, SOURCES, shards[0])
    states = [WindowState(layout) for _ in range(shards[0])]
    edges = [0, *sorted(cut for cut in cuts if cut < len(rows)), len(rows)]
    for i, (begin, end) in enumerate(pairwise(edges)):
        batch = batch_of(rows[begin:end])
        held = WindowShards(layout, states)
        out = evaluate(layout, held.update(batch, *group_by_shard(batch["shop"], len(held))))
        found += [
            {n: float(out[n][j]) for n in view.names} if row.source is view.of else None
            for j, row in enumerate(rows[begin:end])
        ]
        layout = Layout.of(view, SOURCES, shards[i % len(shards)])
        states = reshard([held[n] for n in range(len(held))], layout)
        assert all(
            shards_of(np.array([key]), layout.shards).tolist() == [n]
            for n, state in enumerate(states)
            for key in contents(state)
        )
    assert_identical(found, naive_features(view, rows))


@SETTINGS
@given(
    times=st.lists(st.integers(0, 300), min_size=1, max_size=60).map(sorted),
    order=st.randoms(use_true_random=False),
)
def test_arrival_shuffled_within_the_lateness_gets_the_prescribed_answers(
    times: list[int], order
) -> None:
    view = VIEWS["plain"]
    keyed = [(time + order.uniform(0, 39), Row(Sale, "hot", time, time)) for time in times]
    rows = [row for _, row in sorted(keyed, key=lambda pair: pair[0])]
    assert_identical(kernel_features(view, rows, [7, 30]), naive_features(view, rows))


@pytest.mark.parametrize("name", VIEWS)
def test_window_edges(name: str) -> None:
    """A window is open at t − d − w and closed at t − d."""
    view = VIEWS[name]
    for age in (0, 1, 9, 10, 11, 14, 15, 16, 24, 25, 26, 39, 40, 41, 99, 100, 101):
        rows = [Row(Sale, "a", 5_000_000, 3), Row(Sale, "a", 5_000_000 + age, 4)]
        assert_identical(kernel_features(view, rows, []), naive_features(view, rows))


@pytest.mark.parametrize("name", ["plain", "merged", "coarse"])
def test_a_long_hot_stream_keeps_its_memory_bounded(name: str) -> None:
    """A thousand times the window's events must not take a thousand times the room."""
    rng = np.random.default_rng(7)
    state = WindowState(Layout.of(VIEWS[name], SOURCES))
    times = 1_000_000 + np.cumsum(rng.integers(0, 2, 200_000))
    rows = [Row(Sale, "hot", int(t), int(t) % 97) for t in times]
    sizes = []
    for begin in range(0, len(rows), 10_000):
        state.update(batch_of(rows[begin : begin + 10_000]))
        sizes.append(state.nbytes)
    assert max(sizes[5:]) <= max(sizes[:5])


def test_entities_that_fell_silent_are_forgotten() -> None:
    layout = Layout.of(EVERYTHING, SOURCES)
    state = WindowState(layout)
    for generation in range(20):
        t = 1_000_000 + generation * 1_000  # far beyond the horizon
        state.update(batch_of([Row(Sale, f"{generation}-{i}", t, 1) for i in range(500)]))
    assert state.entities < 2_000
    assert WindowState.describe(state.snapshot())["entities"] == 500


@SETTINGS
@given(rows=ROWS, data=st.data())
@example(rows=[Row(Sale, "a", 1_000_000)], data=None)
def test_a_snapshot_is_the_same_whatever_the_history_of_the_memory(rows: list[Row], data) -> None:
    """Restoring and going on yields the bytes that never stopping yields."""
    layout = Layout.of(EVERYTHING, SOURCES)
    cut = data.draw(st.integers(0, len(rows))) if data else 0
    straight = WindowState(layout)
    straight.update(batch_of(rows))
    restarted = WindowState(layout)
    if cut:
        restarted.update(batch_of(rows[:cut]))
    restarted = WindowState.restore(layout, restarted.snapshot())
    if cut < len(rows):
        restarted.update(batch_of(rows[cut:]))
    assert contents(straight) == contents(restarted)


def contents(state: WindowState) -> dict[bytes, list]:
    keys, _, lengths, times, values, peaks = state._live()
    out: dict[bytes, list] = {}
    at = 0
    for key, row in zip(keys, lengths, strict=True):
        n = int(row.sum())
        entries = slice(at, at + n)
        out[key.tobytes().rstrip(b"\0")] = [
            row.tolist(),
            times[entries].tolist(),
            values[:, entries].tolist(),
            peaks[:, entries].tolist(),
        ]
        at += n
    return out


def test_an_event_with_a_wrong_date_harms_nobody_else() -> None:
    """One from the year 2100 used to make a whole shard's windows look expired."""
    century = 80 * 365 * 86_400_000
    rows = [Row(Sale, f"k{i % 5}", 1_000_000 + i, 7) for i in range(50)]
    wrong = [*rows[:20], Row(Sale, "broken", 1_000_000 + century), *rows[20:]]
    expected = kernel_features(EVERYTHING, rows, [10, 30])
    found = kernel_features(replace(EVERYTHING, idle="2h"), wrong, [10, 25], frozenset({1}))
    assert_identical(found[:20] + found[21:], expected)


def test_late_events_are_counted() -> None:
    layout = Layout.of(EVERYTHING, SOURCES)
    state = WindowState(layout)
    state.update(
        batch_of(
            [
                Row(Sale, "a", 1_000_100),
                Row(Sale, "a", 1_000_099),
                Row(Sale, "a", 1_000_060),
                Row(Sale, "a", 1_000_059),
                Row(Sale, "b", 1_000_000),
            ]
        )
    )
    assert (state.late, state.too_late) == (3, 1)


def test_a_snapshot_of_another_number_of_shards_is_refused() -> None:
    snapshot = WindowState(Layout.of(EVERYTHING, SOURCES, 16)).snapshot()
    with pytest.raises(ValueError, match=r"shards is 16.*has 8"):
        WindowState.restore(Layout.of(EVERYTHING, SOURCES, 8), snapshot)


def test_a_snapshot_of_another_view_is_refused() -> None:
    snapshot = WindowState(Layout.of(EVERYTHING, SOURCES)).snapshot()
    other = Layout.of(VIEWS["delayed"], SOURCES)
    with pytest.raises(ValueError, match=r"horizon_ms is 140.*has 155.*features\.offline --state"):
        WindowState.restore(other, snapshot)


@pytest.mark.parametrize("damage", [b"", b"hello", "truncated", "format"])
def test_a_damaged_snapshot_is_refused(damage: bytes | str) -> None:
    layout = Layout.of(EVERYTHING, SOURCES)
    state = WindowState(layout)
    state.update(batch_of([Row(Sale, "a", 1_000_000, 1)]))
    snapshot = state.snapshot()
    if damage == "truncated":
        damage = snapshot[:-1]
    elif damage == "format":
        damage = snapshot[:8] + b"\xff\x00" + snapshot[10:]
    assert isinstance(damage, bytes)
    with pytest.raises(ValueError, match="not a window snapshot|truncated|format 255"):
        WindowState.restore(layout, damage)


def test_a_view_over_events_that_are_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="aggregates Claim, which the flow does not read"):
        Layout.of(EVERYTHING, [Sale])


@given(keys=st.lists(st.text("abcXYZ019é", min_size=1, max_size=12), min_size=1, max_size=50))
@settings(deadline=None)
def test_shards_depend_on_the_key_alone(keys: list[str]) -> None:
    encoded = np.array([key.encode() for key in keys], "S")
    wide = encoded.astype("S40")
    assert shards_of(encoded, 16).tolist() == shards_of(wide, 16).tolist()
    alone = [int(shards_of(np.array([key.encode()]), 16)[0]) for key in keys]
    assert shards_of(encoded, 16).tolist() == alone


def test_shards_are_even() -> None:
    keys = np.array([f"C{i:05d}".encode() for i in range(16_000)])
    counts = np.bincount(shards_of(keys, 16), minlength=16)
    assert counts.min() > 850 and counts.max() < 1150
