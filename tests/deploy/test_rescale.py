"""`k8s/rescale.sh`, on directories that a fake kubectl takes for volumes: the moves are real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflows import recovery
from dataflows.parts import split
from tests.deploy.manifests import K8S, ROOT
from tests.unit.test_parts import mark, marks

SCRIPT = K8S / "rescale.sh"
PARTS = 8


@dataclass
class Cluster:
    """A namespace with the flow, and an overlay that says how many processes it shall have."""

    home: Path
    overlay: Path
    kubectl: Path

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "cluster.json").read_text())
        return found

    def change(self, **more: Any) -> None:
        (self.home / "cluster.json").write_text(json.dumps({**self.state, **more}))

    def want(self, processes: int, *, said: int | None = None) -> None:
        """Write the new number into the overlay, as its README says."""
        file = self.overlay / "kustomization.yaml"
        content = yaml.safe_load(file.read_text())
        content["replicas"] = [{"name": "fraud-scoring", "count": processes}]
        literals = [f"PROCESSES={processes if said is None else said}"]
        content["configMapGenerator"][0]["literals"] = literals
        file.write_text(yaml.safe_dump(content))
        hosts = [f"fraud-scoring-{n}.fraud-scoring:9999\n" for n in range(processes)]
        (self.overlay / "hosts").write_text("".join(hosts))

    def rescale(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, self.overlay],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}",
                "KUBECTL_STATE": str(self.home),
                "KUBECTL": str(self.kubectl),
                "ROOT": str(ROOT),
                "PYTHONPATH": str(ROOT),
                "RESCALE_TIMEOUT": "4",
            },
        )

    def volumes(self) -> list[Path]:
        """Return the recovery directories, by process."""
        names = sorted(self.state["claims"], key=lambda name: int(name.rpartition("-")[2]))
        return [self.home / "volumes" / name / "recovery" for name in names]

    def check(self, processes: int) -> None:
        """Each part is there once, with its content, at the process it belongs to; all run."""
        assert self.state["replicas"] == processes
        assert self.state["jobs"] == {}
        found = self.volumes()
        for number, directory in enumerate(found):
            expected = range(number, PARTS, processes) if number < processes else range(0)
            held = recovery.parts_of(directory) if directory.exists() else []
            assert [path.name for path in held] == [f"part-{n}.sqlite3" for n in expected]
        assert marks(found) == {f"part-{n}.sqlite3": [n] for n in range(PARTS)}
        for number in range(processes):  # what the init container does finds nothing to do
            split(found[number], number, processes, PARTS)


@pytest.fixture
def cluster(tmp_path: Path, tools: Path) -> Cluster:
    """Return two processes that have run."""
    shutil.copytree(K8S, tmp_path / "k8s")
    made = Cluster(tmp_path, tmp_path / "k8s" / "overlays" / "cluster", tools / "kubectl")
    (tmp_path / "bin").mkdir()
    kubectl = tmp_path / "bin" / "kubectl"
    fake = Path(__file__).with_name("kubectl.py")
    kubectl.write_text(f'#!/bin/sh\nexec {sys.executable} {fake} "$@"\n')
    kubectl.chmod(0o755)
    claims = {f"recovery-fraud-scoring-{n}": {} for n in range(2)}
    blank = {"replicas": 2, "claims": claims, "jobs": {}, "calls": []}
    (tmp_path / "cluster.json").write_text(json.dumps(blank))
    for number, directory in enumerate(made.volumes()):
        directory.parent.mkdir(parents=True)
        split(directory, number, 2, PARTS)
    mark(made.volumes())
    made.check(2)
    return made


def test_more_processes_and_fewer_again(cluster: Cluster) -> None:
    for processes in (3, 2, 5, 1):
        cluster.want(processes)
        done = cluster.rescale()
        assert done.returncode == 0, done.stderr
        assert f"fraud/fraud-scoring starts with {processes} processes" in done.stdout
        cluster.check(processes)
    assert "recovery-fraud-scoring-1 and up hold no part" in done.stdout


def test_twice_is_harmless(cluster: Cluster) -> None:
    cluster.want(3)
    for _ in range(2):
        done = cluster.rescale()
        assert done.returncode == 0, done.stderr
        cluster.check(3)


def test_interrupted_anywhere_it_ends_the_same_when_repeated(cluster: Cluster) -> None:
    cluster.want(3)
    assert cluster.rescale().returncode == 0
    calls = cluster.state["calls"]
    assert len(calls) > 10
    for at in range(len(calls)):
        cluster.want(2)
        assert cluster.rescale().returncode == 0
        left_over = cluster.state["claims"]
        shutil.rmtree(cluster.home / "volumes" / "recovery-fraud-scoring-2")
        del left_over["recovery-fraud-scoring-2"]
        cluster.want(3)
        cluster.change(calls=[], fail_at=at, claims=left_over)
        first = cluster.rescale()
        assert first.returncode != 0 or calls[at].endswith("logs job/fraud-scoring-rescale")
        cluster.change(fail_at=None)
        again = cluster.rescale()
        assert again.returncode == 0, (calls[at], again.stderr)
        cluster.check(3)


def test_a_move_that_fails_leaves_all_stopped_and_says_what_to_do(cluster: Cluster) -> None:
    cluster.want(3)
    part = cluster.volumes()[1] / "part-1.sqlite3"
    away = part.rename(cluster.home / "away")
    done = cluster.rescale()
    assert done.returncode == 1
    assert "the directories hold the parts 0, 2, 3" in done.stdout  # the Job's log
    assert "the parts were not moved (Failed). Nothing runs, replicas stay 0" in done.stderr
    assert "run this again" in done.stderr
    assert cluster.state["replicas"] == 0
    away.rename(part)
    assert cluster.rescale().returncode == 0
    cluster.check(3)


def test_processes_that_do_not_end_are_not_moved_away_from(cluster: Cluster) -> None:
    cluster.want(3)
    cluster.change(stuck=True)
    done = cluster.rescale()
    assert done.returncode == 1
    assert "not all processes have ended within 4 s" in done.stderr
    assert len(cluster.state["claims"]) == 2
    applied = [call for call in cluster.state["calls"] if call.startswith("apply")]
    assert all("--dry-run=server" in call for call in applied)


def test_more_processes_than_parts_are_refused(cluster: Cluster) -> None:
    cluster.want(PARTS + 1)
    done = cluster.rescale()
    assert done.returncode == 1
    assert "8 parts is for 8 processes at most" in done.stderr
    cluster.check(2)
    cluster.want(PARTS)
    assert cluster.rescale().returncode == 0
    cluster.check(PARTS)


def test_an_overlay_that_was_applied_too_early_costs_no_state(cluster: Cluster) -> None:
    """Then the init container of the new process has made empty parts on its volume."""
    cluster.want(3)
    new = cluster.home / "volumes" / "recovery-fraud-scoring-2"
    new.mkdir()
    split(new / "recovery", 2, 3, PARTS)
    cluster.change(claims={**cluster.state["claims"], new.name: {}}, replicas=3)
    done = cluster.rescale()
    assert done.returncode == 0, done.stderr
    cluster.check(3)


def test_what_the_server_does_not_take_stops_nothing(cluster: Cluster) -> None:
    cluster.want(3)
    cluster.change(refuses=True)
    done = cluster.rescale()
    assert done.returncode == 1
    assert "does not take" in done.stderr
    cluster.check(2)


def test_what_contradicts_itself_changes_nothing(cluster: Cluster) -> None:
    cluster.want(3, said=2)
    done = cluster.rescale()
    assert done.returncode == 1
    assert "contradicts itself: replicas 3, PROCESSES 2, hosts fraud-scoring-0." in done.stderr
    cluster.want(3)
    file = cluster.overlay / "hosts"
    file.write_text(file.read_text().replace("scoring-2", "scoring-1"))
    assert "contradicts itself: replicas 3, PROCESSES 3" in cluster.rescale().stderr
    cluster.check(2)
    cluster.want(0)
    assert "say how many processes" in cluster.rescale().stderr
    cluster.overlay = cluster.home / "k8s" / "base"
    assert "is not a cluster" in cluster.rescale().stderr
    cluster.check(2)


def test_a_flow_that_was_never_started_is_refused(cluster: Cluster) -> None:
    cluster.change(replicas=None)
    done = cluster.rescale()
    assert "a first start needs only kubectl apply -k" in done.stderr


def test_shellcheck_finds_nothing(tools: Path) -> None:
    scripts = [
        path for folder in ("k8s", "waxctl", ".ci") for path in (ROOT / folder).rglob("*.sh")
    ]
    done = subprocess.run(
        [tools / "shellcheck", *scripts, ROOT / ".ci" / "run"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
