"""Compile the kernels when the image is built, and find them again on a read-only file system.

    NUMBA_CACHE_DIR=/app/.kernels python -m dataflows.kernels        # in the build

Numba keeps what it has compiled only in a directory that it can write to, and stops where there is
none; without its cache every start compiles for half a minute. In the image the cache is beside the
code, and read only. So at start, with

    NUMBA_CACHE_DIR=/tmp/kernels NUMBA_CACHE_LOCATOR_CLASSES=dataflows.kernels.Baked

it is copied (2 MB) to where numba may write: what was compiled is loaded, and what was not, such as
a signature that no one thought of, is compiled and kept there as anywhere else. A kernel is found
only if source, Python, numba and processor (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES) are the same.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from numba.core.caching import UserProvidedCacheLocator

BAKED = Path(__file__).resolve().parents[1] / ".kernels"


class Baked(UserProvidedCacheLocator):  # type: ignore[misc]  # numba is untyped
    """Numba's locator for NUMBA_CACHE_DIR (numba 0.68), which begins with what the image brings."""

    def ensure_cache_path(self) -> None:
        """Make the directory of one package's kernels; numba calls this before it looks there."""
        directory = Path(self.get_cache_path())
        baked = BAKED / directory.name
        if baked.is_dir() and not directory.exists():
            # Not its times and modes: the copy is this process's own, the original another user's.
            shutil.copytree(baked, directory, copy_function=shutil.copyfile)
            directory.chmod(0o700)
        super().ensure_cache_path()


def compile_all() -> None:
    """Call each kernel with the types that the fraud flow calls it with."""
    import bytewax.operators as op
    import numpy as np
    from bytewax.dataflow import Dataflow
    from bytewax.testing import TestingSink, TestingSource, run_main

    from dataflows.kafka.interleave import Interleaver
    from dataflows.kafka.partitioner import partitions_of
    from dataflows.steps.windows import Shards, windows
    from features.batch import EventBatch
    from features.column_cache import ColumnCache
    from features.events import DTYPES, column_kinds
    from features.fraud import CARD, SOURCES, TERMINAL
    from features.keys import group
    from features.seen import FINGERPRINT, SeenIds

    kinds = {name: kind for event in SOURCES for name, kind in column_kinds(event).items()}
    columns = {name: np.ones(8, DTYPES[kind]) for name, kind in kinds.items()}
    columns |= {"source": np.zeros(8, np.uint8), "seq": np.arange(8)}
    flow = Dataflow("kernels")
    events = op.input("events", flow, TestingSource([EventBatch(columns)]))
    for view in (CARD, TERMINAL):
        events = windows(view.name, events, view, SOURCES, Shards(32))
    op.output("answers", events, TestingSink([]))
    run_main(flow)  # type: ignore[no-untyped-call]

    Interleaver([(0, 0)], [0])
    keys = np.array([b"C0001", b"C0002"])
    group(partitions_of(keys.tolist(), 4), 4)
    cache = ColumnCache(fields=2, rows=1, ttl_s=60)
    cache.put(keys, np.zeros((2, 2)), np.zeros(2), now=0)
    cache.fetch(keys, now=0)
    SeenIds(horizon_ms=1000, most=100).fresh(np.zeros(2, FINGERPRINT), np.zeros(2, np.int64))


if __name__ == "__main__":
    compile_all()
