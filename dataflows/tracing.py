"""Follow single events through the flow: W3C trace context in, OpenTelemetry spans out.

Only events whose ``traceparent`` header says that they are sampled cost much. Each has one span,
from the broker's append to its prediction, a child of the sender's; the prediction's header names
that span, so that a reader can go on. Each step that handles sampled events has one span a
micro-batch, however many they are: a child of the first one's, with links to the others'.

A sender that samples everything slows the flow down by a few percent at most: `MOST_EVENTS` a
second have a span of their own, of the others the header is passed on as it came; and spans of
steps link to `MOST_LINKS` events a second, all steps together.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from confluent_kafka import Message
from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, TraceFlags

from dataflows.kafka.dead_letter import read_headers
from dataflows.kafka.records import Header
from features.batch import Column, EventBatch

TRACEPARENT = "traceparent"
#: Column of a batch: the header of each event, S55; empty where there is none.
COLUMN = "traceparent"

#: https://www.w3.org/TR/trace-context/#traceparent-header
_LENGTH = 55
_FLAGS = slice(53, 55)
_WELL_FORMED = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
).fullmatch
#: Events that have a span of their own, in a second of the clock: 47 µs each.
MOST_EVENTS = 200
#: Events that spans of steps name, in a second of the clock, over all steps: 5 µs each, and 40 µs
#: for a span. For each event with a span of its own, those of the steps it goes through.
MOST_LINKS = 8 * MOST_EVENTS
_MOST_OF_A_BATCH = 128  # which is what the SDK keeps


class Tracing:
    """Make spans of what happens to sampled events.

    Args:
        exporter: where spans go, in batches, from a thread of its own; what it cannot take is
            dropped, and the flow does not wait for it.
        service: name that the spans are filed under.
    """

    def __init__(self, exporter: SpanExporter, service: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("dataflows")
        self._second, self._left, self._links_left = 0, MOST_EVENTS, MOST_LINKS

    @staticmethod
    def column(messages: Sequence[Message]) -> Column:
        """Return the ``traceparent`` of each record, S55 [n]; empty where none is well-formed."""
        return np.array([_of(read_headers(message)) for message in messages], dtype=f"S{_LENGTH}")

    def step(self, stage: str, seconds: float, batches: Iterable[Any]) -> None:
        """Note that a step took so long, until now, for these batches.

        One span for each, in the trace of its first sampled event, with links to the others, 127
        at most, and no more than the second has left: how many there were is an attribute.
        """
        self._refill()
        for batch in batches:
            rows = sampled(batch)
            named = rows[: min(self._links_left, _MOST_OF_A_BATCH)]
            if not len(named):
                continue
            self._links_left -= len(named)
            end_ns = time.time_ns()
            contexts = [_context(each) for each in batch[COLUMN][named].tolist()]
            span = self._tracer.start_span(
                stage,
                trace.set_span_in_context(NonRecordingSpan(contexts[0])),
                attributes={"batch.events": len(batch), "batch.sampled": len(rows)},
                links=[Link(context) for context in contexts[1:]],
                start_time=end_ns - round(seconds * 1e9),
            )
            span.end(end_ns)

    def headers(self, batch: EventBatch, modes: Sequence[str]) -> list[list[Header]] | None:
        """Make the span of each sampled event; return the header of each prediction.

        `modes` [n] says how it was made. None: no event has a header. One that is not sampled, or
        one too many, is passed on as it came.
        """
        came = batch[COLUMN].tolist() if COLUMN in batch else []
        if not any(came):
            return None
        gone = list(came)
        self._refill()
        followed = sampled(batch)[: self._left].tolist()
        self._left -= len(followed)
        for row in followed:
            gone[row] = self._event(batch, row, modes[row])
        return [[(TRACEPARENT, each)] if each else [] for each in gone]

    def _refill(self) -> None:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._left, self._links_left = second, MOST_EVENTS, MOST_LINKS

    def _event(self, batch: EventBatch, row: int, mode: str) -> bytes:
        # No card, no amount: traces are read by more people than transactions may be.
        span = self._tracer.start_span(
            "predict",
            trace.set_span_in_context(NonRecordingSpan(_context(batch[COLUMN][row]))),
            kind=SpanKind.CONSUMER,
            attributes={
                "messaging.system": "kafka",
                "messaging.destination.partition.id": str(batch["partition"][row]),
                "messaging.kafka.offset": int(batch["offset"][row]),
                "score_mode": mode,
            },
            start_time=int(batch["append_time"][row]) * 1_000_000,
        )
        span.end()
        own = span.get_span_context()
        return b"00-%032x-%016x-%02x" % (own.trace_id, own.span_id, own.trace_flags)

    def close(self) -> None:
        """Export what is left, for some seconds at most."""
        self._provider.force_flush(2_000)
        self._provider.shutdown()


def otlp(endpoint: str) -> SpanExporter:
    """Return what sends spans to an OTLP/HTTP collector, such as ``http://collector:4318``.

    Headers, certificates and the like come from the standard ``OTEL_EXPORTER_OTLP_…`` variables.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")


def sampled(batch: Any) -> Column:
    """Return the rows of a batch whose sender wants them traced."""
    if not isinstance(batch, EventBatch) or COLUMN not in batch:
        return np.empty(0, np.intp)
    flags = np.ascontiguousarray(batch[COLUMN]).view("S1").reshape(len(batch), _LENGTH)[:, -1]
    # The lowest bit of the last hex digit; nothing is no digit.
    return np.flatnonzero(np.isin(flags, _ODD))


_ODD = np.array([b"1", b"3", b"5", b"7", b"9", b"b", b"d", b"f"])


def _of(headers: list[Header] | None) -> bytes:
    for name, value in headers or ():
        if name == TRACEPARENT and value is not None and _WELL_FORMED(value):
            return value
    return b""


def _context(value: bytes) -> SpanContext:
    return SpanContext(
        int(value[3:35], 16), int(value[36:52], 16), True, TraceFlags(int(value[_FLAGS], 16))
    )
