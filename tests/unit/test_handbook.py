"""The generated data set against its description: a naive simulator and the published counts."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from model import handbook

ROOT = Path(__file__).parents[2]
DAY_MS = 86_400_000
HOUR_MS = 3_600_000
TABLES = ("customers", "terminals", "fraud_reports", "transactions")


def ms(text: str) -> int:
    return int(np.datetime64(text, "ms").astype(np.int64))


@pytest.fixture(scope="module")
def full(handbook_dir: Path) -> handbook.Tables:
    return handbook.Tables(
        **{name: pq.read_table(handbook_dir / f"{name}.parquet") for name in TABLES}
    )


def days_of(transactions: pa.Table) -> np.ndarray:
    return (transactions["event_time"].to_numpy() - handbook.START_MS) // DAY_MS


def naive_simulation(drawn_days: int) -> list[dict]:
    """Follow the description word for word, with the calls it names and no regard for time.

    Labels are final for days before drawn_days - 13: later ones lack transactions to pick from.
    """
    state = np.random.RandomState(0)
    customers = [
        (state.uniform(0, 100), state.uniform(0, 100), state.uniform(5, 100), state.uniform(0, 4))
        for _ in range(5000)
    ]
    state = np.random.RandomState(1)
    terminals = np.array([(state.uniform(0, 100), state.uniform(0, 100)) for _ in range(10000)])

    rows = []
    for c, (x, y, mean, mean_nb) in enumerate(customers):
        distance = np.sqrt(((terminals - (x, y)) ** 2).sum(axis=1))
        reach = np.flatnonzero(distance < 5).tolist()
        state, chooser = np.random.RandomState(c), random.Random(c)
        for day in range(drawn_days):
            for _ in range(state.poisson(mean_nb)):
                t = int(state.normal(43200, 20000))
                if 0 < t < 86400:
                    amount = state.normal(mean, mean / 2)
                    if amount < 0:
                        amount = state.uniform(0, 2 * mean)
                    amount = np.round(amount, decimals=2)
                    terminal = chooser.choice(reach)
                    second = t + 86400 * day
                    rows.append({"c": c, "t": terminal, "s": second, "day": day, "amount": amount})
    rows.sort(key=lambda row: row["s"])  # stable

    for row in rows:
        row["scenario"] = 1 if row["amount"] > 220 else 0
    for d in range(min(drawn_days, 182)):
        compromised = np.random.RandomState(d).choice(10000, 2, replace=False).tolist()
        for row in rows:
            if d <= row["day"] < d + 28 and row["t"] in compromised:
                row["scenario"] = 2
    for d in range(min(drawn_days, 182)):
        leaked = set(np.random.RandomState(d).choice(5000, 3, replace=False).tolist())
        candidates = [
            i for i, row in enumerate(rows) if row["c"] in leaked and d <= row["day"] < d + 14
        ]
        for i in random.Random(d).sample(candidates, int(len(candidates) / 3)):
            rows[i]["amount"] *= 5
            rows[i]["scenario"] = 3
    return rows


def test_equals_the_naive_simulator(full):
    # 32 days: some terminals of scenario 2 recover (after 28), some cards of scenario 3 (after 14).
    days = 32
    expected = [row for row in naive_simulation(days + 13) if row["day"] < days]
    actual = full.transactions.slice(0, len(expected))
    assert actual["card_id"].to_pylist() == [f"C{row['c']:04d}" for row in expected]
    assert actual["terminal_id"].to_pylist() == [f"T{row['t']:04d}" for row in expected]
    assert actual["event_time"].to_pylist() == [
        ms("2018-04-01") + 1000 * row["s"] for row in expected
    ]
    assert actual["amount_cents"].to_pylist() == [round(row["amount"] * 100) for row in expected]
    assert actual["scenario"].to_pylist() == [row["scenario"] for row in expected]
    assert (days_of(full.transactions) < days).sum() == len(expected)


def test_entities_equal_their_description(full):
    state = np.random.RandomState(0)
    for row in full.customers.to_pylist():
        assert (row["x"], row["y"]) == (state.uniform(0, 100), state.uniform(0, 100))
        assert row["mean_amount"] == state.uniform(5, 100)
        assert row["std_amount"] == row["mean_amount"] / 2
        assert row["mean_transactions_per_day"] == state.uniform(0, 4)
    state = np.random.RandomState(1)
    for row in full.terminals.to_pylist():
        assert (row["x"], row["y"]) == (state.uniform(0, 100), state.uniform(0, 100))
    assert full.customers["card_id"].to_pylist() == [f"C{i:04d}" for i in range(5000)]
    assert full.terminals["terminal_id"].to_pylist() == [f"T{i:04d}" for i in range(10000)]


def test_published_counts(full):
    # The handbook's own figures, confirmed by an independent implementation.
    transactions = full.transactions
    label, day = transactions["label"].to_numpy(), days_of(transactions)
    assert len(transactions) == 1_754_155
    assert label.sum() == 14_681
    assert ((day == 0).sum(), label[day == 0].sum()) == (9_488, 3)
    assert pc.min_max(transactions["amount_cents"]).as_py() == {"min": 0, "max": 262_800}
    _, per_second = np.unique(transactions["event_time"].to_numpy(), return_counts=True)
    assert per_second[per_second > 1].sum() == 231_973
    week = (day >= (ms("2018-07-25") - handbook.START_MS) // DAY_MS) & (
        day <= (ms("2018-07-31") - handbook.START_MS) // DAY_MS
    )
    assert (week.sum(), label[week].sum()) == (67_240, 598)


def test_label_is_one_exactly_where_there_is_a_scenario(full):
    label = full.transactions["label"].to_numpy()
    scenario = full.transactions["scenario"].to_numpy()
    assert np.array_equal(label == 1, scenario > 0)
    assert set(np.unique(label)) == {0, 1}
    assert set(np.unique(scenario)) == {0, 1, 2, 3}


def test_ids_number_the_rows_in_stream_order(full):
    transactions = full.transactions
    assert transactions["transaction_id"].to_pylist() == [
        f"tx{i:07d}" for i in range(1, len(transactions) + 1)
    ]
    time = transactions["event_time"].to_numpy()
    customer = pc.cast(pc.utf8_slice_codeunits(transactions["card_id"], 1), pa.int64()).to_numpy()
    assert np.all(np.diff(time) >= 0)
    assert np.all((np.diff(time) > 0) | (np.diff(customer) >= 0))


def test_schema(full):
    assert full.transactions.schema == pa.schema(
        {
            "transaction_id": pa.string(),
            "card_id": pa.string(),
            "terminal_id": pa.string(),
            "event_time": pa.int64(),
            "amount_cents": pa.int64(),
            "label": pa.int8(),
            "scenario": pa.int8(),
        }
    )
    assert full.fraud_reports.schema == pa.schema(
        {
            "transaction_id": pa.string(),
            "terminal_id": pa.string(),
            "event_time": pa.int64(),
            "report_time": pa.int64(),
        }
    )
    # What is sent is chosen by dropping these.
    assert set(handbook.LABEL_COLUMNS) < set(full.transactions.column_names)


def test_features_of_the_published_row(full):
    # handbook.md's fixture: customer 0, 2018-09-30 15:11:37, computed here by plain filters.
    transactions = full.transactions
    time = transactions["event_time"].to_numpy()
    cents = transactions["amount_cents"].to_numpy()
    label = transactions["label"].to_numpy()
    card = pc.equal(transactions["card_id"], "C0000").to_numpy()
    now = ms("2018-09-30T15:11:37")
    (row,) = np.flatnonzero(card & (time == now))
    assert cents[row] == 2790
    terminal = pc.equal(transactions["terminal_id"], transactions["terminal_id"][row]).to_numpy()

    counts, means, terminal_counts, risks = [], [], [], []
    for window in (1 * DAY_MS, 7 * DAY_MS, 30 * DAY_MS):
        recent = card & (time > now - window) & (time <= now)
        counts.append(recent.sum())
        means.append(round(cents[recent].mean() / 100, 6))
        until = now - 7 * DAY_MS
        settled = terminal & (time > until - window) & (time <= until)
        terminal_counts.append(settled.sum())
        risks.append(label[settled].sum() / max(settled.sum(), 1))
    assert counts == [9, 31, 91]
    assert means == [61.598889, 57.982581, 61.508901]
    assert terminal_counts == [0, 3, 21]
    assert risks == [0, 0, 0]


def test_every_fraud_is_reported_once_and_in_time(full):
    reports = full.fraud_reports
    frauds = full.transactions.filter(pc.equal(full.transactions["label"], 1))
    same = ["transaction_id", "terminal_id", "event_time"]
    assert reports.sort_by("transaction_id").select(same) == frauds.select(same)
    delay = reports["report_time"].to_numpy() - reports["event_time"].to_numpy()
    assert delay.min() >= HOUR_MS
    assert delay.max() < 7 * DAY_MS
    # Uniform over the whole range, in milliseconds: each seventh holds a seventh, within 5 sigma.
    share, _ = np.histogram(delay, bins=7, range=(HOUR_MS, 7 * DAY_MS))
    assert np.all(np.abs(share / len(delay) - 1 / 7) < 5 * np.sqrt(6 / 49 / len(delay)))
    assert np.any(delay % 1000 != 0)
    order = list(
        zip(reports["report_time"].to_pylist(), reports["transaction_id"].to_pylist(), strict=True)
    )
    assert order == sorted(order)


# 4, 15 and 29 are cuts that show it when even one of the 13 days drawn beyond them is missing.
@pytest.mark.parametrize("days", [1, 4, 15, 29, 181])
def test_shorter_sets_are_prefixes(full, days):
    part = handbook.simulate(days)
    rows = int((days_of(full.transactions) < days).sum())
    assert part.transactions == full.transactions.slice(0, rows)
    last = part.transactions["transaction_id"][-1]
    assert part.fraud_reports == full.fraud_reports.filter(
        pc.less_equal(full.fraud_reports["transaction_id"], last)
    )
    assert part.customers == full.customers
    assert part.terminals == full.terminals


def test_two_full_runs_are_identical(full):
    # `full` may be days old and from another process.
    again = handbook.simulate()
    for name in TABLES:
        assert getattr(again, name) == getattr(full, name), name


def test_report_seed_changes_report_times_only():
    one, other = handbook.simulate(2, report_seed=1), handbook.simulate(2, report_seed=2)
    assert one.transactions == other.transactions
    frauds = ["transaction_id", "terminal_id", "event_time"]
    assert one.fraud_reports.sort_by("transaction_id").select(frauds) == (
        other.fraud_reports.sort_by("transaction_id").select(frauds)
    )
    assert one.fraud_reports["report_time"] != other.fraud_reports["report_time"]


def test_progress_reaches_the_last_customer():
    seen = []
    handbook.simulate(1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5000) for i in range(1, 5001)]


@pytest.mark.parametrize("days", [0, -1, 184])
def test_days_out_of_range(days):
    with pytest.raises(ValueError, match=f"days is {days}.*choose 1 to 183"):
        handbook.simulate(days)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_report_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=f"report_seed is {seed}: choose 0 to 4294967295"):
        handbook.simulate(1, report_seed=seed)


def test_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    old = {f"{name}.parquet": name.encode() for name in TABLES}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    write_table = pq.write_table

    def fail_on_the_last(table, where, **options):
        if Path(where).name == "transactions.parquet":
            raise OSError("disk full")
        write_table(table, where, **options)

    monkeypatch.setattr(pq, "write_table", fail_on_the_last)
    with pytest.raises(OSError, match="disk full"):
        handbook.write(handbook.simulate(1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def run(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "model.handbook", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_command_writes_the_same_bytes_in_every_process(tmp_path):
    for hash_seed in ("1", "2"):
        out = tmp_path / "new" / hash_seed
        done = run("--out", str(out), "--days", "2", hash_seed=hash_seed)
        # No terminal, so no progress either.
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert sorted(path.name for path in out.iterdir()) == sorted(
            f"{name}.parquet" for name in TABLES
        )
    for name in TABLES:
        one, other = (tmp_path / "new" / seed / f"{name}.parquet" for seed in ("1", "2"))
        assert one.read_bytes() == other.read_bytes(), name


def test_command_names_the_wrong_argument(tmp_path):
    done = run("--out", str(tmp_path), "--days", "200")
    assert done.returncode == 2
    assert "days is 200, but the simulation has 183: choose 1 to 183" in done.stderr
    assert list(tmp_path.iterdir()) == []
