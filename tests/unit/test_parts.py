"""The parts of a recovery store: each is with one process, whoever placed them and was killed."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from dataflows import recovery
from dataflows.parts import main, move, split
from dataflows.recovery import RecoveryError

PARTS = 7


def placed(directories: list[Path]) -> dict[int, int]:
    """Return part → the process that has it; each once."""
    found: dict[int, int] = {}
    for number, directory in enumerate(directories):
        if directory.exists():
            for index, count in recovery.progress(recovery.parts_of(directory)).parts:
                assert index not in found and count == PARTS
                found[index] = number
    return found


def cluster(home: Path, processes: int) -> list[Path]:
    directories = [home / f"process-{n}" for n in range(processes)]
    for number, directory in enumerate(directories):
        split(directory, number, processes, PARTS)
    return directories


def mark(directories: list[Path]) -> None:
    """Let each part hold a row that says which one it is."""
    for directory in directories:
        for part in recovery.parts_of(directory):
            with closing(sqlite3.connect(part)) as connection, connection:
                connection.execute("INSERT INTO exs VALUES ('now', ?, 1, 1)", (int(part.name[5]),))


def marks(directories: list[Path]) -> dict[str, list[int]]:
    return {
        part.name: list(recovery.progress([part]).executions)
        for directory in directories
        for part in recovery.parts_of(directory)
    }


@pytest.mark.parametrize("processes", [1, 2, 3, PARTS])
def test_each_part_is_made_once(tmp_path: Path, processes: int) -> None:
    directories = cluster(tmp_path, processes)
    assert placed(directories) == {n: n % processes for n in range(PARTS)}
    found = [recovery.progress(recovery.parts_of(directory)) for directory in directories]
    assert recovery.together(found).is_whole


def test_to_split_again_changes_nothing(tmp_path: Path) -> None:
    directories = cluster(tmp_path, 2)
    mark(directories)
    before = marks(directories)
    assert cluster(tmp_path, 2) == directories
    assert marks(directories) == before


def test_a_split_that_was_killed_is_finished(tmp_path: Path) -> None:
    (directory,) = cluster(tmp_path, 1)
    for path in recovery.parts_of(directory)[2:]:
        path.unlink()
    assert split(directory, 0, 1, PARTS) == list(range(PARTS))
    assert len(placed([directory])) == PARTS


def test_a_lost_part_is_not_made_anew(tmp_path: Path) -> None:
    """Its state would be empty, and nobody would know."""
    (directory,) = cluster(tmp_path, 1)
    mark([directory])
    recovery.parts_of(directory)[3].unlink()
    with pytest.raises(RecoveryError, match=r"lacks part-3\.sqlite3, and the flow has run"):
        split(directory, 0, 1, PARTS)


def test_a_split_for_another_number_is_refused(tmp_path: Path) -> None:
    cluster(tmp_path, 2)
    with pytest.raises(RecoveryError, match="python -m dataflows.parts move"):
        split(tmp_path / "process-1", 1, 3, PARTS)
    with pytest.raises(RecoveryError, match="too few for 8 processes"):
        split(tmp_path / "new", 7, 8, PARTS)


@pytest.mark.parametrize("seed", range(4))
def test_moving_keeps_every_part(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    most = PARTS
    directories = [tmp_path / f"process-{n}" for n in range(most)]
    for number, directory in enumerate(directories[:2]):
        split(directory, number, 2, PARTS)
    mark(directories[:2])
    before = marks(directories[:2])
    for _ in range(4):
        processes = rng.randint(1, most)
        move(directories, processes)
        assert placed(directories) == {n: n % processes for n in range(PARTS)}
        assert marks(directories) == before
        for number in range(processes):  # and the processes agree, at their start
            split(directories[number], number, processes, PARTS)


def test_empty_parts_that_a_new_process_made_give_way(tmp_path: Path) -> None:
    """Its init container does that, if the overlay is applied before the parts are moved."""
    directories = [*cluster(tmp_path, 2), tmp_path / "process-2"]
    mark(directories[:2])
    before = marks(directories[:2])
    split(directories[2], 2, 3, PARTS)
    for processes in (3, 2):
        move(directories, processes)
        assert placed(directories) == {n: n % processes for n in range(PARTS)}
        assert marks(directories) == before


def test_of_two_parts_with_other_content_none_is_taken(tmp_path: Path) -> None:
    directories = [*cluster(tmp_path, 2), tmp_path / "process-2"]
    mark(directories[:2])
    directories[2].mkdir()
    stale = directories[2] / "part-2.sqlite3"  # a backup, restored to where it does not belong
    shutil.copy(directories[0] / "part-2.sqlite3", stale)
    with closing(sqlite3.connect(directories[0] / "part-2.sqlite3")) as connection, connection:
        connection.execute("INSERT INTO exs VALUES ('now', 99, 1, 1)")
    before = marks(directories[:2])
    with pytest.raises(RecoveryError, match="same part with different content: delete the one"):
        move(directories, 3)
    assert marks(directories[:2]) == before
    stale.unlink()
    move(directories, 3)
    assert marks(directories) == before


@pytest.mark.parametrize("at", range(1, 30))
def test_a_flow_goes_on_after_a_move_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """With the old number: then what the move had copied is of no use to the next one.

    With the new number, or if a part is missing here, no process starts.
    """
    directories = [*cluster(tmp_path, 2), tmp_path / "process-2"]
    mark(directories[:2])
    killed(monkeypatch, at, directories, 3)
    ready = [all_parts_are_there(directories[n], n, 2) for n in range(2)]
    if all(ready):
        with closing(sqlite3.connect(directories[0] / "part-2.sqlite3")) as connection, connection:
            connection.execute("INSERT INTO exs VALUES ('now', 99, 1, 1)")
    elif not all_parts_are_there(directories[2], 2, 3):
        with pytest.raises(RecoveryError, match=r"cut short|lacks"):
            split(directories[2], 2, 3, PARTS)
    move(directories, 3)
    assert placed(directories) == {n: n % 3 for n in range(PARTS)}
    assert marks(directories) == {
        f"part-{n}.sqlite3": [n, 99] if n == 2 and all(ready) else [n] for n in range(PARTS)
    }
    for number in range(3):
        split(directories[number], number, 3, PARTS)


@pytest.mark.parametrize("at", range(1, 30, 2))
@pytest.mark.parametrize("then", [2, 3, 4])
def test_a_move_that_was_killed_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, then: int
) -> None:
    directories = [*cluster(tmp_path, 2), *(tmp_path / f"process-{n}" for n in (2, 3))]
    mark(directories[:2])
    before = marks(directories[:2])
    killed(monkeypatch, at, directories, 3)
    killed(monkeypatch, at, directories, 4)
    move(directories, then)
    assert placed(directories) == {n: n % then for n in range(PARTS)}
    assert marks(directories) == before
    for number in range(then):
        split(directories[number], number, then, PARTS)


def killed(
    monkeypatch: pytest.MonkeyPatch, at: int, directories: list[Path], processes: int
) -> None:
    """Move, and be killed before something is copied, renamed or deleted: the `at`-th of these."""
    steps = 0

    class Killed(BaseException):
        pass

    def killed_at_some_point(what: object) -> object:
        def call(*arguments: object, **more: object) -> object:
            nonlocal steps
            steps += 1
            if steps == at:
                raise Killed
            return what(*arguments, **more)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patched:
        for owner, name in ((Path, "unlink"), (Path, "rename"), (shutil, "copyfileobj")):
            patched.setattr(owner, name, killed_at_some_point(getattr(owner, name)))
        with contextlib.suppress(Killed):
            move(directories, processes)


def all_parts_are_there(directory: Path, process: int, processes: int) -> bool:
    mine = {f"part-{n}.sqlite3" for n in range(process, PARTS, processes)}
    return mine == {path.name for path in recovery.parts_of(directory)}


def test_what_a_killed_process_left_in_the_log_moves_too(tmp_path: Path) -> None:
    directories = cluster(tmp_path, 2)
    with closing(sqlite3.connect(directories[1] / "part-1.sqlite3")) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        with connection:
            connection.execute("INSERT INTO exs VALUES ('now', 5, 1, 1)")
        log = directories[1] / "part-1.sqlite3-wal"
        assert log.stat().st_size > 0
        copy = tmp_path / "killed"  # as the disk is while it is open
        shutil.copytree(directories[1], copy)
    move([directories[0], copy], 1)
    assert list(recovery.progress([directories[0] / "part-1.sqlite3"]).executions) == [5]


def test_nothing_moves_while_a_process_runs(tmp_path: Path) -> None:
    directories = cluster(tmp_path, 2)
    store = recovery.prepare(directories[1], "fraud", process=1, processes=2)
    try:
        with pytest.raises(RecoveryError, match="drain it first"):
            move(directories, 1)
    finally:
        store.close()
    assert set(move(directories, 1)) == set(range(PARTS))
    assert recovery.read_manifest(directories[0]) == store.manifest


def test_a_forgotten_directory_is_noticed(tmp_path: Path) -> None:
    directories = cluster(tmp_path, 3)
    with pytest.raises(RecoveryError, match="hold the parts 0, 1, 3, 4, 6 of 7"):
        move(directories[:2], 2)


def test_more_processes_than_parts_are_refused(tmp_path: Path) -> None:
    directories = [*cluster(tmp_path, 2), *(tmp_path / f"new-{n}" for n in range(6))]
    with pytest.raises(RecoveryError, match="too few for 8"):
        move(directories, 8)


def test_parts_that_are_not_one_store_are_refused_at_the_start(tmp_path: Path) -> None:
    one, other = cluster(tmp_path, 2)
    found = [recovery.progress(recovery.parts_of(each)) for each in (one, one, other)]
    with pytest.raises(RecoveryError, match="process 0: 0 of 7, 2 of 7"):
        recovery.together(found)
    with pytest.raises(RecoveryError, match="not one store"):
        recovery.together(found[:1])


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        arguments = [str(tmp_path / f"process-{number}"), "--process", str(number)]
        assert main(["split", *arguments, "--processes", "2", "--parts", str(PARTS)]) == 0
    assert "process-1: parts 1, 3, 5 of 7" in capsys.readouterr().out
    assert (
        main(["move", *(str(tmp_path / f"process-{n}") for n in range(2)), "--processes", "1"]) == 0
    )
    assert main(["move", str(tmp_path / "process-1"), "--processes", "1"]) == 1
    assert "dataflows.parts: the directories hold the parts none of no" in capsys.readouterr().err
