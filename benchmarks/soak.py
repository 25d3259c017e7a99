"""Half an hour at most of what the flow can take: does anything grow?

    make soak          python -m benchmarks.soak [--minutes 30] [--rate 12000]

The half hour in results/soak.md had 16,000 events/s, 80 % of the highest rate with bounded lag in
results/flow.md (20,000), at least once.

Real Kafka, the real flow with dedupe and overload control on, one hot card with a fifth of all
events. After a third of the time the broker stands still for 20 s (SIGSTOP), after two thirds there
is a burst of three times the rate for 30 s. Every five seconds the process's memory and what it
says of its queues are looked at.

Memory is flat if the median of the last quarter is at most 5 % above that of the second quarter:
by then the windows are full (two transactions of a card a day, 30 days: within a minute at this
speed) and so are the caches. Ends with 1 if it is not, or if the account does not balance.

Writes benchmarks/results/soak.md and its plot.
"""

from __future__ import annotations

import argparse
import sys
import time
import urllib.request
from dataclasses import dataclass

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks import plots
from benchmarks.harness import RESULTS, Bench, await_that, bench, machine
from tests.integration.flow import free_port

LOOK_EVERY_S = 5.0
OUTAGE_S, BURST_S, BURST = 20.0, 30.0, 3.0
MOST_GROWTH = 0.05
#: What may not grow either: queues and what is buffered, by name in the metrics.
QUEUES = ("scoring_buffered_records", "scoring_producer_queue_records", "scoring_lag_records")
_WAIT_S = 300.0


@dataclass(frozen=True)
class Look:
    """One look at the flow."""

    at_s: float
    rss_mb: float
    queues: dict[str, float]
    account: dict[str, float]


def look(process: psutil.Process, port: int, began: float) -> Look:
    """Return what there is to see now."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text = page.read().decode()
    queues = dict.fromkeys(QUEUES, 0.0)
    account: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in queues:
                queues[sample.name] += sample.value
            elif sample.name == "scoring_events_total":
                outcome = sample.labels["outcome"]
                account[outcome] = account.get(outcome, 0.0) + sample.value
    rss_mb = process.memory_info().rss / 1e6
    return Look(time.monotonic() - began, rss_mb, queues, account)


def soak(on: Bench, minutes: float, rate: float) -> tuple[list[Look], int]:
    """Run; return the looks, and how many events were sent."""
    run = on.run("at_least_once", retention_bytes=100_000_000)
    port = free_port()
    process = run.start(
        METRICS_PORT=str(port), DEDUPE="true", OVERLOAD_POLICY="degrade", OVERLOAD_TARGET_MS="1000"
    )
    seconds = minutes * 60
    third = seconds / 3
    plan = [(rate, 2 * third), (BURST * rate, BURST_S), (rate, third - BURST_S)]
    count = int(sum(each * length for each, length in plan))
    load = run.load(count, plan=",".join(f"{r}:{s}" for r, s in plan), keys="hot")
    watched, began = psutil.Process(process.pid), time.monotonic()
    looks: list[Look] = []
    outage_at, stopped = third, False
    while load.poll() is None:
        now = time.monotonic() - began
        if not stopped and now >= outage_at:
            stopped = True
            on.cluster.pause(1)
            time.sleep(OUTAGE_S)
            on.cluster.resume(1)
        looks.append(look(watched, port, began))
        time.sleep(LOOK_EVERY_S)

    def all_have_an_outcome() -> bool:
        looks.append(look(watched, port, began))
        time.sleep(1)
        return outcomes(looks[-1]) >= count

    await_that(all_have_an_outcome, _WAIT_S)
    run.stop()
    return looks, count


def outcomes(seen: Look) -> float:
    """Return how many events have an outcome."""
    return sum(n for outcome, n in seen.account.items() if outcome != "read")


def growth(looks: list[Look]) -> float:
    """Return by how much memory grew, as a share, from the second quarter to the last."""
    rss = [each.rss_mb for each in looks]
    quarter = len(rss) // 4
    before = float(np.median(rss[quarter : 2 * quarter]))
    return float(np.median(rss[-quarter:])) / before - 1


def main() -> int:
    """Run the command line; return 1 if something grows or is lost."""
    parser = argparse.ArgumentParser("python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=12_000, help="events/s")
    options = parser.parse_args()
    console = Console(stderr=True)
    with bench(console) as on:
        looks, count = soak(on, options.minutes, options.rate)
    grown, last = growth(looks), looks[-1]
    balanced = outcomes(last) == last.account["read"] == count
    page = "\n".join(
        [
            "# A soak",
            "",
            f"`python -m benchmarks.soak --minutes {options.minutes:g} --rate {options.rate:g}`",
            "",
            machine(),
            "",
            f"{count:,} events with one hot card, {options.rate:,.0f} events/s; an outage of "
            f"{OUTAGE_S:g} s after a third, {BURST:g} times the rate for {BURST_S:g} s after two "
            "thirds.",
            "",
            "| | |",
            "|---|---|",
            f"| memory, median of the last quarter over the second's | {grown:+.1%} (at most "
            f"{MOST_GROWTH:+.0%}) |",
            f"| peak memory | {max(each.rss_mb for each in looks):,.0f} MB |",
            *(
                f"| most {name.removeprefix('scoring_').replace('_', ' ')} | "
                f"{max(each.queues[name] for each in looks):,.0f}, {last.queues[name]:,.0f} in the "
                "end |"
                for name in QUEUES
            ),
            "| account | "
            + ", ".join(f"{n:,.0f} {outcome}" for outcome, n in sorted(last.account.items()) if n)
            + f": {'balanced' if balanced else 'NOT BALANCED'} |",
            "",
            "![memory and queues](soak.png)",
            "",
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "soak.md").write_text(page)
    plots.soak(
        [each.at_s / 60 for each in looks],
        [each.rss_mb for each in looks],
        [each.queues["scoring_lag_records"] for each in looks],
        RESULTS / "soak.png",
    )
    print(page)
    return 0 if grown <= MOST_GROWTH and balanced else 1


if __name__ == "__main__":
    sys.exit(main())
