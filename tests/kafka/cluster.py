"""Run real Apache Kafka, without Docker: what `make kafka` starts and the tests use.

The jars come from Maven Central, once, into `.kafka/` (see `pom.xml` beside this file). A cluster
is one Java process per broker (KRaft, each also a controller) on loopback ports; its data are
removed when it stops. Needs Java 17 or newer, and Maven for the first time::

    $ python -m tests.kafka.cluster --brokers 3 --topic transactions:4
    {"bootstrap_servers": "127.0.0.1:21733,…", "pid": 4711, ...}

It stops on SIGTERM, on SIGINT, and when its standard input is a pipe that closes. Tests use the
class:

>>> with KafkaCluster(brokers=3) as cluster:  # doctest: +SKIP
...     cluster.create_topic("events", 4, config={"min.insync.replicas": "2"})
...     cluster.kill(cluster.leader_of("events", 0))
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from dataflows.demo.processes import Guard, Process

POM = Path(__file__).with_name("pom.xml")
HOME = Path(__file__).parents[2] / ".kafka"
JAVA = 17
#: The cluster id only has to be 16 bytes in base64; every cluster has its own ports and data.
CLUSTER_ID = "c3RyZWFtaW5nLWluZmVyZQ"
#: Partitions of the coordinators' topics: few, so that a cluster starts fast.
COORDINATOR_PARTITIONS = 4


class KafkaError(RuntimeError):
    """The cluster cannot start, or does not do what was asked."""


class Unavailable(KafkaError):
    """Kafka cannot run on this machine; the message says what is missing."""


# Assembling


def _java() -> str:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None)
    if java is None:
        raise Unavailable(
            f"Java {JAVA} or newer was not found {f'in JAVA_HOME={home}' if home else 'on PATH'} "
            "(Debian: apt install default-jre-headless)"
        )
    # macOS has a `java` that only says that there is none.
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < JAVA:
        found = said.strip().partition("\n")[0]
        raise Unavailable(f"Java {JAVA} or newer is needed; {java} says: {found}")
    return java


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock of `.kafka/`: one process at a time assembles or cleans up there."""
    HOME.mkdir(exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def assemble() -> Path:
    """Return the directory of the jars that `pom.xml` names; fetch them if it is not there.

    Raises:
        Unavailable: Java or Maven is missing, or Maven could not fetch the jars.
    """
    _java()
    directory = HOME / f"jars-{hashlib.sha256(POM.read_bytes()).hexdigest()[:12]}"
    with _locked():
        if directory.exists():
            return directory
        maven = shutil.which("mvn")
        if maven is None:
            raise Unavailable("Maven (mvn) was not found on PATH (Debian: apt install maven)")
        print("fetching Apache Kafka with Maven, 45 MB, once …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=HOME, prefix="new-") as staging:
            jars = Path(staging) / "jars"
            # -C: a wrong checksum is an error.
            command = [maven, "-C", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies"]
            ran = subprocess.run(
                [*command, f"-DoutputDirectory={jars}"], capture_output=True, text=True, check=False
            )
            if ran.returncode:
                said = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[:5])
                raise Unavailable(f"Maven could not fetch Apache Kafka:\n{said}")
            jars.rename(directory)
    return directory


def unavailable() -> str | None:
    """Return why Kafka cannot run on this machine, or None if it can; assembles it."""
    try:
        assemble()
    except Unavailable as error:
        return str(error)
    return None


# Running


class KafkaCluster:
    """Run Apache Kafka for as long as the ``with`` block lasts.

    Methods with a broker number take 1 … `brokers`. A broker that is stopped, killed or paused
    keeps its ports and data until the block ends. If this process dies, even by SIGKILL, so do
    the brokers; their data are removed by the next cluster that starts.

    Args:
        brokers: number of brokers, each of them also a controller; more than half must run. With
            three or more, topics have three replicas and `min.insync.replicas` 2.
        heap: maximal Java heap of each broker, as in ``-Xmx``.
        config: more or other broker settings (`server.properties`).
        timeout_s: seconds to wait for a cluster to answer, and for a topic to be usable.

    Raises:
        Unavailable: Java or Maven is missing, or Maven could not fetch Kafka.
        KafkaError: The cluster did not start or answer in time; with the end of the broker's log.
    """

    def __init__(
        self,
        brokers: int = 1,
        *,
        heap: str = "512m",
        config: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self.brokers = brokers
        self.replicas = min(brokers, 3)
        self.bootstrap_servers = ""
        self._heap = heap
        self._config = dict(config or {})
        self._timeout_s = timeout_s
        self._processes: dict[int, Process] = {}
        self._paused: set[int] = set()
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._cleanup:
            self._java, self._jars = _java(), assemble()
            self.directory = self._cleanup.enter_context(_run_directory())
            self._guard = self._cleanup.enter_context(Guard())
            ports = _free_ports(2 * self.brokers)
            self._ports, controllers = ports[: self.brokers], ports[self.brokers :]
            self.bootstrap_servers = ",".join(f"127.0.0.1:{port}" for port in self._ports)
            voters = ",".join(f"{n}@127.0.0.1:{p}" for n, p in enumerate(controllers, 1))
            for broker, port, controller in zip(self.all, self._ports, controllers, strict=True):
                properties = {
                    **self._properties(),
                    "node.id": str(broker),
                    "controller.quorum.voters": voters,
                    "listeners": self._listeners(port, controller),
                    "log.dirs": str(self.directory / f"broker-{broker}"),
                    **self._config,
                }
                lines = (f"{name}={value}\n" for name, value in properties.items())
                self._properties_file(broker).write_text("".join(lines))
            with ThreadPoolExecutor() as pool:
                list(pool.map(self._format, self.all))
            for broker in self.all:
                self.start(broker)
            self.await_ready()
            self._await(self._creates, "no topic can be created")
            self._cleanup = self._cleanup.pop_all()  # all is well: not before __exit__
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()
        self._processes.clear()
        self._paused.clear()

    @property
    def all(self) -> range:
        """The numbers of all brokers."""
        return range(1, self.brokers + 1)

    @property
    def running(self) -> list[int]:
        """The numbers of the brokers whose process lives and is not paused."""
        return [n for n in self.all if self._alive(n) and n not in self._paused]

    @property
    def _client_config(self) -> dict[str, Any]:
        return {
            "bootstrap.servers": self.bootstrap_servers,
            "log_level": 0,  # brokers that are down are what some tests are about
            "reconnect.backoff.max.ms": 500,
        }

    def _properties(self) -> dict[str, str]:
        least = str(min(self.replicas, 2))
        return {
            "process.roles": "broker,controller",
            "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "CLIENT",
            "controller.listener.names": "CONTROLLER",
            "auto.create.topics.enable": "false",
            "default.replication.factor": str(self.replicas),
            "min.insync.replicas": least,
            "offsets.topic.num.partitions": str(COORDINATOR_PARTITIONS),
            "offsets.topic.replication.factor": str(self.replicas),
            "transaction.state.log.num.partitions": str(COORDINATOR_PARTITIONS),
            "transaction.state.log.replication.factor": str(self.replicas),
            "transaction.state.log.min.isr": least,
            "group.initial.rebalance.delay.ms": "0",
            # Of 128 MB, which would be half of a small heap.
            "log.cleaner.dedupe.buffer.size": "4194304",
            # Tests send events of 2018, which would be deleted within minutes.
            "log.retention.ms": "-1",
            # A dead broker is noticed after 4 s; after 9 s by default.
            "broker.session.timeout.ms": "4000",
            "broker.heartbeat.interval.ms": "1000",
            # And a controller that does not answer after 3 s, not 30.
            "controller.socket.timeout.ms": "3000",
        }

    def _listeners(self, port: int, controller: int) -> str:
        return f"CLIENT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}"

    def _properties_file(self, broker: int) -> Path:
        return self.directory / f"broker-{broker}.properties"

    def log_file(self, broker: int) -> Path:
        """The log of a broker, all its lives."""
        return self.directory / f"broker-{broker}.log"

    def _command(self, main: str, *arguments: str) -> list[str]:
        options = [f"-Xmx{self._heap}", "-XX:+UseSerialGC", "-Djava.awt.headless=true"]
        options += ["-Dorg.slf4j.simpleLogger.showDateTime=true"]
        options += ["-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS"]
        return [self._java, *options, "-cp", f"{self._jars}/*", main, *arguments]

    def _format(self, broker: int) -> None:
        arguments = ("format", "-t", CLUSTER_ID, "-c", str(self._properties_file(broker)))
        command = self._command("kafka.tools.StorageTool", *arguments)
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise KafkaError(f"cannot format broker {broker}: {ran.stderr[-2000:]}")

    # One broker

    def _alive(self, broker: int) -> bool:
        process = self._processes.get(broker)
        return process is not None and not self._guard.ended(process)

    def start(self, broker: int) -> None:
        """Start a broker that does not run, on its ports and data; see `await_ready`."""
        if self._alive(broker):
            raise KafkaError(f"broker {broker} runs already")
        with self.log_file(broker).open("ab") as log:
            process = subprocess.Popen(
                self._command("kafka.Kafka", str(self._properties_file(broker))),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._guard.adopt(process)
        self._processes[broker] = process

    def kill(self, broker: int) -> None:
        """SIGKILL a broker, paused or not, and wait for its end; no harm if it does not run."""
        self._end(broker, signal.SIGKILL)

    def stop(self, broker: int) -> None:
        """SIGTERM: let a broker hand over its partitions and end; wait for that."""
        self._end(broker, signal.SIGTERM)

    def _end(self, broker: int, number: int) -> None:
        process = self._processes.pop(broker, None)
        if process is None:
            return
        process.send_signal(number)
        if broker in self._paused and number != signal.SIGKILL:
            process.send_signal(signal.SIGCONT)
        self._paused.discard(broker)
        try:
            process.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise KafkaError(
                f"broker {broker} did not stop within {self._timeout_s:g} s and was killed; "
                f"the end of its log:\n{self._log_end(broker)}"
            ) from None
        finally:
            process.wait()
            self._guard.ended(process)

    def pause(self, broker: int) -> None:
        """SIGSTOP: the broker keeps its connections and answers nothing."""
        if not self._alive(broker):
            raise KafkaError(f"broker {broker} does not run")
        self._processes[broker].send_signal(signal.SIGSTOP)
        self._paused.add(broker)

    def resume(self, broker: int) -> None:
        """SIGCONT: undo `pause`."""
        if broker in self._paused:
            self._processes[broker].send_signal(signal.SIGCONT)
            self._paused.discard(broker)

    def heal(self) -> None:
        """Resume and start whatever was paused, stopped or killed, and wait until all is ready."""
        for broker in self.all:
            self.resume(broker)
            if not self._alive(broker):
                self.start(broker)
        self.await_ready()

    # The cluster

    def await_ready(self) -> None:
        """Wait until the cluster serves with the brokers that run.

        That is: it knows these brokers and no others, every partition has a leader among them, and
        every replica on them is in sync.
        """
        self._await(self._ready, "not ready")

    def _ready(self) -> str | None:
        metadata, running = self._admin().list_topics(timeout=2), set(self.running)
        if set(metadata.brokers) != running:
            return f"brokers {sorted(metadata.brokers)} are known, {sorted(running)} run"
        for topic in metadata.topics.values():
            for number, partition in topic.partitions.items():
                if partition.leader not in running:
                    return f"{topic.topic}/{number} has no leader"
                if not set(partition.isrs) >= running & set(partition.replicas):
                    return f"of {topic.topic}/{number} only {partition.isrs} are in sync"
        return None

    def _creates(self) -> str | None:
        """Return None if a topic could be created; raises what hinders it."""
        admin = self._admin()
        probe = NewTopic("probe", 1, self.replicas)
        admin.create_topics([probe], validate_only=True, request_timeout=5)["probe"].result(10)
        return None

    def _admin(self) -> AdminClient:
        """Return a new client: an old one may be waiting for a broker that is paused by now."""
        servers = [f"127.0.0.1:{self._ports[broker - 1]}" for broker in self.running]
        return AdminClient({**self._client_config, "bootstrap.servers": ",".join(servers)})

    def _await(self, ready: Callable[[], str | None], what: str) -> None:
        """Wait until `ready` returns None; what it returns or raises before says why not yet."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                why = ready()
            except (KafkaException, TimeoutError) as error:  # it asked a broker that is paused
                why = repr(error)
            if why is None:
                return
            for broker, process in self._processes.items():
                if self._guard.ended(process):
                    raise KafkaError(
                        f"broker {broker} ended with exit code {process.returncode}; "
                        f"the end of its log:\n{self._log_end(broker)}"
                    )
            if time.monotonic() > deadline:
                logs = "\n".join(self._log_end(broker, 5) for broker in self.all)
                raise KafkaError(f"{what} within {self._timeout_s:g} s: {why}\n{logs}")
            time.sleep(0.05)

    def _log_end(self, broker: int, lines: int = 20) -> str:
        text = self.log_file(broker).read_text(errors="replace")
        return "\n".join(line[:400] for line in text.splitlines()[-lines:])

    # Topics

    def create_topic(
        self,
        topic: str,
        partitions: int,
        *,
        replicas: int | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Create `topic` and wait until every running broker serves it.

        Args:
            replicas: replication factor; default: all brokers, at most three.
            config: topic settings, as ``{"min.insync.replicas": "2"}``.
        """
        create_topic(
            self._client_config,
            NewTopic(topic, partitions, replicas or self.replicas, config=dict(config or {})),
            self._timeout_s,
        )

    def delete_topic(self, topic: str) -> None:
        """Delete `topic` and wait until no running broker knows it."""
        admin = self._admin()
        admin.delete_topics([topic])[topic].result(self._timeout_s)
        self._await(
            lambda: (
                "it is still there"
                if topic in self._admin().list_topics(timeout=2).topics
                else None
            ),
            f"topic {topic!r} is not deleted",
        )

    def leader_of(self, topic: str, partition: int) -> int | None:
        """Return the number of the partition's leader, or None if it has none now."""
        metadata = self._admin().list_topics(topic, timeout=self._timeout_s).topics[topic]
        if metadata.error is not None:
            raise KafkaError(f"topic {topic!r}: {metadata.error.str()}")
        leader: int = metadata.partitions[partition].leader
        return leader if leader in self.all else None

    def coordinator_of_transaction(self, transactional_id: str) -> int | None:
        """Return the broker that coordinates a producer's transactions, None if none does now.

        Only once any transactional producer has been there: the first one makes the topic.
        """
        return self.leader_of("__transaction_state", _coordinator_partition(transactional_id))

    def coordinator_of_group(self, group_id: str) -> int | None:
        """Return the broker that keeps a group's offsets, None if none does now.

        Only once any group has been there: the first one makes the topic.
        """
        return self.leader_of("__consumer_offsets", _coordinator_partition(group_id))


def create_topic(config: Mapping[str, Any], topic: NewTopic, timeout_s: float = 30.0) -> None:
    """Create a topic on the cluster of a client `config`; wait until every broker serves it."""
    admin = AdminClient(dict(config))
    admin.create_topics([topic])[topic.topic].result(timeout_s)
    deadline = time.monotonic() + timeout_s
    latest = {
        TopicPartition(topic.topic, partition): OffsetSpec.latest()
        for partition in range(topic.num_partitions)
    }
    # A new client asks the one broker that it knows.
    for broker in admin.list_topics(timeout=timeout_s).brokers.values():
        one = AdminClient({**config, "bootstrap.servers": f"{broker.host}:{broker.port}"})
        while True:
            try:
                for found in one.list_offsets(latest, request_timeout=5).values():
                    found.result(timeout_s)
                break
            except KafkaException:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _coordinator_partition(name: str) -> int:
    """Return the partition for an id as the brokers do: by Java's String.hashCode().

    >>> _coordinator_partition("fraud-0"), _coordinator_partition("fraud-1")
    (3, 0)
    """
    code = 0
    utf16 = name.encode("utf-16-be")
    for high, low in zip(utf16[::2], utf16[1::2], strict=True):
        code = (31 * code + (high << 8 | low)) & 0xFFFFFFFF
    return (code & 0x7FFFFFFF) % COORDINATOR_PARTITIONS


@contextlib.contextmanager
def _run_directory() -> Iterator[Path]:
    """Make a directory and remove it in the end; remove those whose process has died."""
    runs = HOME / "run"
    with _locked():
        runs.mkdir(exist_ok=True)
        for old in runs.iterdir():
            descriptor = os.open(old, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            except BlockingIOError:
                pass  # its cluster lives
            finally:
                os.close(descriptor)
        directory = Path(tempfile.mkdtemp(dir=runs))
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(descriptor)


def _free_ports(count: int) -> list[int]:
    """Return ports that nothing uses, below those that systems give to outgoing connections.

    Above, a client that tries to reach a stopped broker may be given the broker's own port.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in ports:
                ports.append(port)
    return ports


# The command


def _topic(text: str) -> tuple[str, int]:
    name, _, partitions = text.rpartition(":")
    if not name or not partitions.isdecimal() or not int(partitions):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:PARTITIONS, as in transactions:4")
    return name, int(partitions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a cluster until told to stop; see the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kafka.cluster",
        description="Apache Kafka on loopback ports. Prints one JSON line when ready.",
    )
    parser.add_argument("--brokers", type=int, default=1)
    parser.add_argument("--heap", default="512m", help="of each broker, as in -Xmx (%(default)s)")
    parser.add_argument(
        "--topic", action="append", type=_topic, default=[], metavar="NAME:PARTITIONS"
    )
    options = parser.parse_args(arguments)

    def stop(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # it stops already
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        with KafkaCluster(options.brokers, heap=options.heap) as cluster:
            for topic, partitions in options.topic:
                cluster.create_topic(topic, partitions)
            ready = {
                "bootstrap_servers": cluster.bootstrap_servers,
                "pid": os.getpid(),
                "topics": dict(options.topic),
                "logs": [str(cluster.log_file(broker)) for broker in cluster.all],
            }
            print(json.dumps(ready), flush=True)
            print(
                f"export KAFKA_BOOTSTRAP_SERVERS={cluster.bootstrap_servers}\n"
                "Ctrl-C stops it and removes its data.",
                file=sys.stderr,
            )
            # A terminal or /dev/null on standard input says nothing about who started us.
            piped = stat.S_ISFIFO(os.fstat(0).st_mode) or stat.S_ISSOCK(os.fstat(0).st_mode)
            while piped and os.read(0, 65536):
                pass
            while not piped:
                signal.pause()
    except KafkaError as error:
        print(f"cannot run Apache Kafka: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
