"""A lightly loaded worker of a real cluster keeps its rate.

This test looks at the clock, because time is what it is about; its bounds are wide.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kafka.client import TestBroker, await_that

ROOT = Path(__file__).parents[2]
EPOCH_S = 0.3
EPOCHS = 30


@pytest.mark.parametrize("phase_keeping", [True, False])
def test_the_light_worker_decays_only_without_phase_keeping(
    broker: TestBroker, tmp_path: Path, phase_keeping: bool
) -> None:
    result = tmp_path / "at.json"
    topic = broker.topic("events", 2)
    broker.produce(topic, [(n % 2, None, b'{"at": 1}') for n in range(40_000)])
    addresses = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            addresses.append(f"127.0.0.1:{probe.getsockname()[1]}")
    processes = []
    for process in range(2):
        options = {
            "topic": topic,
            "consumer_config": broker.consumer_config,
            "phase_keeping": phase_keeping,
            "addresses": addresses,
            "process": process,
            "epoch_s": EPOCH_S,
            "seconds": EPOCHS * EPOCH_S,
            "result": str(result),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.integration.kafka_phase_worker", json.dumps(options)],
                cwd=ROOT,
                env={**os.environ, "RUST_BACKTRACE": "0"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
    try:
        await_that(result.exists, "the light worker's result", 90)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    at = json.loads(result.read_text())
    window = 5 * EPOCH_S
    first = sum(moment < window for moment in at)
    last = sum(moment > at[-1] - window for moment in at)
    print(f"{first} batches in the first {window:g} s, {last} in the last")
    if phase_keeping:
        assert last > 0.7 * first
    else:
        assert last < 0.7 * first
