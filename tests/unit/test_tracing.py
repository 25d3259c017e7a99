"""Spans of sampled events, and of nothing else."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Message
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dataflows import tracing as module
from dataflows.tracing import MOST_EVENTS, MOST_LINKS, Tracing, sampled
from features.batch import EventBatch

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT = f"00-{TRACE}-{SPAN}-01".encode(), f"00-{TRACE}-{SPAN}-00".encode()


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> Tracing:
    return Tracing(spans, "test")


def message(*headers: tuple[str, bytes | None]) -> Message:
    return Message(topic="t", partition=0, offset=0, value=b"{}", headers=list(headers))


def batch(*came: bytes) -> EventBatch:
    n = len(came)
    return EventBatch(
        {
            "traceparent": np.array(came, "S55"),
            "partition": np.full(n, 3, np.int32),
            "offset": np.arange(n) + 70,
            "append_time": np.full(n, 1_700_000_000_000),
        }
    )


@pytest.mark.parametrize(
    ("came", "kept"),
    [
        (SAMPLED, True),
        (NOT, True),
        (b"cc" + SAMPLED[2:], True),  # a later version: the same fields come first
        (b"ff" + SAMPLED[2:], False),
        (SAMPLED.upper(), False),
        (SAMPLED[:-1], False),
        (SAMPLED + b"-more", False),
        (b"00-" + b"0" * 32 + SAMPLED[35:], False),
        (SAMPLED[:36] + b"0" * 16 + SAMPLED[52:], False),
        (b"00-" + b"g" * 32 + SAMPLED[35:], False),
        (b"00-" + b"+" + b"a" * 31 + SAMPLED[35:], False),
        (b"", False),
        (None, False),
    ],
)
def test_only_what_the_standard_allows_is_taken_from_outside(
    came: bytes | None, kept: bool
) -> None:
    column = Tracing.column([message(("other", b"x"), ("traceparent", came)), message()])
    assert column.dtype == np.dtype("S55")
    assert column.tolist() == [came if kept else b"", b""]


def test_the_flag_byte_decides() -> None:
    flags = [b"%02x" % flag for flag in range(256)]
    rows = sampled(batch(*(SAMPLED[:-2] + flag for flag in flags), b""))
    assert rows.tolist() == [flag for flag in range(256) if flag & 1]


def test_nothing_is_done_for_events_that_nobody_follows(
    tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    untraced: list[Any] = [batch(b"", b""), batch().take(slice(0)), "no batch"]
    tracing.step("score", 0.1, [*untraced, batch(NOT)])
    assert tracing.headers(batch(b"", b""), ["full"] * 2) is None
    tracing.close()
    assert spans.get_finished_spans() == ()


def test_a_step_has_one_span_a_batch_with_links(
    tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    second = SAMPLED.replace(TRACE.encode(), b"a" * 32)
    tracing.step("score", 0.25, [batch(NOT, SAMPLED, b"", second)])
    tracing.close()
    (span,) = spans.get_finished_spans()
    assert span.name == "score"
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" == f"{TRACE}-{SPAN}"
    assert [f"{link.context.trace_id:032x}" for link in span.links] == ["a" * 32]
    assert span.end_time - span.start_time == 250_000_000
    assert dict(span.attributes) == {"batch.events": 4, "batch.sampled": 2}


def test_a_prediction_names_the_span_that_made_it(
    tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    headers = tracing.headers(batch(NOT, SAMPLED, b""), ["full", "cached", "full"])
    tracing.close()
    (span,) = spans.get_finished_spans()
    own = f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"
    assert headers == [[("traceparent", NOT)], [("traceparent", own.encode())], []]
    assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-01", own)
    assert SPAN not in own
    assert f"{span.parent.span_id:016x}" == SPAN
    assert span.start_time == 1_700_000_000_000 * 1_000_000
    assert span.attributes["messaging.kafka.offset"] == 71
    assert span.attributes["score_mode"] == "cached"


def test_a_sender_that_samples_everything_is_followed_in_part(
    tracing: Tracing, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 7.0
    clock = SimpleNamespace(monotonic=lambda: now_s, time_ns=time.time_ns)
    monkeypatch.setattr(module, "time", clock)
    every = [SAMPLED] * (MOST_EVENTS - 10)
    followed = 0
    for _ in range(3):
        headers = tracing.headers(batch(*every), ["full"] * len(every))
        assert headers is not None and all(headers)
        followed += sum(header != [("traceparent", SAMPLED)] for header in headers)
    assert followed == MOST_EVENTS
    for _ in range(20):
        tracing.step("score", 0.1, [batch(*every)])
    now_s = 8.0
    headers = tracing.headers(batch(SAMPLED), ["full"])
    assert headers != [[("traceparent", SAMPLED)]]
    tracing.step("emit", 0.1, [batch(SAMPLED)])
    tracing.close()
    steps = [span for span in spans.get_finished_spans() if span.name != "predict"]
    assert steps.pop().name == "emit"
    assert {span.name for span in steps} == {"score"}
    assert sum(1 + len(span.links) for span in steps) == MOST_LINKS
