"""List the ACLs that the flow needs, and no others, from its settings.

    python -m dataflows.acls                                    what the flow needs
    python -m dataflows.acls --for topics                       what creates the topics
    python -m dataflows.acls --principal User:CN=fraud,O=Bank   where no user name is set

Printed are commands for ``kafka-acls.sh``, or with --json objects. Who needs them: by default the
user that each role has by the settings (KAFKA_SASL_USERNAME, KAFKA_SINK_SASL_USERNAME, …). What a
command's comment calls optional may be left out, at the price it says. The flow looks at start
whether it has the others.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence

import msgspec

from dataflows.kafka.access import Acl
from dataflows.kafka.security import ROLES, Role, variables
from dataflows.settings import Settings, SettingsError, load_for_tools

REPLAY_GROUP = "dead-letter-replay"
PURPOSES = ("flow", "topics", "dead-letters", "replay")
_FLAGS = {"topic": "--topic", "group": "--group", "transactional-id": "--transactional-id"}


def acls(settings: Settings, purpose: str = "flow") -> list[Acl]:
    """Return what the brokers must allow.

    Args:
        settings: of the flow; `delivery` and the names in it decide.
        purpose: ``flow``; ``topics``, for ``dataflows.topics create``; ``dead-letters`` and
            ``replay``, for ``dataflows.dead_letter list`` and ``replay``.
    """
    inputs = [settings.transactions_topic, settings.fraud_reports_topic]
    letters = settings.dead_letters_topic
    outputs = [settings.predictions_topic, letters, settings.audit_topic]
    if purpose == "topics":
        return [Acl("admin", "Create", "topic", topic) for topic in [*inputs, *outputs]]
    if purpose == "dead-letters":
        return [Acl("source", "Read", "topic", letters)]
    if purpose == "replay":
        return [
            Acl("source", "Read", "topic", letters),
            Acl("source", "Read", "group", REPLAY_GROUP),
            *(
                Acl("source", "Read", "topic", topic, without="what was cut cannot be sent back")
                for topic in inputs
            ),
            *(Acl("sink", "Write", "topic", topic) for topic in inputs),
        ]
    found = [Acl("source", "Read", "topic", topic) for topic in inputs]
    if settings.delivery != "at_most_once":
        found.append(Acl("source", "Read", "group", settings.group_id))
    found += [Acl("sink", "Write", "topic", topic) for topic in outputs]
    if settings.delivery == "exactly_once":
        found += [Acl("sink", "Read", "topic", topic) for topic in outputs]
        found.append(Acl("sink", "Write", "transactional-id", f"{settings.group_id}/", True))
    for topics, without in (
        (inputs, "the alert on lag near retention has nothing to go by"),
        (outputs, "records larger than 1 MB, or than a smaller limit of the topic, stop the flow"),
    ):
        found += [Acl("admin", "DescribeConfigs", "topic", t, without=without) for t in topics]
    return found


def principals(settings: Settings, given: Sequence[str] = ()) -> dict[Role, str]:
    """Return each role's principal: as `given` (``User:x``, or ``sink=User:x``), else its user.

    Raises SettingsError for a role that has none.
    """
    found: dict[Role, str] = {}
    for role in ROLES:
        shared = [text for text in given if text.partition("=")[0] not in ROLES]
        own = [text.partition("=")[2] for text in given if text.startswith(f"{role}=")]
        config = {"source": settings.consumer, "sink": settings.producer, "admin": settings.admin}
        user = config[role]().get("sasl.username")
        named = [*own, *shared, *([f"User:{user}"] if user else [])]
        if not named:
            raise SettingsError(
                f"who the {role} is to the brokers cannot be told: set "
                f"{variables('sasl_username', role)}, or give --principal User:NAME"
            )
        found[role] = named[0]
    return found


def command(acl: Acl, principal: str, servers: str) -> str:
    """Return the ``kafka-acls.sh`` command that grants it."""
    words = ["kafka-acls.sh", "--bootstrap-server", servers, "--add"]
    words += ["--allow-principal", principal, "--operation", acl.operation]
    words += [_FLAGS[acl.resource], acl.name]
    if acl.prefixed:
        words += ["--resource-pattern-type", "prefixed"]
    return shlex.join(words) + (f"  # optional: without it {acl.without}" if acl.without else "")


def _described(acl: Acl, principal: str) -> Mapping[str, str | bool]:
    return {
        "role": acl.role,
        "principal": principal,
        "operation": acl.operation,
        "resource_type": acl.resource,
        "resource_name": acl.name,
        "pattern_type": "prefixed" if acl.prefixed else "literal",
        "optional": bool(acl.without),
        "without": acl.without,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``. Returns 2 for wrong settings."""
    parser = argparse.ArgumentParser(
        "python -m dataflows.acls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--for", dest="purpose", choices=PURPOSES, default="flow")
    parser.add_argument(
        "--principal",
        action="append",
        default=[],
        metavar="[ROLE=]User:NAME",
        help="who is allowed, all roles or one; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    try:
        settings = load_for_tools()
        who = principals(settings, options.principal)
        servers = settings.kafka_bootstrap_servers
        lines = [
            msgspec.json.encode(_described(acl, who[acl.role])).decode()
            if options.json
            else command(acl, who[acl.role], servers)
            for acl in acls(settings, options.purpose)
        ]
    except SettingsError as error:
        print(f"dataflows.acls: {error}", file=sys.stderr)
        return 2
    print("\n".join(dict.fromkeys(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
