"""Serving in a thread: it answers when it says so, and goes when it is told."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import urllib.request

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from dataflows.serve import ServeError, serve


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


async def broken(request: Request) -> Response:
    raise RuntimeError("of the test")


APP = Starlette(routes=[Route("/", hello), Route("/broken", broken)])


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        body: bytes = response.read()
        return body.decode()


def test_it_answers_at_once_at_a_free_port() -> None:
    with serve(APP, "127.0.0.1", 0) as server:
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert get(server.url) == "hello"


def test_it_runs_beside_the_process_and_not_for_it() -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with serve(APP, "127.0.0.1", 0) as server:
        thread = next(t for t in threading.enumerate() if t.name == f"serve-{server.port}")
        assert thread.daemon
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
        get(server.url)
    assert not thread.is_alive()


def test_the_port_is_free_again_after_closing() -> None:
    with serve(APP, "127.0.0.1", 0) as server:
        port = server.port
        idle = socket.create_connection(("127.0.0.1", port))  # a browser that keeps its connection
    with serve(APP, "127.0.0.1", port) as again:
        assert get(again.url) == "hello"
    again.close()
    idle.close()


def test_a_port_that_is_taken_is_named() -> None:
    with (
        serve(APP, "127.0.0.1", 0) as server,
        pytest.raises(ServeError, match=f"127.0.0.1, port {server.port}: something else listens"),
    ):
        serve(APP, "127.0.0.1", server.port)


@pytest.mark.parametrize(
    ("host", "port", "match"),
    [
        ("192.0.2.1", 0, "no such address"),  # of TEST-NET-1: nobody's
        ("no such host.invalid", 0, "cannot listen at no such host.invalid"),
        ("127.0.0.1", 70_000, "port 70000"),
    ],
)
def test_an_address_that_cannot_be_listened_at_is_named(host: str, port: int, match: str) -> None:
    with pytest.raises(ServeError, match=match):
        serve(APP, host, port)


def test_requests_are_not_logged_but_failures_are(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), serve(APP, "127.0.0.1", 0) as server:
        get(server.url)
        assert [r for r in caplog.records if r.name.startswith("uvicorn")] == []
        with pytest.raises(urllib.error.HTTPError, match="500"):
            get(f"{server.url}/broken")
    assert [r.levelname for r in caplog.records if r.name.startswith("uvicorn")] == ["ERROR"]


def test_several_are_served_beside_each_other() -> None:
    with serve(APP, "127.0.0.1", 0) as one, serve(APP, "localhost", 0) as two:
        assert one.port != two.port
        assert get(one.url) == get(two.url) == "hello"


def test_who_connects_and_asks_for_nothing_takes_nobody_s_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dataflows.serve._SILENCE_S", 0.2)
    with serve(APP, "127.0.0.1", 0) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(150)]
        assert get(server.url) == "hello"
        for connection in idle:
            connection.settimeout(10)
            assert connection.recv(1) == b"", "hung up on"
            connection.close()


def test_a_request_half_sent_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflows.serve._SILENCE_S", 0.2)
    with (
        serve(APP, "127.0.0.1", 0) as server,
        socket.create_connection(("127.0.0.1", server.port)) as slow,
    ):
        slow.sendall(b"GET / HTTP/1.1\r\nHost: ")
        slow.settimeout(10)
        assert slow.recv(1) == b""
