"""Turn a scikit-learn classifier into ONNX bytes, and refuse if the two ever disagree.

Converters go wrong exactly where a value meets a split threshold, and few rows land on one. So the
gate asks at every threshold, and one float32 step to either side. It has bitten: boosted trees
through skl2onnx 1.20 differ by .59 if fitted on float64 (sklearn-onnx #1192), and on the handbook
data still by .01 if fitted on float32. Forests agree to 1e-6.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.scorer import TOLERANCE, session

GATE_ROWS = 10_000  # at least; all real rows if there are fewer splits


class ExportError(Exception):
    """Report a model whose ONNX form does not give scikit-learn's probabilities."""


def to_onnx(estimator: Any, width: int) -> bytes:
    """Return the ONNX form of a fitted binary classifier taking float32 [n, width].

    Raises `ExportError` if the installed protobuf breaks the converter (7 does for
    HistGradientBoosting; the lock file has 6).
    """
    import skl2onnx  # not needed to serve, and slow to import

    try:
        model = skl2onnx.to_onnx(
            estimator,
            np.zeros((1, width), dtype=np.float32),
            options={"zipmap": False},
            name="fraud",  # the default is random, and so would be the hash
            target_opset={"": 17, "ai.onnx.ml": 3},
        )
    except TypeError as error:
        raise ExportError(
            f"skl2onnx cannot convert {type(estimator).__name__}: {error}; install the versions "
            "of requirements.lock (protobuf must be below 7)"
        ) from error
    return bytes(model.SerializeToString())


def gate_rows(
    estimator: Any, rows: NDArray[np.float32], *, least: int = GATE_ROWS, most: int = 150_000
) -> NDArray[np.float32]:
    """Return float32 [m, F], `least` ≤ m: real rows, then rows at split thresholds.

    For every split of a tree (or an even choice of them, to stay below `most`), a real row that
    reaches it is given the threshold as its value, and the float32 next below and above.
    `rows` [n, F] must include those the estimator was fitted on for every split to be reached.
    """
    splits = list(_splits(estimator, rows))
    splits = [splits[i] for i in _even(len(splits), (most - least) // 3)]
    at = np.array([row for row, _, _ in splits], dtype=np.int64)
    feature = np.array([feature for _, feature, _ in splits], dtype=np.int64)
    threshold = np.array([threshold for _, _, threshold in splits], dtype=np.float32)
    edges = []
    for value in (
        threshold,
        np.nextafter(threshold, np.float32(-np.inf)),
        np.nextafter(threshold, np.float32(np.inf)),
    ):
        edge = rows[at]
        edge[np.arange(len(edge)), feature] = value
        edges.append(edge)
    real = rows[_even(len(rows), least)]
    real = np.resize(real, (least, rows.shape[1])) if len(real) < least else real
    return np.ascontiguousarray(np.concatenate([real, *edges]))


def parity(estimator: Any, onnx: bytes, rows: NDArray[np.float32]) -> float:
    """Return the largest difference of probabilities between scikit-learn and ONNX over `rows`.

    A NaN on either side counts as an infinite difference.
    """
    expected = estimator.predict_proba(rows)[:, 1]
    got = session(onnx, rows.shape[1])(rows)
    return float(np.nan_to_num(np.abs(got - expected), nan=np.inf).max())


def export(estimator: Any, rows: NDArray[np.float32]) -> tuple[bytes, dict[str, float]]:
    """Return the ONNX bytes of a fitted classifier and how they were checked.

    `rows` float32 [n, F] are those it was fitted on. Raises `ExportError` where a probability
    differs by `TOLERANCE` or more.
    """
    onnx = to_onnx(estimator, rows.shape[1])
    asked = gate_rows(estimator, rows)
    difference = parity(estimator, onnx, asked)
    if not difference < TOLERANCE:
        raise ExportError(
            f"ONNX and scikit-learn differ by {difference:.3g} on {len(asked)} rows at and around "
            f"split thresholds, allowed is {TOLERANCE:g}; no package was written: use another "
            "model or converter version"
        )
    return onnx, {"rows": float(len(asked)), "max_difference": difference}


def golden(
    estimator: Any, rows: NDArray[np.float32], *, count: int = 512
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return `count` rows and scikit-learn's scores, even over the scores' ranks, both ends too."""
    sample = rows[_even(len(rows), 20_000)]
    scores = estimator.predict_proba(sample)[:, 1]
    chosen = np.argsort(scores, kind="stable")[_even(len(scores), count)]
    return np.ascontiguousarray(sample[chosen]), scores[chosen]


def _splits(estimator: Any, rows: NDArray[np.float32]) -> Iterator[tuple[int, int, float]]:
    """Yield (a row that reaches the split, feature, threshold) for every split some row reaches.

    Of boosted trees scikit-learn does not tell which rows reach a split: any row is taken.
    """
    if hasattr(estimator, "_predictors"):  # HistGradientBoosting
        nodes = np.concatenate([tree.nodes for (tree,) in estimator._predictors])
        inner = nodes[nodes["is_leaf"] == 0]
        for i, node in enumerate(inner):
            yield i % len(rows), int(node["feature_idx"]), float(node["num_threshold"])
    elif hasattr(estimator, "estimators_"):  # a forest
        for tree in estimator.estimators_:
            yield from _tree_splits(tree.tree_, rows)
    elif hasattr(estimator, "tree_"):
        yield from _tree_splits(estimator.tree_, rows)


def _tree_splits(tree: Any, rows: NDArray[np.float32]) -> Iterator[tuple[int, int, float]]:
    left, right = tree.children_left, tree.children_right
    reached = np.full(tree.node_count, -1, dtype=np.int64)
    reached[tree.apply(rows)] = np.arange(len(rows))
    for node in range(tree.node_count - 1, -1, -1):  # children come after their parent
        if left[node] < 0:
            continue
        reached[node] = max(reached[left[node]], reached[right[node]])
        if reached[node] >= 0:
            yield int(reached[node]), int(tree.feature[node]), float(tree.threshold[node])


def _even(count: int, most: int) -> NDArray[np.int64]:
    """Return at most `most` positions spread evenly over `count`, both ends included."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).astype(np.int64))
