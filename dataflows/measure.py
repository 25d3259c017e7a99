"""Tell how long steps take: to the metrics, and to the traces of sampled events."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from dataflows.metrics import METRICS

if TYPE_CHECKING:  # to import OpenTelemetry takes a while, and it may not be needed
    from dataflows.tracing import Tracing

_In = TypeVar("_In")
_Out = TypeVar("_Out")

#: Set before the graph is laid; None: events are not traced.
tracing: Tracing | None = None


def clock(stage: str) -> Callable[[float, Iterable[Any]], None]:
    """Return what takes the seconds that a step needed, and the batches that it needed them for."""
    observe = METRICS.stage_s.labels(stage).observe
    follow = None if tracing is None else tracing.step

    def took(seconds: float, batches: Iterable[Any]) -> None:
        observe(seconds)
        if follow is not None:
            follow(stage, seconds, batches)

    return took


def measured(
    stage: str, run: Callable[[list[_In]], Iterable[_Out]], *, last: bool = False
) -> Callable[[list[_In]], list[_Out]]:
    """Return a step's function that also tells how long it took.

    `last`: what comes out are no events any more, so what comes in is what is traced.
    """
    took = clock(stage)

    def call(batches: list[_In]) -> list[_Out]:
        began = perf_counter()
        out = list(run(batches))
        took(perf_counter() - began, batches if last else out)
        return out

    return call
