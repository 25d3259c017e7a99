"""Print a topic's records as JSON lines, from its beginning to its end as of now.

    python -m dataflows.kafka.read audit

One line a record: topic, partition, offset, append_time (ms), key and value (base64, or null).
Records of one partition come in order. Only committed ones are read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from dataflows.kafka.errors import StartupError
from dataflows.kafka.topics import STARTUP_TIMEOUT_S, partition_counts


def read_topic(
    topic: str, config: Mapping[str, Any], *, timeout_s: float = STARTUP_TIMEOUT_S
) -> Iterator[Message]:
    """Yield the records that a topic holds now, each partition's in order.

    Raises StartupError if no broker answers or the topic does not exist, KafkaException if reading
    fails for good.
    """
    consumer = Consumer(
        {
            **config,
            "group.id": "kafka-read",  # never joined, nothing is committed
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
        }
    )
    try:
        count = partition_counts(consumer, config, [topic], timeout_s=timeout_s)[topic]
        reading = set(range(count))
        consumer.assign([TopicPartition(topic, partition, 0) for partition in reading])
        while reading:
            for message in consumer.consume(1000, timeout=1.0):
                error = message.error()
                if error is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    reading.discard(message.partition())
                elif not error.retriable():
                    raise KafkaException(error)
    finally:
        consumer.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        "python -m dataflows.kafka.read",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("topic")
    parser.add_argument(
        "--bootstrap-servers",
        default=os.environ.get("KAFKA_BOOTSTRAP_SERVERS"),
        help="brokers (KAFKA_BOOTSTRAP_SERVERS)",
    )
    options = parser.parse_args(arguments)
    if not options.bootstrap_servers:
        parser.error("set KAFKA_BOOTSTRAP_SERVERS or give --bootstrap-servers")
    more = os.environ.get("KAFKA_CONSUMER_OPTIONS", "{}")
    config = {"bootstrap.servers": options.bootstrap_servers, **msgspec.json.decode(more)}
    encode = msgspec.json.Encoder().encode
    try:
        for message in read_topic(options.topic, config):
            line = {
                "topic": message.topic(),
                "partition": message.partition(),
                "offset": message.offset(),
                "append_time": message.timestamp()[1],
                "key": message.key(),
                "value": message.value(),
            }
            sys.stdout.buffer.write(encode(line) + b"\n")
    except (StartupError, KafkaException) as error:
        print(f"dataflows.kafka.read: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
