"""The latest flagged transactions, kept for people who look at fraud."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from dataflows.steps.encode import SCORE_MODES, Reason
from features.batch import EventBatch
from features.events import MONEY_SCALE
from model.package import DECISIONS

_KEPT = (
    "transaction_id", "card_id", "terminal_id", "event_time", "append_time", "source", "partition",
    "offset", "score", "decision",
)  # fmt: skip
#: The last three are the model's, and not there if it was not asked.
_KEPT_IF_THERE = ("amount", "score_mode", "#features", "#reasons", "#contributions")


class Flagged(msgspec.Struct, frozen=True):
    """A transaction that was not approved, with all that is known of it. Times in ms, UTC."""

    #: 1 for the first one flagged by this process, and so on.
    number: int
    transaction_id: str
    card_id: str
    terminal_id: str
    event_time: int
    #: In major units; None if events have no amount.
    amount: float | None
    #: None if a feature was not finite, or if a rule decided.
    score: float | None
    decision: str
    score_mode: str
    model_version: str
    schema_hash: str
    #: When the broker appended the event, and when it was flagged.
    append_time: int
    flagged_time: int
    topic: str
    partition: int
    offset: int
    #: The features that raised the score most, and all, in model order; both empty for answers
    #: without the model.
    reasons: list[Reason]
    features: dict[str, float | None]


class Found(msgspec.Struct, frozen=True):
    """The answer to a question about the flagged transactions, newest first."""

    flagged: list[Flagged]
    #: How many match, those beyond the limit included.
    matching: int
    #: How many are kept, of how many that were flagged by this process.
    kept: int
    total: int
    capacity: int


#: Rows are merged until a chunk has this share of the capacity.
_CHUNKS = 8


@dataclass(frozen=True)
class _Chunk:
    """Flagged rows of some batches, with the time of it; the first has number `first`."""

    first: int
    rows: EventBatch
    model_version: str

    def with_next(self, newer: _Chunk) -> _Chunk:
        """Return the rows of both."""
        rows = {name: np.concatenate([self.rows[name], newer.rows[name]]) for name in self.rows}
        return _Chunk(self.first, EventBatch(rows), self.model_version)


class Recent:
    """Keep the newest `capacity` flagged transactions of this process.

    One thread adds, any number read. Rows stay columns until somebody asks for them, so that a
    storm of flagged transactions costs the flow no Python for each. Those of small batches are
    merged, a logarithmic number of times each, so that a reader meets few chunks. Memory is bounded
    by twice `capacity` rows.

    Args:
        features: names of the columns of ``#features``.
        topics: input topics by source code.
        schema_hash: of the feature set.
        capacity: how many are kept, at least 1.
    """

    def __init__(
        self,
        features: Sequence[str],
        topics: Sequence[str],
        schema_hash: str,
        capacity: int = 500,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is a number of transactions, at least 1; got {capacity}")
        self.capacity = capacity
        self._features, self._topics = tuple(features), tuple(topics)
        self._schema_hash, self._now_s = schema_hash, now_s
        self._chunks: deque[_Chunk] = deque()
        self._rows = self._total = 0
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        """Return how many were flagged by this process so far."""
        return self._total

    def add(self, batch: EventBatch, model_version: str) -> None:
        """Keep the rows of a batch that were flagged; a microsecond if none was.

        Takes batches as the steps ``score`` and ``short_answer`` leave them. Without the column
        ``score_mode`` all answers are the model's. What was shed (decision −1) is not flagged.
        """
        decided = batch["decision"] > 0
        flagged = int(np.count_nonzero(decided))
        if flagged == 0:
            return
        rows = np.flatnonzero(decided)[-self.capacity :]
        names = (*_KEPT, *(name for name in _KEPT_IF_THERE if name in batch))
        kept = {name: batch[name].take(rows, axis=0) for name in names}
        kept["flagged_time"] = np.full(len(rows), round(self._now_s() * 1000))
        with self._lock:
            self._total += flagged
            newest = _Chunk(self._total - len(rows) + 1, EventBatch(kept), model_version)
            # A chunk is merged with one of at least its size, as in a binary counter.
            while self._chunks and self._go_together(self._chunks[-1], newest):
                newest = self._chunks.pop().with_next(newest)
            self._chunks.append(newest)
            self._rows += len(rows)
            while self._rows - len(self._chunks[0].rows) >= self.capacity:
                self._rows -= len(self._chunks.popleft().rows)

    def _go_together(self, last: _Chunk, newest: _Chunk) -> bool:
        return (
            len(last.rows) <= len(newest.rows)
            and len(last.rows) + len(newest.rows) <= max(self.capacity // _CHUNKS, 2)
            and last.first + len(last.rows) == newest.first
            and last.model_version == newest.model_version
            and list(last.rows) == list(newest.rows)
        )

    def find(
        self,
        *,
        card: str = "",
        terminal: str = "",
        card_prefix: str = "",
        terminal_prefix: str = "",
        decision: str = "",
        limit: int = 100,
    ) -> Found:
        """Return the newest flagged transactions: of a card, of a terminal, of cards or terminals
        whose ids begin with something, of a decision; all by default."""
        with self._lock:
            chunks, total = list(self._chunks), self._total
        oldest = total - self.capacity  # what has a number up to this one is over capacity
        found: list[Flagged] = []
        matching = 0
        for chunk in reversed(chunks):
            wanted = np.arange(len(chunk.rows)) + chunk.first > oldest
            for name, whole, beginning in (
                ("card_id", card, card_prefix),
                ("terminal_id", terminal, terminal_prefix),
            ):
                if whole:
                    wanted &= chunk.rows[name] == whole.encode()
                if beginning:
                    wanted &= np.strings.startswith(chunk.rows[name], beginning.encode())
            if decision:
                wanted &= chunk.rows["decision"] == DECISIONS.index(decision)
            rows = np.flatnonzero(wanted)
            matching += len(rows)
            if len(found) < limit:
                found += self._records(chunk, rows[::-1][: limit - len(found)])
        return Found(found, matching, min(total, self.capacity), total, self.capacity)

    def get(self, transaction_id: str) -> Flagged | None:
        """Return the newest record of a transaction, or None if none is kept."""
        wanted = transaction_id.encode()
        with self._lock:
            chunks, total = list(self._chunks), self._total
        for chunk in reversed(chunks):
            numbers = np.arange(len(chunk.rows)) + chunk.first
            same = (chunk.rows["transaction_id"] == wanted) & (numbers > total - self.capacity)
            rows = np.flatnonzero(same)
            if len(rows):
                return next(self._records(chunk, rows[-1:]))
        return None

    def _records(self, chunk: _Chunk, rows: npt.NDArray[np.int64]) -> Iterator[Flagged]:
        taken = chunk.rows.take(rows)
        columns = {name: taken[name].tolist() for name in taken}
        for i, row in enumerate(rows.tolist()):
            value = {name: column[i] for name, column in columns.items()}
            vector = map(_none_if_nan, value.get("#features", ()))
            reasons = zip(value.get("#reasons", ()), value.get("#contributions", ()), strict=True)
            yield Flagged(
                number=chunk.first + row,
                transaction_id=value["transaction_id"].decode(),
                card_id=value["card_id"].decode(),
                terminal_id=value["terminal_id"].decode(),
                event_time=value["event_time"],
                amount=value["amount"] / MONEY_SCALE if "amount" in value else None,
                score=_none_if_nan(value["score"]),
                decision=DECISIONS[value["decision"]],
                score_mode=SCORE_MODES[value.get("score_mode", 0)],
                model_version=chunk.model_version,
                schema_hash=self._schema_hash,
                append_time=value["append_time"],
                flagged_time=value["flagged_time"],
                topic=self._topics[value["source"]],
                partition=value["partition"],
                offset=value["offset"],
                reasons=[Reason(self._features[f], by) for f, by in reasons if f >= 0],
                features=dict(zip(self._features, vector, strict="#features" in value)),
            )


def _none_if_nan(value: float) -> float | None:
    return None if value != value else value
