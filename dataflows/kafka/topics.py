"""Look up topics when a flow starts, in bounded time, and name their partitions for recovery."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

import dataflows.kafka.client_log  # noqa: F401  (for every client of the flow)
from dataflows.kafka import access
from dataflows.kafka.errors import StartupError
from dataflows.kafka.security import Role

STARTUP_TIMEOUT_S = 30.0
"""Default bound of every look-up at start-up, in seconds."""


_TELL_AFTER_S = 2.0
_CLIENT_MOST_RECORD_BYTES = 1_000_000  # librdkafka's default of message.max.bytes
_logger = logging.getLogger(__name__)


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
    role: Role | None = None,
) -> dict[str, int]:
    """Return the number of partitions of each topic, without creating any.

    Args:
        client: a Consumer, Producer or AdminClient.
        config: its configuration, to find out why brokers do not answer.
        topics: names; each must exist.
        timeout_s: bound in seconds.
        role: whose client it is, for the settings that an error names.

    Raises:
        StartupError: No broker answered in time, or lets us in, or a topic does not exist, or may
            not be looked at.
    """
    servers = config.get("bootstrap.servers", "")
    deadline, told = time.monotonic() + timeout_s, False
    who = "" if role is None else f" the {role}"
    while True:
        remaining = max(0.1, deadline - time.monotonic())
        try:
            # All topics, not one: asking for one by name may create it.
            found_all = client.list_topics(timeout=min(remaining, _TELL_AFTER_S))
            known = found_all.topics
            break
        except KafkaException as error:
            look_s = min(access.LOOK_S, max(0.5, deadline - time.monotonic()))
            trouble = access.why_not(config, role, within_s=look_s)
            over = time.monotonic() >= deadline
            if trouble is not None and (trouble.final or over):
                raise StartupError(
                    f"no Kafka broker lets{who or ' us'} in at {servers!r}: "
                    f"{trouble.reason}. {trouble.remedy}"
                ) from error
            if over:
                raise StartupError(
                    f"no Kafka broker answered at {servers!r} within {timeout_s:g} s "
                    f"({error.args[0].str()}): start the broker, or set "
                    "KAFKA_BOOTSTRAP_SERVERS=host:port to one that runs"
                ) from error
            if not told:
                told = True
                _logger.warning(
                    "no Kafka broker answers at %r; waiting up to %g s", servers, timeout_s
                )
            time.sleep(0.2)
    counts = {}
    for topic in topics:
        found = known.get(topic)
        if found is None or not found.partitions:
            cluster = getattr(found_all, "cluster_id", None) or access.EMBEDDED
            if not cluster.startswith(access.EMBEDDED) and access.may_not_describe(
                config, topic, timeout_s
            ):
                raise StartupError(
                    f"the brokers do not allow{who or ' us'} to Describe topic {topic!r}, if there "
                    f"is one: grant what is needed there; {access.SEE}"
                )
            others = ", ".join(sorted(name for name in known if not name.startswith("__")))
            raise StartupError(
                f"topic {topic!r} does not exist at {servers!r} (there are: {others or 'none'}): "
                "create it, or correct the topic's name in the settings"
            )
        counts[topic] = len(found.partitions)
    return counts


def most_record_bytes(
    admin: AdminClient, config: Mapping[str, Any], topic: str, *, timeout_s: float = 10.0
) -> int:
    """Return how many bytes a record of a topic may have: what client and topic both take.

    Where the topic's limit is not told (see `_setting`) it is the client's ``message.max.bytes``.
    """
    client = int(config.get("message.max.bytes", _CLIENT_MOST_RECORD_BYTES))
    limit = _setting(admin, topic, "max.message.bytes", timeout_s)
    return client if limit is None else min(client, int(limit))


def retention_s(admin: AdminClient, topic: str, *, timeout_s: float = 10.0) -> float | None:
    """Return for how many seconds a topic keeps a record; None: it does not tell (`_setting`).

    Infinite where it is kept for ever, or until the topic is too large.
    """
    told = _setting(admin, topic, "retention.ms", timeout_s)
    if told is None:
        return None
    return math.inf if int(told) < 0 else int(told) / 1000


def _setting(admin: AdminClient, topic: str, name: str, timeout_s: float) -> str | None:
    """Return a topic's setting; None if the brokers do not tell.

    An ACL on DescribeConfigs may be missing (the log says so), or they are the embedded one.
    """
    resource = ConfigResource(ResourceType.TOPIC, topic)
    try:
        if access.is_embedded(admin, timeout_s):
            return None
        asked = admin.describe_configs([resource], request_timeout=timeout_s)
        value = asked[resource].result(timeout_s)[name].value
        return None if value is None else str(value)
    except (KafkaException, KeyError, TimeoutError) as error:
        if access.is_refusal(error):
            _logger.warning(
                "the brokers do not allow the admin to DescribeConfigs of topic %r: its %s is "
                "unknown; %s",
                topic,
                name,
                access.SEE,
            )
        else:
            _logger.debug("%s of %s is unknown: %s", name, topic, error)
        return None


def watermarks(
    consumer: Consumer, topic: str, partition: int, servers: Any, *, timeout_s: float
) -> tuple[int, int]:
    """Return the first offset that a partition holds, and the one after its last.

    Raises StartupError, naming `servers`, if its leader gives none in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            found = consumer.get_watermark_offsets(
                TopicPartition(topic, partition), timeout=max(0.1, deadline - time.monotonic())
            )
            if found is not None:
                return int(found[0]), int(found[1])
            reason = "timed out"
        except KafkaException as error:
            reason = error.args[0].str()
        if time.monotonic() >= deadline:
            raise StartupError(
                f"the leader of {part_name(topic, partition)} gave no offsets within "
                f"{timeout_s:g} s ({reason}): see to the brokers at {servers!r}"
            )
        time.sleep(0.1)
