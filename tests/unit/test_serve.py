"""Serving in a thread: it answers when it says so, and goes when it is told."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
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


async def large(request: Request) -> Response:
    return PlainTextResponse("x" * 50_000_000)


async def slow(request: Request) -> Response:
    await asyncio.sleep(0.4)
    return PlainTextResponse("at last")


APP = Starlette(
    routes=[
        Route("/", hello),
        Route("/broken", broken),
        Route("/large", large),
        Route("/slow", slow),
    ]
)


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


@pytest.mark.parametrize("second", [b"", b"GET / HTTP/1.1\r\nHost: ", b"POST / HTTP/1.1\r\n"])
def test_so_is_one_half_sent_after_a_whole_one(
    second: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataflows.serve._SILENCE_S", 0.3)
    if second.startswith(b"POST"):
        second += b"Host: x\r\nContent-Length: 10\r\n\r\nhalf"
    with (
        serve(APP, "127.0.0.1", 0) as server,
        socket.create_connection(("127.0.0.1", server.port)) as slow,
    ):
        slow.settimeout(4)  # Uvicorn's own patience with idle connections is 5 s
        for _ in range(3):  # who asks again in time is kept
            slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"hello"):
                answer += slow.recv(4096)
        slow.sendall(second)
        while slow.recv(4096):  # POST is answered before it is whole: not allowed
            pass


def test_who_does_not_take_the_answer_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflows.serve._SILENCE_S", 0.5)
    monkeypatch.setattr("dataflows.serve._MOST_CONNECTIONS", 2)
    with (
        serve(APP, "127.0.0.1", 0) as server,
        socket.create_connection(("127.0.0.1", server.port)) as deaf,
    ):
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(server.url)
        deadline = time.monotonic() + 10
        while True:
            try:
                assert get(server.url) == "hello"
                break
            except urllib.error.HTTPError:
                assert time.monotonic() < deadline, "it keeps its place"
                time.sleep(0.05)


def test_an_answer_that_takes_a_while_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflows.serve._SILENCE_S", 0.3)
    with serve(APP, "127.0.0.1", 0) as server:
        assert get(f"{server.url}/slow") == "at last"
