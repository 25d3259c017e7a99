"""What the processes of a cluster tell each other: to drain together, and to keep together.

**Drain.** A worker may stop only when every other one has what it needs of it. Bytewax 0.21.1
finishes an epoch when *all* workers have; a worker that stops while another one still waits for
the end of an epoch leaves that one waiting for ever, busily. Signals do not arrive in one epoch, or
only one process gets one. So the processes agree, on a board that all
of them can read:

* Who is told to drain says so; the others see it within 0.1 s, and drain too.
* A worker that stops emitting says in which epoch, *before* it gives its snapshot of that epoch.
* The last epoch is the largest of these. A worker looks at the first call of each epoch, and stops
  at the first call after the last epoch. By then that epoch is finished on all workers, so each
  of them had said its epoch before: all see the same, and all stop in the same epoch.

Epochs are counted from 0 in this life, and all workers begin in the same one. A worker without
partitions is never called; its process ends when all others have stopped.

**Keep together.** Before it gives its snapshot of an epoch, a worker says at which stream time it
will begin the next (the first: before it emits anything). In an epoch, no worker emits what is
further than a bound ahead of the least of these. So of two records that the topics held when the
epoch began, wherever they are read, the one that is more than the bound behind is emitted in an
earlier epoch: all steps have done with it before they see the other. Who has read its partitions to
their end holds up nobody.

The board is the recovery directory, if the processes share one (`SharedDirectory`), or they tell
each other over the network (`dataflows.kafka.meeting`). A cluster that has neither cannot do this:
see `shared`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from dataflows.kafka.errors import FlowError

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1


class PeersError(FlowError):
    """Say why the other processes cannot be told."""


class _Pace(msgspec.Struct):
    """How far a worker is."""

    partitions: int
    #: Epoch → stream time that it begins at, ms; of the last two epochs told.
    begins: dict[int, int] = {}


class _Record(msgspec.Struct):
    """What one process says."""

    draining: bool = False
    #: Worker → the epoch after which it emits nothing; None: it reads.
    workers: dict[str, int | None] = {}
    stopped: list[str] = []
    paces: dict[str, _Pace] = {}


class Board(Protocol):
    """Where each process puts up one statement, and reads those of the others."""

    def post(self, statement: bytes, *, farewell: bool = False) -> None:
        """Put up this process's statement: when this returns, all others read it.

        `farewell`: nothing depends on it for who has ended. Raises PeersError if it cannot be done.
        """

    def read(self, process: int) -> bytes | None:
        """Return what another process has put up; None if that cannot be read."""

    def shared(self) -> bool:
        """Tell whether all others are here. Ask when all processes have connected."""


class SharedDirectory:
    """The board of processes that share a directory: a small file of each.

    Args:
        directory: the recovery directory.
        process: this process's id, from 0.
        processes: how many there are.
        is_alive: tells whether a process holds the directory under an id.
    """

    def __init__(
        self, directory: Path, process: int, processes: int, is_alive: Callable[[int], bool]
    ) -> None:
        self._directory = directory
        self._process, self._processes = process, processes
        self._is_alive = is_alive

    def post(self, statement: bytes, *, farewell: bool = False) -> None:
        """Write the file, whole."""
        path = self._path(self._process)
        new = path.with_suffix(".new")
        try:
            new.write_bytes(statement)
            new.rename(path)
        except OSError as error:
            raise PeersError(
                f"{path} cannot be written: {error.strerror}. See to the disk of the recovery "
                "directory (is it full?), then restart the flow; the open epoch is computed again"
            ) from error

    def read(self, process: int) -> bytes | None:
        """Read another's file."""
        try:
            return self._path(process).read_bytes()
        except OSError as error:
            logger.warning("what process %d says cannot be read: %s", process, error)
            return None

    def shared(self) -> bool:
        """Tell whether all others hold this directory, and have said something."""
        others = set(range(self._processes)) - {self._process}
        return all(self._is_alive(n) and self._path(n).exists() for n in others)

    def _path(self, process: int) -> Path:
        return self._directory / f".process-{process}.json"


class Peers:
    """This process among the others of its cluster. For use by several threads.

    Args:
        board: where they tell each other.
        process: this process's id, from 0.
        processes: how many there are.
    """

    def __init__(self, board: Board, process: int, processes: int) -> None:
        self._board = board
        self._process, self._processes = process, processes
        self._mine = _Record()
        self._lock = threading.Lock()
        self._post()  # over what an earlier life said

    def shared(self) -> bool:
        """Tell whether all others can be told. Ask when all processes have connected."""
        return self._board.shared()

    def reads(self, worker: str) -> None:
        """Say, before its first snapshot, that a worker has partitions."""
        with self._lock:
            self._mine.workers.setdefault(worker, None)
            self._post()

    def drains(self, worker: str | None = None, epoch: int = 0) -> None:
        """Say that this process drains, and that a worker of it emits nothing after an epoch."""
        with self._lock:
            self._mine.draining = True
            if worker is not None:
                self._mine.workers[worker] = epoch
            self._post()

    def stops(self, worker: str) -> None:
        """Say that a worker stops now."""
        with self._lock:
            self._mine.stopped.append(worker)
            self._post(farewell=True)

    def begins(self, worker: str, partitions: int, epoch: int, stream_time: int) -> None:
        """Say that a worker, in an epoch, emits nothing from before a stream time (ms)."""
        with self._lock:
            pace = self._mine.paces.setdefault(worker, _Pace(partitions))
            # Others may still be in the epoch before, not earlier: see `last_epoch`.
            pace.begins = {n: at for n, at in pace.begins.items() if n >= epoch - 1}
            pace.begins[epoch] = stream_time
            self._post()

    def slowest(self, epoch: int, partitions: int) -> int | None:
        """Return the least stream time that a worker begins an epoch with, ms.

        None: not all have said; the workers have `partitions` between them.
        """
        paces = [p for record in self._records() if record for p in list(record.paces.values())]
        said = [pace for pace in paces if epoch in pace.begins]
        if sum(pace.partitions for pace in said) < partitions:
            return None
        return min(pace.begins[epoch] for pace in said)

    def last_epoch(self) -> int | None:
        """Return the last epoch in which anything was emitted; None while some worker reads."""
        records = self._records()
        if None in records:
            return None
        ends = [end for record in records if record for end in record.workers.values()]
        return None if not ends or None in ends else max(end for end in ends if end is not None)

    def draining(self) -> list[int]:
        """Return the ids of the processes that drain."""
        return [n for n, record in enumerate(self._records()) if record and record.draining]

    def only_idle_left(self) -> bool:
        """Tell whether all workers with partitions have stopped, and none of them is here."""
        if self._mine.workers:
            return False
        records = self._records()
        return any(record and record.workers for record in records) and all(
            record is not None and set(record.workers) == set(record.stopped) for record in records
        )

    def watch(
        self,
        drain: Callable[[], None],
        draining: Callable[[], bool],
        leave: Callable[[], None],
    ) -> None:
        """Look at the others from a thread of its own: call `drain` when one of them drains.

        Tells them when `draining` here. Calls `leave`, once, when `only_idle_left`.
        """

        def look() -> None:
            told = False
            pause = threading.Event()
            while not pause.wait(_LOOK_EVERY_S):
                if told:
                    pass
                elif draining():
                    self.drains()
                    told = True
                elif others := self.draining():
                    logger.info("draining, because process %d of the cluster does", others[0])
                    drain()
                if self.only_idle_left():
                    leave()
                    return

        threading.Thread(target=look, name="peers", daemon=True).start()

    def _records(self) -> list[_Record | None]:
        return [self._read(number) for number in range(self._processes)]

    def _read(self, process: int) -> _Record | None:
        if process == self._process:
            return self._mine
        said = self._board.read(process)
        try:
            return None if said is None else msgspec.json.decode(said, type=_Record)
        except msgspec.MsgspecError as error:
            logger.warning("what process %d says is not understood: %s", process, error)
            return None

    def _post(self, *, farewell: bool = False) -> None:
        self._board.post(msgspec.json.encode(self._mine), farewell=farewell)
