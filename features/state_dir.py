"""Window state on disk, by view and shard: where a new flow begins, instead of empty windows.

``features.offline --state DIR`` writes it; a flow without a snapshot starts from it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from features.declare import FeatureSet

FORMAT = 1


class StateManifest(msgspec.Struct, frozen=True):
    """What a state directory holds."""

    format: int
    feature_set: str
    schema_hash: str
    shards: int
    #: The state is as of the last event before this stream time, ms; go on with the next one.
    until: int
    events: dict[str, int]
    #: Path in the directory → sha256 of the snapshot; `write_state` fills it in.
    files: dict[str, str] = {}


class StateError(ValueError):
    """A state directory is missing, damaged or of other features."""


def write_state(
    directory: Path, manifest: StateManifest, states: Mapping[str, Mapping[int, bytes]]
) -> None:
    """Write snapshots by view and shard, replacing the state that was there; all or nothing.

    Raises StateError if the directory holds something else, which is left alone.
    """
    check_writable(directory)
    files: dict[str, str] = {}
    building = directory.with_name(directory.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    for view, shards in states.items():
        (building / view).mkdir(parents=True)
        for shard, snapshot in shards.items():
            (building / _path(view, shard)).write_bytes(snapshot)
            files[_path(view, shard)] = _sha256(snapshot)
    manifest = msgspec.structs.replace(manifest, files=files)
    (building / "manifest.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    )
    shutil.rmtree(directory, ignore_errors=True)
    building.rename(directory)


def check_writable(directory: Path) -> None:
    """Raise StateError if a directory holds something else than window state."""
    foreign = directory.exists() and not (directory / "manifest.json").exists()
    if foreign and (not directory.is_dir() or any(directory.iterdir())):
        raise StateError(
            f"{directory} holds something else than window state, which would be deleted; "
            "name a new directory"
        )


def _path(view: str, shard: int) -> str:
    return f"{view}/{shard:03d}.windows"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class StateDir:
    """Read a state directory after checking that it is whole, and fits features and shard count.

    A shard that is missing would silently start empty, so all are read once at the start.

    Raises StateError, saying what to run, if it does not.
    """

    def __init__(self, directory: Path, features: FeatureSet, shards: int) -> None:
        self.directory = directory
        again = "compute it again with python -m features.offline --state"
        try:
            data = (directory / "manifest.json").read_bytes()
            self.manifest = msgspec.json.decode(data, type=StateManifest)
        except FileNotFoundError:
            raise StateError(
                f"{directory} holds no window state (no manifest.json); {again}"
            ) from None
        except msgspec.MsgspecError as error:
            raise StateError(f"{directory}/manifest.json is damaged ({error}); {again}") from error
        expected = {"format": FORMAT, "schema_hash": features.schema_hash, "shards": shards}
        for name, value in expected.items():
            found = getattr(self.manifest, name)
            if found != value:
                raise StateError(
                    f"the window state in {directory} has {name} {found!r}, this flow needs "
                    f"{value!r}; {again}"
                )

        if not self.manifest.files:
            raise StateError(f"{directory}/manifest.json lists no snapshot; {again}")
        for path, expected_hash in self.manifest.files.items():
            try:
                found_hash = _sha256((directory / path).read_bytes())
            except OSError as error:
                raise StateError(f"{directory}/{path}: {error.strerror}; {again}") from error
            if found_hash != expected_hash:
                raise StateError(f"{directory}/{path} is damaged (its sha256 differs); {again}")

    def read(self, view: str, shard: int) -> bytes | None:
        """Return one shard's snapshot, or None if it had no event."""
        path = _path(view, shard)
        return (self.directory / path).read_bytes() if path in self.manifest.files else None
