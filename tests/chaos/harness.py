"""Runs of the real flow under steady load, killed again and again on the same topics and store."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dataflows.parts import split
from dataflows.settings import Settings
from tests.chaos import check
from tests.chaos.load import Item, Load, with_trouble
from tests.chaos.reader import Place, Reader, resume_offsets
from tests.integration.flow import PARTITIONS, ROOT
from tests.kafka.client import TestBroker

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
INPUTS = ("transactions", "fraud_reports")
OUTPUTS = ("predictions", "audit", "dead_letters")

#: Events per second, by number of processes. These do not wait for each other's partitions, and a
#: second of two hundred events is half an hour of the handbook.
RATES = {1: 300, 2: 150}
#: The flow's own bound of what may come late (LATENESS in features/fraud.py).
LATENESS_MS = DAY_MS
_START_S = 120.0
_POINT_S = 60.0
_END_S = 30.0
_COMPLETE_S = 90.0

#: Where to kill, by delivery mode; see `tests.chaos.instrumented`. `random`: at a random time.
POINTS: Mapping[str, tuple[str, ...]] = {
    "exactly_once": (
        "startup", "tail_scan", "transaction", "committed", "snapshot", "draining_before",
        "draining_after", "random",
    ),
    "at_least_once": (
        "startup", "written", "committed", "snapshot", "draining_before", "draining_after",
        "random",
    ),
}  # fmt: skip
#: Passings of each point in the first seconds of a life: the one to kill at is drawn from these.
_PASSINGS = {
    "startup": 1, "tail_scan": 3, "transaction": 40, "written": 60, "committed": 12,
    "snapshot": 80, "draining_before": 1, "draining_after": 2,
}  # fmt: skip
#: Every process passes these; the others are announced by whichever process comes there first.
_PASSED_BY_ALL = frozenset({"startup", "snapshot", "draining_before", "draining_after"})


class Broken(AssertionError):
    """The flow did something that is wrong whatever the outputs say."""


@dataclass(frozen=True)
class Assets:
    """What all runs use: the broker, the data, the model, Feast, and the state of the days before.

    `state` is as of `midnight`, a day of the data in ms.
    """

    broker: TestBroker
    handbook: Path
    midnight: int
    state: Path
    model: Path
    feast: Path


@dataclass(frozen=True)
class Setting:
    """What a run is about."""

    delivery: str
    processes: int = 1
    duplicates: bool = False
    #: Whether each process has a recovery directory of its own.
    apart: bool = False

    def __str__(self) -> str:
        again = "duplicates" if self.duplicates else "no duplicates"
        apart = " apart" if self.apart else ""
        return f"{self.delivery}, {self.processes} process(es){apart}, {again}"


@dataclass(frozen=True)
class Kill:
    """Where to kill: at the n-th passing of a point, or some seconds after reading began."""

    point: str
    nth: int
    victim: int
    #: Kill all processes; else the victim, after which the others must end by themselves.
    all: bool
    #: For `random`: seconds; counted from the launch if `early`, else from the first read.
    after_s: float
    early: bool

    @staticmethod
    def draw(point: str, processes: int, rng: random.Random) -> Kill:
        """Draw everything but the point."""
        early = rng.random() < 0.2
        return Kill(
            point,
            rng.randint(1, _PASSINGS.get(point, 1)),
            rng.randrange(processes),
            rng.random() < 0.25 or (point == "random" and early),
            rng.uniform(0, 6) if early else rng.uniform(0, 2.5),
            early,
        )


def events(assets: Assets, days: int, margin_ms: int) -> list[Item]:
    """Return some days of the handbook in order of stream time; reports first at equal times.

    A report counts for a transaction of its terminal from seven days after the reported one. Where
    it was made less than `margin_ms` (of stream time) before the first of these, it is left out:
    partitions that are read that far apart could bring it too late, and rightly so.
    """
    end = assets.midnight + days * DAY_MS
    between = [("event_time", ">=", assets.midnight), ("event_time", "<", end)]
    rows: list[tuple[int, int, Item]] = []
    by_terminal: dict[str, list[int]] = {}
    table = pq.read_table(assets.handbook / "transactions.parquet", filters=between)
    for row in table.to_pylist():
        at = row["event_time"]
        by_terminal.setdefault(row["terminal_id"], []).append(at)
        event = {name: row[name] for name in ("transaction_id", "card_id", "terminal_id")}
        event |= {"event_time": at, "amount": row["amount_cents"] / 100}
        rows.append((at, 1, _item("transactions", row["card_id"], event, at)))
    between = [("report_time", ">=", assets.midnight), ("report_time", "<", end)]
    for row in pq.read_table(
        assets.handbook / "fraud_reports.parquet", filters=between
    ).to_pylist():
        at, counts = row["report_time"], row["event_time"] + 7 * DAY_MS
        asking = [t for t in by_terminal.get(row["terminal_id"], []) if t >= counts]
        if asking and min(asking) - at < margin_ms:
            continue
        rows.append((at, 0, _item("fraud_reports", row["terminal_id"], row, at)))
    rows.sort(key=lambda row: row[:2])
    return [item for _, _, item in rows]


def _item(topic: str, key: str, event: Mapping[str, Any], at: int) -> Item:
    return Item(topic, key.encode(), json.dumps(event).encode(), event["transaction_id"], at)


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    log: Path
    hold: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self.popen.poll() is not None

    def says(self, words: str) -> bool:
        return words in self.text


@dataclass
class Flow:
    """One flow, of one or more processes, on a recovery store; started and ended many times."""

    variables: Mapping[str, str]
    directory: Path
    recovery: Path
    count: int
    lives: int = 0
    running: dict[int, _Process] = field(default_factory=dict)
    logs: list[Path] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    apart: bool = False

    @property
    def stores(self) -> list[Path]:
        """Return the directories with the parts of the recovery store."""
        if not self.apart:
            return [self.recovery]
        return [self.recovery.with_name(f"{self.recovery.name}-{n}") for n in range(self.count)]

    def start(self, hold: str = "", at: Sequence[int] = ()) -> None:
        """Start the processes that do not run; those of `at` will hold at the point ``hold``."""
        self.lives += 1
        if not self.running:  # one that waits for the others knows their old addresses
            self.ports = [_free_port() for _ in range(self.count)]
            if self.apart:
                for number, store in enumerate(self.stores):
                    split(store, number, self.count, 2 * self.count + 1)
        for number in range(self.count):
            if number not in self.running:
                self.running[number] = self._launch(number, hold if number in at else "")

    def _launch(self, number: int, hold: str) -> _Process:
        name = f"life{self.lives:03d}-{number}"
        log, file = self.directory / f"{name}.log", self.directory / f"{name}.held"
        clean = {k: v for k, v in os.environ.items() if k.lower() not in Settings.model_fields}
        clean.pop("SETTINGS_FILE", None)
        command = [sys.executable, "-m", "bytewax.run", "tests.chaos.instrumented"]
        command += ["-r", str(self.stores[number if self.apart else 0]), "-s", "1", "-b", "0"]
        if self.count > 1:
            # Apart, each meets the others at one port of an address of its own.
            hosts = [f"127.0.0.{n + 1 if self.apart else 1}" for n in range(self.count)]
            pairs = zip(hosts, self.ports, strict=True)
            addresses = ";".join(f"{host}:{port}" for host, port in pairs)
            command += ["-i", str(number), "-a", addresses]
        meet = {"PEERS_PORT": str(self.ports[0] + 1)} if self.apart else {}
        own = meet | {"CHAOS_HOLD": hold, "CHAOS_HOLD_FILE": str(file), "LOG_FORMAT": "json"}
        with log.open("wb") as output:
            popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**clean, "PYTHONPATH": str(ROOT), **self.variables, **own},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.logs.append(log)
        return _Process(popen, log, file)

    def wait(self, condition: Callable[[_Process], bool], what: str, *, any: bool = False,
             timeout_s: float = _START_S) -> list[int]:  # fmt: skip
        """Wait until it holds for all processes, or for any; return for which. None may end."""
        deadline = time.monotonic() + timeout_s
        while True:
            met = [number for number, process in self.running.items() if condition(process)]
            if len(met) == len(self.running) or (any and met):
                return met
            for number, process in self.running.items():
                if number not in met and process.ended:
                    raise Broken(f"process {number} ended before {what}:\n{process.text[-3000:]}")
            if time.monotonic() > deadline:
                tails = "\n".join(process.text[-1500:] for process in self.running.values())
                raise Broken(f"not within {timeout_s:g} s: {what}\n{tails}")
            time.sleep(0.02)

    def live(self, seconds: float) -> None:
        """Let it run for some time, which it has to survive."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for number, process in self.running.items():
                if process.ended:
                    raise Broken(f"process {number} ended by itself:\n{process.text[-3000:]}")
            time.sleep(min(left, 0.05))

    def await_reading(self) -> None:
        self.wait(lambda process: process.says('"reading {'), "it reads")

    def signal(self, number: int) -> None:
        for process in self.running.values():
            process.popen.send_signal(number)

    def kill(self, numbers: Sequence[int]) -> None:
        """SIGKILL some processes, and let go of those that are held."""
        for number in numbers:
            process = self.running.pop(number)
            process.popen.kill()
            process.popen.wait()
        for process in self.running.values():
            process.hold.with_name(process.hold.name + ".release").touch()

    def await_end(self, timeout_s: float = _END_S) -> list[int]:
        """Wait until what runs has ended; return the exit codes."""
        deadline = time.monotonic() + timeout_s
        codes = []
        for number, process in list(self.running.items()):
            try:
                codes.append(process.popen.wait(max(0.01, deadline - time.monotonic())))
                del self.running[number]
            except subprocess.TimeoutExpired:
                raise Broken(
                    f"process {number} had not ended after {timeout_s:g} s:\n{process.text[-3000:]}"
                ) from None
        return codes

    def compared(self) -> int:
        """Return how many records all lives found published after their snapshots."""
        words = re.compile(r"(\d+) records published since the last snapshot")
        return sum(int(n) for log in self.logs for n in words.findall(log.read_text()))


class Run:
    """A flow under steady load on topics of its own. Call `close` in the end."""

    def __init__(
        self, assets: Assets, directory: Path, setting: Setting, rng: random.Random, off: str = ""
    ) -> None:
        self.setting, self.rng, self.assets = setting, rng, assets
        self.directory = directory
        directory.mkdir(parents=True)
        broker = assets.broker
        self.topics = {name: broker.topic(f"chaos_{name}", n) for name, n in PARTITIONS.items()}
        servers = broker.config["bootstrap.servers"]
        self.variables = {
            "KAFKA_BOOTSTRAP_SERVERS": servers,
            "GROUP_ID": f"group_{self.topics['transactions']}",
            "MODEL_DIR": str(assets.model),
            "FEAST_REPO": str(assets.feast),
            "STATE_DIR": str(assets.state),
            "DELIVERY": setting.delivery,
            "DEDUPE": str(setting.duplicates).lower(),
            "AUDIT_SHARE": "1",
            "CHAOS_OFF": off,
            **{f"{name.upper()}_TOPIC": topic for name, topic in self.topics.items()},
        }
        # Two processes do not wait for each other's partitions: see `events`.
        # Within seven days no transaction counts for another one of its terminal.
        alone = setting.processes == 1
        plain = events(assets, 12 if alone else 6, HOUR_MS if alone else LATENESS_MS)
        items = with_trouble(plain, rng, duplicates=setting.duplicates)
        self.flow = Flow(
            self.variables,
            directory,
            directory / "recovery",
            setting.processes,
            apart=setting.apart,
        )
        self.reader = Reader(servers, self.topics.values())
        self.load = Load(servers, self.topics, items, RATES[setting.processes])
        self.load.start()
        self.lives: list[check.Life] = []
        self._newest: list[int] = []  # stream time of the load when each life had ended
        self.kills: list[Kill] = []

    def close(self) -> None:
        """End what runs."""
        self.flow.kill(list(self.flow.running))
        if self.load.is_alive():
            self.load.stop()
        self.reader.close()

    def _await_silence(self) -> dict[Place, int]:
        """Wait until nothing of an earlier life is under way to the brokers: a slow one may still
        have a killed process's last requests before it. Return where the outputs end."""
        outputs = [self.topics[name] for name in OUTPUTS]
        ends = self.reader.ends(outputs)
        while True:
            time.sleep(0.5)
            before, ends = ends, self.reader.ends(outputs)
            if ends == before:
                return ends

    def note_life(self, ends: dict[Place, int]) -> None:
        """Note where this life goes on reading, and where its outputs begin: the ends before it was
        started, for it may have written before they could be asked for."""
        self._newest.append(self.load.stream_time)
        self.lives.append(check.Life(resume_offsets(*self.flow.stores), ends))

    def start(self, hold: str = "", at: Sequence[int] = ()) -> None:
        """Start a life."""
        ends = self._await_silence()
        self.flow.start(hold, at)
        self.flow.wait(lambda process: process.says('"starting"'), "it starts", any=True)
        self.note_life(ends)

    def kill(self, kill: Kill) -> None:
        """Live one life, and kill it."""
        if self.load.ended:
            raise Broken("there was no load for the last kills: this machine is too slow or busy")
        everyone = range(self.setting.processes)
        if waiting := list(self.flow.running):
            # Left over from a kill at start-up; the one that is started now is the one to kill.
            (fresh,) = set(everyone) - set(waiting)
            kill = replace(kill, victim=fresh)
            if kill.point == "tail_scan":
                # Only the fresh one is held. It may have no more than one of the tails: Bytewax
                # gives the first partition of every topic to the first process.
                kill = replace(kill, nth=1)
        self.kills.append(kill)
        if kill.point == "random" and kill.early and not self.flow.running:
            ends = self._await_silence()
            self.flow.start()
            deadline = time.monotonic() + kill.after_s
            try:
                self.flow.wait(
                    lambda process: process.says('"starting"'), "", any=True, timeout_s=kill.after_s
                )
                self.note_life(ends)
                self.flow.live(deadline - time.monotonic())
            except Broken as error:
                if not str(error).startswith("not within"):
                    raise
            self.flow.kill(list(everyone))
            return
        if kill.point == "random":
            self.start()
            self.flow.await_reading()
            self.flow.live(kill.after_s)
            victims = list(everyone) if kill.all else [kill.victim]
        else:
            held = [kill.victim] if kill.point in _PASSED_BY_ALL else list(everyone)
            self.start(f"{kill.point}:{kill.nth}", held)
            if kill.point.startswith("draining"):
                self.flow.await_reading()
                self.flow.live(self.rng.uniform(0, 1.5))
                self.flow.signal(signal.SIGTERM)
            first = self.flow.wait(
                lambda process: process.hold.exists(), f"{kill.point} was passed {kill.nth} times",
                any=True, timeout_s=_POINT_S,
            )  # fmt: skip
            victims = list(everyone) if kill.all else first[:1]
        self.flow.kill(victims)
        if kill.point == "startup" and self.flow.running:
            return  # it waits for the other one, which is started again
        self.flow.await_end()

    def finish(self) -> check.Verdict:
        """Let a last life finish everything, drain it, and judge the run."""
        self.start()
        self.flow.await_reading()
        sent = self.load.stop()
        late: list[str] = []
        try:
            self.await_durable(self.flow.stores, self.flow)
        except Broken as error:
            late.append(str(error))
        logs = [process.log for process in self.flow.running.values()]
        self.flow.signal(signal.SIGTERM)
        codes = self.flow.await_end(60)
        verdict = self.judge(sent)
        verdict.violations += late
        if any(codes):
            verdict.violations.append(f"the last life, drained, ended with {codes}")
        verdict.violations += self._unbalanced(logs)
        return verdict

    def await_durable(self, stores: Sequence[Path], flow: Flow) -> None:
        """Wait until a flow has stored that all that was sent is done."""
        ends = self.reader.ends(self.topics[name] for name in INPUTS)
        wanted = {place: end for place, end in ends.items() if end}
        deadline = time.monotonic() + _COMPLETE_S
        while not all(resume_offsets(*stores).get(place) == end for place, end in wanted.items()):
            if time.monotonic() > deadline:
                raise Broken(f"not all was read within {_COMPLETE_S:g} s")
            flow.live(0.2)

    def judge(self, sent: Sequence[Item]) -> check.Verdict:
        """Read everything, and check it."""
        self.reader.catch_up()
        facts = check.Facts(
            self.setting.delivery == "exactly_once",
            self.topics,
            sent,
            self.reader.records,
            self.lives,
            self.assets.state,
            together=self.setting.processes == 1 or self._furthest_behind() < LATENESS_MS,
        )
        verdict = check.check(facts)
        verdict.compared = self.flow.compared()
        return verdict

    def _furthest_behind(self) -> int:
        """Return the largest backlog that any life met or let grow, in ms of stream time."""
        times: dict[Any, list[tuple[int, int]]] = {}
        for record in self.reader.records[self.topics["transactions"]]:
            at = check.event_time(record)
            if at is not None:
                times.setdefault(record.place, []).append((record.offset, at))
        furthest = 0
        ended = [*self._newest[1:], self.load.stream_time]
        for life, newest in zip(self.lives, ended, strict=True):
            for place, found in times.items():
                begin = life.resumed.get(place, 0)
                unread = [at for offset, at in found if offset >= begin]
                furthest = max(furthest, newest - min(unread, default=newest))
        return furthest

    def _unbalanced(self, logs: Sequence[Path]) -> list[str]:
        """Check the account that the processes of a drained life have left."""
        account: dict[str, dict[str, int]] = {}
        for log in logs:
            lines = [json.loads(line) for line in log.read_text().splitlines() if line[:1] == "{"]
            ends = [line["account"] for line in lines if line["event"] == "stopped"]
            if not ends:
                return [f"{log.name} holds no account"]
            for topic, outcomes in ends[-1].items():
                total = account.setdefault(topic, {})
                for outcome, n in outcomes.items():
                    total[outcome] = total.get(outcome, 0) + n
        return [
            f"the account of {topic} does not balance: {outcomes}"
            for topic, outcomes in account.items()
            if outcomes["read"] != sum(n for outcome, n in outcomes.items() if outcome != "read")
        ]


def _free_port() -> int:
    """Return a port below those that systems give to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
