"""The one test broker, and a few words to talk to it.

`broker` is an embedded mock cluster in its own process, or the cluster that KAFKA_BOOTSTRAP_SERVERS
names. Tests that need faults (`broker_down`, …) ask for `dev_broker`.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from dataflows.kafka import source
from dataflows.kafka.dev_broker import CONSUMER_CONFIG, DevBroker

_names = itertools.count()


class TestBroker:
    """Create topics, produce and read back, whatever the broker is."""

    __test__ = False

    def __init__(self, bootstrap_servers: str, dev: DevBroker | None) -> None:
        self.config: dict[str, Any] = {"bootstrap.servers": bootstrap_servers}
        self.consumer_config = {**self.config, **(CONSUMER_CONFIG if dev else {})}
        self.dev = dev

    def topic(self, name: str, partitions: int) -> str:
        """Create a topic with a name of its own; return the name."""
        unique = f"{name}_{os.getpid()}_{next(_names)}"
        if self.dev is not None:
            self.dev.create_topic(unique, partitions)
        else:
            created = AdminClient(self.config).create_topics([NewTopic(unique, partitions, 1)])
            created[unique].result(30)
        return unique

    def produce(
        self,
        topic: str,
        records: Sequence[tuple[int, bytes | None, bytes | None]],
        *,
        headers: list[tuple[str, bytes]] | None = None,
        **config: Any,
    ) -> None:
        """Write (partition, key, value) records and wait for their delivery."""
        failures: list[Any] = []
        producer = Producer({**self.config, "linger.ms": 5, "enable.idempotence": True, **config})
        for partition, key, value in records:
            produced = False
            while not produced:
                try:
                    producer.produce(
                        topic,
                        value,
                        key,
                        partition,
                        lambda error, _: failures.append(error) if error else None,
                        headers=headers,
                    )
                    produced = True
                except BufferError:
                    producer.poll(0.1)
        assert producer.flush(30) == 0
        assert not failures, failures

    def read(self, topic: str, timeout_s: float = 30.0) -> list[Message]:
        """Read a topic from its first record to its end as of now, partition by partition."""
        consumer = Consumer(
            {**self.consumer_config, "group.id": "reader", "auto.offset.reset": "error"}
        )
        try:
            partitions = consumer.list_topics(topic, timeout=timeout_s).topics[topic].partitions
            found: list[Message] = []
            for partition in sorted(partitions):
                low, high = consumer.get_watermark_offsets(
                    TopicPartition(topic, partition), timeout=timeout_s
                )
                consumer.assign([TopicPartition(topic, partition, low)])
                deadline = time.monotonic() + timeout_s
                while low < high:
                    assert time.monotonic() < deadline, f"{topic}/{partition}: {low} of {high}"
                    for message in consumer.consume(10_000, 0.2):
                        assert not message.error(), message.error()
                        found.append(message)
                        low = message.offset() + 1
            return found
        finally:
            consumer.close()

    def committed(self, group_id: str, topic: str, partitions: int) -> list[int]:
        """Return the offsets that a consumer group has committed (-1001: none)."""
        consumer = Consumer({**self.config, "group.id": group_id})
        try:
            asked = [TopicPartition(topic, partition) for partition in range(partitions)]
            return [found.offset for found in consumer.committed(asked, timeout=30)]
        finally:
            consumer.close()


def await_that(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Wait until `condition` holds; fail with `what` if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def broker() -> Iterator[TestBroker]:
    """Return the shared test broker."""
    servers = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
    if servers:
        yield TestBroker(servers, None)
    else:
        with DevBroker() as dev:
            yield TestBroker(dev.bootstrap_servers, dev)


@pytest.fixture
def dev_broker() -> Iterator[DevBroker]:
    """Return an embedded broker of the test's own, to be broken at will."""
    with DevBroker() as dev:
        yield dev


@pytest.fixture(autouse=True)
def not_draining() -> Iterator[None]:
    """Undo a drain request, which is for the life of a process."""
    source._drain.clear()
    yield
    source._drain.clear()
