"""Generate the public fraud data set: a simulated stream of card transactions.

The simulator is the one of "Reproducible Machine Learning for Credit Card Fraud Detection –
Practical Handbook" (Le Borgne, Siblini, Lebichot, Bontempi), written from its description.
5,000 customers, 10,000 terminals, 183 days from 2018-04-01, three fraud scenarios. Two things
are this project's own: the order of transactions within one second (customer, then the order
of generation; the ids follow it), and the time at which each fraud is reported.

Simulated cards are far easier than real ones: on real data the same book reports an average
precision of .08 to .10.

    python -m model.handbook --out DIR [--days N] [--seed-reports N] [--quiet]
"""

import argparse
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CUSTOMERS = 5_000
TERMINALS = 10_000
DAYS = 183
START_MS = 1_522_540_800_000  # 2018-04-01T00:00:00Z
DAY_S = 86_400

REACH = 5.0  # a customer uses the terminals strictly nearer than this, on a 100 x 100 grid
TIME_MEAN_S, TIME_STD_S = 43_200, 20_000

FRAUD_DAYS = 182  # scenarios start on days 0…181: never on the last one
LARGE_CENTS = 22_000
TERMINALS_PER_DAY, TERMINAL_FRAUD_DAYS = 2, 28
CUSTOMERS_PER_DAY, CUSTOMER_FRAUD_DAYS = 3, 14
CUSTOMER_FRAUD_FACTOR = 5

HOUR_MS = 3_600_000
REPORT_DELAY_MS = (HOUR_MS, 7 * 24 * HOUR_MS)  # [one hour, seven days)
REPORT_SEED = 2018

LABEL_COLUMNS = ("label", "scenario")
"""Columns of `Tables.transactions` that only the simulator knows: never send them on a stream."""

ROWS_PER_GROUP = 131_072

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tables:
    """Hold one generated data set; each field is a table and names its parquet file.

    `transactions`, by (event second, customer, order of generation):
        transaction_id string, "tx0000001" upwards in that order; card_id string, "C0000"…"C4999";
        terminal_id string, "T0000"…"T9999"; event_time int64, ms since the epoch, UTC;
        amount_cents int64; label int8, 1 = fraud; scenario int8, 0 = legitimate, else 1…3.
    `fraud_reports`, by (report_time, transaction), one row per fraud:
        transaction_id, terminal_id string; event_time int64 ms, the transaction's;
        report_time int64 ms, in [event_time + 1 h, event_time + 7 d).
    `customers`: card_id string; x, y, mean_amount, std_amount (major units),
        mean_transactions_per_day float64.
    `terminals`: terminal_id string; x, y float64.
    """

    customers: pa.Table
    terminals: pa.Table
    fraud_reports: pa.Table
    transactions: pa.Table  # last, so that it is written last: where it is, the others are


@dataclass(frozen=True)
class _Rows:
    """Hold transactions as parallel arrays, in stream order; `second` counts from day 0."""

    customer: Ints
    terminal: Ints
    second: Ints
    cents: Ints

    @property
    def day(self) -> Ints:
        return self.second // DAY_S


def simulate(
    days: int = DAYS,
    *,
    report_seed: int = REPORT_SEED,
    progress: Callable[[int, int], object] | None = None,
) -> Tables:
    """Generate the first `days` days of the data set.

    The result depends on the arguments alone. Shorter sets are prefixes: `simulate(n)` equals the
    first n days of `simulate()`, ids, amounts, labels and reports included. (A fraud of scenario 3
    is picked among the transactions of 14 days, so 13 further days are drawn and cut off.)

    Args:
        days: 1 to 183.
        report_seed: seed of the report times, 0 to 2**32 - 1; nothing else depends on it.
        progress: called with (customers done, customers in all) after each customer.

    Raises:
        ValueError: `days` or `report_seed` is out of range.

    All 183 days are 1,754,155 transactions with 14,681 frauds.
    """
    if not 1 <= days <= DAYS:
        raise ValueError(f"days is {days}, but the simulation has {DAYS}: choose 1 to {DAYS}")
    if not 0 <= report_seed < 2**32:
        raise ValueError(f"report_seed is {report_seed}: choose 0 to {2**32 - 1}")
    # Per entity one row of uniform draws, in the order of the columns.
    x, y, mean_amount, per_day = _uniform_columns(
        0, CUSTOMERS, [(0, 100), (0, 100), (5, 100), (0, 4)]
    )
    terminal_x, terminal_y = _uniform_columns(1, TERMINALS, [(0, 100), (0, 100)])

    drawn_days = min(days + CUSTOMER_FRAUD_DAYS - 1, DAYS)
    drawn: list[_Rows] = []
    for customer in range(CUSTOMERS):
        dx, dy = terminal_x - x[customer], terminal_y - y[customer]
        reach = np.flatnonzero(dx * dx + dy * dy < REACH * REACH).tolist()
        drawn.append(
            _draw_customer(
                customer, float(mean_amount[customer]), float(per_day[customer]), reach, drawn_days
            )
        )
        if progress is not None:
            progress(customer + 1, CUSTOMERS)
    rows = _in_stream_order(drawn)
    cents, scenario = _commit_frauds(rows, min(days, FRAUD_DAYS))

    kept = int(np.searchsorted(rows.second, days * DAY_S))
    transaction_id = _ids("tx", 7, np.arange(1, kept + 1))
    card_ids = _ids("C", 4, np.arange(CUSTOMERS))
    terminal_ids = _ids("T", 4, np.arange(TERMINALS))
    transactions = pa.table(
        {
            "transaction_id": transaction_id,
            "card_id": card_ids.take(rows.customer[:kept]),
            "terminal_id": terminal_ids.take(rows.terminal[:kept]),
            "event_time": START_MS + 1_000 * rows.second[:kept],
            "amount_cents": cents[:kept],
            "label": (scenario[:kept] > 0).astype(np.int8),
            "scenario": scenario[:kept],
        }
    )
    customers = {"x": x, "y": y, "mean_amount": mean_amount, "std_amount": mean_amount / 2}
    return Tables(
        customers=pa.table(
            {"card_id": card_ids, **customers, "mean_transactions_per_day": per_day}
        ),
        terminals=pa.table({"terminal_id": terminal_ids, "x": terminal_x, "y": terminal_y}),
        fraud_reports=_report_frauds(transactions, report_seed),
        transactions=transactions,
    )


def write(tables: Tables, directory: Path) -> None:
    """Write each table to `directory` as `<field>.parquet`, creating the directory.

    Readers see a file whole or not at all: all are written under a temporary name and renamed
    when the last is complete, `transactions.parquet` last. A failure leaves the old files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".handbook-", dir=directory) as staging:
        names = [f"{field.name}.parquet" for field in fields(tables)]
        for field, name in zip(fields(tables), names, strict=True):
            pq.write_table(
                getattr(tables, field.name),
                Path(staging, name),
                row_group_size=ROWS_PER_GROUP,
                compression="zstd",
                use_dictionary=["card_id", "terminal_id"],
            )
        for name in names:
            os.replace(Path(staging, name), directory / name)


def _uniform_columns(seed: int, n: int, bounds: Sequence[tuple[float, float]]) -> list[Floats]:
    """Draw `n` rows of one uniform number per (low, high), row by row; return the columns."""
    draws = np.random.RandomState(seed).random_sample((n, len(bounds)))
    return [low + (high - low) * draws[:, i] for i, (low, high) in enumerate(bounds)]


def _draw_customer(
    customer: int, mean_amount: float, per_day: float, reach: list[int], days: int
) -> _Rows:
    """Draw one customer's transactions in order of generation, over `days` days.

    The sequence of draws defines the data set, so they are made one by one: how many each day
    takes depends on what was drawn. Terminals come from a generator of their own and follow after.
    """
    state = np.random.RandomState(customer)
    # normal(mean, std) is mean + std * standard_normal(), from the same draws in a third of the
    # time, because its arguments need not be validated; uniform(0, high) is high * random_sample().
    poisson, gauss, uniform = state.poisson, state.standard_normal, state.random_sample
    std_amount = mean_amount / 2
    seconds: list[int] = []
    amounts: list[float] = []
    for day in range(days):
        for _ in range(poisson(per_day)):
            second = int(TIME_MEAN_S + TIME_STD_S * gauss())
            if 0 < second < DAY_S:
                amount = mean_amount + std_amount * gauss()
                if amount < 0:
                    amount = 2 * mean_amount * uniform()
                seconds.append(second + DAY_S * day)
                amounts.append(amount)
    choose = random.Random(customer).choice
    n = len(seconds)
    return _Rows(
        customer=np.full(n, customer, np.int64),
        terminal=np.fromiter((choose(reach) for _ in range(n)), np.int64, n),
        second=np.array(seconds, np.int64),
        # As numpy.round(amount, 2) does it: scale, then round half to even.
        cents=np.rint(np.array(amounts, np.float64) * 100).astype(np.int64),
    )


def _in_stream_order(drawn: Sequence[_Rows]) -> _Rows:
    """Join the customers' rows, sorted by second; ties stay in (customer, generation) order."""
    order = np.argsort(np.concatenate([rows.second for rows in drawn]), kind="stable")
    return _Rows(
        **{
            field.name: np.concatenate([getattr(rows, field.name) for rows in drawn])[order]
            for field in fields(_Rows)
        }
    )


def _commit_frauds(rows: _Rows, days: int) -> tuple[Ints, NDArray[np.int8]]:
    """Let frauds begin on days 0…days-1; return every row's final cents and scenario (0…3).

    1. Amounts above 220.
    2. Each day two terminals are compromised for 28 days: all their transactions.
    3. Each day three customers' cards leak for 14 days: a third of their transactions, with the
       amount multiplied by five. A transaction may be hit again, and is multiplied again.

    A later scenario overwrites the number of an earlier one.
    """
    cents, day = rows.cents.copy(), rows.day
    scenario = np.where(cents > LARGE_CENTS, 1, 0).astype(np.int8)

    of_terminal = _rows_of(rows.terminal, TERMINALS)
    for start in range(days):
        state = np.random.RandomState(start)
        for terminal in state.choice(TERMINALS, TERMINALS_PER_DAY, replace=False):
            at = of_terminal[terminal]
            scenario[at[(day[at] >= start) & (day[at] < start + TERMINAL_FRAUD_DAYS)]] = 2

    of_customer = _rows_of(rows.customer, CUSTOMERS)
    for start in range(days):
        state = np.random.RandomState(start)
        leaked = state.choice(CUSTOMERS, CUSTOMERS_PER_DAY, replace=False)
        at = np.sort(np.concatenate([of_customer[customer] for customer in leaked]))
        at = at[(day[at] >= start) & (day[at] < start + CUSTOMER_FRAUD_DAYS)]
        hit = random.Random(start).sample(at.tolist(), len(at) // 3)
        cents[hit] *= CUSTOMER_FRAUD_FACTOR
        scenario[hit] = 3
    return cents, scenario


def _rows_of(key: Ints, n: int) -> list[NDArray[np.intp]]:
    """Return, for each key 0…n-1, the ascending indices of its rows; O(rows · log rows)."""
    order = np.argsort(key, kind="stable")
    return np.split(order, np.searchsorted(key[order], np.arange(1, n)))


def _report_frauds(transactions: pa.Table, seed: int) -> pa.Table:
    """Report each fraud once, at a time drawn uniformly from REPORT_DELAY_MS after it."""
    label = transactions["label"].to_numpy()
    frauds = transactions.select(["transaction_id", "terminal_id", "event_time"]).filter(label == 1)
    event_time = frauds["event_time"].to_numpy()
    # RandomState, because its streams are frozen; those of numpy's Generator are not (NEP 19).
    delay = np.random.RandomState(seed).randint(*REPORT_DELAY_MS, size=len(frauds), dtype=np.int64)
    report_time = event_time + delay
    order = np.argsort(report_time, kind="stable")
    return frauds.append_column("report_time", pa.array(report_time)).take(order).combine_chunks()


def _ids(prefix: str, width: int, numbers: Ints) -> pa.Array:
    """Format `numbers` as `prefix` and `width` digits, zero-padded, so that they sort as text.

    >>> _ids("T", 4, np.array([0, 42, 9999])).to_pylist()
    ['T0000', 'T0042', 'T9999']
    """
    head = np.frombuffer(prefix.encode(), np.uint8)
    size = len(head) + width
    text = np.empty((len(numbers), size), np.uint8)
    text[:, : len(head)] = head
    for place in range(width):
        text[:, size - 1 - place] = numbers // 10**place % 10 + ord("0")
    offsets = np.arange(len(numbers) + 1, dtype=np.int32) * size
    return pa.StringArray.from_buffers(len(numbers), pa.py_buffer(offsets), pa.py_buffer(text))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m model.handbook",
        description="Generate the handbook's simulated card transactions as parquet files.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument(
        "--days", type=int, default=DAYS, metavar="N", help=f"first N days, 1…{DAYS} (%(default)s)"
    )
    parser.add_argument(
        "--seed-reports",
        type=int,
        default=REPORT_SEED,
        metavar="N",
        help="seed of the report times (%(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    arguments = parser.parse_args(argv)

    console = Console(stderr=True, quiet=arguments.quiet)
    show = console.is_terminal and not arguments.quiet
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} customers"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not show) as bar:
        task = bar.add_task("simulating", total=CUSTOMERS)
        try:
            tables = simulate(
                arguments.days,
                report_seed=arguments.seed_reports,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except ValueError as error:
            bar.stop()
            parser.error(str(error))
        bar.update(task, description="writing")
        write(tables, arguments.out)
    if show:
        console.print(
            f"{len(tables.transactions):,} transactions and {len(tables.fraud_reports):,} fraud "
            f"reports in {arguments.out}"
        )


if __name__ == "__main__":
    main()
