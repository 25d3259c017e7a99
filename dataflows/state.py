"""Look at a recovery store, or take the window state out of it.

    python -m dataflows.state show DIR [--json]
    python -m dataflows.state export DIR [DIR …] --out STATE [--shards N]

``show`` reads only, also while the flow runs. What it shows is what a flow would resume with now:
of every key the newest snapshot from before the first epoch that is not durable on all workers.

``export`` writes the windows of a drained flow as a state directory, for another number of shards
if need be; a flow with a new recovery directory starts from it (STATE_DIR), and goes on where the
drained one stopped, by the offsets of GROUP_ID (START_AT=latest). Name the directories of all
processes. What is not taken along: the ids that DEDUPE remembers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from dataflows import recovery
from dataflows.recovery import RecoveryError, Snapshot
from features import journal
from features.fraud import CARD, FRAUD, SOURCES, TERMINAL
from features.seen import SeenIds
from features.state_dir import FORMAT as STATE_FORMAT
from features.state_dir import StateError, StateManifest, write_state
from features.windows import Layout, WindowShards, WindowState, reshard


class Row(msgspec.Struct, frozen=True):
    """One key of one step: a shard, a page of a journal, or a partition of an input or output."""

    step: str
    key: str
    epoch: int
    #: Seconds since the snapshot was written; a key that got no events is not written again.
    age_s: int
    bytes: int
    #: Next offset to read, or after the last record written.
    offset: int | None = None
    entities: int | None = None
    #: Of a page: its rows.
    entries: int | None = None
    #: Why the snapshot was not understood.
    problem: str | None = None


class Report(msgspec.Struct, frozen=True):
    """All of a store; sizes in bytes, ages in seconds."""

    directory: str
    flow: str | None
    resume_epoch: int
    #: Since the last commit; None: nothing has been committed.
    age_s: int | None
    file_bytes: int
    keys: list[Row]


def read(directory: Path, now_s: float) -> Report:
    """Read a store as of now. Raises RecoveryError if there is none, or it is not readable."""
    if not directory.is_dir():
        raise RecoveryError(f"{directory} is not a directory; name the one given to the flow by -r")
    parts = recovery.parts_of(directory)
    if not parts:
        raise RecoveryError(
            f"{directory} holds no recovery store (no part-*.sqlite3); name the one given to the "
            "flow by -r"
        )
    manifest = recovery.read_manifest(directory)
    epoch = recovery.resume_epoch(parts)
    rows = [_row(found, now_s) for found in recovery.snapshots(parts, before=epoch) if found.change]
    rows.sort(key=lambda row: (row.step, row.key))
    return Report(
        str(directory),
        manifest.flow if manifest else None,
        epoch,
        min((row.age_s for row in rows), default=None),
        sum(path.stat().st_size for path in _files(parts)),
        rows,
    )


def _files(parts: list[Path]) -> Iterator[Path]:
    for part in parts:
        yield part
        log = part.with_name(part.name + "-wal")
        if log.exists():
            yield log


def _row(snapshot: Snapshot, now_s: float) -> Row:
    age_s = max(0, round(now_s - snapshot.written))
    row = Row(snapshot.step_id, snapshot.key, snapshot.epoch, age_s, len(snapshot.change or b""))
    try:
        found = _described(recovery.value_of(snapshot))
    except (RecoveryError, ValueError, KeyError, msgspec.MsgspecError) as error:
        found = {"problem": str(error)}
    return msgspec.structs.replace(row, **found)


def _described(value: Any) -> Mapping[str, Any]:
    """Return what can be told of a snapshot's value."""
    if isinstance(value, int):
        return {"offset": value}
    if isinstance(value, tuple) and value[0] == "rebuild":  # of an input
        return {"offset": value[1]}
    if isinstance(value, tuple) and value[0] in ("base", "page"):  # of windows
        head = journal.describe(value)
        entries = head.get("rows" if value[0] == "page" else "entries", 0)
        return {"entities": head.get("entities"), "entries": entries}
    if isinstance(value, tuple):  # a sink partition: (format, next offset, …)
        return {"offset": next((part for part in value[1:2] if isinstance(part, int)), None)}
    if isinstance(value, bytes) and value.startswith(b"SEENIDS\0"):
        return {"entries": SeenIds.describe(value)["ids"]}
    return {}


def export(directories: Sequence[Path], out: Path, shards: int | None = None) -> StateManifest:
    """Write the windows that a drained flow would resume with as a state directory.

    Args:
        directories: of all processes, together with every part of the store.
        out: the state directory, replaced if it is one.
        shards: their number from now on; None: as before.

    Raises:
        RecoveryError: The store is not whole, or not this version's, or in use, or the flow was
            killed: what it published of its last epoch would come twice.
        StateError: `out` holds something else.
    """
    parts = [part for directory in directories for part in recovery.parts_of(directory)]
    names = ", ".join(map(str, directories))
    if not parts:
        raise RecoveryError(f"{names}: no recovery store (no part-*.sqlite3)")
    whole = recovery.progress(parts)
    if not whole.is_whole:
        raise RecoveryError(f"{names}: these are not all parts of the store; name all directories")
    for directory in directories:
        if recovery.held_by(directory) is not None:
            raise RecoveryError(f"a process of the flow runs in {directory}: drain it first")
    epoch = whole.resume_epoch
    if any(found.epoch >= epoch for found in recovery.snapshots(parts)):
        raise RecoveryError(
            f"{names}: the flow was killed in epoch {epoch}. Start it once more and drain it "
            "(SIGTERM), so that nothing of that epoch is published twice"
        )
    states: dict[str, dict[int, bytes]] = {}
    clock = 0
    for view in (CARD, TERMINAL):
        bases: list[journal.Base] = []
        pages: list[journal.Page] = []
        for found in recovery.snapshots(parts, before=epoch, step_id=f"fraud.{view.name}.state"):
            if found.change is not None:
                value = recovery.value_of(found)
                (bases if value[0] == "base" else pages).append(value)
        if not bases:
            raise RecoveryError(f"{names}: no windows of the view {view.name!r} are stored")
        before = WindowState.describe(bases[0][-1])["shards"]
        try:
            held = WindowShards(Layout.of(view, SOURCES, before))
            journal.resume(held, bases, pages)
        except ValueError as error:
            raise RecoveryError(f"{names}: {error}") from None
        every = [held[shard] for shard in range(before)]
        clock = max(clock, *(state.clock for state in every))
        if shards not in (None, before):
            every = reshard(every, Layout.of(view, SOURCES, shards))
        states[view.name] = {n: s.snapshot() for n, s in enumerate(every) if s.entities}
    manifest = StateManifest(
        STATE_FORMAT, FRAUD.name, FRAUD.schema_hash, shards or before, clock + 1, {}
    )
    write_state(out, manifest, states)
    return manifest


def _show(report: Report, console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("step")
    table.add_column("key")
    for name in ("epoch", "age", "bytes", "entities", "entries", "offset"):
        table.add_column(name, justify="right")
    step = None
    for row in report.keys:
        cells = [row.epoch, _age(row.age_s), row.bytes, row.entities, row.entries, row.offset]
        table.add_row(
            row.step if row.step != step else "",
            row.key,
            *(_cell(cell) for cell in cells),
            style="red" if row.problem else None,
        )
        step = row.step
    totals = [sum(getattr(row, n) or 0 for row in report.keys) for n in ("bytes", "entities")]
    table.add_section()
    entries = sum(row.entries or 0 for row in report.keys)
    table.add_row(
        "total", f"{len(report.keys)} keys", "", "", *(f"{n:,}" for n in (*totals, entries)), ""
    )
    console.print(table)
    age = "nothing committed" if report.age_s is None else f"committed {_age(report.age_s)} ago"
    console.print(
        f"\n{report.directory}: flow {report.flow or 'unknown (no store.json)'}, resumes in epoch "
        f"{report.resume_epoch}, {age}; {report.file_bytes:,} bytes on disk",
        soft_wrap=True,
    )
    for row in report.keys:
        if row.problem:
            console.print(f"{row.step} {row.key}: {row.problem}", style="red", soft_wrap=True)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _age(seconds: int) -> str:
    """Return an age in its largest unit.

    >>> _age(59), _age(5400), _age(200_000)
    ('59 s', '90 min', '55 h')
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size or (unit == "min" and seconds >= size):
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _export(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    if given.shards is not None and not 1 <= given.shards <= 999:
        parser.error(f"--shards {given.shards}: accepted: [1, 999]")
    try:
        manifest = export(given.directories, given.out, given.shards)
    except (RecoveryError, StateError) as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{given.out}: the windows as of stream time {manifest.until - 1}. Start the flow with a "
        f"new recovery directory, STATE_DIR={given.out} SHARDS={manifest.shards} START_AT=latest, "
        "and the same GROUP_ID"
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dataflows.state", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="list steps, shards and partitions")
    show.add_argument("directory", type=Path, help="the directory given to the flow by -r")
    show.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    taken = commands.add_parser("export", help="write the window state of a drained flow")
    taken.add_argument("directories", type=Path, nargs="+", help="of all processes of the flow")
    taken.add_argument("--out", type=Path, required=True, help="state directory to write")
    taken.add_argument("--shards", type=int, help="SHARDS from now on (as before)")
    given = parser.parse_args(arguments)
    if given.command == "export":
        return _export(parser, given)
    try:
        report = read(given.directory, time.time())
    except RecoveryError as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        print(msgspec.json.encode(report).decode())
    else:
        # Piped, the table keeps its columns instead of being cut at 80.
        console = Console() if sys.stdout.isatty() else Console(width=160)
        _show(report, console)
    return 1 if any(row.problem for row in report.keys) else 0


if __name__ == "__main__":
    sys.exit(main())
