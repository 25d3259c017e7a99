"""The same job, by us and by our peers, on one Apache Kafka broker, one after the other.

    python -m benchmarks.peers --events 200000 --only ours,hand_loop

JSON card events → count, sum and mean over three windows per card, as of each event → the same
random forest in ONNX Runtime → JSON predictions. See `benchmarks.peers.job` for the job,
`benchmarks.peers.contenders` for who takes part, and each contender's file for what its
documentation recommends. Rates are of the steady part, from the first tenth of the predictions to
the last, as an external reader of committed records receives them.

Writes benchmarks/results/peers.md, and peers.png where matplotlib is installed. A budget that is
missed, or cannot be told, ends the command with 1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.harness import RESULTS, ROOT, machine
from benchmarks.peers import package
from benchmarks.peers.backlog import CARDS, STEP_MS, Backlog, inputs, window_sums
from benchmarks.peers.contenders import CONTENDERS, OURS, REQUIREMENTS, Contender
from benchmarks.peers.job import Job
from benchmarks.peers.report import Result, budget_table, budgets, disturbance, rate, table
from benchmarks.peers.run import Course
from dataflows.demo.processes import Guard
from tests.kafka.cluster import KafkaCluster


def main() -> int:
    """Run the command line; return 1 if a budget is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="backlog of the fast ones")
    parser.add_argument("--only", help="modules of contenders, separated by commas")
    parser.add_argument("--rounds", type=int, default=3, help="runs of the fast ones, in turn")
    parser.add_argument("--limit", type=float, default=120, help="give a run up after (s)")
    parser.add_argument("--warm", type=float, default=60, help="uncounted runs before, for (s)")
    options = parser.parse_args()
    chosen = CONTENDERS
    if options.only:
        names = options.only.split(",")
        chosen = tuple(one for one in CONTENDERS if one.module in names)
        if unknown := set(names) - {one.module for one in chosen}:
            known = ", ".join(one.module for one in CONTENDERS)
            parser.error(f"--only {','.join(sorted(unknown))}: choose from {known}")
    console = Console(stderr=True)
    results = measure(chosen, options, console)
    text = page(results, options)
    found = budgets(results)
    print(text)
    if options.only is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "peers.md").write_text(text)
        if not plot(results, RESULTS / "peers.png"):
            console.print("no peers.png: matplotlib is not installed")
    else:
        console.print("a choice of contenders: benchmarks/results/peers.md is left as it is")
    failed = [each for each in found if each[2] != "met"]
    for what, measured, verdict in failed:
        print(f"budget {verdict}: our rate is {what}; measured {measured}", file=sys.stderr)
    return 1 if failed else 0


def measure(
    chosen: Sequence[Contender], options: argparse.Namespace, console: Console
) -> dict[Contender, list[Result]]:
    """Run everybody, the fast ones several times in turn, and return what came of it."""
    home = ROOT / ".cache"
    home.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="peers-", dir=home))
    results: dict[Contender, list[Result]] = {one: [] for one in chosen}
    try:
        package.write(folder / "model")
        backlog = Backlog.of(options.events)
        scorer = Job("", "", "", folder / "model", folder).scorer()
        rows = inputs(backlog)
        scores = [s for n in range(0, len(rows), 1000) for s in scorer(rows[n : n + 1000])]
        with Guard() as guard, KafkaCluster(heap="1g") as cluster:
            counts = window_sums(backlog)[0]
            course = Course(cluster, guard, folder / "model", folder, backlog, counts, scores)
            warm_up(course, options, console)
            for number in range(options.rounds):
                for one in chosen:
                    if one.share < 1 and number:
                        continue
                    result = course.run(one, options.limit)
                    results[one].append(result)
                    said = f"{one.name}: {result.rate:,.0f} events/s, {result.answers}"
                    said += f" (others {result.others:.0%})"
                    console.print(f"{said} {result.failure}", markup=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return results


def warm_up(course: Course, options: argparse.Namespace, console: Console) -> None:
    """Keep the broker busy for a while: a new JVM halves every rate until its code is compiled."""
    first = [one for one in CONTENDERS if one.share == 1]
    deadline = time.monotonic() + options.warm
    turn = 0
    while time.monotonic() < deadline:
        course.run(first[turn % len(first)], options.limit)
        turn += 1
    console.print("the broker is warm")


def page(results: Mapping[Contender, Sequence[Result]], options: argparse.Namespace) -> str:
    """Return the page of results."""
    arguments = " ".join(sys.argv[1:])
    minutes = options.events * STEP_MS / 60_000
    peers = ", ".join(
        line
        for name in dict.fromkeys(one.venv for one in results if one.venv)
        for line in (REQUIREMENTS / f"{name}.in").read_text().split()
        if not line.startswith(("onnxruntime", "numpy"))
    )
    lines = [
        "# The same job, by us and by our peers",
        "",
        f"`python -m benchmarks.peers {arguments}`".replace(" `", "`"),
        "",
        machine() + (f" Peers: {peers}." if peers else ""),
        "",
        "JSON card events → count, sum and mean over the last 10 minutes, 30 minutes and hour of "
        "each card, as of each event → a random forest of 50 trees in ONNX Runtime → JSON. One "
        "broker, topics of four partitions, one process each, one after the other, from a backlog "
        f"of {options.events:,} events ({minutes:.0f} minutes of stream time, {CARDS:,} cards, 72 "
        "events in the longest window when it is full). Slower ones get the events of fewer "
        "cards, with the same windows. Rates are from the first tenth of the predictions to the "
        "last, as a reader of committed records receives them; CPU is of the contender's "
        f"processes. The broker had been busy for {options.warm:.0f} s before.",
        "",
        disturbance(results),
        "",
        table(results),
        "",
        budget_table(budgets(results)),
    ]
    return "\n".join(lines) + "\n"


def plot(results: Mapping[Contender, Sequence[Result]], path: Path) -> bool:
    """Draw the rates as bars, if matplotlib is installed; return whether it is."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rates = {one.name.replace("`", ""): rate(runs) for one, runs in results.items() if rate(runs)}
    figure = Figure(figsize=(8, 0.5 * len(rates) + 1), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:blue" if name == OURS else "tab:gray" for name in rates]
    bars = axes.barh(list(rates), list(rates.values()), color=colours)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("events/s (logarithmic)")
    axes.margins(x=0.15)
    figure.savefig(path, dpi=120)
    return True


if __name__ == "__main__":
    sys.exit(main())
