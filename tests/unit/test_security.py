"""TLS and SASL settings by role, and the list of ACLs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from pydantic import SecretStr

from dataflows import acls
from dataflows.kafka import access, security
from dataflows.kafka.access import Acl
from dataflows.runtime import _refused_setting
from dataflows.settings import Settings, SettingsError, load_for_tools, table

SCRAM = {
    "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
    "KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
    "KAFKA_SASL_USERNAME": "flow",
    "KAFKA_SASL_PASSWORD": "canary",
}
TOKEN = {
    "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
    "KAFKA_SASL_MECHANISM": "OAUTHBEARER",
    "KAFKA_SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL": "https://id.example/token",
    "KAFKA_SASL_OAUTHBEARER_CLIENT_ID": "fraud",
    "KAFKA_SASL_OAUTHBEARER_CLIENT_SECRET": "canary",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ["settings_file", "secrets_dir", *Settings.model_fields]:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "broker:9093")
    return monkeypatch


def settings(**variables: str) -> Settings:
    with pytest.MonkeyPatch.context() as context:
        for name, value in variables.items():
            context.setenv(name, value)
        return load_for_tools()


def all_clients(given: Settings) -> dict[str, dict[str, Any]]:
    return {
        "source": given.consumer(),
        "sink": given.producer(),
        "tail": given.tail(),
        "admin": given.admin(),
    }


def refusal(**variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        all_clients(settings(**variables))
    assert "canary" not in str(caught.value)
    return str(caught.value)


def test_nothing_is_set_by_default() -> None:
    for config in all_clients(settings()).values():
        assert security.identity(config) == {}


def test_what_is_shared_goes_to_all_and_a_role_s_own_goes_over_it() -> None:
    own = {"KAFKA_SINK_SASL_USERNAME": "writer", "KAFKA_SINK_SASL_PASSWORD": "w"}
    clients = all_clients(settings(**SCRAM, **own, KAFKA_ADMIN_SASL_MECHANISM="PLAIN"))
    found = {
        name: (config["sasl.username"], config["sasl.password"], config["sasl.mechanism"])
        for name, config in clients.items()
    }
    assert found == {
        "source": ("flow", "canary", "SCRAM-SHA-512"),
        "sink": ("writer", "w", "SCRAM-SHA-512"),
        "tail": ("writer", "w", "SCRAM-SHA-512"),
        "admin": ("flow", "canary", "PLAIN"),
    }


def test_settings_go_over_options_and_options_over_nothing() -> None:
    options = json.dumps(
        {"sasl.username": "old", "sasl.password": "old", "sasl.mechanisms": "PLAIN", "debug": "x"}
    )
    given = settings(**SCRAM, KAFKA_CONSUMER_OPTIONS=options)
    assert given.consumer()["sasl.username"] == "flow"
    assert "sasl.mechanisms" not in given.consumer()
    assert given.consumer()["debug"] == "x"
    by_options = json.dumps(
        {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "PLAIN",
            "sasl.username": "w",
            "sasl.password": "p",
            "linger.ms": 7,
        }
    )
    given = settings(KAFKA_PRODUCER_OPTIONS=by_options, KAFKA_CONSUMER_OPTIONS='{"debug": "x"}')
    assert given.tail() == {
        "bootstrap.servers": "broker:9093",
        "debug": "x",
        **{k: v for k, v in json.loads(by_options).items() if k != "linger.ms"},
    }
    assert given.consumer().get("sasl.username") is None


def test_only_what_the_protocol_and_the_mechanism_use_is_passed_on(tmp_path: Path) -> None:
    own = {"KAFKA_ADMIN_SECURITY_PROTOCOL": "SSL", "KAFKA_SOURCE_SECURITY_PROTOCOL": "PLAINTEXT"}
    ca = tmp_path / "ca.pem"
    ca.touch()
    given = settings(**SCRAM, **own, KAFKA_SSL_CA_LOCATION=str(ca))
    assert security.identity(given.admin()) == {
        "security.protocol": "SSL",
        "ssl.ca.location": str(ca),
    }
    assert security.identity(given.consumer()) == {"security.protocol": "PLAINTEXT"}
    token = settings(**{**SCRAM, **TOKEN}).producer()
    assert token["sasl.oauthbearer.method"] == "oidc"
    assert "sasl.password" not in token


@pytest.mark.parametrize("variables", [SCRAM, {**SCRAM, "KAFKA_SASL_MECHANISM": "PLAIN"}, TOKEN])
def test_librdkafka_knows_all_of_them(variables: dict[str, str]) -> None:
    for config in all_clients(settings(**variables)).values():
        config |= {"bootstrap.servers": "", "log_level": 0}
        config.pop("sasl.oauthbearer.token.endpoint.url", None)
        config.pop("sasl.oauthbearer.method", None)
        assert Producer(config) is not None
        assert AdminClient(config) is not None


INCOMPLETE = {
    "no protocol": (
        {k: v for k, v in SCRAM.items() if k != "KAFKA_SECURITY_PROTOCOL"},
        "KAFKA_SASL_MECHANISM is set, but no protocol that uses it: set KAFKA_SECURITY_PROTOCOL",
    ),
    "no mechanism": (
        {k: v for k, v in SCRAM.items() if k != "KAFKA_SASL_MECHANISM"},
        "KAFKA_SASL_MECHANISM (for the source alone: KAFKA_SOURCE_…) is not set: SASL_SSL needs it",
    ),
    "no password": (
        {k: v for k, v in SCRAM.items() if k != "KAFKA_SASL_PASSWORD"},
        "KAFKA_SASL_PASSWORD (for the source alone: KAFKA_SOURCE_…) is not set: SCRAM-SHA-512 "
        "needs it",
    ),
    "no client secret": (
        {k: v for k, v in TOKEN.items() if not k.endswith("SECRET")},
        "KAFKA_SASL_OAUTHBEARER_CLIENT_SECRET",
    ),
    "no such file": (
        {**SCRAM, "KAFKA_SINK_SSL_CA_LOCATION": "/nowhere/ca.pem"},
        "KAFKA_SINK_SSL_CA_LOCATION=/nowhere/ca.pem: there is no such file",
    ),
    "a certificate without its key": (
        {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_SSL_CERTIFICATE_LOCATION": "/dev/null"},
        "KAFKA_SSL_KEY_LOCATION (for the source alone: KAFKA_SOURCE_…) is not set",
    ),
    "wrong protocol": (
        {"KAFKA_SECURITY_PROTOCOL": "TLS"},
        "accepted: `PLAINTEXT` or `SSL` or `SASL_PLAINTEXT` or `SASL_SSL`",
    ),
    "wrong mechanism of a role": (
        {**SCRAM, "KAFKA_ADMIN_SASL_MECHANISM": "GSSAPI"},
        "KAFKA_ADMIN_SASL_MECHANISM='GSSAPI': ",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_what_is_incomplete_is_named(case: str) -> None:
    variables, expected = INCOMPLETE[case]
    assert expected in refusal(**variables)


def test_a_certificate_and_its_key_are_needed_under_sasl_too() -> None:
    assert "KAFKA_SSL_KEY_LOCATION" in refusal(**SCRAM, KAFKA_SSL_CERTIFICATE_LOCATION="/dev/null")


def test_a_file_that_librdkafka_cannot_use_is_named(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("no certificate")
    given = settings(KAFKA_SECURITY_PROTOCOL="SSL", KAFKA_SSL_CA_LOCATION=str(ca))
    with pytest.raises(Exception, match="ssl") as caught:
        Producer({**given.producer(), "log_level": 0})
    said = _refused_setting("sink", str(caught.value))
    assert "KAFKA_SSL_CA_LOCATION (for the sink alone: KAFKA_SINK_…)" in said


# Secrets


def test_secrets_come_from_files_without_their_line_end(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "KAFKA_SASL_PASSWORD").write_text("canary\n")
    (tmp_path / "kafka_admin_sasl_password").write_text("canary-admin")
    (tmp_path / "PAGE_TOKEN").write_text("canary-page\r\n")
    environment.setenv("SECRETS_DIR", str(tmp_path))
    shared = {k: v for k, v in SCRAM.items() if k != "KAFKA_SASL_PASSWORD"}
    given = settings(**shared)
    assert given.consumer()["sasl.password"] == "canary"
    assert given.admin()["sasl.password"] == "canary-admin"
    assert given.page_token.get_secret_value() == "canary-page"
    assert settings(**SCRAM, PAGE_TOKEN="env").page_token.get_secret_value() == "env"


def test_a_secrets_directory_that_is_not_there(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("SECRETS_DIR", str(tmp_path / "typo"))
    assert refusal() == f"SECRETS_DIR={tmp_path / 'typo'}: there is no such directory"


def test_a_secret_that_is_no_text(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "KAFKA_SASL_PASSWORD").write_bytes(b"\xff\xfe")
    environment.setenv("SECRETS_DIR", str(tmp_path))
    assert refusal().startswith(f"SECRETS_DIR={tmp_path} cannot be read: ")


def test_secrets_are_not_shown() -> None:
    secret = [n for n, (kind, _) in security.SETTINGS.items() if kind is SecretStr]
    assert len(secret) == 3
    given = {security.field(n, role).upper(): "canary" for n in secret for role in security.ROLES}
    loaded = settings(**SCRAM, **given)
    shown = [repr(loaded), str(loaded), loaded.model_dump_json(), str(loaded.model_dump()), table()]
    assert not [text for text in shown if "canary" in text]
    for name in secret:
        assert "never printed" in security.SETTINGS[name][1]
    assert "canary" not in refusal(**SCRAM, **given, SHARDS="0")


# ACLs


def listed(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert acls.main(options) == 0
    return capsys.readouterr().out.splitlines()


def test_the_list_follows_the_guarantee_and_the_names() -> None:
    names = {"GROUP_ID": "g", "PREDICTIONS_TOPIC": "p"}
    by_mode = {
        mode: {(a.role, a.operation, a.resource, a.name, a.prefixed) for a in found}
        for mode in ("at_least_once", "exactly_once", "at_most_once")
        for found in [acls.acls(settings(DELIVERY=mode, **names))]
    }
    least = by_mode["at_least_once"]
    assert ("sink", "Write", "topic", "p", False) in least
    group = ("source", "Read", "group", "g", False)
    assert least - by_mode["at_most_once"] == {group}
    assert by_mode["at_most_once"] < least < by_mode["exactly_once"]
    assert by_mode["exactly_once"] - least == {
        *(("sink", "Read", "topic", t, False) for t in ("p", "dead_letters", "audit")),
        ("sink", "Write", "transactional-id", "g/", True),
    }


def test_it_is_printed_as_commands(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**SCRAM, "DELIVERY": "exactly_once", "GROUP_ID": "a b"}.items():
        environment.setenv(name, value)
    lines = listed(capsys)
    start = "kafka-acls.sh --bootstrap-server broker:9093 --add --allow-principal"
    assert f"{start} User:flow --operation Read --topic transactions" in lines
    assert (
        f"{start} User:flow --operation Write --transactional-id 'a b/' "
        "--resource-pattern-type prefixed"
    ) in lines
    assert all("# optional: without it" in line for line in lines if "DescribeConfigs" in line)
    assert len(set(lines)) == len(lines)
    assert not [line for line in lines if "canary" in line]


def test_it_is_printed_as_objects_and_for_given_principals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--json", "--principal", "User:all", "--principal", "sink=User:CN=w,O=Bank"]
    found = [json.loads(line) for line in listed(capsys, *options)]
    assert {(each["role"], each["principal"]) for each in found} == {
        ("source", "User:all"),
        ("sink", "User:CN=w,O=Bank"),
        ("admin", "User:all"),
    }
    assert found[0] == {
        "role": "source",
        "principal": "User:all",
        "operation": "Read",
        "resource_type": "topic",
        "resource_name": "transactions",
        "pattern_type": "literal",
        "optional": False,
        "without": "",
    }


def test_who_it_is_for_must_be_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert acls.main([]) == 2
    assert "who the source is to the brokers cannot be told: set KAFKA_SASL_USERNAME" in (
        capsys.readouterr().err
    )


def test_it_is_known_what_the_tools_need(capsys: pytest.CaptureFixture[str]) -> None:
    topics = listed(capsys, "--for", "topics", "--principal", "User:me")
    assert len(topics) == 5
    assert all("--operation Create --topic" in line for line in topics)
    replay = listed(capsys, "--for", "replay", "--principal", "User:me")
    assert any("--operation Write --topic fraud_reports" in line for line in replay)
    assert any(f"--operation Read --group {acls.REPLAY_GROUP}" in line for line in replay)


def test_a_refusal_names_who_what_and_where_to_look() -> None:
    acl = Acl("sink", "Write", "transactional-id", "g/", prefixed=True)
    assert access.refusal(acl, {"sasl.username": "flow", "sasl.password": "canary"}) == (
        "the brokers do not allow the sink, user 'flow', to Write transactional ids that begin "
        "with 'g/': grant it; python -m dataflows.acls lists what is needed"
    )
