"""Build the nightly profiles that the stream does not compute, and join them point-in-time.

A *profile row* holds what was known about one entity at one midnight (UTC), its `as_of`:

==================== ===========================================================================
customer_profile     key `card_id`, from the card's transactions with event_time < midnight
`x_home`, `y_home`   position on the map
`account_age_days`   days from the card's first transaction *seen so far* to the midnight
`mean_amount`        mean amount (major units)
`std_amount`         population standard deviation of the amounts (major units)
terminal_profile     key `terminal_id`
`x_position`, `y_…`  position on the map
`fraud_share`        frauds ÷ transactions among those with event_time < midnight − 7 days;
                     a fraud counts only if it was reported before the midnight
==================== ===========================================================================

Nothing looks past its midnight. What is not known yet (no transaction so far) is null, read as
NaN. Positions are treated as known from the beginning.

On disk: `DIR/<view>/<YYYY-MM-DD>.parquet`, one file per view and midnight, columns: the key
(string), the fields (float64), `as_of` (int64 ms), and for Feast `event_timestamp` (the same
midnight) and `created`, both timestamp[us, UTC]: nanoseconds break Feast 0.67 on DuckDB 2.

    python -m features.profiles build --transactions F --fraud-reports F --customers F \\
        --terminals F --out DIR [--from DAY] [--until DAY]
    python -m features.profiles materialize --repo DIR --until DAY [--profiles DIR]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]

DAY_MS = 86_400_000
REPORT_DELAY_MS = 7 * DAY_MS
"""After this long a transaction without a report counts as legitimate."""

AS_OF = "as_of"
"""The column with the row's midnight, int64 ms. Feast's own event timestamp is not used to judge
age: its SQLite store keeps it in whole seconds of *local* time (0.67.0)."""


@dataclass(frozen=True)
class ProfileView:
    """Declare one Feast view: its entity key, its float64 fields in order, and its TTL.

    A row is served to an event at time t when 0 ≤ t − as_of ≤ ttl_ms (both bounds closed).
    Raises ValueError for a field Feast could not join.
    """

    name: str
    key: str
    fields: tuple[str, ...]
    ttl_ms: int

    def __post_init__(self) -> None:
        for field in self.fields:
            if field == "y" or field.endswith("_y"):
                raise ValueError(
                    f"{self.name}: rename the field {field!r}: Feast's DuckDB join drops every "
                    "column that ends in _y, view prefix included (0.67.0)"
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the fields as they appear in a training frame.

        >>> TERMINAL_PROFILE.columns[-1]
        'terminal_profile__fraud_share'
        """
        return tuple(f"{self.name}__{field}" for field in self.fields)


CUSTOMER_PROFILE = ProfileView(
    "customer_profile",
    key="card_id",
    fields=("x_home", "y_home", "account_age_days", "mean_amount", "std_amount"),
    ttl_ms=3 * DAY_MS,
)
TERMINAL_PROFILE = ProfileView(
    "terminal_profile",
    key="terminal_id",
    fields=("x_position", "y_position", "fraud_share"),
    ttl_ms=3 * DAY_MS,
)
PROFILES = (CUSTOMER_PROFILE, TERMINAL_PROFILE)


def is_served(view: ProfileView, age_ms: Float64s) -> npt.NDArray[np.bool_]:
    """Tell which ages are served: not from the event's future, not beyond the TTL, not NaN.

    >>> is_served(CUSTOMER_PROFILE, np.array([-1.0, 0.0, 3.0 * DAY_MS, 3.0 * DAY_MS + 1, np.nan]))
    array([False,  True,  True, False, False])
    """
    return (age_ms >= 0) & (age_ms <= view.ttl_ms)


# --- what a profile says --------------------------------------------------------------------------


def amount_profile(
    card: Int64s, event_time: Int64s, amount_cents: Int64s, cards: int, midnights: Int64s
) -> dict[str, Float64s]:
    """Compute account age, mean and spread of amounts for every midnight and card.

    `card` holds codes in [0, cards); `midnights` ascends. Each result has shape
    (len(midnights), cards), NaN where the card has no transaction before the midnight.
    Sums are exact integers, so equal histories give equal bits however they are cut.
    O(transactions + midnights × cards).
    """
    seen = _first_after(midnights, event_time)  # the first midnight that knows the transaction
    first = np.full((len(midnights) + 1, cards), np.iinfo(np.int64).max)
    np.minimum.at(first, (seen, card), event_time)
    first = np.minimum.accumulate(first[:-1], axis=0)
    count = _running_sum(seen, card, None, (len(midnights), cards))
    total = _running_sum(seen, card, amount_cents, count.shape)
    squares = _running_sum(seen, card, amount_cents * amount_cents, count.shape)

    known = np.maximum(count, 1)
    # Σ(x−mean)² around the whole number below the mean: integers, so nothing cancels. Should the
    # squares pass 2⁶³, they wrap, and wrap back in the difference, which is small.
    whole, rest = np.divmod(total, known)
    around_whole = squares - whole * (total + rest)
    variance = (around_whole - rest * rest / known) / known
    empty = count == 0
    age = (midnights[:, None] - np.where(empty, 0, first)) / DAY_MS
    return {
        "account_age_days": np.where(empty, np.nan, age),
        "mean_amount": np.where(empty, np.nan, total / (known * 100)),
        "std_amount": np.where(empty, np.nan, np.sqrt(variance) / 100),
    }


def fraud_share(
    terminal: Int64s,
    event_time: Int64s,
    fraud_terminal: Int64s,
    fraud_event_time: Int64s,
    fraud_report_time: Int64s,
    terminals: int,
    midnights: Int64s,
) -> Float64s:
    """Compute the long-run fraud share for every midnight and terminal.

    Transactions with event_time < midnight − 7 d; of those, the frauds with report_time < midnight.
    Shape (len(midnights), terminals), NaN where no transaction qualifies.
    """
    shape = (len(midnights), terminals)
    judged = _first_after(midnights, event_time + REPORT_DELAY_MS)
    count = _running_sum(judged, terminal, None, shape)
    known = np.maximum(
        _first_after(midnights, fraud_event_time + REPORT_DELAY_MS),
        _first_after(midnights, fraud_report_time),
    )
    frauds = _running_sum(known, fraud_terminal, None, shape)
    return np.where(count == 0, np.nan, frauds / np.maximum(count, 1))


def _first_after(midnights: Int64s, times: Int64s) -> Int64s:
    """Find per time the index of the first midnight strictly after it."""
    return np.searchsorted(midnights, times, side="right")


def _running_sum(
    row: Int64s, code: Int64s, amount: Int64s | None, shape: tuple[int, ...]
) -> Int64s:
    """Add amounts (1 each if None) into (row, code) and sum down; row shape[0] is left out."""
    grid = np.zeros((shape[0] + 1, shape[1]), dtype=np.int64)
    np.add.at(grid, (row, code), 1 if amount is None else amount)
    return np.cumsum(grid[:-1], axis=0)


# --- building -------------------------------------------------------------------------------------


def build(
    transactions: Path,
    fraud_reports: Path,
    customers: Path,
    terminals: Path,
    out: Path,
    *,
    created_ms: int,
    from_ms: int | None = None,
    until_ms: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Write both views for every midnight in [from_ms, until_ms] and return that range.

    Defaults: the midnights of the first and of the last transaction's day; later midnights could
    miss transactions of a day that is not over. Existing files of these midnights are replaced one
    by one, atomically; others are left alone. `created_ms` goes into the `created` column.
    `progress(files done, files in all)` is called after each file.
    """
    events = pq.read_table(
        transactions,
        columns=["transaction_id", "card_id", "terminal_id", "event_time", "amount_cents"],
    )
    event_time = _ints(events, "event_time")
    if not len(event_time) and (from_ms is None or until_ms is None):
        raise ValueError(f"{transactions} has no transactions: say --from and --until")
    from_ms = midnight_of(int(event_time.min())) if from_ms is None else from_ms
    until_ms = midnight_of(int(event_time.max())) if until_ms is None else until_ms
    for name, day in (("--from", from_ms), ("--until", until_ms)):
        if day % DAY_MS:
            raise ValueError(f"{name} is not a midnight UTC: {day} ms")
    if from_ms > until_ms:
        raise ValueError(f"--from {day_name(from_ms)} is after --until {day_name(until_ms)}")
    midnights = np.arange(from_ms, until_ms + 1, DAY_MS, dtype=np.int64)

    done, files = 0, 2 * len(midnights)
    for view, keys, columns in (
        _customer_columns(events, pq.read_table(customers), midnights),
        _terminal_columns(
            events, pq.read_table(fraud_reports), pq.read_table(terminals), midnights
        ),
    ):
        for row, midnight in enumerate(midnights.tolist()):
            fields = {name: values[row] for name, values in columns.items()}
            _write_day(out, profile_rows(view, keys, fields, midnight, created_ms), view, midnight)
            done += 1
            if progress is not None:
                progress(done, files)
    return from_ms, until_ms


def profile_rows(
    view: ProfileView,
    keys: pa.Array | Sequence[str],
    fields: Mapping[str, Float64s],
    as_of_ms: int,
    created_ms: int,
) -> pa.Table:
    """Lay out one midnight's rows as they are stored (see the module's docstring); NaN → null."""
    rows = len(keys)
    columns: dict[str, Any] = {view.key: pa.array(keys, type=pa.string())}
    for name in view.fields:
        columns[name] = pa.array(fields[name], type=pa.float64(), from_pandas=True)
    columns[AS_OF] = pa.array(np.full(rows, as_of_ms, dtype=np.int64))
    for name, moment in (("event_timestamp", as_of_ms), ("created", created_ms)):
        microseconds = pa.array(np.full(rows, moment * 1000, dtype=np.int64))
        columns[name] = microseconds.cast(pa.timestamp("us", tz="UTC"))
    return pa.table(columns)


def _write_day(out: Path, rows: pa.Table, view: ProfileView, midnight: int) -> None:
    target = day_file(out, view, midnight)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out / f".{view.name}-{target.name}"  # not beside it: Feast reads the whole folder
    pq.write_table(rows, unfinished)
    os.replace(unfinished, target)


_ViewColumns = tuple[ProfileView, pa.Array, dict[str, Float64s]]


def _customer_columns(events: pa.Table, customers: pa.Table, midnights: Int64s) -> _ViewColumns:
    keys = _strings(customers, "card_id")
    card = _codes(_strings(events, "card_id"), keys)
    ours = card >= 0
    columns = amount_profile(
        card[ours],
        _ints(events, "event_time")[ours],
        _ints(events, "amount_cents")[ours],
        len(keys),
        midnights,
    )
    columns["x_home"] = _every_midnight(customers, "x", midnights)
    columns["y_home"] = _every_midnight(customers, "y", midnights)
    return CUSTOMER_PROFILE, keys, columns


def _terminal_columns(
    events: pa.Table, reports: pa.Table, terminals: pa.Table, midnights: Int64s
) -> _ViewColumns:
    keys = _strings(terminals, "terminal_id")
    terminal = _codes(_strings(events, "terminal_id"), keys)
    event_time = _ints(events, "event_time")
    # A report counts once, and for the transaction it names: reports without one are left out.
    earliest = reports.sort_by("report_time")
    reported = _codes(_strings(earliest, "transaction_id"), _strings(events, "transaction_id"))
    _, once = np.unique(reported, return_index=True)  # index of the first, so the earliest report
    once = once[reported[once] >= 0]
    once = once[terminal[reported[once]] >= 0]
    fraud = reported[once]
    ours = terminal >= 0
    share = fraud_share(
        terminal[ours],
        event_time[ours],
        terminal[fraud],
        event_time[fraud],
        _ints(earliest, "report_time")[once],
        len(keys),
        midnights,
    )
    columns = {
        "x_position": _every_midnight(terminals, "x", midnights),
        "y_position": _every_midnight(terminals, "y", midnights),
        "fraud_share": share,
    }
    return TERMINAL_PROFILE, keys, columns


def _every_midnight(entities: pa.Table, column: str, midnights: Int64s) -> Float64s:
    values = entities[column].to_numpy().astype(np.float64)
    return np.broadcast_to(values, (len(midnights), len(values)))


def _strings(table: pa.Table, column: str) -> pa.Array:
    values = table[column].cast(pa.string()).combine_chunks()
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _ints(table: pa.Table, column: str) -> Int64s:
    values: Int64s = table[column].to_numpy().astype(np.int64, copy=False)
    return values


def _codes(values: pa.Array, among: pa.Array) -> Int64s:
    """Number each value by its place in `among`, −1 if it is not there."""
    codes: Int64s = pc.fill_null(pc.index_in(values, value_set=among), -1).to_numpy()
    return codes.astype(np.int64)


# --- joining --------------------------------------------------------------------------------------


def point_in_time(
    view: ProfileView, keys: npt.NDArray[np.bytes_], event_time_ms: Int64s, profiles: Path
) -> tuple[Float64s, Float64s]:
    """Look up for each event the newest row of its key with as_of ≤ event time, within the TTL.

    `keys` is a bytes array [n], `event_time_ms` int64 [n], `profiles` the directory `build` wrote.
    Returns values float64 [n, len(view.fields)] in declared order, NaN where no row is served, and
    age_ms float64 [n], NaN likewise. Of rows with one key and as_of the latest created wins. This
    is what the online store answers at that time, once it holds that midnight, bit for bit.

    Reads only the days that can matter, so call it with events in chunks of time.
    O((rows + n) log rows). Raises FileNotFoundError if `profiles` has no such view.
    """
    if not len(keys):
        return np.empty((0, len(view.fields))), np.empty(0)
    rows = _read_days(
        view, profiles, int(event_time_ms.min()) - view.ttl_ms, int(event_time_ms.max())
    )
    values = np.full((len(keys), len(view.fields)), np.nan)
    age_ms = np.full(len(keys), np.nan)
    if not len(rows):
        return values, age_ms

    entities = pc.dictionary_encode(_strings(rows, view.key))
    code = entities.indices.to_numpy().astype(np.int64)
    as_of = _ints(rows, AS_OF)
    created = rows["created"].cast(pa.int64()).to_numpy()
    order = np.lexsort((created, as_of, code))
    code, as_of = code[order], as_of[order]

    event_code = _codes(pa.array(keys, type=pa.binary()), entities.dictionary.cast(pa.binary()))
    # One ascending number for (key, time): the last row not after (key, event time) is the answer.
    start = int(as_of.min()) - 1
    span = max(int(as_of.max()), int(event_time_ms.max())) - start + 1
    asked = event_code * span + np.maximum(event_time_ms - start, 0)
    found = np.searchsorted(code * span + (as_of - start), asked, side="right") - 1
    hit = (event_code >= 0) & (found >= 0)
    hit[hit] = code[found[hit]] == event_code[hit]
    age_ms[hit] = event_time_ms[hit] - as_of[found[hit]]
    served = is_served(view, age_ms)
    age_ms[~served] = np.nan
    source = order[found[served]]
    for column, name in enumerate(view.fields):
        values[served, column] = rows[name].to_numpy()[source]  # null reads as NaN
    return values, age_ms


def _read_days(view: ProfileView, profiles: Path, first_ms: int, last_ms: int) -> pa.Table:
    """Read the rows of a view with as_of in [first_ms, last_ms]."""
    folder = profiles / view.name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no profiles of {view.name} in {profiles}: run python -m features.profiles build "
            f"--out {profiles} first"
        )
    days = [
        file
        for file in sorted(folder.glob("*.parquet"))
        if first_ms <= parse_day(file.stem) <= last_ms
    ]
    columns = [view.key, *view.fields, AS_OF, "created"]
    tables = [pq.read_table(file, columns=columns) for file in days]
    return pa.concat_tables(tables) if tables else pa.table({name: [] for name in columns})


# --- days and files -------------------------------------------------------------------------------


def midnight_of(moment_ms: int) -> int:
    """Return the midnight UTC that begins the moment's day.

    >>> day_name(midnight_of(parse_day("2018-04-01") + 1))
    '2018-04-01'
    """
    return moment_ms - moment_ms % DAY_MS


def parse_day(text: str) -> int:
    """Turn YYYY-MM-DD into its midnight, ms since the epoch.

    >>> parse_day("2018-04-01")
    1522540800000
    """
    try:
        return (date.fromisoformat(text).toordinal() - date(1970, 1, 1).toordinal()) * DAY_MS
    except ValueError:
        raise ValueError(f"not a day: {text!r}; write it as 2018-04-01") from None


def day_name(midnight_ms: int) -> str:
    """Turn a midnight into YYYY-MM-DD."""
    return datetime.fromtimestamp(midnight_ms / 1000, UTC).strftime("%Y-%m-%d")


def day_file(profiles: Path, view: ProfileView, midnight_ms: int) -> Path:
    """Name the file that holds a view's rows of one midnight."""
    return profiles / view.name / f"{day_name(midnight_ms)}.parquet"


# --- the nightly command --------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the nightly command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m features.profiles", description="Build and materialize nightly profiles."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="compute profiles from history into parquet")
    for name in ("transactions", "fraud-reports", "customers", "terminals"):
        building.add_argument(f"--{name}", type=Path, required=True, metavar="FILE")
    building.add_argument("--out", type=Path, required=True, metavar="DIR")
    building.add_argument(
        "--from", dest="from_day", metavar="DAY", help="first midnight; default: the first day"
    )
    building.add_argument(
        "--until", metavar="DAY", help="last midnight, included; default: the last day"
    )
    building.add_argument(
        "--created", metavar="MS", type=int, help="creation time of the rows, ms; default: now"
    )
    loading = commands.add_parser("materialize", help="load one midnight into the online store")
    loading.add_argument("--repo", type=Path, required=True, metavar="DIR", help="Feast repository")
    loading.add_argument("--until", required=True, metavar="DAY", help="the midnight to load")
    loading.add_argument(
        "--profiles", type=Path, metavar="DIR", help="default: data/profiles in the repository"
    )
    loading.add_argument(
        "--allow-older", action="store_true", help="replace rows newer than DAY by older ones"
    )
    options = parser.parse_args(arguments)
    try:
        for line in _build(options) if options.command == "build" else _materialize(options):
            print(line)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{parser.prog} {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _build(options: argparse.Namespace) -> Iterator[str]:
    started = time.perf_counter()
    first, last = build(
        options.transactions,
        options.fraud_reports,
        options.customers,
        options.terminals,
        options.out,
        created_ms=time.time_ns() // 1_000_000 if options.created is None else options.created,
        from_ms=parse_day(options.from_day) if options.from_day else None,
        until_ms=parse_day(options.until) if options.until else None,
    )
    took = time.perf_counter() - started
    yield f"profiles of {day_name(first)} … {day_name(last)} in {options.out} ({took:.1f} s)"


def _materialize(options: argparse.Namespace) -> Iterator[str]:
    from features.online_store import materialize  # Feast costs seconds to import

    started = time.perf_counter()
    rows = materialize(
        options.repo, parse_day(options.until), options.profiles, allow_older=options.allow_older
    )
    took = time.perf_counter() - started
    for name, count in rows.items():
        yield f"{name}: {count} rows as of {options.until} ({took:.1f} s in all)"


if __name__ == "__main__":
    sys.exit(main())
