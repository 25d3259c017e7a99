"""Create the topics of the fraud flow, where they do not exist yet.

    python -m dataflows.topics create --partitions 8

Names, brokers and who asks (the admin: KAFKA_ADMIN_SASL_USERNAME, …) come from the settings, as the
flow's do. The input topics stamp records with the
broker's clock (``message.timestamp.type=LogAppendTime``). What exists is left as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from dataflows.kafka import access
from dataflows.kafka.errors import StartupError
from dataflows.kafka.topics import partition_counts
from dataflows.settings import Settings, SettingsError, load_for_tools

_BROKERS_CLOCK = {"message.timestamp.type": "LogAppendTime"}
_TIMEOUT_S = 30.0


def wanted(settings: Settings, partitions: int, replicas: int) -> list[NewTopic]:
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
            getattr(settings, name),
            count,
            replicas,
            config=config,
        )
        for name, (count, config) in counts.items()
    ]


def create(topics: Sequence[NewTopic], admin: AdminClient) -> dict[str, str]:
    """Create topics; return what became of each: ``created`` or ``exists``.

    Raises StartupError if one can be neither found nor created.
    """
    outcome = {}
    for topic, future in admin.create_topics(list(topics), request_timeout=_TIMEOUT_S).items():
        try:
            future.result(_TIMEOUT_S)
            outcome[topic] = "created"
        except KafkaException as error:
            reason = error.args[0]
            if access.is_refusal(error):
                raise StartupError(
                    f"the brokers do not allow the admin to Create topic {topic!r}: grant it; "
                    "python -m dataflows.acls --for topics lists what is needed"
                ) from error
            if reason.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise StartupError(f"{topic} could not be created: {reason.str()}") from error
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
    parser.add_argument("--bootstrap-servers", help="brokers (KAFKA_BOOTSTRAP_SERVERS)")
    options = parser.parse_args(arguments)
    if options.partitions < 1:
        parser.error("--partitions must be 1 or more")
    try:
        settings = load_for_tools(options.bootstrap_servers)
        config = settings.admin()
        admin = AdminClient(config)
        partition_counts(admin, config, [], timeout_s=_TIMEOUT_S, role="admin")
        topics = wanted(settings, options.partitions, options.replicas)
        for topic, outcome in create(topics, admin).items():
            print(f"{topic}: {outcome}")
    except (SettingsError, StartupError) as error:
        print(f"dataflows.topics: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
