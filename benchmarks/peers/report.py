"""Results → one Markdown table, and the budgets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers.contenders import CEILING, OURS, Contender


@dataclass(frozen=True)
class Result:
    """One run of a contender.

    Attributes:
        events: predictions asked for.
        received: predictions received.
        rate: events/s between the first tenth of the predictions received and the last; 0 if
            nothing can be said.
        cpu_us: user and system time per event in that part, µs, of all its processes.
        rss_bytes: most resident memory of all its processes together, as sampled.
        seconds: from its start to its last prediction, or to when it was given up.
        answers: how the answers compare with the right ones.
        others: share of the machine's CPU time that went to processes of nobody here.
        failure: why there is no result, or no whole one.
    """

    events: int
    received: int = 0
    rate: float = 0.0
    cpu_us: float = 0.0
    rss_bytes: int = 0
    seconds: float = 0.0
    answers: str = "–"
    others: float = 0.0
    failure: str = ""


def rate(runs: Sequence[Result]) -> float:
    """Return the median rate of the runs that have one, else 0."""
    rates = [run.rate for run in runs if run.rate]
    return statistics.median(rates) if rates else 0.0


def row(contender: Contender, runs: Sequence[Result], ours: float) -> str:
    """Return the contender's row; medians where it ran several times."""
    typical = rate(runs)
    cells = [contender.name, contender.durability]
    if typical:
        each = f" ({' / '.join(f'{run.rate:,.0f}' for run in runs)})" if len(runs) > 1 else ""
        cells.append(f"{typical:,.0f}{each}")
        cells.append(f"{typical / ours:.3g}" if ours else "–")
        cells.append(f"{statistics.median(run.cpu_us for run in runs if run.rate):,.1f}")
    else:
        cells += ["not measured", "–", "–"]
    peak = max(run.rss_bytes for run in runs)
    cells.append(f"{peak / 1e6:,.0f} MB" if peak else "–")
    cells.append(f"{runs[-1].received:,} of {runs[-1].events:,}")
    answers = list(dict.fromkeys(run.answers for run in runs))
    answers += [f"**{run.failure}**" for run in runs if run.failure]
    cells.append("; ".join(answers))
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def disturbance(results: Mapping[Contender, Sequence[Result]]) -> str:
    """Say how much of the machine others had during the runs."""
    shares = [run.others for runs in results.values() for run in runs if run.rate]
    if not shares:
        return "Nothing was measured."
    said = f"median {statistics.median(shares):.0%}, at most {max(shares):.0%}"
    warning = " **The machine was not quiet: repeat.**" if max(shares) > QUIET else ""
    return f"Other processes had {said} of the machine's CPU time during the runs.{warning}"


#: Share of the machine's CPU time that others may have before a run is called disturbed.
QUIET = 0.1
HEADER = (
    "| contender | durability | events/s (each run) | of ours | CPU µs/event | peak memory "
    "| predictions | answers |\n|---|---|---|---|---|---|---|---|"
)


def table(results: Mapping[Contender, Sequence[Result]]) -> str:
    """Return the Markdown table of all contenders."""
    ours = next((rate(runs) for one, runs in results.items() if one.name == OURS), 0.0)
    return "\n".join([HEADER, *(row(one, runs, ours) for one, runs in results.items())])


def advantage(ours: Sequence[Result], theirs: Sequence[Result]) -> float:
    """Return our rate over theirs, 0 if it cannot be told.

    If both ran in every round, the median over the rounds: what else the machine does changes
    slowly.
    """
    if len(ours) == len(theirs):
        ratios = [a.rate / b.rate for a, b in zip(ours, theirs, strict=True) if a.rate and b.rate]
        return statistics.median(ratios) if ratios else 0.0
    return rate(ours) / rate(theirs) if rate(theirs) else 0.0


def budgets(results: Mapping[Contender, Sequence[Result]]) -> list[tuple[str, str, str]]:
    """Return (what, measured, verdict) for each contender with a budget; in the order given.

    What has no rate is not met: nothing was shown.
    """
    found = []
    ours: Sequence[Result] = next((runs for one, runs in results.items() if one.name == OURS), ())
    for contender, runs in results.items():
        if contender.budget is None:
            continue
        ratio = advantage(ours, runs)
        sign = "of" if contender.name == CEILING else "×"
        what = f"at least {contender.budget:g} {sign} {contender.name}"
        if ratio == 0.0:
            found.append((what, "–", "not measured"))
        else:
            verdict = "met" if ratio >= contender.budget else "missed"
            found.append((what, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", verdict))
    return found


def budget_table(found: Sequence[tuple[str, str, str]]) -> str:
    """Return the budgets as a Markdown table."""
    lines = ["| budget: our rate | measured | |", "|---|---|---|"]
    for what, measured, verdict in found:
        lines.append(
            f"| {what} | {measured} | {verdict if verdict == 'met' else f'**{verdict}**'} |"
        )
    return "\n".join(lines)
