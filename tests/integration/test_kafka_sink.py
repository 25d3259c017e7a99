"""The sink knows what became of every record."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from confluent_kafka import KafkaError, Message

from dataflows.kafka.dead_letter import reason_headers
from dataflows.kafka.dev_broker import DevBroker
from dataflows.kafka.errors import DeliveryError, StartupError
from dataflows.kafka.partitioner import partitions_of
from dataflows.kafka.records import OutRecords
from dataflows.kafka.replay import DeadLetter
from dataflows.kafka.sink import KafkaSink, poll_sinks
from dataflows.kafka.writer import Delivery
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
        _written.append(self)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def write(self, out: OutRecords) -> OutRecords | None:
        """Write; return the dead letters of what is too large."""
        letters = None
        for item in self.sink.split([out]):
            if isinstance(item, OutRecords):
                letters = item
            else:
                self.parts[self.sink.part_fn(item[0])].write_batch([item[1]])
        return letters

    def snapshot(self) -> list[int]:
        return [part.snapshot()[1] for part in self.parts]

    def delivered(self) -> int:
        return sum(each.delivered for each in self.told)

    def too_large(self) -> int:
        return sum(each.too_large for each in self.told)


_written: list[Written] = []


@pytest.fixture(autouse=True)
def close_sinks() -> Iterator[None]:
    """Close what a test has opened: `poll_sinks` looks at all partitions of the thread."""
    yield
    while _written:
        _written.pop().close()


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
    started = time.monotonic()
    out = batch([b"x"] * 10)
    out.append_time[3] = -1  # not known
    written.write(out)
    while written.delivered() < 10:
        assert time.monotonic() < started + 10
        poll_sinks()
        written.parts[0].write_batch([])
    spent_ms = (time.monotonic() - started) * 1000
    latency_ms = np.concatenate([each.latency_ms for each in written.told])
    assert len(latency_ms) == 9
    assert (latency_ms >= 40).all()
    assert (latency_ms <= 42 + spent_ms).all()  # clocks of whole milliseconds


def test_a_record_too_large_comes_back_as_a_dead_letter(broker: TestBroker) -> None:
    topic, letters = broker.topic("out", 1), broker.topic("dead_letters", 2)
    config = {"message.max.bytes": 5000}
    written = Written(broker, topic, config=config)
    letter_sink = Written(broker, letters)
    large = written.write(batch([b"a", b"x" * 5000, b"b"]))
    assert large is not None
    assert written.snapshot() == [2]
    assert ids(broker.read(topic)) == [b"id0", b"id2"]
    assert (written.delivered(), written.too_large()) == (2, 1)
    assert letter_sink.write(large) is None
    letter_sink.snapshot()
    [message] = broker.read(letters)
    letter = DeadLetter.of(message)
    assert (letter.reason, letter.topic) == ("prediction_too_large", topic)
    assert (letter.source_partition, letter.source_offset) == (-1, -1)
    assert (letter.key, letter.value) == (b"key1", b"x" * 5000)
    assert ids([message]) == [b"id1"]


@pytest.mark.parametrize("size", [4096 - 128 - 7, 4096 - 128 - 6])
def test_what_is_not_too_large_is_taken(broker: TestBroker, size: int) -> None:
    written = Written(broker, broker.topic("out", 1), config={"message.max.bytes": 4096})
    large = written.write(batch([b"x" * size]))  # and a key of 4 bytes and an id of 3
    assert (large is None) == (size + 7 + 128 <= 4096)
    assert written.snapshot() == [1 if large is None else -1]


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


def test_a_dead_letter_too_large_is_written_as_a_stub(
    broker: TestBroker, caplog: pytest.LogCaptureFixture
) -> None:
    topic = broker.topic("dead_letters", 1)
    written = Written(broker, topic, config={"message.max.bytes": 5000})
    assert written.write(letters_of([b"a", b"x" * 5000, b"b"])) is None
    assert written.snapshot() == [3]
    first, second, least = broker.read(topic)
    assert ids([first, second, least]) == [b"id0", b"id2", b"id1"]
    assert_stub(least, b"key1", b"x" * 5000)
    assert written.delivered() == 3
    assert "does not take a dead letter" in caplog.text


def test_a_limit_too_low_for_any_dead_letter_is_refused_at_start(broker: TestBroker) -> None:
    with pytest.raises(StartupError, match=r"at most 2000 bytes: raise its max\.message\.bytes"):
        Written(broker, broker.topic("out", 1), config={"message.max.bytes": 2000})


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
    written = Written(broker, topic, config={"message.timeout.ms": 3000})
    written.write(batch([b"a"]))
    written.snapshot()
    dev_broker.broker_down()
    written.write(batch([b"b", b"c"]))
    started = time.monotonic()
    with pytest.raises(DeliveryError, match=r"[12] record\(s\).*restart the flow"):
        written.snapshot()
    assert time.monotonic() - started < 12


def test_an_outage_shorter_than_the_timeout_is_waited_out(dev_broker: DevBroker) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    topic = broker.topic("out", 1)
    written = Written(broker, topic)
    dev_broker.broker_down()
    written.write(batch([b"a", b"b"]))
    poll_sinks()
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
    assert first.parts[0]._writer._producer is second.parts[0]._writer._producer


def test_settings_stay_out_of_the_repr(broker: TestBroker) -> None:
    sink = KafkaSink("out", {**broker.config, "sasl.password": "secret"})
    assert "secret" not in repr(sink)
