"""The recovery store: made if there is none, owned by one flow, looked through before it is loaded.

Bytewax 0.21.1 wants a directory that somebody has initialised, unpickles whatever it holds, starts
renamed steps empty without a word, and panics when a partition it has state of is gone. Here each
of these is either done for the operator or refused with a sentence, before the engine starts.

``-r DIR`` names one directory for all processes of a cluster, or each has a directory of its own
with some of the parts, and they meet (`Store.meet`, PEERS_PORT). In it:

========================  =====================================================================
``part-<n>.sqlite3``      Bytewax's, with ``-wal`` and ``-shm`` beside it while a flow runs
``store.json``            `Manifest`: whose it is
``.process-<id>.lock``    held (flock) for the life of that process of the flow; says its pid
``.process-<id>.json``    what that process tells the others (`dataflows.kafka.peers`)
========================  =====================================================================
"""

from __future__ import annotations

import fcntl
import io
import os
import pickle
import pickletools
import re
import shutil
import socket
import sqlite3
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import bytewax.run
import msgspec
import structlog
from bytewax.dataflow import Dataflow
from bytewax.recovery import init_db_dir

from dataflows.kafka.meeting import Meeting
from dataflows.kafka.peers import Peers, SharedDirectory
from dataflows.kafka.sink import SinkState, check_state
from dataflows.kafka.topics import part_name
from features import journal
from features.seen import SeenIds
from features.state_dir import StateDir
from features.windows import Layout, WindowShards, WindowState

log = structlog.get_logger()

FORMAT = 1
MANIFEST = "store.json"

_NEW_DIRECTORY = (
    "name a new recovery directory with -r: START_AT=rebuild goes on where GROUP_ID stopped, with "
    "windows that it fills from the topics; otherwise the topics are read anew (START_AT), the "
    "windows begin with STATE_DIR, or empty, and what is read again may also be written again"
)
#: What values of int, bytes, str, None, bool and tuples are pickled to (protocol 4 and 5).
_PLAIN_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MEMOIZE", "BINGET", "LONG_BINGET"),
        *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("MARK", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    }
)
_MOST_OPCODES = 100_000
#: Processes of a cluster start together: how long a lock may say what will soon be otherwise.
_SETTLES_S = 2.0
_LOOK_AGAIN_S = 0.02
_DAMAGED_PICKLE = (
    ValueError, EOFError, IndexError, KeyError, OverflowError, MemoryError, struct.error,
    pickle.UnpicklingError,
)  # fmt: skip


class RecoveryError(RuntimeError):
    """Say why the recovery store cannot be used: what, where, and what to do."""


class Manifest(msgspec.Struct, frozen=True):
    """What ``store.json`` says."""

    format: int
    flow: str
    bytewax: str
    #: ISO 8601, UTC.
    created: str


@dataclass(frozen=True)
class Launch:
    """What ``python -m bytewax.run`` was told about recovery and the cluster."""

    directory: Path | None
    process: int
    processes: int
    #: In each process.
    workers: int
    #: Of epochs, in seconds.
    interval_s: float = 10.0
    #: Of each process, for the engine: host:port.
    addresses: tuple[str, ...] = ()


def launched() -> Launch | None:
    """Return what this process was launched with; None if not by ``python -m bytewax.run``.

    Flags and variables are read by Bytewax's own parser, which has accepted them already.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None or spec.name != "bytewax.run":
        return None
    given = bytewax.run._parse_args()  # type: ignore[no-untyped-call]
    addresses = (given.addresses or "").split(";")
    workers = given.workers_per_process or 1
    interval = given.snapshot_interval
    return Launch(
        given.recovery_directory,
        given.process_id or 0,
        len(addresses),
        workers,
        10.0 if interval is None else interval.total_seconds(),
        tuple(addresses),
    )


# Make and own


@dataclass(frozen=True)
class Store:
    """A recovery directory that this process holds until `close`, or until it ends."""

    directory: Path
    manifest: Manifest
    process: int
    processes: int
    #: Of all processes.
    workers: int
    _lock: int = field(repr=False)
    #: Of each process, for the engine: host:port.
    addresses: tuple[str, ...] = ()
    #: Where the processes meet; None: in the directory.
    meeting: Meeting | None = None
    #: What all parts say, wherever they are; None: those in the directory.
    whole: Progress | None = None

    @property
    def keeps_journal(self) -> bool:
        """Whether the windows' rows go to a journal: one worker, and a store in one part.

        A store in several parts is to be spread over processes, each of which has some shards.
        """
        return self.workers == 1 and progress(parts_of(self.directory)).parts == [(0, 1)]

    def meet(self, port: int, orphaned: Callable[[str], None]) -> Store:
        """Hear what parts the other processes have, who have directories of their own.

        They listen at `port` of their addresses. Waits for all of them; for `orphaned` see
        `dataflows.kafka.meeting`. Returns the store, knowing.

        Raises RecoveryError if the parts are not those of one store; ServeError.
        """
        hosts = [address.rpartition(":")[0].strip("[]") for address in self.addresses]
        here = progress(parts_of(self.directory))
        meeting = Meeting(
            [(host, port) for host in hosts], self.process, msgspec.json.encode(here), orphaned
        )
        found = [msgspec.json.decode(each, type=Progress) for each in meeting.meet()]
        return replace(self, meeting=meeting, whole=together(found))

    def peers(self) -> Peers | None:
        """Return the other processes of the cluster, to drain with; None if there are none."""
        if self.processes == 1:
            return None
        if self.meeting is not None:
            return Peers(self.meeting, self.process, self.processes)
        with writing(self.directory):
            board = SharedDirectory(
                self.directory,
                self.process,
                self.processes,
                lambda process: is_held(self.directory, process),
            )
            return Peers(board, self.process, self.processes)

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._lock)


def open_store(flow_id: str, delivery: str) -> Store | None:
    """Prepare the store that this process was launched with; None if with none.

    Raises RecoveryError as `prepare` does, and if the delivery guarantee needs a store.
    """
    launch = launched()
    if launch is None:
        return None
    if launch.directory is not None:
        return prepare(
            launch.directory,
            flow_id,
            process=launch.process,
            processes=launch.processes,
            workers=launch.workers,
            addresses=launch.addresses,
        )
    how = "run with -r DIR -s 10 -b 0; DIR is created if it is not there"
    if delivery == "exactly_once":
        raise RecoveryError(f"DELIVERY=exactly_once needs a recovery store: {how}")
    if delivery == "at_least_once":
        log.warning(
            "there is no recovery store, so a restart reads from START_AT again, with empty "
            f"windows: {how}"
        )
    return None


def prepare(
    directory: Path,
    flow_id: str,
    *,
    process: int = 0,
    processes: int = 1,
    workers: int = 1,
    addresses: tuple[str, ...] = (),
) -> Store:
    """Take hold of a recovery directory, creating the store if there is none.

    All processes of a cluster may call it at once, on one directory. Existing parts are never
    touched; a store made by ``python -m bytewax.recovery`` is taken over. A store made here has
    one part: Bytewax's pause at a snapshot does not depend on their number.

    Raises RecoveryError if the directory is not this user's, is held by another flow, or holds
    another flow's store.
    """
    directory = directory.absolute()
    make_private(directory)
    with writing(directory):
        lock, life = _hold(directory, process, processes)
        try:
            _refuse_others(directory, processes, life)
            with _locked(directory / ".create.lock"):
                manifest = _create(directory, flow_id)
        except BaseException:
            os.close(lock)
            raise
    return Store(directory, manifest, process, processes, processes * workers, lock, addresses)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Say of what goes wrong with files that the directory cannot be written: RecoveryError."""
    try:
        yield
    except OSError as error:
        raise RecoveryError(
            f"the recovery directory {directory} cannot be written ({error.strerror}): make room, "
            "or make it writable, and start again"
        ) from None


def make_private(directory: Path) -> None:
    """Create a directory that only its owner may enter, or make it so.

    Raises RecoveryError if it is another user's, or cannot be created.
    """
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        raise RecoveryError(
            f"-r {directory}: there is no directory {directory.parent} to create it in; create "
            "that (or mount the volume), or correct -r"
        ) from None
    except OSError as error:
        raise RecoveryError(f"-r {directory} cannot be created: {error.strerror}") from None
    found = directory.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise RecoveryError(f"-r {directory} is not a directory; name another")
    if found.st_uid != os.geteuid():
        raise RecoveryError(
            f"-r {directory} belongs to user {found.st_uid}, this process runs as {os.geteuid()}; "
            "who can write there decides what the flow believes. Name a directory that does not "
            "exist yet, for instance inside it, or change its owner"
        )
    if found.st_mode & 0o077:
        directory.chmod(0o700)
        log.warning(
            "the recovery directory was open to other users; now only its owner may enter it",
            directory=str(directory),
            was=f"{stat.S_IMODE(found.st_mode):04o}",
        )


def _executions(directory: Path) -> int:
    """Return how many times the engine has begun on this store.

    It begins when all processes of a cluster are there. So one that started when it was less is of
    an earlier life; those that wait for each other have found the same.
    """
    begun = 0
    for part in parts_of(directory):
        with _open(part) as connection:
            (newest,) = connection.execute("SELECT MAX(ex_num) FROM exs").fetchone()
            begun = max(begun, 0 if newest is None else newest + 1)
    return begun


def _hold(directory: Path, process: int, processes: int) -> tuple[int, int]:
    """Lock the directory for this process, and say so in the lock; return it, and its life."""
    file = os.open(directory / f".process-{process}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + _SETTLES_S
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # by one that starts, too, while it looks at the others
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOOK_AGAIN_S)
    except BlockingIOError:
        who = _holder(file)
        os.close(file)
        raise RecoveryError(
            f"the recovery directory {directory} is in use: {who} runs as process {process} of a "
            "flow on it. Stop that one first (if it is suspended, it holds the directory until it "
            "is resumed or killed), or name another directory"
        ) from None
    except OSError as error:
        os.close(file)
        raise RecoveryError(
            f"{directory}: this file system has no locks ({error.strerror}); name a directory on "
            "one that has"
        ) from None
    try:
        life = _executions(directory)  # not before it is held: an earlier life may begin
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} {socket.gethostname()} {processes} {life}".encode(), 0)
    except BaseException:
        os.close(file)
        raise
    return file, life


def _holder(file: int) -> str:
    pid, host, _, _ = _who(file)
    return f"pid {pid} on {host}" if pid.isdecimal() else "another process"


def _who(file: int) -> tuple[str, str, str, str]:
    """Return what a lock file says: pid, host, number of processes of its cluster, its life."""
    words = os.pread(file, 300, 0).decode(errors="replace").split(" ")
    pid, host, processes, life = (*words, "", "", "", "")[:4]
    return pid, host, processes, life


def _refuse_others(directory: Path, processes: int, life: int) -> None:
    """Refuse to run beside a process of a cluster of another size, or of an earlier life.

    A process that lives on for a while after another has died may still complete the epoch that
    the successor of that one would discard.
    """
    for path in directory.glob(".process-*.lock"):
        number = re.fullmatch(r"\.process-(\d+)\.lock", path.name)
        if number is None:
            continue
        file = os.open(path, os.O_RDWR)
        deadline = time.monotonic() + _SETTLES_S
        try:
            while (held := _if_held(file)) is not None:
                size, since = held
                if int(number[1]) < processes and held == (str(processes), str(life)):
                    break
                # One that starts holds the lock before it has said what it is.
                if time.monotonic() > deadline:
                    other = "" if since == str(life) else ", of an earlier life"
                    raise RecoveryError(
                        f"the recovery directory {directory} is in use: {_holder(file)} still runs "
                        f"as process {number[1]} of a cluster of {size or '?'} on it{other}, and "
                        f"this one has {processes}. Stop that one first"
                    )
                time.sleep(_LOOK_AGAIN_S)
        finally:
            os.close(file)


def _if_held(file: int) -> tuple[str, str] | None:
    """Return the size and the life of the cluster whose process holds this lock; None: nobody."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _who(file)[2:]
    fcntl.flock(file, fcntl.LOCK_UN)
    return None


def is_held(directory: Path, process: int) -> bool:
    """Tell whether some process, this one included, holds the directory as this process id."""
    try:
        file = os.open(directory / f".process-{process}.lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def held_by(directory: Path) -> int | None:
    """Return the id of a process that holds the directory; None: nobody does."""
    for path in sorted(directory.glob(".process-*.lock")):
        number = path.name.removeprefix(".process-").removesuffix(".lock")
        if number.isdecimal() and is_held(directory, int(number)):
            return int(number)
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _create(directory: Path, flow_id: str) -> Manifest:
    for abandoned in directory.glob(".new-*"):  # by a process that was killed just here
        shutil.rmtree(abandoned, ignore_errors=True)
    manifest = read_manifest(directory)
    if not parts_of(directory):
        if manifest is not None:
            raise RecoveryError(
                f"{directory} has a {MANIFEST} but no part-*.sqlite3: the state was deleted. "
                f"Restore it; or {_NEW_DIRECTORY}"
            )
        _make_part(directory)
    if manifest is None:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = Manifest(FORMAT, flow_id, version("bytewax"), created)
        _write_whole(directory / MANIFEST, msgspec.json.encode(manifest))
    if manifest.flow != flow_id:
        raise RecoveryError(
            f"the recovery store in {directory} is of the flow {manifest.flow!r}, this is the flow "
            f"{flow_id!r}: correct -r"
        )
    if manifest.bytewax != version("bytewax"):
        raise RecoveryError(
            f"the recovery store in {directory} was made by Bytewax {manifest.bytewax}, this is "
            f"{version('bytewax')}, which may resume it otherwise than this flow expects: install "
            f"{manifest.bytewax}, or {_NEW_DIRECTORY}"
        )
    return manifest


def _make_part(directory: Path) -> None:
    """Create the store's part: all of it, or none."""
    staging = Path(tempfile.mkdtemp(prefix=".new-", dir=directory))
    try:
        init_db_dir(staging, 1)  # type: ignore[no-untyped-call]
        (staging / "part-0.sqlite3").rename(directory / "part-0.sqlite3")
    except BaseException as error:
        # Bytewax panics, past `Exception`, when SQLite cannot write.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise RecoveryError(
                f"the recovery store cannot be created in {directory} ({error}); is the disk full?"
            ) from None
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_whole(path: Path, data: bytes) -> None:
    new = path.with_name(f".new-{path.name}")
    with new.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    new.rename(path)


def read_manifest(directory: Path) -> Manifest | None:
    """Return what ``store.json`` says, None if there is none; RecoveryError if not readable."""
    path = directory / MANIFEST
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise RecoveryError(
            f"{path} cannot be read ({error}): restore it, or delete it if the parts beside it are "
            "this flow's"
        ) from None
    if found.format != FORMAT:
        raise RecoveryError(
            f"the recovery store in {directory} has format {found.format}, this version reads "
            f"{FORMAT}: run the version that wrote it, or {_NEW_DIRECTORY}"
        )
    return found


def parts_of(directory: Path) -> list[Path]:
    """Return the store's SQLite files, by name; the ones that Bytewax would open."""
    return sorted(directory.glob("*.sqlite3"))


# Read


class Snapshot(NamedTuple):
    """A row of the store. ``change`` is a pickle; None: the key was discarded."""

    part: Path
    step_id: str
    key: str
    epoch: int
    #: Seconds since 1970, whole.
    written: int
    change: bytes | None


def snapshots(
    parts: Collection[Path], before: int | None = None, step_id: str | None = None
) -> Iterator[Snapshot]:
    """Read all rows; or of each step and key the newest from before an epoch: what is loaded.

    With `before` also of one step only.

    Reads only, also while a flow writes: what was committed when reading began.
    """
    columns = (
        "step_id, state_key, snap_epoch, CAST(strftime('%s', created_at) AS INTEGER), ser_change"
    )
    newest = (
        f"SELECT {columns} FROM snaps JOIN (SELECT step_id, state_key, MAX(snap_epoch) AS "
        "snap_epoch FROM snaps WHERE snap_epoch < ? AND step_id = IFNULL(?, step_id) "
        "GROUP BY step_id, state_key) "
        "USING (step_id, state_key, snap_epoch) ORDER BY step_id, state_key"
    )
    for part in parts:
        with _open(part) as connection:
            rows = (
                connection.execute(f"SELECT {columns} FROM snaps ORDER BY step_id, state_key")
                if before is None
                else connection.execute(newest, (before, step_id))
            )
            for row in rows:
                yield Snapshot(part, *row)


class Progress(msgspec.Struct, frozen=True):
    """What parts of a store say of how far the flow is."""

    #: (index, of how many) of each part.
    parts: list[tuple[int, int]]
    #: Number → workers, and the epoch it began in.
    executions: dict[int, tuple[int, int]]
    #: (execution, worker, the epoch that is the first not durable on it).
    fronts: list[tuple[int, int, int]]
    #: The newest epoch up to which a part has given up older snapshots; 0: none has.
    newest_commit: int

    @property
    def is_whole(self) -> bool:
        """Whether these are all parts of the store, each once."""
        return sorted(self.parts) == [(n, len(self.parts)) for n in range(len(self.parts))]

    @property
    def resume_epoch(self) -> int:
        """Return the epoch that a flow resumes in: the first that is not durable on every worker.

        As Bytewax 0.21.1 reckons it (``src/recovery.rs``, `resume_from`); 1 for a new store.
        """
        if not self.executions:
            return 1
        fronts = {(number, worker): epoch for number, worker, epoch in self.fronts}
        last = max(self.executions)
        workers, began = self.executions[last]
        return min(fronts.get((last, worker), began) for worker in range(workers))


def progress(parts: Collection[Path]) -> Progress:
    """Read what parts say of how far the flow is."""
    found = Progress([], {}, [], 0)
    for part in parts:
        with _open(part) as connection:
            (commit,) = connection.execute("SELECT MAX(commit_epoch) FROM commits").fetchone()
            rows = connection.execute("SELECT ex_num, worker_count, resume_epoch FROM exs")
            of_part = Progress(
                connection.execute("SELECT part_index, part_count FROM parts").fetchall(),
                {number: (workers, epoch) for number, workers, epoch in rows},
                connection.execute(
                    "SELECT ex_num, worker_index, worker_frontier FROM fronts"
                ).fetchall(),
                commit or 0,
            )
        found = _joined(found, of_part)
    return found


def is_empty(part: Path) -> bool:
    """Tell whether no flow has run with a part."""
    with _open(part) as connection:
        found = [
            connection.execute(f"SELECT EXISTS (SELECT * FROM {table})").fetchone()[0]
            for table in ("exs", "fronts", "commits", "snaps")
        ]
    return not any(found)


def together(found: Collection[Progress]) -> Progress:
    """Put together what the processes of a cluster have found, each in a directory of its own.

    Raises RecoveryError unless it is one store, with each part once.
    """
    whole = Progress([], {}, [], 0)
    for each in found:
        whole = _joined(whole, each)
    if not whole.is_whole:
        have = "; ".join(
            f"process {n}: {', '.join(f'{i} of {of}' for i, of in sorted(each.parts)) or 'none'}"
            for n, each in enumerate(found)
        )
        raise RecoveryError(
            f"the recovery parts of the cluster's processes are not one store ({have}): each part "
            "must be there once. Let `python -m dataflows.parts` place them, or restore those that "
            "are missing"
        )
    return whole


def _joined(one: Progress, other: Progress) -> Progress:
    return Progress(
        [*one.parts, *other.parts],
        {**one.executions, **other.executions},
        [*one.fronts, *other.fronts],
        max(one.newest_commit, other.newest_commit),
    )


def resume_epoch(parts: Collection[Path]) -> int:
    """Return the epoch that a flow resumes in, if these are all its parts."""
    return progress(parts).resume_epoch


def discard_open_epoch(directory: Path, delivery: str, whole: Progress | None = None) -> int:
    """Delete what a killed life has stored of an epoch that never became durable.

    Bytewax 0.21.1 stores snapshots as they come (``src/timely.rs``, `partd_write`), and afterwards
    that the epoch is complete. Killed in between, it resumes at that epoch and gives the number
    again; a key that is not awake in the new one keeps the dead life's snapshot under it, which
    counts as durable as soon as the new one is. Its events would move windows twice, or be taken
    for duplicates of themselves. Where that cannot be told because parts are elsewhere,
    ``exactly_once`` does not start; the other guarantees go on, with a warning.

    Call it while this process holds the directory, before the engine starts; all processes of a
    cluster may. `whole`: what all parts say, if not all are here (`Store.meet`). Returns the number
    of snapshots deleted.

    Raises RecoveryError if the store cannot be written, or `delivery` rules out to go on.
    """
    parts = parts_of(directory)
    whole = progress(parts) if whole is None else whole
    if not whole.is_whole:
        what = (
            "not all parts of the recovery store are in this directory, so what a killed life left "
            "of its last epoch cannot be told from the rest"
        )
        here, of = len(parts), max((count for _, count in whole.parts), default=0)
        if delivery == "exactly_once":
            raise RecoveryError(
                f"{directory} ({here} of {of} parts): {what}, and events could move windows twice "
                "(DELIVERY=exactly_once). Put all parts into one directory and give it to all "
                f"processes, or set PEERS_PORT; or {_NEW_DIRECTORY}"
            )
        log.warning(
            f"{what}: give all processes one directory, or set PEERS_PORT",
            directory=str(directory),
            here=here,
            parts=of,
        )
        return 0
    epoch = whole.resume_epoch
    if whole.newest_commit > epoch:
        return 0  # a part is older than the others: Bytewax refuses to resume, and says so
    deleted = 0
    for part in parts:
        with _changing(part) as connection:
            found = connection.execute("DELETE FROM snaps WHERE snap_epoch >= ?", (epoch,))
            deleted += found.rowcount
    if deleted:
        log.info("snapshots of an epoch that was never complete are discarded", count=deleted)
    return deleted


def seed_windows(directory: Path, flow: Dataflow) -> int:
    """Store the window state that new shards start from, for views that have had no rows yet.

    Otherwise the first snapshot would have to write it all, while events wait. Only where the
    store has one part: the engine alone knows which part a key belongs to. Call it after
    `discard_open_epoch`, if there is one worker: to the engine it looks as if a worker had run for
    an epoch. Returns the number of shards stored.

    Raises RecoveryError if the store cannot be written.
    """
    parts = parts_of(directory)
    if progress(parts).parts != [(0, 1)]:
        return 0
    seeded = 0
    with writing(directory):
        epoch = resume_epoch(parts)
        for step_id, layout, start in _windows(flow.substeps):
            if start is None:
                continue
            if any(value[-2] != journal.SEED for _, value in _stored(parts, epoch, step_id)):
                continue
            if epoch == 1:  # the engine cannot load what is from before the first
                epoch = 2
                with _changing(parts[0]) as connection:
                    connection.execute(
                        "INSERT INTO exs (ex_num, worker_count, resume_epoch) VALUES "
                        "((SELECT IFNULL(MAX(ex_num) + 1, 0) FROM exs), 1, 1)"
                    )
                    connection.execute(
                        "INSERT INTO fronts (ex_num, worker_index, worker_frontier) VALUES "
                        "((SELECT MAX(ex_num) FROM exs), 0, 2)"
                    )
            rows = []
            for shard in range(layout.shards):
                data = start.read(layout.view.name, shard) or WindowState(layout).snapshot()
                value = pickle.dumps(("base", shard, journal.SEED, data))
                rows.append((step_id, journal.shard_key(shard), epoch - 1, value))
            with _changing(parts[0]) as connection:
                connection.execute(
                    "DELETE FROM snaps WHERE step_id = ? AND snap_epoch < ?", (step_id, epoch)
                )
                connection.executemany(
                    "INSERT INTO snaps (step_id, state_key, snap_epoch, ser_change) "
                    "VALUES (?, ?, ?, ?)",
                    rows,
                )
            seeded += len(rows)
            log.info("the windows begin with the state given", view=layout.view.name)
    return seeded


def fold_journals(directory: Path, flow: Dataflow, whole: Progress | None = None) -> int:
    """Put the rows of window journals into the shards' states: a cluster keeps none.

    A journal's key and the shards of its rows may belong to different workers there. Call it after
    `check` and `discard_open_epoch`; all processes of a cluster may. Killed half-way, it can be
    called again: a state that holds a page's rows says so. Takes as long as a resume and a
    snapshot of all state. `whole` as for `discard_open_epoch`. Returns the number of pages folded.

    Raises RecoveryError if the store cannot be written, or a shard's state is not in it.
    """
    folded = 0
    with writing(directory), _locked(directory / ".create.lock"):
        parts = parts_of(directory)
        epoch = (progress(parts) if whole is None else whole).resume_epoch
        for step_id, layout, _ in _windows(flow.substeps):
            stored = list(_stored(parts, epoch, step_id))
            pages = [value for _, value in stored if value[0] == "page"]
            if not pages:
                continue
            bases = [value for _, value in stored if value[0] == "base"]
            if len(bases) < layout.shards:
                raise RecoveryError(
                    f"{directory}: the journal of step {step_id!r} is here, but only {len(bases)} "
                    f"of {layout.shards} shards are. Put all parts of the store into one "
                    f"directory and give it to all processes; or {_NEW_DIRECTORY}"
                )
            states = WindowShards(layout)
            last = journal.resume(states, bases, pages)
            for snapshot, (kind, shard, *_) in stored:
                if kind == "base":
                    value = ("base", shard, last, states[shard].snapshot())
                    _write(snapshot, "UPDATE snaps SET ser_change = ?", pickle.dumps(value))
            for snapshot, (kind, *_) in stored:
                if kind == "page":
                    _write(snapshot, "DELETE FROM snaps")
            folded += len(pages)
            log.info("the journal is folded into the shards", step=step_id, pages=len(pages))
    return folded


def stored_windows(directory: Path, flow: Dataflow) -> dict[str, journal.Stored]:
    """Return how far what is stored of each view goes, of those whose shards are all stored.

    Raises RecoveryError if a page of a journal is missing.
    """
    parts = parts_of(directory)
    epoch = resume_epoch(parts)
    found = {}
    for step_id, layout, _ in _windows(flow.substeps):
        # Without the bytes, which may be a gigabyte.
        stored = [(*value[:-1], b"") for _, value in _stored(parts, epoch, step_id)]
        bases = sorted(value for value in stored if value[0] == "base")
        pages = [value for value in stored if value[0] == "page"]
        if len(bases) < layout.shards:
            continue
        try:
            journal.needed(bases, pages, layout.shards)
        except ValueError as error:
            raise RecoveryError(
                f"{directory}, step {step_id!r}: {error}. Restore a backup; or {_NEW_DIRECTORY}"
            ) from None
        last = max(number for *_, number, _ in stored)
        found[layout.view.name] = journal.Stored(last, [as_of for _, _, as_of, _ in bases])
    return found


def _stored(parts: Collection[Path], epoch: int, step_id: str) -> Iterator[tuple[Snapshot, Any]]:
    """Yield what a flow that resumes in an epoch would load for one step."""
    for snapshot in snapshots(parts, before=epoch, step_id=step_id):
        if snapshot.change is not None:
            yield snapshot, value_of(snapshot)


def _write(snapshot: Snapshot, what: str, *values: object) -> None:
    where = " WHERE step_id = ? AND state_key = ? AND snap_epoch "
    # Older pages would come to light again.
    where += "<= ?" if what.startswith("DELETE") else "= ?"
    with _changing(snapshot.part) as connection:
        row = (snapshot.step_id, snapshot.key, snapshot.epoch)
        connection.execute(what + where, (*values, *row))


def fold_log(part: Path) -> None:
    """Put what a killed process left in a part's log into its one file."""
    with closing(sqlite3.connect(part, timeout=5.0)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@contextmanager
def _changing(part: Path) -> Iterator[sqlite3.Connection]:
    """Open a part for one transaction."""
    try:
        with closing(sqlite3.connect(part, timeout=5.0)) as connection, connection:
            yield connection
    except sqlite3.Error as error:
        raise RecoveryError(
            f"{part} cannot be written ({error}); is the disk full, or mounted read-only?"
        ) from None


@contextmanager
def _open(part: Path) -> Iterator[sqlite3.Connection]:
    """Open a part to read it as of now, whoever else has it open."""
    try:
        uri = f"{part.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=5.0, isolation_level=None)) as opened:
            opened.execute("BEGIN")
            yield opened
    except sqlite3.Error as error:
        raise RecoveryError(
            f"{part} cannot be read as a recovery store ({error}): restore it from a backup, or "
            f"{_NEW_DIRECTORY}"
        ) from None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def value_of(snapshot: Snapshot) -> Any:
    """Return the value of a snapshot that was not discarded: int, bytes, str, None, bool, tuple.

    Raises RecoveryError, without executing anything, for a pickle that could do more than hold
    such values.
    """
    assert snapshot.change is not None
    try:
        for count, (opcode, _, _) in enumerate(pickletools.genops(snapshot.change)):
            if opcode.name not in _PLAIN_OPCODES:
                raise _unsafe(snapshot, f"has the opcode {opcode.name}")
            if count > _MOST_OPCODES:
                raise _unsafe(snapshot, f"has more than {_MOST_OPCODES} opcodes")
        return _PlainUnpickler(io.BytesIO(snapshot.change)).load()
    except _DAMAGED_PICKLE as error:
        raise _unsafe(snapshot, f"is damaged ({error})") from None


def _unsafe(snapshot: Snapshot, what: str) -> RecoveryError:
    return RecoveryError(
        f"{snapshot.part}: the snapshot of step {snapshot.step_id!r}, key {snapshot.key!r} (epoch "
        f"{snapshot.epoch}) {what}. This flow stores only plain values, so it did not write that; "
        "loading it could run foreign code. Find out who can write to the directory, and restore "
        f"a backup; or {_NEW_DIRECTORY}"
    )


# Check


class _Step(NamedTuple):
    """A step with state.

    Attributes:
        keys: the partitions of an input or output; None: any key.
        what: what it does with them, for the error.
        check: raises ValueError unless a value fits the step.
    """

    keys: frozenset[str] | None
    what: str
    check: Callable[[Any], object] | None


@dataclass(frozen=True)
class Checked:
    """What `check` has looked at.

    Attributes:
        epoch: the one that the flow resumes in.
        written: output partition → its state as of then.
    """

    snapshots: int
    bytes: int
    epoch: int
    written: Mapping[str, SinkState] = field(default_factory=dict)


def check(
    directory: Path,
    flow: Dataflow,
    partitions: Mapping[str, int],
    *,
    optional: Collection[str] = (),
    whole: Progress | None = None,
) -> Checked:
    """Look through a recovery store before the engine loads it.

    Every row is looked at, also old ones that would not be loaded: its pickle holds plain values
    only; its step is one of `flow`; its key, for inputs and outputs, is a partition that exists.
    Window snapshots must fit their view, and inputs' be offsets. 50 MB take some 0.1 s.

    Args:
        directory: the store.
        flow: the graph, laid.
        partitions: topic → number of partitions, of all topics the flow reads or writes.
        optional: ids of steps that the flow can be run without; what they have stored stays, and
            is warned about.
        whole: what all parts say, if not all are in the directory.

    Raises:
        RecoveryError: naming part, step and key, and saying what to do.
    """
    steps = dict(_stateful(flow, partitions))
    switched_off: set[str] = set()
    count = size = 0
    parts = parts_of(directory)
    epoch = (progress(parts) if whole is None else whole).resume_epoch
    written: dict[str, tuple[int, SinkState]] = {}
    for snapshot in snapshots(parts):
        count += 1
        size += len(snapshot.change or b"")
        value = None if snapshot.change is None else value_of(snapshot)
        step = steps.get(snapshot.step_id)
        if step is None:
            if snapshot.step_id not in optional:
                raise RecoveryError(_unknown_step(snapshot, steps))
            switched_off.add(snapshot.step_id)
        elif step.keys is not None and snapshot.key not in step.keys:
            raise RecoveryError(_unknown_partition(snapshot, step))
        elif step.check is not None and value is not None:
            _check_value(snapshot, value, step.check)
            if step.check is check_state and snapshot.epoch < epoch:
                newest = written.get(snapshot.key, (-1, value))
                written[snapshot.key] = max(newest, (snapshot.epoch, value), key=itemgetter(0))
    for step_id in sorted(switched_off):
        log.warning(
            "the recovery store has state of a step that is switched off; switched on again, it "
            "goes on with that old state",
            step=step_id,
        )
    return Checked(count, size, epoch, {key: state for key, (_, state) in written.items()})


def _stateful(flow: Dataflow, partitions: Mapping[str, int]) -> Iterator[tuple[str, _Step]]:
    def names(topics: Collection[str]) -> frozenset[str]:
        return frozenset(part_name(t, p) for t in topics for p in range(partitions[t]))

    def walk(steps: Any, inner: _Step) -> Iterator[tuple[str, _Step]]:
        for step in steps:
            kind = type(step).__name__
            if kind == "windows":
                ((_, layout, _),) = _windows([step])
                kept = _Step(None, "", partial(journal.check, layout))
                yield from walk(step.substeps, kept)
            elif kind == "distinct":
                kept = _Step(None, "", partial(SeenIds.check, shards=step.shards))
                yield from walk(step.substeps, kept)
            elif step.substeps:
                yield from walk(step.substeps, inner)
            elif kind == "input":
                read = names([topic.name for topic in step.source.topics])
                yield step.step_id, _Step(read, "read", _check_offset)
            elif kind == "output":
                yield step.step_id, _Step(names([step.sink.topic]), "written", check_state)
            elif kind == "stateful_batch":
                yield step.step_id, inner

    return walk(flow.substeps, _Step(None, "", None))


def _windows(steps: Any) -> Iterator[tuple[str, Layout, StateDir | None]]:
    """Yield the id of each step that keeps a view's windows, how, and what they start from."""
    for step in steps:
        if type(step).__name__ == "windows":
            layout = Layout.of(step.view, step.sources, step.shards.count)
            yield f"{step.step_id}.state", layout, step.shards.start
        else:
            yield from _windows(step.substeps)


def _check_offset(value: Any) -> None:
    """Raise unless a value is an input's next offset, and where its answers begin, if after it."""
    tag, *offsets = value if isinstance(value, tuple) else ("rebuild", value)
    if tag != "rebuild" or not all(type(offset) is int for offset in offsets):
        raise TypeError
    for offset in offsets:
        if offset < 0:
            raise ValueError(f"{offset} is not an offset, which is 0 or more")


def _unknown_step(snapshot: Snapshot, steps: Collection[str]) -> str:
    return (
        f"{snapshot.part} has state of the step {snapshot.step_id!r}, which this flow does not "
        f"have (it has {', '.join(sorted(steps))}). Under another name the step would start empty: "
        f"run the version that wrote the store, or {_NEW_DIRECTORY}"
    )


def _unknown_partition(snapshot: Snapshot, step: _Step) -> str:
    topic = snapshot.key.rpartition("/")[0]
    topics = sorted({name.rpartition("/")[0] for name in step.keys or ()})
    found = sum(name.startswith(f"{topic}/") for name in step.keys or ())
    what = (
        f"{topic!r} has only {found} partitions now: the topic was recreated with fewer"
        if found
        else f"the topic is none of those {step.what} now ({', '.join(topics)})"
    )
    return (
        f"{snapshot.part} has an offset of the partition {snapshot.key!r} in step "
        f"{snapshot.step_id!r}, but {what}. Restore the topic, or correct its name in the "
        f"settings; or {_NEW_DIRECTORY}"
    )


def _check_value(snapshot: Snapshot, value: Any, check: Callable[[Any], object]) -> None:
    where = f"{snapshot.part}, step {snapshot.step_id!r}, key {snapshot.key!r}"
    try:
        check(value)
    except (AttributeError, TypeError):
        raise RecoveryError(
            f"{where}: the snapshot is {type(value).__name__}, which is not what it was meant to "
            f"be. Run the version that wrote it, or {_NEW_DIRECTORY}"
        ) from None
    except (ValueError, KeyError, msgspec.MsgspecError) as error:
        raise RecoveryError(
            f"{where}: {error}. Run the version (and SHARDS) that wrote it, or {_NEW_DIRECTORY}"
        ) from None
