"""Who may import whom: `features` and `model` know no engine, no broker, and not the dataflows."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for package in ("features", "model", "dataflows")
    for path in sorted((ROOT / package).rglob("*.py"))
}
#: What of `features` the model half may know: names and types, no kernel, store or replay.
NAMES_ONLY = {"features.fraud", "features.declare", "features.events", "features.batch"}
FEAST_FILES = {
    "features/online_store.py",
    *(file for file in FILES if file.startswith("features/feast_repo/")),
}


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every module imported, wherever in the file, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            assert node.module is not None
            yield node.module, node.lineno
            # `from features import windows` imports features.windows, if that is a module.
            for alias in node.names:
                child = f"{node.module}.{alias.name}"
                if f"{child.replace('.', '/')}.py" in FILES:
                    yield child, node.lineno


def violations(package: str, forbidden: set[str], *, but: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Return "file:line imports module" for imports below a forbidden name."""
    return [
        f"{file}:{line} imports {module}"
        for file, tree in FILES.items()
        if file.startswith(f"{package}/") and file not in but
        for module, line in imports(tree)
        if any(module == name or module.startswith(f"{name}.") for name in forbidden)
    ]


def test_there_are_files_to_check() -> None:
    assert {"features/batch.py", "model/scorer.py", "dataflows/fraud.py"} <= FILES.keys()


@pytest.mark.parametrize("package", ["features", "model"])
def test_no_engine_and_no_broker(package: str) -> None:
    assert violations(package, {"bytewax", "confluent_kafka"}) == []


def test_features_know_neither_model_nor_dataflows() -> None:
    assert violations("features", {"model", "dataflows"}) == []


def test_the_model_knows_features_for_their_names_only() -> None:
    assert violations("model", {"dataflows"}) == []
    known = {
        module
        for file, tree in FILES.items()
        if file.startswith("model/")
        for module, _ in imports(tree)
        if module.startswith("features")
    }
    assert known <= NAMES_ONLY


def test_feast_is_imported_in_one_adapter_only() -> None:
    for package in ("features", "model", "dataflows"):
        assert violations(package, {"feast"}, but=FEAST_FILES) == []


def test_feast_is_imported_lazily() -> None:
    """Not when the adapter is imported: it takes seconds and 200 MB."""
    tree = FILES["features/online_store.py"]
    top_level = ast.Module([node for node in tree.body if not _defines(node)], [])
    assert not [module for module, _ in imports(top_level) if module.split(".")[0] == "feast"]
    assert "feast" in {module.split(".")[0] for module, _ in imports(tree)}


def _defines(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)


def test_training_libraries_are_not_needed_to_serve() -> None:
    """The demo may: it trains its model."""
    serving = ("dataflows/", "features/", "model/scorer.py", "model/package.py")
    found = {
        f"{file}:{line} imports {module}"
        for file, tree in FILES.items()
        if file.startswith(serving) and not file.startswith("dataflows/demo/")
        for module, line in imports(tree)
        if module.split(".")[0] in {"sklearn", "skl2onnx", "onnx"}
    }
    assert not found


@pytest.mark.parametrize(
    "module",
    [
        "features.fraud",
        "features.offline",
        "features.online_store",
        "features.parity",
        "model.scorer",
        "model.handbook",
    ],
)
def test_importing_loads_nothing_forbidden(module: str) -> None:
    """The rule in effect, through whatever the imports import."""
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(ran.stdout.split())
    forbidden = {"bytewax", "confluent_kafka", "feast", "dataflows", "sklearn", "pandas"}
    if module.startswith("features"):
        forbidden |= {"model", "onnxruntime"}
    assert not loaded & forbidden
