"""The embedded broker starts, stops with its starter, and forgets what its docstring says."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from dataflows.kafka.dev_broker import RETENTION_BYTES, DevBroker
from tests.kafka.client import TestBroker

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "dataflows.kafka.dev_broker", "--topic", "events:3"]


def start(stdin: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(COMMAND, cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE)


def first_line(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    line: dict[str, Any] = json.loads(process.stdout.readline())
    return line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_its_address_and_stops_on_a_signal(number: int) -> None:
    with start(subprocess.DEVNULL) as process:
        ready = first_line(process)
        consumer = Consumer({"bootstrap.servers": ready["bootstrap_servers"], "group.id": "g"})
        assert len(consumer.list_topics(timeout=10).topics["events"].partitions) == 3
        consumer.close()
        process.send_signal(number)
        assert process.wait(timeout=10) == 0


def test_it_stops_when_its_starter_is_gone() -> None:
    with start(subprocess.PIPE) as process:
        first_line(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=10) == 0


def test_a_wrong_topic_is_named() -> None:
    done = subprocess.run([*COMMAND, "--topic", "x:none"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'x:none' is not NAME:PARTITIONS" in done.stderr


def test_a_command_that_fails_says_so(dev_broker: DevBroker) -> None:
    dev_broker.create_topic("events", 1)
    with pytest.raises(RuntimeError, match="cannot create topic 'events'"):
        dev_broker.create_topic("events", 1)


def test_the_oldest_batches_go_when_a_partition_is_full(dev_broker: DevBroker) -> None:
    """If this fails, librdkafka has changed: correct the docstring, and the demo's pace."""
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    topic = broker.topic("events", 1)
    count, size = 1500, 10_000
    small: dict[str, Any] = {"batch.num.messages": 10}
    broker.produce(topic, [(0, None, b"x" * size)] * count, **small)
    consumer = Consumer({**broker.config, "group.id": "g"})
    low, high = consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=10)
    consumer.close()
    assert high == count
    kept = (high - low) * size
    assert RETENTION_BYTES - 3 * 10 * size < kept <= RETENTION_BYTES + 3 * 10 * size
