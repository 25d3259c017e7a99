"""Place the parts of a recovery store on the volumes of a cluster's processes.

    python -m dataflows.parts split DIR --process 0 --processes 2 --parts 8
    python -m dataflows.parts move DIR0 DIR1 DIR2 --processes 3

A store has a fixed number of parts, and part *n* belongs to the process *n* mod `processes`.

``split`` makes the parts of one process, before its first start; safe to repeat: parts that are
there stay as they are. ``move`` rescales: give it the directories of all processes, old and new, in
the order of their ids, while none runs; it puts each part where it belongs. Killed half-way, call
it again. Parts that a new process has made meanwhile are empty, and give way to those with state.
The number of parts bounds the number of processes, and stays.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from bytewax.recovery import init_db_dir

from dataflows import recovery
from dataflows.recovery import MANIFEST, RecoveryError

#: Ends the name of a part's whole copy, as long as what it was copied from is there.
_MOVED = ".moved"


def split(directory: Path, process: int, processes: int, parts: int) -> list[int]:
    """Make the parts of a process where there are none; return their indices.

    Raises RecoveryError if the directory has other parts than these, or lacks some after the flow
    has run.
    """
    mine = list(range(process, parts, processes))
    if not 0 <= process < processes:
        raise RecoveryError(f"process {process} is none of {processes}: name one from 0 up")
    if not mine:
        raise RecoveryError(
            f"{parts} parts are too few for {processes} processes: process {process} would have "
            "none. The number of parts is chosen at the first start, and stays"
        )
    recovery.make_private(directory)
    if unfinished := sorted(directory.glob(f"*{_MOVED}")):
        raise RecoveryError(
            f"{unfinished[0]}: a move of the parts was cut short. Finish it: "
            "python -m dataflows.parts move"
        )
    wanted = {_name(n): (n, parts) for n in mine}
    found = recovery.parts_of(directory)
    for path in found:
        is_part = recovery.progress([path]).parts[0]
        if wanted.get(path.name) != is_part:
            raise RecoveryError(
                f"{path} is part {is_part[0]} of {is_part[1]}; process {process} of {processes} "
                f"has the parts {', '.join(map(str, mine))} of {parts}. After a change of the "
                "number of processes: python -m dataflows.parts move"
            )
    missing = sorted(wanted.keys() - {path.name for path in found})
    if missing and (recovery.progress(found).executions or (directory / MANIFEST).exists()):
        raise RecoveryError(
            f"{directory} lacks {', '.join(missing)}, and the flow has run with it: restore what "
            "was lost, or begin all processes with new directories"
        )
    if missing:
        with recovery.writing(directory):
            staging = Path(tempfile.mkdtemp(prefix=".new-", dir=directory))
            try:
                init_db_dir(staging, parts)  # type: ignore[no-untyped-call]
                for name in missing:
                    (staging / name).rename(directory / name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return mine


def move(directories: Sequence[Path], processes: int) -> dict[int, Path]:
    """Put each part of a store into the directory of its process; return where each part is.

    `directories` are those of all processes that were or will be, by id; a new one may be empty, or
    not be there. A part is deleted only behind its whole copy; until then the copy has another
    name, and a later move makes it anew. Of parts that are there more than once, one with state
    goes before empty ones. Raises RecoveryError if a process runs in one of the directories, if
    they do not hold each part of one store, or if two parts of one number have state, and not the
    same: then nothing has been moved.
    """
    if not 1 <= processes <= len(directories):
        raise RecoveryError(
            f"there are {len(directories)} directories for {processes} processes: give one for "
            "each process, those of before included"
        )
    held: dict[int, list[Path]] = {}
    copied: dict[int, list[Path]] = {}  # by a move that was cut short
    counts = set()
    for directory in directories:
        recovery.make_private(directory)
        if recovery.held_by(directory) is not None:
            raise RecoveryError(f"a process of the flow runs in {directory}: drain it first")
        for path in recovery.parts_of(directory):
            ((index, count),) = recovery.progress([path]).parts
            held.setdefault(index, []).append(path)
            counts.add(count)
        for path in directory.glob(f"*{_MOVED}"):
            ((index, count),) = recovery.progress([path]).parts
            held.setdefault(index, [])
            copied.setdefault(index, []).append(path)
            counts.add(count)
    if len(counts) != 1 or set(held) != set(range(*counts)):
        of = " or ".join(map(str, sorted(counts))) or "no"
        raise RecoveryError(
            f"the directories hold the parts {', '.join(map(str, sorted(held))) or 'none'} of "
            f"{of}: give all directories of one store"
        )
    if processes > len(held):
        raise RecoveryError(
            f"the store has {len(held)} parts, too few for {processes} processes. Export the state "
            "(python -m dataflows.state export) and begin a store with more parts from it"
        )
    kept = {index: _chosen(parts, copied.get(index, [])) for index, parts in held.items()}
    manifest = _manifest(directories)
    placed = {}
    for index, source in sorted(kept.items()):
        home = directories[index % processes] / _name(index)
        copy = home.with_name(home.name + _MOVED)
        with recovery.writing(home.parent):
            if manifest is not None and not (home.parent / MANIFEST).exists():
                _copy(manifest, home.parent / MANIFEST)
            _delete(path for path in copied.get(index, []) if path != source)
            if source not in (home, copy):
                _copy(source, copy)
            _delete(path for path in [*held[index], source] if path not in (home, copy))
            if source != home:
                _delete(_beside(home))
                copy.rename(home)
                _delete(_beside(copy))
        placed[index] = home
    return placed


def _manifest(directories: Sequence[Path]) -> Path | None:
    return next((d / MANIFEST for d in directories if (d / MANIFEST).exists()), None)


def _chosen(parts: Sequence[Path], copied: Sequence[Path]) -> Path:
    """Return which of the files of one part is the store's; raise RecoveryError if unknown.

    The copies of a move that was cut short matter only if what they were made of is gone.
    """
    for path in parts:
        _fold_log(path)
    for paths in (parts, copied):
        with_state = [path for path in paths if not recovery.is_empty(path)]
        for path in with_state[1:]:
            if not filecmp.cmp(with_state[0], path, shallow=False):
                raise RecoveryError(
                    f"{with_state[0]} and {path} are the same part with different content: delete "
                    "the one that the flow did not run with last, and call this again. Nothing "
                    "has been moved"
                )
        if with_state:
            return with_state[0]
    return [*parts, *copied][0]


def _fold_log(part: Path) -> None:
    """Put all of a part into its one file. Not while it is in use."""
    if any(log.stat().st_size for log in _beside(part) if log.exists()):
        recovery.fold_log(part)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, to another volume as well: whole, or not at all."""
    for log in _beside(target):  # of a part of this name that was here once
        log.unlink(missing_ok=True)
    new = target.with_name(f".{target.name}.new")  # which the engine does not take for a part
    with source.open("rb") as read, new.open("wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())
    new.rename(target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _delete(files: Iterable[Path]) -> None:
    for file in files:
        for each in [file, *_beside(file)]:
            each.unlink(missing_ok=True)


def _beside(part: Path) -> list[Path]:
    """Return the files that SQLite keeps beside a part while it is open, or was killed."""
    return [part.with_name(part.name + suffix) for suffix in ("-wal", "-shm")]


def _name(index: int) -> str:
    return f"part-{index}.sqlite3"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        "python -m dataflows.parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("split", help="make the parts of one process, if there are none")
    one.add_argument("directory", type=Path, help="the directory given to the process by -r")
    one.add_argument("--process", type=int, required=True, help="its id, from 0")
    one.add_argument("--processes", type=int, required=True, help="of the cluster")
    one.add_argument("--parts", type=int, default=8, help="of the store (%(default)s)")
    every = commands.add_parser("move", help="place the parts for another number of processes")
    every.add_argument("directories", type=Path, nargs="+", help="of all processes, by id")
    every.add_argument("--processes", type=int, required=True, help="of the cluster from now on")
    given = parser.parse_args(arguments)
    try:
        if given.command == "split":
            mine = split(given.directory, given.process, given.processes, given.parts)
            print(f"{given.directory}: parts {', '.join(map(str, mine))} of {given.parts}")
        else:
            for index, path in move(given.directories, given.processes).items():
                print(f"part {index}: {path.parent}")
    except RecoveryError as error:
        print(f"dataflows.parts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
