"""The job that every contender does, as far as they share it: names, windows, model, environment.

    JSON card events → for each event: count, sum and mean of its card's amounts over three windows
    (t − w, t], as of that event and with it → a random forest (ONNX) → JSON predictions

Every contender is a process, ``python -m benchmarks.peers.NAME``, in a virtual environment of its
own; this file is imported by all of them, so it needs nothing but NumPy and ONNX Runtime.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import numpy.typing as npt

#: Windows in milliseconds, shortest first: 10 minutes, 30 minutes, 1 hour.
WINDOWS_MS = (600_000, 1_800_000, 3_600_000)
LONGEST_MS = WINDOWS_MS[-1]
#: The model's inputs: the amount, then counts, sums and means, shortest window first in each.
INPUTS = 1 + 3 * len(WINDOWS_MS)
PARTITIONS = 4
#: By default a consumer whose queue is full (100,000 records) waits for a second before it fetches
#: more, which holds whoever is faster at about that many a second (ran: 118,000, not 264,000).
EAGER = {"fetch.queue.backoff.ms": 2}
#: A producer that runs ahead of the broker is held back at this many records, by the two loops that
#: have nobody to do it for them; its queue takes a batch more.
MOST_OUTSTANDING = 200_000
ROOM = {"queue.buffering.max.messages": 2 * MOST_OUTSTANDING}

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """Where a contender reads and writes. `state` is a directory for what it keeps on disk."""

    brokers: str
    source: str
    sink: str
    #: A model package (`model.package`) for our own flow; `model` is the ONNX file in it.
    package: Path
    state: Path

    @staticmethod
    def from_environment() -> Job:
        """Read what `environment` gave to this process."""
        names = ("PEER_BROKERS", "PEER_SOURCE", "PEER_SINK", "PEER_PACKAGE", "PEER_STATE")
        brokers, source, sink, package, state = (os.environ[name] for name in names)
        return Job(brokers, source, sink, Path(package), Path(state))

    def environment(self) -> dict[str, str]:
        """Return the variables that tell a process of this job."""
        return {
            "PEER_BROKERS": self.brokers,
            "PEER_SOURCE": self.source,
            "PEER_SINK": self.sink,
            "PEER_PACKAGE": str(self.package),
            "PEER_STATE": str(self.state),
        }

    @property
    def group(self) -> str:
        """A consumer group that nobody had before."""
        return f"{self.sink}-group"

    def scorer(self) -> Callable[[Rows | Sequence[Sequence[float]]], list[float]]:
        """Load the model: a function from rows (n × INPUTS) to n probabilities.

        One thread, without spinning, like every contender.
        """
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        runtime = ort.InferenceSession(
            str(self.package / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        feed, fetch = runtime.get_inputs()[0].name, [runtime.get_outputs()[-1].name]

        def score(rows: Rows | Sequence[Sequence[float]]) -> list[float]:
            probabilities: Any = runtime.run(fetch, {feed: np.asarray(rows, np.float32)})[0]
            scores: list[float] = probabilities[:, -1].tolist()
            return scores

        return score


def advance(
    times: list[int], cents: list[int], at_ms: int, amount_cents: int
) -> tuple[list[int], list[int]]:
    """Add a payment to a card's and return its windows' counts and sums, in cents.

    `times` (ascending, as payments come) and `cents` are changed in place; what has left the
    longest window is forgotten. For those whose state is one value a card.

    >>> times, cents = [], []
    >>> advance(times, cents, 0, 100), advance(times, cents, 600_000, 50)
    (([1, 1, 1], [100, 100, 100]), ([1, 2, 2], [50, 150, 150]))
    """
    times.append(at_ms)
    cents.append(amount_cents)
    gone = bisect_right(times, at_ms - LONGEST_MS)
    if gone:
        del times[:gone], cents[:gone]
    starts = [bisect_right(times, at_ms - length) for length in WINDOWS_MS]
    return [len(times) - start for start in starts], [sum(cents[start:]) for start in starts]


def features(amount: float, counts: Sequence[int], cents: Sequence[int]) -> list[float]:
    """Return the model's inputs for one event, from its windows' counts and sums in cents."""
    sums = [total / 100 for total in cents]
    means = [total / (100 * count) for total, count in zip(cents, counts, strict=True)]
    return [amount, *counts, *sums, *means]
