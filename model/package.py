"""The model package: a directory that says what it is and can prove it.

    model.onnx      the model; one float32 input [n, F], probabilities as its last output
    golden.npz      rows (float32 [n, F]) and the scores scikit-learn gave them (float64 [n])
    manifest.json   names, hashes and numbers, see `Manifest`
    …               anything else listed in the manifest, such as the evaluation table

ONNX Runtime checks neither the names nor the order of a model's inputs, so the package does.
The hashes find damage and mix-ups; they are no signature, so keep the directory write-protected.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

FORMAT = 1
DECISIONS = ("approve", "review", "block")
MANIFEST, MODEL, GOLDEN = "manifest.json", "model.onnx", "golden.npz"


class PackageError(Exception):
    """Report a package that must not be served: what is wrong, where, and what to do."""

    def __init__(self, what: str, *, where: Path | str, remedy: str) -> None:
        super().__init__(f"{what} ({where}); {remedy}")
        self.what, self.where, self.remedy = what, str(where), remedy


class TrainingRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say what the model was fitted on: event times [from_ms, to_ms) in milliseconds UTC."""

    from_ms: int
    to_ms: int
    rows: int
    frauds: int


class Thresholds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Turn scores into decisions: block at `block` and above, else review at `review` and above.

    `rule` says in words how both were chosen.
    """

    review: float
    block: float
    rule: str

    def decide(self, scores: NDArray[np.float64]) -> NDArray[np.int8]:
        """Return positions in `DECISIONS`, int8 [n]; a NaN score is reviewed, never waved through.

        >>> codes = Thresholds(review=0.2, block=0.9, rule="by hand").decide(np.array([0.1, 0.2]))
        >>> [DECISIONS[code] for code in codes]
        ['approve', 'review']
        """
        review = ~(scores < self.review)
        return review.astype(np.int8) + (scores >= self.block)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Describe a package; `features`, `dtypes` and `baseline` are in the model's input order.

    `baseline` holds the median of each feature over the legitimate training transactions: the
    value `Scorer.explain` puts in a feature's place. `version`, `files` and `digest` are filled
    in by `write`.
    """

    name: str
    features: list[str]
    dtypes: list[str]
    schema_hash: str
    training: TrainingRange
    metrics: dict[str, float | str]
    thresholds: Thresholds
    baseline: list[float]
    libraries: dict[str, str]
    parity: dict[str, float]
    format: int = FORMAT
    version: str = ""
    files: dict[str, str] = {}
    digest: str = ""


def write(directory: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Write a package in one piece and return its manifest with version, files and digest.

    Everything is written and synced beside `directory`, then renamed onto it. A reader sees the
    old package, for an instant none, or the new one, never a mixture. The same model, thresholds
    and baseline give the same version on any machine; `files` must hold `model.onnx` and
    `golden.npz`.
    """
    for needed in (MODEL, GOLDEN):
        if needed not in files:
            raise ValueError(f"a package needs {needed}; got {sorted(files)}")
    if foreign := [name for name in files if Path(name).name != name or name == MANIFEST]:
        raise ValueError(f"a package holds plain file names, and its manifest once: {foreign}")
    manifest = msgspec.structs.replace(
        manifest, files={name: _sha256(data) for name, data in sorted(files.items())}
    )
    manifest = msgspec.structs.replace(manifest, version=_version(manifest))
    manifest = msgspec.structs.replace(manifest, digest=_digest(manifest))

    directory = directory.absolute()
    if directory.exists() and not (directory / MANIFEST).exists() and any(directory.iterdir()):
        raise FileExistsError(
            f"{directory} holds something else than a model package and would be replaced; "
            "name a new directory"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    fresh, old = staging / "new", staging / "old"
    try:
        fresh.mkdir()
        encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
        for name, data in {**files, MANIFEST: encoded}.items():
            with (fresh / name).open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
        if directory.exists():
            directory.rename(old)
        try:
            fresh.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def read(
    directory: Path, *, names: Sequence[str], schema_hash: str
) -> tuple[Manifest, dict[str, bytes]]:
    """Read a package whole, checked, and return its manifest and the bytes of its files.

    `names` and `schema_hash` are those of the feature set that will feed the model. What is
    returned is what was hashed: nothing is read from the disk again. Raises `PackageError`.
    """
    manifest = _read_manifest(directory)
    _check_names(manifest.features, list(names), directory / MANIFEST)
    if manifest.schema_hash != schema_hash:
        raise PackageError(
            f"the model was trained behind feature schema {manifest.schema_hash}, "
            f"this code computes schema {schema_hash}",
            where=directory / MANIFEST,
            remedy="retrain with `python -m model.train`, or deploy the code of that schema",
        )
    files = {}
    for name, expected in manifest.files.items():
        if Path(name).name != name:
            raise _damaged(f"a file name leaves the package: {name!r}", directory / MANIFEST)
        data = _read_bytes(directory / name)
        if _sha256(data) != expected:
            raise _damaged(
                f"sha256 of the file is {_sha256(data)[:12]}…, the manifest says {expected[:12]}…",
                directory / name,
            )
        files[name] = data
    return manifest, files


def _read_manifest(directory: Path) -> Manifest:
    where = directory / MANIFEST
    raw = _read_bytes(where)
    try:
        found = msgspec.json.decode(raw, type=dict[str, object]).get("format")
        if found == FORMAT:
            manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.MsgspecError as error:
        raise _damaged(f"the manifest cannot be read: {error}", where) from error
    if found != FORMAT:
        raise PackageError(
            f"package format {found!r}, this code reads format {FORMAT}",
            where=where,
            remedy="rebuild the package with `python -m model.train` of this checkout",
        )
    if manifest.digest != _digest(manifest) or manifest.version != _version(manifest):
        raise _damaged("the manifest was changed after it was written", where)
    width = len(manifest.features)
    if not (len(manifest.dtypes) == len(manifest.baseline) == width):
        raise _damaged("features, dtypes and baseline differ in length", where)
    if not {MODEL, GOLDEN} <= manifest.files.keys():
        raise _damaged(f"the manifest lists {sorted(manifest.files)}", where)
    return manifest


def _check_names(model: list[str], given: list[str], where: Path) -> None:
    if model == given:
        return
    if missing := [name for name in model if name not in given]:
        what = f"the model needs features nobody computes: {', '.join(missing)}"
    elif extra := [name for name in given if name not in model]:
        what = f"the model does not know these features: {', '.join(extra)}"
    else:
        at = next((i for i, (a, b) in enumerate(zip(model, given, strict=False)) if a != b), -1)
        what = (
            f"features are in another order: input {at} is {given[at]}, the model has {model[at]}"
        )
    raise PackageError(
        what,
        where=where,
        remedy="score with the feature set the model was trained on, or retrain it",
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PackageError(
            f"cannot read the file: {error.strerror}",
            where=path,
            remedy="build the package with `python -m model.train`, or correct its path",
        ) from error


def _damaged(what: str, where: Path) -> PackageError:
    return PackageError(what, where=where, remedy="copy the package again from where it was built")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version(manifest: Manifest) -> str:
    """Hash what decides an answer: model, inputs, thresholds and baseline; not dates or timings."""
    decisive = [
        manifest.name,
        manifest.files.get(MODEL),
        manifest.features,
        manifest.dtypes,
        manifest.schema_hash,
        [manifest.thresholds.review, manifest.thresholds.block],
        manifest.baseline,
    ]
    return _sha256(msgspec.json.encode(decisive))[:12]


def _digest(manifest: Manifest) -> str:
    bare = msgspec.structs.replace(manifest, digest="")
    return _sha256(msgspec.json.encode(bare, order="sorted"))
