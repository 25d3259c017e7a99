"""Clusters of processes on Apache Kafka: rescaled, with idle workers, with one that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from dataflows.parts import move, split
from dataflows.settings import Settings
from dataflows.state import export
from features import profiles
from features.fraud import FRAUD
from tests.chaos import check
from tests.chaos.harness import HOUR_MS, Assets, _free_port, events
from tests.chaos.load import Item
from tests.handbook_day import DAY, replayed  # noqa: F401
from tests.integration.flow import (  # noqa: F401
    PARTITIONS,
    FlowEnv,
    Sent,
    feast_repo,
    flow_env,
    send,
    sources_of,
    tiny_feast,
    tiny_model,
)
from tests.kafka.client import TestBroker, await_that

ROOT = Path(__file__).parents[2]


class Cluster:
    """Processes of `python -m bytewax.run MODULE` on one recovery directory: one life.

    Or `apart`, each on a directory of its own: ``recovery/0`` …
    """

    def __init__(
        self,
        module: str,
        variables: Mapping[str, str],
        recovery: Path,
        processes: int,
        apart: bool = False,
    ) -> None:
        clean = {k: v for k, v in os.environ.items() if k.lower() not in Settings.model_fields}
        clean.pop("SETTINGS_FILE", None)
        # Apart, each meets the others at one port of an address of its own.
        hosts = [f"127.0.0.{n + 1 if apart else 1}" for n in range(processes)]
        addresses = ";".join(f"{host}:{_free_port()}" for host in hosts)
        if apart:
            variables = {**variables, "PEERS_PORT": str(_free_port())}
        self.logs = [
            recovery.with_name(f"{recovery.name}_{time.monotonic_ns()}_{number}.log")
            for number in range(processes)
        ]
        self.processes: list[subprocess.Popen[bytes]] = []
        for number, log in enumerate(self.logs):
            command = [sys.executable, "-m", "bytewax.run", module]
            directory = recovery / str(number) if apart else recovery
            command += ["-r", str(directory), "-s", "1", "-b", "0"]
            if processes > 1:
                command += ["-i", str(number), "-a", addresses]
            with log.open("wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env={**clean, "PYTHONPATH": str(ROOT), "LOG_FORMAT": "json", **variables},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def said(self, number: int | None = None) -> str:
        """What a process has said so far, or all of them."""
        logs = self.logs if number is None else self.logs[number : number + 1]
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def reading(self) -> list[int]:
        """Return the numbers of the processes that have partitions, and read them."""
        return [n for n in range(len(self.logs)) if "reading {" in self.said(n)]

    def await_reading(self, partitions: int) -> list[int]:
        """Wait until this many partitions are read; return `reading`."""

        def all_read() -> bool:
            assert self.ended() == [], self.said()
            lines = [line for line in self.said().splitlines() if "reading {" in line]
            return sum(line.count("/") for line in lines) == partitions

        await_that(all_read, f"{partitions} partitions are read", 120)
        return self.reading()

    def ended(self) -> list[int]:
        """Return the numbers of the processes that have ended."""
        return [n for n, process in enumerate(self.processes) if process.poll() is not None]

    def wait(self, timeout_s: float = 60.0) -> list[int]:
        """Wait until all have ended; return their exit codes."""
        await_that(lambda: len(self.ended()) == len(self.processes), "the cluster ends", timeout_s)
        return [process.wait() for process in self.processes]

    def drain(self, number: int) -> list[int]:
        """Send SIGTERM to one process; return the exit codes of all."""
        self.processes[number].send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL what still runs."""
        for process in self.processes:
            process.kill()
            process.wait()


#: Starts a cluster that ends with the test.
Start = Callable[..., Cluster]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Cluster] = []

    def launch(
        module: str, variables: Mapping[str, str], recovery: Path, n: int, apart: bool = False
    ) -> Cluster:
        started.append(Cluster(module, variables, recovery, n, apart))
        return started[-1]

    yield launch
    for cluster in started:
        cluster.kill()


# Rescaling the fraud flow

#: How long before the first transaction that it counts for each fraud report comes, stream time:
#: `max_skew_ms` of the source.
MARGIN_MS = 6 * HOUR_MS
#: Processes of each life, and which of them is told to drain.
LIVES = ((1, 0), (3, 2), (2, 0), (1, 0))
LIVES_APART = ((2, 1), (3, 2), (1, 0), (2, 0))
PARTS = 5
#: Of the lives that begin with the exported state of the one before; the first is of STATE_DIR.
SHARDS = (32, 7, 40, 32)
OUTPUTS = ("predictions", "audit", "dead_letters")


@pytest.mark.parametrize("how", ["one directory", "apart", "exported"])
def test_rescaling_loses_doubles_and_changes_nothing(
    kafka: TestBroker,
    handbook_dir: Path,
    replayed: Path,  # noqa: F811
    flow_env: FlowEnv,  # noqa: F811
    tmp_path: Path,
    start: Start,
    how: str,
) -> None:
    """1 process, drained, 3, drained, 2: as one uninterrupted process, and as the replay.

    *apart*: each process has a directory of its own, and the parts of the store move in between.
    *exported*: each life has a new recovery store, another number of shards, and begins with what
    was exported of the life before.

    A day of the handbook. Processes may be `MARGIN_MS` apart in stream time, so a transaction may
    overtake a report that comes later than that before the deadline of seven days. Such reports,
    if the day has a transaction that they count for, are left out.
    """
    feast = feast_repo(handbook_dir, DAY, handbook_dir.name + sources_of(profiles))
    state, model = replayed / "state", Path(flow_env.variables["MODEL_DIR"])
    sent = events(Assets(kafka, handbook_dir, DAY, state, model, feast), 1, MARGIN_MS)
    ids = {str(item.event_id) for item in sent if item.topic == "transactions"}
    assert len(ids) > 9_000 and len(sent) - len(ids) > 50
    flow_env.variables |= {
        "DELIVERY": "exactly_once",
        "AUDIT_SHARE": "1",
        "STATE_DIR": str(state),
        "FEAST_REPO": str(feast),
    }
    apart, exported = how == "apart", how == "exported"
    lives = LIVES_APART if apart else LIVES
    parts = np.array_split(np.arange(len(sent)), 2 * len(lives))
    account: Counter[str] = Counter()
    directories = [tmp_path / "recovery" / str(n) for n in range(3)]
    for life, (processes, signalled) in enumerate(lives):
        if apart and life == 0:
            directories[0].parent.mkdir()
            for number in range(processes):
                split(directories[number], number, processes, PARTS)
        elif apart:
            move(directories, processes)
        elif exported and life > 0:
            state_dir = tmp_path / f"state_{life}"
            export([tmp_path / f"recovery_{life - 1}"], state_dir, SHARDS[life])
            flow_env.variables |= {
                "STATE_DIR": str(state_dir),
                "SHARDS": str(SHARDS[life]),
                "START_AT": "latest",
            }
        down, running = parts[2 * life : 2 * life + 2]
        produce(flow_env, [sent[n] for n in down])
        variables = {**flow_env.variables, "BATCH_SIZE": "50"}
        recovery = tmp_path / (f"recovery_{life}" if exported else "recovery")
        cluster = start("dataflows.fraud", variables, recovery, processes, apart)
        cluster.await_reading(PARTITIONS["transactions"] + PARTITIONS["fraud_reports"])
        for few in np.array_split(running, 5):
            produce(flow_env, [sent[n] for n in few])
        wanted = len(sent) if life == len(lives) - 1 else down[len(down) // 2]
        await_that(lambda n=wanted: progress(flow_env) >= n, f"{wanted} events are read", 90)  # type: ignore[misc]
        assert cluster.drain(signalled) == [0] * processes, cluster.said()
        assert "Traceback" not in cluster.said()
        # One process keeps a journal; the cluster after it puts that into the shards.
        assert ("the journal is folded" in cluster.said()) == (how == "one directory" and life == 1)
        account += balance(cluster, flow_env.topics["transactions"])
        print(f"{cluster.reading()} of {processes} read, to {progress(flow_env)} of {len(sent)}")
    assert account["read"] == account["scored"] == len(ids)

    vectors = once_each(flow_env.broker, flow_env.topics, ids)

    # The same records, by one process in one life, into topics of its own.
    outputs = {name: kafka.topic(f"single_{name}", PARTITIONS[name]) for name in OUTPUTS}
    flow_env.variables |= {f"{name.upper()}_TOPIC": topic for name, topic in outputs.items()}
    flow_env.variables["GROUP_ID"] += "_single"
    flow_env.variables |= {"STATE_DIR": str(state), "SHARDS": "32", "START_AT": "earliest"}
    single = start("dataflows.fraud", flow_env.variables, tmp_path / "single", 1)
    await_that(lambda: progress(flow_env) == len(sent), "all events are read", 120)
    assert single.drain(0) == [0], single.said()
    assert differing(vectors, once_each(kafka, outputs, ids)) == {}
    assert differing(vectors, check.replayed(sent, state)) == {}


def produce(env: FlowEnv, items: Sequence[Item]) -> None:
    """Send events in order, keyed and partitioned as in production."""
    records = [Sent(env.topics[item.topic], item.value, item.key) for item in items]
    send(env.broker, records, partitioner="murmur2_random", **{"enable.idempotence": True})


def progress(env: FlowEnv) -> int:
    """Return how many events have been read in epochs that are stored."""
    return sum(
        max(offset, 0)
        for name in ("transactions", "fraud_reports")
        for offset in env.broker.committed(
            env.variables["GROUP_ID"], env.topics[name], PARTITIONS[name]
        )
    )


def balance(cluster: Cluster, topic: str) -> Counter[str]:
    """Return what the processes of a drained cluster did with a topic's events."""
    total: Counter[str] = Counter()
    for number in range(len(cluster.logs)):
        lines = [line for line in cluster.said(number).splitlines() if line.startswith("{")]
        ends = [found for line in lines if (found := json.loads(line))["event"] == "stopped"]
        assert len(ends) == 1, cluster.said(number)
        total.update(ends[0]["account"].get(topic, {}))
    assert total["read"] == sum(n for outcome, n in total.items() if outcome != "read")
    return total


def once_each(broker: TestBroker, topics: Mapping[str, str], ids: set[str]) -> dict[str, bytes]:
    """Check that each transaction has one prediction and one audit record.

    Returns the bits of their audited features, in model order.
    """
    predicted = [
        json.loads(m.value() or b"")["transaction_id"] for m in broker.read(topics["predictions"])
    ]
    assert {i: n for i, n in Counter(predicted).items() if n != 1} == {}
    assert set(predicted) == ids
    audits = [json.loads(m.value() or b"") for m in broker.read(topics["audit"])]
    assert {i: n for i, n in Counter(a["transaction_id"] for a in audits).items() if n != 1} == {}
    assert {a["transaction_id"] for a in audits} == ids
    assert broker.read(topics["dead_letters"]) == []
    return {
        a["transaction_id"]: np.array([a["features"][n] for n in FRAUD.names], float).tobytes()
        for a in audits
    }


def differing(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> dict[str, list[str]]:
    """Return the names of the features that differ in any bit, by transaction."""
    wrong = {}
    for key, bits in expected.items():
        pairs = zip(np.frombuffer(found[key], np.int64), np.frombuffer(bits, np.int64), strict=True)
        if names := [n for n, (a, b) in zip(FRAUD.names, pairs, strict=True) if a != b]:
            wrong[key] = names
    return wrong


# Idle workers, and processes that die

EVENTS = 3_000


class Copies:
    """`tests.integration.kafka_flow`, exactly once, on topics and a recovery store of its own.

    Each batch of 10 events takes 10 ms.
    """

    def __init__(self, kafka: TestBroker, start: Start, directory: Path, partitions: int) -> None:
        self.kafka, self.start, self.directory = kafka, start, directory
        self.partitions = partitions
        self.events, self.copies = kafka.topic("events", partitions), kafka.topic("copies", 2)
        records = [(n % partitions, b"key%d" % (n % 50), b'{"at": %d}' % n) for n in range(EVENTS)]
        kafka.produce(self.events, records)
        self.settings = {
            "topics": [self.events],
            "output_topic": self.copies,
            "config": kafka.config,
            "consumer_config": kafka.consumer_config,
            "group_id": f"group_{self.copies}",
            "delivery": "exactly_once",
            "batch_size": 10,
            "work_s": 0.01,
        }

    def run(self, processes: int) -> Cluster:
        """Start a life; return it when it copies."""
        before = len(self.ids())
        variables = {"KAFKA_FLOW": json.dumps(self.settings)}
        module = "tests.integration.kafka_flow"
        cluster = self.start(module, variables, self.directory / "recovery", processes)
        cluster.await_reading(self.partitions)
        await_that(lambda: len(self.ids()) > before, "it copies", 60)
        return cluster

    def ids(self) -> list[bytes]:
        found = [
            dict(message.headers() or [])["event_id"] for message in self.kafka.read(self.copies)
        ]
        return [each for each in found if each is not None]

    def check(self) -> None:
        """Check that each event has one copy."""
        expected = {
            f"{self.events}/{p}/{n}".encode()
            for p in range(self.partitions)
            for n in range(EVENTS // self.partitions)
        }
        assert {each: n for each, n in Counter(self.ids()).items() if n != 1} == {}
        assert set(self.ids()) == expected


#: How soon a process ends when another one has died, seconds; it is under one on a quiet machine.
SOON_S = 10.0


def test_workers_without_partitions(kafka: TestBroker, start: Start, tmp_path: Path) -> None:
    """Three processes, one partition: a kill of any ends all, a signal to any drains all."""
    copies = Copies(kafka, start, tmp_path, partitions=1)
    for victim in ("idle", "reading"):
        cluster = copies.run(3)
        (reader,) = cluster.reading()
        cluster.processes[reader if victim == "reading" else (reader + 1) % 3].kill()
        assert 0 not in cluster.wait(SOON_S), cluster.said()
    cluster = copies.run(3)
    (reader,) = cluster.reading()
    assert cluster.drain((reader + 2) % 3) == [0, 0, 0], cluster.said()
    assert "Traceback" not in cluster.said()
    # Drained, it may go on with any number.
    cluster = copies.run(2)
    await_that(lambda: len(copies.ids()) >= EVENTS, "all is copied", 60)
    assert cluster.drain(0) == [0, 0], cluster.said()
    copies.check()


def test_a_process_that_dies_ends_the_others_and_all_start_again(
    kafka: TestBroker, start: Start, tmp_path: Path
) -> None:
    copies = Copies(kafka, start, tmp_path, partitions=4)
    for victim in (0, 2):
        cluster = copies.run(3)
        cluster.processes[victim].kill()
        assert 0 not in cluster.wait(SOON_S), cluster.said()
    cluster = copies.run(3)
    await_that(lambda: len(copies.ids()) >= EVENTS, "all is copied", 60)
    assert cluster.drain(1) == [0, 0, 0], cluster.said()
    copies.check()
