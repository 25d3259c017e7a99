"""Profiles against a naive oracle: what was known at each midnight, and the join as of an event."""

import random
from dataclasses import dataclass
from fractions import Fraction
from math import isnan, nan, sqrt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import profiles
from features.profiles import CUSTOMER_PROFILE, DAY_MS, PROFILES, TERMINAL_PROFILE, ProfileView

FIRST = profiles.parse_day("2018-04-01")
DAYS = 20
CREATED = profiles.parse_day("2019-01-01")


@dataclass
class History:
    """A small history in memory; `write` puts it into files as the handbook command does."""

    transactions: list[tuple[str, str, str, int, int]]  # id, card, terminal, event time, cents
    reports: list[tuple[str, str, int, int]]  # id, terminal, event time, report time
    cards: list[str]
    terminals: list[str]

    def write(self, folder: Path) -> dict[str, Path]:
        folder.mkdir(exist_ok=True)
        frames = {
            "transactions": _frame(
                self.transactions,
                ["transaction_id", "card_id", "terminal_id", "event_time", "amount_cents"],
            ),
            "fraud_reports": _frame(
                self.reports, ["transaction_id", "terminal_id", "event_time", "report_time"]
            ),
            "customers": pa.table(
                {
                    "card_id": self.cards,
                    "x": [float(n) for n in range(len(self.cards))],
                    "y": [n / 3 for n in range(len(self.cards))],
                }
            ),
            "terminals": pa.table(
                {
                    "terminal_id": self.terminals,
                    "x": [n / 7 for n in range(len(self.terminals))],
                    "y": [float(-n) for n in range(len(self.terminals))],
                }
            ),
        }
        for name, frame in frames.items():
            pq.write_table(frame, folder / f"{name}.parquet")
        return {name: folder / f"{name}.parquet" for name in frames}

    def before(self, moment: int) -> "History":
        """What a nightly run at `moment` can have seen."""
        return History(
            [row for row in self.transactions if row[3] < moment],
            [row for row in self.reports if row[3] < moment],
            self.cards,
            self.terminals,
        )


def _frame(rows: list[tuple], names: list[str]) -> pa.Table:
    types = {"event_time": pa.int64(), "report_time": pa.int64(), "amount_cents": pa.int64()}
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return pa.table(
        {
            name: pa.array(column, types.get(name, pa.string()))
            for name, column in zip(names, columns, strict=True)
        }
    )


def random_history(seed: int, transactions: int = 600) -> History:
    """A history with the awkward cases: exact midnights, odd reports, entities without events."""
    rng = random.Random(seed)
    cards, terminals = [f"C{n:04d}" for n in range(12)], [f"T{n:04d}" for n in range(9)]
    rows, reports = [], []
    for n in range(transactions):
        moment = FIRST + rng.randrange(DAYS * DAY_MS)
        if rng.random() < 0.2:  # at, just before, just after a midnight
            moment = max(FIRST, profiles.midnight_of(moment) + rng.choice([-1, 0, 1]))
        card, terminal = rng.choice(cards[:-2]), rng.choice(terminals[:-2])
        rows.append((f"tx{n:07d}", card, terminal, moment, rng.randrange(30_000)))
        if rng.random() < 0.3:
            reported = moment + rng.choice([3_600_000, 7 * DAY_MS - 1, rng.randrange(9 * DAY_MS)])
            if rng.random() < 0.3:
                reported = profiles.midnight_of(reported) + rng.choice([-1, 0, 1])
            reports.append((f"tx{n:07d}", terminal, moment, reported))
            if rng.random() < 0.2:
                reports.append((f"tx{n:07d}", terminal, moment, reported + DAY_MS))  # once more
    reports.append(("tx9999999", terminals[0], FIRST, FIRST + 1))  # names no transaction
    rows.append(("tx9000000", "C9999", "T9999", FIRST + 5, 100))  # entities nobody listed
    return History(sorted(rows, key=lambda row: row[3]), reports, cards, terminals)


def naive_row(history: History, view: ProfileView, entity: int, midnight: int) -> tuple:
    """The definition in the module's docstring, taken literally."""
    if view is CUSTOMER_PROFILE:
        key = history.cards[entity]
        seen = [row for row in history.transactions if row[1] == key and row[3] < midnight]
        if not seen:
            return (key, float(entity), entity / 3, nan, nan, nan)
        amounts = [Fraction(row[4], 100) for row in seen]
        mean = sum(amounts) / len(amounts)
        spread = sqrt(sum((amount - mean) ** 2 for amount in amounts) / len(amounts))
        age = (midnight - min(row[3] for row in seen)) / DAY_MS
        return (key, float(entity), entity / 3, age, float(mean), spread)
    key = history.terminals[entity]
    judged = {
        row[0]
        for row in history.transactions
        if row[2] == key and row[3] < midnight - profiles.REPORT_DELAY_MS
    }
    frauds = {row[0] for row in history.reports if row[0] in judged and row[3] < midnight}
    share = len(frauds) / len(judged) if judged else nan
    return (key, entity / 7, float(-entity), share)


def build(history: History, folder: Path, **options) -> Path:
    out = folder / "profiles"
    profiles.build(**history.write(folder), out=out, created_ms=CREATED, **options)
    return out


def read_day(out: Path, view: ProfileView, midnight: int) -> list[tuple]:
    table = pq.read_table(profiles.day_file(out, view, midnight))
    columns = [table[view.key].to_pylist(), *(table[name].to_numpy() for name in view.fields)]
    return list(zip(*columns, strict=True))


def same(left: tuple, right: tuple) -> bool:
    return left[0] == right[0] and all(
        (isnan(a) and isnan(b)) or a == pytest.approx(b, rel=1e-13, abs=1e-13)
        for a, b in zip(left[1:], right[1:], strict=True)
    )


# --- build ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_build_equals_the_definition(seed, tmp_path):
    history = random_history(seed)
    out = build(history, tmp_path)
    for view, entities in ((CUSTOMER_PROFILE, 12), (TERMINAL_PROFILE, 9)):
        assert len(list((out / view.name).iterdir())) == DAYS
        for midnight in range(FIRST, FIRST + DAYS * DAY_MS, DAY_MS):
            rows = read_day(out, view, midnight)
            assert len(rows) == entities
            for entity, row in enumerate(rows):
                expected = naive_row(history, view, entity, midnight)
                assert same(row, expected), (profiles.day_name(midnight), row, expected)


@pytest.mark.parametrize("day", [1, 8, 13, 19])
def test_rows_do_not_depend_on_what_came_after_their_midnight(day, tmp_path):
    history, midnight = random_history(7), FIRST + day * DAY_MS
    whole = build(history, tmp_path / "whole")
    known = build(history.before(midnight), tmp_path / "known", until_ms=midnight)
    for view in PROFILES:
        # repr: NaN equals itself, and every bit of a float counts
        assert repr(read_day(whole, view, midnight)) == repr(read_day(known, view, midnight))


def test_a_range_of_days_is_the_same_rows_and_leaves_the_others_alone(tmp_path):
    history = random_history(8)
    out = build(history, tmp_path)
    files = {file: file.read_bytes() for file in out.rglob("*.parquet")}
    first, last = FIRST + 4 * DAY_MS, FIRST + 6 * DAY_MS
    rebuilt = {
        profiles.day_file(out, view, midnight)
        for view in PROFILES
        for midnight in (first, first + DAY_MS, last)
    }
    for file in rebuilt:
        file.unlink()
    (out / TERMINAL_PROFILE.name / "2018-04-02.parquet").write_bytes(b"not to be touched")
    build(history, tmp_path, from_ms=first, until_ms=last)
    for file, content in files.items():
        if file in rebuilt:
            assert file.read_bytes() == content
    assert (out / TERMINAL_PROFILE.name / "2018-04-02.parquet").read_bytes().startswith(b"not")
    assert {file for file in out.rglob("*") if file.is_file()} == set(files)  # nothing left over


def test_spread_is_exact_however_large_and_equal_the_amounts_are():
    """The textbook formula, mean of squares less square of mean, gives noise for all of these."""
    amounts = {
        0: [2_000_000_001, 2_000_000_002, 2_000_000_003],
        1: [999_999_937] * 5,
        2: [0, 0, 1],
        3: [262_800],
    }
    card = np.array([card for card, cents in amounts.items() for _ in cents])
    cents = np.array([amount for cents in amounts.values() for amount in cents])
    columns = profiles.amount_profile(
        card, np.full(len(card), FIRST), cents, len(amounts), np.array([FIRST + DAY_MS])
    )
    for entity, values in amounts.items():
        mean = Fraction(sum(values), len(values))
        variance = sum((value - mean) ** 2 for value in values) / len(values) / 10_000
        assert columns["mean_amount"][0, entity] == float(mean / 100)
        assert columns["std_amount"][0, entity] == pytest.approx(sqrt(variance), rel=1e-15)
    assert columns["std_amount"][0, [1, 3]].tolist() == [0.0, 0.0]


def test_a_report_that_names_no_transaction_is_nobodys_fraud(tmp_path):
    history = History(
        [("tx1", "C1", "T1", FIRST, 100), ("tx2", "C1", "T2", FIRST + 1, 100)],
        [("tx0", "T2", FIRST, FIRST + 2), ("tx1", "T1", FIRST, FIRST + 3)],
        ["C1"],
        ["T1", "T2"],
    )
    midnight = FIRST + 8 * DAY_MS
    out = build(history, tmp_path, until_ms=midnight)
    assert [row[3] for row in read_day(out, TERMINAL_PROFILE, midnight)] == [1.0, 0.0]


def test_files_hold_microseconds_and_nulls(tmp_path):
    """Nanoseconds break Feast 0.67 on DuckDB 2; null is what SQL and Feast call unknown."""
    out = build(random_history(9), tmp_path)
    table = pq.read_table(profiles.day_file(out, CUSTOMER_PROFILE, FIRST))
    for name in ("event_timestamp", "created"):
        assert table.schema.field(name).type == pa.timestamp("us", tz="UTC")
    assert table["event_timestamp"].cast(pa.int64()).to_pylist() == [FIRST * 1000] * 12
    assert table["as_of"].to_pylist() == [FIRST] * 12
    assert table["mean_amount"].null_count == 12  # the first midnight knows nobody's amounts
    assert table["x_home"].null_count == 0


# --- point_in_time --------------------------------------------------------------------------------


def naive_join(
    history: History, view: ProfileView, keys: list[str], key: bytes, moment: int
) -> tuple[list[float], float]:
    """Walk back from the event to the newest midnight that was built and is within the TTL."""
    last = FIRST + (DAYS - 1) * DAY_MS
    midnight = min(profiles.midnight_of(moment), last)
    if key.decode() not in keys or midnight < FIRST or moment - midnight > view.ttl_ms:
        return [nan] * len(view.fields), nan
    row = naive_row(history, view, keys.index(key.decode()), midnight)
    return list(row[1:]), float(moment - midnight)


@pytest.mark.parametrize("view", PROFILES, ids=lambda view: view.name)
def test_point_in_time_equals_the_definition(view, tmp_path):
    history, rng = random_history(3), random.Random(3)
    out = build(history, tmp_path)
    known = history.cards if view is CUSTOMER_PROFILE else history.terminals
    last = FIRST + (DAYS - 1) * DAY_MS
    moments = [
        FIRST - 1,
        FIRST,
        FIRST + 1,
        FIRST + DAY_MS - 1,
        last + view.ttl_ms - 1,
        last + view.ttl_ms,
        last + view.ttl_ms + 1,
        *(FIRST + rng.randrange(-DAY_MS, (DAYS + 4) * DAY_MS) for _ in range(400)),
    ]
    keys = [rng.choice([*known, "nobody", ""]).encode() for _ in moments]
    values, age = profiles.point_in_time(view, np.array(keys), np.array(moments), out)
    assert values.dtype == age.dtype == np.float64
    for row, (key, moment) in enumerate(zip(keys, moments, strict=True)):
        expected, expected_age = naive_join(history, view, known, key, moment)
        assert same((key, *values[row], age[row]), (key, *expected, expected_age)), (key, moment)

    order = rng.sample(range(len(keys)), len(keys))  # any order, in chunks: the same bits
    for chunk in np.array_split(np.array(order), 5):
        part, part_age = profiles.point_in_time(
            view, np.array(keys)[chunk], np.array(moments)[chunk], out
        )
        np.testing.assert_array_equal(part, values[chunk])
        np.testing.assert_array_equal(part_age, age[chunk])


def write_rows(folder: Path, *rows: tuple[str, int, int, float]) -> Path:
    """Write rows (key, as_of, created, fraud_share) in this order, as one file per as_of."""
    (folder / TERMINAL_PROFILE.name).mkdir(exist_ok=True)
    for as_of in {row[1] for row in rows}:
        tables = []
        for key, _, created, share in (row for row in rows if row[1] == as_of):
            fields = dict.fromkeys(TERMINAL_PROFILE.fields, np.array([share]))
            tables.append(profiles.profile_rows(TERMINAL_PROFILE, [key], fields, as_of, created))
        pq.write_table(pa.concat_tables(tables), profiles.day_file(folder, TERMINAL_PROFILE, as_of))
    return folder


def test_the_latest_created_row_wins(tmp_path):
    write_rows(tmp_path, ("T1", FIRST, 5, 0.5), ("T1", FIRST, 9, 0.9), ("T1", FIRST, 2, 0.2))
    moment = np.array([FIRST + DAY_MS])
    values, _ = profiles.point_in_time(TERMINAL_PROFILE, np.array([b"T1"]), moment, tmp_path)
    assert values[0].tolist() == [0.9, 0.9, 0.9]


def test_a_key_is_never_answered_with_another_keys_row(tmp_path):
    second, third = FIRST + DAY_MS, FIRST + 2 * DAY_MS
    write_rows(tmp_path, ("T1", FIRST, 1, 0.1), ("T2", third, 1, 0.2), ("T3", second, 1, 0.3))
    keys = np.array([b"T1", b"T2", b"T3", b"T0", b"T4", b"T2"])
    moments = np.array([second, second, second, second, second, third])
    values, _ = profiles.point_in_time(TERMINAL_PROFILE, keys, moments, tmp_path)
    np.testing.assert_array_equal(values[:, 2], [0.1, nan, 0.3, nan, nan, 0.2])


def test_keys_may_be_any_utf8(tmp_path):
    history = random_history(4)
    history.cards[0] = "Zürich-7"
    out = build(history, tmp_path)
    keys = np.array(["Zürich-7".encode(), b"\xff\xfe", b""])
    values, age = profiles.point_in_time(CUSTOMER_PROFILE, keys, np.full(3, FIRST), out)
    assert age.tolist()[0] == 0 and np.isnan(age[1:]).all()
    assert values[0, 0] == 0.0


def test_no_events_and_no_days_are_answers_too(tmp_path):
    out = build(random_history(5), tmp_path)
    none = np.array([], dtype="S5"), np.array([], dtype=np.int64)
    values, age = profiles.point_in_time(CUSTOMER_PROFILE, *none, out)
    assert values.shape == (0, 5) and age.shape == (0,)
    values, age = profiles.point_in_time(CUSTOMER_PROFILE, np.array([b"C0000"]), np.array([0]), out)
    assert np.isnan(values).all() and np.isnan(age).all()


@pytest.mark.parametrize("field", ["y", "home_y"])
def test_a_field_that_feast_would_lose_cannot_be_declared(field):
    with pytest.raises(ValueError, match="rename the field"):
        ProfileView("view", "key", ("x", field), ttl_ms=1)


def test_a_directory_without_profiles_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run python -m features\.profiles build"):
        profiles.point_in_time(CUSTOMER_PROFILE, np.array([b"a"]), np.array([0]), tmp_path)


# --- the command ----------------------------------------------------------------------------------


def test_build_command(tmp_path, capsys):
    files = random_history(6).write(tmp_path)
    arguments = ["build", "--out", str(tmp_path / "out"), "--created", str(CREATED)]
    for name, file in files.items():
        arguments += [f"--{name.replace('_', '-')}", str(file)]
    assert profiles.main([*arguments, "--from", "2018-04-03", "--until", "2018-04-05"]) == 0
    assert "2018-04-03 … 2018-04-05" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "out" / "terminal_profile").iterdir()) == [
        "2018-04-03.parquet",
        "2018-04-04.parquet",
        "2018-04-05.parquet",
    ]
    for wrong, message in (
        (["--from", "yesterday"], "not a day: 'yesterday'"),
        (["--from", "2018-04-05", "--until", "2018-04-03"], "--from 2018-04-05 is after --until"),
        (["--transactions", str(tmp_path / "absent")], "absent"),
    ):
        assert profiles.main([*arguments, *wrong]) == 1
        assert message in capsys.readouterr().err
