"""Measure the whole flow on Apache Kafka, and hold it against its budgets.

    make bench          python -m benchmarks [--only latency,stages] [--quick]

Writes benchmarks/results/flow.md and its plots, after each part; a part that is not run stays as it
was (flow.json holds them), and each says of which revision it is. Ends with 1 if a budget is
missed. What exactly-once costs and the peers have commands of their own (``make bench-delivery``,
``make bench-peers``).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import psutil
from rich.console import Console

from benchmarks import plots, state
from benchmarks.flow import BARE, Drained, Steady, drain, steady
from benchmarks.harness import RESULTS, Bench, bench, machine
from benchmarks.instrumented import Stages
from benchmarks.load import KEYS

LEAST, ONCE = "at_least_once", "exactly_once"
#: Price of a core, for the cost of a million predictions: a cloud's list price, roughly.
USD_PER_CORE_HOUR = 0.04
#: Batch size → events of its run.
STAGE_BATCHES = {1: 4_000, 16: 40_000, 64: 100_000, 256: 200_000, 1000: 300_000}
STAGES = (
    *("consume", "decode", "card windows", "terminal windows", "answered", "lookup", "score"),
    *("encode", "produce", "reports", "snapshot"),
)
PERCENTILES = (50, 95, 99, 99.9)


@dataclass
class Report:
    """A part of the page: sections, and budgets as (what, measured, wanted, met)."""

    #: What it was measured on, with which command.
    of: str = ""
    sections: list[str] = field(default_factory=list)
    budgets: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def section(self, title: str, *lines: str) -> None:
        self.sections.append("\n".join([f"## {title}", "", *lines, ""]))

    def least(self, what: str, value: float, bound: float, form: str = "{:,.0f}") -> None:
        self.budgets.append((what, form.format(value), f"≥ {form.format(bound)}", value >= bound))

    def most(self, what: str, value: float, bound: float, form: str = "{:,.1f} ms") -> None:
        self.budgets.append((what, form.format(value), f"≤ {form.format(bound)}", value <= bound))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, row)) + " |" for row in cells]


def throughput(on: Bench, report: Report, options: argparse.Namespace) -> None:
    """Backlog, both guarantees, and the bare loop, in turn."""
    rows: list[list[object]] = []
    ratios, rates = [], []
    for _ in range(options.runs):
        bare = drain(on, BARE, options.events)
        top = bare.rate
        found: dict[str, Drained] = {}
        for delivery in (LEAST, ONCE):
            each = found[delivery] = drain(on, delivery, options.events)
            usd = each.cpu_us / 3600 * USD_PER_CORE_HOUR
            rows.append(
                [delivery, f"{each.rate:,.0f}", f"{each.rate / top:.2f}", f"{each.cpu_us:.1f}",
                 f"{each.peak_mb:,.0f}", f"{usd:.4f}"]
            )  # fmt: skip
        rows.append(
            ["bare consume → produce", f"{top:,.0f}", "1", f"{bare.cpu_us:.1f}",
             f"{bare.peak_mb:,.0f}", ""]
        )  # fmt: skip
        ratios.append(found[LEAST].rate / top)
        rates.append(found[LEAST].rate)
    report.section(
        "Backlog",
        f"{options.events:,} events scored from a backlog, each run with topics and a recovery "
        f"store of its own; a core costs ${USD_PER_CORE_HOUR} an hour.",
        "",
        *table(
            ["", "events/s", "of the bare loop", "CPU µs/event", "peak MB", "$ per million"], rows
        ),
    )
    report.least("events/s from a backlog, at-least-once", sorted(rates)[len(rates) // 2], 100_000)
    report.least("against the bare loop", sorted(ratios)[len(ratios) // 2], 0.35, "{:.2f}")


def skew(on: Bench, report: Report, options: argparse.Namespace) -> None:
    """Backlog with uniform keys, one hot card, and Zipf's law."""
    # A card with a fifth of all events is flagged, and each flagged event is explained.
    rates = {keys: drain(on, LEAST, options.events, keys=keys, REASONS="0").rate for keys in KEYS}
    explained = {keys: drain(on, LEAST, options.events, keys=keys).rate for keys in KEYS}
    report.section(
        "Skew",
        "One card with a fifth of the events; cards by Zipf's law. (The hot card's partition is "
        "larger too.) The model flags what such a card does, and explaining a flagged transaction "
        "is fifteen more scores: beside the rate without reasons (`REASONS=0`), which shows what "
        "skew costs, is the one with three reasons.",
        "",
        *table(
            ["cards", "events/s", "of uniform", "with reasons, events/s"],
            [
                [keys, f"{rate:,.0f}", f"{rate / rates['uniform']:.2f}", f"{explained[keys]:,.0f}"]
                for keys, rate in rates.items()
            ],
        ),
        "",
        "![throughput versus skew](skew.png)",
    )
    plots.skew(rates, RESULTS / "skew.png")
    for keys in KEYS[1:]:
        report.least(f"{keys} over uniform keys", rates[keys] / rates["uniform"], 0.9, "{:.2f}")


def latency(on: Bench, report: Report, options: argparse.Namespace) -> None:
    """Open loop at rising rates until the flow falls behind, and bursts."""
    found: list[Steady] = []
    for rate in options.rates:
        found.append(steady(on, LEAST, rate, options.seconds))
        if not found[-1].bounded:
            break
    bursts = steady(on, LEAST, 10_000, options.seconds, burst=3)
    once = steady(on, ONCE, 10_000, options.seconds)
    bare = steady(on, BARE, 10_000, options.seconds)

    def row(name: str, each: Steady) -> list[object]:
        numbers = [f"{each.ms(p):,.1f}" for p in PERCENTILES]
        return [name, *numbers, f"{each.max_ms:,.0f}", f"{each.cpu_us:.0f}",
                "yes" if each.bounded else "**no**"]  # fmt: skip

    report.section(
        "Latency",
        f"Open loop over {options.seconds:g} s, the first fifth not counted, from the intended "
        "sending to a reader of committed records, in ms; snapshots every 10 s included.",
        "",
        *table(
            ["events/s", "p50", "p95", "p99", "p99.9", "max", "CPU µs/event", "lag bounded"],
            [
                *(row(f"{each.rate:,.0f}", each) for each in found),
                row("10,000, bursts of 30,000", bursts),
                row("10,000, exactly-once", once),
                row("10,000, the bare loop", bare),
            ],
        ),
        "",
        "![latency versus rate](latency.png)",
    )
    plots.latency(found, RESULTS / "latency.png")
    by_rate = {each.rate: each for each in found}
    if 10_000 in by_rate:
        for percentile, bound in ((50, 3), (99, 15), (99.9, 60)):
            what = f"p{percentile:g} at 10,000 events/s"
            report.most(what, by_rate[10_000].ms(percentile), bound)
    if 50_000 in by_rate:
        report.most("p99 at 50,000 events/s", by_rate[50_000].ms(99), 60)
    else:
        report.budgets.append(("p99 at 50,000 events/s", "falls behind", "≤ 60 ms", False))


def stages(on: Bench, report: Report, options: argparse.Namespace) -> None:
    """µs an event in each step, at several batch sizes."""
    del options
    found: dict[int, Stages] = {}
    for size, events in STAGE_BATCHES.items():
        measured = drain(on, LEAST, events, stages=True, BATCH_SIZE=str(size)).stages
        assert measured is not None
        found[size] = measured
    per_event = {
        size: {stage: 1e6 * each.spent_s.get(stage, 0.0) / each.events for stage in STAGES}
        for size, each in found.items()
    }
    for size, each in found.items():
        spent = sum(per_event[size].values())
        waited = 1e6 * each.spent_s.get("idle", 0.0) / each.events
        per_event[size]["engine and the rest"] = max(
            0.0, 1e6 * each.wall_s / each.events - spent - waited
        )
    names = [*STAGES, "engine and the rest"]
    report.section(
        "Stages",
        "µs an event on the worker thread, waits for a core included, by batch size, from a "
        "backlog. *Reports* are delivery reports; *snapshot* waits for deliveries.",
        "",
        *table(
            ["", *(str(size) for size in found)],
            [
                [name, *(f"{per_event[size][name]:.2f}" for size in found)]
                for name in names
            ] + [["**sum**", *(f"**{sum(per_event[size].values()):.1f}**" for size in found)]],
        ),
        "",
        "![µs per stage](stages.png)",
    )  # fmt: skip
    plots.stages(per_event, names, RESULTS / "stages.png")


def live_state(on: Bench, report: Report, options: argparse.Namespace) -> None:
    """Memory, snapshot pause and resume by number of live cards."""
    found = [state.measure(on, cards) for cards in options.cards]
    report.section(
        "Live state",
        f"{state.PER_CARD} transactions a card within its windows, 10,000 terminals, "
        f"{state.RATE:,} events/s; the pause is from the end of an epoch to the next look at the "
        "input, the start from the process's to its first prediction.",
        "",
        *table(
            ["live cards", "bytes a card", "with its terminals' share", "peak MB", "store MB",
             "pauses, ms", "start again, s"],
            [
                [f"{each.cards:,}", f"{each.card_bytes:,.0f}", f"{each.both_bytes:,.0f}",
                 f"{each.rss_mb:,.0f}", f"{each.store_mb:,.0f}",
                 " / ".join(f"{pause:,.0f}" for pause in each.pauses_ms), f"{each.resume_s:.1f}"]
                for each in found
            ],
        ),
        "",
        "![memory and pause versus live cards](state.png)",
    )  # fmt: skip
    plots.state(found, RESULTS / "state.png")
    for each in found:
        if each.cards == 100_000:
            what = "longest pause of a snapshot at 100,000 live cards"
            report.most(what, max(each.pauses_ms), 50, "{:,.0f} ms")
        if each.cards == 1_000_000:
            report.most("start again with 1,000,000 live cards", each.resume_s, 15, "{:.1f} s")
    report.most("memory of a live card", found[-1].card_bytes / 1000, 1.5, "{:.2f} KB")


def quiet(on: Bench, report: Report, options: argparse.Namespace) -> None:
    """Idle CPU, and the start with warm caches."""
    del options
    run = on.run(LEAST)
    began = state.first_prediction(run)
    process = psutil.Process(run.processes[-1].pid)
    time.sleep(3)
    before = process.cpu_times()
    time.sleep(20)
    after = process.cpu_times()
    run.stop()
    idle = 100 * (after.user + after.system - before.user - before.system) / 20
    report.most("idle CPU, of a core", idle, 5, "{:.1f} %")
    report.most("start to first prediction, warm caches", began, 8, "{:.1f} s")


PARTS: dict[str, Callable[[Bench, Report, argparse.Namespace], None]] = {
    "throughput": throughput,
    "skew": skew,
    "latency": latency,
    "stages": stages,
    "state": live_state,
    "quiet": quiet,
}


def main() -> int:
    """Run the command line; return 1 if a budget is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--only", help=f"parts, by comma: {', '.join(PARTS)}")
    parser.add_argument("--events", type=int, default=1_000_000, help="of a backlog")
    parser.add_argument("--runs", type=int, default=3, help="of the backlog")
    parser.add_argument("--seconds", type=float, default=60, help="of an open loop")
    parser.add_argument(
        "--rates", type=_numbers, default=[1_000, 5_000, 10_000, 20_000, 30_000, 40_000, 50_000]
    )
    parser.add_argument("--cards", type=_numbers, default=[10_000, 100_000, 1_000_000])
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console, file = Console(stderr=True), RESULTS / "flow.json"
    RESULTS.mkdir(exist_ok=True)
    reports: dict[str, Report] = {}
    if file.exists():
        reports = msgspec.json.decode(file.read_bytes(), type=dict[str, Report])
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    with bench(console) as on:
        for _ in range(3):  # a new broker compiles its code; see benchmarks/delivery.py
            steady(on, LEAST, 10_000, 15)
        for part in chosen:
            console.print(f"{part} …")
            report = Report(f"`{command}`: {machine()}")
            PARTS[part](on, report, options)
            reports[part] = report
            file.write_bytes(msgspec.json.format(msgspec.json.encode(reports), indent=1) + b"\n")
            (RESULTS / "flow.md").write_text(page(reports))
    print(page(reports))
    return 0 if all(met for part in chosen for *_, met in reports[part].budgets) else 1


def page(reports: Mapping[str, Report]) -> str:
    """Return the page: all budgets, then each part, and what it was measured on."""
    found = [reports[part] for part in PARTS if part in reports]
    rows = [
        [*each[:3], "met" if each[3] else "**missed**"] for part in found for each in part.budgets
    ]
    lines = ["# The whole flow, measured", "", "## Budgets", ""]
    lines += [*table(["budget", "measured", "wanted", ""], rows), ""]
    for part in found:
        lines += [*part.sections, f"*{part.of}*", ""]
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
