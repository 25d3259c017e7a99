"""HTTP beside the flow: an ASGI application in a thread of its own."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from types import TracebackType
from typing import Self

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

_START_WITHIN_S = 10.0
#: What is served is small and for few; more connections than this get 503.
_MOST_CONNECTIONS = 500
#: Who asks for nothing, or in part, or takes no answer, is hung up on: the probes need room.
_SILENCE_S = 5.0

_WHY = {
    errno.EADDRINUSE: "something else listens there; name another port, or stop what listens",
    errno.EACCES: "this user may not; name a port from 1024 up",
    errno.EADDRNOTAVAIL: "this machine has no such address; name one it has, such as 127.0.0.1",
}


class ServeError(Exception):
    """Nothing can be served at an address; says which, why, and what to do."""


class Server:
    """An application being served; `serve` makes one."""

    def __init__(self, uvicorn_server: _Uvicorn, listening: socket.socket) -> None:
        self._uvicorn, self._listening = uvicorn_server, listening
        host, port = listening.getsockname()[:2]
        #: The address and the port, which is a free one if port 0 was asked for.
        self.host: str = host
        self.port: int = port
        # Daemon: a flow that ends must not wait for a browser.
        self._thread = threading.Thread(target=self._run, name=f"serve-{port}", daemon=True)
        self._thread.start()
        self._uvicorn.up.wait(_START_WITHIN_S)
        if not self._uvicorn.started:
            self.close()
            raise ServeError(f"the server at {self.url} did not start; the log says why")

    @property
    def url(self) -> str:
        """Return the address for a browser on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def close(self, timeout_s: float = 5.0) -> None:
        """Answer what was asked, close the connections, free the port; bounded, and idempotent."""
        self._uvicorn.should_exit = True
        self._thread.join(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._uvicorn.run([self._listening])
        finally:
            self._listening.close()
            self._uvicorn.up.set()


class _Uvicorn(uvicorn.Server):
    """Uvicorn that says when it is up. Off the main thread it leaves the signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


class _Impatient(H11Protocol):
    """HTTP/1.1 for those who ask.

    A connection is closed `_SILENCE_S` after it was made, or its last answer given, unless a whole
    request has come; and after as long again unless that is answered, and the answer taken.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watching.cancel()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watching.cancel()
        super().connection_lost(exc)

    def _watch(self, *, again: bool = False) -> None:
        self._watching = self.loop.call_later(_SILENCE_S, self._hang_up, again)

    def _hang_up(self, again: bool) -> None:
        cycle = self.cycle
        asked = bool(cycle) and not cycle.response_complete and not cycle.more_body
        answering = asked or self.transport.get_write_buffer_size() > 0
        if answering and not again:
            self._watch(again=True)
        elif answering:
            self.transport.abort()
        elif not self.transport.is_closing():
            self.transport.close()


def serve(app: ASGIApp, host: str, port: int) -> Server:
    """Serve an application in a daemon thread, and return when it answers.

    Port 0 takes a free one. Takes over neither signals nor logging: only what goes wrong is
    logged, to the standard library's logger ``uvicorn.error``. Raises ServeError if the address
    cannot be listened at.
    """
    listening = _listen(host, port)
    config = uvicorn.Config(
        app,
        # Not uvloop: an idle server has nothing to gain, and the process one library less.
        loop="asyncio",
        http=_Impatient,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    return Server(_Uvicorn(config), listening)


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65_535:  # getaddrinfo would take it modulo 65536
        raise ServeError(f"cannot listen at {host}, port {port}: name a port from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ServeError(
            f"cannot listen at {host}, port {port}: {error}; name an address of this machine, "
            "such as 127.0.0.1"
        ) from None
    # `localhost` may be both: what people type is the older one.
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port that was in use a minute ago is free; one that is listened at is not.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        why = _WHY.get(error.errno or 0, f"{error.strerror}; name another address or port")
        raise ServeError(f"cannot listen at {host}, port {port}: {why}") from None
    return listening
