"""Create topics, produce and read back in a test, whatever the broker is."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewTopic

from dataflows.kafka.dev_broker import CONSUMER_CONFIG, DevBroker
from tests.kafka.cluster import create_topic

_names = itertools.count()

Isolation = Literal["read_committed", "read_uncommitted"]


class TestBroker:
    """A broker and a few words to talk to it: the embedded one (`dev`) or Apache Kafka.

    `config` and `consumer_config` are what clients need to reach it.
    """

    __test__ = False

    def __init__(self, bootstrap_servers: str, dev: DevBroker | None = None) -> None:
        self.config: dict[str, Any] = {"bootstrap.servers": bootstrap_servers}
        self.consumer_config = {**self.config, **(CONSUMER_CONFIG if dev else {})}
        self.dev = dev
        self._readers: dict[Isolation, Consumer] = {}

    def close(self) -> None:
        """Close the consumers of `read`."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def topic(
        self,
        name: str,
        partitions: int,
        *,
        replicas: int = -1,
        config: Mapping[str, str] | None = None,
    ) -> str:
        """Create a topic with a name of its own, wait until it can be used, return the name.

        Args:
            replicas: replication factor; -1: the cluster's default.
            config: topic settings, as ``{"max.message.bytes": "20000000"}``. The embedded broker
                has none: it takes messages of any size.
        """
        unique = f"{name}_{os.getpid()}_{next(_names)}"
        if self.dev is not None:
            self.dev.create_topic(unique, partitions)
        else:
            topic = NewTopic(unique, partitions, replicas, config=dict(config or {}))
            create_topic(self.config, topic)
        return unique

    def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
        """Drop records before an offset, as retention would; the embedded one: whole batches."""
        if self.dev is not None:
            self.dev.delete_records(topic, partition, before_offset)
        else:
            before = TopicPartition(topic, partition, before_offset)
            admin = AdminClient(self.config)  # kept: its results do not outlive it
            for result in admin.delete_records([before]).values():
                result.result(30)

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

    def read(
        self,
        topic: str,
        timeout_s: float = 30.0,
        *,
        isolation: Isolation = "read_committed",
    ) -> list[Message]:
        """Read a topic from its first record to its end as of now, sorted by partition and offset.

        With `read_committed`, records of aborted transactions are left out, and a partition ends
        before the first record of an open transaction. The embedded broker knows no difference.
        """
        consumer = self._reader(isolation)
        partitions = consumer.list_topics(topic, timeout=timeout_s).topics[topic].partitions
        assert partitions, f"topic {topic!r} does not exist"
        unfinished = set(partitions)
        found: list[Message] = []
        trouble: KafkaError | None = None
        deadline = time.monotonic() + timeout_s
        consumer.assign([TopicPartition(topic, each, OFFSET_BEGINNING) for each in partitions])
        try:
            while unfinished:
                assert time.monotonic() < deadline, f"{topic}: no end of {unfinished}; {trouble}"
                message = consumer.poll(0.1)
                if message is None:
                    continue
                error = message.error()
                if error is None:
                    found.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    unfinished.discard(message.partition())
                else:
                    trouble = error  # librdkafka goes on, as when a leader is away for a moment
        finally:
            consumer.unassign()
        found.sort(key=lambda message: (message.partition(), message.offset()))
        return found

    def _reader(self, isolation: Isolation) -> Consumer:
        """Return the consumer of an isolation level, kept because connecting takes longest."""
        if isolation not in self._readers:
            self._readers[isolation] = Consumer(
                {
                    **self.consumer_config,
                    "group.id": "reader",
                    # librdkafka remembers where a partition began the last time.
                    "auto.offset.reset": "earliest",
                    "enable.auto.commit": False,
                    "enable.partition.eof": True,
                    "isolation.level": isolation,
                    # The end of a partition is known when a fetch comes back empty.
                    "fetch.wait.max.ms": 5,
                }
            )
        return self._readers[isolation]

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
