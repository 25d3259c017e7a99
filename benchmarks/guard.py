"""Guard against a loss of speed: the flow over a bare loop, in one run, within a stored band.

    make bench-guard

CI runs it. Machines differ and are noisy, so only a ratio within one run is looked at, the median
of a few, and the band is wide: it catches a per-event cost that has crept in, not ten percent.
With the tests' small model and profiles; see `benchmarks.__main__` for the real ones.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.flow import BARE, drain, steady
from benchmarks.harness import bench_with
from tests.conftest import CACHE
from tests.integration.flow import model_package, profiles_repo

#: Rate of the flow over that of the bare loop. Seen: 0.19 on two idle cores (benchmarks/results/
#: flow.md), where the loop is at its fastest; a busy machine slows the loop more.
BAND = (0.06, 1.0)
_EVENTS, _PAIRS, _WARM_S = 150_000, 3, 15


def main() -> int:
    """Run; return 1 if the ratio is outside of the band."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as history:
        feast = profiles_repo(Path(history))
    ratios = []
    with bench_with(model_package(), feast, CACHE) as on:
        steady(on, "at_least_once", 5_000, _WARM_S)  # a new broker compiles its code
        for _ in range(_PAIRS):
            top, ours = (drain(on, each, _EVENTS).rate for each in (BARE, "at_least_once"))
            ratios.append(ours / top)
            console.print(f"{ours:,.0f} of {top:,.0f} events/s: {ours / top:.2f}")
    ratio = statistics.median(ratios)
    low, high = BAND
    within = low <= ratio <= high
    verdict = "within" if within else "OUTSIDE OF"
    print(f"the flow makes {ratio:.2f} of a bare loop, {verdict} [{low:g}, {high:g}]")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
