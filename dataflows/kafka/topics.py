"""Look up topics when a flow starts, in bounded time, and name their partitions for recovery."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from confluent_kafka import KafkaException

STARTUP_TIMEOUT_S = 30.0
"""Default bound of every look-up at start-up, in seconds."""


class StartupError(RuntimeError):
    """Say why a flow cannot start: what was looked for, where, for how long, and what to do."""


class _Client(Protocol):
    def list_topics(self, *, timeout: float) -> Any: ...


def part_name(topic: str, partition: int) -> str:
    """Return the Bytewax name of a partition. Recovery keys: never change the format.

    >>> part_name("transactions", 3)
    'transactions/00003'
    """
    return f"{topic}/{partition:05d}"


def partition_counts(
    client: _Client,
    config: Mapping[str, Any],
    topics: Iterable[str],
    *,
    timeout_s: float = STARTUP_TIMEOUT_S,
) -> dict[str, int]:
    """Return the number of partitions of each topic, without creating any.

    Args:
        client: a Consumer, Producer or AdminClient.
        config: its configuration, for the error's address.
        topics: names; each must exist.
        timeout_s: bound in seconds.

    Raises:
        StartupError: No broker answered in time, or a topic does not exist.
    """
    servers = config.get("bootstrap.servers", "")
    deadline = time.monotonic() + timeout_s
    while True:
        remaining = max(0.1, deadline - time.monotonic())
        try:
            # All topics, not one: asking for one by name may create it.
            known = client.list_topics(timeout=remaining).topics
            break
        except KafkaException as error:
            if time.monotonic() >= deadline:
                raise StartupError(
                    f"no Kafka broker answered at {servers!r} within {timeout_s:g} s "
                    f"({error.args[0].str()}): start the broker, or set "
                    "KAFKA_BOOTSTRAP_SERVERS=host:port to one that runs"
                ) from error
            time.sleep(0.2)
    counts = {}
    for topic in topics:
        found = known.get(topic)
        if found is None or not found.partitions:
            others = ", ".join(sorted(name for name in known if not name.startswith("__")))
            raise StartupError(
                f"topic {topic!r} does not exist at {servers!r} (there are: {others or 'none'}): "
                "create it, or correct the topic's name in the settings"
            )
        counts[topic] = len(found.partitions)
    return counts
