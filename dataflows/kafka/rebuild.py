"""Find where to begin to read, when what was made of earlier records has been lost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from dataflows.kafka.errors import StartupError
from dataflows.kafka.topics import part_name

_NO_GROUP = KafkaError.GROUP_AUTHORIZATION_FAILED  # reading does not need the group


def first_unread_ms(
    config: Mapping[str, Any],
    begin: Mapping[str, int],
    time_ms: Callable[[Message], int],
    deadline: float,
) -> float:
    """Return the earliest time of the first records still to be answered; infinity: there is none.

    Args:
        config: of the consumer, which tells the ends of partitions.
        begin: partition (`part_name`) → offset of the first record to be answered, if it is there.
        time_ms: the time of a record, in ms.
        deadline: monotonic seconds. StartupError names what was silent until then.

    Reads one record of each partition, with a client of its own: what that one has fetched is
    nobody's business later.
    """
    asked = {}
    for name, offset in begin.items():
        topic, _, partition = name.rpartition("/")
        asked[name] = TopicPartition(topic, int(partition), offset)
    found: dict[str, float] = {}
    consumer = Consumer({**config}, logger=logging.getLogger("librdkafka"))
    try:
        consumer.assign(list(asked.values()))
        while silent := asked.keys() - found.keys():
            for message in consumer.consume(1000, 0.1):
                topic, partition, error = message.topic(), message.partition(), message.error()
                if topic is None or partition is None:
                    continue  # about a broker, which is asked again
                if error is None:
                    found.setdefault(part_name(topic, partition), time_ms(message))
                elif not (error.retriable() or error.code() == _NO_GROUP):
                    # The end; or gone, which the worker that reads this partition refuses.
                    found.setdefault(part_name(topic, partition), math.inf)
            if time.monotonic() > deadline:
                raise StartupError(
                    f"{', '.join(sorted(silent))}: the first record to be answered was not "
                    "delivered in time, so it is not known how far back the windows reach. See to "
                    "the brokers, or raise STARTUP_TIMEOUT_S"
                )
    finally:
        consumer.close()
    return min(found.values(), default=math.inf)


def offsets_since(
    consumer: Consumer, partitions: Sequence[TopicPartition], since_ms: int, deadline: float
) -> list[int | None]:
    """Return of each partition the first offset with a timestamp ≥ `since_ms`; None: there is none.

    The timestamps are the brokers', or the producers' where a topic is so configured.
    """
    asked = [TopicPartition(at.topic, at.partition, since_ms) for at in partitions]
    try:
        found = consumer.offsets_for_times(asked, timeout=max(0.1, deadline - time.monotonic()))
        for at in found:
            if at.error is not None:
                raise KafkaException(at.error)
    except KafkaException as error:
        raise StartupError(
            f"the brokers did not say which records came after {since_ms} ms "
            f"({error.args[0].str()}): see to them, or raise STARTUP_TIMEOUT_S"
        ) from error
    return [at.offset if at.offset >= 0 else None for at in found]
