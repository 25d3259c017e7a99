"""The processes of a cluster that share no directory meet over the network, before they start.

Each has some parts of the recovery store on a volume of its own, but which epoch the flow resumes
in follows from all of them. So each process serves, at its own address, what it has found, and asks
the others until

* it has what every other one found, and
* every other one has heard of the same *lives* of the processes: a life is a random number that a
  process takes at its start.

So nobody goes on with what a process found that has died since: its successor is another life, and
who has not agreed yet asks it anew. Who has agreed, and then hears of another life, belongs to a
cluster that is no more: it is told so by `orphaned`, and must end. (Bytewax ends it too, when its
connections break; but while it starts it waits for them for ever.)

Afterwards the same addresses are the board of `dataflows.kafka.peers`: a statement is posted to all
others, and each keeps the last one of each, also when its author has ended.

What is exchanged is neither encrypted nor authenticated, like what Bytewax exchanges between its
workers: let only the cluster's processes reach the port.
"""

from __future__ import annotations

import http.client
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dataflows.kafka.peers import PeersError
from dataflows.serve import serve

logger = logging.getLogger(__name__)

_PATH = "/peer"
_ASK_EVERY_S = 0.1
_COMPLAIN_EVERY_S = 10.0
#: How long one request may take.
_REQUEST_S = 5.0
#: How long a process that does not answer is tried to be told. (It may be frozen; Bytewax waits
#: for it too.)
_TELL_WITHIN_S = 30.0
#: The same, if nobody listens at its address: it has died, and so must the others.
_GONE_AFTER_S = 0.5
_OF_ANOTHER_CLUSTER = 409
#: How long the name of this process may be unknown: a pod's is published after its start, and who
#: asked too early is told so again for as long as the name servers remember.
_NAME_WITHIN_S, _NAME_EVERY_S = 60.0, 1.0


def _await_name(host: str) -> None:
    """Return when a name is known, or when it is time to say that it is not."""
    deadline = time.monotonic() + _NAME_WITHIN_S
    while time.monotonic() < deadline:
        try:
            socket.getaddrinfo(host, None)
        except socket.gaierror as error:
            logger.warning("the name of this process, %s, is not known yet: %s", host, error)
            time.sleep(_NAME_EVERY_S)
        else:
            return


class _Hello(msgspec.Struct):
    """What one process says: a request, and the answer to one."""

    process: int
    processes: int
    life: int
    #: Process → its life, as far as known, the own one included.
    lives: dict[int, int]
    found: msgspec.Raw
    statement: bytes = b""
    #: How many statements there were.
    turn: int = 0


class _Outcome(Enum):
    """Of asking a process."""

    HEARD = auto()
    SILENT = auto()
    GONE = auto()


class Meeting:
    """This process at the meeting. For use by several threads.

    Args:
        addresses: host and port of each process, by its id.
        process: the id of this one.
        found: a JSON value to tell the others.
        orphaned: called, from another thread, with a sentence when another process has begun a new
            life after all had agreed.

    Raises ServeError if this process's address cannot be listened at.
    """

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        process: int,
        found: bytes,
        orphaned: Callable[[str], None],
    ) -> None:
        self._addresses, self._process = addresses, process
        self._found = found
        self._orphaned = orphaned
        self._life = secrets.randbits(62)
        self._statement, self._turn = b"", 0
        self._heard: dict[int, _Hello] = {}
        self._agreed = False
        self._lock = threading.Lock()
        app = Starlette(routes=[Route(_PATH, self._answer, methods=["POST"])])
        _await_name(addresses[process][0])
        self._server = serve(app, *addresses[process])

    def meet(self) -> list[bytes]:
        """Wait for all others; return what each process found, by id, this one's included.

        Without limit: a cluster starts when its last process does. Says who is missing.
        """
        complain_at = time.monotonic() + _COMPLAIN_EVERY_S
        while True:
            missing = [n for n in self._others() if self._ask(n) is not _Outcome.HEARD]
            with self._lock:
                if self._all_know_all():
                    self._agreed = True
                    heard = {n: bytes(hello.found) for n, hello in self._heard.items()}
                    return [heard.get(n, self._found) for n in range(len(self._addresses))]
            if time.monotonic() >= complain_at:
                complain_at += _COMPLAIN_EVERY_S
                who = (
                    ", ".join(f"{n} ({self._where(n)})" for n in missing) or "nobody: they disagree"
                )
                logger.warning("waiting for the cluster's other processes; missing: %s", who)
            time.sleep(_ASK_EVERY_S)

    def post(self, statement: bytes, *, farewell: bool = False) -> None:
        """Tell all others; see `dataflows.kafka.peers.Board`."""
        with self._lock:
            self._statement, self._turn = statement, self._turn + 1
        for other in self._others():
            began = time.monotonic()
            while (outcome := self._ask(other)) is not _Outcome.HEARD and not farewell:
                patience_s = _GONE_AFTER_S if outcome is _Outcome.GONE else _TELL_WITHIN_S
                if time.monotonic() - began > patience_s:
                    raise PeersError(
                        f"process {other} of the cluster does not answer at {self._where(other)}: "
                        "see to it and to the network between; this process ends, and the cluster "
                        "computes the open epoch again"
                    )
                time.sleep(_ASK_EVERY_S)

    def read(self, process: int) -> bytes | None:
        """Return another's last statement."""
        with self._lock:
            hello = self._heard.get(process)
        return hello.statement if hello is not None and hello.statement else None

    def shared(self) -> bool:
        """All are here since `meet`."""
        return self._agreed

    def close(self) -> None:
        """Answer no more."""
        self._server.close()

    def _others(self) -> list[int]:
        return [n for n in range(len(self._addresses)) if n != self._process]

    def _where(self, process: int) -> str:
        host, port = self._addresses[process]
        return f"{host}:{port}"

    def _lives(self) -> dict[int, int]:
        return {self._process: self._life} | {n: hello.life for n, hello in self._heard.items()}

    def _all_know_all(self) -> bool:
        lives = self._lives()
        return len(lives) == len(self._addresses) and all(
            hello.lives == lives for hello in self._heard.values()
        )

    def _hello(self) -> bytes:
        with self._lock:
            return msgspec.json.encode(
                _Hello(
                    self._process,
                    len(self._addresses),
                    self._life,
                    self._lives(),
                    msgspec.Raw(self._found),
                    self._statement,
                    self._turn,
                )
            )

    def _ask(self, process: int) -> _Outcome:
        """Tell another process, and hear it."""
        host, port = self._addresses[process]
        connection = http.client.HTTPConnection(host, port, timeout=_REQUEST_S)
        try:
            connection.request("POST", _PATH, self._hello())
            response = connection.getresponse()
            answer = response.read()
            heard = response.status == 200 and self._hear(answer)
            return _Outcome.HEARD if heard else _Outcome.GONE
        except ConnectionError:
            return _Outcome.GONE
        except (OSError, http.client.HTTPException):
            return _Outcome.SILENT
        finally:
            connection.close()

    async def _answer(self, request: Request) -> Response:
        heard = await run_in_threadpool(self._hear, await request.body())
        return Response(
            self._hello(), 200 if heard else _OF_ANOTHER_CLUSTER, media_type="application/json"
        )

    def _hear(self, said: bytes) -> bool:
        """Take note of what another process says; False if it is none of this cluster."""
        try:
            hello = msgspec.json.decode(said, type=_Hello)
        except msgspec.MsgspecError as error:
            logger.warning("somebody says what is not understood: %s", error)
            return False
        if hello.process not in self._others() or hello.processes != len(self._addresses):
            logger.warning(
                "a process says that it is %d of %d; this is %d of %d: give all the same addresses",
                *(hello.process, hello.processes, self._process, len(self._addresses)),
            )
            return False
        with self._lock:
            known = self._heard.get(hello.process)
            new_life = known is None or known.life != hello.life
            if not (self._agreed and new_life):
                # An answer may be overtaken by a later request.
                if known is None or new_life or hello.turn >= known.turn:
                    self._heard[hello.process] = hello
                return True
        self._orphaned(
            f"process {hello.process} of the cluster has been started again; this one belongs to "
            "the cluster before"
        )
        return False
