"""A package is served exactly as it was built, or not at all."""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from model import export, package, scorer
from model.package import DECISIONS, Manifest, PackageError, Thresholds, TrainingRange
from model.scorer import CHUNKS, FALLBACK_CHUNK, Scorer, cheapest, measure

NAMES = ["amount", "count", "risk"]
SCHEMA = "0123abcd"


@dataclass
class Trained:
    forest: Any
    rows: np.ndarray
    files: dict[str, bytes]


def golden_file(rows: np.ndarray, scores: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, rows=rows, scores=scores)
    return out.getvalue()


@pytest.fixture(scope="module")
def trained() -> Trained:
    rng = np.random.default_rng(0)
    rows = rng.gamma(2.0, 30.0, size=(4000, 3)).astype(np.float32)
    fraud = (rows[:, 0] > 100) & (rng.random(4000) < 0.8)
    forest = RandomForestClassifier(20, max_depth=8, random_state=0).fit(rows, fraud.astype(int))
    onnx, _ = export.export(forest, rows)
    files = {
        package.MODEL: onnx,
        package.GOLDEN: golden_file(*export.golden(forest, rows)),
        "evaluation.md": b"a table",
    }
    return Trained(forest, rows, files)


def manifest(**changes: Any) -> Manifest:
    plain = Manifest(
        name="forest",
        features=NAMES,
        dtypes=["float32"] * 3,
        schema_hash=SCHEMA,
        training=TrainingRange(from_ms=0, to_ms=1, rows=4000, frauds=100),
        metrics={"ap": 0.5},
        thresholds=Thresholds(review=0.2, block=0.9, rule="by hand"),
        baseline=[40.0, 50.0, 60.0],
        libraries={},
        parity={"rows": 1.0, "max_difference": 0.0},
    )
    return msgspec.structs.replace(plain, **changes)


def load(path: Path, **changes: Any) -> Scorer:
    return Scorer.load(path, **{"names": NAMES, "schema_hash": SCHEMA, "chunk": 64} | changes)


@pytest.fixture
def built(trained: Trained, tmp_path: Path) -> Path:
    package.write(tmp_path / "pkg", manifest(), trained.files)
    return tmp_path / "pkg"


# What is served


def test_scores_are_scikit_learns(built: Path, trained: Trained) -> None:
    scores = load(built).score(trained.rows.astype(np.float64))
    assert scores.dtype == np.float64
    assert np.abs(scores - trained.forest.predict_proba(trained.rows)[:, 1]).max() < 1e-6


def test_scores_do_not_depend_on_chunk_or_batch(built: Path, trained: Trained) -> None:
    rows = trained.rows[:700]
    one_by_one = np.concatenate([load(built).score(row[None]) for row in rows])
    for chunk in (1, 3, 50, 64, 100, 1024):
        assert np.array_equal(load(built, chunk=chunk).score(rows), one_by_one)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_a_row_that_is_not_finite_scores_nan_and_spares_its_neighbours(
    built: Path, trained: Trained, bad: float
) -> None:
    serving = load(built)
    rows = trained.rows[:100].astype(np.float64)
    before = serving.score(rows)
    rows[7, 1] = bad
    after = serving.score(rows)
    assert np.isnan(after[7])
    assert np.array_equal(np.delete(after, 7), np.delete(before, 7))


def test_memory_layout_and_emptiness_do_not_matter(built: Path, trained: Trained) -> None:
    serving = load(built)
    assert np.array_equal(
        serving.score(np.asfortranarray(trained.rows)), serving.score(trained.rows)
    )
    assert serving.score(np.empty((0, 3))).shape == (0,)
    positions, contributions = serving.explain(np.empty((0, 3)), 2)
    assert positions.shape == contributions.shape == (0, 2)


@pytest.mark.parametrize("shape", [(3,), (5, 2), (5, 4), (1, 5, 3)])
def test_rows_of_another_shape_are_refused(built: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \[n, 3\]: amount, count, risk"):
        load(built).score(np.zeros(shape))


def test_explanations_equal_one_replacement_at_a_time(built: Path, trained: Trained) -> None:
    serving = load(built)
    rows = trained.rows[np.argsort(-trained.rows[:, 0])[:20]].astype(np.float64)
    positions, contributions = serving.explain(rows, 2)
    for row, top, given in zip(rows, positions, contributions, strict=True):
        expected = []
        for feature, baseline in enumerate(serving.manifest.baseline):
            other = row.copy()
            other[feature] = baseline
            expected.append(serving.score(row[None])[0] - serving.score(other[None])[0])
        ranked = sorted(range(3), key=lambda feature: (-expected[feature], feature))[:2]
        assert top.tolist() == ranked
        assert given.tolist() == [expected[feature] for feature in ranked]
    with pytest.raises(ValueError, match="from 1 to 3"):
        serving.explain(rows, 4)


def test_decisions_include_their_bounds_and_review_what_has_no_score() -> None:
    limits = Thresholds(review=0.2, block=0.9, rule="")
    codes = limits.decide(np.array([0.0, 0.1999, 0.2, 0.8999, 0.9, 1.0, np.nan]))
    assert [DECISIONS[code] for code in codes] == [
        *["approve"] * 2, *["review"] * 2, *["block"] * 2, "review",
    ]  # fmt: skip


def test_serving_imports_nothing_of_the_training_stack() -> None:
    heavy = "{'sklearn', 'skl2onnx', 'onnx', 'pandas', 'scipy', 'pyarrow', 'bytewax'}"
    code = f"import sys, model.scorer; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_runtime_keeps_no_telemetry(tmp_path: Path) -> None:
    """ONNX Runtime's own default writes a device id and a database into the home directory."""
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(
        [sys.executable, "-c", "import model.scorer"], env=environment | home, check=True
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# The chunk


def test_calibration_takes_the_cheapest_size_by_the_clock() -> None:
    now = 0.0

    def predict(rows: np.ndarray) -> np.ndarray:
        nonlocal now
        now += (10 + len(rows) * (1 if len(rows) <= 128 else 3)) * 1e-6
        return rows[:, 0]

    curve = measure(predict, np.zeros((10, 3), np.float32), clock=lambda: now)
    assert tuple(curve) == CHUNKS
    assert curve[1] == pytest.approx(11.0)
    assert curve[128] == pytest.approx(1 + 10 / 128)
    assert cheapest(curve) == 128


def test_calibration_ends_although_the_model_is_slow_or_the_clock_stands() -> None:
    calls: list[int] = []

    def predict(rows: np.ndarray) -> np.ndarray:
        calls.append(len(rows))
        return rows[:, 0]

    measure(predict, np.zeros((1, 3), np.float32), budget_s=0.0)
    assert calls == [*CHUNKS, *CHUNKS]  # the warm-up and one round
    assert cheapest(dict.fromkeys(CHUNKS, 0.0)) == FALLBACK_CHUNK
    assert cheapest({}) == FALLBACK_CHUNK


def test_load_measures_unless_told(built: Path) -> None:
    measured = load(built, chunk=None, budget_s=0.01)
    assert measured.chunk in CHUNKS
    assert tuple(measured.cost_curve) == CHUNKS
    assert load(built, chunk=7).chunk == 7
    assert load(built, chunk=7).cost_curve == {}


# What is refused


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "evaluation.md"])
def test_a_changed_byte_is_refused(built: Path, name: str) -> None:
    raw = bytearray((built / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (built / name).write_bytes(raw)
    with pytest.raises(PackageError, match=rf"sha256 .*{name}"):
        load(built)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "evaluation.md", "manifest.json"])
def test_a_missing_file_is_refused(built: Path, name: str) -> None:
    (built / name).unlink()
    with pytest.raises(PackageError, match=rf"No such file.*{name}.*model\.train"):
        load(built)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"review": 0.2', '"review": 0.0'),
        ('"ap": 0.5', '"ap": 0.9'),
        ('"rows": 4000', '"rows": "4000"'),
        ('"name": "forest"', '"nome": "forest"'),
        (
            "{",
            "",
        ),
    ],
)
def test_an_edited_manifest_is_refused(built: Path, old: str, new: str) -> None:
    text = (built / "manifest.json").read_text()
    assert old in text
    (built / "manifest.json").write_text(text.replace(old, new, 1))
    with pytest.raises(PackageError, match=r"manifest"):
        load(built)


def test_another_package_format_is_named(built: Path) -> None:
    content = json.loads((built / "manifest.json").read_text())
    (built / "manifest.json").write_text(json.dumps(content | {"format": 2, "new": 1}))
    with pytest.raises(PackageError, match="package format 2, this code reads format 1"):
        load(built)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["amount", "count", "hazard"], "needs features nobody computes: risk"),
        (["amount", "count"], "needs features nobody computes: risk"),
        ([*NAMES, "home_x"], "does not know these features: home_x"),
        (["count", "amount", "risk"], "input 0 is count, the model has amount"),
        ([*NAMES, "risk"], "another order"),
    ],
)
def test_other_features_are_refused(built: Path, names: list[str], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        load(built, names=names)


def test_another_schema_is_refused(built: Path) -> None:
    with pytest.raises(PackageError, match="behind feature schema 0123abcd.*retrain") as refused:
        load(built, schema_hash="ffff")
    assert (refused.value.where, "retrain" in refused.value.remedy) == (
        str(built / "manifest.json"),
        True,
    )


@pytest.mark.parametrize("shift", [2e-5, np.nan])
def test_wrong_golden_rows_are_refused(trained: Trained, tmp_path: Path, shift: float) -> None:
    rows, scores = export.golden(trained.forest, trained.rows)
    scores[11] += shift
    wrong = trained.files | {package.GOLDEN: golden_file(rows, scores)}
    package.write(tmp_path / "pkg", manifest(), wrong)
    with pytest.raises(PackageError, match="golden row 11"):
        load(tmp_path / "pkg")


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no", b"not an archive"])
def test_unreadable_golden_rows_are_refused(
    trained: Trained, tmp_path: Path, damage: bytes
) -> None:
    package.write(tmp_path / "pkg", manifest(), trained.files | {package.GOLDEN: damage})
    with pytest.raises(PackageError, match="golden rows"):
        load(tmp_path / "pkg")


def test_a_model_of_another_width_or_kind_is_refused(trained: Trained, tmp_path: Path) -> None:
    wide = manifest(features=[*NAMES, "x"], dtypes=["float32"] * 4, baseline=[0.0] * 4)
    package.write(tmp_path / "wide", wide, trained.files)
    with pytest.raises(PackageError, match=r"not float32 \[n, 4\]"):
        load(tmp_path / "wide", names=[*NAMES, "x"])
    package.write(tmp_path / "junk", manifest(), trained.files | {package.MODEL: b"junk"})
    with pytest.raises(PackageError, match="not a usable model"):
        load(tmp_path / "junk")


def test_files_outside_the_package_are_not_read(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    with pytest.raises(ValueError, match="plain file names"):
        package.write(tmp_path / "pkg", manifest(), trained.files | {"../secret": b"x"})
    assert (tmp_path / "secret").read_bytes() == b"x"


# How it is written


def test_the_version_names_what_decides_and_nothing_else(trained: Trained, tmp_path: Path) -> None:
    def version(files: dict[str, bytes] = trained.files, **changes: Any) -> str:
        return package.write(tmp_path / "pkg", manifest(**changes), files).version

    same = version()
    assert version() == same
    assert version(files=trained.files | {"evaluation.md": b"measured again"}) == same
    assert version(metrics={"ap": 0.6}) == same
    assert version(thresholds=Thresholds(review=0.3, block=0.9, rule="")) != same
    assert version(schema_hash="ffff") != same
    assert version(baseline=[0.0, 0.0, 0.0]) != same


def test_a_package_is_replaced_whole_or_not_at_all(
    built: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in built.iterdir()}
    synced = 0

    def full_disk(descriptor: int) -> None:
        nonlocal synced
        synced += 1
        if synced == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(package.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        package.write(built, manifest(schema_hash="ffff"), trained.files)
    assert {file.name: file.read_bytes() for file in built.iterdir()} == before
    assert [file.name for file in built.parent.iterdir()] == ["pkg"]
    monkeypatch.undo()

    package.write(built, manifest(schema_hash="ffff"), trained.files | {"new.txt": b""})
    assert load(built, schema_hash="ffff").manifest.files.keys() == {*trained.files, "new.txt"}
    assert [file.name for file in built.parent.iterdir()] == ["pkg"]


def test_the_old_package_is_put_back_if_the_new_one_cannot_take_its_place(
    built: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refusing(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise PermissionError(1, "Operation not permitted")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(PermissionError):
        package.write(built, manifest(schema_hash="ffff"), trained.files)
    assert load(built).manifest.schema_hash == SCHEMA


def test_a_directory_of_something_else_is_left_alone(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("two years")
    with pytest.raises(FileExistsError, match="something else than a model package"):
        package.write(tmp_path, manifest(), trained.files)
    assert (tmp_path / "thesis.txt").read_text() == "two years"


def test_golden_rows_cover_low_and_high_scores(trained: Trained) -> None:
    _, scores = export.golden(trained.forest, trained.rows)
    every = trained.forest.predict_proba(trained.rows)[:, 1]
    assert (len(scores), scores.min(), scores.max()) == (512, every.min(), every.max())
    assert scorer.TOLERANCE == 1e-5
