"""What is scored in full, and when: against a simulated queue and a plain reading of the rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflows.overload import (
    CALM_INTERVALS,
    MOST_LEVEL,
    MOST_OUTAGES,
    CatchUp,
    Overload,
    Policy,
    Way,
)

TARGET_S, DEADLINE_S, INTERVAL_S = 0.5, 5.0, 0.5
#: A start on a clock like the wall's.
BEGAN_S = 1_700_000_000.0


@dataclass
class Clock:
    s: float = BEGAN_S

    def __call__(self) -> float:
        return self.s


def overload(policy: Policy, clock: Clock, catch_up: CatchUp = "score_all") -> Overload:
    return Overload(
        policy,
        target_s=TARGET_S,
        deadline_s=DEADLINE_S,
        catch_up=catch_up,
        interval_s=INTERVAL_S,
        now_s=clock,
        elapsed_s=clock,
    )


@dataclass
class Queue:
    """A worker that takes what is there, up to 1,000 events at a time, and is busy for as long.

    An event costs 1 ms scored in full, 0.3 ms answered in short, 0.1 ms shed. One in ten is
    critical.
    """

    policy: Policy
    clock: Clock = field(default_factory=Clock)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def __post_init__(self) -> None:
        self.control = overload(self.policy, self.clock)
        self.waiting = np.empty(0, np.int64)  # append times, ms
        self.levels: list[int] = []
        self.ages_s: list[float] = []
        self.ways = np.zeros(len(Way), np.int64)
        self.critical_reduced = 0

    def run(self, seconds: float, rate: float) -> None:
        end = self.clock.s + seconds
        while self.clock.s < end:
            batch, self.waiting = self.waiting[:1000], self.waiting[1000:]
            cost_s = 0.001
            if len(batch):
                critical = self.rng.random(len(batch)) < 0.1
                draws = self.rng.integers(0, 1 << 16, len(batch))
                ways = self.control.ways(batch, critical, draws)
                ways = np.zeros(len(batch), np.uint8) if ways is None else ways
                self.critical_reduced += int((critical & (ways > 0)).sum())
                counts = np.bincount(ways, minlength=len(Way))
                self.ways += counts
                cost_s = float(counts @ np.array([0.001, 0.0003, 0.0001, 0.0001, 0.0001]))
                self.ages_s.append(self.clock.s - batch[-1] / 1000)
            else:
                self.control.idle()
            self.levels.append(self.control.level)
            came = self.rng.poisson(rate * cost_s)
            times = self.clock.s + np.sort(self.rng.random(came)) * cost_s
            self.clock.s += cost_s
            self.waiting = np.concatenate([self.waiting, (times * 1000).astype(np.int64)])


def test_below_capacity_everything_is_scored_in_full() -> None:
    for policy in get_args(Policy):
        queue = Queue(policy)
        queue.run(60, rate=800)
        assert set(queue.levels) == {0}
        assert queue.ways[1:].sum() == 0, policy


@pytest.mark.parametrize("policy", ["sample", "degrade", "drop"])
def test_a_burst_of_three_times_the_capacity_is_met_and_got_over(policy: Policy) -> None:
    queue = Queue(policy)
    queue.run(10, rate=800)
    queue.ages_s.clear()
    queue.run(60, rate=2_200)
    assert max(queue.levels) > 0
    # While it lasts, no queue stands for long; without control it would be a minute old.
    assert np.percentile(queue.ages_s, 95) < 3 * TARGET_S
    assert queue.ways[Way.FULL] > 10_000, "the worker still scores what it can"
    assert queue.critical_reduced == 0
    queue.run(20, rate=800)
    before = queue.ways.copy()
    queue.run(20, rate=800)
    assert queue.control.level == 0
    assert (queue.ways - before)[1:].sum() == 0, "all is scored again"


def test_where_nothing_may_be_shed_a_burst_waits() -> None:
    queue = Queue("block")
    queue.run(60, rate=2_200)
    assert queue.ways[1:].sum() == 0
    assert queue.ages_s[-1] > 20, "the counterexample: so old the last ones are"


AGES_S = st.lists(st.floats(-1, 20), min_size=1, max_size=30)


@given(
    policy=st.sampled_from(get_args(Policy)),
    catch_up=st.sampled_from(get_args(CatchUp)),
    ages_s=AGES_S,
    level=st.integers(0, MOST_LEVEL),
    seed=st.integers(0, 1000),
    ran_s=st.floats(0, 30),
)
def test_ways_are_those_of_a_plain_reading(
    policy: Policy, catch_up: CatchUp, ages_s: list[float], level: int, seed: int, ran_s: float
) -> None:
    clock = Clock()
    control = overload(policy, clock, catch_up)
    clock.s += ran_s
    control._until = np.inf  # no interval ends here
    control.level = level
    rng = np.random.default_rng(seed)
    appended = np.round((clock.s - np.array(ages_s)) * 1000).astype(np.int64)
    critical = rng.random(len(ages_s)) < 0.3
    draws = rng.integers(0, 1 << 16, len(ages_s))

    def way(ms: int, is_critical: bool, draw: int) -> Way:
        age_s = clock.s - ms / 1000
        if is_critical:
            return Way.FULL
        if ms < BEGAN_S * 1000:
            return {"score_all": Way.FULL, "degrade": Way.REDUCED, "skip": Way.SKIPPED}[catch_up]
        late = age_s > DEADLINE_S
        if policy == "drop":
            old = late or (level > 0 and age_s > TARGET_S)
            return Way.DROPPED if old else Way.FULL
        if policy == "block":
            return Way.FULL
        if draw % 2**level:
            return Way.SAMPLED if policy == "sample" else Way.REDUCED
        return Way.REDUCED if late else Way.FULL

    expected = list(map(way, appended.tolist(), critical.tolist(), draws.tolist()))
    found = control.ways(appended, critical, draws)
    assert (found is None) == (not any(expected))
    assert found is None or found.tolist() == expected


def test_each_level_halves_what_is_scored_and_takes_no_new_events() -> None:
    clock = Clock()
    control = overload("degrade", clock)
    control._until = np.inf
    draws = np.random.default_rng(1).integers(0, 1 << 16, 100_000)
    now = np.full(len(draws), round(clock.s * 1000))
    nobody = np.zeros(len(draws), bool)
    before = np.ones(len(draws), bool)
    for level in range(1, MOST_LEVEL + 1):
        control.level = level
        ways = control.ways(now, nobody, draws)
        assert ways is not None
        full = ways == Way.FULL
        assert full.mean() == pytest.approx(0.5**level, rel=0.1)
        assert not (full & ~before).any(), "who is not scored at a level is not at a higher one"
        before = full


def test_levels_go_up_with_each_standing_interval_and_down_after_calm_ones() -> None:
    clock = Clock()
    control = overload("degrade", clock)

    def interval(*ages_s: float) -> int:
        clock.s += INTERVAL_S
        for age_s in ages_s:
            control._observe(age_s)
        return control.level

    assert [interval(2.0) for _ in range(MOST_LEVEL + 2)] == [*range(1, MOST_LEVEL + 1), 4, 4]
    assert interval(TARGET_S * 0.9) == MOST_LEVEL, "not calm: it stays"
    calm = [interval(0.0) for _ in range(MOST_LEVEL * CALM_INTERVALS)]
    assert calm == [MOST_LEVEL - (n + 1) // CALM_INTERVALS for n in range(len(calm))]
    assert interval() == 0, "an interval without an event says nothing"


def test_the_youngest_event_of_an_interval_decides() -> None:
    clock = Clock()
    control = overload("degrade", clock)
    for _ in range(10):
        for age_s in (0.1, 9.0, 3.0):
            control._observe(age_s)
            clock.s += INTERVAL_S / 3 + 1e-6
    assert control.level == 0


@pytest.mark.parametrize(("ages_s", "rises"), [((0.1, 9.0, 3.0), False), ((0.6, 9.0), True)])
def test_of_a_batch_the_youngest_event_decides(ages_s: tuple[float, ...], rises: bool) -> None:
    clock = Clock()
    control = overload("sample", clock)
    clock.s += 60
    for _ in range(4):
        clock.s += INTERVAL_S
        appended = ((clock.s - np.array(ages_s)) * 1000).astype(np.int64)
        control.ways(appended, np.zeros(len(ages_s), bool), np.zeros(len(ages_s), np.int64))
    assert (control.level > 0) == rises


def test_an_input_that_is_empty_here_does_not_hide_a_queue_elsewhere() -> None:
    """A process of a cluster reads nothing itself, and scores what others have read."""
    clock = Clock()
    control = overload("sample", clock)
    clock.s += 60
    for _ in range(4):
        clock.s += INTERVAL_S
        old = np.array([(clock.s - 2) * 1000]).astype(np.int64)
        control.ways(old, np.zeros(1, bool), np.zeros(1, np.int64))
        control.idle()
    assert control.level == 4, "once an interval"
    for _ in range(20 * CALM_INTERVALS):
        clock.s += INTERVAL_S
        control.idle()
    assert control.level == 0


def test_what_came_while_the_flow_was_down_does_not_count_for_the_level() -> None:
    clock = Clock()
    control = overload("degrade", clock)
    old = np.array([round((BEGAN_S - 3600) * 1000)])
    for _ in range(10):
        clock.s += INTERVAL_S
        assert control.ways(old, np.zeros(1, bool), np.zeros(1, np.int64)) is None
    assert control.level == 0
    clock.s += 30
    control.interrupted(30)
    just_before = np.array([round(clock.s * 1000) - 1])
    clock.s += 60
    for _ in range(10):
        clock.s += INTERVAL_S
        assert control.ways(just_before, np.zeros(1, bool), np.zeros(1, np.int64)) is None
    assert control.level == 0


@pytest.mark.parametrize("outages", [1, 3, MOST_OUTAGES])
def test_only_what_came_in_an_outage_is_missed(outages: int) -> None:
    """Not the backlog from before it, nor what came between two."""
    clock = Clock()
    control = overload("block", clock, "skip")
    control._until = np.inf
    appended, missed = [BEGAN_S - 1, BEGAN_S + 1], [True, False]
    for _ in range(outages):
        clock.s += 100
        control.interrupted(2.0)
        appended += [clock.s - 50, clock.s - 2.1, clock.s - 1.9, clock.s - 0.1, clock.s + 0.1]
        missed += [False, False, True, True, False]
    clock.s += 3600
    times = np.round(np.array(appended) * 1000).astype(np.int64)
    zeros = np.zeros(len(times), np.int64)
    ways = control.ways(times, zeros.astype(bool), zeros)
    assert ways is not None
    assert (ways == Way.SKIPPED).tolist() == missed


def test_an_outage_does_not_lift_the_level_from_a_backlog() -> None:
    clock = Clock()
    control = overload("degrade", clock)
    backlog = np.array([round(clock.s * 1000) + 1])
    clock.s += 100
    for _ in range(MOST_LEVEL):
        clock.s += INTERVAL_S
        control.interrupted(0.2)
        control.ways(backlog, np.zeros(1, bool), np.zeros(1, np.int64))
    assert control.level == MOST_LEVEL


def test_a_timestamp_of_the_future_does_not_hide_a_queue() -> None:
    clock = Clock()
    control = overload("degrade", clock)
    for level in range(1, MOST_LEVEL + 1):
        clock.s += 10
        times = np.array([round(clock.s * 1000) - 9_000, round(clock.s * 1000) + 60_000])
        control.ways(times, np.zeros(2, bool), np.zeros(2, np.int64))
        assert control.level == level
    ahead = np.array([round(clock.s * 1000) + 60_000])
    for _ in range(20):  # they alone say nothing
        clock.s += INTERVAL_S
        control.ways(ahead, np.zeros(1, bool), np.zeros(1, np.int64))
    assert control.level == MOST_LEVEL
    for _ in range(MOST_LEVEL * CALM_INTERVALS):  # clocks that differ by a little do
        clock.s += INTERVAL_S
        slightly = np.array([round(clock.s * 1000) + 500])
        control.ways(slightly, np.zeros(1, bool), np.zeros(1, np.int64))
    assert control.level == 0


def test_a_target_beyond_the_deadline_is_refused() -> None:
    with pytest.raises(ValueError, match="deadline"):
        Overload("degrade", target_s=2, deadline_s=1)
