"""A rush of three times the usual rate: what each overload policy makes of it.

    make bench-overload

Real Kafka, the real flow, an open loop: some seconds of the usual rate, a minute of three times
that, which is more than this machine can do, then the usual rate again. From outside: every event
has one outcome (or the command fails); how late the outcomes were that belong to the rush, what
share was scored in full, and how long after the rush it takes until events are answered as quickly
as before it.

Writes benchmarks/results/overload.md and its plot.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Console

from benchmarks import plots
from benchmarks.flow import sent_ms, watched
from benchmarks.harness import RESULTS, Bench, bench, machine, reader, receive

POLICIES = ("block", "sample", "degrade", "drop")
TARGET_MS = 500
_MODE = re.compile(rb'"score_mode":"(\w+)"')
_ID = re.compile(rb'"transaction_id":"([^"]+)"')
#: Seconds that must be as quick as before the rush.
_QUIET_S = 5


@dataclass
class Rush:
    """What one policy made of it."""

    policy: str
    #: Median age of the outcomes in ms, by the second in which they were meant to be sent.
    median_ms: npt.NDArray[np.float64]
    #: Of the events of the rush.
    p50_ms: float
    p99_ms: float
    modes: dict[str, float]  # shares
    #: From the end of the rush; None: it did not, within what was watched.
    recovered_s: float | None
    peak_mb: float


def measure(on: Bench, policy: str, rate: float, seconds: tuple[int, int, int]) -> Rush:
    """Send the rush to a flow of its own."""
    before, rush, after = seconds
    plan = f"{rate}:{before},{3 * rate}:{rush},{rate}:{after}"
    count = int(rate * (before + 3 * rush + after))
    run = on.run("at_least_once")
    process = run.start(OVERLOAD_POLICY=policy, OVERLOAD_TARGET_MS=str(TARGET_MS))
    sent, late, modes, ids = [], [], [], set()
    with reader(run) as consumer:
        consumer.consume(1, 1.0)
        with watched(process) as usage:
            load = run.load(count, plan=plan)
            for now, values in receive(consumer, count, sum(seconds) + 300):
                ms = sent_ms(values)
                sent.append(ms)
                late.append(now * 1000 - ms)
                modes += [_MODE.search(value)[1].decode() for value in values]  # type: ignore[index]
                ids |= {_ID.search(value)[1] for value in values}  # type: ignore[index]
            load.wait()
    run.stop()
    run.forget()
    if len(ids) != count:
        raise SystemExit(f"{policy}: {count} events were sent, {len(ids)} have an outcome")
    at, late_ms = np.concatenate(sent), np.concatenate(late)
    second = ((at - at.min()) // 1000).astype(np.intp)
    median_ms = np.array(
        [np.median(late_ms[second == s]) if (second == s).any() else np.nan
         for s in range(sum(seconds))]
    )  # fmt: skip
    rushed = (second >= before) & (second < before + rush)
    shares = Counter(mode for mode, of in zip(modes, rushed.tolist(), strict=True) if of)
    total = sum(shares.values())
    return Rush(
        policy,
        median_ms,
        float(np.percentile(late_ms[rushed], 50)),
        float(np.percentile(late_ms[rushed], 99)),
        {mode: n / total for mode, n in shares.items()},
        _recovered_s(median_ms, before, rush),
        usage.peak_mb,
    )


def _recovered_s(median_ms: npt.NDArray[np.float64], before: int, rush: int) -> float | None:
    usual_ms = 2 * float(np.nanmedian(median_ms[before // 2 : before]))
    quick = median_ms[before + rush :] <= max(usual_ms, 20.0)
    for start in range(len(quick) - _QUIET_S):
        if quick[start : start + _QUIET_S].all():
            return float(start)
    return None


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.overload", description=__doc__)
    parser.add_argument("--rate", type=float, default=25_000, help="usual rate, events/s")
    parser.add_argument("--seconds", default="8,60,25", help="before, during and after the rush")
    options = parser.parse_args()
    before, rush, after = map(int, options.seconds.split(","))
    console = Console(stderr=True)
    with bench(console) as on:
        measure(on, "block", options.rate / 4, (20, 1, 1))  # a new broker compiles its code
        found = []
        for policy in POLICIES:
            console.print(policy, "…")
            found.append(measure(on, policy, options.rate, (before, rush, after)))
    page = _page(found, options.rate, (before, rush, after))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overload.md").write_text(page)
    plots.rush({each.policy: each.median_ms for each in found}, before, rush, TARGET_MS,
               RESULTS / "overload.png")  # fmt: skip
    print(page)
    return 0


def _page(found: list[Rush], rate: float, seconds: tuple[int, int, int]) -> str:
    before, rush, after = seconds
    lines = [
        "# A rush, and what the overload policies make of it",
        "",
        f"`python -m benchmarks.overload --rate {rate:g} --seconds {before},{rush},{after}`",
        "",
        machine(),
        "",
        f"{rate:,.0f} events/s for {before} s, {3 * rate:,.0f} for {rush} s, {rate:,.0f} for "
        f"{after} s; target {TARGET_MS} ms; events of 200 and more are critical (they are always "
        "scored in full). Ages are from the intended sending to a reader, of the events of the "
        "rush. Recovered: seconds after it until the median has been what it was before (or below "
        "twice that) for five seconds. Every event had one outcome.",
        "",
        "| policy | p50, ms | p99, ms | scored in full | cached score | rule | shed | recovered "
        "after, s | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        shares = [f"{each.modes.get(mode, 0):.0%}" for mode in ("full", "cached", "rule", "shed")]
        recovered = "not within" if each.recovered_s is None else f"{each.recovered_s:.0f}"
        cells = [each.policy, f"{each.p50_ms:,.0f}", f"{each.p99_ms:,.0f}", *shares, recovered]
        lines.append("| " + " | ".join([*cells, f"{each.peak_mb:,.0f}"]) + " |")
    return "\n".join([*lines, "", "![median age over time](overload.png)", ""])


if __name__ == "__main__":
    sys.exit(main())
