"""Scored events → prediction records, and audit records for a share of the keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat

import bytewax.operators as op
import msgspec
import numpy as np
from bytewax.dataflow import Stream, operator

from dataflows import measure
from dataflows.kafka.records import OutRecords
from dataflows.measure import measured
from dataflows.metrics import METRICS
from dataflows.overload import Way
from features.batch import Column, EventBatch
from features.declare import FeatureSet
from features.keys import shards_of
from model.package import DECISIONS

#: How a prediction was made: by the model, from the card's last score, by a rule, or not at all.
SCORE_MODES = ("full", "cached", "rule", "shed")

_AUDIT_BUCKETS = 10_000
#: By the code in the column ``decision``, plus 1.
_DECISIONS = (None, *DECISIONS)
_SHED = ["" if way <= Way.REDUCED else way.name.lower() for way in Way]
#: Columns of `dataflows.steps.lookup`: odd where the online store did not answer.
_SERVED = "__served"
_TENS = 10 ** np.arange(1, 19)


class Reason(msgspec.Struct, gc=False):
    """A feature, and by how much the score falls when it takes its usual value instead."""

    feature: str
    contribution: float


class Prediction(msgspec.Struct, gc=False, omit_defaults=True):
    """The value of a record on the predictions topic; its key is the card."""

    transaction_id: str
    card_id: str
    terminal_id: str
    event_time: int
    #: Probability of fraud; null if a feature was not finite (the decision is then review).
    score: float | None
    #: null if the event was shed.
    decision: str | None
    model_version: str
    schema_hash: str
    #: Age of the event when it was answered: ms since the broker's append.
    latency_ms: int
    #: full: by the model; cached: the card's last score; rule: by a rule, score null; shed: not
    #: answered, score and decision null.
    score_mode: str
    #: Profile views that were answered from an old cache, or not at all, by a store that failed.
    without: list[str] = []
    reasons: list[Reason] = []
    #: Why the event was shed: sampled, dropped or skipped, see `dataflows.overload.Way`.
    shed: str = ""


class AuditRecord(msgspec.Struct, gc=False):
    """The value of a record on the audit topic: what the model saw, exactly."""

    transaction_id: str
    card_id: str
    terminal_id: str
    event_time: int
    topic: str
    partition: int
    offset: int
    schema_hash: str
    model_version: str
    score: float | None
    features: dict[str, float | None]


@operator
def encode(
    step_id: str,
    up: Stream[EventBatch],
    features: FeatureSet,
    model_version: str,
    topics: Sequence[str],
    notice: Callable[[EventBatch], None] | None = None,
    now_s: Callable[[], float] = time.time,
) -> Stream[OutRecords]:
    """Write each event's prediction as JSON, keyed by card; `notice` is told each batch."""
    encoder = msgspec.json.Encoder()

    def run(batches: list[EventBatch]) -> Iterable[OutRecords]:
        now_ms = round(now_s() * 1000)
        for batch in batches:
            latency_ms = now_ms - batch["append_time"]
            decided = np.bincount(batch["decision"] + 1, minlength=len(_DECISIONS))
            for decision, n in zip(DECISIONS, decided[1:].tolist(), strict=True):
                if n:
                    METRICS.decisions.labels(decision).inc(n)
            if notice is not None:
                notice(batch)
            modes = _modes(batch)
            append_time, shed = batch["append_time"], None
            if decided[0]:  # what is not answered has no latency, and would hide the others'
                shed = batch["decision"] < 0
                append_time = np.where(shed, -1, append_time)
            predictions = map(
                Prediction,
                texts(batch["transaction_id"]),
                texts(batch["card_id"]),
                texts(batch["terminal_id"]),
                batch["event_time"].tolist(),
                map(_none_if_nan, batch["score"].tolist()),
                map(_DECISIONS.__getitem__, (batch["decision"] + 1).tolist()),
                repeat(model_version),
                repeat(features.schema_hash),
                latency_ms.tolist(),
                modes,
                _without(batch),
                _reasons(batch, features.names),
                _shed(batch),
            )
            yield OutRecords(
                keys=batch["card_id"].tolist(),
                values=list(map(encoder.encode, predictions)),
                append_time=append_time,
                event_ids=batch["transaction_id"].tolist(),
                origins=origins(batch, topics),
                headers=None if measure.tracing is None else measure.tracing.headers(batch, modes),
                clock_bytes=_digits(latency_ms),
                shed=shed,
            )

    return op.flat_map_batch("encode", up, measured("encode", run, last=True))


@operator
def audit(
    step_id: str,
    up: Stream[EventBatch],
    features: FeatureSet,
    model_version: str,
    topics: Sequence[str],
    share: float,
) -> Stream[OutRecords]:
    """Write the whole feature vector of a share of the cards, the same cards always."""
    encoder = msgspec.json.Encoder()

    def run(batches: list[EventBatch]) -> Iterable[OutRecords]:
        for batch in batches:
            buckets = shards_of(batch["card_id"], _AUDIT_BUCKETS)
            rows = np.flatnonzero(buckets < share * _AUDIT_BUCKETS)
            if len(rows) == 0:
                continue
            chosen = batch.take(rows)
            records = map(
                AuditRecord,
                texts(chosen["transaction_id"]),
                texts(chosen["card_id"]),
                texts(chosen["terminal_id"]),
                chosen["event_time"].tolist(),
                map(topics.__getitem__, chosen["source"].tolist()),
                chosen["partition"].tolist(),
                chosen["offset"].tolist(),
                repeat(features.schema_hash),
                repeat(model_version),
                map(_none_if_nan, chosen["score"].tolist()),
                (
                    dict(zip(features.names, map(_none_if_nan, vector), strict=True))
                    for vector in chosen["#features"].tolist()
                ),
            )
            yield OutRecords(
                keys=chosen["card_id"].tolist(),
                values=list(map(encoder.encode, records)),
                append_time=np.full(len(chosen), -1),
                event_ids=chosen["transaction_id"].tolist(),
                origins=origins(chosen, topics),
            )

    return op.flat_map_batch("encode", up, run)


def origins(batch: EventBatch, topics: Sequence[str]) -> list[bytes]:
    """Return where each event was read, ``topic/partition/offset``."""
    names = [topic.encode() for topic in topics]
    columns = (batch[name].tolist() for name in ("source", "partition", "offset"))
    return [b"%b/%d/%d" % (names[s], p, o) for s, p, o in zip(*columns, strict=True)]


def _digits(numbers: Column) -> Column:
    """Return how many characters each integer has in JSON.

    >>> _digits(np.array([0, 9, 10, -10])).tolist()
    [1, 1, 2, 3]
    """
    return 1 + np.searchsorted(_TENS, np.abs(numbers), side="right") + (numbers < 0)


def texts(column: Column) -> Iterable[str]:
    """Decode a column of keys."""
    return map(bytes.decode, column.tolist())


def _none_if_nan(value: float) -> float | None:
    return None if value != value else value


def _modes(batch: EventBatch) -> list[str]:
    if "score_mode" not in batch:
        METRICS.predictions.labels(SCORE_MODES[0]).inc(len(batch))
        return [SCORE_MODES[0]] * len(batch)
    modes = batch["score_mode"]
    for mode, n in enumerate(np.bincount(modes).tolist()):
        METRICS.predictions.labels(SCORE_MODES[mode]).inc(n)
    return [SCORE_MODES[mode] for mode in modes.tolist()]


def _shed(batch: EventBatch) -> Iterable[str]:
    if "way" not in batch:
        return repeat("")
    return map(_SHED.__getitem__, batch["way"].tolist())


def _without(batch: EventBatch) -> Iterable[list[str]]:
    failed = {
        name.removesuffix(_SERVED): batch[name] & 1 == 1 for name in batch if name.endswith(_SERVED)
    }
    if not any(rows.any() for rows in failed.values()):
        return repeat([])
    columns = zip(*(rows.tolist() for rows in failed.values()), strict=True)
    return ([view for view, has in zip(failed, row, strict=True) if has] for row in columns)


def _reasons(batch: EventBatch, names: Sequence[str]) -> list[list[Reason]]:
    reasons: list[list[Reason]] = [[]] * len(batch)
    if "#reasons" not in batch:
        return reasons
    for row in np.flatnonzero(batch["decision"] > 0).tolist():
        reasons[row] = [
            Reason(names[feature], round(contribution, 6))
            for feature, contribution in zip(
                batch["#reasons"][row].tolist(), batch["#contributions"][row].tolist(), strict=True
            )
            if feature >= 0
        ]
    return reasons
