"""The demo, small: 21 days of history, a few seconds of stream, everything else as `make demo`."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataflows.kafka.dev_broker import DevBroker
from dataflows.kafka.read import read_topic
from tests.conftest import CACHE
from tests.integration.conftest import await_that

ROOT = Path(__file__).parents[2]
HOME = CACHE / "demo"  # prepared once for its content, like the real one
#: So few days of history that training takes seconds; the least that holds a test week.
START = "2018-04-22"


class RunningDemo:
    """A demo in a session of its own, as `make demo` in a terminal; its output in files."""

    def __init__(self, folder: Path, handbook: Path, *, rate: float, duration: float) -> None:
        self.out, self.err = folder / "stdout", folder / "stderr"
        self.home = HOME
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dataflows.demo", "--start", START,
                 "--handbook", str(handbook)],
                cwd=ROOT,
                env={**os.environ, "DEMO_DIR": str(HOME), "RATE": f"{rate}",
                     "DURATION": f"{duration}"},
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def await_text(self, pattern: str, timeout_s: float = 300) -> None:
        """Wait until the demo has said something on standard error."""

        def said() -> bool:
            assert self.process.poll() is None, self.err.read_text()
            return re.search(pattern, self.err.read_text()) is not None

        await_that(said, f"the demo says {pattern!r}", timeout_s)

    def summary(self, timeout_s: float = 120) -> dict:
        """Wait for the end, which must be a good one, and return the last line."""
        assert self.process.wait(timeout_s) == 0, self.err.read_text()
        found = json.loads(self.out.read_text().splitlines()[-1])
        assert isinstance(found, dict)
        return found

    def descendants(self) -> set[int]:
        """Return the ids of its processes, at whatever depth, that are alive."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = stat.read_text()
            except OSError:
                continue
            state, parent = text.rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found & parents.keys()


def alive(pids: set[int]) -> set[int]:
    return {
        pid
        for pid in pids
        if Path(f"/proc/{pid}/stat").exists()
        and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    }


@pytest.fixture
def demos(tmp_path: Path, handbook_dir: Path) -> Iterator:
    """Return a function that starts a demo; what is left of it is killed."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("looks for orphans in /proc")
    started: list[RunningDemo] = []

    def start(*, rate: float, duration: float) -> RunningDemo:
        folder = tmp_path / f"demo{len(started)}"
        folder.mkdir()
        started.append(RunningDemo(folder, handbook_dir, rate=rate, duration=duration))
        return started[-1]

    yield start
    for demo in started:
        demo.process.kill()
        demo.process.wait()


def check(summary: dict) -> None:
    outcomes = ("scored", "dead_lettered", "duplicate", "shed")
    assert summary["read"] == sum(summary[outcome] for outcome in outcomes)
    assert summary["read"] == summary["sent"]
    assert summary["scored"] == summary["transactions_compared"] > 0
    assert summary["fraud_reports"]["read"] == summary["fraud_reports"]["applied"]
    assert summary["scores_different"] == 0
    assert summary["average_precision_online"] == summary["average_precision_offline"]
    assert summary["drained"] is True
    assert set(summary["latency_ms"]) >= {"p50", "p95", "p99"}


def test_scores_are_the_offline_ones_and_every_event_has_an_outcome(demos) -> None:
    demo = demos(rate=300, duration=6)
    demo.await_text("scoring:")
    others = demo.descendants()
    assert len(others) >= 5  # demo, guard, broker, flow, replay
    summary = demo.summary()
    check(summary)
    assert summary["read"] + summary["fraud_reports"]["read"] == pytest.approx(1800, rel=0.02)
    assert summary["dead_lettered"] > 0  # the spoiled ones
    assert summary["frauds"] > 0
    assert 0 < summary["average_precision_online"] <= 1
    assert not alive(others)
    assert "\x1b" not in demo.out.read_text() + demo.err.read_text()


def test_interrupted_it_drains_and_a_second_one_is_turned_away(demos) -> None:
    demo = demos(rate=300, duration=600)
    demo.await_text("scoring:")
    second = demos(rate=300, duration=6)
    assert second.process.wait(60) == 1
    assert f"another demo is running here (process {demo.process.pid}" in second.err.read_text()
    others = demo.descendants()
    demo.process.send_signal(signal.SIGINT)  # to the parent alone
    summary = demo.summary()
    check(summary)
    assert summary["duration_s"] < 100
    assert not alive(others)


def test_killed_it_leaves_no_process_behind(demos) -> None:
    demo = demos(rate=300, duration=600)
    demo.await_text("scoring:")
    others = demo.descendants()
    demo.process.kill()
    demo.process.wait()
    await_that(lambda: not alive(others), "all of its processes are gone", 10)


def test_a_flow_that_dies_is_named_with_its_log(demos) -> None:
    demo = demos(rate=300, duration=600)
    demo.await_text("scoring:")
    flow = [
        pid
        for pid in demo.descendants()
        if b"bytewax.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    others = demo.descendants()
    os.kill(flow[0], signal.SIGKILL)
    assert demo.process.wait(30) == 1
    said = demo.err.read_text()
    assert "the flow ended by itself with -9" in said
    assert str(HOME / "flow.log") in said
    assert not alive(others)


def test_events_can_be_sent_without_the_screen(dev_broker: DevBroker, handbook_dir: Path) -> None:
    for topic in ("transactions", "fraud_reports"):
        dev_broker.create_topic(topic, 2)
    ran = subprocess.run(
        [sys.executable, "-m", "dataflows.demo.replay", "--now",
         "--bootstrap-servers", dev_broker.bootstrap_servers, "--handbook", str(handbook_dir),
         "--start", "1524355200000", "--rate", "200", "--duration", "1"],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    sent = json.loads(ran.stdout.splitlines()[-1])
    assert sent["done"]
    assert sent["transactions"] > 20  # not only the first
    servers = {"bootstrap.servers": dev_broker.bootstrap_servers}
    assert sum(1 for _ in read_topic("transactions", servers)) == sent["transactions"]
