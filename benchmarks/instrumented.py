"""The fraud flow with a clock around every step.

    BENCH_STAGES=stages.json python -m bytewax.run benchmarks.instrumented -r … -s 10 -b 0

It is `dataflows.fraud`, patched: what each step takes on the worker thread is added up and written
to the file twice a second, with the events and batches that went through and the pauses that
snapshots made. The clocks cost about 1 % at large batches.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bytewax.operators as op
import msgspec
from bytewax.dataflow import Dataflow

_now = time.perf_counter
_EVERY_S = 0.5


class Stages(msgspec.Struct):
    """What has been measured since the start."""

    events: int = 0
    batches: int = 0
    #: Seconds since the first batch.
    wall_s: float = 0.0
    #: Seconds on the worker thread by stage.
    spent_s: dict[str, float] = msgspec.field(default_factory=lambda: defaultdict(float))
    #: From the first snapshot of an epoch to the first look at the input after it, in seconds.
    pauses_s: list[float] = msgspec.field(default_factory=list)


_stages = Stages()
_snapshot_began = 0.0
_first_batch = 0.0


def _clocked(stage: str, function: Callable[..., Any], *, drain: bool = False) -> Any:
    @functools.wraps(function)
    def timed(*args: Any) -> Any:
        began = _now()
        try:
            result = function(*args)
            return list(result) if drain else result
        finally:
            _stages.spent_s[stage] += _now() - began

    return timed


#: Step id of the operator → stage.
_STEPS = {
    "fraud.decode.decode": "decode",
    "fraud.distinct.split": "distinct",
    "fraud.distinct.merge": "distinct",
    "fraud.card.split": "card windows",
    "fraud.card.merge": "card windows",
    "fraud.terminal.split": "terminal windows",
    "fraud.terminal.merge": "terminal windows",
    "fraud.answered.select": "answered",
    "fraud.profiles.read": "lookup",
    "fraud.score.score": "score",
    "fraud.encode.encode": "encode",
    "fraud.sample.encode": "encode",
    "fraud.predictions.split": "produce",
    "fraud.audit.split": "produce",
    "fraud.dead_letters.split": "produce",
}


def _clock_operators() -> None:
    original = op.flat_map_batch

    def flat_map_batch(step_id: str, up: Any, mapper: Any) -> Any:
        full = f"{up._scope.parent_id}.{step_id}"
        return original(step_id, up, _clocked(_STEPS.get(full, full), mapper, drain=True))

    op.flat_map_batch = flat_map_batch  # type: ignore[assignment]


def _clock_methods() -> None:
    from dataflows import runtime
    from dataflows.kafka import sink, source
    from dataflows.steps import windows

    def clock(owner: Any, name: str, stage: str) -> None:
        setattr(owner, name, _clocked(stage, getattr(owner, name)))

    clock(sink._SinkPartition, "write_batch", "produce")
    clock(windows._KeyLogic, "on_batch", "card windows")
    clock(sink._SinkPartition, "snapshot", "snapshot")
    clock(windows._KeyLogic, "snapshot", "snapshot")
    runtime.poll_sinks = _clocked("reports", sink.poll_sinks)
    snapshot, turn = source._Reader.snapshot, source._Reader.turn

    def snapshotted(self: Any, part: Any) -> Any:
        global _snapshot_began
        _snapshot_began = _snapshot_began or _now()
        return snapshot(self, part)

    def turned(self: Any, part: Any) -> Any:
        global _snapshot_began, _first_batch
        leads = self._leader is not None and part.name == self._leader.name
        began, spent = _now(), _stages.spent_s
        if leads and _snapshot_began:
            _stages.pauses_s.append(began - _snapshot_began)
            _snapshot_began = 0.0
        before = spent["reports"]
        records = turn(self, part)
        took = _now() - began - (spent["reports"] - before)
        spent["consume" if records else "idle"] += took
        if records:
            _first_batch = _first_batch or began
            _stages.events += len(records[0])
            _stages.batches += 1
            _stages.wall_s = _now() - _first_batch
        return records

    source._Reader.snapshot, source._Reader.turn = snapshotted, turned  # type: ignore[method-assign]


def _write(file: Path) -> None:
    staging = file.with_suffix(".new")
    while True:
        time.sleep(_EVERY_S)
        staging.write_bytes(msgspec.json.encode(_stages))
        staging.replace(file)


def flow() -> Dataflow:
    """Return the flow; ``bytewax.run`` calls this."""
    _clock_operators()
    _clock_methods()
    from dataflows import fraud

    started = fraud.flow()
    file = Path(os.environ["BENCH_STAGES"])
    threading.Thread(target=_write, args=(file,), name="stages", daemon=True).start()
    return started
