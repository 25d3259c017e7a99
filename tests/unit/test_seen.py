"""Seen ids against the naive rule: keep every accepted event, look through them all."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from features.batch import EventBatch
from features.events import Event, EventTime, Key, Money
from features.seen import MAX_HORIZON_MS, SLACK, SeenIds, fingerprints, identities

HORIZON = 1000
LATE = round(SLACK * HORIZON) // 2
MINUTE = 60_000


class Order(Event):
    identity: ClassVar[str | None] = "order_id"

    order_id: Key
    event_time: EventTime


class Refund(Event):
    identity: ClassVar[str | None] = "refund_id"

    refund_id: Key
    event_time: EventTime


class Cancelled(Event):
    identity: ClassVar[str | None] = "order_id"

    order_id: Key
    event_time: EventTime


SOURCES = (Order, Refund, Cancelled)

#: A source code, an id, and a broker time.
Row = tuple[int, str, int]


def ids_of(rows: list[Row]) -> np.ndarray:
    """Return fingerprints; each type has its id in its own column."""
    ids = np.array([name.encode() for _, name, _ in rows], "S")
    source = np.array([code for code, _, _ in rows], np.uint8)
    other = np.zeros(len(rows), "S1")
    batch = EventBatch(
        {
            "source": source,
            "order_id": np.where(source == 1, other, ids),
            "refund_id": np.where(source == 1, ids, other),
        }
    )
    return fingerprints(batch, SOURCES)


def judge(
    rows: list[Row],
    cuts: list[int] | None = None,
    restarts: frozenset[int] = frozenset(),
    *,
    horizon: int = HORIZON,
    most: int = 1_000_000,
) -> list[bool]:
    """Show rows in batches cut at `cuts`, going through bytes after those in `restarts`."""
    seen = SeenIds(horizon_ms=horizon, most=most)
    fresh: list[bool] = []
    edges = [0, *sorted(cut for cut in cuts or [] if cut < len(rows)), len(rows)]
    for i, (begin, end) in enumerate(pairwise(edges)):
        part = rows[begin:end]
        times = np.array([t for _, _, t in part], np.int64)
        fresh += seen.fresh(ids_of(part), times).tolist()
        if i in restarts:
            held = len(seen)
            seen = SeenIds.restore(seen.snapshot(), horizon_ms=horizon, most=most)
            assert len(seen) == held
    return fresh


def naive(rows: list[Row], horizon: int = HORIZON) -> list[bool]:
    accepted: dict[tuple[int, str], list[int]] = {}
    fresh = []
    for code, name, t in rows:
        times = accepted.setdefault((code, name), [])
        fresh.append(not any(abs(t - time) <= horizon for time in times))
        if fresh[-1]:
            times.append(t)
    return fresh


# Few ids, so that most come again; steps that hit the horizon's edges (h − 1, h, h + 1), what is
# kept beyond, and gaps of hours and years.
IDS = st.sampled_from(["a", "b", "c", "d", "an-id-that-is-longer-than-sixteen-bytes", "é"])
CODES = st.sampled_from([0, 0, 0, 1, 2])
STEPS = st.sampled_from(
    [0, 0, 1, 1, 2, 5, 60, 70, LATE, 999, 1000, 1001, 1250, 1251, 10**7, 10**11]
)
BEHIND = st.sampled_from([0, 0, 0, 1, LATE - 1, LATE])
CUTS = st.lists(st.integers(0, 150), max_size=6)
RESTARTS = st.frozensets(st.integers(0, 6))


def rows_with(steps: st.SearchStrategy[int], behind: st.SearchStrategy[int]) -> st.SearchStrategy:
    """Rows whose newest broker time goes on by `steps`, each of them `behind` the newest."""

    def lay(drawn: list[tuple[int, str, int, int]]) -> list[Row]:
        rows, newest = [], 1_700_000_000_000
        for code, name, step, back in drawn:
            newest += step
            rows.append((code, name, newest - back))
        return rows

    row = st.tuples(CODES, IDS, steps, behind)
    return st.lists(row, min_size=1, max_size=150).map(lay)


MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@MANY
@given(rows_with(STEPS, BEHIND), CUTS, RESTARTS)
def test_the_naive_rule_holds_for_times_an_eighth_of_the_horizon_out_of_order(
    rows: list[Row], cuts: list[int], restarts: frozenset[int]
) -> None:
    assert judge(rows, cuts, restarts) == naive(rows)


LONG = settings(max_examples=40, deadline=None)
LONG_CUTS = st.lists(st.integers(0, 1500), max_size=6)


@LONG
@given(st.integers(0, 2**32), st.sampled_from([3, 40, 200]), LONG_CUTS, RESTARTS)
def test_so_it_does_in_streams_so_long_that_much_is_forgotten(
    seed: int, step: int, cuts: list[int], restarts: frozenset[int]
) -> None:
    rng = np.random.default_rng(seed)
    steps = rng.integers(0, step, 1500)
    steps[rng.integers(0, 1500, 3)] = 10**7
    times = np.cumsum(steps) - rng.integers(0, LATE + 1, 1500)
    rows: list[Row] = [
        (0, f"{name}", int(t)) for t, name in zip(times, rng.integers(0, 300, 1500), strict=True)
    ]
    assert judge(rows, cuts, restarts) == naive(rows)


@LONG
@given(st.integers(0, 2**32), st.sampled_from([100, 10**6]), LONG_CUTS, RESTARTS)
def test_whatever_the_times_of_a_long_stream_cuts_do_not_matter(
    seed: int, most: int, cuts: list[int], restarts: frozenset[int]
) -> None:
    """Times far out of order, and the bound: answers and state are the same bytes."""
    rng = np.random.default_rng(seed)
    times = np.arange(1499) * 8 + rng.integers(-2 * HORIZON, 2 * HORIZON, 1499)
    rows: list[Row] = [
        (0, f"{name}", int(t)) for t, name in zip(times, rng.integers(0, 400, 1499), strict=True)
    ]
    whole, parts = (SeenIds(horizon_ms=HORIZON, most=most) for _ in range(2))
    expected, found = feed(whole, rows), []
    for i, (begin, end) in enumerate(pairwise([0, *sorted(cuts), 1500])):
        found += feed(parts, rows[begin:end]) if end > begin else []
        if i in restarts:
            parts = SeenIds.restore(parts.snapshot(), horizon_ms=HORIZON, most=most)
    assert found == expected
    assert parts.snapshot() == whole.snapshot()


@LONG
@given(
    st.integers(0, 2**32),
    st.sampled_from([0, HORIZON // 2, 3 * HORIZON, 10**10]),
    st.sampled_from([0.1, 0.5, 0.9]),
    LONG_CUTS,
    RESTARTS,
)
def test_partitions_may_be_at_any_distance_while_they_advance_together(
    seed: int, apart: int, share: float, cuts: list[int], restarts: frozenset[int]
) -> None:
    """One was filled much later than another and is read beside it: its times run far ahead."""
    rng = np.random.default_rng(seed)
    newest = np.cumsum(rng.integers(0, 6, 1500))
    ahead = rng.random(1500) < share
    rows: list[Row] = [
        (0, f"{second}{name}", int(t) + (apart if second else 0))
        for t, second, name in zip(newest, ahead, rng.integers(0, 100, 1500), strict=True)
    ]
    assert judge(rows, cuts, restarts) == naive(rows)


ANY_TIME = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5 * HORIZON)


@MANY
@given(st.lists(st.tuples(CODES, IDS, ANY_TIME), min_size=1, max_size=150), CUTS, RESTARTS,
       st.sampled_from([1, 2, 3, 1000]))  # fmt: skip
@example([(0, "a", -(2**63)), (0, "a", 2**63 - 1)] * 20, [7], frozenset({0}), 1)
def test_whatever_the_times_answers_do_not_depend_on_cuts_and_no_duplicate_is_made_up(
    rows: list[Row], cuts: list[int], restarts: frozenset[int], most: int
) -> None:
    fresh = judge(rows, cuts, restarts, most=most)
    assert fresh == judge(rows, most=most)
    accepted = [row for row, first in zip(rows, fresh, strict=True) if first]
    far = 2**61
    for (code, name, t), first in zip(rows, fresh, strict=True):
        near = any(
            (code, name) == (other, known)
            and abs(min(max(t, -far), far) - min(max(time, -far), far)) <= HORIZON
            for other, known, time in accepted
        )
        assert first or near


@MANY
@given(rows_with(st.sampled_from([0, 0, 0, 1]), st.just(0)), st.integers(1, 8), CUTS, RESTARTS)
def test_beyond_the_bound_the_oldest_is_forgotten_first(
    rows: list[Row], most: int, cuts: list[int], restarts: frozenset[int]
) -> None:
    held: deque[tuple[int, str]] = deque(maxlen=most)
    expected = []
    for code, name, _ in rows:
        expected.append((code, name) not in held)
        if expected[-1]:
            held.append((code, name))
    assert judge(rows, cuts, restarts, most=most) == expected


def steady(count: int, start: int = 0, step: int = 5) -> list[Row]:
    return [(0, f"id{start + n}", (start + n) * step) for n in range(count)]


def feed(seen: SeenIds, rows: list[Row]) -> list[bool]:
    times = np.array([t for _, _, t in rows], np.int64)
    return list(map(bool, seen.fresh(ids_of(rows), times)))


def test_the_clock_may_lag_when_an_event_arrives() -> None:
    """The most that leaps and times out of order allow; 15 rows move the clock."""
    block = HORIZON // 8
    first = 400
    times = [0] * 15 + [first] + [first - LATE] * 14
    for t in range(first, first + HORIZON + LATE + 1, block):
        times += [t] * 15
    rows: list[Row] = [(0, f"other{n}", t) for n, t in enumerate(times)]
    rows[15] = (0, "twice", first)
    assert judge([*rows, (0, "twice", first + HORIZON)]) == [True] * len(rows) + [False]


def test_many_ids_are_remembered_for_the_horizon_and_no_longer() -> None:
    """Every id comes again just within the horizon, and once more just beyond it."""
    rows = steady(20_000)
    late = [(code, name, t + HORIZON) for code, name, t in rows]
    too_late = [(code, name, t + HORIZON + 1) for code, name, t in rows]
    every = sorted([*rows, *late, *too_late], key=lambda row: row[2])
    seen = SeenIds(horizon_ms=HORIZON, most=1_000_000)
    fresh = np.array(feed(seen, every))
    kinds = np.array([(t - 5 * int(name[2:])) for _, name, t in every])
    assert fresh[kinds == 0].all()
    assert not fresh[kinds == HORIZON].any()
    assert fresh[kinds == HORIZON + 1].all()
    # Accepted twice each; and the clock lags by some events.
    assert len(seen) < 2 * (HORIZON * (1 + SLACK) / 5 + 23)
    assert seen.forgotten == 0


def test_what_the_bound_forgets_is_counted() -> None:
    seen = SeenIds(horizon_ms=HORIZON, most=50)
    feed(seen, steady(60))
    assert (len(seen), seen.forgotten) == (50, 10)
    smaller = SeenIds.restore(seen.snapshot(), horizon_ms=HORIZON, most=5)
    assert (len(smaller), smaller.forgotten) == (5, 45)
    enough = SeenIds(horizon_ms=HORIZON, most=HORIZON // 5 + 40)
    feed(enough, steady(3000))  # room for the horizon, not for what is kept beyond it
    assert (len(enough), enough.forgotten) == (240, 0)


@pytest.mark.parametrize("wrong", [2**62, 10**15, 0, -1, -(2**63)])
def test_one_wrong_time_neither_forgets_nor_keeps_anything(wrong: int) -> None:
    start = 100 * MINUTE
    rows = steady(2000, start=start)
    dirty = [*rows[:1000], (0, "wrong", wrong), *rows[1000:]]
    clean, poisoned = (SeenIds(horizon_ms=HORIZON, most=100_000) for _ in range(2))
    feed(clean, rows)
    assert feed(poisoned, dirty) == [True] * 2001
    assert abs(poisoned.clock - clean.clock) <= 150
    assert abs(len(poisoned) - len(clean)) <= 16
    again = [(code, name, t) for code, name, t in rows[-90:]]
    assert feed(poisoned, again) == [False] * 90


def test_a_first_time_from_the_future_is_got_over() -> None:
    seen = SeenIds(horizon_ms=HORIZON, most=100_000)
    feed(seen, [(0, "wrong", 10**15), *steady(5000)])
    assert seen.clock <= 5000 * 5
    assert len(seen) < HORIZON * (1 + SLACK) / 5 + 25


def test_a_day_without_events_forgets_what_was_before_it_and_nothing_after_it() -> None:
    seen = SeenIds(horizon_ms=HORIZON, most=100_000)
    feed(seen, steady(100))
    day = 86_400_000 // 5
    for begin in range(0, 500, 10):
        feed(seen, steady(10, start=day + begin))
        recent = steady(min(200, begin + 10), start=day + max(begin - 190, 0))
        assert feed(seen, recent) == [False] * len(recent)
    assert len(seen) < HORIZON * (1 + SLACK) / 5 + 25


def test_memory_and_snapshots_are_small() -> None:
    """At the bound; the limits are those that the settings' description tells."""
    most = 50_000
    seen = SeenIds(horizon_ms=MAX_HORIZON_MS, most=most)
    feed(seen, steady(most + 1000))
    assert len(seen) == most
    assert seen.nbytes <= 36 * most + 1000
    assert len(seen.snapshot()) <= 24 * most + 1000


def test_a_longer_or_shorter_horizon_may_resume() -> None:
    seen = SeenIds(horizon_ms=HORIZON, most=1000)
    feed(seen, steady(100))
    now = 100 * 5
    shorter = SeenIds.restore(seen.snapshot(), horizon_ms=100, most=1000)
    assert feed(shorter, [(0, "id50", now), (0, "id95", now)]) == [True, False]
    assert len(shorter) < 60
    longer = SeenIds.restore(seen.snapshot(), horizon_ms=10 * HORIZON, most=1000)
    assert feed(longer, [(0, "id50", 250 + 10 * HORIZON)]) == [False]


def test_a_snapshot_describes_itself_and_foreign_ones_are_refused() -> None:
    seen = SeenIds(horizon_ms=HORIZON, most=1000, shards=16)
    feed(seen, steady(40))
    snapshot = seen.snapshot()
    head = SeenIds.describe(snapshot)
    assert (head["ids"], head["shards"], head["horizon_ms"]) == (40, 16, HORIZON)
    with pytest.raises(ValueError, match="one of 16 shards, the flow has 8"):
        SeenIds.restore(snapshot, horizon_ms=HORIZON, most=1000, shards=8)
    with pytest.raises(ValueError, match="not a snapshot of seen ids"):
        SeenIds.describe(b"WINDOWS\x00" + snapshot[8:])
    with pytest.raises(ValueError, match="format 99"):
        SeenIds.describe(snapshot[:8] + b"\x63\x00" + snapshot[10:])
    for damaged in (snapshot[:-1], snapshot + b"\x00"):
        with pytest.raises(ValueError, match="damaged"):
            SeenIds.restore(damaged, horizon_ms=HORIZON, most=1000, shards=16)


@pytest.mark.parametrize("horizon", [0, MAX_HORIZON_MS + 1])
def test_a_horizon_out_of_range_is_refused(horizon: int) -> None:
    with pytest.raises(ValueError, match=f"horizon_ms is {horizon}; accepted"):
        SeenIds(horizon_ms=horizon, most=10)


def test_fingerprints_do_not_change() -> None:
    """They are part of the state. MurmurHash3_x64_128 of b"abc", seed crc32(b"Order")."""
    (found,) = ids_of([(0, "abc", 0)])
    assert found.tobytes().hex() == "a6eeb4e0ba889b2fc9d87575e0d2681b"


def test_fingerprints_do_not_depend_on_the_batch() -> None:
    alone = [ids_of([(0, name, 0)])[0] for name in ("a", "bb", "a-long-one" * 6)]
    together = ids_of([(0, name, 0) for name in ("a", "bb", "a-long-one" * 6)])
    assert together.tolist() == [one.tolist() for one in alone]


def test_a_type_without_a_business_id_is_refused() -> None:
    class Nameless(Event):
        event_time: EventTime

    class Wrong(Event):
        identity: ClassVar[str | None] = "amount"

        event_time: EventTime
        amount: Money

    with pytest.raises(TypeError, match="Nameless declares no business id"):
        identities([Order, Nameless])
    with pytest.raises(TypeError, match="Wrong.identity: 'amount' is no field of type Key"):
        identities([Wrong])
