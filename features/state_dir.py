"""Window state on disk, by view and shard: where a new flow begins, instead of empty windows.

``features.offline --state DIR`` writes it; a flow without a snapshot starts from it.
"""

from __future__ import annotations

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


class StateError(ValueError):
    """A state directory is missing, damaged or of other features."""


def write_state(
    directory: Path, manifest: StateManifest, states: Mapping[str, Mapping[int, bytes]]
) -> None:
    """Write snapshots by view and shard, replacing what was there; all or nothing."""
    building = directory.with_name(directory.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    for view, shards in states.items():
        (building / view).mkdir(parents=True)
        for shard, snapshot in shards.items():
            (building / view / f"{shard:03d}.windows").write_bytes(snapshot)
    (building / "manifest.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    )
    shutil.rmtree(directory, ignore_errors=True)
    building.rename(directory)


class StateDir:
    """Read a state directory after checking that it fits these features and this shard count.

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

    def read(self, view: str, shard: int) -> bytes | None:
        """Return one shard's snapshot, or None if it had no event."""
        path = self.directory / view / f"{shard:03d}.windows"
        return path.read_bytes() if path.exists() else None
