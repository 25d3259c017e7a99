"""Print a topic's records as JSON lines, from its beginning to its end as of now.

    python -m dataflows.kafka.read audit                  for programs
    python -m dataflows.kafka.read --text predictions     for people, and jq

One line a record: topic, partition, offset, append_time (ms), key and value (base64, or null). With
--text key and value are text, a value that is a JSON object is nested as it is, and headers
(`{"name": …, "value": …}`, in order, null if they cannot be read) are shown too; what is not UTF-8
is base64, and says so in its name: key_base64, value_base64.
Records of one partition come in order. Only committed ones are read.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from dataflows.kafka.dead_letter import read_headers
from dataflows.kafka.errors import StartupError
from dataflows.kafka.topics import STARTUP_TIMEOUT_S, partition_counts
from dataflows.settings import SettingsError, load_for_tools


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
        count = partition_counts(consumer, config, [topic], timeout_s=timeout_s, role="source")[
            topic
        ]
        reading = set(range(count))
        consumer.assign([TopicPartition(topic, partition, 0) for partition in reading])
        while reading:
            for message in consumer.consume(1000, timeout=1.0):
                error = message.error()
                if error is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    reading.discard(message.partition())
                elif error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                    pass  # the group is a name that a client has to have
                elif not error.retriable():
                    raise KafkaException(error)
    finally:
        consumer.close()


def readable(message: Message) -> dict[str, Any]:
    """Return key, headers and value as a person would read them; see the module's docstring.

    >>> record = Message(key=b"C1", value=b'{"score": 0.10}', headers=[("id", b"\\xff")])
    >>> print(msgspec.json.encode(readable(record)).decode())
    {"key":"C1","headers":[{"name":"id","value_base64":"/w=="}],"value":{"score":0.10}}
    """
    headers = read_headers(message)
    value = message.value()
    nested = None if value is None else _json_object(value)
    return {
        **_text("key", message.key()),
        "headers": headers and [{"name": name, **_text("value", held)} for name, held in headers],
        **(_text("value", value) if nested is None else {"value": nested}),
    }


def _text(name: str, content: bytes | None) -> dict[str, str | None]:
    try:
        return {name: None if content is None else content.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(content or b"").decode()}


def _json_object(content: bytes) -> msgspec.Raw | None:
    """Return a JSON object on one line, its numbers as they were written; None if it is none."""
    try:
        msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return msgspec.Raw(msgspec.json.format(content, indent=-1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        "python -m dataflows.kafka.read",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("topic")
    parser.add_argument(
        "--text", action="store_true", help="text and nested JSON instead of base64, with headers"
    )
    parser.add_argument("--bootstrap-servers", help="brokers (KAFKA_BOOTSTRAP_SERVERS)")
    options = parser.parse_args(arguments)
    encode = msgspec.json.Encoder().encode
    try:
        config = load_for_tools(options.bootstrap_servers).consumer()
        for message in read_topic(options.topic, config):
            line = {
                "topic": message.topic(),
                "partition": message.partition(),
                "offset": message.offset(),
                "append_time": message.timestamp()[1],
            }
            line |= (
                readable(message)
                if options.text
                else {"key": message.key(), "value": message.value()}
            )
            sys.stdout.buffer.write(encode(line) + b"\n")
    except (SettingsError, StartupError, KafkaException) as error:
        print(f"dataflows.kafka.read: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
