"""A sampled event can be followed through the real flow, from its sender to its prediction."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.integration.flow import (
    FlowEnv,
    Sent,
    flow_env,  # noqa: F401
    send,
    tiny_feast,  # noqa: F401
    tiny_model,  # noqa: F401
)
from tests.integration.test_overload import transactions

STEPS = {"decode", "card", "terminal", "profiles", "score", "encode"}


class Collector(ThreadingHTTPServer):
    """Take spans as an OpenTelemetry collector does, OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def traceparent(n: int, sampled: bool) -> bytes:
    return b"00-%032x-%016x-%02x" % (0xABC000 + n, 0xDEF000 + n, sampled)


def test_a_sampled_event_can_be_followed(
    flow_env: FlowEnv,  # noqa: F811
    collector: Collector,
) -> None:
    """Every tenth is; another tenth has a header that says no; the others have none."""
    env, events = flow_env, transactions(200)

    def headers(n: int) -> list[tuple[str, bytes | None]]:
        return [("traceparent", traceparent(n, n % 10 == 0))] if n % 10 < 2 else []

    send(
        env.broker,
        [
            Sent(env.topics["transactions"], json.dumps(event).encode(), headers=headers(n))
            for n, event in enumerate(events)
        ],
    )
    flow = env.flow(TRACING_ENDPOINT=collector.url).start()
    predictions = env.await_count("predictions", len(events))
    assert flow.stop() == 0, flow.log  # what is left is exported at the end

    followed = [span for span in collector.spans if span.name == "predict"]
    own = {span.trace_id.hex(): span for span in followed}
    assert len(own) == len(followed) == 20
    for message in predictions:
        n = int(json.loads(message.value())["transaction_id"][2:])
        found = dict(message.headers()).get("traceparent")
        if n % 10 == 0:
            span = own[f"{0xABC000 + n:032x}"]
            assert span.parent_span_id.hex() == f"{0xDEF000 + n:016x}"
            assert found == b"00-%032x-%b-01" % (0xABC000 + n, span.span_id.hex().encode())
        else:
            assert found == (traceparent(n, False) if n % 10 == 1 else None)

    # Each step belongs to every event that went through it: as its child, or by a link.
    for step in STEPS:
        seen: set[str] = set()
        for span in (span for span in collector.spans if span.name == step):
            seen |= {span.trace_id.hex(), *(link.trace_id.hex() for link in span.links)}
        assert seen == own.keys(), step
    assert {span.name for span in collector.spans} == STEPS | {"predict"}


def test_a_collector_that_is_gone_does_not_hold_up_the_flow(
    flow_env: FlowEnv,  # noqa: F811
    collector: Collector,
) -> None:
    collector.shutdown()
    collector.server_close()
    env, events = flow_env, transactions(50)
    flow = env.flow(TRACING_ENDPOINT=collector.url).start()
    header = [("traceparent", traceparent(1, True))]
    topic = env.topics["transactions"]
    send(env.broker, [Sent(topic, json.dumps(event).encode(), headers=header) for event in events])
    env.await_count("predictions", len(events), timeout_s=20)
    assert flow.stop(timeout_s=30) == 0, flow.log
