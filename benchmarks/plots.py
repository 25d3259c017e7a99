"""The benchmarks' pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.flow import Steady
from benchmarks.state import State

_SIZE, _DPI = (7.0, 4.0), 130


def latency(runs: Sequence[Steady], file: Path) -> None:
    """Percentiles versus rate, both logarithmic."""
    figure, axes = plt.subplots(figsize=_SIZE)
    rates = [run.rate for run in runs]
    for percentile in (50, 95, 99, 99.9):
        axes.plot(rates, [run.ms(percentile) for run in runs], "o-", label=f"p{percentile:g}")
    axes.set(xscale="log", yscale="log", xlabel="events/s", ylabel="ms",
             title="Intended sending to committed prediction")  # fmt: skip
    axes.set_xticks(rates, [f"{rate:,.0f}" for rate in rates], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file)


def skew(rates: Mapping[str, float], file: Path) -> None:
    """Throughput by distribution of keys."""
    figure, axes = plt.subplots(figsize=_SIZE)
    bars = axes.bar(list(rates), list(rates.values()), color="tab:blue")
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates.values()])
    axes.set(ylabel="events/s", title="Backlog, by how cards are drawn")
    _save(figure, file)


def stages(per_event: Mapping[int, Mapping[str, float]], names: Sequence[str], file: Path) -> None:
    """µs an event, stacked, by batch size."""
    figure, axes = plt.subplots(figsize=_SIZE)
    sizes = [size for size in per_event if size > 1]  # single events would dwarf the others
    left = np.zeros(len(sizes))
    for color, name in zip(plt.get_cmap("tab20").colors, names, strict=False):
        widths = np.array([per_event[size][name] for size in sizes])
        axes.barh([str(size) for size in sizes], widths, left=left, label=name, color=color)
        left += widths
    axes.set(xlabel="µs per event", ylabel="batch size", title="Where the time goes")
    axes.legend(fontsize=7, ncols=2)
    _save(figure, file)


def state(found: Sequence[State], file: Path) -> None:
    """Memory and longest snapshot pause versus live cards."""
    figure, axes = plt.subplots(figsize=_SIZE)
    cards = [each.cards for each in found]
    axes.plot(cards, [each.rss_mb for each in found], "o-", color="tab:blue", label="peak memory")
    axes.set(xscale="log", yscale="log", xlabel="live cards", ylabel="MB",
             title="What live state costs")  # fmt: skip
    other = axes.twinx()
    other.plot(cards, [max(each.pauses_ms) for each in found], "s-", color="tab:red",
               label="longest pause")  # fmt: skip
    other.set(yscale="log", ylabel="ms")
    axes.set_xticks(cards, [f"{each:,}" for each in cards])
    axes.minorticks_off()
    figure.legend(loc="upper left", bbox_to_anchor=(0.12, 0.88))
    _save(figure, file)


def soak(
    minutes: Sequence[float], rss_mb: Sequence[float], lag: Sequence[float], file: Path
) -> None:
    """Memory and lag over time."""
    figure, axes = plt.subplots(figsize=_SIZE)
    axes.plot(minutes, rss_mb, color="tab:blue", label="memory")
    axes.set(xlabel="minutes", ylabel="MB", ylim=(0, 1.2 * max(rss_mb)), title="A soak")
    other = axes.twinx()
    other.plot(minutes, lag, color="tab:orange", label="lag", linewidth=1)
    other.set(ylabel="records", ylim=(0, None))
    figure.legend(loc="center right", bbox_to_anchor=(0.88, 0.4))
    _save(figure, file)


def rush(
    median_ms: Mapping[str, Sequence[float]], before: int, rush: int, target_ms: float, file: Path
) -> None:
    """Median age of the outcomes by the second their events were sent in, by policy."""
    figure, axes = plt.subplots(figsize=_SIZE)
    axes.axvspan(before, before + rush, color="0.92", label="rush")
    axes.axhline(target_ms, color="0.6", linewidth=1, linestyle="--", label="target")
    for policy, values in median_ms.items():
        axes.plot(range(len(values)), values, label=policy)
    axes.set(yscale="log", xlabel="s", ylabel="median age of the outcomes, ms",
             title="Three times the usual rate for a minute")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, file)


def _save(figure: plt.Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=_DPI)
    plt.close(figure)
