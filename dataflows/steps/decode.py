"""Records → events; what cannot be an event is refused singly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import bytewax.operators as op
import numpy as np
from bytewax.dataflow import Stream, operator

from dataflows import measure
from dataflows.kafka.dead_letter import dead_letters
from dataflows.kafka.records import OutRecords, Records
from dataflows.measure import measured
from dataflows.metrics import METRICS
from dataflows.steps.answered import count_rebuilt
from features.batch import EventBatch
from features.events import EventDecoder, Refusal


@dataclass(frozen=True)
class DecodeOut:
    """Streams returned from `decode`."""

    accepted: Stream[EventBatch]
    refused: Stream[OutRecords]


@operator
def decode(
    step_id: str,
    up: Stream[Records],
    decoder: EventDecoder,
    topics: Sequence[str],
) -> DecodeOut:
    """Decode and validate records; a record's ``source`` indexes the decoder's event types.

    Accepted events carry where they come from (``source``, ``partition``, ``offset``,
    ``append_time``) and ``seq``, their place in the worker's order. Refused ones become dead
    letters with a reason. Where the source says which records are ``known`` (an earlier life has
    answered them), so do the events; refused ones of these are only counted.
    """
    seq = 0

    def run(batches: list[Records]) -> Iterable[EventBatch | OutRecords]:
        nonlocal seq
        for records in batches:
            decoded = decoder(
                [message.value() for message in records.messages],
                records.source,
                records.append_time,
            )
            refused, known = decoded.refused, records.known
            if refused and known is not None:  # those are dead letters already
                rows = np.array([refusal.row for refusal in refused])
                count_rebuilt(records.source[rows[known[rows]]], topics)
                refused = [refusal for refusal in refused if not known[refusal.row]]
            account(records, refused)
            METRICS.batch_events.observe(len(records))
            if refused:
                yield dead_letters(
                    [records.messages[refusal.row] for refusal in refused],
                    [refusal.reason for refusal in refused],
                    [refusal.detail for refusal in refused],
                )
            if len(decoded.events) == 0:
                continue
            rows = decoded.rows
            kept: Any = slice(None) if len(rows) == len(records) else rows
            events = decoded.events
            if measure.tracing is not None:
                traced = measure.tracing.column(records.messages)
                events = events.with_columns({"traceparent": traced[kept]})
            if known is not None:
                events = events.with_columns({"known": known[kept]})
            yield events.with_columns(
                {
                    "source": records.source[kept],
                    "partition": records.partition[kept],
                    "offset": records.offset[kept],
                    "append_time": records.append_time[kept],
                    "seq": seq + rows,
                }
            )
            seq += len(records)

    def account(records: Records, refused: Sequence[Refusal]) -> None:
        read = np.bincount(records.source, minlength=len(topics))
        for topic, n in zip(topics, read.tolist(), strict=True):
            METRICS.count(topic, "read", n)
        for refusal in refused:
            topic = topics[int(records.source[refusal.row])]
            METRICS.count(topic, "dead_lettered", 1)
            METRICS.dead_letters.labels(topic, refusal.reason).inc()

    both = op.flat_map_batch("decode", up, measured("decode", run))
    branches = op.branch("accepted", both, lambda item: isinstance(item, EventBatch))
    return DecodeOut(branches.trues, branches.falses)  # type: ignore[arg-type]
