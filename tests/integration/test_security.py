"""The flow on brokers with TLS, SASL and an authorizer: exactly what it needs, and no more."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import bytewax.operators as op
import numpy as np
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import run_main
from confluent_kafka import Consumer, KafkaException, TopicPartition

from dataflows import acls, dead_letter, topics
from dataflows.kafka import read
from dataflows.kafka.access import Acl
from dataflows.kafka.errors import FlowError, StartupError
from dataflows.kafka.records import OutRecords, Records
from dataflows.kafka.security import ROLES
from dataflows.kafka.sink import KafkaSink, output, poll_sinks
from dataflows.kafka.source import KafkaSource, SourceTopic
from dataflows.runtime import _check_kafka
from dataflows.settings import Settings, load
from tests.conftest import _no_cluster
from tests.integration.flow import (  # noqa: F401
    FlowEnv,
    Sent,
    environment,
    free_port,
    send,
    tiny_feast,
    tiny_model,
)
from tests.integration.test_at_most_once import ids, names, transactions
from tests.kafka.client import TestBroker, await_that
from tests.kafka.secured import SecuredCluster, authority, certificate

MODES = ("at_least_once", "exactly_once", "at_most_once")
#: A user for each role, and what must never be seen.
PASSWORDS = {role: f"canary-{role}-password" for role in ROLES}
SECRET = "canary-client-secret"
TOPICS = ("transactions", "fraud_reports", "predictions", "dead_letters", "audit")


@pytest.fixture(scope="module")
def cluster() -> Iterator[SecuredCluster]:
    reason = _no_cluster()
    if reason is not None:
        pytest.skip(f"needs Apache Kafka: {reason}")
    with SecuredCluster(PASSWORDS) as started:
        yield started


@dataclass
class Secured:
    """Topics of the test's own at a secured broker; nobody may use them yet."""

    cluster: SecuredCluster
    env: FlowEnv
    granted: list[Acl] = field(default_factory=list)

    def settings(self, **more: str | None) -> Settings:
        """Return the flow's settings, with some changed; None: not set."""
        given = {**self.env.variables, **more}
        return load(**{name.lower(): value for name, value in given.items() if value is not None})

    def needs(self, delivery: str, purpose: str = "flow") -> list[Acl]:
        return acls.acls(self.settings(DELIVERY=delivery), purpose)

    def grant(self, needed: list[Acl]) -> None:
        for role in {acl.role for acl in needed}:
            self.cluster.grant(f"User:{role}", [acl for acl in needed if acl.role == role])
        self.granted += needed

    def revoke(self, acl: Acl) -> None:
        self.cluster.revoke(f"User:{acl.role}", [acl])
        self.granted.remove(acl)

    def starts(self, settings: Settings) -> str:
        """Return why the flow does not start; nothing if it does."""
        try:
            _check_kafka(settings)
        except StartupError as error:
            return str(error)
        return ""

    def await_start(self, settings: Settings, why_not: str = "") -> None:
        """Wait until the brokers have come to know what was granted, or revoked."""
        said = ""

        def so() -> bool:
            nonlocal said
            said = self.starts(settings)
            return (why_not in said) if why_not else not said

        try:
            await_that(so, why_not or "the flow may start", 15)
        except AssertionError as error:
            raise AssertionError(f"{error}; it says: {said!r}") from error


@pytest.fixture
def secured(
    cluster: SecuredCluster,
    tiny_model: Path,  # noqa: F811
    tiny_feast: Path,  # noqa: F811
    tmp_path: Path,
) -> Iterator[Secured]:
    broker = TestBroker(cluster.bootstrap_servers)
    with environment(broker, tiny_model, tiny_feast, tmp_path) as env:
        env.variables |= {
            "KAFKA_BOOTSTRAP_SERVERS": cluster.secured_servers,
            "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "KAFKA_SSL_CA_LOCATION": str(cluster.ca),
            "KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "STARTUP_TIMEOUT_S": "20",
        }
        for role, password in PASSWORDS.items():
            env.variables[f"KAFKA_{role.upper()}_SASL_USERNAME"] = role
            env.variables[f"KAFKA_{role.upper()}_SASL_PASSWORD"] = password
        found = Secured(cluster, env)
        yield found
        for acl in found.granted:
            cluster.revoke(f"User:{acl.role}", [acl])
    broker.close()


# The flow


@pytest.mark.parametrize("delivery", MODES)
def test_the_flow_runs_with_exactly_what_is_listed(secured: Secured, delivery: str) -> None:
    env, needed = secured.env, secured.needs(delivery)
    secured.grant(needed)
    secured.await_start(secured.settings(DELIVERY=delivery))
    flow = env.flow(DELIVERY=delivery, AUDIT_SHARE="1").start()
    refused = Sent(env.topics["transactions"], b"no JSON", b"C1")
    send(env.broker, [*transactions(env, 0, 200), refused])
    env.await_count("predictions", 200)
    env.await_count("dead_letters", 1)
    env.await_count("audit", 200)
    if delivery == "exactly_once":  # the next life fences this one, and reads what it wrote
        flow.kill()
        flow.start()
        send(env.broker, transactions(env, 200, 250))
        env.await_count("predictions", 250)
    assert flow.stop() == 0, flow.log
    account = flow.account()[env.topics["transactions"]]
    assert account["read"] == account["scored"] + account["dead_lettered"] > 0
    count = 250 if delivery == "exactly_once" else 200
    assert ids(env.read("predictions")) == names(range(count))
    assert "do not allow" not in flow.log and "uthorization" not in flow.log
    assert "was not told the offsets" not in flow.log
    if delivery != "at_most_once":
        group = env.variables["GROUP_ID"]
        assert sum(env.broker.committed(group, env.topics["transactions"], 4)) == count + 1


@pytest.mark.parametrize("delivery", MODES)
def test_each_of_them_that_is_missing_is_named_at_start(secured: Secured, delivery: str) -> None:
    settings = secured.settings(DELIVERY=delivery)
    needed = secured.needs(delivery)
    secured.grant(needed)
    secured.await_start(settings)
    for acl in needed:
        if acl.without:
            continue
        secured.revoke(acl)
        secured.await_start(settings, why_not=f"do not allow the {acl.role}, user '{acl.role}', to")
        said = secured.starts(settings)
        assert f"to {acl.operation} {acl.resource.replace('-', ' ')}" in said
        assert f"{acl.name!r}: grant it; python -m dataflows.acls lists" in said
        secured.grant([acl])
        secured.await_start(settings)


def test_a_flow_that_lacks_one_says_so_and_exits_with_2(secured: Secured) -> None:
    needed = secured.needs("at_least_once")
    secured.grant([acl for acl in needed if acl.name != secured.env.topics["audit"]])
    flow = secured.env.flow().start(wait=False)
    assert flow.wait() == 2
    topic = secured.env.topics["audit"]
    assert f"do not allow the sink, user 'sink', to Write topic {topic!r}" in flow.log
    assert "Traceback" not in flow.log and "canary" not in flow.log


def test_what_is_optional_costs_what_is_said(
    secured: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    settings, needed = secured.settings(), secured.needs("at_least_once")
    secured.grant(needed)
    secured.await_start(settings)
    inputs = {secured.env.topics[name] for name in TOPICS[:2]}
    assert _check_kafka(settings)[1].keys() == inputs
    for acl in [acl for acl in needed if acl.without]:
        secured.revoke(acl)
        said = f"do not allow the admin to DescribeConfigs of topic '{acl.name}'"
        caplog.clear()

        def told(topic: str = acl.name, said: str = said) -> bool:
            _, kept = _check_kafka(settings)
            sink = KafkaSink(topic, settings.producer(), admin_config=settings.admin())
            unknown = topic in inputs and topic not in kept
            if topic not in inputs:
                assert sink.partitions
                unknown = sink._most_bytes == 1_000_000  # librdkafka's own limit
            return unknown and said in caplog.text

        await_that(told, said, 15)


# What would happen without the look at start: that each of them is needed


def small_flow(settings: Settings) -> Dataflow:
    """Return a flow with our source and sink that ends at the end of its topics."""

    def forward(batches: list[Records]) -> list[OutRecords]:
        return [
            OutRecords(
                [message.key() for message in batch.messages],
                [message.value() for message in batch.messages],
                np.asarray(batch.append_time),
                [str(offset).encode() for offset in batch.offset.tolist()],
            )
            for batch in batches
        ]

    flow = Dataflow("small")
    inputs = [settings.transactions_topic, settings.fraud_reports_topic]
    source = KafkaSource(
        [SourceTopic(topic, "event_time") for topic in inputs],
        settings.consumer(),
        group_id=settings.group_id,
        stop_at_end=True,
        keep_offsets=settings.delivery != "at_most_once",
        between_batches=poll_sinks,
        startup_timeout_s=10,
    )
    sink = KafkaSink(
        settings.predictions_topic,
        settings.producer(),
        delivery=settings.delivery,
        consumer_config=settings.tail(),
        admin_config=settings.admin(),
        owner=settings.group_id,
        startup_timeout_s=10,
    )
    copies = op.flat_map_batch("forward", op.input("records", flow, source), forward)
    output("copies", copies, sink)
    return flow


def run(settings: Settings) -> str:
    """Run the small flow; return what it dies of, and nothing if it does not."""
    FlowError.latest = None
    try:
        run_main(small_flow(settings), epoch_interval=timedelta(seconds=0.3))
    except BaseException as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, FlowError):
            cause = cause.__cause__
        assert isinstance(cause, FlowError), cause
        return str(cause)
    return ""


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_each_of_them_is_needed(secured: Secured, delivery: str) -> None:
    settings = secured.settings(DELIVERY=delivery, MESSAGE_TIMEOUT_S="3")
    needed = secured.needs(delivery)
    secured.grant(needed)
    secured.await_start(settings)
    send(secured.env.broker, transactions(secured.env, 0, 20))
    assert run(settings) == ""
    assert secured.env.count("predictions") == 20
    unused = {secured.env.topics[name] for name in ("dead_letters", "audit")}
    for n, acl in enumerate(acl for acl in needed if not acl.without and acl.name not in unused):
        secured.revoke(acl)
        secured.await_start(settings, why_not="do not allow")
        if acl.resource == "group":  # what reads can do without it
            assert not _may_commit(settings)
        else:
            send(secured.env.broker, transactions(secured.env, 20 + n, 21 + n))
            died_of = run(settings)
            assert "do not allow" in died_of, (acl, died_of)
            assert "python -m dataflows.acls" in died_of
        secured.grant([acl])
        secured.await_start(settings)
    assert _may_commit(settings)


def _may_commit(settings: Settings) -> bool:
    partition = TopicPartition(settings.transactions_topic, 0, 0)
    with closing(Consumer({**settings.consumer(), "group.id": settings.group_id})) as consumer:
        try:
            consumer.committed([partition], timeout=3)  # without the ACL this only times out
            consumer.commit(offsets=[partition], asynchronous=False)
        except KafkaException:
            return False
        return True


# Getting in


def tokens(claims: dict[str, Any]) -> str:
    """Return an unsigned token, which the broker takes."""
    parts = (json.dumps(part).encode() for part in ({"alg": "none"}, claims))
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + "."


@dataclass
class TokenEndpoint:
    """An OIDC token endpoint that knows one client."""

    subject: str
    lifetime_s: float = 3600
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> TokenEndpoint:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                endpoint.asked.append(body)
                given = base64.b64decode(self.headers["Authorization"].partition(" ")[2]).decode()
                now = int(time.time())
                known = given == f"fraud:{SECRET}"
                claims = {"sub": endpoint.subject, "iat": now, "exp": now + endpoint.lifetime_s}
                answer = {"access_token": tokens(claims)} if known else {"error": "invalid_client"}
                content = json.dumps(answer).encode()
                self.send_response(200 if known else 401)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/token"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


NO_USERS: dict[str, str | None] = {
    f"KAFKA_{role.upper()}_SASL_{what}": None for role in ROLES for what in ("USERNAME", "PASSWORD")
}


def by_token(endpoint: TokenEndpoint, **more: str | None) -> dict[str, str | None]:
    return {
        **NO_USERS,
        "KAFKA_SASL_MECHANISM": "OAUTHBEARER",
        "KAFKA_SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL": endpoint.url,
        "KAFKA_SASL_OAUTHBEARER_CLIENT_ID": "fraud",
        "KAFKA_SASL_OAUTHBEARER_CLIENT_SECRET": SECRET,
        "KAFKA_SASL_OAUTHBEARER_SCOPE": "kafka",
        **more,
    }


def test_plain(secured: Secured) -> None:
    secured.grant(secured.needs("exactly_once"))
    plain = secured.settings(DELIVERY="exactly_once", KAFKA_SASL_MECHANISM="PLAIN")
    secured.await_start(plain)
    send(secured.env.broker, transactions(secured.env, 0, 20))
    assert run(plain) == ""
    assert secured.env.count("predictions") == 20


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_tokens_of_all_three_roles(secured: Secured, delivery: str) -> None:
    """Bytewax's own source hangs with these (#541): nobody polls its consumer for a token."""
    needed = [Acl("source", a.operation, a.resource, a.name, a.prefixed) for a in
              secured.needs(delivery)]  # fmt: skip
    secured.grant(needed)
    with TokenEndpoint("source") as endpoint:
        settings = secured.settings(DELIVERY=delivery, **by_token(endpoint))
        secured.await_start(settings)
        send(secured.env.broker, transactions(secured.env, 0, 20))
        assert run(settings) == ""
        assert secured.env.count("predictions") == 20
        assert "grant_type=client_credentials" in endpoint.asked[0]
        assert "scope=kafka" in endpoint.asked[0]


def test_a_client_certificate(secured: Secured, tmp_path: Path) -> None:
    directory = secured.cluster.directory
    own, key = certificate(directory, "ca", "flow", password="canary-key-password")
    needed = secured.needs("exactly_once")
    secured.cluster.grant("User:CN=flow", needed)
    over_tls = {
        **NO_USERS,
        "KAFKA_BOOTSTRAP_SERVERS": secured.cluster.tls_servers,
        "KAFKA_SECURITY_PROTOCOL": "SSL",
        "KAFKA_SSL_CERTIFICATE_LOCATION": str(own),
        "KAFKA_SSL_KEY_LOCATION": str(key),
        "KAFKA_SSL_KEY_PASSWORD": "canary-key-password",
    }
    settings = secured.settings(DELIVERY="exactly_once", **over_tls)
    secured.await_start(settings)
    send(secured.env.broker, transactions(secured.env, 0, 20))
    assert run(settings) == ""
    assert secured.env.count("predictions") == 20
    secured.cluster.revoke("User:CN=flow", needed)


NOT_LET_IN: dict[str, tuple[dict[str, str | None], str]] = {
    "wrong password": (
        {"KAFKA_SINK_SASL_PASSWORD": "canary-wrong"},
        "lets the sink in .*invalid credentials.* KAFKA_SASL_MECHANISM, KAFKA_SASL_USERNAME and "
        r"KAFKA_SASL_PASSWORD \(for the sink alone: KAFKA_SINK_…\)",
    ),
    "wrong password, PLAIN": (
        {"KAFKA_SASL_MECHANISM": "PLAIN", "KAFKA_ADMIN_SASL_PASSWORD": "canary-wrong"},
        "lets the admin in .*KAFKA_SASL_PASSWORD",
    ),
    "unknown user": (
        {"KAFKA_SOURCE_SASL_USERNAME": "nobody"},
        "lets the source in .*KAFKA_SASL_USERNAME",
    ),
    "a mechanism that the broker does not have": (
        {"KAFKA_SASL_MECHANISM": "SCRAM-SHA-256"},
        "Unsupported SASL mechanism.*KAFKA_SASL_MECHANISM",
    ),
    "wrong CA": (
        {"KAFKA_SSL_CA_LOCATION": "{other_ca}"},
        "certificate verify failed.*KAFKA_SSL_CA_LOCATION",
    ),
    "a name that the certificate does not have": (
        {"KAFKA_BOOTSTRAP_SERVERS": "localhost:{secured_port}"},
        "not valid for 'localhost'. Name the brokers in KAFKA_BOOTSTRAP_SERVERS as their",
    ),
    "plain to TLS": (
        {"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"},
        "closed by peer.*KAFKA_SECURITY_PROTOCOL.* SASL_PLAINTEXT",
    ),
    "nothing to TLS": (
        {"KAFKA_SECURITY_PROTOCOL": "PLAINTEXT"},
        "closed by peer.*KAFKA_SECURITY_PROTOCOL.* PLAINTEXT",
    ),
    "TLS to plain": (
        {"KAFKA_BOOTSTRAP_SERVERS": "{plain}"},
        "PLAINTEXT broker listener.*KAFKA_SECURITY_PROTOCOL.* SASL_SSL",
    ),
    "TLS to SASL": (
        {"KAFKA_SECURITY_PROTOCOL": "SSL"},
        "closed by peer.*KAFKA_SECURITY_PROTOCOL.* SSL",
    ),
    "SASL to none": (
        {"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_BOOTSTRAP_SERVERS": "{plain}"},
        "KAFKA_SECURITY_PROTOCOL.* SASL_PLAINTEXT",
    ),
    "no client certificate": (
        {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_BOOTSTRAP_SERVERS": "{tls}"},
        "KAFKA_SSL_CERTIFICATE_LOCATION and KAFKA_SSL_KEY_LOCATION",
    ),
}


@pytest.mark.parametrize("case", NOT_LET_IN)
def test_who_is_not_let_in_is_told_why(secured: Secured, case: str) -> None:
    variables, expected = NOT_LET_IN[case]
    secured.grant(secured.needs("at_least_once"))
    secured.await_start(secured.settings())
    places = {
        "other_ca": authority(secured.cluster.directory, "other"),
        "secured_port": secured.cluster.secured_servers.rpartition(":")[2],
        "plain": secured.cluster.bootstrap_servers,
        "tls": secured.cluster.tls_servers,
    }
    given = {name: value and value.format(**places) for name, value in variables.items()}
    settings = secured.settings(STARTUP_TIMEOUT_S="5", **given)
    began = time.monotonic()
    said = secured.starts(settings)
    assert time.monotonic() - began < settings.startup_timeout_s + 2
    assert re.search(expected, said), said
    assert "canary" not in said


def test_a_token_endpoint_that_refuses_is_named(secured: Secured) -> None:
    with TokenEndpoint("source") as endpoint:
        wrong = by_token(endpoint, KAFKA_SASL_OAUTHBEARER_CLIENT_SECRET="canary-wrong")
        settings = secured.settings(STARTUP_TIMEOUT_S="5", **wrong)
        said = secured.starts(settings)
    assert "lets the source in" in said
    assert "KAFKA_SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL" in said
    assert "canary" not in said


# Secrets


def test_secrets_are_seen_nowhere(secured: Secured, tmp_path: Path) -> None:
    """Not in a log at its most talkative, the metrics, the page, nor Bytewax's API and file."""
    env, port, page = secured.env, free_port(), free_port()
    secured.grant(secured.needs("exactly_once"))
    options = json.dumps({"debug": "all", "ssl.key.password": "canary-option"})
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    for name in [name for name in env.variables if name.endswith("_PASSWORD")]:
        (secrets / name).write_text(f"{env.variables.pop(name)}\n")
    flow = env.flow(
        DELIVERY="exactly_once",
        SECRETS_DIR=str(secrets),
        LOG_LEVEL="debug",
        KAFKA_CONSUMER_OPTIONS=options,
        KAFKA_PRODUCER_OPTIONS=options,
        PAGE_PORT=str(page),
        PAGE_TOKEN="canary-page-token",
        BYTEWAX_DATAFLOW_API_ENABLED="1",
        BYTEWAX_DATAFLOW_API_PORT=str(port),
        BYTEWAX_DATAFLOW_API_CACHE_PATH=str(tmp_path),
    ).start()
    send(env.broker, transactions(env, 0, 50))
    env.await_count("predictions", 50)
    shown = {"log": flow.log, "metrics": flow.metrics(), "ready": flow.asked("/readyz")[1]}
    for path in ("dataflow", "metrics"):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
            shown[f"Bytewax's {path}"] = answer.read().decode()
    for path in ("api/status", "api/flagged"):
        asked = urllib.request.Request(f"http://127.0.0.1:{page}/{path}")
        asked.add_header("Authorization", "Bearer canary-page-token")
        with urllib.request.urlopen(asked, timeout=10) as answer:
            shown[path] = answer.read().decode()
    shown["Bytewax's file"] = (tmp_path / "dataflow.json").read_text()
    assert '"records"' in shown["Bytewax's dataflow"].replace("fraud.records", "records")
    assert flow.stop() == 0
    shown["log"] += flow.log
    assert "SASL" in shown["log"], "librdkafka has not said much"
    assert [where for where, text in shown.items() if "canary" in text] == []
    # Nor when it dies, with a traceback or without.
    env.flows.clear()
    flow = env.flow(SECRETS_DIR=str(secrets), TRANSACTIONS_TOPIC="missing").start(wait=False)
    assert flow.wait() == 2
    assert "canary" not in flow.log


# The tools


@pytest.fixture
def tools(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> Secured:
    for name, value in secured.env.variables.items():
        monkeypatch.setenv(name, value)
    return secured


def test_topics_are_created_by_who_may(
    tools: Secured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in TOPICS:
        new = f"new_{tools.env.topics[name]}"
        tools.env.variables[f"{name.upper()}_TOPIC"] = new
        monkeypatch.setenv(f"{name.upper()}_TOPIC", new)
    assert topics.main(["create"]) == 1
    assert "do not allow the admin to Create topic" in capsys.readouterr().err
    tools.grant(tools.needs("at_least_once", "topics"))
    await_that(lambda: topics.main(["create"]) == 0, "they are created", 15)


def test_dead_letters_are_listed_and_replayed_by_who_may(
    tools: Secured, capsys: pytest.CaptureFixture[str]
) -> None:
    tools.grant(tools.needs("at_least_once"))
    tools.await_start(tools.settings())
    flow = tools.env.flow().start()
    send(tools.env.broker, [Sent(tools.env.topics["transactions"], b"no JSON", b"C1")])
    tools.env.await_count("dead_letters", 1)
    assert flow.stop() == 0
    for acl in list(tools.granted):
        tools.revoke(acl)
    tools.await_start(tools.settings(), why_not="do not allow")
    letters = tools.env.topics["dead_letters"]
    for command in (["list", "--json"], ["replay"]):
        assert dead_letter.main(command) == 2
        said = capsys.readouterr().err
        assert f"do not allow the source to Describe topic {letters!r}" in said
    assert read.main([letters]) == 1
    assert f"do not allow the source to Describe topic {letters!r}" in capsys.readouterr().err
    tools.grant(tools.needs("at_least_once", "dead-letters"))
    await_that(lambda: dead_letter.main(["list", "--json"]) == 0, "they are listed", 15)
    assert '"no JSON"' in capsys.readouterr().out
    assert read.main([letters]) == 0
    for acl in list(tools.granted):
        tools.revoke(acl)
    tools.grant(tools.needs("at_least_once", "replay"))
    await_that(lambda: dead_letter.main(["replay"]) == 0, "they are replayed", 15)
    assert "1 dead letters were sent back" in capsys.readouterr().out
    assert tools.env.count("transactions") == 2
