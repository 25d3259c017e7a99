"""Kills under load, and what they find when a protection is off: a short form of `make chaos`."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.chaos.check import Verdict
from tests.chaos.harness import POINTS, Assets, Flow, Kill, Run, Setting
from tests.chaos.reader import resume_offsets
from tests.kafka.client import await_that

SEED = int(os.environ.get("CHAOS_SEED", "20180808"))

#: Makes a run that ends with the test: setting, what is off → run.
MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(assets: Assets, tmp_path: Path) -> Iterator[MakeRun]:
    made: list[Run] = []

    def make(setting: Setting, rng: random.Random, off: str = "") -> Run:
        made.append(Run(assets, tmp_path / f"run{len(made)}", setting, rng, off))
        return made[-1]

    yield make
    for run in made:
        run.close()


@pytest.mark.parametrize(
    ("setting", "points"),
    [
        (Setting("exactly_once", 1, duplicates=True), POINTS["exactly_once"]),
        (
            Setting("at_least_once", 2),
            ("startup", "written", "committed", "draining_before", "random"),
        ),
        (
            Setting("exactly_once", 2, apart=True),
            ("transaction", "committed", "snapshot", "tail_scan", "draining_before", "random"),
        ),
    ],
    ids=str,
)
def test_nothing_is_lost_or_doubled_by_kills(
    setting: Setting, points: Sequence[str], make_run: MakeRun
) -> None:
    print(f"CHAOS_SEED={SEED}")
    rng = random.Random(SEED)
    run = make_run(setting, rng)
    for point in points:
        kill = Kill.draw(point, setting.processes, rng)
        print(kill)
        run.kill(kill)
    verdict = run.finish()
    print(verdict)
    assert verdict.violations == []
    assert verdict.events > 1000 and verdict.bad > 10
    # The kills were such that something could have come twice, and within the flow's bound.
    assert verdict.compared > 0 if setting.delivery == "exactly_once" else verdict.repeated > 0
    assert (verdict.duplicates > 100) == setting.duplicates


@pytest.mark.parametrize("off", ["", "pending"])
def test_a_tail_outlives_an_epoch(make_run: MakeRun, off: str) -> None:
    """What one life published in one epoch, the next one may need several to come by again."""
    run = make_run(Setting("exactly_once"), random.Random(SEED), off=off)
    # A backlog is published in one epoch, and the epoch lost.
    await_that(lambda: run.load.sent > 4000, "a backlog", 60)
    # (Its first commit may be of another topic than the one that is looked at.)
    lost = 0
    for nth in range(1, 8):
        run.kill(Kill("committed", nth=nth, victim=0, all=False, after_s=0, early=False))
        lost = sum(run.reader.ends([run.topics["audit"]]).values())
        if lost > 3000:
            break
    # Slowly now: some epochs are stored that hold a part of it each.
    variables = run.flow.variables
    run.flow.variables = {**variables, "BATCH_SIZE": "1"}
    run.kill(Kill("committed", nth=11, victim=0, all=False, after_s=0, early=False))
    run.flow.variables = variables
    # That it was a part is what this test is about.
    done = sum(resume_offsets(*run.flow.stores).values())
    assert 0 < done < lost, "another share of the backlog than meant: see the load"
    violations = run.finish().violations
    assert any("doubled" in each for each in violations) if off else violations == []


@pytest.mark.parametrize("off", ["", "discard"])
def test_what_a_killed_life_stored_of_its_last_epoch_is_forgotten(
    make_run: MakeRun, off: str
) -> None:
    """Windows' snapshots of the epoch are in the store when the life ends before it is complete.

    The next life ends that epoch without an event, so nothing overwrites them.
    """

    def has_violations() -> bool:
        run = make_run(Setting("exactly_once"), random.Random(SEED), off=off)
        run.kill(Kill("committed", nth=3, victim=0, all=False, after_s=0, early=False))
        variables = run.flow.variables
        run.flow.variables = {**variables, "CHAOS_DRAIN": "yes"}
        run.flow.start()
        assert run.flow.await_end() == [0]
        run.flow.variables = variables
        return bool(run.finish().violations)

    # Whether the engine has come to store them by then is a matter of milliseconds.
    assert any(has_violations() for _ in range(4 if off else 1)) == bool(off)


def test_without_the_tail_scan_records_come_twice(make_run: MakeRun) -> None:
    run = make_run(Setting("exactly_once"), random.Random(SEED), off="tail_scan")
    run.kill(Kill("committed", nth=1, victim=0, all=False, after_s=0, early=False))
    verdict = run.finish()
    assert any("doubled" in violation for violation in verdict.violations)
    assert not any("missing" in violation for violation in verdict.violations)


def test_a_zombie_is_locked_out(make_run: MakeRun) -> None:
    verdict, zombie = zombie_goes_on(make_run(Setting("exactly_once"), random.Random(SEED)))
    assert verdict.violations == []
    # It says why it died.
    assert "Another process writes this partition now" in zombie


def test_without_fencing_a_zombie_doubles_records(make_run: MakeRun) -> None:
    run = make_run(Setting("exactly_once"), random.Random(SEED), off="fencing")
    verdict, _ = zombie_goes_on(run)
    assert any("doubled" in violation for violation in verdict.violations)


def zombie_goes_on(run: Run) -> tuple[Verdict, str]:
    """Suspend a flow in an open transaction, fail over to a copy of its store, and wake it.

    Returns what is left by the two, and the log of the first.
    """
    run.start("transaction:25", [0])
    run.flow.wait(lambda process: process.hold.exists(), "a transaction is open")
    process = run.flow.running[0]
    process.popen.send_signal(signal.SIGSTOP)
    try:
        copy = run.directory / "copy"
        shutil.copytree(run.flow.recovery, copy)
        other = Flow(run.variables, run.directory / "other", copy, 1)
        other.directory.mkdir()
        try:
            other.start()
            other.await_reading()
            sent = run.load.stop()
            run.await_durable([copy], other)
            # All is done. Now the first one wakes up, and commits what it had written.
            process.hold.with_name(process.hold.name + ".release").touch()
            process.popen.send_signal(signal.SIGCONT)
            await_that(lambda: process.ended or twice(run), "the zombie ends, or does harm")
            if process.ended:
                assert process.popen.wait() not in (0, -signal.SIGKILL)
            other.signal(signal.SIGTERM)
            assert other.await_end() == [0]
        finally:
            other.kill(list(other.running))
    finally:
        run.flow.kill([0])
    return run.judge(sent), process.text


def twice(run: Run) -> bool:
    """Tell whether a reader of committed records sees any event id twice."""
    run.reader.catch_up()
    return any(
        n > 1
        for name in ("predictions", "audit")
        for n in Counter(
            record.headers["event_id"] for record in run.reader.records[run.topics[name]]
        ).values()
    )
