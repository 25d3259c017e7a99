"""What must exist before the first event: data, profiles, window state, model, online store.

Each step is commands that a user would type. It is done once for a given content: of its code,
its arguments and the steps it needs. A step that did not finish is done again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dataflows.demo import ROOT
from dataflows.demo.processes import Guard, Process

MOST_AT_A_TIME = 2


class DemoError(RuntimeError):
    """Say what went wrong, and where to look."""


@dataclass(frozen=True)
class Step:
    """Name commands, what they write, and everything that decides the result."""

    name: str
    title: str
    #: ``python -m`` these, one after the other.
    commands: tuple[tuple[str, ...], ...]
    output: Path
    #: Files and folders of the repository: the code involved.
    code: tuple[str, ...]
    needs: tuple[Step, ...] = ()
    #: What else to write before the commands run.
    before: Callable[[], None] = lambda: None

    def key(self, home: Path, results: Mapping[Step, str]) -> str:
        """Return the hash of what decides the result; paths count relative to `home`.

        `results` are hashes of what the steps it needs have written: a change that made no
        difference ends there.
        """
        digest = hashlib.sha256(repr(self.commands).replace(str(home), "").encode())
        for name in self.code:
            for path in sorted((ROOT / name).glob("*.*")) or [ROOT / name]:
                digest.update(path.read_bytes())
        for step in self.needs:
            digest.update(results[step].encode())
        return digest.hexdigest()

    def result(self) -> str:
        """Return the hash of what the step has written."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.output.rglob("*") if path.is_file()):
            digest.update(str(path.relative_to(self.output)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Prepared:
    """Where the steps have written, and the stream time (ms) at which the demo begins."""

    handbook: Path
    state: Path
    model: Path
    feast: Path
    start: int
    steps: tuple[Step, ...]


def plan(home: Path, day: str, handbook: Path | None = None) -> Prepared:
    """Lay out the steps for a stream that begins at midnight (UTC) of `day`, under `home`.

    `handbook` is a directory with the data, if it has been generated elsewhere.
    """
    from features.profiles import parse_day

    windows = ("features/batch.py", "features/declare.py", "features/events.py",
               "features/fraud.py", "features/windows.py")  # fmt: skip
    data = handbook or home / "handbook"
    simulate = Step(
        "handbook",
        "simulate card transactions",
        () if handbook else (("model.handbook", "--out", str(data)),),
        data,
        ("model/handbook.py",),
    )
    streams = (
        "--transactions", f"{data}/transactions.parquet",
        "--fraud-reports", f"{data}/fraud_reports.parquet",
    )  # fmt: skip
    profiles, feast = home / "profiles", home / "feast"
    history, model = home / "history", home / "model"
    replayed = Step(
        "history",
        "replay history offline",
        (("features.offline", *streams, "--until", day, "--out", f"{history}/frame.parquet",
          "--state", f"{history}/state"),),
        history,
        (*windows, "features/offline.py", "features/state_dir.py"),
        (simulate,),
    )  # fmt: skip
    nightly = Step(
        "profiles",
        "build nightly profiles",
        (("features.profiles", "build", *streams, "--customers", f"{data}/customers.parquet",
          "--terminals", f"{data}/terminals.parquet", "--out", str(profiles)),),
        profiles,
        ("features/profiles.py",),
        (simulate,),
    )  # fmt: skip
    trained = Step(
        "model",
        "train and package the model",
        (("model.train", "--features", f"{history}/frame.parquet",
          "--labels", f"{data}/transactions.parquet", "--out", str(model)),),
        model,
        ("model/train.py", "model/metrics.py", "model/export.py", "model/package.py",
         "model/scorer.py", "requirements.lock"),
        (replayed,),
    )  # fmt: skip

    def write_repo() -> None:
        from features.online_store import write_repo

        write_repo(feast)

    loaded = Step(
        "feast",
        "fill Feast's online store",
        (("features.profiles", "materialize", "--repo", str(feast), "--until", day,
          "--profiles", str(profiles)),),
        feast,
        ("features/online_store.py", "features/feast_repo", "requirements.lock"),
        (nightly,),
        write_repo,
    )  # fmt: skip
    return Prepared(
        handbook=data,
        state=history / "state",
        model=model,
        feast=feast,
        start=parse_day(day),
        steps=(simulate, replayed, nightly, trained, loaded),
    )


def prepare(prepared: Prepared, home: Path, guard: Guard, console: Console) -> None:
    """Do the steps that have not been done for their content; raise DemoError if one fails."""
    stamps, logs = home / "stamps", home / "logs"
    for folder in (stamps, logs):
        folder.mkdir(parents=True, exist_ok=True)
    results: dict[Step, str] = {}  # of the steps that are done
    running: dict[Step, _Run] = {}

    def waiting() -> list[Step]:
        """Return the steps that could run now; pass over those that were done before."""
        able = []
        for step in prepared.steps:
            if step in results or step in running or not all(n in results for n in step.needs):
                continue
            stamp = _read_stamp(stamps / step.name)
            if not step.commands:
                results[step] = step.result()
            elif step.output.exists() and stamp.get("key") == step.key(home, results):
                results[step] = stamp["result"]
            else:
                able.append(step)
        return able

    if not waiting() and len(results) == len(prepared.steps):
        console.print(f"[dim]Data, windows, profiles and model are ready in {home}.[/]")
        return
    show = _Bars(console) if console.is_terminal else _Lines(console)
    for step in prepared.steps:
        show.add(step)
    with show:
        while len(results) < len(prepared.steps):
            for step in waiting()[: MOST_AT_A_TIME - len(running)]:
                (stamps / step.name).unlink(missing_ok=True)
                shutil.rmtree(step.output, ignore_errors=True)
                running[step] = _Run(
                    step, step.key(home, results), guard, logs / f"{step.name}.log"
                )
            for step, run in list(running.items()):
                if run.advance():
                    stamp = {"key": run.key, "result": step.result()}
                    (stamps / step.name).write_text(json.dumps(stamp))
                    results[step] = stamp["result"]
                    del running[step]
                    show.done(step, f"{time.monotonic() - run.began:.0f} s")
                else:
                    show.running(step, run)
            for step in results:
                show.done(step, "done before")
            time.sleep(0.1)


class _Run:
    """A step being done: its commands one after the other, in terminal mode, into a log."""

    def __init__(self, step: Step, key: str, guard: Guard, log: Path) -> None:
        self.step, self.key, self.log, self._guard = step, key, log, guard
        self._left = list(step.commands)
        self._process: Process | None = None
        self._module = ""
        self.began = time.monotonic()
        log.unlink(missing_ok=True)
        step.before()

    def advance(self) -> bool:
        """Start the next command if one has ended; return whether all have."""
        if self._process is not None:
            if not self._guard.ended(self._process):
                return False
            if self._process.returncode != 0:
                raise failure(
                    f"{self.step.title}: `python -m {self._module}` ended with "
                    f"{self._process.returncode}",
                    self.log,
                )
        if not self._left:
            return True
        module, *arguments = self._left.pop(0)
        self._module = module
        # As on a terminal, so that a command that shows its progress there shows it to us.
        terminal = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}
        self._process = self._guard.start(module, arguments, log=self.log, env=terminal)
        return False

    def progress(self) -> tuple[int, int] | None:
        """Return (done, total) if the command says so."""
        found = re.search(r"([\d,]+)/([\d,]+)", self.says())
        if found is None:
            return None
        done, total = (int(number.replace(",", "") or 0) for number in found.groups())
        return (done, total) if total else None

    def says(self) -> str:
        """Return the command's last line, or the command before it has said anything."""
        spoken = last_lines(self.log, 1)
        return _DRAWING.sub("", spoken[0]).strip() if spoken else f"python -m {self._module}"


class _Bars:
    """Steps as progress bars, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._rows: dict[Step, str | _Run] = {}
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._table)

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def add(self, step: Step) -> None:
        self._rows[step] = ""

    def running(self, step: Step, run: _Run) -> None:
        self._rows[step] = run

    def done(self, step: Step, note: str) -> None:
        if not isinstance(self._rows[step], str) or not self._rows[step]:
            self._rows[step] = note

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=1)
        table.add_column(
            width=max((len(step.title) for step in self._rows), default=1), no_wrap=True
        )
        table.add_column(width=16)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for step, row in self._rows.items():
            if isinstance(row, str):
                bar = ProgressBar(total=1, completed=int(row != ""), width=16)
                mark = Text("✓" if row else " ", "green")
                table.add_row(mark, Text(step.title), bar, Text(row, "dim"))
                continue
            done, total = row.progress() or (0, None)
            table.add_row(
                Text("›", "cyan"),
                Text(step.title),
                ProgressBar(total=total, completed=done, pulse=total is None, width=16),
                Text(f"{time.monotonic() - row.began:.0f} s  {row.says()}", "dim"),
            )
        return table


class _Lines:
    """Steps as lines, elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: set[tuple[Step, bool]] = set()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, step: Step) -> None:
        pass

    def running(self, step: Step, run: _Run) -> None:
        self._say(step, False, "…")

    def done(self, step: Step, note: str) -> None:
        self._say(step, True, note)

    def _say(self, step: Step, done: bool, note: str) -> None:
        if (step, done) not in self._said:
            self._said.add((step, done))
            self._console.print(f"{step.title}: {note}", soft_wrap=True)


_DRAWING = re.compile(r"[\u2500-\u257f\u2800-\u28ff]+")  # bars and spinners
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


def last_lines(log: Path, n: int) -> list[str]:
    """Return the last lines of a log that are not blank, without control codes."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = [line.strip() for line in re.split(r"[\r\n]+", _CONTROL.sub("", text))]
    return [line for line in lines if line][-n:]


def failure(what: str, log: Path) -> DemoError:
    """Return an error that shows the end of a log and says where the rest is."""
    shown = "\n".join(f"  | {line}" for line in last_lines(log, 15))
    return DemoError(f"{what}. The end of {log}:\n{shown or '  | (empty)'}")


def _read_stamp(path: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if found.keys() == {"key", "result"} else {}
