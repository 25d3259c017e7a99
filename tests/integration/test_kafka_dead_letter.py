"""Refused records go to the dead-letter topic and come back with the command."""

import ctypes
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from bytewax import operators as op
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSource, run_main
from confluent_kafka import KafkaError, Message, Producer

from dataflows.dead_letter import main
from dataflows.kafka import replay
from dataflows.kafka.dead_letter import dead_letters
from dataflows.kafka.dev_broker import DevBroker, _librdkafka
from dataflows.kafka.records import OutRecords
from dataflows.kafka.replay import DeadLetter
from dataflows.kafka.sink import KafkaSink, output
from tests.bad_input import APPENDED, transaction, wire
from tests.integration.flow import (
    FlowEnv,
    Sent,
    flow_env,  # noqa: F401
    send,
    tiny_feast,  # noqa: F401
    tiny_model,  # noqa: F401
)
from tests.kafka.client import TestBroker

LONG = b"y" * 5000


class Topics:
    """Refused records in a source topic, and their dead letters."""

    def __init__(self, broker: TestBroker) -> None:
        self.broker = broker
        self.events = broker.topic("events", 2)
        self.dead_letters = broker.topic("dead_letters", 2)
        broker.produce(
            self.events,
            [
                (0, b"k0", b"not json"),
                (1, b"k1", None),
                (0, None, b"no key"),
                (1, b"k3", LONG),
                (0, b"k4", b"not json either"),
            ],
            headers=[("traceparent", b"00-ab")],
        )
        refused = broker.read(self.events)
        reasons = ["tombstone" if each.value() is None else "invalid_json" for each in refused]
        flow = Dataflow("refusing")
        batch = dead_letters(refused, reasons, ["why"] * len(refused), max_value_bytes=1000)
        stream = op.input("inp", flow, TestingSource([batch]))
        output("dead_letters", stream, KafkaSink(self.dead_letters, broker.config))
        run_main(flow)

    def refuse_a_prediction(self, value: bytes, origin: bytes) -> str:
        """Write what is too large for a predictions topic; return the topic's name."""
        predictions = self.broker.topic("predictions", 1)
        flow = Dataflow("answering")
        batch = OutRecords([b"C1"], [value], np.array([0]), [b"tx1"], [origin])
        stream = op.input("inp", flow, TestingSource([batch]))
        sink = KafkaSink(predictions, {**self.broker.config, "message.max.bytes": 4096})
        letters = output("predictions", stream, sink)
        output("dead_letters", letters, KafkaSink(self.dead_letters, self.broker.config))
        run_main(flow)
        return predictions

    def run(self, *arguments: str) -> int:
        servers: str = self.broker.config["bootstrap.servers"]
        return main([*arguments, "--bootstrap-servers", servers, "--topic", self.dead_letters])

    def back(self) -> list[Message]:
        return [
            message
            for message in self.broker.read(self.events)
            if "dlq.replayed" in dict(message.headers() or [])
        ]


@pytest.fixture
def topics(broker: TestBroker) -> Topics:
    return Topics(broker)


def replay_arguments(topics: Topics, *more: str) -> tuple[str, ...]:
    return ("replay", "--group", f"replay_{topics.dead_letters}", *more)


def test_list_shows_what_was_refused_and_no_long_payload(
    topics: Topics, capsys: pytest.CaptureFixture[str]
) -> None:
    assert topics.run("list", "--json") == 0
    shown: list[dict[str, Any]] = [
        json.loads(line) for line in capsys.readouterr().out.splitlines()
    ]
    assert len(shown) == 5
    assert {line["from"] for line in shown} == {
        f"{topics.events}/{partition}/{offset}"
        for partition, offset in [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    }
    assert [line["value"] for line in shown if line["reason"] == "tombstone"] == [None]
    long = next(line for line in shown if line["key"] == "k3")
    assert long["value"] == "y" * 80 + "…"
    assert long["value_bytes"] == 5000

    assert topics.run("list", "--reason", "tombstone", "--limit", "10") == 0
    table = capsys.readouterr().out
    assert "1 dead letters" in table
    assert "invalid_json" not in table

    assert topics.run("list") == 0  # to a pipe: nothing is cut but payloads
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "k3" in line]
    for cell in ("invalid_json", "why", f"{topics.events}/1/1", "y" * 80 + "…"):
        assert cell in row


def test_replay_sends_each_original_back_once(topics: Topics) -> None:
    originals = topics.broker.read(topics.events)
    assert topics.run(*replay_arguments(topics, "--dry-run")) == 0
    assert topics.back() == []
    assert topics.run(*replay_arguments(topics)) == 0
    back = topics.back()
    assert sorted(
        ((each.partition(), each.key(), each.value()) for each in back), key=repr
    ) == sorted(((each.partition(), each.key(), each.value()) for each in originals), key=repr)
    for each in back:
        assert each.headers()[-1] == ("dlq.replayed", b"1")
        assert ("traceparent", b"00-ab") in each.headers()
        assert [name for name, _ in each.headers() if name.startswith("dlq.")] == ["dlq.replayed"]
    assert topics.run(*replay_arguments(topics)) == 0
    assert len(topics.back()) == 5


def test_replay_by_reason_leaves_the_others_for_later(topics: Topics) -> None:
    assert topics.run(*replay_arguments(topics, "--reason", "tombstone")) == 0
    assert [each.value() for each in topics.back()] == [None]
    assert topics.run(*replay_arguments(topics)) == 0
    assert len(topics.back()) == 5
    assert topics.run(*replay_arguments(topics, "--from", "0")) == 0
    assert len(topics.back()) == 10


class Outage(Producer):
    """Two records arrive, and then no more; each of the others is said to have failed, or not."""

    waits_s: ClassVar[list[float]] = []
    says: ClassVar[KafkaError | None] = None

    def produce(self, *args: Any, on_delivery: Any, **named: Any) -> None:
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken <= 2:
            super().produce(*args, on_delivery=on_delivery, **named)
        elif self.says is not None:
            on_delivery(self.says, None)

    def flush(self, timeout: float) -> int:  # type: ignore[override]
        self.waits_s.append(timeout)
        return super().flush(timeout) + (0 if self.says else self.taken - 2)


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (None, "the brokers have not answered within 125 s"),
        (KafkaError(KafkaError._MSG_TIMED_OUT), "the first at .*: Local: Message timed out"),
    ],
)
def test_what_was_not_delivered_is_said_and_left_for_the_next_replay(
    topics: Topics,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    says: KafkaError | None,
    why: str,
) -> None:
    monkeypatch.setenv("MESSAGE_TIMEOUT_S", "120")
    monkeypatch.setattr(Outage, "says", says)
    monkeypatch.setattr(Outage, "waits_s", [])
    with monkeypatch.context() as patch:
        patch.setattr(replay, "Producer", Outage)
        assert topics.run(*replay_arguments(topics)) == 2
    said = capsys.readouterr()
    lost = r"(?s)[13] dead letters could not be sent back \({}\); 2 were, .*run the replay again"
    assert re.search(lost.format(why), said.err), said.err
    assert "sent back" not in said.out
    assert Outage.waits_s == [125.0]  # as long as the producer tries, and some more
    assert len(topics.back()) == 2

    assert topics.run(*replay_arguments(topics)) == 0
    assert "3 dead letters were sent back" in capsys.readouterr().out
    assert len(topics.back()) == 5


def test_what_was_sent_before_reading_failed_is_remembered(
    topics: Topics, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = replay.read_dead_letters

    def failing(*args: Any, **named: Any) -> Iterator[DeadLetter]:
        yield from itertools.islice(read(*args, **named), 3)
        raise replay.ReplayError("reading failed")

    with monkeypatch.context() as patch:
        patch.setattr(replay, "read_dead_letters", failing)
        assert topics.run(*replay_arguments(topics)) == 2
    assert "reading failed" in capsys.readouterr().err
    assert topics.run(*replay_arguments(topics)) == 0
    assert "2 dead letters were sent back" in capsys.readouterr().out
    assert len(topics.back()) == 5


def test_an_outage_while_reading_is_said(dev_broker: DevBroker) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    topic = broker.topic("dead_letters", 2)
    broker.produce(topic, [(0, None, b"a")])
    letters = replay.read_dead_letters(topic, broker.config, timeout_s=1.0)
    assert next(letters).value == b"a"
    dev_broker.broker_down()
    with pytest.raises(replay.ReplayError, match=f"reading {topic}/1 failed: "):
        next(letters)


def test_what_cannot_be_restored_is_said_and_nothing_else_is_sent_for_it(
    topics: Topics, capsys: pytest.CaptureFixture[str]
) -> None:
    topics.broker.delete_records(topics.events, 1, 2)
    assert topics.run(*replay_arguments(topics)) == 1
    said = capsys.readouterr().out
    assert "it was cut" in said
    assert "no longer on the brokers" in said
    assert len(topics.back()) == 4


def test_a_prediction_too_large_is_no_event_to_send_again(
    topics: Topics, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = topics.refuse_a_prediction(b"x" * 5000, origin=b"in/0/7")
    assert topics.run(*replay_arguments(topics)) == 1
    (said,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("not replayed")
    ]
    assert "it was never read, but is what the flow wrote about the event in/0/7" in said
    assert f"more than {predictions} takes (4096)" in said
    assert "must not be sent again" in said
    assert f"raise max.message.bytes of {predictions}" in said
    assert len(topics.back()) == 5
    assert topics.broker.read(predictions) == []

    # What the sentence says to do shows the record.
    command = re.search("`(.*)`", said)
    assert command
    assert topics.run(*command[1].split()) == 0
    assert "x" * 5000 in capsys.readouterr().out


def test_an_absent_topic_is_an_error_with_a_name(
    broker: TestBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    servers: str = broker.config["bootstrap.servers"]
    assert main(["list", "--bootstrap-servers", servers, "--topic", "no_such"]) == 2
    assert "topic 'no_such' does not exist" in capsys.readouterr().err


def produce_with_header_name(broker: TestBroker, topic: str, name: bytes, value: bytes) -> None:
    """Send what confluent-kafka does not: a header whose name is not UTF-8."""
    library, error = _librdkafka(), ctypes.create_string_buffer(512)
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ssize_t
    library.rd_kafka_headers_new.restype = pointer
    library.rd_kafka_headers_new.argtypes = [size]
    library.rd_kafka_header_add.argtypes = [pointer, text, size, text, size]
    library.rd_kafka_flush.argtypes = [pointer, ctypes.c_int]
    config = library.rd_kafka_conf_new()
    servers = broker.config["bootstrap.servers"].encode()
    library.rd_kafka_conf_set(config, b"bootstrap.servers", servers, error, 512)
    producer = library.rd_kafka_new(0, config, error, 512)
    assert producer, error.value
    headers = library.rd_kafka_headers_new(1)
    library.rd_kafka_header_add(headers, name, -1, b"v", 1)
    end, to_topic, to_partition, with_value, flags, with_headers = 0, 1, 3, 4, 7, 10
    arguments: list[Any] = [to_topic, text(topic.encode()), to_partition, ctypes.c_int32(0)]
    arguments += [flags, 2, with_value, text(value), ctypes.c_size_t(len(value))]
    arguments += [with_headers, pointer(headers), end]
    assert library.rd_kafka_producev(pointer(producer), *arguments) == 0
    assert library.rd_kafka_flush(producer, 10_000) == 0
    library.rd_kafka_destroy(producer)


def test_headers_that_no_dead_letter_can_hold_do_not_stop_the_flow(
    flow_env: FlowEnv,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env, topic = flow_env, flow_env.topics["transactions"]
    produce_with_header_name(env.broker, topic, b"bad\xff\xfename", b"not json")
    large = [("h", b"y" * 600_000)]
    middle = [("h", b"y" * 120_000)]
    send(
        env.broker,
        [
            Sent(topic, b"x" * 890_000, b"k", 0, middle, APPENDED),
            Sent(topic, b"no", b"k" * 300_000, 0, large, APPENDED),
            Sent(topic, wire(transaction(transaction_id="good")), b"k", 0, timestamp=APPENDED),
        ],
        **{"compression.type": "lz4"},
    )
    flow = env.flow(KAFKA_PRODUCER_OPTIONS='{"compression.type": "lz4"}').start()
    env.await_count("predictions", 1)
    unreadable, cut, bare = map(DeadLetter.of, env.await_count("dead_letters", 3))
    assert flow.stop() == 0, flow.log
    assert (unreadable.value, unreadable.headers_missing) == (b"not json", "unreadable")
    assert (cut.full_bytes, cut.headers_missing) == (890_000, "")
    assert ("h", b"y" * 120_000) in cut.headers
    assert (bare.value, bare.full_key_bytes, bare.headers_missing) == (
        b"no",
        300_000,
        "omitted: 600011 bytes",
    )

    # Sent back whole, but for the headers that nobody can read.
    monkeypatch.setenv("KAFKA_PRODUCER_OPTIONS", '{"message.max.bytes": 2000000}')
    servers: str = env.broker.config["bootstrap.servers"]
    replayed = ("replay", "--group", f"replay_{topic}", "--bootstrap-servers", servers)
    assert main([*replayed, "--topic", env.topics["dead_letters"]]) == 0
    back = [m for m in env.read("transactions") if m.offset() > 3]
    assert [(m.key(), m.value()) for m in back] == [
        (None, b"not json"),
        (b"k", b"x" * 890_000),
        (b"k" * 300_000, b"no"),
    ]
    for message, own in zip(back, ([], middle, large), strict=True):
        assert [h for h in message.headers() if h[0] == "h"] == own
