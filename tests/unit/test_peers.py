"""The pure parts of the peer benchmark: its oracle, its check of answers, and its table."""

from __future__ import annotations

import doctest

import msgspec
import numpy as np
import pytest

from benchmarks.peers import job
from benchmarks.peers.backlog import CARDS, Backlog, check, inputs, window_sums
from benchmarks.peers.contenders import CEILING, CONTENDERS, OURS, REQUIREMENTS, Contender
from benchmarks.peers.job import INPUTS, WINDOWS_MS, advance, features
from benchmarks.peers.report import Result, advantage, budgets, disturbance, table
from benchmarks.peers.run import Seen

OTHER = Contender("other", "other", "none", budget=2.0)
OURSELVES = Contender(OURS, "ours", "all")


def few_cards(count: int, cards: int = 3) -> Backlog:
    """Return events of few cards, some at the same time, some exactly a window apart."""
    rng = np.random.default_rng(count)
    times = np.sort(rng.integers(0, 40, count)) * 300_000
    return Backlog(
        rng.integers(0, cards, count), np.zeros(count, int), times, rng.integers(1, 999, count)
    )


def naive(backlog: Backlog) -> tuple[list[list[int]], list[list[int]]]:
    """Look at all events for each window of each event."""
    counts, sums = [], []
    for card, at in zip(backlog.cards, backlog.times, strict=True):
        inside = [
            (backlog.cards == card) & (backlog.times > at - length) & (backlog.times <= at)
            for length in WINDOWS_MS
        ]
        counts.append([int(rows.sum()) for rows in inside])
        sums.append([int(backlog.cents[rows].sum()) for rows in inside])
    return counts, sums


def test_the_oracle_equals_the_definition() -> None:
    backlog = few_cards(200)
    counts, sums = window_sums(backlog)
    expected_counts, expected_sums = naive(backlog)
    assert counts.tolist() == expected_counts
    assert sums.tolist() == expected_sums


def test_what_the_peers_compute_in_python_equals_the_oracle() -> None:
    backlog = Backlog.of(3000)
    state: dict[int, tuple[list[int], list[int]]] = {}
    rows = []
    cards, times, cents = (
        column.tolist() for column in (backlog.cards % 20, backlog.times, backlog.cents)
    )
    for card, at_ms, amount in zip(cards, times, cents, strict=True):
        counts, sums = advance(*state.setdefault(card, ([], [])), at_ms, amount)
        rows.append(features(amount / 100, counts, sums))
    few = Backlog(backlog.cards % 20, backlog.terminals, backlog.times, backlog.cents)
    np.testing.assert_array_equal(np.array(rows, np.float32), inputs(few))
    assert len(rows[0]) == INPUTS


def test_a_share_of_the_cards_keeps_their_windows() -> None:
    backlog = Backlog.of(20_000)
    chosen = backlog.share(0.1)
    assert len(chosen) == pytest.approx(2000, rel=0.2)
    assert backlog.cards[chosen].max() < CARDS / 10
    part = Backlog(
        *(c[chosen] for c in (backlog.cards, backlog.terminals)),
        *(c[chosen] for c in (backlog.times, backlog.cents)),
    )
    np.testing.assert_array_equal(window_sums(part)[0], window_sums(backlog)[0][chosen])


def answer(n: int, counts: list[int], score: float, **more: int) -> bytes:
    fields = {"transaction_id": f"tx{n}", "card_id": "C1", "score": score, "counts": counts}
    return msgspec.json.encode({**fields, **more})


def test_answers_are_checked() -> None:
    counts, scores = np.array([[1, 1, 1], [1, 2, 2]]), [0.5, 0.25]
    right = [answer(0, [1, 1, 1], 0.5), answer(1, [1, 2, 2], 0.25 + 1e-6)]
    assert str(check(right, counts, scores)) == "exact"
    assert str(check([], counts, scores)) == "no answers"
    wrong = check([right[0], answer(1, [1, 2, 3], 0.3)], counts, scores)
    assert (wrong.answers, wrong.wrong_counts, wrong.wrong_scores) == (2, 1, 1)
    assert not wrong.exact
    twice = check([*right, right[0]], counts, scores)
    assert str(twice) == "1 of 2 answered more than once"
    none = check([right[0], answer(1, [1, 2, 2], float("nan"))], counts, scores)
    assert none.wrong_scores == 1


def test_an_answer_taken_back_and_given_anew_counts_as_given_twice() -> None:
    counts, scores = np.array([[1, 1, 1]]), [0.5]
    values = [
        answer(0, [1, 1, 2], 0.5, diff=1),
        answer(0, [1, 1, 2], 0.5, diff=-1),
        answer(0, [1, 1, 1], 0.5, diff=1),
    ]
    found = check(values, counts, scores)
    assert (found.wrong_counts, found.duplicates, found.taken_back) == (0, 1, 1)


def test_the_table_has_a_row_for_who_failed() -> None:
    runs = {
        OURSELVES: [Result(9, 9, rate, 2.0, 5_000_000, answers="exact") for rate in (90.0, 110.0)],
        OTHER: [Result(9, failure="cannot be installed: no | wheel")],
    }
    ours, other = table(runs).splitlines()[-2:]
    assert "| 100 (90 / 110) | 1 | 2.0 | 5 MB | 9 of 9 | exact |" in ours
    assert "not measured" in other
    assert "**cannot be installed: no / wheel**" in other


@pytest.mark.parametrize(
    ("rate", "measured", "verdict"),
    [(50.0, "2.00", "met"), (60.0, "1.67", "missed"), (0.0, "–", "not measured")],
)
def test_budgets(rate: float, measured: str, verdict: str) -> None:
    runs = {OURSELVES: [Result(9, 9, 100.0)], OTHER: [Result(9, 9, rate)]}
    assert budgets(runs) == [("at least 2 × other", measured, verdict)]


def test_the_steady_part_leaves_the_start_out() -> None:
    seen = Seen(
        times=[10.0, 11.0, 20.0, 30.0],
        counts=[5, 10, 60, 100],
        cpu_times=[0.0, 11.0, 30.0],
        cpu_s=[0.0, 8.0, 17.0],
        began=0.0,
    )
    rate, cpu_us = seen.steady()
    assert rate == pytest.approx(90 / 19)
    assert cpu_us == pytest.approx(9 / 90 * 1e6)


def test_who_answers_all_at_once_is_measured_from_its_start() -> None:
    seen = Seen(
        times=[50.0, 50.1], counts=[50, 100], cpu_times=[0.0, 50.1], cpu_s=[0, 40], began=0.0
    )
    assert seen.at_once
    assert seen.steady()[0] == pytest.approx(100 / 50.1)
    assert Seen().steady() == (0.0, 0.0)


def test_runs_are_compared_round_by_round() -> None:
    ours = [Result(9, 9, rate) for rate in (100.0, 50.0, 90.0)]
    theirs = [Result(9, 9, rate) for rate in (50.0, 10.0, 30.0)]
    assert advantage(ours, theirs) == 3.0
    assert advantage(ours, theirs[:1]) == 90.0 / 50.0
    assert advantage(ours, [Result(9)]) == 0.0


def test_a_disturbed_run_is_said() -> None:
    quiet = {OURSELVES: [Result(9, 9, 100.0, others=0.02)]}
    assert "median 2%, at most 2%" in disturbance(quiet)
    assert "repeat" not in disturbance(quiet)
    assert "repeat" in disturbance({**quiet, OTHER: [Result(9, 9, 100.0, others=0.5)]})


def test_the_examples_hold() -> None:
    assert doctest.testmod(job).failed == 0


def test_the_ceilings_budget_is_a_share_of_it() -> None:
    ceiling = next(one for one in CONTENDERS if one.name == CEILING)
    runs = {OURSELVES: [Result(9, 9, 30.0)], ceiling: [Result(9, 9, 100.0)]}
    assert budgets(runs) == [("at least 0.35 of ceiling loop", "0.30", "missed")]


def test_requirements_are_pinned_by_hash_and_name_no_host() -> None:
    for name in {one.venv for one in CONTENDERS if one.venv}:
        text = (REQUIREMENTS / f"{name}.txt").read_text()
        assert "://" not in text
        for line in text.splitlines():
            if line and not line.startswith((" ", "#")):
                assert "==" in line, line
        assert text.count("--hash=sha256:") >= text.count("==")
