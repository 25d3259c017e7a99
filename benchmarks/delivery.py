"""What exactly-once costs: throughput, latency and the start after a crash, on real Kafka.

    make bench-delivery

The real flow (the demo's model and profiles; cards and terminals uniform), a broker of its own
(`tests.kafka.cluster`), a load generator and a reader of committed records, all on this machine.
The broker is warm: a run of each guarantee, for as long as a latency run, goes before and does not
count. (A new JVM compiles its code on one of two cores for about a minute; p99 is then seconds.)

* Throughput: how fast a backlog is scored, both guarantees in turn; the steady part, from the
  first tenth of the predictions to the last, as the reader receives them.
* Latency: from an event's intended time of sending to the reader's receiving its prediction, both
  guarantees in turn. Percentiles are of all runs; what exactly-once adds is the median over the
  pairs.
* Tail scan: the flow is killed when it has published an epoch's worth of predictions, and started
  again; the time is that of the slowest partition, from the log.

Writes benchmarks/results/delivery.md. Budgets are asserted here, not in tests; a miss ends the
command with 1.
"""

from __future__ import annotations

import argparse
import re
import signal
import statistics
import sys

from hdrh.histogram import HdrHistogram
from rich.console import Console

from benchmarks.flow import MOST_UNITS, UNITS_PER_MS, drain, steady
from benchmarks.harness import RESULTS, Bench, await_that, bench, machine, reader, receive

MODES = ("at_least_once", "exactly_once")


def tail_scan(on: Bench, count: int) -> tuple[int, float]:
    """Return how many records were read, and the seconds that took."""
    run = on.run("exactly_once")
    run.load(count).wait()
    run.start(snapshot_s=3600)
    with reader(run) as consumer:
        for _ in receive(consumer, count, 300):
            pass
    run.stop(signal.SIGKILL)
    before = len(run.text())
    run.start(snapshot_s=3600)
    pattern = re.compile(r"predictions_\d+/\d+: (\d+) records published .* read in ([\d.]+) s")
    found: list[tuple[str, str]] = []

    def complete() -> bool:
        found[:] = pattern.findall(run.text(before))
        return sum(int(records) for records, _ in found) >= count

    await_that(complete)
    run.stop(signal.SIGKILL)  # a drain would wait for the epoch's end
    return sum(int(records) for records, _ in found), max(float(s) for _, s in found)


def main() -> int:
    """Run the command line; return 1 if a budget is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.delivery", description=__doc__)
    parser.add_argument("--backlog", type=int, default=400_000, help="events of a throughput run")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each guarantee")
    parser.add_argument("--rate", type=float, default=10_000, help="events/s of the latency runs")
    parser.add_argument("--seconds", type=float, default=30, help="length of the latency runs")
    parser.add_argument("--tail", type=int, default=200_000, help="records of the tail scan")
    options = parser.parse_args()
    console = Console(stderr=True)
    with bench(console) as ready:
        report, missed = measure(ready, options, console)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "delivery.md").write_text(report)
    print(report)
    for each in missed:
        print(f"over budget: {each}", file=sys.stderr)
    return 1 if missed else 0


def measure(on: Bench, options: argparse.Namespace, console: Console) -> tuple[str, list[str]]:
    """Take all measurements; return the report and the budgets missed."""
    for mode in MODES:
        steady(on, mode, options.rate, options.seconds)
    console.print("the broker is warm")
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(options.pairs):
        for mode in MODES:
            rates[mode].append(drain(on, mode, options.backlog).rate)
            console.print(f"{mode}: {rates[mode][-1]:,.0f} events/s")
    # In pairs, one after the other: what else the machine does changes slowly.
    ratio = statistics.median(
        once / least
        for least, once in zip(rates["at_least_once"], rates["exactly_once"], strict=True)
    )
    p99s: dict[str, list[float]] = {mode: [] for mode in MODES}
    histograms = {mode: HdrHistogram(1, MOST_UNITS, 3) for mode in MODES}
    for _ in range(options.pairs):
        for mode in MODES:
            histogram = steady(on, mode, options.rate, options.seconds).histogram
            histograms[mode].add(histogram)
            p99s[mode].append(histogram.get_value_at_percentile(99) / UNITS_PER_MS)
            console.print(f"{mode}: p99 {p99s[mode][-1]:.1f} ms")
    more_ms = statistics.median(
        once - least for least, once in zip(*(p99s[mode] for mode in MODES), strict=True)
    )
    records, scan_s = tail_scan(on, options.tail)
    rows = []
    for mode in MODES:
        percentiles = [
            histograms[mode].get_value_at_percentile(p) / UNITS_PER_MS for p in (50, 95, 99, 99.9)
        ]
        cells = [f"{value:,.1f}" for value in percentiles]
        runs = " / ".join(f"{rate:,.0f}" for rate in rates[mode])
        tails = " / ".join(f"{each:,.1f}" for each in p99s[mode])
        rows.append(f"| {mode} | {runs} | " + " | ".join(cells) + f" | {tails} |")
    budgets = [
        ("throughput, exactly-once over at-least-once", f"{ratio:.2f}", "≥ 0.75", ratio >= 0.75),
        (
            f"p99 at {options.rate:,.0f} events/s, exactly-once over at-least-once",
            f"{more_ms:+.0f} ms",
            "≤ +150 ms",
            more_ms <= 150,
        ),
        (f"tail scan of {records:,} records", f"{scan_s:.1f} s", "< 5 s", scan_s < 5),
    ]
    lines = [
        "# What exactly-once costs",
        "",
        f"`python -m benchmarks.delivery {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        machine(),
        "",
        f"Backlog of {options.backlog:,} events; latency at {options.rate:,.0f} events/s over "
        f"{options.seconds:g} s, from the intended sending to a reader of committed records, in "
        "ms. The broker was warm.",
        "",
        "| guarantee | events/s, each run | p50 | p95 | p99 | p99.9 | p99, each run |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "| budget | measured | wanted | |",
        "|---|---|---|---|",
        *(
            f"| {what} | {value} | {wanted} | {'met' if met else '**missed**'} |"
            for what, value, wanted, met in budgets
        ),
    ]
    missed = [
        f"{what}: {value}, wanted {wanted}" for what, value, wanted, met in budgets if not met
    ]
    return "\n".join(lines) + "\n", missed


if __name__ == "__main__":
    sys.exit(main())
