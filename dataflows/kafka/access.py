"""Find out at start whether the brokers let us in, and allow what the flow will do.

librdkafka says of a wrong password or certificate only that a broker does not answer; why comes by
its error callback. And it says that something is not allowed when it is first done: here the
brokers are asked what they allow before anything is read.
"""

from __future__ import annotations

import logging
import re
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from confluent_kafka import KafkaError, KafkaException, Producer, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient

from dataflows.kafka.errors import StartupError
from dataflows.kafka.security import Role, variables

LOOK_S = 1.5
"""How long `why_not` listens, in seconds."""
SEE = "python -m dataflows.acls lists what is needed"
EMBEDDED = "mockCluster"
"""What the cluster id of librdkafka's mock begins with."""
_NOT_ALLOWED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "topic",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "group",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "transactional id",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "cluster",
}
Resource = Literal["topic", "group", "transactional-id"]


@dataclass(frozen=True, slots=True)
class Acl:
    """Something that the brokers must allow.

    Attributes:
        role: who does it.
        operation: as Kafka names it, ``DescribeConfigs``. Read and Write imply Describe.
        resource, name: on what.
        prefixed: on everything whose name begins with `name`.
        without: what is lost if it is not allowed; empty: the flow or the tool refuses to run.
    """

    role: Role
    operation: str
    resource: Resource
    name: str
    prefixed: bool = False
    without: str = ""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why no broker lets a client in.

    Attributes:
        reason: what librdkafka says.
        remedy: which settings to look at.
        final: it will not get better by waiting.
    """

    reason: str
    remedy: str
    final: bool


class _Heard(logging.Handler):
    """Collect what a client says: of a closed connection it tells its log only."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def error(self, error: KafkaError) -> None:
        self.said.append(error.str())


def why_not(
    config: Mapping[str, Any], role: Role | None = None, *, within_s: float = LOOK_S
) -> Trouble | None:
    """Return why the brokers do not let in who has these client settings; None: it is not known."""
    heard = _Heard()
    logger = logging.Logger("why_not")  # of this call alone
    logger.addHandler(heard)
    asked = {**config, "error_cb": heard.error, "log_level": 6, "log.connection.close": True}
    client = Producer({name: asked[name] for name in asked if name != "debug"}, logger=logger)
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        client.poll(0.05)
        while heard.said:
            found = _explain(heard.said.pop(0), config, role)
            if found is not None:
                return found
    return None


def _explain(said: str, config: Mapping[str, Any], role: Role | None) -> Trouble | None:
    """Return what is meant by what librdkafka 2.16 says."""
    reason = re.sub(r"^FAIL \[.*?\] \[thrd:.*?\]: ", "", said)
    reason = re.sub(r"^\S+(/bootstrap|/\d+): ", "", reason)
    reason = re.sub(r" \(after \d+ms in state \w+.*\)$", "", reason)

    def see(names: str, what: str = "", *, final: bool = True) -> Trouble:
        return Trouble(reason.rstrip("."), f"See to {variables(names, role)}{what}", final)

    if "OAUTHBEARER token" in said:  # from an endpoint that may be down for a moment
        names = "sasl_oauthbearer_token_endpoint_url sasl_oauthbearer_client_id"
        return see(f"{names} sasl_oauthbearer_client_secret", final=False)
    protocol = f", which is {config.get('security.protocol', 'PLAINTEXT')}"
    if "not valid in current SASL state" in said or "PLAINTEXT broker listener" in said:
        return see("security_protocol", protocol)
    if "SASL" in said and ("authentication error" in said or "handshake failed" in said):
        names = "sasl_oauthbearer_client_id sasl_oauthbearer_client_secret"
        by_token = config.get("sasl.mechanism") == "OAUTHBEARER"
        return see(f"sasl_mechanism {names if by_token else 'sasl_username sasl_password'}")
    if "certificate verify failed" in said:
        fault = _certificate_fault(config)
        if fault is not None and "mismatch" in fault:
            remedy = "Name the brokers in KAFKA_BOOTSTRAP_SERVERS as their certificates do"
            return Trouble(fault.rstrip("."), remedy, final=True)
        return see("ssl_ca_location")
    if "alert" in said and "ertificate" in said:
        return see("ssl_certificate_location ssl_key_location")
    if "closed by peer" in said:  # or it is being stopped
        return see("security_protocol", protocol, final=False)
    return see("security_protocol ssl_ca_location") if "SSL handshake failed" in said else None


def _certificate_fault(config: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the brokers' certificates; librdkafka has one word for all of it.

    Nothing is sent but the handshake.
    """
    for server in str(config.get("bootstrap.servers", "")).split(","):
        host, _, port = server.strip().rpartition(":")
        try:
            authorities = config.get("ssl.ca.location")
            tls = ssl.create_default_context(cafile=authorities)
            with socket.create_connection((host.strip("[]"), int(port)), LOOK_S) as plain:
                tls.wrap_socket(plain, server_hostname=host.strip("[]")).close()
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        except (OSError, ValueError):
            continue
    return None


def not_allowed(error: KafkaError) -> str:
    """Return what to do about an error that says that something is not allowed; else nothing."""
    if error.code() not in _NOT_ALLOWED:
        return ""
    return f"The brokers do not allow it on that {_NOT_ALLOWED[error.code()]}: grant it ({SEE}). "


def check(acls: Iterable[Acl], role: Role, config: Mapping[str, Any], *, timeout_s: float) -> None:
    """Raise StartupError for the first thing that a role needs and the brokers do not allow it.

    What has a `without` is not asked about. A transactional id is tried: one is made, with
    ``startup`` after the prefix, and used for nothing. What the brokers do not answer (the embedded
    one) is taken to be allowed. Call it when they are known to answer.
    """
    needed = [acl for acl in acls if acl.role == role and not acl.without]
    admin = AdminClient(dict(config), logger=logging.getLogger("librdkafka"))
    if is_embedded(admin, timeout_s):
        return
    topics = list(dict.fromkeys(acl.name for acl in needed if acl.resource == "topic"))
    groups = list(dict.fromkeys(acl.name for acl in needed if acl.resource == "group"))
    asked: dict[tuple[str, str], Any] = {}
    if topics:
        found = admin.describe_topics(
            TopicCollection(topics), include_authorized_operations=True, request_timeout=timeout_s
        )
        asked |= {("topic", name): future for name, future in found.items()}
    if groups:
        found = admin.describe_consumer_groups(
            groups, include_authorized_operations=True, request_timeout=timeout_s
        )
        asked |= {("group", name): future for name, future in found.items()}
    for acl in needed:
        if acl.resource == "transactional-id":
            allowed = _may_write_transactions(acl.name, config, timeout_s)
        else:
            allowed = _allows(acl.operation, asked[acl.resource, acl.name], timeout_s)
        if not allowed:
            raise StartupError(refusal(acl, config))


def refusal(acl: Acl, config: Mapping[str, Any]) -> str:
    """Return the sentence for an ACL that is missing."""
    user = config.get("sasl.username")
    who = f"the {acl.role}, user {user!r}," if user else f"the {acl.role}"
    resource = acl.resource.replace("-", " ")
    what = f"{resource}s that begin with" if acl.prefixed else resource
    return f"the brokers do not allow {who} to {acl.operation} {what} {acl.name!r}: grant it; {SEE}"


def is_embedded(client: Any, timeout_s: float) -> bool:
    """Tell whether the brokers are librdkafka's mock, which never answers some questions."""
    return str(client.list_topics(timeout=timeout_s).cluster_id).startswith(EMBEDDED)


def may_not_describe(config: Mapping[str, Any], topic: str, timeout_s: float) -> bool:
    """Tell whether a topic that seems not to exist is one that may not be looked at."""
    admin = AdminClient(dict(config), logger=logging.getLogger("librdkafka"))
    asked = admin.describe_topics(TopicCollection([topic]), request_timeout=timeout_s)
    return not _allows("Describe", asked[topic], timeout_s)


def is_refusal(error: BaseException) -> bool:
    """Tell whether a client's exception says that something is not allowed."""
    return isinstance(error, KafkaException) and error.args[0].code() in _NOT_ALLOWED


def _allows(operation: str, asked: Any, timeout_s: float) -> bool:
    wanted = "".join(f"_{c}" if c.isupper() else c for c in operation).upper().lstrip("_")
    try:
        operations = asked.result(timeout_s).authorized_operations
    except KafkaException as error:
        return not is_refusal(error)
    except TimeoutError:
        return True
    return not operations or AclOperation[wanted] in operations


def _may_write_transactions(prefix: str, config: Mapping[str, Any], timeout_s: float) -> bool:
    trial = {**config, "transactional.id": f"{prefix}startup"}
    producer = Producer(trial, logger=logging.getLogger("librdkafka"))
    try:
        producer.init_transactions(timeout_s)
    except KafkaException as error:
        return not is_refusal(error)
    return True
