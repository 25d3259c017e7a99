"""The handbook's splits and CP@100, against naive versions and the handbook's counts."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.metrics import CHAPTER_3, DAY, Labelled, card_precision, fold, folds, midnight


def naive_card_precision(data: Labelled, scores: list[float], top: int) -> float:
    caught: set[str] = set()
    precisions = []
    rows = list(
        zip(data.time.tolist(), data.card.tolist(), data.fraud.tolist(), scores, strict=True)
    )
    for day in sorted({time // DAY for time, *_ in rows}):
        today = [row for row in rows if row[0] // DAY == day and row[1] not in caught]
        highest = {card: max(s for _, c, _, s in today if c == card) for _, card, _, _ in today}
        checked = sorted(highest, key=lambda card: (-highest[card], card))[:top]
        hits = {card for _, card, fraud, _ in today if fraud and card in checked}
        caught |= hits
        precisions.append(len(hits) / top)
    return sum(precisions) / len(precisions)


@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.integers(1, 4))
def test_card_precision_equals_the_naive_one_with_ties(seed: int, count: int, top: int) -> None:
    rng = np.random.default_rng(seed)
    data = Labelled(
        rng.integers(0, 4 * DAY, count),
        np.array([f"C{c:04}" for c in rng.integers(0, 9, count)]),
        rng.random(count) < 0.3,
    )
    scores = rng.integers(0, 4, count) / 3
    assert card_precision(data, scores, top=top) == pytest.approx(
        naive_card_precision(data, scores.tolist(), top)
    )


def test_equal_scores_are_checked_in_the_order_of_the_card_ids() -> None:
    data = Labelled(np.array([1, 1]), np.array(["C0002", "C0001"]), np.array([True, False]))
    assert card_precision(data, np.array([0.5, 0.5]), top=1) == 0.0


@pytest.fixture(scope="module")
def handbook(handbook_dir: Path) -> Labelled:
    table = pq.read_table(
        handbook_dir / "transactions.parquet", columns=["event_time", "card_id", "label"]
    )
    return Labelled(
        table["event_time"].to_numpy(),
        np.asarray(table["card_id"].to_numpy(), dtype=np.str_),
        table["label"].to_numpy() != 0,
    )


def test_chapter_3_split_has_the_published_counts(handbook: Labelled) -> None:
    split = fold(handbook, CHAPTER_3)
    assert (len(split.train), handbook.fraud[split.train].sum()) == (67_240, 598)
    assert (len(split.test), handbook.fraud[split.test].sum()) == (58_264, 385)


def test_a_perfect_model_reaches_the_published_card_precision(handbook: Labelled) -> None:
    test = fold(handbook, CHAPTER_3).test
    data = Labelled(handbook.time[test], handbook.card[test], handbook.fraud[test])
    assert round(card_precision(data, data.fraud.astype(float)), 3) == 0.397


def test_known_compromised_cards_are_not_tested(handbook: Labelled) -> None:
    split = fold(handbook, CHAPTER_3)
    frauds = np.flatnonzero(handbook.fraud)
    for day in range(CHAPTER_3 + 14 * DAY, CHAPTER_3 + 21 * DAY, DAY):
        known = {
            str(handbook.card[i])
            for i in frauds
            if CHAPTER_3 // DAY <= handbook.time[i] // DAY <= day // DAY - 8
        }
        tested = split.test[handbook.time[split.test] // DAY == day // DAY]
        everyone = set(handbook.card[handbook.between(day, day + DAY)].tolist())
        assert set(handbook.card[tested].tolist()) == everyone - known


def test_longer_training_keeps_the_test_and_never_touches_the_delay(handbook: Labelled) -> None:
    name, weekly = folds(handbook)
    _, longer = folds(handbook, train_days=28)
    assert name == "chapter 5"
    assert [f.start for f in weekly] == [
        midnight(d) for d in ("2018-07-25", "2018-08-01", "2018-08-08", "2018-08-15")
    ]
    for short, long in zip(weekly, longer, strict=True):
        assert np.array_equal(short.test, long.test)
        assert set(short.train.tolist()) < set(long.train.tolist())
        assert handbook.time[long.train].max() < handbook.time[long.test].min() - 7 * DAY


def test_other_data_is_split_at_its_end_and_too_little_is_refused() -> None:
    def days(count: int) -> Labelled:
        time = np.arange(count, dtype=np.int64) * DAY + 1
        return Labelled(time, np.full(count, "C0000"), np.zeros(count, dtype=bool))

    name, splits = folds(days(30))
    assert name == "last 2 weeks"
    assert [f.start // DAY for f in splits] == [2, 9]
    with pytest.raises(ValueError, match="at least 21 days"):
        folds(days(20))
