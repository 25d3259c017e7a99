"""The fifteen inputs against the handbook: its fixture, and its rules once more in pandas."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflows import settings as flow_settings
from features import offline
from features.fraud import FRAUD, SOURCES, Transaction, during_night, during_weekend
from features.offline import parse_time

ROOT = Path(__file__).parents[2]
DAYS = (1, 7, 30)
NAMES = (
    "amount",
    "during_weekend",
    "during_night",
    "card_count_1d",
    "card_count_7d",
    "card_count_30d",
    "card_mean_amount_1d",
    "card_mean_amount_7d",
    "card_mean_amount_30d",
    "terminal_count_1d",
    "terminal_count_7d",
    "terminal_count_30d",
    "terminal_risk_1d",
    "terminal_risk_7d",
    "terminal_risk_30d",
)


def test_the_fifteen_inputs_in_order() -> None:
    assert FRAUD.names == NAMES


def test_reports_come_before_transactions_of_the_same_time() -> None:
    assert [event.__name__ for event in SOURCES] == ["FraudReport", "Transaction"]
    assert [event.stream_time for event in SOURCES] == ["report_time", "event_time"]
    assert FRAUD.of is Transaction


TIMES_MS = st.integers(946_684_800_000, 4_102_444_800_000)  # 2000 … 2100
EDGES_MS = st.builds(
    lambda day, offset: day * 86_400_000 + offset,
    st.integers(10_957, 47_000),
    st.sampled_from([-1, 0, 1, 7 * 3_600_000 - 1, 7 * 3_600_000, 6 * 3_600_000]),
)


@settings(deadline=None)
@given(st.lists(TIMES_MS | EDGES_MS, min_size=1))
def test_weekend_and_night_are_those_of_the_calendar(times: list[int]) -> None:
    moments = [datetime.fromtimestamp(ms // 1000, UTC) for ms in times]
    column = np.array(times)
    assert during_weekend(column).tolist() == [float(m.weekday() >= 5) for m in moments]
    assert during_night(column).tolist() == [float(m.hour <= 6) for m in moments]


# The whole data set


@pytest.fixture(scope="module")
def frame(handbook_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The offline frame of all 1,754,155 transactions, by the command."""
    out = tmp_path_factory.mktemp("offline") / "frame.parquet"
    arguments = ["--transactions", str(handbook_dir / "transactions.parquet")]
    arguments += ["--fraud-reports", str(handbook_dir / "fraud_reports.parquet")]
    assert offline.main([*arguments, "--out", str(out)]) == 0
    return pq.read_table(out).to_pandas()


@pytest.fixture(scope="module")
def history(handbook_dir: Path) -> pd.DataFrame:
    return pq.read_table(handbook_dir / "transactions.parquet").to_pandas()


def test_every_transaction_is_in_the_frame_in_order(
    frame: pd.DataFrame, history: pd.DataFrame
) -> None:
    assert list(frame) == ["transaction_id", "card_id", "terminal_id", "event_time", *NAMES]
    assert len(frame) == 1_754_155
    for name in ("transaction_id", "card_id", "terminal_id", "event_time"):
        assert (frame[name].to_numpy() == history[name].to_numpy()).all()
    assert (frame["amount"].to_numpy() == history["amount_cents"].to_numpy() / 100).all()


def test_the_handbooks_fixture(frame: pd.DataFrame) -> None:
    moment = parse_time("2018-09-30T15:11:37")
    row = frame[(frame["card_id"] == "C0000") & (frame["event_time"] == moment)].iloc[0]
    assert row["amount"] == 27.90
    assert [row[f"card_count_{d}d"] for d in DAYS] == [9, 31, 91]
    means = [row[f"card_mean_amount_{d}d"] for d in DAYS]
    assert means == pytest.approx([61.598889, 57.982581, 61.508901], abs=5e-7)
    assert [row[f"terminal_count_{d}d"] for d in DAYS] == [0, 3, 21]
    assert [row[f"terminal_risk_{d}d"] for d in DAYS] == [0, 0, 0]
    assert (row["during_weekend"], row["during_night"]) == (1, 0)  # a Sunday afternoon


def chosen(history: pd.DataFrame, key: str, least_frauds: int) -> list[str]:
    """Return about 50 keys: the busiest, some with frauds, and any others."""
    grouped = history.groupby(key)["label"].agg(["size", "sum"])
    busy = grouped.sort_values("size").index[-5:]
    defrauded = grouped[grouped["sum"] >= least_frauds].sample(20, random_state=1).index
    others = grouped.sample(25, random_state=2).index
    return sorted({*busy, *defrauded, *others})


def rolling(rows: pd.DataFrame, column: str, days: int) -> np.ndarray:
    """Sum a column over (t − days, t], rows later in order than the current one left out."""
    series = rows.set_index(pd.to_datetime(rows["event_time"], unit="ms"))[column]
    return np.rint(series.rolling(f"{days}D").sum().to_numpy()).astype(np.int64)


def card_oracle(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    rows = rows.assign(one=1)
    out = {}
    for days in DAYS:
        count = rolling(rows, "one", days)
        out[f"card_count_{days}d"] = count
        out[f"card_mean_amount_{days}d"] = rolling(rows, "amount_cents", days) / count / 100
    return out


def terminal_oracle(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Over (t − 7 d − w, t − 7 d], as the handbook has it: a window less its last seven days."""
    rows = rows.assign(one=1)
    out = {}
    for days in DAYS:
        count = rolling(rows, "one", 7 + days) - rolling(rows, "one", 7)
        frauds = rolling(rows, "label", 7 + days) - rolling(rows, "label", 7)
        out[f"terminal_count_{days}d"] = count
        out[f"terminal_risk_{days}d"] = np.divide(
            frauds, count, out=np.zeros(len(rows)), where=count > 0
        )
    return out


@pytest.mark.parametrize(
    ("key", "oracle", "least_frauds"),
    [("card_id", card_oracle, 10), ("terminal_id", terminal_oracle, 30)],
)
def test_windows_are_the_handbooks(
    frame: pd.DataFrame,
    history: pd.DataFrame,
    key: str,
    oracle: Callable[[pd.DataFrame], dict[str, np.ndarray]],
    least_frauds: int,
) -> None:
    """Counts and risks exactly, means to 1e-9, over the whole life of some cards and terminals."""
    keys = chosen(history, key, least_frauds)
    assert len(keys) >= 45
    compared = 0
    for _, rows in history[history[key].isin(keys)].groupby(key):
        found = frame.loc[rows.index]
        for name, expected in oracle(rows).items():
            if "mean" in name:
                np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=0, err_msg=name)
            else:
                np.testing.assert_array_equal(found[name], expected, err_msg=name)
        compared += len(rows)
    assert compared > 5_000
    if key == "terminal_id":
        assert (frame.loc[history[key].isin(keys), "terminal_risk_7d"] > 0).sum() > 100


# The documentation


def block(name: str) -> str:
    """Return what README.md has between `<!-- name -->` and `<!-- /name -->`."""
    readme = ROOT / "README.md"
    if not readme.exists() or f"<!-- {name} -->" not in readme.read_text():
        pytest.skip(f"README.md has no <!-- {name} --> block yet")
    return readme.read_text().split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


def test_the_readme_lists_the_features() -> None:
    assert block("features") == FRAUD.table(), "paste FRAUD.table() of features/fraud.py"


def test_the_readme_lists_the_settings() -> None:
    assert block("settings") == flow_settings.table(), "paste `python -m dataflows.settings`"
