"""The recovery store: created, owned, looked through, shown. Parts are real Bytewax ones."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import msgspec
import numpy as np
import pytest
from bytewax.dataflow import Dataflow
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import TestingSink, TestingSource, run_main
from hypothesis import given
from hypothesis import strategies as st

from dataflows import recovery, state
from dataflows.kafka.peers import Peers, SharedDirectory
from dataflows.kafka.topics import part_name
from dataflows.recovery import Manifest, RecoveryError, Snapshot, Store
from dataflows.steps.windows import Shards
from dataflows.steps.windows import windows as window_step
from features.batch import EventBatch
from features.fraud import CARD, FRAUD, SOURCES
from features.journal import SEED, Base
from features.offline import Replay
from features.state_dir import FORMAT, StateDir, StateManifest, write_state
from features.windows import Layout, WindowState
from tests.unit.test_fraud_graph import laid

#: As in `laid`: the names of its topics, which nothing looks up.
PARTITIONS = {"Transaction": 4, "FraudReport": 2, "predictions": 3, "dead_letters": 1, "audit": 1}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def prepare(directory: Path) -> Iterator[Callable[..., Store]]:
    stores = []

    def prepare(flow_id: str = "fraud", **cluster: int) -> Store:
        stores.append(recovery.prepare(directory, flow_id, **cluster))
        return stores[-1]

    yield prepare
    for store in stores:
        os.close(store._lock)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def plant(directory: Path, step: str, key: str, value: Any, epoch: int = 1) -> None:
    """Put a row into the store: a value, or bytes wrapped in `Raw`."""
    change = value.data if isinstance(value, Raw) else pickle.dumps(value)
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as part:
        part.execute(
            "INSERT OR REPLACE INTO snaps (step_id, state_key, snap_epoch, ser_change) "
            "VALUES (?, ?, ?, ?)",
            (step, key, epoch, change),
        )
        part.commit()


class Raw(msgspec.Struct):
    data: bytes | None


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def windows(shards: int = 16) -> WindowState:
    state = WindowState(Layout.of(CARD, SOURCES, shards))
    state.update(
        EventBatch(
            {
                "source": np.full(3, SOURCES.index(CARD.of), np.uint8),
                "card_id": np.array([b"a", b"a", b"b"]),
                "event_time": np.array([1, 2, 3]) * 86_400_000,
                "amount": np.array([100, 200, 300]),
            }
        )
    )
    return state


def base(shards: int = 16) -> Base:
    return ("base", 0, 1, windows(shards).snapshot())


def check(directory: Path, **more: Any) -> recovery.Checked:
    return recovery.check(directory, laid(), PARTITIONS, **more)


# Make and own


def test_a_store_is_created_for_its_owner_only_and_once(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    old = os.umask(0)
    try:
        first = prepare()
    finally:
        os.umask(old)
    assert mode(directory) == 0o700
    assert first.manifest.flow == "fraud"
    part = directory / "part-0.sqlite3"
    before = part.read_bytes()
    first_manifest = (directory / "store.json").read_bytes()
    os.close(os.dup(first._lock))
    fcntl.flock(first._lock, fcntl.LOCK_UN)
    second = prepare()
    assert part.read_bytes() == before
    assert second.manifest == first.manifest
    assert (directory / "store.json").read_bytes() == first_manifest
    # Nothing is left over that Bytewax or a person would wonder about.
    left = {path.name for path in directory.iterdir()}
    sqlites = {"part-0.sqlite3-wal", "part-0.sqlite3-shm"}  # while it was read
    assert left - sqlites == {"part-0.sqlite3", "store.json", ".create.lock", ".process-0.lock"}


def test_bytewax_resumes_from_it(directory: Path, prepare: Callable[..., Store]) -> None:
    prepare("counting")

    def count(numbers: list[int]) -> list[int]:
        flow = Dataflow("counting")
        out: list[int] = []
        op.output("out", op.input("in", flow, TestingSource(numbers)), TestingSink(out))
        run_main(flow, recovery_config=RecoveryConfig(directory))
        return out

    assert count([1, 2]) == [1, 2]
    assert count([1, 2, 3]) == [3]


def test_a_store_made_by_hand_is_taken_over(
    directory: Path, prepare: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    init_db_dir(directory, 2)
    before = {path.name: path.read_bytes() for path in recovery.parts_of(directory)}
    prepare()
    assert mode(directory) == 0o700
    assert {path.name: path.read_bytes() for path in recovery.parts_of(directory)} == before
    assert recovery.read_manifest(directory) is not None


def test_a_directory_of_another_user_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)
    with pytest.raises(RecoveryError, match="belongs to user .* Name a directory that does not"):
        recovery.prepare(directory, "fraud")


def test_a_volume_that_is_not_mounted_is_not_made_up(tmp_path: Path) -> None:
    with pytest.raises(RecoveryError, match="there is no directory .*volume.* or correct -r"):
        recovery.prepare(tmp_path / "volume" / "store", "fraud")
    (tmp_path / "file").touch()
    with pytest.raises(RecoveryError, match="is not a directory"):
        recovery.prepare(tmp_path / "file", "fraud")


def test_another_flows_or_versions_store_is_refused(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    store = prepare("metrics", process=1, processes=2)
    with pytest.raises(
        RecoveryError, match="of the flow 'metrics', this is the flow 'fraud': correct -r"
    ):
        prepare("fraud", processes=2)
    newer = msgspec.structs.replace(store.manifest, format=2)
    (directory / "store.json").write_bytes(msgspec.json.encode(newer))
    with pytest.raises(RecoveryError, match="has format 2, this version reads 1: run the version"):
        prepare("metrics", processes=2)
    (directory / "store.json").write_text("{")
    with pytest.raises(RecoveryError, match="store.json cannot be read"):
        prepare("metrics", processes=2)
    older = msgspec.structs.replace(store.manifest, bytewax="0.20.1")
    (directory / "store.json").write_bytes(msgspec.json.encode(older))
    with pytest.raises(RecoveryError, match=r"made by Bytewax 0\.20\.1, .*: install 0\.20\.1, or"):
        prepare("metrics", processes=2)


def test_a_store_whose_parts_were_deleted_is_not_a_new_store(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare(process=1, processes=2)
    (directory / "part-0.sqlite3").unlink()
    with pytest.raises(RecoveryError, match="no part-.*the state was deleted. Restore it"):
        prepare(processes=2)


def test_a_creation_that_was_killed_is_done_again(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    directory.mkdir(mode=0o700)
    (directory / ".new-killed").mkdir()
    (directory / ".new-killed" / "part-0.sqlite3").write_bytes(b"half")
    prepare()
    assert not (directory / ".new-killed").exists()
    assert check(directory) == recovery.Checked(0, 0, 1)


def test_a_full_disk_is_said(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RecoveryError, match=r"cannot be written \(No space left.*: make room"):
        recovery.prepare(directory, "fraud")


def test_one_process_holds_it(directory: Path, prepare: Callable[..., Store]) -> None:
    prepare(process=0, processes=2)
    with pytest.raises(RecoveryError, match=f"is in use: pid {os.getpid()} .* process 0 .*suspend"):
        prepare(process=0, processes=2)
    prepare(process=1, processes=2)
    assert recovery.is_held(directory, 1)
    assert not recovery.is_held(directory, 2)


def test_a_larger_cluster_waits_for_the_flow_that_runs(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare(process=0, processes=1)
    for process in (1, 2):  # as an orchestrator may start them first
        with pytest.raises(RecoveryError, match="process 0 of a cluster of 1 on it, .* has 3"):
            prepare(process=process, processes=3)


def test_a_process_that_just_starts_has_not_said_yet_what_it_is(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare(process=0, processes=2)
    lock = os.open(directory / ".process-1.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    said = threading.Timer(0.3, os.pwrite, (lock, b"1 host 2 0", 0))
    said.start()
    recovery._refuse_others(directory, 2, 0)
    said.join()
    os.close(lock)


def test_a_process_waits_for_those_of_an_earlier_life(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    """One of two has died, the other one may still complete the epoch they were in."""
    prepare(process=0, processes=2)  # lives on
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as connection, connection:
        connection.execute("INSERT INTO exs (ex_num, worker_count, resume_epoch) VALUES (0, 2, 1)")
    with pytest.raises(
        RecoveryError, match="process 0 of a cluster of 2 on it, of an earlier life"
    ):
        prepare(process=1, processes=2)


def test_a_look_at_a_lock_does_not_keep_its_process_from_starting(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare(process=0, processes=2)
    looking = os.open(directory / ".process-1.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(looking, fcntl.LOCK_SH)
    looked = threading.Timer(0.3, os.close, (looking,))
    looked.start()
    prepare(process=1, processes=2)
    looked.join()


def test_a_smaller_cluster_waits_for_the_last_of_a_larger_one(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare(process=2, processes=3)
    with pytest.raises(
        RecoveryError, match=r"still runs as process 2 of a cluster .* this one has 2"
    ):
        prepare(process=0, processes=2)
    prepare(process=0, processes=3)  # and the refused one has let go


def test_processes_may_all_create_it_at_once(directory: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dataflows.recovery import prepare; "
        "print('ready', flush=True); sys.stdin.readline(); "
        "prepare(Path(sys.argv[1]), 'fraud', process=int(sys.argv[2]), processes=4); "
        "print('held', flush=True); sys.stdin.readline()"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(directory), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
        with pytest.raises(RecoveryError, match=f"pid {started[3].pid}"):
            recovery.prepare(directory, "fraud", process=3, processes=4)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert check(directory) == recovery.Checked(0, 0, 1)
    assert len(recovery.parts_of(directory)) == 1
    recovery.prepare(directory, "fraud").close()  # who is killed holds nothing


def test_exactly_once_needs_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    none = recovery.Launch(None, 0, 1, 1)
    monkeypatch.setattr(recovery, "launched", lambda: none)
    with pytest.raises(RecoveryError, match="DELIVERY=exactly_once needs .* -r DIR -s 10 -b 0"):
        recovery.open_store("fraud", "exactly_once")
    assert recovery.open_store("fraud", "at_least_once") is None
    assert recovery.open_store("fraud", "at_most_once") is None


# Check


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
        lambda inner: st.lists(inner).map(tuple),
    )
)
def test_plain_values_pass(value: Any) -> None:
    for protocol in (4, 5):
        row = Snapshot(Path("p"), "s", "k", 1, 0, pickle.dumps(value, protocol))
        assert recovery.value_of(row) == value


@pytest.mark.parametrize(
    ("opcode", "value"),
    [
        ("STACK_GLOBAL|GLOBAL", Raw(pickle.dumps(os.system))),
        ("GLOBAL", Raw(b"cos\nsystem\n(S'true'\ntR.")),
        ("INST", Raw(b"(ios\nsystem\n.")),
        ("EMPTY_LIST", [1]),
        ("EMPTY_DICT", {"a": 1}),
        ("BINFLOAT", 1.0),
        ("EXT1", Raw(b"\x80\x04\x82\x01.")),
        ("BINPERSID", Raw(b"\x80\x04K\x01Q.")),
        ("BUILD", Raw(b"\x80\x04NNb.")),
    ],
)
def test_anything_else_is_refused(
    directory: Path, prepare: Callable[..., Store], opcode: str, value: Any
) -> None:
    prepare()
    plant(directory, "fraud.records", "Transaction/00000", 7)
    # Older than what would be loaded: is looked at all the same.
    plant(directory, "fraud.card.state", "s003", value, epoch=0)
    says = r"part-0.sqlite3: .*'fraud.card.state', key 's003' \(epoch 0\) has the opcode "
    with pytest.raises(RecoveryError, match=f"{says}({opcode}).*foreign code.*restore a backup"):
        check(directory)


def test_nothing_is_executed(
    directory: Path, prepare: Callable[..., Store], tmp_path: Path
) -> None:
    prepare()
    marker = tmp_path / "executed"
    plant(directory, "fraud.records", "Transaction/00000", Evil(marker))
    with pytest.raises(RecoveryError, match="foreign code"):
        check(directory)
    assert state.main(["show", str(directory), "--json"]) == 0  # epoch 1 is not durable: not shown
    [row] = [state._row(row, 0.0) for row in recovery.snapshots(recovery.parts_of(directory))]
    assert row.problem is not None
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # so it could have


@pytest.mark.parametrize(
    "data", [b"", b"garbage", b"\x80\x04", b"\x80\x04\x8e\xff\xff\xff\xff", b"h\x05."]
)
def test_a_damaged_snapshot_is_refused(
    directory: Path, prepare: Callable[..., Store], data: bytes
) -> None:
    prepare()
    plant(directory, "fraud.card.state", "s000", Raw(data))
    with pytest.raises(RecoveryError, match="key 's000'"):
        check(directory)


def test_the_store_of_this_flow_passes(directory: Path, prepare: Callable[..., Store]) -> None:
    prepare()
    plant(directory, "fraud.records", part_name("Transaction", 3), 17)
    plant(directory, "fraud.predictions.write", part_name("predictions", 2), (2, 17, 3, b"", "g"))
    plant(directory, "fraud.card.state", "s000", base())
    plant(directory, "fraud.card.state", "s001", Raw(None))
    assert check(directory).snapshots == 4


def test_a_renamed_step_is_refused(directory: Path, prepare: Callable[..., Store]) -> None:
    prepare()
    plant(directory, "fraud.cards.state", "s000", b"")
    with pytest.raises(
        RecoveryError,
        match="state of the step 'fraud.cards.state', which this flow does not have .*"
        "fraud.card.state.* run the version that wrote the store, or name a new recovery directory",
    ):
        check(directory)
    assert check(directory, optional=["fraud.cards.state"]).snapshots == 1


@pytest.mark.parametrize(
    ("step", "key", "says"),
    [
        ("fraud.records", "Transaction/00004", "has only 4 partitions now: .* Restore the topic"),
        ("fraud.records", "payments/00000", r"none of those read now \(FraudReport, Transaction\)"),
        ("fraud.audit.write", "audit/00001", "has only 1 partitions now"),
        ("fraud.audit.write", "old/00000", r"none of those written now \(audit\)"),
    ],
)
def test_a_partition_that_is_gone_is_refused(
    directory: Path, prepare: Callable[..., Store], step: str, key: str, says: str
) -> None:
    prepare()
    plant(directory, step, key, 5)
    with pytest.raises(RecoveryError, match=f"{key}' in step '{step}', but .*{says}"):
        check(directory)


def test_windows_of_another_view_or_version_are_refused(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare()
    where = "part-0.sqlite3, step 'fraud.card.state', key 's000': .*"
    plant(directory, "fraud.card.state", "s000", base(shards=32))
    with pytest.raises(RecoveryError, match=f"{where}shards is 32, .* has 16.*SHARDS"):
        check(directory)
    *of, data = base()
    other = bytearray(data)
    other[8] += 1  # the format, after the magic
    plant(directory, "fraud.card.state", "s000", (*of, bytes(other)))
    with pytest.raises(RecoveryError, match=f"{where}format"):
        check(directory)
    plant(directory, "fraud.terminal.state", "s000", base())
    plant(directory, "fraud.card.state", "s000", base())
    with pytest.raises(RecoveryError, match="'fraud.terminal.state', .*view is 'card'"):
        check(directory)
    plant(directory, "fraud.terminal.state", "s000", 5)
    with pytest.raises(RecoveryError, match="the snapshot is int, which is not what it was"):
        check(directory)


@pytest.mark.parametrize(
    ("offset", "said"),
    [
        (-1, "-1 is not an offset"),
        (True, "the snapshot is bool"),
        ("17", "the snapshot is str"),
        ((17,), "the snapshot is tuple"),
    ],
)
def test_an_input_offset_that_is_none_is_refused(
    directory: Path, prepare: Callable[..., Store], offset: Any, said: str
) -> None:
    prepare()
    plant(directory, "fraud.records", part_name("Transaction", 0), offset)
    where = "part-0.sqlite3, step 'fraud.records', key 'Transaction/00000': "
    with pytest.raises(RecoveryError, match=f"{where}{said}.* or name a new recovery directory"):
        check(directory)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (5, "no format .int."),
        ((1, 5, 3), "format 1, this version reads 3"),
        ((2, 9, 1, b"x", "g"), "format 2"),
        ((3, 5), "no format"),
    ],
)
def test_an_output_partitions_state_of_another_version_is_refused(
    directory: Path, prepare: Callable[..., Store], state: Any, said: str
) -> None:
    prepare()
    plant(directory, "fraud.audit.write", part_name("audit", 0), state)
    with pytest.raises(RecoveryError, match=f"{said}.*Run the version"):
        check(directory)


def test_a_part_that_is_no_database_is_refused(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare()
    (directory / "part-0.sqlite3").write_bytes(b"not a database" * 100)
    with pytest.raises(RecoveryError, match="cannot be read as a recovery store"):
        check(directory)


def test_a_store_is_read_after_a_kill_and_while_it_is_written(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare()
    # A process that dies with its last commit in the write-ahead log, and another that is writing.
    code = (
        "import os, sqlite3, sys; part = sqlite3.connect(sys.argv[1]); "
        'part.execute("INSERT INTO snaps VALUES '
        "('2026-01-01', 'fraud.records', 'Transaction/00001', 1, x'80044b072e')\"); "
        "part.commit(); os.kill(os.getpid(), 9)"
    )
    part = directory / "part-0.sqlite3"
    subprocess.run([sys.executable, "-c", code, str(part)], check=False)
    assert (directory / "part-0.sqlite3-wal").stat().st_size > 0
    with closing(sqlite3.connect(part, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM snaps")
        assert check(directory).snapshots == 1
        writer.execute("ROLLBACK")
    (directory / "part-0.sqlite3-shm").write_bytes(b"\xff" * 32768)  # stale
    assert check(directory).snapshots == 1


# Show


@pytest.fixture
def filled(directory: Path, prepare: Callable[..., Store]) -> Path:
    prepare()
    for epoch in (4, 5):
        for partition in range(2):
            plant(directory, "fraud.records", part_name("Transaction", partition), epoch, epoch)
    plant(directory, "fraud.card.state", "s000", base(), 4)
    plant(directory, "fraud.audit.write", part_name("audit", 0), (2, 9, 1, b"", "g"), 4)
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as part:
        part.execute("INSERT INTO exs (ex_num, worker_count, resume_epoch) VALUES (0, 2, 1)")
        part.execute(
            "INSERT INTO fronts (ex_num, worker_index, worker_frontier) VALUES (0, 0, 6), (0, 1, 5)"
        )
        part.commit()
    return directory


def test_show_tells_what_would_be_resumed(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert state.main(["show", str(filled), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["resume_epoch"] == 5  # worker 1's, so the snapshots of epoch 5 do not count
    rows = {(row["step"], row["key"]): row for row in shown["keys"]}
    assert rows["fraud.records", "Transaction/00001"]["offset"] == 4
    assert rows["fraud.audit.write", "audit/00000"]["offset"] == 9
    card = rows["fraud.card.state", "s000"]
    assert (card["entities"], card["entries"]) == (2, 3)
    assert card["bytes"] > len(base()[3])
    assert 0 <= shown["age_s"] < 600
    assert shown["flow"] == "fraud"

    assert state.main(["show", str(filled)]) == 0
    table = capsys.readouterr().out
    assert "fraud.card.state" in table and "resumes in epoch 5" in table


def test_show_refuses_what_is_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert state.main(["show", str(tmp_path / "none")]) == 2
    assert "is not a directory" in capsys.readouterr().err
    assert state.main(["show", str(tmp_path)]) == 2
    assert "holds no recovery store" in capsys.readouterr().err
    (tmp_path / "part-0.sqlite3").write_bytes(b"x" * 5000)
    assert state.main(["show", str(tmp_path)]) == 2
    assert "cannot be read as a recovery store" in capsys.readouterr().err


# Export (what it gives, on Kafka: tests/integration/test_cluster.py)


def test_export_refuses_what_would_not_be_exact(
    filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[..., Store]
) -> None:
    def said(*arguments: object) -> str:
        command = ["export", *map(str, arguments), "--out", str(tmp_path / "state")]
        assert state.main(command) == 2
        assert not (tmp_path / "state").exists()
        return capsys.readouterr().err

    assert "drain it first" in said(filled)
    copy = tmp_path / "copy"
    shutil.copytree(filled, copy)  # the lock's holder is another file's
    assert "was killed in epoch 5" in said(copy)
    with closing(sqlite3.connect(copy / "part-0.sqlite3")) as part, part:
        part.execute("DELETE FROM snaps WHERE snap_epoch >= 5")
    assert "no windows of the view 'terminal' are stored" in said(copy)
    with closing(sqlite3.connect(copy / "part-0.sqlite3")) as part, part:
        part.execute("UPDATE parts SET part_count = 2")
    assert "name all directories" in said(copy)
    assert "no recovery store" in said(tmp_path / "none")


# Peers


def test_peers_stop_after_the_last_epoch_of_all(tmp_path: Path) -> None:
    (tmp_path / ".process-0.json").write_bytes(b'{"draining": true}')  # of an earlier life
    alive = [True, True, True]
    a, b, idle = (Peers(SharedDirectory(tmp_path, n, 3, alive.__getitem__), n, 3) for n in range(3))
    assert a.shared() and a.draining() == []
    a.reads("t/0")
    b.reads("t/1")
    a.drains("t/0", 4)
    assert b.draining() == [0]
    assert a.last_epoch() is None  # b reads
    b.drains("t/1", 5)
    assert a.last_epoch() == b.last_epoch() == 5
    a.stops("t/0")
    assert not idle.only_idle_left()
    b.stops("t/1")
    assert idle.only_idle_left()
    assert not a.only_idle_left()
    alive[1] = False
    assert not a.shared()


def test_manifest_is_plain_json(directory: Path, prepare: Callable[..., Store]) -> None:
    manifest = prepare().manifest
    read = json.loads((directory / "store.json").read_text())
    assert read == msgspec.to_builtins(manifest)
    assert Manifest(**read) == manifest


def test_what_a_killed_life_stored_of_its_last_epoch_is_discarded(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare()
    part = directory / "part-0.sqlite3"
    assert recovery.discard_open_epoch(directory, "exactly_once") == 0
    rows = [("f.a", "k1", 4), ("f.a", "k1", 5), ("f.b", "k2", 6), ("f.b", "k2", 4)]
    with closing(sqlite3.connect(part)) as connection, connection:
        connection.execute("INSERT INTO exs (ex_num, worker_count, resume_epoch) VALUES (3, 2, 2)")
        for worker, frontier in enumerate((6, 5)):  # one worker has not finished epoch 5
            connection.execute(
                "INSERT INTO fronts (ex_num, worker_index, worker_frontier) VALUES (3, ?, ?)",
                (worker, frontier),
            )
        connection.executemany(
            "INSERT INTO snaps (step_id, state_key, snap_epoch, ser_change) VALUES (?, ?, ?, NULL)",
            rows,
        )
    assert recovery.discard_open_epoch(directory, "exactly_once") == 2
    left = [(row.step_id, row.key, row.epoch) for row in recovery.snapshots([part])]
    assert left == [("f.a", "k1", 4), ("f.b", "k2", 4)]
    assert recovery.discard_open_epoch(directory, "exactly_once") == 0


def test_nothing_is_discarded_where_parts_are_missing(directory: Path) -> None:
    directory.mkdir()
    init_db_dir(directory, 2)
    part = directory / "part-0.sqlite3"
    with closing(sqlite3.connect(part)) as connection, connection:
        connection.execute(
            "INSERT INTO snaps (step_id, state_key, snap_epoch, ser_change) "
            "VALUES ('s', 'k', 9, NULL)"
        )
    (directory / "part-1.sqlite3").unlink()
    for delivery in ("at_least_once", "at_most_once"):
        assert recovery.discard_open_epoch(directory, delivery) == 0
    with pytest.raises(
        RecoveryError,
        match=rf"{directory} \(1 of 2 parts\): .*move windows twice .*exactly_once.*one directory",
    ):
        recovery.discard_open_epoch(directory, "exactly_once")
    assert len(list(recovery.snapshots([part]))) == 1


def test_nothing_is_discarded_where_a_part_is_too_old(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare()
    part = directory / "part-0.sqlite3"
    with closing(sqlite3.connect(part)) as connection, connection:
        connection.execute("INSERT INTO exs (ex_num, worker_count, resume_epoch) VALUES (0, 1, 3)")
        connection.execute("INSERT INTO commits (part_index, commit_epoch) VALUES (0, 9)")
        connection.execute(
            "INSERT INTO snaps (step_id, state_key, snap_epoch, ser_change) "
            "VALUES ('s', 'k', 8, NULL)"
        )
    assert recovery.discard_open_epoch(directory, "exactly_once") == 0
    assert len(list(recovery.snapshots([part]))) == 1


# Journals


def _filled_by_one_worker(directory: Path) -> list[Any]:
    """Have a flow keep a journal, and be killed before the last batch; return the items."""
    batches = [batch_of(n) for n in range(6)]
    items: list[Any] = [*batches[:-1], TestingSource.ABORT(), batches[-1]]
    run_windows(directory, items, journal=True)
    return items


def batch_of(n: int) -> EventBatch:
    """Return the n-th event of each of four cards."""
    return EventBatch(
        {
            "source": np.full(4, SOURCES.index(CARD.of), np.uint8),
            "card_id": np.array([b"a", b"b", b"c", b"d"]),
            "terminal_id": np.array([b"t", b"t", b"u", b"u"]),
            "event_time": 86_400_000 + 1000 * np.arange(4 * n, 4 * n + 4),
            "amount": np.full(4, 100),
            "seq": np.arange(4 * n, 4 * n + 4),
        }
    )


def counts(batch: EventBatch) -> dict[bytes, float]:
    return dict(zip(batch["card_id"].tolist(), batch["card_count_30d"].tolist(), strict=True))


def run_windows(
    directory: Path, items: list[Any], *, journal: bool, start: StateDir | None = None
) -> list[EventBatch]:
    out: list[EventBatch] = []
    flow = windowed(items, out, journal=journal, start=start)
    flow.substeps[1].shards.stored.update(recovery.stored_windows(directory, flow))
    run_main(
        flow,
        epoch_interval=timedelta(0),
        recovery_config=RecoveryConfig(directory),
    )
    return out


def windowed(
    items: list[Any], out: list[EventBatch], *, journal: bool, start: StateDir | None = None
) -> Dataflow:
    flow = Dataflow("fraud")
    came = op.input("in", flow, TestingSource(items))
    answered = window_step("card", came, CARD, SOURCES, Shards(16, start, journal))
    op.output("out", answered, TestingSink(out))
    return flow


def test_a_cluster_goes_on_with_what_the_journal_of_one_worker_holds(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare()
    items = _filled_by_one_worker(directory)
    kinds = {s.key[:4] for s in recovery.snapshots(recovery.parts_of(directory))}
    assert "page" in kinds
    flow = windowed(items, [], journal=False)
    recovery.discard_open_epoch(directory, "exactly_once")
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as part:
        part.execute("CREATE TABLE before AS SELECT * FROM snaps")
        part.commit()

    assert recovery.fold_journals(directory, flow) > 0
    assert recovery.fold_journals(directory, flow) == 0
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as part:
        # Killed before the pages were deleted: folded again, it comes to the same.
        folded = part.execute("SELECT * FROM snaps ORDER BY 1, 2, 3").fetchall()
        part.execute("INSERT OR IGNORE INTO snaps SELECT * FROM before")
        part.commit()
    recovery.fold_journals(directory, flow)
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as part:
        assert part.execute("SELECT * FROM snaps ORDER BY 1, 2, 3").fetchall() == folded
        part.execute("DROP TABLE before")
        part.commit()

    (last,) = run_windows(directory, items, journal=False)[-1:]
    assert counts(last) == {b"a": 6.0, b"b": 6.0, b"c": 6.0, b"d": 6.0}


def test_a_journal_without_its_shards_is_not_folded(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare()
    _filled_by_one_worker(directory)
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as part:
        part.execute("DELETE FROM snaps WHERE state_key = 's003'")
        part.commit()
    flow = windowed([], [], journal=False)
    with pytest.raises(RecoveryError, match=r"only 15 of 16 shards are\. Put all parts"):
        recovery.fold_journals(directory, flow)


def test_the_state_given_is_stored_before_the_first_snapshot(
    directory: Path, tmp_path: Path, prepare: Callable[..., Store]
) -> None:
    prepare()

    def given(name: str, events: int) -> StateDir:
        replay = Replay(FRAUD, SOURCES, 16)
        for n in range(events):
            replay(batch_of(n))
        manifest = StateManifest(FORMAT, FRAUD.name, FRAUD.schema_hash, 16, 0, {})
        write_state(tmp_path / name, manifest, replay.snapshots())
        return StateDir(tmp_path / name, FRAUD, 16)

    def seeded(start: StateDir) -> int:
        return recovery.seed_windows(directory, windowed([], [], journal=True, start=start))

    def shards() -> list[Any]:
        rows = recovery.snapshots(recovery.parts_of(directory))
        return [recovery.value_of(row) for row in rows if row.step_id == "fraud.card.state"]

    assert seeded(given("older", 2)) == 16
    # No rows have come yet, so the operator may still name another state.
    newer = given("newer", 3)
    assert seeded(newer) == 16
    assert {value[:3:2] for value in shards()} == {("base", SEED)} and len(shards()) == 16
    items = [batch_of(3), TestingSource.ABORT(), batch_of(4)]
    (out,) = run_windows(directory, items, journal=True, start=newer)
    assert set(counts(out).values()) == {4.0}
    recovery.discard_open_epoch(directory, "exactly_once")
    assert sum(value[0] == "base" for value in shards()) == 16
    assert max(value[-2] for value in shards()) == 1  # a page, and the shards whose turn it is

    assert seeded(given("too late", 5)) == 0
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as part:
        # As if another part were elsewhere, and with it what the engine has noted of its epochs.
        part.execute("UPDATE parts SET part_count = 2")
        part.commit()
    before = shards()
    assert seeded(newer) == 0 and shards() == before
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as part:
        part.execute("UPDATE parts SET part_count = 1")
        part.commit()
    (out,) = run_windows(directory, items, journal=True)
    assert set(counts(out).values()) == {5.0}


def test_a_page_that_is_missing_is_told_before_the_flow_starts(
    directory: Path, prepare: Callable[..., Store]
) -> None:
    prepare()
    _filled_by_one_worker(directory)
    flow = windowed([], [], journal=True)
    recovery.discard_open_epoch(directory, "exactly_once")
    assert recovery.stored_windows(directory, flow)["card"].last == 5
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as part:
        part.execute("DELETE FROM snaps WHERE state_key = 'page03'")
        part.commit()
    with pytest.raises(RecoveryError, match="'fraud.card.state': page 3 .* missing. Restore"):
        recovery.stored_windows(directory, flow)
    with closing(sqlite3.connect(directory / "part-0.sqlite3")) as part:
        part.execute("DELETE FROM snaps WHERE state_key = 's003'")
        part.commit()
    assert recovery.stored_windows(directory, flow) == {}
