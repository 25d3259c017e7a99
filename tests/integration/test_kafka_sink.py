"""The sink knows what became of every record."""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from confluent_kafka import KafkaError, Message

from dataflows.kafka.dead_letter import DeadLetterSettings, reason_headers
from dataflows.kafka.dev_broker import DevBroker
from dataflows.kafka.partitioner import partitions_of
from dataflows.kafka.records import OutRecords
from dataflows.kafka.replay import DeadLetter
from dataflows.kafka.sink import Delivery, DeliveryError, KafkaSink, poll_producers
from tests.integration.conftest import TestBroker

PRODUCE = 0  # Kafka's API key


def batch(values: Sequence[bytes | None], *, keys: Sequence[bytes | None] = ()) -> OutRecords:
    now = time.time_ns() // 1_000_000
    return OutRecords(
        list(keys) or [b"key%d" % row for row in range(len(values))],
        list(values),
        np.full(len(values), now - 40),
        [b"id%d" % row for row in range(len(values))],
    )


class Written:
    """A sink, its partitions, and what it told its observer."""

    def __init__(self, broker: TestBroker, topic: str, **options: Any) -> None:
        config = options.pop("config", {})
        self.told: list[Delivery] = []
        self.sink = KafkaSink(
            topic, {**broker.config, **config}, observe=self.told.append, **options
        )
        names = self.sink.list_parts()
        self.parts = [self.sink.build_part("step", name, None) for name in names]

    def write(self, out: OutRecords) -> None:
        for item_key, part_batch in self.sink.split([out]):
            self.parts[self.sink.part_fn(item_key)].write_batch([part_batch])

    def snapshot(self) -> list[int]:
        return [part.snapshot() for part in self.parts]

    def delivered(self) -> int:
        return sum(each.delivered for each in self.told)

    def rejected(self) -> int:
        return sum(each.rejected for each in self.told)


def ids(messages: list[Message]) -> list[bytes]:
    return [dict(message.headers() or [])["event_id"] for message in messages]


def test_records_arrive_whole_where_the_jvm_would_put_them(broker: TestBroker) -> None:
    topic = broker.topic("out", 3)
    written = Written(broker, topic)
    values = [b"value%d" % row for row in range(500)]
    values[7] = None  # type: ignore[call-overload]
    keys: list[bytes | None] = [b"key%d" % (row % 40) for row in range(500)]
    keys[9] = None
    out = batch(values, keys=keys)
    out.origins = [b"in/0/%d" % row for row in range(500)]
    out.headers = [[("note", b"%d" % row), ("none", None)] for row in range(500)]
    written.write(out)
    offsets = written.snapshot()

    found = broker.read(topic)
    assert Counter(message.partition() for message in found) == dict(enumerate(offsets))
    wanted = partitions_of([out.event_ids[9] if key is None else key for key in keys], 3)
    for message in found:
        row = int(dict(message.headers())["note"])
        assert message.partition() == wanted[row]
        assert (message.key(), message.value()) == (keys[row], values[row])
        assert message.headers() == [
            ("event_id", b"id%d" % row),
            ("origin", b"in/0/%d" % row),
            ("note", b"%d" % row),
            ("none", None),
        ]
    for partition in range(3):
        mine = [int(each[2:]) for each in ids([m for m in found if m.partition() == partition])]
        assert mine == sorted(mine)
    assert len(found) == 500
    assert written.delivered() == 500


def test_latency_runs_from_the_cause_to_the_delivery(broker: TestBroker) -> None:
    written = Written(broker, broker.topic("out", 1))
    out = batch([b"x"] * 10)
    out.append_time[3] = -1  # not known
    started = time.monotonic()
    written.write(out)
    while written.delivered() < 10:
        assert time.monotonic() < started + 10
        poll_producers()
        written.parts[0].write_batch([])
    spent_ms = (time.monotonic() - started) * 1000
    latency_ms = np.concatenate([each.latency_ms for each in written.told])
    assert len(latency_ms) == 9
    assert (latency_ms >= 40).all()
    assert (latency_ms <= 41 + spent_ms).all()


@pytest.mark.parametrize("with_topic", [True, False])
def test_a_record_too_large_for_the_client(broker: TestBroker, with_topic: bool) -> None:
    topic, letters = broker.topic("out", 1), broker.topic("dead_letters", 2)
    dead_letters = DeadLetterSettings(letters, max_value_bytes=500) if with_topic else None
    written = Written(broker, topic, config={"message.max.bytes": 2000}, dead_letters=dead_letters)
    out = batch([b"a", b"x" * 5000, b"b"])
    if not with_topic:
        with pytest.raises(DeliveryError, match=r"5000 bytes is too large .* no dead-letter"):
            written.write(out)
        return
    written.write(out)
    assert written.snapshot() == [2]
    assert ids(broker.read(topic)) == [b"id0", b"id2"]
    assert (written.delivered(), written.rejected()) == (2, 1)
    [message] = broker.read(letters)
    letter = DeadLetter.of(message)
    assert (letter.reason, letter.topic) == ("prediction_too_large", topic)
    assert (letter.source_partition, letter.source_offset) == (0, -1)
    assert (letter.key, letter.value, letter.full_bytes) == (b"key1", b"x" * 496, 5000)
    assert ids([message]) == [b"id1"]


def letters_of(values: list[bytes | None]) -> OutRecords:
    out = batch(values)
    out.headers = [[("own", b"h"), *reason_headers("why", "", "in", 0, 1, 2)] for _ in values]
    return out


def assert_stub(message: Message, key: bytes, value: bytes) -> None:
    assert (message.key(), message.value()) == (b"", b"")
    headers = dict(message.headers())
    assert "own" not in headers
    assert headers["dlq.reason"] in (b"why", b"prediction_too_large")
    assert headers["dlq.truncated"] == b"%d" % len(value)
    assert headers["dlq.sha256"] == hashlib.sha256(value).hexdigest().encode()
    assert headers["dlq.key_truncated"] == b"%d" % len(key)


def test_a_dead_letter_too_large_for_the_client_is_written_as_a_stub(
    broker: TestBroker, caplog: pytest.LogCaptureFixture
) -> None:
    topic = broker.topic("dead_letters", 1)
    written = Written(broker, topic, config={"message.max.bytes": 2000})
    written.write(letters_of([b"a", b"x" * 5000, b"b"]))
    assert written.snapshot() == [3]
    first, second, least = broker.read(topic)
    assert ids([first, second, least]) == [b"id0", b"id2", b"id1"]
    assert_stub(least, b"key1", b"x" * 5000)
    assert written.delivered() == 3
    assert "does not take a dead letter" in caplog.text


def test_a_dead_letter_too_large_for_the_broker_is_written_as_a_stub(dev_broker: DevBroker) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    topic, too_large = broker.topic("dead_letters", 1), KafkaError.MSG_SIZE_TOO_LARGE
    written = Written(broker, topic, config={"linger.ms": 50})
    # The batch of two, its second record alone; then a stub, which is the end.
    dev_broker.push_request_errors(PRODUCE, [too_large, 0, too_large])
    written.write(letters_of([b"a", b"b"]))
    written.snapshot()
    by_id = dict(zip(ids(found := broker.read(topic)), found, strict=True))
    assert len(found) == 2
    assert by_id[b"id0"].value() == b"a"
    assert_stub(by_id[b"id1"], b"key1", b"b")
    dev_broker.push_request_errors(PRODUCE, [too_large] * 3)
    written.write(letters_of([b"c"]))
    with pytest.raises(DeliveryError, match="0 bytes is too large"):
        written.snapshot()


def test_a_rejected_record_too_large_for_the_dead_letter_topic_leaves_a_stub(
    broker: TestBroker,
) -> None:
    topic, letters = broker.topic("out", 1), broker.topic("dead_letters", 1)
    written = Written(
        broker,
        topic,
        config={"message.max.bytes": 2000},
        dead_letters=DeadLetterSettings(letters),
    )
    written.write(batch([b"a", b"x" * 5000]))
    assert written.snapshot() == [1]
    assert (written.delivered(), written.rejected()) == (1, 1)
    [message] = broker.read(letters)
    assert_stub(message, b"key1", b"x" * 5000)


def test_a_batch_too_large_for_the_broker_is_sent_again_one_by_one(dev_broker: DevBroker) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    topic, letters = broker.topic("out", 1), broker.topic("dead_letters", 1)
    written = Written(
        broker, topic, config={"linger.ms": 50}, dead_letters=DeadLetterSettings(letters)
    )
    too_large = KafkaError.MSG_SIZE_TOO_LARGE
    # The batch of three, then its second record alone.
    dev_broker.push_request_errors(PRODUCE, [too_large, 0, too_large])
    written.write(batch([b"a", b"b", b"c"]))
    written.snapshot()
    assert sorted(ids(broker.read(topic))) == [b"id0", b"id2"]
    assert ids(broker.read(letters)) == [b"id1"]
    assert (written.delivered(), written.rejected()) == (2, 1)


def test_what_can_be_retried_is_delivered_once(dev_broker: DevBroker) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    topic = broker.topic("out", 1)
    written = Written(broker, topic)
    dev_broker.push_request_errors(
        PRODUCE, [KafkaError.NOT_ENOUGH_REPLICAS, KafkaError.REQUEST_TIMED_OUT] * 2
    )
    written.write(batch([b"a", b"b", b"c"]))
    assert written.snapshot() == [3]
    assert ids(broker.read(topic)) == [b"id0", b"id1", b"id2"]


def test_what_cannot_be_retried_is_an_error(dev_broker: DevBroker) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    topic = broker.topic("out", 1)
    written = Written(broker, topic)
    dev_broker.push_request_errors(PRODUCE, [KafkaError.TOPIC_AUTHORIZATION_FAILED])
    written.write(batch([b"a", b"b"]))
    with pytest.raises(DeliveryError, match=f"{topic}/0.*TOPIC_AUTHORIZATION_FAILED"):
        written.snapshot()


def test_an_outage_longer_than_the_timeout_is_an_error_in_bounded_time(
    dev_broker: DevBroker,
) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    topic = broker.topic("out", 1)
    written = Written(broker, topic, config={"message.timeout.ms": 1000})
    written.write(batch([b"a"]))
    written.snapshot()
    dev_broker.broker_down()
    written.write(batch([b"b", b"c"]))
    started = time.monotonic()
    with pytest.raises(DeliveryError, match=r"2 record\(s\).*restart the flow"):
        written.snapshot()
    assert time.monotonic() - started < 10


def test_an_outage_shorter_than_the_timeout_is_waited_out(dev_broker: DevBroker) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    topic = broker.topic("out", 1)
    written = Written(broker, topic)
    dev_broker.broker_down()
    written.write(batch([b"a", b"b"]))
    poll_producers()
    dev_broker.broker_up()
    assert written.snapshot() == [2]
    assert ids(broker.read(topic)) == [b"id0", b"id1"]


def test_a_full_queue_makes_the_worker_wait_not_fail(broker: TestBroker) -> None:
    topic = broker.topic("out", 2)
    written = Written(broker, topic, config={"queue.buffering.max.messages": 10})
    written.write(batch([b"x"] * 1000))
    assert sum(written.snapshot()) == 1000
    assert len(broker.read(topic)) == 1000
    assert written.delivered() == 1000


def test_sinks_of_one_worker_share_a_producer(broker: TestBroker) -> None:
    first = Written(broker, broker.topic("out", 1))
    second = Written(broker, broker.topic("out", 1))
    assert first.parts[0]._producer is second.parts[0]._producer


def test_settings_stay_out_of_the_repr(broker: TestBroker) -> None:
    sink = KafkaSink("out", {**broker.config, "sasl.password": "secret"})
    assert "secret" not in repr(sink)
