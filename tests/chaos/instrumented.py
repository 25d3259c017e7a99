"""The fraud flow with places to be killed at, and with protections that can be taken away.

    python -m bytewax.run tests.chaos.instrumented -r … -s 1 -b 0

It is `dataflows.fraud`, patched by the environment:

==================  ==========================================================================
``CHAOS_HOLD``      ``point:n``: at the n-th passing of that point, wait
``CHAOS_HOLD_FILE`` created when that happens; the wait ends when ``<file>.release`` exists
``CHAOS_OFF``       protections to take away, by comma: ``fencing``, ``tail_scan``, ``pending``
                    (each snapshot forgets what of a tail has not come by again), ``discard``
                    (what a killed life left of its last epoch stays)
``CHAOS_DRAIN``     told to drain as it comes up
==================  ==========================================================================

Points: see `POINTS`.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bytewax.dataflow import Dataflow

from dataflows import fraud, recovery
from dataflows.kafka import sink, source, tail
from dataflows.kafka.idempotent import IdempotentWriter
from dataflows.kafka.transactional import TransactionalWriter
from dataflows.steps import windows

#: Where a flow can be held.
POINTS = {
    "startup": "all is opened and checked, nothing is read yet",
    "tail_scan": "an output partition's tail has been read, and is not yet used (exactly once)",
    "transaction": "records are on the broker, their transaction is open (exactly once)",
    "written": "records are on the broker, the epoch is open (at least once)",
    "committed": "an output partition has confirmed the epoch to Bytewax, which has not stored it",
    "snapshot": "some window shards of the epoch have given their snapshot, others have not",
    "draining_before": "told to drain, nothing more is read; before the source's last snapshot",
    "draining_after": "the same, after it",
}

_point, _, _nth = os.environ.get("CHAOS_HOLD", "").partition(":")
_file = Path(os.environ.get("CHAOS_HOLD_FILE", ""))
_off = frozenset(os.environ.get("CHAOS_OFF", "").split(",")) - {""}
_lock = threading.Lock()
_passed = 0


def _reach(point: str, first: Callable[[], object] | None = None) -> None:
    """Pass a point; if it is the one to hold at, do `first`, tell the harness, and wait."""
    global _passed
    if point != _point:
        return
    with _lock:
        _passed += 1
        if _passed != int(_nth):
            return
    if first is not None:
        first()
    _file.touch()
    release = _file.with_name(_file.name + ".release")
    while not release.exists():
        time.sleep(0.02)


def _hold_after(owner: Any, name: str, point: str) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        _reach(point)
        return result

    setattr(owner, name, patched)


def _hold_when_written() -> None:
    commit, write = TransactionalWriter._commit, IdempotentWriter.write

    def holding_commit(self: TransactionalWriter) -> None:
        _reach("transaction", lambda: self._producer.flush(30))
        commit(self)

    def holding_write(self: IdempotentWriter, batch: Any) -> None:
        write(self, batch)
        _reach("written", lambda: self._producer.flush(30))

    TransactionalWriter._commit = holding_commit  # type: ignore[method-assign]
    IdempotentWriter.write = holding_write  # type: ignore[method-assign]


def _hold_when_draining() -> None:
    snapshot = source._Reader.snapshot

    def holding(self: source._Reader, part: Any) -> int:
        draining = self._drain_after is not None
        if draining:
            _reach("draining_before")
        offset = snapshot(self, part)
        if draining:
            _reach("draining_after")
        return offset

    source._Reader.snapshot = holding  # type: ignore[method-assign]


def _take_away_fencing() -> None:
    original = TransactionalWriter.__init__

    def unfenced(self: Any, *args: Any, transactional_id: str, **named: Any) -> None:
        original(self, *args, transactional_id=f"{transactional_id}.{uuid.uuid4().hex}", **named)

    TransactionalWriter.__init__ = unfenced  # type: ignore[method-assign]
    # Otherwise the new owner would wait for the zombie's transaction, as for a foreign writer's.
    read = tail.read_tail
    sink.read_tail = lambda *args, **named: read(  # type: ignore[attr-defined]
        *args, **{**named, "fenced": False}
    )


def _take_away_tail_scan() -> None:
    original = tail.read_tail

    def nothing(*args: Any, **named: Any) -> tail.Tail:
        return tail.Tail(tail.Published(), original(*args, **named).next_offset)

    sink.read_tail = nothing  # type: ignore[attr-defined]


def _forget_what_is_pending() -> None:
    original = sink._SinkPartition.snapshot

    def forgetful(self: sink._SinkPartition) -> sink.SinkState:
        version, offset, partitions, _, owner = original(self)
        return version, offset, partitions, b"", owner

    sink._SinkPartition.snapshot = forgetful  # type: ignore[method-assign]


def flow() -> Dataflow:
    """Return the flow; ``bytewax.run`` calls this."""
    _hold_after(tail, "_read", "tail_scan")
    _hold_when_written()
    _hold_after(sink._SinkPartition, "snapshot", "committed")
    _hold_after(windows._KeyLogic, "snapshot", "snapshot")
    _hold_when_draining()
    if "fencing" in _off:
        _take_away_fencing()
    if "tail_scan" in _off:
        _take_away_tail_scan()
    if "discard" in _off:
        recovery.discard_open_epoch = lambda *_: 0
    if os.environ.get("CHAOS_DRAIN"):
        source.request_drain()
    if "pending" in _off:
        _forget_what_is_pending()
    started = fraud.flow()
    _reach("startup")
    return started
