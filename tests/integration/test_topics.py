"""The flow's topics are created once, by the names that the flow uses."""

import pytest
from confluent_kafka.admin import AdminClient

from dataflows import topics
from dataflows.settings import Settings
from tests.kafka.client import TestBroker, await_that

NAMES = [name for name in Settings.model_fields if name.endswith("_topic")]


def test_all_that_the_flow_names_are_created(
    kafka: TestBroker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = kafka.config["bootstrap.servers"]
    prefix = kafka.topic("create", 1)
    for name in NAMES:
        monkeypatch.setenv(name.upper(), f"{prefix}_{name}")
    command = ["create", "--partitions", "6", "--bootstrap-servers", servers]
    assert topics.main(command) == 0
    assert capsys.readouterr().out.count(": created\n") == len(NAMES) == 5
    admin = AdminClient(kafka.config)

    def counts() -> list[int]:
        known = admin.list_topics(timeout=10).topics
        return [len(known[t].partitions) for n in NAMES if (t := f"{prefix}_{n}") in known]

    await_that(lambda: len(counts()) == 5, "all are known")
    assert sorted(counts()) == [1, 1, 3, 6, 6]
    assert topics.main(command) == 0
    assert capsys.readouterr().out.count(": exists\n") == 5


def test_an_absent_broker_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(topics, "_TIMEOUT_S", 1.0)
    assert topics.main(["create", "--bootstrap-servers", "127.0.0.1:1"]) == 1
    assert "no Kafka broker answered at '127.0.0.1:1'" in capsys.readouterr().err
