"""Real online stores for tests: SQLite in a file, and Debian's redis-server on a free port."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import profiles

ROOT = Path(__file__).parents[2]
FIRST = profiles.parse_day("2018-06-01")
DAYS = 12
LAST = FIRST + (DAYS - 1) * profiles.DAY_MS
CARDS, TERMINALS = 150, 100
KEYS = {
    profiles.CUSTOMER_PROFILE: np.array([f"C{n:04d}".encode() for n in range(CARDS)]),
    profiles.TERMINAL_PROFILE: np.array([f"T{n:04d}".encode() for n in range(TERMINALS)]),
}


@dataclass
class Redis:
    """A redis-server that keeps nothing."""

    port: int
    process: subprocess.Popen

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self):
        import redis
        from redis.backoff import ConstantBackoff
        from redis.retry import Retry

        return redis.Redis(port=self.port, retry=Retry(ConstantBackoff(0.02), 500))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class SlowProxy:
    """Pass a TCP port on; hold every answer back for `delay_s`."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "SlowProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:  # gone, as the client will notice
                    client.close()
                    continue
                for ends in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError), source, sink:
            while data := source.recv(65_536):
                if answers:
                    time.sleep(self.delay_s)  # the fault itself
                sink.sendall(data)


def start_redis(folder: Path) -> Redis:
    """Start a server in a folder and wait until it answers PING."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    command += ["--save", "", "--appendonly", "no", "--logfile", str(folder / "redis.log")]
    server = Redis(port, subprocess.Popen(command))
    server.client().ping()
    return server


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Redis]:
    """A Redis of this test's own."""
    server = start_redis(tmp_path)
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "redis"], scope="session")
def online(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Give a function that names a fresh, empty store: the argument `online` of write_repo."""
    if request.param == "sqlite":
        yield lambda: "sqlite"
        return
    server = start_redis(tmp_path_factory.mktemp("redis"))
    databases = iter(range(16))

    def fresh() -> str:
        return f"{server.url}/{next(databases)}"

    yield fresh
    server.stop()


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small history in the four files of the handbook command."""
    folder = tmp_path_factory.mktemp("history")
    write_history(folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def profile_files(history: Path) -> Path:
    """The profiles of that history, for every midnight of it."""
    return build_profiles(history, history / "profiles")


def build_profiles(history: Path, out: Path) -> Path:
    """Build every midnight of a history."""
    names = ("transactions", "fraud_reports", "customers", "terminals")
    files = {name: history / f"{name}.parquet" for name in names}
    profiles.build(
        **files, out=out, created_ms=LAST, from_ms=FIRST, until_ms=FIRST + (DAYS - 1) * 86_400_000
    )
    return out


def write_history(folder: Path, seed: int, transactions: int = 4_000) -> None:
    """Write random transactions and reports; a fifth of the entities have none."""
    rng = np.random.default_rng(seed)
    moment = np.sort(rng.integers(FIRST, FIRST + DAYS * profiles.DAY_MS, transactions))
    ids = np.array([f"tx{n:07d}" for n in range(transactions)])
    card = KEYS[profiles.CUSTOMER_PROFILE][rng.integers(0, CARDS * 4 // 5, transactions)]
    terminal = KEYS[profiles.TERMINAL_PROFILE][rng.integers(0, TERMINALS * 4 // 5, transactions)]
    fraud = np.sort(rng.choice(transactions, transactions // 10, replace=False))
    frames = {
        "transactions": {
            "transaction_id": ids,
            "card_id": card.astype("U"),
            "terminal_id": terminal.astype("U"),
            "event_time": moment,
            "amount_cents": rng.integers(0, 30_000, transactions),
        },
        "fraud_reports": {
            "transaction_id": ids[fraud],
            "terminal_id": terminal[fraud].astype("U"),
            "event_time": moment[fraud],
            "report_time": moment[fraud] + rng.integers(3_600_000, 7 * 86_400_000, len(fraud)),
        },
        "customers": {
            "card_id": KEYS[profiles.CUSTOMER_PROFILE].astype("U"),
            "x": rng.uniform(0, 100, CARDS),
            "y": rng.uniform(0, 100, CARDS),
        },
        "terminals": {
            "terminal_id": KEYS[profiles.TERMINAL_PROFILE].astype("U"),
            "x": rng.uniform(0, 100, TERMINALS),
            "y": rng.uniform(0, 100, TERMINALS),
        },
    }
    for name, columns in frames.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def spy(calls: list[list[bytes]], read: Callable) -> Callable:
    """Record the keys of every read of a reader."""

    def recorded(keys: list[bytes]):
        calls.append(list(keys))
        return read(keys)

    return recorded


def run_python(code: str, *arguments, env=None, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run a program in a fresh interpreter that finds the project's packages."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
