"""The replay: its answers depend on the order of events alone, not on chunks, files or restarts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import offline
from features.batch import EventBatch
from features.events import Event
from features.fraud import FRAUD, SOURCES, FraudReport, Transaction
from features.offline import Replay, interleave, parse_time, read_events, training_frame
from features.state_dir import StateDir, StateError
from features.windows import SHARDS
from model import handbook

UNTIL = parse_time("2018-04-20T12:34:56")
MIDDLE = parse_time("2018-04-11T09:00:00")


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-five days of every tenth terminal: delayed windows have something in them."""
    directory = tmp_path_factory.mktemp("history")
    handbook.write(handbook.simulate(days=25), directory)
    for name in ("transactions", "fraud_reports"):
        table = pq.read_table(directory / f"{name}.parquet")
        table = table.filter(pc.ends_with(table["terminal_id"], "7"))
        pq.write_table(table, directory / f"{name}.parquet", row_group_size=5_000)
    return directory


def run(history: Path, out: Path, *more: str) -> int:
    arguments = ["--transactions", str(history / "transactions.parquet")]
    arguments += ["--fraud-reports", str(history / "fraud_reports.parquet"), "--out", str(out)]
    return offline.main([*arguments, *more])


@pytest.fixture(scope="module")
def uninterrupted(history: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    out = tmp_path_factory.mktemp("frame") / "frame.parquet"
    assert run(history, out, "--until", str(UNTIL)) == 0
    return pq.read_table(out)


def assert_bit_for_bit(found: pa.Table, expected: pa.Table) -> None:
    assert found.schema == expected.schema
    for name in expected.column_names:
        a, b = (np.asarray(table[name].to_numpy()) for table in (found, expected))
        if a.dtype == np.float64:
            a, b = a.view(np.int64), b.view(np.int64)
        assert len(a) == len(b)
        assert (a == b).all(), name


def test_the_fixture_is_worth_it(uninterrupted: pa.Table) -> None:
    assert len(uninterrupted) > 10_000
    assert (uninterrupted["terminal_risk_7d"].to_numpy() > 0).sum() > 50


@pytest.mark.parametrize("chunk_rows", [997, 10_000_000])
def test_any_chunk_size_gives_the_same_bits(
    history: Path, uninterrupted: pa.Table, tmp_path: Path, chunk_rows: int
) -> None:
    out = tmp_path / "frame.parquet"
    assert run(history, out, "--until", str(UNTIL), "--chunk-rows", str(chunk_rows)) == 0
    assert_bit_for_bit(pq.read_table(out), uninterrupted)


def test_any_shard_count_gives_the_same_bits(
    history: Path, uninterrupted: pa.Table, tmp_path: Path
) -> None:
    assert run(history, tmp_path / "f.parquet", "--until", str(UNTIL), "--shards", "3") == 0
    assert_bit_for_bit(pq.read_table(tmp_path / "f.parquet"), uninterrupted)


def test_until_is_open(history: Path, uninterrupted: pa.Table, tmp_path: Path) -> None:
    times = uninterrupted["event_time"].to_numpy()
    assert times.max() < UNTIL
    exactly = int(times[5000])
    assert run(history, tmp_path / "f.parquet", "--until", str(exactly)) == 0
    assert len(pq.read_table(tmp_path / "f.parquet")) == np.searchsorted(times, exactly)


def streams(
    history: Path, since: int, until: int
) -> list[tuple[type[Event], Iterator[EventBatch]]]:
    """Read what a flow would be sent after `since`."""

    def later(event: type[Event], name: str) -> Iterator[EventBatch]:
        for batch in read_events(history / name, event, until=until, chunk_rows=1234):
            yield batch.take(batch[event.stream_time] >= since)

    return [
        (Transaction, later(Transaction, "transactions.parquet")),
        (FraudReport, later(FraudReport, "fraud_reports.parquet")),
    ]


def test_going_on_from_the_state_equals_never_having_stopped(
    history: Path, uninterrupted: pa.Table, tmp_path: Path
) -> None:
    """Bit for bit, although the reports of what came before the cut come after it."""
    first, state = tmp_path / "first.parquet", tmp_path / "state"
    assert run(history, first, "--until", str(MIDDLE), "--state", str(state)) == 0
    start = StateDir(state, FRAUD, SHARDS)
    assert start.manifest.until == MIDDLE
    replay = Replay(FRAUD, SOURCES, SHARDS, start=start)
    rest = [
        training_frame(replay(batch), FRAUD)
        for batch in interleave(streams(history, MIDDLE, UNTIL), SOURCES)
    ]
    assert_bit_for_bit(pa.concat_tables([pq.read_table(first), *rest]), uninterrupted)
    # And it is the state that does it.
    blank = Replay(FRAUD, SOURCES, SHARDS)
    batch = next(iter(interleave(streams(history, MIDDLE, UNTIL), SOURCES)))
    without = training_frame(blank(batch), FRAUD)
    assert (without["card_count_30d"].to_numpy() != rest[0]["card_count_30d"].to_numpy()).any()


def test_the_state_without_until_is_as_of_the_last_event(history: Path, tmp_path: Path) -> None:
    assert run(history, tmp_path / "f.parquet", "--state", str(tmp_path / "state")) == 0
    manifest = StateDir(tmp_path / "state", FRAUD, SHARDS).manifest
    last = max(
        pq.read_table(history / "transactions.parquet")["event_time"].to_numpy().max(),
        pq.read_table(history / "fraud_reports.parquet")["report_time"].to_numpy().max(),
    )
    assert manifest.until == last + 1
    assert manifest.events == {
        "Transaction": pq.read_metadata(history / "transactions.parquet").num_rows,
        "FraudReport": pq.read_metadata(history / "fraud_reports.parquet").num_rows,
    }


# Files that are not as they should be


def rewritten(history: Path, to: Path, name: str, change: Any) -> Path:
    """Copy the history with one of its tables changed."""
    for each in ("transactions", "fraud_reports"):
        table = pq.read_table(history / f"{each}.parquet")
        pq.write_table(change(table) if each == name else table, to / f"{each}.parquet")
    return to


def swapped(table: pa.Table) -> pa.Table:
    order = np.arange(len(table))
    order[[100, len(table) - 1]] = order[[len(table) - 1, 100]]
    return table.take(pa.array(order))


@pytest.mark.parametrize("name", ["transactions", "fraud_reports"])
@pytest.mark.parametrize("chunk_rows", ["50", "65536"])
def test_an_unsorted_file_is_refused(
    history: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, chunk_rows: str
) -> None:
    bad = rewritten(history, tmp_path, name, swapped)
    assert run(bad, tmp_path / "out.parquet", "--chunk-rows", chunk_rows) == 1
    said = capsys.readouterr().err
    assert "are not sorted by" in said and "sort them" in said
    assert not list(tmp_path.glob("out*")), "a half frame must not be left behind"


def test_a_missing_column_is_named(
    history: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = rewritten(
        history, tmp_path, "transactions", lambda table: table.drop_columns(["amount_cents"])
    )
    assert run(bad, tmp_path / "out.parquet") == 1
    assert "transactions.parquet lacks amount_cents, which Transaction" in capsys.readouterr().err


def test_nothing_before_until(
    history: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(history, tmp_path / "out.parquet", "--until", "2018-01-01") == 1
    assert "no event before --until" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_state_of_other_features_is_no_start(history: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert run(history, tmp_path / "f.parquet", "--until", str(MIDDLE), "--state", str(state)) == 0
    with pytest.raises(StateError, match="has shards 32, this flow needs 8"):
        StateDir(state, FRAUD, 8)


# Interleaving

CLOCKS = st.lists(st.integers(0, 12), max_size=25).map(sorted)
CUTS = st.lists(st.integers(0, 25), max_size=6)


def chunks(event: type[Event], times: list[int], cuts: list[int]) -> Iterator[EventBatch]:
    """One stream in chunks, some of them empty; ids tell the order within it."""
    n = len(times)
    prefix = event.__name__[0]
    columns: dict[str, Any] = {
        "transaction_id": np.array([f"{prefix}{i:02d}".encode() for i in range(n)], "S3"),
        "terminal_id": np.full(n, b"T"),
        "event_time": np.zeros(n, np.int64),
    }
    columns[event.stream_time] = np.array(times, np.int64)
    if event is Transaction:
        columns |= {"card_id": np.full(n, b"C"), "amount": np.ones(n, np.int64)}
    batch = EventBatch(columns)
    for begin, end in pairwise([0, *sorted(min(cut, n) for cut in cuts), n]):
        yield batch.take(slice(begin, end))


@settings(max_examples=300, deadline=None)
@given(CLOCKS, CLOCKS, CUTS, CUTS, st.booleans(), st.permutations(SOURCES))
def test_interleaving_is_a_stable_sort_by_time_and_priority(
    transactions: list[int],
    reports: list[int],
    cuts: list[int],
    other_cuts: list[int],
    swap: bool,
    sources: list[type[Event]],
) -> None:
    given_streams = [
        (Transaction, chunks(Transaction, transactions, cuts)),
        (FraudReport, chunks(FraudReport, reports, other_cuts)),
    ]
    merged = list(interleave(given_streams[::-1] if swap else given_streams, sources))
    found = [
        (int(batch["source"][i]), batch["transaction_id"][i].decode())
        for batch in merged
        for i in range(len(batch))
    ]
    expected = sorted(
        [(time, sources.index(Transaction), f"T{i:02d}") for i, time in enumerate(transactions)]
        + [(time, sources.index(FraudReport), f"F{i:02d}") for i, time in enumerate(reports)]
    )
    assert found == [(source, name) for _, source, name in expected]
    seq = [int(value) for batch in merged for value in batch["seq"]]
    assert seq == list(range(len(expected)))


def test_a_stream_that_goes_back_between_chunks_is_refused() -> None:
    batches = [*chunks(Transaction, [1, 5], []), *chunks(Transaction, [4, 6], [])]
    with pytest.raises(ValueError, match="Transaction events are not sorted by event_time"):
        list(interleave([(Transaction, iter(batches))], SOURCES))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2018-08-08", 1_533_686_400_000),
        ("2018-08-08T12:00", 1_533_729_600_000),
        ("2018-08-08T12:00:00+02:00", 1_533_722_400_000),
        ("1533686400001", 1_533_686_400_001),
    ],
)
def test_times_are_read_as_utc(text: str, expected: int) -> None:
    assert parse_time(text) == expected
