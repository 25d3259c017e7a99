"""Judge a fraud model as the fraud handbook does: its splits over time and its three metrics.

Source of the rules: Le Borgne, Siblini, Lebichot and Bontempi, "Reproducible Machine Learning for
Credit Card Fraud Detection", chapters 3 (split), 4 (metrics) and 5 (repeated over four weeks).
The data is simulated; real card data is far harder (the book reports an average precision of
.08–.10 on it).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

DAY = 86_400_000  # milliseconds
WEEK, DELAY = 7, 7  # days of training and of testing, and between them until labels are complete


@dataclass(frozen=True)
class Labelled:
    """Hold what a protocol needs of each transaction, arrays of one length, in any order.

    `time` int64 milliseconds UTC, `card` a sortable id, `fraud` bool.
    """

    time: NDArray[np.int64]
    card: NDArray[np.str_]
    fraud: NDArray[np.bool_]

    def between(self, start: int, end: int) -> NDArray[np.int64]:
        """Return the positions with time in [start, end), ascending."""
        return np.flatnonzero((self.time >= start) & (self.time < end))

    def take(self, at: NDArray[np.int64]) -> "Labelled":
        """Return the transactions at these positions."""
        return Labelled(self.time[at], self.card[at], self.fraud[at])


@dataclass(frozen=True)
class Fold:
    """Name the positions to train on and to test on, and the start of the training (ms UTC)."""

    start: int
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def midnight(text: str) -> int:
    """Return a UTC date as milliseconds.

    >>> midnight("2018-07-25")
    1532476800000
    """
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


CHAPTER_3 = midnight("2018-07-25")
CHAPTER_5 = tuple(midnight(day) for day in ("2018-07-25", "2018-08-01", "2018-08-08", "2018-08-15"))
# No choice of ours was made on the test weeks of these (from 09-05, 09-12 and 09-19).
HELD_OUT = tuple(midnight(day) for day in ("2018-08-22", "2018-08-29", "2018-09-05"))


def fold(data: Labelled, start: int, *, train_days: int = WEEK) -> Fold:
    """Return the split whose training week begins at midnight `start`.

    Train on that week, wait seven days, test on the seven after them. Longer training
    (`train_days`) reaches further back and keeps the test. Cards known to be compromised are not
    tested: those with a fraud in the training week, and on each test day also those with a fraud
    from then until eight days before (whole days, so that every such fraud had been reported).
    """
    end = start + WEEK * DAY
    frauds = data.between(start, end + WEEK * DAY)
    frauds = frauds[data.fraud[frauds]]
    tested = []
    for day in range(end + DELAY * DAY, end + (DELAY + WEEK) * DAY, DAY):
        known = np.unique(data.card[frauds[data.time[frauds] < day - DELAY * DAY]])
        rows = data.between(day, day + DAY)
        tested.append(rows[~np.isin(data.card[rows], known)])
    return Fold(start, data.between(end - train_days * DAY, end), np.concatenate(tested))


def folds(
    data: Labelled, *, train_days: int = WEEK, weeks: int = len(CHAPTER_5)
) -> tuple[str, list[Fold]]:
    """Return chapter 5's four folds and their name, or those that fit at the end of other data.

    `weeks` is the most to take of other data. Raises `ValueError` if the data does not hold one
    fold (three weeks).
    """
    first, last = int(data.time.min()) // DAY * DAY, (int(data.time.max()) // DAY + 1) * DAY
    span = (WEEK + DELAY + WEEK) * DAY
    if first <= CHAPTER_5[0] and last >= CHAPTER_5[-1] + span:
        return "chapter 5", [fold(data, start, train_days=train_days) for start in CHAPTER_5]
    starts = [last - span - week * WEEK * DAY for week in reversed(range(weeks))]
    starts = [start for start in starts if start >= first]
    if not starts:
        raise ValueError(
            f"{(last - first) // DAY} days of transactions cannot be split into training, delay "
            "and test of a week each; generate at least 21 days (`python -m model.handbook`)"
        )
    return (
        f"last {len(starts)} weeks",
        [fold(data, start, train_days=train_days) for start in starts],
    )


def held_out(data: Labelled, *, train_days: int = WEEK) -> list[Fold]:
    """Return the folds that only report and never decide; none if the data lacks one of them.

    They follow chapter 5's folds: their test weeks begin after its last test week.
    """
    first, last = int(data.time.min()) // DAY * DAY, (int(data.time.max()) // DAY + 1) * DAY
    if first > CHAPTER_5[0] or last < HELD_OUT[-1] + (WEEK + DELAY + WEEK) * DAY:
        return []
    return [fold(data, start, train_days=train_days) for start in HELD_OUT]


def card_precision(data: Labelled, scores: NDArray[np.float64], *, top: int = 100) -> float:
    """Return CP@top: the share of compromised cards among those checked, mean over days.

    Each UTC day the cards are ranked by their highest score, descending, ties by card id
    ascending. The first `top` are checked; a checked card with a fraud that day is a hit, and is
    blocked: it is not ranked on later days. Hits are divided by `top` even when fewer cards moved.
    """
    return float(np.mean([hits for _, hits in _daily_hits(data, scores, top)])) / top


def _daily_hits(data: Labelled, scores: NDArray[np.float64], top: int) -> Iterator[tuple[int, int]]:
    names, cards = np.unique(data.card, return_inverse=True)  # codes in the order of the ids
    blocked = np.zeros(len(names), dtype=bool)
    days = data.time // DAY
    for day in np.unique(days):
        rows = np.flatnonzero((days == day) & ~blocked[cards])
        highest = np.full(len(names), -np.inf)
        np.maximum.at(highest, cards[rows], scores[rows])
        fraud = np.zeros(len(names), dtype=bool)
        fraud[cards[rows[data.fraud[rows]]]] = True
        moved = np.unique(cards[rows])
        checked = moved[np.argsort(-highest[moved], kind="stable")][:top]
        hits = checked[fraud[checked]]
        blocked[hits] = True
        yield int(day), len(hits)


def evaluate(
    data: Labelled, test: NDArray[np.int64], scores: NDArray[np.float64]
) -> dict[str, float]:
    """Return auc, ap and cp100 of `scores` (one per position in `test`).

    AUC of the receiver operating characteristic and average precision are scikit-learn's.
    """
    part = data.take(test)
    return {
        "auc": float(roc_auc_score(part.fraud, scores)),
        "ap": float(average_precision_score(part.fraud, scores)),
        "cp100": card_precision(part, scores),
    }
