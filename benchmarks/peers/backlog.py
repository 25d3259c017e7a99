"""The events, and what is right for each: an oracle in plain NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from confluent_kafka import Producer

from benchmarks.peers.job import WINDOWS_MS

CARDS, TERMINALS = 5_000, 10_000
#: Stream time goes on by this much with each event.
STEP_MS = 10
START_MS = 1_750_000_000_000
#: Scores that differ by no more than this are the same.
TOLERANCE = 1e-5

Int = npt.NDArray[np.int64]


class _Event(msgspec.Struct):
    transaction_id: str
    card_id: str
    terminal_id: str
    event_time: int
    amount: float


class Answer(msgspec.Struct):
    """What a contender wrote for an event. `diff` is Pathway's: −1 takes an answer back."""

    transaction_id: str
    score: float | None
    counts: list[int]
    diff: int = 1


@dataclass(frozen=True)
class Backlog:
    """Events in order of stream time; event n has the transaction id ``tx<n>``."""

    cards: Int
    terminals: Int
    times: Int
    cents: Int

    @staticmethod
    def of(count: int, seed: int = 1) -> Backlog:
        """Draw uniform cards and terminals; a shorter backlog is the beginning of a longer one."""
        streams = [np.random.default_rng([seed, stream]) for stream in range(3)]
        return Backlog(
            streams[0].integers(0, CARDS, count),
            streams[1].integers(0, TERMINALS, count),
            START_MS + STEP_MS * np.arange(count),
            np.rint(streams[2].gamma(2.0, 3000.0, count) + 1).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.cards)

    def share(self, share: float) -> npt.NDArray[np.intp]:
        """Return which events are those of a share of the cards; their windows stay as they are."""
        return np.flatnonzero(self.cards < CARDS * share)

    def send(self, brokers: str, topic: str, events: npt.NDArray[np.intp]) -> None:
        """Produce `events`, keyed by card, the record's timestamp being the event's."""
        producer = Producer(
            {
                "bootstrap.servers": brokers,
                "linger.ms": 5,
                "partitioner": "murmur2_random",
                "queue.buffering.max.messages": 1_000_000,
            }
        )
        encode = msgspec.json.Encoder().encode
        columns = (self.cards, self.terminals, self.times, self.cents)
        rows = zip(events.tolist(), *(column[events].tolist() for column in columns), strict=True)
        for n, card, terminal, at_ms, cents in rows:
            name = f"C{card:05d}"
            event = _Event(f"tx{n}", name, f"T{terminal:05d}", at_ms, cents / 100)
            producer.produce(topic, encode(event), name, timestamp=at_ms)
            producer.poll(0 if len(producer) < 500_000 else 0.01)
        left = producer.flush(60)
        if left:
            raise SystemExit(f"{left} events could not be written to {topic}")


def window_sums(backlog: Backlog) -> tuple[Int, Int]:
    """Return counts and sums in cents of each event's windows (t − w, t]: n × windows, int64.

    Sorts by card and time and takes differences of running totals. O(n log n).
    """
    order = np.lexsort((backlog.times, backlog.cards))
    span = int(np.ptp(backlog.times)) + WINDOWS_MS[-1] + 1
    since = backlog.times[order] - backlog.times.min()
    line = backlog.cards[order] * span + since  # cards one after the other, a longest window apart
    totals = np.concatenate([[0], np.cumsum(backlog.cents[order])])
    end = np.searchsorted(line, line, side="right")
    counts, sums = (np.empty((len(order), len(WINDOWS_MS)), np.int64) for _ in range(2))
    for column, length in enumerate(WINDOWS_MS):
        begin = np.searchsorted(line, line - length, side="right")
        counts[order, column] = end - begin
        sums[order, column] = totals[end] - totals[begin]
    return counts, sums


def inputs(backlog: Backlog) -> npt.NDArray[np.float32]:
    """Return the model's inputs for each event: amount, counts, sums and means (see `job`)."""
    counts, cents = window_sums(backlog)
    columns = [backlog.cents[:, None] / 100, counts, cents / 100, cents / (100 * counts)]
    return np.hstack(columns).astype(np.float32)


@dataclass(frozen=True)
class Check:
    """How a contender's answers compare with the right ones, in numbers of events."""

    answers: int
    duplicates: int
    wrong_counts: int
    wrong_scores: int
    taken_back: int = 0

    @property
    def exact(self) -> bool:
        return self.answers > 0 and not (self.duplicates or self.wrong_counts or self.wrong_scores)

    def __str__(self) -> str:
        if self.answers == 0:
            return "no answers"
        if self.exact:
            return "exact"
        parts = []
        for number, what in (
            (self.wrong_counts, "with wrong counts"),
            (self.wrong_scores, "with another score"),
            (self.duplicates, "answered more than once"),
            (self.taken_back, "taken back"),
        ):
            if number:
                parts.append(f"{number:,} of {self.answers:,} {what}")
        return "; ".join(parts)


def check(values: Iterable[bytes], counts: Int, scores: Sequence[float]) -> Check:
    """Compare answers as they were received with the right `counts` (n × windows) and `scores`.

    Of an event that was answered more than once, the last answer is judged. Raises
    msgspec.ValidationError for a value that is no answer.
    """
    decode = msgspec.json.Decoder(Answer).decode
    last: dict[int, Any] = {}
    duplicates = taken_back = 0
    for value in values:
        answer = decode(value)
        if answer.diff < 0:
            taken_back += 1
            continue
        n = int(answer.transaction_id.removeprefix("tx"))
        duplicates += n in last
        last[n] = answer
    rows = np.fromiter(last, np.int64, len(last))
    given = np.array([answer.counts for answer in last.values()], np.int64)
    wrong = (given.reshape(-1, counts.shape[1]) != counts[rows]).any(axis=1)
    given_scores = np.array([answer.score for answer in last.values()], np.float64)
    other = ~(np.abs(given_scores - np.asarray(scores)[rows]) <= TOLERANCE)
    return Check(len(last), duplicates, int(wrong.sum()), int(other.sum()), taken_back)
