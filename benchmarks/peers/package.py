"""The model of the job: a small random forest, as a package whose ``model.onnx`` all load."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import sklearn
from sklearn.ensemble import RandomForestClassifier

from benchmarks.peers.backlog import Backlog, inputs
from benchmarks.peers.ours import FEATURES
from model import export, package
from model.package import Manifest, Thresholds, TrainingRange


def write(directory: Path) -> None:
    """Train on an hour of the job's own events and write the package.

    Labelled is what spends much more than usual, with noise. 50 trees of depth 10, half as deep as
    those of the fraud model.
    """
    rows = inputs(Backlog.of(400_000, seed=2))[-20_000:]
    rng = np.random.default_rng(3)
    ratio = rows[:, 0] / rows[:, -1] + rows[:, 1] / rows[:, 3] * 6
    labels = (ratio + rng.normal(0, 0.5, len(rows)) > 3.0).astype(int)
    forest = RandomForestClassifier(50, max_depth=10, min_samples_leaf=3, random_state=0)
    forest.fit(rows, labels)
    onnx, parity = export.export(forest, rows)
    golden_rows, golden_scores = export.golden(forest, rows, count=64)
    golden = io.BytesIO()
    np.savez(golden, rows=golden_rows, scores=golden_scores)
    manifest = Manifest(
        name="forest of the peer benchmark",
        features=list(FEATURES.names),
        dtypes=["float32"] * len(FEATURES.names),
        schema_hash=FEATURES.schema_hash,
        training=TrainingRange(0, 1, len(rows), int(labels.sum())),
        metrics={},
        thresholds=Thresholds(review=0.5, block=0.9, rule="by hand"),
        baseline=[float(value) for value in np.median(rows, axis=0)],
        libraries={"scikit-learn": sklearn.__version__},
        parity=parity,
    )
    package.write(directory, manifest, {package.MODEL: onnx, package.GOLDEN: golden.getvalue()})
