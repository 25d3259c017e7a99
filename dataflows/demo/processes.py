"""Processes that never outlive the one that started them.

A `Guard` is a small process that knows the process groups of the others and waits at a pipe. When
the pipe closes, because the program ended or was killed, it kills the groups that are left. This
needs nothing that only Linux has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from dataflows.demo import ROOT

Process = subprocess.Popen[bytes]


class Guard:
    """Start Python modules, each in a session of its own: a Ctrl-C in the terminal spares them."""

    def __init__(self) -> None:
        self._running: list[Process] = []
        self._guard = self._popen("dataflows.demo.processes", [], stdin=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill what is left."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()
        for process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)

    def start(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        piped: bool = False,
        stdout_to_log: bool = True,
    ) -> Process:
        """Run ``python -m module arguments`` in the repository; output goes to `log`.

        With `piped`, standard input is a pipe; without `stdout_to_log`, standard output is one.
        """
        with log.open("ab") as file:
            process = self._popen(
                module,
                arguments,
                env=env,
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=file if stdout_to_log else subprocess.PIPE,
                stderr=file,
            )
        self.adopt(process)
        return process

    def adopt(self, process: Process) -> None:
        """Guard a process that was started elsewhere, in a session of its own."""
        self._tell(f"+{process.pid}")
        self._running.append(process)

    def ended(self, process: Process) -> bool:
        """Return whether it has ended; its id may then belong to another process."""
        if process.poll() is None:
            return False
        if process in self._running:
            self._running.remove(process)
            self._tell(f"-{process.pid}")
        return True

    def _popen(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: IO[Any] | None = None,
    ) -> Process:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )

    def _tell(self, line: str) -> None:
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(f"{line}\n".encode())
            self._guard.stdin.flush()


def main() -> None:
    """Wait for the end of standard input, then kill the groups that are left."""
    # Ours, so that a polite signal to all of Python does not disarm the guard.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        sign, group = line[0], int(line[1:])
        (groups.add if sign == "+" else groups.discard)(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
