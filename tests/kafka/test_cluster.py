"""Apache Kafka starts, breaks and heals on request, and leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from confluent_kafka import Producer

from tests.kafka import cluster
from tests.kafka.client import TestBroker, await_that
from tests.kafka.cluster import KafkaCluster, Unavailable

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.kafka.cluster", "--topic", "events:3"]


def listens(address: str) -> bool:
    """Return whether something accepts connections at ``host:port``."""
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL", "closed pipe"])
def test_it_stops_with_its_starter_and_leaves_nothing(kafka: TestBroker, end: str) -> None:
    with subprocess.Popen(
        COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        ready = json.loads(process.stdout.readline())
        directory = Path(ready["logs"][0]).parent
        assert ready["topics"] == {"events": 3}
        assert TestBroker(ready["bootstrap_servers"]).read("events") == []
        assert listens(ready["bootstrap_servers"])
        if end == "closed pipe":
            process.stdin.close()
        else:
            process.send_signal(signal.Signals[end])
        assert process.wait(30) == (-9 if end == "SIGKILL" else 0)
        await_that(lambda: not listens(ready["bootstrap_servers"]), "the end of the broker")
    with cluster._run_directory():  # the next one cleans up behind it
        assert not directory.exists()


def test_brokers_die_and_come_back_with_their_data(kafka_3: KafkaCluster) -> None:
    servers = TestBroker(kafka_3.bootstrap_servers)
    topic = servers.topic("events", 1)
    producer = Producer({**servers.config, "transactional.id": "t", "acks": "all"})
    producer.init_transactions(30)
    assert kafka_3.coordinator_of_transaction("t") in kafka_3.all
    servers.produce(topic, [(0, b"k", b"before")])

    leader = kafka_3.leader_of(topic, 0)
    assert leader is not None
    kafka_3.kill(leader)
    kafka_3.await_ready()
    second = kafka_3.leader_of(topic, 0)
    assert second not in (None, leader)
    servers.produce(topic, [(0, b"k", b"with two")])
    kafka_3.heal()

    assert second is not None
    kafka_3.pause(second)
    kafka_3.await_ready()
    assert kafka_3.leader_of(topic, 0) not in (None, second)
    servers.produce(topic, [(0, b"k", b"beside a paused one")])

    for broker in kafka_3.all:
        kafka_3.kill(broker)
    assert kafka_3.running == []
    kafka_3.heal()
    values = [message.value() for message in servers.read(topic)]
    assert values == [b"before", b"with two", b"beside a paused one"]
    servers.close()


def test_reading_knows_transactions(kafka: TestBroker) -> None:
    topic = kafka.topic("events", 2)
    producer = Producer({**kafka.config, "transactional.id": topic})
    producer.init_transactions(30)
    for value in (b"committed", b"aborted", b"open"):
        producer.begin_transaction()
        producer.produce(topic, value, partition=0)
        assert producer.flush(30) == 0
        if value == b"committed":
            producer.commit_transaction(30)
        if value == b"aborted":
            producer.abort_transaction(30)
    kafka.produce(topic, [(1, None, b"plain"), (0, None, b"behind an open one")])

    committed = [message.value() for message in kafka.read(topic)]
    assert committed == [b"committed", b"plain"]
    everything = [m.value() for m in kafka.read(topic, isolation="read_uncommitted")]
    assert everything == [b"committed", b"aborted", b"open", b"behind an open one", b"plain"]
    producer.abort_transaction(30)
    committed = [message.value() for message in kafka.read(topic)]
    assert committed == [b"committed", b"behind an open one", b"plain"]

    kafka.delete_records(topic, 1, 1)
    assert len(kafka.read(topic)) == 2


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="Java 17 or newer was not found on PATH"):
        cluster.assemble()
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    java.chmod(0o755)
    with pytest.raises(Unavailable, match=r"Java 17 or newer is needed; .* says: .*11\.0\.2"):
        cluster.assemble()
    java.write_text("#!/bin/sh\necho 'openjdk version \"21\" 2023' >&2\n")
    monkeypatch.setattr(cluster, "HOME", tmp_path / ".kafka")
    with pytest.raises(Unavailable, match=r"Maven \(mvn\) was not found"):
        cluster.assemble()


def test_the_summary_says_when_guarantees_were_not_tested() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::{_COVERED}"],
        cwd=ROOT,
        env={**os.environ, "TEST_BROKER": "embedded", "KAFKA_BOOTSTRAP_SERVERS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 skipped" in ran.stdout, ran.stdout + ran.stderr
    assert "DELIVERY GUARANTEES WERE NOT TESTED: TEST_BROKER=embedded" in ran.stdout


_COVERED = test_reading_knows_transactions.__name__
