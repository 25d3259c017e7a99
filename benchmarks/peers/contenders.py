"""Who takes part, with what durability, in which virtual environment, and the budgets."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).parent / "requirements"
VENVS = ROOT / ".cache" / "venvs"


class CannotInstall(RuntimeError):
    """A contender's virtual environment cannot be made; with the end of what pip said."""


@dataclass(frozen=True)
class Contender:
    """One way to do the job.

    Attributes:
        module: in this package, run as a process.
        durability: what survives a crash, in words.
        share: of the cards whose events it gets, so that a run ends within a minute or so; their
            windows are the same. Those that get all events run in every round.
        venv: name of its requirements; None: the project's own environment.
        command: what its module is called with.
        dataflow: the module is a Bytewax dataflow, started by ``bytewax.run`` with recovery.
        budget: our own rate over this one's must be at least this; None: no budget.
    """

    name: str
    module: str
    durability: str
    share: float = 1.0
    venv: str | None = None
    command: tuple[str, ...] = ()
    dataflow: bool = False
    budget: float | None = None

    def python(self) -> Path:
        """Return its interpreter; make its virtual environment first if it is not there.

        Raises CannotInstall.
        """
        if self.venv is None:
            return Path(sys.executable)
        requirements = REQUIREMENTS / f"{self.venv}.txt"
        key = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
        directory = VENVS / f"{self.venv}-{key}"
        if not directory.exists():
            staging = directory.with_suffix(".new")
            shutil.rmtree(staging, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(staging)])
            pip = [str(staging / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            _run([*pip, "--disable-pip-version-check", "--require-hashes", "-r", str(requirements)])
            staging.rename(directory)
        return directory / "bin" / "python"

    def arguments(self, state: Path) -> list[str]:
        """Return what the interpreter is called with; `state` is an empty directory."""
        module = f"benchmarks.peers.{self.module}"
        if self.dataflow:
            return ["-m", "bytewax.run", module, "-r", str(state), "-s", "10", "-b", "0"]
        return ["-m", module, *self.command]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise CannotInstall(
            f"`{' '.join(command[1:4])} …` failed: {said[-1][:200] if said else ''}"
        )


CEILING = "ceiling loop"
OURS = "this project"

#: The budget of the ceiling is the other way round: our rate is a share of it.
CONTENDERS: tuple[Contender, ...] = (
    Contender(CEILING, "ceiling", "none", budget=0.35),
    Contender(
        OURS,
        "ours",
        "at least once: snapshots of windows and offsets every 10 s, every delivery checked",
        dataflow=True,
    ),
    Contender(
        "hand-written loop",
        "hand_loop",
        "none: windows are lost with the process, deliveries are not checked",
        budget=1.5,
    ),
    Contender(
        "Bytewax, `stateful_map`",
        "plain_bytewax",
        "snapshots of windows and offsets every 10 s; its sink does not check deliveries",
        share=0.25,
        dataflow=True,
    ),
    Contender(
        "Quix Streams, state",
        "quix_state",
        "at least once: RocksDB, changelog topic, checkpoint every 5 s",
        share=0.15,
        venv="quix",
        budget=5.0,
    ),
    Contender(
        "Quix Streams, `sliding_window`",
        "quix_sliding",
        "at least once: RocksDB, changelog topics, checkpoint every 5 s",
        share=0.015,
        venv="quix",
        budget=5.0,
    ),
    Contender(
        "Faust, `Table`",
        "faust",
        "at least once: RocksDB, changelog topic, offsets every 2.8 s",
        share=0.025,
        venv="faust",
        command=("-L", "uvloop", "worker", "--without-web", "--loglevel", "info"),
        budget=20.0,
    ),
    Contender(
        "Pathway, `interval_join`",
        "pathway",
        "at least once: log of the input, snapshot every 10 s",
        share=0.025,
        venv="pathway",
        budget=20.0,
    ),
)
