"""What the whole flow does: how fast it drains a backlog, how late its predictions are.

All from outside: latencies from an event's intended time of sending to a reader's receiving its
committed prediction, rates as the reader receives, CPU time and memory of the flow's process as the
system counts them.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import psutil
from hdrh.histogram import HdrHistogram

from benchmarks.harness import Bench, Run, published, reader, receive
from benchmarks.instrumented import Stages

#: Histograms count tenths of a millisecond, up to an hour, to three digits.
UNITS_PER_MS = 10
MOST_UNITS = 36_000_000
#: In place of a guarantee: the bare loop instead of the flow.
BARE = "bare"
_LOOK_EVERY_S = 0.02
_ID = re.compile(rb'"transaction_id":"([^"]+)"')
#: When it was meant to be sent, ms; see `benchmarks.load`.
_SENT = re.compile(rb'"transaction_id":"[^"]+-(\d+)"')


@dataclass
class Usage:
    """What a process has used since it was begun to be watched."""

    cpu_s: float = 0.0
    peak_mb: float = 0.0


@contextmanager
def watched(process: subprocess.Popen[bytes]) -> Iterator[Usage]:
    """Yield the usage of a process; filled in when the block ends."""
    usage, found = Usage(), psutil.Process(process.pid)
    before = found.cpu_times()
    yield usage
    after = found.cpu_times()
    usage.cpu_s = after.user + after.system - before.user - before.system
    with open(f"/proc/{process.pid}/status") as status:
        usage.peak_mb = next(int(line.split()[1]) / 1024 for line in status if "VmHWM" in line)


@dataclass
class Drained:
    """How a backlog was scored: the steady part, from the first tenth to the last prediction."""

    rate: float  # events/s
    cpu_us: float  # of the flow's process, per event
    peak_mb: float
    stages: Stages | None = None


def drain(
    on: Bench,
    delivery: str,
    count: int,
    *,
    keys: str = "uniform",
    stages: bool = False,
    **more: str,
) -> Drained:
    """Score a backlog of `count` events; with `BARE` as `delivery` the bare loop passes it on.

    How far it is, is what the broker says of the ends of the partitions: a reader beside the flow
    would take a quarter of a core from it. Afterwards every prediction is read and counted.
    """
    run = on.run(delivery)
    run.load(count, keys=keys).wait()
    with reader(run) as consumer:
        process = _start(run, stages, more)
        times, counts = [], [0]
        deadline = time.monotonic() + 600
        with watched(process) as usage:
            while counts[-1] < count:  # what ends a transaction counts too: one a tenth of a second
                if time.monotonic() > deadline:
                    raise SystemExit(f"{counts[-1]} of {count} events were scored in 600 s")
                times.append(time.perf_counter())
                counts.append(published(consumer, run))
                time.sleep(_LOOK_EVERY_S)
        del counts[0]
        run.stop()
        values = (value for _, values in receive(consumer, count, 600) for value in values)
        if len({_ID.search(value)[1] for value in values}) != count:  # type: ignore[index]
            raise SystemExit(f"not each of {count} events has one prediction")
    found = _stages(run, stages)
    run.forget()
    first = int(np.searchsorted(counts, count / 10))
    rate = (counts[-1] - counts[first]) / (times[-1] - times[first])
    return Drained(rate, usage.cpu_s / count * 1e6, usage.peak_mb, found)


def _start(run: Run, stages: bool, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    if run.delivery == BARE:
        return run.start_bare()
    if not stages:
        return run.start(**variables)
    run.folder.mkdir(exist_ok=True)
    file = str(run.folder / "stages.json")
    return run.start(flow="benchmarks.instrumented", BENCH_STAGES=file, **variables)


def sent_ms(values: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """Return when the event of each prediction was meant to be sent, ms."""
    return np.array([int(_SENT.search(value)[1]) for value in values])  # type: ignore[index]


def _stages(run: Run, stages: bool) -> Stages | None:
    if not stages:
        return None
    return msgspec.json.decode((run.folder / "stages.json").read_bytes(), type=Stages)


@dataclass
class Steady:
    """Latencies under a steady rate, in 0.1 ms, of the events after the first fifth."""

    rate: float
    histogram: HdrHistogram
    cpu_us: float
    peak_mb: float
    #: Median latency of the last quarter over that of the second quarter: far above 1, the flow
    #: falls behind.
    drift: float
    stages: Stages | None = None

    def ms(self, percentile: float) -> float:
        return float(self.histogram.get_value_at_percentile(percentile)) / UNITS_PER_MS

    @property
    def max_ms(self) -> float:
        return float(self.histogram.get_max_value()) / UNITS_PER_MS

    @property
    def bounded(self) -> bool:
        """Whether the lag stayed bounded: latencies neither grew nor came near a second."""
        return self.ms(50) < 1000 and self.drift < 3


def steady(
    on: Bench,
    delivery: str,
    rate: float,
    seconds: float,
    *,
    keys: str = "uniform",
    burst: float = 1,
    stages: bool = False,
    **more: str,
) -> Steady:
    """Send `rate` events/s for `seconds`, in an open loop."""
    run = on.run(delivery)
    count = int(rate * seconds)
    histogram = HdrHistogram(1, MOST_UNITS, 3)
    at_ms: list[np.ndarray] = []
    late_ms: list[np.ndarray] = []
    process = _start(run, stages, more)
    with reader(run) as consumer:
        consumer.consume(1, 1.0)
        with watched(process) as usage:
            load = run.load(count, rate, keys=keys, burst=burst)
            for now, values in receive(consumer, count, seconds + 180):
                sent = sent_ms(values)
                at_ms.append(sent)
                late_ms.append(now * 1000 - sent)
            load.wait()
    run.stop()
    run.forget()
    at, late = np.concatenate(at_ms), np.concatenate(late_ms)
    counted = late[at >= at.min() + seconds * 200]
    units = np.clip(np.rint(counted * UNITS_PER_MS), 1, MOST_UNITS).astype(np.int64)
    for unit, times in zip(*np.unique(units, return_counts=True), strict=True):
        histogram.record_value(int(unit), int(times))
    quarter = (at - at.min()) * 4 // (at.max() - at.min() + 1)
    drift = float(np.median(late[quarter == 3]) / np.median(late[quarter == 1]))
    cpu_us = usage.cpu_s / count * 1e6
    return Steady(rate, histogram, cpu_us, usage.peak_mb, drift, _stages(run, stages))
