"""Each step in real Bytewax, between a testing source and a testing sink."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import bytewax.operators as op
import numpy as np
import pytest
import structlog
from bytewax.dataflow import Dataflow, Stream
from bytewax.inputs import AbortExecution, FixedPartitionedSource, StatefulSourcePartition
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import TestingSink, TestingSource, run_main
from confluent_kafka import Message
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataflows import measure, recovery
from dataflows.kafka.records import OutRecords, Records
from dataflows.metrics import OUTCOMES, Metrics
from dataflows.steps import answered as answered_step
from dataflows.steps import decode as decode_step
from dataflows.steps import encode as encode_step
from dataflows.steps import lookup as lookup_step
from dataflows.steps import score as score_step
from dataflows.steps import windows as windows_step
from dataflows.steps.answered import answered
from dataflows.steps.decode import decode
from dataflows.steps.encode import AuditRecord, Prediction, audit, encode
from dataflows.steps.lookup import lookup
from dataflows.steps.score import score
from dataflows.steps.windows import Shards, windows
from features import journal
from features.batch import EventBatch, in_order
from features.events import EventDecoder
from features.fraud import CARD, FRAUD, SOURCES, TERMINAL, FraudReport, Transaction
from features.guarded_reads import Profiles, Served
from features.journal import SEED, Journal, Stored
from features.offline import Replay
from features.profiles import CUSTOMER_PROFILE, PROFILES, TERMINAL_PROFILE
from features.state_dir import FORMAT, StateDir, StateManifest, write_state
from features.windows import SHARDS, Layout, WindowState
from model.package import DECISIONS, Thresholds
from tests.bad_input import ACCEPTED, APPENDED, REFUSED, wire
from tests.bad_input import transaction as wire_transaction

TOPICS = ["fraud_reports", "transactions"]
REPORT, TRANSACTION = SOURCES.index(FraudReport), SOURCES.index(Transaction)
DAY = 86_400_000
Step = Callable[[Stream[Any]], Stream[Any]]


@pytest.fixture(autouse=True)
def metrics(monkeypatch: pytest.MonkeyPatch) -> Metrics:
    """Metrics of the test's own."""
    own = Metrics()
    steps = (answered_step, decode_step, encode_step, lookup_step, score_step, windows_step)
    for module in (*steps, measure):
        monkeypatch.setattr(module, "METRICS", own)
    return own


def count(metrics: Metrics, name: str, *labels: str) -> float:
    return float(getattr(metrics, name).labels(*labels)._value.get())


def run(items: Sequence[Any], step: Step, **engine: Any) -> list[Any]:
    """Send items through a step; return what comes out."""
    out: list[Any] = []
    flow = Dataflow("test")
    op.output("out", step(op.input("in", flow, TestingSource(items))), TestingSink(out))
    run_main(flow, **engine)
    return out


def events(rows: Sequence[tuple[int, str, str, int, int]], first_seq: int = 0) -> EventBatch:
    """Return decoded rows (source, card, terminal, event time, cents)."""
    n = len(rows)
    source, card, terminal, event_time, amount = zip(*rows, strict=True)
    return EventBatch(
        {
            "transaction_id": np.array([f"tx{first_seq + i}".encode() for i in range(n)], "S"),
            "card_id": np.array([c.encode() for c in card], "S"),
            "terminal_id": np.array([t.encode() for t in terminal], "S"),
            "event_time": np.array(event_time, np.int64),
            "amount": np.array(amount, np.int64),
            "source": np.array(source, np.uint8),
            "partition": np.arange(n, dtype=np.int32) % 3,
            "offset": np.arange(n) + 100,
            "append_time": np.array(event_time, np.int64) + 5,
            "seq": np.arange(first_seq, first_seq + n),
        }
    )


# Decode


def records_of(cases: Sequence[Any], first_offset: int = 0) -> Records:
    messages = [
        Message(
            topic=case.topic,
            partition=2,
            offset=first_offset + i,
            key=b"key%d" % i,
            value=case.value,
            headers=[("trace", b"\xff\x00%d" % i)],
            timestamp=(1, APPENDED),
        )
        for i, case in enumerate(cases)
    ]
    n = len(cases)
    return Records(
        messages,
        np.array([TOPICS.index(case.topic) for case in cases], np.uint8),
        np.full(n, 2, np.int32),
        np.arange(first_offset, first_offset + n),
        np.full(n, APPENDED),
        np.full(n, APPENDED),
    )


def run_decode(items: list[Records]) -> tuple[list[EventBatch], list[OutRecords]]:
    accepted: list[EventBatch] = []
    refused: list[OutRecords] = []
    flow = Dataflow("test")
    out = decode(
        "decode", op.input("in", flow, TestingSource(items)), EventDecoder(SOURCES), TOPICS
    )
    op.output("accepted", out.accepted, TestingSink(accepted))
    op.output("refused", out.refused, TestingSink(refused))
    run_main(flow)
    return accepted, refused


def test_decode_accounts_for_every_record_and_keeps_the_refused_whole(metrics: Metrics) -> None:
    cases = [case for pair in zip(REFUSED, ACCEPTED * 4, strict=False) for case in pair]
    half = len(cases) // 2
    accepted, refused = run_decode([records_of(cases[:half]), records_of(cases[half:], half)])

    account = metrics.account()
    for topic in TOPICS:
        mine = [case for case in cases if case.topic == topic]
        bad = sum(case.reason is not None for case in mine)
        expected = dict.fromkeys(OUTCOMES, 0) | {"read": len(mine), "dead_lettered": bad}
        assert account[topic] == expected
    for reason in {case.reason for case in REFUSED}:
        found = sum(count(metrics, "dead_letters", topic, str(reason)) for topic in TOPICS)
        assert found == sum(case.reason == reason for case in cases)

    offsets = [int(offset) for batch in accepted for offset in batch["offset"]]
    assert offsets == [i for i, case in enumerate(cases) if case.reason is None]
    for batch in accepted:
        topics = [TOPICS[code] for code in batch["source"]]
        assert topics == [cases[offset].topic for offset in batch["offset"]]
        assert set(batch["partition"].tolist()) == {2}
        assert set(batch["append_time"].tolist()) == {APPENDED}
    seq = [int(value) for batch in accepted for value in batch["seq"]]
    assert seq == sorted(set(seq))

    letters = {
        int(dict(headers)["dlq.offset"]): (key, value, dict(headers))
        for out in refused
        for key, value, headers in zip(out.keys, out.values, out.headers or [], strict=True)
    }
    assert sum(len(out) for out in refused) == len(letters)
    assert letters.keys() == {i for i, case in enumerate(cases) if case.reason is not None}
    for offset, (key, value, headers) in letters.items():
        case, row = cases[offset], offset if offset < half else offset - half
        assert key == b"key%d" % row
        assert headers["trace"] == b"\xff\x00%d" % row
        assert headers["dlq.reason"].decode() == case.reason
        assert headers["dlq.topic"].decode() == case.topic
        assert headers["dlq.partition"] == b"2"
        if case.name == "10 MB":
            assert value and case.value.startswith(value) and len(value) > 890_000
            assert headers["dlq.truncated"] == b"%d" % len(case.value)
        else:
            assert value == case.value


def test_decode_of_nothing_but_bad_records() -> None:
    accepted, refused = run_decode([records_of(REFUSED[:3]), records_of(ACCEPTED[:1], 3)])
    assert [len(out) for out in refused] == [3]
    assert [batch["offset"].tolist() for batch in accepted] == [[3]]


# Windows


def rows_of(at_least: int) -> st.SearchStrategy[list[Any]]:
    row = st.tuples(
        st.sampled_from([TRANSACTION, TRANSACTION, TRANSACTION, REPORT]),
        st.sampled_from(["C1", "C2", "C3", "карта"]),
        st.sampled_from(["T1", "T2", "T3"]),
        # Steps of hours and days in arrival order; some events come late.
        st.sampled_from([0, 1000, 3_600_000, DAY, 3 * DAY, 8 * DAY, -1000, -DAY]),
        st.integers(0, 10**6),
    )
    return st.lists(row, min_size=at_least, max_size=40).map(
        lambda rows: [
            (source, card, terminal, 1_600_000_000_000 + int(time), cents)
            for (source, card, terminal, _, cents), time in zip(
                rows, np.cumsum([row[3] for row in rows]), strict=True
            )
        ]
    )


ROWS = rows_of(1)
CUTS = st.lists(st.integers(0, 40), max_size=6)
LONG_ROWS = rows_of(30)


def both_windows(shards: Shards) -> Step:
    def steps(up: Stream[EventBatch]) -> Stream[EventBatch]:
        return windows(
            "terminal", windows("card", up, CARD, SOURCES, shards), TERMINAL, SOURCES, shards
        )

    return steps


def stored_in(store: Path) -> dict[str, Stored]:
    """Return what `recovery.stored_windows` does, for a flow of both windows."""
    shards = Shards(SHARDS)
    rows = recovery.snapshots(recovery.parts_of(store))
    count = len({row.key for row in rows if row.key.startswith("s0")}) or shards.count
    flow = Dataflow("test")
    op.output(
        "out",
        both_windows(Shards(count))(op.input("in", flow, TestingSource([]))),
        TestingSink([]),
    )
    return recovery.stored_windows(store, flow)


def cut(rows: list[Any], cuts: list[int]) -> list[EventBatch]:
    edges = [0, *sorted(c for c in cuts if c < len(rows)), len(rows)]
    return [events(rows[a:b], first_seq=a) for a, b in pairwise(edges) if b > a]


def answers(batches: Sequence[EventBatch]) -> dict[bytes, list[bytes]]:
    """Return transaction → bits of its features, of transactions only."""
    found = {}
    for batch in batches:
        asking = batch.take(batch["source"] == TRANSACTION)
        matrix = FRAUD.matrix(asking)
        for i, name in enumerate(asking["transaction_id"].tolist()):
            assert name not in found
            found[name] = matrix[i].tobytes()
    return found


@settings(max_examples=40, deadline=None)
@given(ROWS, CUTS, st.sampled_from([1, 3, 16]))
def test_windows_give_the_replays_bits_whatever_the_batches(
    rows: list[Any], cuts: list[int], shards: int
) -> None:
    out = run(cut(rows, cuts), both_windows(Shards(shards)))
    assert answers(out) == answers([Replay(FRAUD, SOURCES)(events(rows))])
    assert [int(seq) for batch in out for seq in batch["seq"]] == list(range(len(rows)))


@settings(max_examples=25, deadline=None)
@given(ROWS, CUTS, st.data())
def test_shards_on_two_workers_give_the_replays_bits(
    rows: list[Any], cuts: list[int], data: st.DataObject
) -> None:
    """What one worker keeps shares its batch; what goes to another is pickled."""
    shards = 5
    key, layout = CARD.key, Layout.of(CARD, SOURCES, shards)
    moves = data.draw(st.frozensets(st.integers(0, shards - 1)), "shards of the other worker")
    here, there = (windows_step._Worker(layout, Shards(shards)) for _ in range(2))
    out = []
    for batch in cut(rows, cuts):
        whole = windows_step._Grouped.of(batch, key, shards)
        for shard in range(shards):
            part = windows_step._Part(whole, shard)
            if shard in moves:
                there.collect([pickle.loads(pickle.dumps(part))])
            else:
                here.collect([part])
        if data.draw(st.booleans(), "processed now"):
            out += here.finished() + there.finished()
    out += here.finished() + there.finished()
    merged = in_order(out)
    expected = Replay(replace(FRAUD, features=[CARD]), SOURCES)(events(rows))
    assert merged is not None and len(merged) == len(rows)
    answered = merged.take(merged["source"] == TRANSACTION)
    for name in (*CARD.names, "seq"):
        assert answered[name].tobytes() == expected[name].tobytes(), name


@settings(max_examples=15, deadline=None)
@given(ROWS, CUTS, st.integers(0, 40), st.booleans())
def test_windows_go_on_after_a_restart(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    cuts: list[int],
    stop: int,
    journal: bool,
) -> None:
    store = tmp_path_factory.mktemp("recovery")
    init_db_dir(store, 1)
    batches: list[Any] = cut(rows, cuts)
    batches.insert(min(stop, len(batches)), TestingSource.EOF())
    engine = {"epoch_interval": timedelta(0), "recovery_config": RecoveryConfig(store)}
    out = []
    for _ in range(2):
        kept = Shards(SHARDS, journal=journal, stored=stored_in(store))
        out += run(batches, both_windows(kept), **engine)
    assert answers(out) == answers([Replay(FRAUD, SOURCES)(events(rows))])


class Killed(FixedPartitionedSource[EventBatch, int]):
    """Batches, and before some a kill, as often as it is named."""

    def __init__(self, batches: Sequence[EventBatch], kills: list[int]) -> None:
        self.batches = batches
        self.kills = kills

    def list_parts(self) -> list[str]:
        return ["all"]

    def build_part(self, _step: str, _part: str, resume: int | None) -> KilledPart:
        return KilledPart(self, resume or 0)


class KilledPart(StatefulSourcePartition[EventBatch, int]):
    def __init__(self, source: Killed, at: int) -> None:
        self.source = source
        self.at = at

    def next_batch(self) -> list[EventBatch]:
        if self.at in self.source.kills:
            self.source.kills.remove(self.at)
            raise AbortExecution
        if self.at >= len(self.source.batches):
            raise StopIteration
        self.at += 1
        return [self.source.batches[self.at - 1]]

    def snapshot(self) -> int:
        return self.at


@settings(max_examples=150, deadline=None)
@given(
    LONG_ROWS,
    CUTS,
    st.lists(st.sampled_from(["same epoch", "next epoch", "next epoch", "next life"]), min_size=40),
    st.integers(2, 4),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([0, 10**6]),
)
@example(
    [(TRANSACTION, "C1", "T1", 1_600_000_000_000 + i, 100) for i in range(8)],
    list(range(8)),
    ["next epoch", "same epoch", "next epoch", "next life", *(4 * ["next epoch"])],
    2,
    1,
    10**6,
)
def test_a_journal_and_the_shards_in_turn_hold_all(
    rows: list[Any], cuts: list[int], then: list[str], pages: int, count: int, outweighed: int
) -> None:
    """As the engine calls a worker, epoch by epoch; a life goes on with what was stored."""
    layout = Layout.of(CARD, SOURCES, count)
    stored: dict[str, Any] = {}
    out = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal, "PAGES", pages)
        patched.setattr(Journal, "nbytes", property(lambda rows: outweighed * len(rows)))
        alive = False
        for batch, after in zip(cut(rows, [*cuts, *range(0, 40, 2)]), then, strict=False):
            if not alive:
                bases = sorted(value for value in stored.values() if value[0] == "base")
                last = max((value[-2] for value in stored.values()), default=0)
                known = {CARD.name: Stored(last, [base[2] for base in bases])} if bases else {}
                kept = Shards(count, journal=True, stored=known)
                worker = windows_step._Worker(layout, kept)
                logics = {key: windows_step._KeyLogic(worker, stored[key]) for key in stored}
                alive, awake = True, set()
            for key, part in worker.parts(batch):
                logic = logics.setdefault(key, windows_step._KeyLogic(worker, None))
                logic.on_batch([part])
                awake.add(key)
            out += worker.finished()
            if after != "same epoch":
                stored |= {key: logics[key].snapshot() for key in sorted(awake)}
                awake = set()
                alive = after == "next epoch"
    expected = Replay(replace(FRAUD, features=[CARD]), SOURCES)(events(rows))
    merged = in_order(out)
    assert merged is not None
    answered = merged.take(merged["source"] == TRANSACTION)
    for name in (*CARD.names, "seq"):
        assert answered[name].tobytes() == expected[name].tobytes(), name


@settings(max_examples=40, deadline=None)
@given(
    LONG_ROWS,
    st.integers(1, 3),
    st.lists(st.integers(1, 15), max_size=4),
    st.integers(2, 6),
    st.sampled_from([3, 16]),
    st.sampled_from([0, 0, 10**6]),
    st.sampled_from([0, 0, 1, 5]),
)
def test_windows_go_on_after_kills(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    size: int,
    kills: list[int],
    pages: int,
    shards: int,
    outweighed: int,
    epoch_ms: int,
) -> None:
    """Whatever the journal has come to, with few pages to go round."""
    store = tmp_path_factory.mktemp("recovery")
    init_db_dir(store, 1)
    source = Killed(cut(rows, list(range(size, len(rows), size))), kills.copy())
    expected = answers([Replay(FRAUD, SOURCES)(events(rows))])
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal, "PAGES", pages)
        patched.setattr(Journal, "nbytes", property(lambda rows: outweighed * len(rows)))
        for _ in range(len(kills) + 1):
            recovery.discard_open_epoch(store, "at_least_once")
            out: list[EventBatch] = []
            flow = Dataflow("test")
            kept = Shards(shards, journal=True, stored=stored_in(store))
            op.output("out", both_windows(kept)(op.input("in", flow, source)), TestingSink(out))
            run_main(
                flow,
                epoch_interval=timedelta(milliseconds=epoch_ms),
                recovery_config=RecoveryConfig(store),
            )
            for batch in out:
                for name, bits in answers([batch]).items():
                    assert bits == expected[name]
                    found[name] = bits
    assert found == expected


def test_rows_before_the_snapshot_of_the_epoch_before_are_an_error() -> None:
    worker = windows_step._Worker(Layout.of(CARD, SOURCES, 1), Shards(1, journal=True))
    batches = cut([(TRANSACTION, "C1", "T1", 1_600_000_000_000 + i, 100) for i in range(2)], [1])
    logics = {"s000": windows_step._KeyLogic(worker, None)}
    for key, part in worker.parts(batches[0]):
        logics.setdefault(key, windows_step._KeyLogic(worker, None)).on_batch([part])
    early = list(worker.parts(batches[1]))
    logics["s000"].snapshot()
    with pytest.raises(RuntimeError, match="rows of an epoch came before the last one's snapshot"):
        windows_step._KeyLogic(worker, None).on_batch([early[-1][1]])


def test_rows_that_outweigh_the_state_are_not_written() -> None:
    """A few cards with an epoch of many rows: all shards, and an empty page."""
    layout = Layout.of(CARD, SOURCES, 4)
    worker = windows_step._Worker(layout, Shards(4, journal=True))
    logics: dict[str, Any] = {}

    def epoch(batches: int) -> list[Any]:
        awake = set()
        for _ in range(batches):
            # Reports are no concern of the card's windows: they do not add to the state.
            rows = [(REPORT, f"C{i % 5}", "T1", 1_600_000_000_000, 100) for i in range(200)]
            for key, part in worker.parts(events(rows)):
                logics.setdefault(key, windows_step._KeyLogic(worker, None)).on_batch([part])
                awake.add(key)
            worker.finished()
        return [logics[key].snapshot() for key in sorted(awake)]

    first = epoch(1)
    assert [kept[0] for kept in first] == ["page", *(["base"] * 4)] and first[0][2] == b""
    few = epoch(1)
    assert [kept[0] for kept in few] == ["page", "base"] and few[0][2]
    many = epoch(9)
    assert [kept[0] for kept in many] == ["page", *(["base"] * 4)] and many[0][2] == b""
    assert {kept[-2] for kept in many} == {3}


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (Shards(1), "a journal is stored, and this flow keeps none"),
        (Shards(1, journal=True), "was to end with page 0, but ends with 2"),
    ],
)
def test_a_journal_that_was_not_reckoned_with_is_an_error(kept: Shards, says: str) -> None:
    layout = Layout.of(CARD, SOURCES, 1)
    pages = Journal(layout)
    pages.add(events([(TRANSACTION, "C1", "T1", 1_600_000_000_000, 100)]))
    worker = windows_step._Worker(layout, kept)
    windows_step._KeyLogic(worker, ("page", 2, pages.page(2)))
    logic = windows_step._KeyLogic(worker, ("base", 0, 1, WindowState(layout).snapshot()))
    with pytest.raises(RuntimeError, match=says):
        logic.snapshot()


def test_rows_of_a_cluster_are_never_taken_for_a_seed() -> None:
    """Whichever worker's input they came from: the number of a base says whether it has rows."""
    layout = Layout.of(CARD, SOURCES, 1)
    reading, keeping = (windows_step._Worker(layout, Shards(1)) for _ in range(2))
    logic = windows_step._KeyLogic(keeping, None)
    rows = events([(TRANSACTION, "C1", "T1", 1_600_000_000_000, 100)])
    logic.on_batch([pickle.loads(pickle.dumps(part)) for _, part in reading.parts(rows)])
    assert logic.snapshot()[2] != SEED


def test_a_life_without_rows_keeps_the_windows(tmp_path: Path) -> None:
    init_db_dir(tmp_path, 1)
    rows = [(TRANSACTION, f"C{n % 7}", "T", 1_600_000_000_000 + n * 1000, 100) for n in range(40)]
    batches = cut(rows, [20])
    inputs: list[Any] = [batches[0], TestingSource.EOF(), TestingSource.EOF(), batches[1]]
    engine = {"epoch_interval": timedelta(0), "recovery_config": RecoveryConfig(tmp_path)}
    out = []
    for _ in range(3):
        out += run(inputs, both_windows(Shards(SHARDS)), **engine)
    assert answers(out) == answers([Replay(FRAUD, SOURCES)(events(rows))])


def test_windows_begin_with_the_state_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    times = np.sort(rng.integers(0, 60 * DAY, 600)) + 1_600_000_000_000
    rows = [
        (int(rng.random() < 0.8), f"C{rng.integers(20)}", f"T{rng.integers(20)}", int(t), 100)
        for t in times
    ]
    replay = Replay(FRAUD, SOURCES)
    replay(events(rows[:400]))
    manifest = StateManifest(FORMAT, FRAUD.name, FRAUD.schema_hash, SHARDS, int(times[400]), {})
    write_state(tmp_path / "state", manifest, replay.snapshots())
    expected = answers([replay(events(rows[400:], first_seq=400))])

    rest = [events(rows[a : a + 50], first_seq=a) for a in range(400, 600, 50)]
    start = StateDir(tmp_path / "state", FRAUD, SHARDS)
    assert answers(run(rest, both_windows(Shards(SHARDS, start)))) == expected
    assert answers(run(rest, both_windows(Shards(SHARDS)))) != expected


def test_a_later_life_does_not_need_the_state_given(tmp_path: Path, metrics: Metrics) -> None:
    """Shards that saw no event in the first life keep what they began with, too."""
    rows = [
        (TRANSACTION, f"C{i % 50}", f"T{i % 50}", 1_600_000_000_000 + i, 100) for i in range(300)
    ]
    replay = Replay(FRAUD, SOURCES)
    replay(events(rows[:200]))
    until = rows[200][3]
    manifest = StateManifest(FORMAT, FRAUD.name, FRAUD.schema_hash, SHARDS, until, {})
    write_state(tmp_path / "state", manifest, replay.snapshots())
    expected = answers([replay(events(rows[200:], first_seq=200))])

    init_db_dir(tmp_path, 1)
    engine = {"epoch_interval": timedelta(0), "recovery_config": RecoveryConfig(tmp_path)}
    items = [events(rows[200:201], 200), TestingSource.EOF(), events(rows[201:], 201)]
    start = StateDir(tmp_path / "state", FRAUD, SHARDS)
    out = run(items, both_windows(Shards(SHARDS, start)), **engine)
    out += run(items, both_windows(Shards(SHARDS)), **engine)
    assert answers(out) == expected
    assert count(metrics, "before_state", "card") == 0


def test_events_that_the_state_may_hold_already_are_told(tmp_path: Path, metrics: Metrics) -> None:
    rows = [(TRANSACTION, "C", "T", 1_600_000_000_000 + i, 100) for i in range(10)]
    replay = Replay(FRAUD, SOURCES)
    replay(events(rows[:6]))
    manifest = StateManifest(FORMAT, FRAUD.name, FRAUD.schema_hash, SHARDS, rows[6][3], {})
    write_state(tmp_path / "state", manifest, replay.snapshots())
    run([events(rows[4:])], both_windows(Shards(16, StateDir(tmp_path / "state", FRAUD, SHARDS))))
    assert count(metrics, "before_state", "card") == 2


def test_late_events_are_counted_by_whether_they_were_within_the_lateness(
    metrics: Metrics,
) -> None:
    t = 1_600_000_000_000
    lateness = CARD.lateness_ms
    rows = [(TRANSACTION, "C", "T", t - late, 1) for late in (0, 1000, lateness, lateness + 1)]
    out = run([events(rows)], both_windows(Shards(1)))
    counted = {
        (view, within): count(metrics, "late_events", view, within)
        for view in ("card", "terminal")
        for within in ("yes", "no")
    }
    expected = {"yes": 2, "no": 1}
    assert counted == {(v, w): n for v in ("card", "terminal") for w, n in expected.items()}, out


# Answered


def test_news_has_done_its_work(metrics: Metrics) -> None:
    t = 1_600_000_000_000
    kinds = [REPORT, TRANSACTION, REPORT, TRANSACTION, REPORT]
    mixed = events([(kind, "C", "T", t, 1) for kind in kinds])
    news, asking = (events([(kind, "C", "T", t, 1)]) for kind in (REPORT, TRANSACTION))
    out = run([mixed, news, asking], lambda up: answered("a", up, FRAUD, SOURCES, TOPICS))
    assert [batch["transaction_id"].tolist() for batch in out] == [[b"tx1", b"tx3"], [b"tx0"]]
    assert metrics.account() == {"fraud_reports": dict.fromkeys(OUTCOMES, 0) | {"applied": 4}}


# Lookup


class Store:
    """An online store that knows C1 and every terminal; batches find it as the test says."""

    def __init__(self, read: Any = None, *, is_open: bool = False) -> None:
        self.read = read
        self.open = is_open

    def lookup(self, asked: Any, now_ms: Any) -> list[Profiles]:
        found = []
        for view, keys in asked:
            known = (keys == b"C1") | (view is TERMINAL_PROFILE)
            values = np.where(known, now_ms % 97.0, np.nan)[:, None] + np.arange(len(view.fields))
            served = np.where(known, Served.FRESH, Served.MISSING).astype(np.uint8)
            served += self.read not in (None, "ok")
            ages = np.where(known, 5000.0 + 1000 * np.arange(len(keys)), np.nan)
            found.append(Profiles(values, ages, served, self.read, "why" if self.read else ""))
        return found

    def is_open(self, view: Any) -> bool:
        return self.open


def lookups(metrics: Metrics, view: str) -> list[float]:
    results = ("fresh", "stale", "missing")
    return [count(metrics, "profile_lookups", view, result) for result in results]


def test_lookup_adds_every_field_its_age_and_how_it_was_served(metrics: Metrics) -> None:
    batch = events([(TRANSACTION, card, "T1", 1_600_000_000_000, 1) for card in ("C1", "C2", "C1")])
    (out,) = run([batch], lambda up: lookup("p", up, cast(Any, Store()), PROFILES))
    base = 1_600_000_000_000 % 97
    for i, name in enumerate(CUSTOMER_PROFILE.columns):
        np.testing.assert_array_equal(out[name], [base + i, np.nan, base + i])
    for i, name in enumerate(TERMINAL_PROFILE.columns):
        np.testing.assert_array_equal(out[name], [base + i] * 3)
    np.testing.assert_array_equal(out["customer_profile__age_ms"], [5000, np.nan, 7000])
    assert out["customer_profile__served"].tolist() == [0, 2, 0]
    assert out["customer_profile__served"].dtype == np.uint8
    assert lookups(metrics, "customer_profile") == [2, 0, 1]
    assert lookups(metrics, "terminal_profile") == [3, 0, 0]
    assert count(metrics, "profile_age", "customer_profile") == 6  # mean of the rows used, s
    assert set(batch) < set(out)


def test_a_store_that_fails_is_counted_and_marked_on_the_events(metrics: Metrics) -> None:
    store = Store()
    course = [("ok", False), ("failed", False), ("late", True), ("refused", True), (None, False)]

    def batches() -> Iterator[EventBatch]:
        for i, (read, is_open) in enumerate(course):
            store.read, store.open = read, is_open
            cards = ("C1", "C2")
            yield events([(TRANSACTION, card, "T1", 1_600_000_000_000, 1) for card in cards], 2 * i)
            assert count(metrics, "breaker_open", "terminal_profile") == is_open

    out = run(cast(Any, batches()), lambda up: lookup("p", up, cast(Any, store), PROFILES))
    served = [batch["customer_profile__served"].tolist() for batch in out]
    assert served == [[0, 2], [1, 3], [1, 3], [1, 3], [0, 2]]
    for view, known in ((CUSTOMER_PROFILE, 1), (TERMINAL_PROFILE, 2)):
        assert lookups(metrics, view.name) == [2 * known, 3 * known, 5 * (2 - known)]
        for read, _ in course[:4]:
            assert count(metrics, "store_reads", view.name, str(read)) == 1


def test_a_store_that_fails_is_logged_now_and_then_and_once_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, clock = Store(), [1_000.0]
    logged = structlog.testing.LogCapture()
    logger = structlog.wrap_logger(structlog.PrintLogger(), processors=[logged])
    monkeypatch.setattr(lookup_step, "log", logger)

    def batches() -> Iterator[EventBatch]:
        # (seconds later, read, open)
        course = [(0, "ok", 0)] + [(1, "late", 0)] * 25 + [(1, "ok", 1), (1, "ok", 0), (1, "ok", 0)]
        course += [(1, "failed", 0), (1, "ok", 0), (1, None, 0)]
        for i, (later, read, is_open) in enumerate(course):
            clock[0] += later
            store.read, store.open = read, bool(is_open)
            cards = ("C1", "C2")
            yield events([(TRANSACTION, card, "T1", 1_600_000_000_000, 1) for card in cards], 2 * i)

    run(
        cast(Any, batches()),
        lambda up: lookup("p", up, cast(Any, store), PROFILES, lambda: clock[0]),
    )
    for view in PROFILES:
        mine = [line for line in logged.entries if line["view"] == view.name]
        # After 1, 11 and 21 s of the 25; back with the breaker closed; the last failure is too
        # soon after to be told, and so is that it was over.
        assert [line["log_level"] for line in mine] == [*["warning"] * 3, "info"]
        assert [line["events"] for line in mine] == [2, 20, 20, 8]
        assert all(line["why"] == "why" and line["read"] == "late" for line in mine[:3])
        assert mine[3]["after_s"] == 26


# Score and encode


class Scorer:
    """A model whose score is the amount over 1000; NaN for 13.00. Feature 2, then 0, is why."""

    version = "model-1"

    def __init__(self) -> None:
        self.explained = 0

    def score(self, x: Any) -> Any:
        return np.where(x[:, 0] == 13, np.nan, x[:, 0] / 1000)

    def explain(self, x: Any, k: int) -> Any:
        assert k >= 1 and not np.isnan(self.score(x)).any()
        self.explained += len(x)
        why = np.tile(np.array([2, 0, 1])[:k], (len(x), 1))
        return why, np.tile(np.array([0.5, 0.25, 1 / 3])[:k], (len(x), 1))


THRESHOLDS = Thresholds(review=0.5, block=0.9, rule="by hand")
CENTS = [100_00, 500_00, 899_99, 900_00, 13_00, 0]
EXPECTED = ["approve", "review", "review", "block", "review", "approve"]


def featured(cents: Sequence[int], card: str = "карта") -> EventBatch:
    batch = events([(TRANSACTION, card, "T1", 1_600_000_000_000, c) for c in cents])
    names = [name for view in FRAUD.views for name in view.names]
    return batch.with_columns({name: np.full(len(cents), i / 7) for i, name in enumerate(names)})


def scored(batch: EventBatch, reasons: int = 2, scorer: Scorer | None = None) -> EventBatch:
    model = cast(Any, scorer or Scorer())
    (out,) = run([batch], lambda up: score("s", up, FRAUD, model, THRESHOLDS, reasons))
    return cast(EventBatch, out)


def test_scores_decisions_and_reasons(metrics: Metrics) -> None:
    scorer = Scorer()
    out = scored(featured(CENTS), scorer=scorer)
    np.testing.assert_array_equal(out["score"], [0.1, 0.5, 0.89999, 0.9, np.nan, 0])
    assert [DECISIONS[code] for code in out["decision"]] == EXPECTED
    assert out["#features"].shape == (6, 15)
    why = [-1, -1], [2, 0]
    assert out["#reasons"].tolist() == [list(why[i]) for i in (0, 1, 1, 1, 0, 0)]
    assert scorer.explained == 3, "only the flagged are explained: it costs 16 scorings a row"
    predictions(out)
    for decision, n in (("approve", 2), ("review", 3), ("block", 1)):
        assert count(metrics, "decisions", decision) == n
    assert count(metrics, "predictions", "full") == 6


@pytest.mark.parametrize("reasons", [0, 1, 3])
def test_as_many_reasons_as_asked_for(reasons: int) -> None:
    assert scored(featured(CENTS), reasons)["#reasons"].shape == (6, reasons)


def predictions(batch: EventBatch, now_s: float = 1_600_000_001.0) -> tuple[OutRecords, list[Any]]:
    (out,) = run([batch], lambda up: encode("e", up, FRAUD, "model-1", TOPICS, now_s=lambda: now_s))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return out, [json.loads(value, parse_constant=refuse) for value in out.values]


def test_the_size_of_a_prediction_is_judged_alike_however_late_it_is() -> None:
    """A later life must not make a dead letter of what an earlier one has answered."""
    rows = scored(featured(CENTS))
    sizes = [predictions(rows, now_s=1_600_000_000.0 + s)[0].most_bytes() for s in (0, 1, 10**6)]
    assert sizes[0].tolist() == sizes[1].tolist() == sizes[2].tolist()


def test_a_prediction_is_this_json() -> None:
    out, found = predictions(scored(featured(CENTS)))
    common = {
        "card_id": "карта",
        "terminal_id": "T1",
        "event_time": 1_600_000_000_000,
        "model_version": "model-1",
        "schema_hash": FRAUD.schema_hash,
        "latency_ms": 995,
        "score_mode": "full",
    }
    assert found[0] == {"transaction_id": "tx0", "score": 0.1, "decision": "approve", **common}
    reasons = [
        {"feature": FRAUD.names[2], "contribution": 0.5},
        {"feature": FRAUD.names[0], "contribution": 0.25},
    ]
    blocked = {"transaction_id": "tx3", "score": 0.9, "decision": "block", "reasons": reasons}
    assert found[3] == common | blocked
    assert [document["decision"] for document in found] == EXPECTED
    assert [bool(document.get("reasons")) for document in found] == [0, 1, 1, 1, 0, 0]
    assert out.keys == ["карта".encode()] * 6
    assert out.event_ids == [f"tx{i}".encode() for i in range(6)]
    assert out.append_time.tolist() == [1_600_000_000_005] * 6


def test_a_score_that_is_not_a_number_is_null_reviewed_and_without_reasons() -> None:
    _, found = predictions(scored(featured([13_00])))
    assert found[0]["score"] is None
    assert found[0]["decision"] == "review"
    assert "reasons" not in found[0]


def test_no_reasons_if_none_are_wanted() -> None:
    _, found = predictions(scored(featured(CENTS), reasons=0))
    assert not any("reasons" in document for document in found)


def test_the_fields_of_the_records_are_an_interface() -> None:
    """Consumers parse these by name: add, do not rename."""
    assert Prediction.__struct_fields__ == (
        "transaction_id",
        "card_id",
        "terminal_id",
        "event_time",
        "score",
        "decision",
        "model_version",
        "schema_hash",
        "latency_ms",
        "score_mode",
        "without",
        "reasons",
        "shed",
    )
    assert AuditRecord.__struct_fields__ == (
        "transaction_id",
        "card_id",
        "terminal_id",
        "event_time",
        "topic",
        "partition",
        "offset",
        "schema_hash",
        "model_version",
        "score",
        "features",
    )


def audited(batches: list[EventBatch], share: float) -> list[dict[str, Any]]:
    out = run(batches, lambda up: audit("a", up, FRAUD, "model-1", TOPICS, share))
    return [json.loads(value) for records in out for value in records.values]


def test_an_audit_record_is_what_the_model_saw_bit_for_bit() -> None:
    batch = featured([27_90, 13_00]).with_columns(
        {"card_mean_amount_7d": np.array([1 / 3, np.nan])}
    )
    batch = scored(batch)
    found = audited([batch], 1.0)
    assert found[0] == {
        "transaction_id": "tx0",
        "card_id": "карта",
        "terminal_id": "T1",
        "event_time": 1_600_000_000_000,
        "topic": "transactions",
        "partition": 0,
        "offset": 100,
        "schema_hash": FRAUD.schema_hash,
        "model_version": "model-1",
        "score": batch["score"][0],
        "features": dict(zip(FRAUD.names, batch["#features"][0].tolist(), strict=True)),
    }
    assert list(found[0]["features"]) == list(FRAUD.names)
    assert (found[1]["score"], found[1]["features"]["card_mean_amount_7d"]) == (None, None)


def test_the_audit_takes_the_same_cards_always_and_about_its_share() -> None:
    cards = [f"C{i:04d}" for i in range(2000)]
    once = scored(featured([5_00], card="C")).take(np.zeros(len(cards), np.int64))
    batch = once.with_columns({"card_id": np.array([card.encode() for card in cards])})
    rng = np.random.default_rng(1)
    chosen: dict[float, set[str]] = {}
    for share in (0.0, 0.05, 0.2, 1.0):
        chosen[share] = {record["card_id"] for record in audited([batch], share)}
        shuffled = batch.take(rng.permutation(len(batch)))
        pieces = [shuffled.take(slice(a, a + 300)) for a in range(0, 2000, 300)]
        assert {record["card_id"] for record in audited(pieces, share)} == chosen[share]
        assert len(chosen[share]) == pytest.approx(share * 2000, rel=0.25)
    assert chosen[0.0] == set() < chosen[0.05] < chosen[0.2] < chosen[1.0] == set(cards)


def test_what_is_refused_never_reaches_the_score() -> None:
    """The steps together: a bad record between good ones costs only itself."""
    cases = [case for bad in REFUSED[:5] for case in (bad, ACCEPTED[0])]
    accepted, _ = run_decode([records_of(cases)])
    out = run(accepted, both_windows(Shards(SHARDS)))
    counts = [int(value) for batch in out for value in batch["card_count_1d"]]
    assert counts == [1, 2, 3, 4, 5]
    assert wire(wire_transaction()) == ACCEPTED[0].value
