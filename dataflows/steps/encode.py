"""Scored events → prediction records, and audit records for a share of the keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat

import bytewax.operators as op
import msgspec
import numpy as np
from bytewax.dataflow import Stream, operator

from dataflows.kafka.records import OutRecords
from features.batch import Column, EventBatch
from features.declare import FeatureSet
from features.keys import shards_of
from model.package import DECISIONS

_AUDIT_BUCKETS = 10_000
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
    decision: str
    model_version: str
    schema_hash: str
    #: ms from the broker's append of the event to its scoring.
    latency_ms: int
    reasons: list[Reason] = []


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
    now_s: Callable[[], float] = time.time,
) -> Stream[OutRecords]:
    """Write each event's prediction as JSON, keyed by card."""
    encoder = msgspec.json.Encoder()

    def run(batches: list[EventBatch]) -> Iterable[OutRecords]:
        now_ms = round(now_s() * 1000)
        for batch in batches:
            latency_ms = now_ms - batch["append_time"]
            predictions = map(
                Prediction,
                _texts(batch["transaction_id"]),
                _texts(batch["card_id"]),
                _texts(batch["terminal_id"]),
                batch["event_time"].tolist(),
                map(_none_if_nan, batch["score"].tolist()),
                map(DECISIONS.__getitem__, batch["decision"].tolist()),
                repeat(model_version),
                repeat(features.schema_hash),
                latency_ms.tolist(),
                _reasons(batch, features.names),
            )
            yield OutRecords(
                keys=batch["card_id"].tolist(),
                values=list(map(encoder.encode, predictions)),
                append_time=batch["append_time"],
                event_ids=batch["transaction_id"].tolist(),
                origins=_origins(batch, topics),
                clock_bytes=_digits(latency_ms),
            )

    return op.flat_map_batch("encode", up, run)


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
                _texts(chosen["transaction_id"]),
                _texts(chosen["card_id"]),
                _texts(chosen["terminal_id"]),
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
                origins=_origins(chosen, topics),
            )

    return op.flat_map_batch("encode", up, run)


def _origins(batch: EventBatch, topics: Sequence[str]) -> list[bytes]:
    names = [topic.encode() for topic in topics]
    columns = (batch[name].tolist() for name in ("source", "partition", "offset"))
    return [b"%b/%d/%d" % (names[s], p, o) for s, p, o in zip(*columns, strict=True)]


def _digits(numbers: Column) -> Column:
    """Return how many characters each integer has in JSON.

    >>> _digits(np.array([0, 9, 10, -10])).tolist()
    [1, 1, 2, 3]
    """
    return 1 + np.searchsorted(_TENS, np.abs(numbers), side="right") + (numbers < 0)


def _texts(column: Column) -> Iterable[str]:
    return map(bytes.decode, column.tolist())


def _none_if_nan(value: float) -> float | None:
    return None if value != value else value


def _reasons(batch: EventBatch, names: Sequence[str]) -> list[list[Reason]]:
    reasons: list[list[Reason]] = [[]] * len(batch)
    for row in np.flatnonzero(batch["decision"]).tolist():
        reasons[row] = [
            Reason(names[feature], round(contribution, 6))
            for feature, contribution in zip(
                batch["#reasons"][row].tolist(), batch["#contributions"][row].tolist(), strict=True
            )
            if feature >= 0
        ]
    return reasons
