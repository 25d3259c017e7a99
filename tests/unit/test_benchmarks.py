"""The pure parts of the benchmarks: what they send, and what they conclude."""

from __future__ import annotations

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

from benchmarks.__main__ import Report, table
from benchmarks.flow import MOST_UNITS, UNITS_PER_MS, Steady
from benchmarks.load import cards, due


@pytest.mark.parametrize("burst", [1.0, 2.0, 4.0])
def test_bursts_change_when_events_are_due_but_not_how_many(burst: float) -> None:
    times = np.linspace(0, 20, 2001)
    counts = np.array([due(float(t), 1000, burst) for t in times])
    assert (np.diff(counts) >= 0).all(), "no event is taken back"
    for periods in (1, 2, 3, 4):
        assert due(5.0 * periods, 1000, burst) == pytest.approx(5000 * periods)
    first_second = due(1.0, 1000, burst)
    assert first_second == pytest.approx(1000 * burst)


def test_keys_are_drawn_as_named() -> None:
    rng = np.random.default_rng(3)
    share = {
        keys: np.bincount(cards(rng, 200_000, keys, 1000), minlength=1000) / 200_000
        for keys in ("uniform", "hot", "zipf")
    }
    assert share["uniform"].max() < 0.002
    assert share["hot"][0] == pytest.approx(0.2, abs=0.005)
    assert share["hot"][1:].max() < 0.002
    # Zipf: the share of rank r goes with r to the power of −1.1.
    assert share["zipf"][0] / share["zipf"][9] == pytest.approx(10**1.1, rel=0.05)


def steady(latencies_ms: list[float], drift: float) -> Steady:
    histogram = HdrHistogram(1, MOST_UNITS, 3)
    for each in latencies_ms:
        histogram.record_value(round(each * UNITS_PER_MS))
    return Steady(1000, histogram, 0, 0, drift)


def test_a_flow_that_falls_behind_is_not_called_bounded() -> None:
    assert steady([2, 3, 4, 30], drift=1.2).bounded
    assert not steady([2, 3, 4, 30], drift=3.5).bounded, "it gets worse"
    assert not steady([1500, 1600, 1700], drift=1.0).bounded, "it is behind already"
    assert steady([2, 3, 4, 30], 1).ms(50) == pytest.approx(3, rel=0.01)
    assert steady([2, 3, 4, 30], 1).max_ms == pytest.approx(30, rel=0.01)


def test_a_budget_is_met_at_its_bound_and_missed_beyond() -> None:
    report = Report()
    for value in (99.0, 100.0):
        report.least("rate", value, 100)
        report.most("pause", value, 99.5)
    assert [met for *_, met in report.budgets] == [False, True, True, False]


def test_tables_are_markdown() -> None:
    assert table(["a", "b"], [[1, "x"]]) == ["| a | b |", "| --- | --- |", "| 1 | x |"]
