"""A state directory is taken whole and fitting, or refused with what to run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from features.fraud import FRAUD
from features.state_dir import FORMAT, StateDir, StateError, StateManifest, write_state

STATES = {"card": {0: b"zero", 7: b"seven"}, "terminal": {3: b"three"}}
MANIFEST = StateManifest(FORMAT, FRAUD.name, FRAUD.schema_hash, 16, 1000, {"Transaction": 5})
AGAIN = r"python -m features\.offline --state"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    write_state(tmp_path / "state", MANIFEST, STATES)
    return tmp_path / "state"


def test_what_was_written_is_read(state: Path) -> None:
    read = StateDir(state, FRAUD, 16)
    for view in STATES:
        for shard in range(16):
            assert read.read(view, shard) == STATES[view].get(shard)
    assert (read.manifest.until, read.manifest.events) == (1000, {"Transaction": 5})


def test_writing_again_replaces_everything(state: Path) -> None:
    write_state(state, MANIFEST, {"card": {1: b"one"}})
    read = StateDir(state, FRAUD, 16)
    assert (read.read("card", 1), read.read("card", 0)) == (b"one", None)
    assert [path.name for path in state.parent.iterdir()] == ["state"]


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("three years")
    with pytest.raises(StateError, match="something else .* name a new directory"):
        write_state(tmp_path, MANIFEST, STATES)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    write_state(tmp_path / "state", MANIFEST, STATES)
    assert StateDir(tmp_path / "state", FRAUD, 16).read("card", 7) == b"seven"


def test_another_shard_count_is_refused(state: Path) -> None:
    with pytest.raises(StateError, match=f"has shards 16, this flow needs 32; .*{AGAIN}"):
        StateDir(state, FRAUD, 32)


def test_other_features_are_refused(state: Path) -> None:
    other = replace(FRAUD, features=FRAUD.features[1:])
    with pytest.raises(StateError, match=f"schema_hash.*{other.schema_hash}.*{AGAIN}"):
        StateDir(state, other, 16)


def test_no_state_is_refused(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StateError, match=f"holds no window state .*{AGAIN}"):
            StateDir(directory, FRAUD, 16)


@pytest.mark.parametrize("manifest", [b"", b"{}", b"[]", b"\xff", b'{"format": "1"}'])
def test_a_damaged_manifest_is_refused(state: Path, manifest: bytes) -> None:
    (state / "manifest.json").write_bytes(manifest)
    with pytest.raises(StateError, match=rf"manifest\.json is damaged .*{AGAIN}"):
        StateDir(state, FRAUD, 16)


@pytest.mark.parametrize("harm", ["removed", "truncated", "swapped"])
def test_a_snapshot_that_is_not_the_one_written_is_refused(state: Path, harm: str) -> None:
    """A missing snapshot would be taken for a shard without events: silently empty windows."""
    victim = state / "card" / "007.windows"
    if harm == "removed":
        victim.unlink()
    elif harm == "truncated":
        victim.write_bytes(b"sev")
    else:
        victim.write_bytes(b"zero")
    with pytest.raises(StateError, match=rf"card/007\.windows.*{AGAIN}"):
        StateDir(state, FRAUD, 16)
