"""What live state costs: memory, the pause of a snapshot, the start after a stop.

A window state of N cards with 60 transactions each within the longest window, spread over 10,000
terminals, is computed by the offline module; the flow starts from it.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.flow import watched
from benchmarks.harness import Bench, Run, reader, receive
from benchmarks.instrumented import Stages
from benchmarks.load import TERMINALS, event_times_ms
from features.batch import EventBatch
from features.fraud import FRAUD, SOURCES, FraudReport, Transaction
from features.offline import Replay
from features.state_dir import FORMAT, StateManifest, write_state
from features.windows import SHARDS

PER_CARD = 60
_DAY_MS = 86_400_000
_CHUNK = 65_536
RATE, _SECONDS = 10_000, 42.0  # four snapshots


@dataclass
class State:
    """Costs of a number of live cards."""

    cards: int
    #: Bytes that the kernel's arrays take, a card: its own view, and both views.
    card_bytes: float
    both_bytes: float
    rss_mb: float
    store_mb: float
    pauses_ms: list[float]
    #: From the start of the process to the first prediction, with the state of a stopped life.
    resume_s: float


def write(directory: Path, cards: int, end_ms: int) -> tuple[float, float]:
    """Write the window state up to `end_ms`; return bytes a card of its view and of both views."""
    total = cards * PER_CARD
    begin = end_ms - 29 * _DAY_MS
    rng = np.random.default_rng(1)
    replay = Replay(FRAUD, SOURCES)
    source = SOURCES.index(Transaction)
    for start in range(0, total, _CHUNK):
        n = min(_CHUNK, total - start)
        number = np.arange(start, start + n)
        replay(
            EventBatch(
                {
                    "source": np.full(n, source, np.uint8),
                    "card_id": np.char.mod("C%07d", number % cards).astype("S"),
                    "terminal_id": np.char.mod("T%05d", rng.integers(0, TERMINALS, n)).astype("S"),
                    "event_time": begin + number * 29 * _DAY_MS // total,
                    "amount": rng.integers(1, 20_000, n),
                    "seq": number,
                }
            )
        )
    sizes = [sum(states[s].nbytes for s in range(SHARDS)) / cards for states in replay.views]
    events = {Transaction.__name__: total, FraudReport.__name__: 0}
    manifest = StateManifest(FORMAT, FRAUD.name, FRAUD.schema_hash, SHARDS, end_ms, events)
    write_state(directory, manifest, replay.snapshots())
    return sizes[0], sum(sizes)


def measure(on: Bench, cards: int) -> State:
    """Start from that state, run through some snapshots, stop and start again."""
    run = on.run("at_least_once")
    run.folder.mkdir(exist_ok=True)
    stages = run.folder / "stages.json"
    count = int(RATE * _SECONDS)
    begin_ms = int(event_times_ms(count, cards, time.time() * 1000)[0])
    card_bytes, both_bytes = write(run.folder / "state", cards, begin_ms)
    variables = {
        "flow": "benchmarks.instrumented",
        "BENCH_STAGES": str(stages),
        "STATE_DIR": str(run.folder / "state"),
    }
    process = run.start(**variables)
    with reader(run) as consumer:
        with watched(process) as usage:
            load = run.load(count, RATE, cards=cards)
            for _ in receive(consumer, count, 600):
                pass
        load.wait()
        pauses = msgspec.json.decode(stages.read_bytes(), type=Stages).pauses_s
        run.stop(signal.SIGKILL)
        store = sum(f.stat().st_size for f in (run.folder / "recovery").rglob("*"))
        resume_s = first_prediction(run)
    run.stop(signal.SIGKILL)
    run.forget()
    return State(
        cards,
        card_bytes,
        both_bytes,
        usage.peak_mb,
        store / 1e6,
        [1000 * pause for pause in pauses],
        resume_s,
    )


def first_prediction(run: Run) -> float:
    """Start the flow with an event waiting; return seconds until its prediction is there."""
    run.load(1, name="first").wait()
    began = time.monotonic()
    with reader(run, from_end=True) as consumer:
        run.start()
        for _ in receive(consumer, 1, 600):
            break
    return time.monotonic() - began
