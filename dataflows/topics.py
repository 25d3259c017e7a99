"""Create the topics of the fraud flow, where they do not exist yet.

    python -m dataflows.topics create --partitions 8

Names come from the environment as the flow's do (TRANSACTIONS_TOPIC, …; not from SETTINGS_FILE),
and so does what KAFKA_PRODUCER_OPTIONS says about security. The input topics stamp records with the
broker's clock (``message.timestamp.type=LogAppendTime``). What exists is left as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from dataflows.kafka.errors import StartupError
from dataflows.kafka.topics import partition_counts
from dataflows.settings import Settings

_BROKERS_CLOCK = {"message.timestamp.type": "LogAppendTime"}
_TIMEOUT_S = 30.0


def wanted(partitions: int, replicas: int) -> list[NewTopic]:
    """Return the flow's topics: `partitions` for the two that carry each transaction, fewer else.

    `replicas` −1 means the brokers' default.
    """
    few = max(1, partitions // 2)
    counts = {
        "transactions_topic": (partitions, _BROKERS_CLOCK),
        "fraud_reports_topic": (few, _BROKERS_CLOCK),
        "predictions_topic": (partitions, {}),
        "dead_letters_topic": (1, {}),
        "audit_topic": (1, {}),
    }
    return [
        NewTopic(
            os.environ.get(name.upper()) or Settings.model_fields[name].default,
            count,
            replicas,
            config=config,
        )
        for name, (count, config) in counts.items()
    ]


def create(topics: Sequence[NewTopic], admin: AdminClient) -> dict[str, str]:
    """Create topics; return what became of each: ``created`` or ``exists``.

    Raises KafkaException if one can be neither found nor created.
    """
    outcome = {}
    for topic, future in admin.create_topics(list(topics), request_timeout=_TIMEOUT_S).items():
        try:
            future.result(_TIMEOUT_S)
            outcome[topic] = "created"
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
            outcome[topic] = "exists"
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        "python -m dataflows.topics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["create"])
    parser.add_argument(
        "--partitions", type=int, default=4, help="of transactions and predictions (%(default)s)"
    )
    parser.add_argument(
        "--replicas", type=int, default=-1, help="of each partition (-1: the brokers' default)"
    )
    parser.add_argument(
        "--bootstrap-servers",
        default=os.environ.get("KAFKA_BOOTSTRAP_SERVERS"),
        help="brokers (KAFKA_BOOTSTRAP_SERVERS)",
    )
    options = parser.parse_args(arguments)
    if not options.bootstrap_servers:
        parser.error("set KAFKA_BOOTSTRAP_SERVERS or give --bootstrap-servers")
    if options.partitions < 1:
        parser.error("--partitions must be 1 or more")
    try:
        more = msgspec.json.decode(
            os.environ.get("KAFKA_PRODUCER_OPTIONS") or "{}", type=dict[str, Any]
        )
    except msgspec.MsgspecError:
        parser.error("KAFKA_PRODUCER_OPTIONS is not a JSON object of librdkafka settings")
    config = {"bootstrap.servers": options.bootstrap_servers, **more}
    admin = AdminClient(config)
    try:
        partition_counts(admin, config, [], timeout_s=_TIMEOUT_S)
        for topic, outcome in create(wanted(options.partitions, options.replicas), admin).items():
            print(f"{topic}: {outcome}")
    except (StartupError, KafkaException) as error:
        print(f"dataflows.topics: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
