"""Score feature rows with a checked ONNX package, on one thread, in chunks of the cheapest size.

The serving process imports this file: NumPy, msgspec and ONNX Runtime, nothing of the training
stack.
"""

import io
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# ONNX Runtime 1.32 uploads usage events and keeps them in the home directory, unless told not to
# before it is imported. A fraud scorer calls nobody.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

from model import package
from model.package import Manifest, PackageError

CHUNKS = tuple(2**power for power in range(11))  # 1 … 1024 rows
FALLBACK_CHUNK = 64  # where tree ensembles are near their cheapest on the machines we measured
TOLERANCE = 1e-5  # largest difference of probabilities between scikit-learn and ONNX Runtime

Rows = NDArray[np.float32] | NDArray[np.float64]
Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Scorer:
    """Answer with the probability of fraud, one float64 per row.

    `chunk` is the number of rows per call of the runtime, `cost_curve` the measured microseconds
    per row for each size that was tried (empty when `chunk` was given).
    """

    manifest: Manifest
    chunk: int
    cost_curve: Mapping[int, float]
    _predict: Predict = field(repr=False)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        names: Sequence[str],
        schema_hash: str,
        chunk: int | None = None,
        budget_s: float = 0.3,
    ) -> "Scorer":
        """Check a package, try it on its golden rows, warm it up and find its cheapest chunk.

        `names` and `schema_hash` are those of the feature set that will feed the model. A given
        `chunk` (≥ 1) skips the measurement, which takes at most about `budget_s` seconds.
        Raises `PackageError` for anything that must not be served.
        """
        directory = Path(path)
        manifest, files = package.read(directory, names=names, schema_hash=schema_hash)
        predict = session(files[package.MODEL], len(manifest.features), directory / package.MODEL)
        golden = _golden(files[package.GOLDEN], len(manifest.features), directory / package.GOLDEN)
        _try_golden(predict, *golden, directory / package.GOLDEN)
        curve: dict[int, float] = {}
        if chunk is None:
            curve = measure(predict, golden[0], budget_s=budget_s)
            chunk = cheapest(curve)
        elif chunk < 1:
            raise ValueError(f"chunk is a number of rows, at least 1; got {chunk}")
        return cls(manifest, chunk, curve, predict)

    @property
    def version(self) -> str:
        """Return the model version: a short hash of everything that decides an answer."""
        return self.manifest.version

    def score(self, x: Rows) -> NDArray[np.float64]:
        """Return the probability of fraud, float64 [n], for rows float64 or float32 [n, F].

        Inputs are rounded to float32, as in training. A row with a value that is not finite
        there (NaN, infinity, beyond 3.4e38) has no defined answer: its score is NaN and its
        neighbours keep theirs. The scores do not depend on how rows are grouped into calls.
        """
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(x, dtype=np.float32)
        width = len(self.manifest.features)
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(
                f"rows of shape {rows.shape}, the model takes [n, {width}]: "
                f"{', '.join(self.manifest.features)}"
            )
        scores = np.empty(len(rows))
        for start in range(0, len(rows), self.chunk):
            part = slice(start, start + self.chunk)
            scores[part] = self._predict(rows[part])
        finite = np.isfinite(rows)
        if not finite.all():
            scores[~finite.all(axis=1)] = np.nan
        return scores

    def explain(self, x: Rows, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the `k` features that raise each score most, and by how much.

        A contribution is the score minus the score with that one feature at its baseline (the
        manifest's median of legitimate transactions). Shapes [n, k], int64 positions in
        `manifest.features` and float64 contributions, largest first, ties in feature order.
        For rows with a score: of one that is NaN, what differs contributes NaN.
        Costs the scoring of up to n × (F + 1) rows, so explain what was flagged, not everything.
        """
        rows = np.asarray(x, dtype=np.float64)
        count, width = rows.shape
        if not 1 <= k <= width:
            raise ValueError(f"k is a number of features from 1 to {width}; got {k}")
        # What stands at its baseline contributes nothing; only the rest is tried.
        row, feature = np.nonzero(rows != self.manifest.baseline)
        variants = np.concatenate([rows, rows[row]])
        variants[np.arange(count, len(variants)), feature] = np.array(self.manifest.baseline)[
            feature
        ]
        scores = self.score(variants)
        contributions = np.zeros((count, width))
        contributions[row, feature] = scores[row] - scores[count:]
        top = np.argsort(-contributions, axis=1, kind="stable")[:, :k]
        return top, np.take_along_axis(contributions, top, axis=1)


def session(model: bytes, width: int, where: Path | str = "model.onnx") -> Predict:
    """Return a function from contiguous float32 [n, width] to the model's last column, float32 [n].

    One thread, no spinning: the process has other work for its cores. Raises `PackageError`.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3
    remedy = "rebuild the package with `python -m model.train` and this version of onnxruntime"
    try:
        runtime = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no public base class
        raise PackageError(f"not a usable model: {error}", where=where, remedy=remedy) from error
    inputs, outputs = runtime.get_inputs(), runtime.get_outputs()
    if [(i.type, i.shape[-1:]) for i in inputs] != [("tensor(float)", [width])]:
        found = ", ".join(f"{i.type} {i.shape}" for i in inputs)
        raise PackageError(
            f"the model takes {found}, not float32 [n, {width}]", where=where, remedy=remedy
        )
    feed, fetch, run = inputs[0].name, [outputs[-1].name], runtime.run

    def predict(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        column: NDArray[np.float32] = run(fetch, {feed: rows})[0][:, -1]
        return column

    return predict


def measure(
    predict: Predict,
    rows: NDArray[np.float32],
    *,
    budget_s: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Return microseconds per row for each size in `CHUNKS`, the median of the repeats that fit.

    Goes round the sizes until `budget_s` is spent, so that a disturbance hits all of them alike;
    always finishes the first round. The first call of each size is a warm-up. Takes other rows
    each time: one row again and again flatters the branch predictor, and a minimum over different
    rows would flatter the small sizes.
    """
    pool = np.resize(rows, (max(len(rows), 2 * CHUNKS[-1]), rows.shape[1]))
    starts = {size: _starts(len(pool), size) for size in CHUNKS}
    for size in CHUNKS:
        predict(pool[:size])
    costs: dict[int, list[float]] = {size: [] for size in CHUNKS}
    end = clock() + budget_s
    for lap in itertools.count():
        for size in CHUNKS:
            if lap and clock() >= end:
                return {size: float(np.median(seen)) for size, seen in costs.items()}
            start = next(starts[size])
            began = clock()
            predict(pool[start : start + size])
            costs[size].append((clock() - began) / size * 1e6)
    raise AssertionError("unreachable: the laps have no end")


def cheapest(cost_curve: Mapping[int, float], *, close: float = 0.05) -> int:
    """Return the smallest size whose cost is within `close` (a share) of the lowest.

    A smaller chunk at the same price answers its first rows earlier, and the choice is steadier
    from start to start. Falls back to `FALLBACK_CHUNK` if the clock showed nothing.

    >>> cheapest({1: 11.0, 32: 3.4, 64: 3.3, 1024: 3.25})
    32
    """
    lowest = min(cost_curve.values(), default=0.0)
    if not 0.0 < lowest < float("inf"):
        return FALLBACK_CHUNK
    return min(size for size, cost in cost_curve.items() if cost <= lowest * (1 + close))


def _starts(rows: int, size: int) -> Iterator[int]:
    return itertools.cycle(range(0, rows - size + 1, size))


def _golden(
    data: bytes, width: int, where: Path
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            rows, scores = arrays["rows"], arrays["scores"]
    except Exception as error:  # NumPy raises half a dozen kinds here
        raise PackageError(
            f"golden rows cannot be read: {error}", where=where, remedy="rebuild the package"
        ) from error
    if rows.dtype != np.float32 or rows.shape != (len(scores), width) or not len(scores):
        raise PackageError(
            f"golden rows are {rows.dtype} {rows.shape} for {len(scores)} scores",
            where=where,
            remedy=f"rebuild the package with float32 rows [n, {width}], n ≥ 1",
        )
    return np.ascontiguousarray(rows), scores


def _try_golden(
    predict: Predict, rows: NDArray[np.float32], scores: NDArray[np.float64], where: Path
) -> None:
    difference = np.abs(predict(rows) - scores)
    worst = int(np.argmax(np.nan_to_num(difference, nan=np.inf)))
    if not difference[worst] < TOLERANCE:
        raise PackageError(
            f"golden row {worst} scores {scores[worst]:.6f} in scikit-learn and differs here "
            f"by {difference[worst]:.2g}, allowed is {TOLERANCE:g}",
            where=where,
            remedy="do not serve it: rebuild the package, or use the onnxruntime version in its "
            "manifest",
        )
