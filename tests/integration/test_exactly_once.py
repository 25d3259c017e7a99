"""What a transactional sink promises to readers of committed records, on real Kafka."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
)

from dataflows.kafka.dev_broker import DevBroker
from dataflows.kafka.errors import DeliveryError, StartupError
from dataflows.kafka.records import OutRecords
from dataflows.kafka.sink import KafkaSink, SinkState, _SinkPartition
from dataflows.kafka.writer import Delivery
from tests.integration.conftest import TestBroker, await_that

PRODUCE = 0  # Kafka's API key


def batch(names: Sequence[str]) -> OutRecords:
    """Return a record for each name: its event id, its value, and its key."""
    ids = [name.encode() for name in names]
    return OutRecords(list(ids), list(ids), np.zeros(len(ids), dtype=np.int64), ids)


class Life:
    """A life of a sink of one topic, from the states that an earlier one left."""

    def __init__(
        self,
        broker: TestBroker,
        topic: str,
        states: dict[str, SinkState] | None = None,
        *,
        config: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.told: list[Delivery] = []
        self.sink = KafkaSink(
            topic,
            {**broker.config, **(config or {})},
            delivery="exactly_once",
            observe=self.told.append,
            **{"owner": "test", **options},
        )
        self.parts: dict[str, _SinkPartition] = {
            name: self.sink.build_part("step", name, (states or {}).get(name))
            for name in self.sink.list_parts()
        }

    def write(self, *names: str, origin: str = "", begin: int = 0) -> None:
        """Write records; of the events from offset `begin` on of the input partition `origin`."""
        records = batch(names)
        if origin:
            records.origins = [f"{origin}/{begin + n}".encode() for n in range(len(names))]
        for item in self.sink.split([records]):
            assert isinstance(item, tuple)
            list(self.parts.values())[self.sink.part_fn(item[0])].write_batch([item[1]])

    def snapshot(self) -> dict[str, SinkState]:
        return {name: part.snapshot() for name, part in self.parts.items()}

    def suppressed(self) -> int:
        return sum(each.suppressed for each in self.told)

    def close(self) -> None:
        for part in self.parts.values():
            part.close()


@pytest.fixture
def lives() -> Iterator[list[Life]]:
    started: list[Life] = []
    yield started
    for life in started:
        life.close()


def lived(
    kafka: TestBroker,
    topic: str,
    states: dict[str, SinkState] | None = None,
    *,
    kept: Sequence[str] = (),
    lost: Sequence[str] = (),
    cut_off: Sequence[str] = (),
    origin: str = "",
    begin: int = 0,
    **options: Any,
) -> dict[str, SinkState]:
    """Live a life from `states` to a crash; return the snapshot of it that there is.

    Args:
        kept: written before that snapshot.
        lost: written and committed to Kafka after it, of the events from offset `begin` on of the
            input partition `origin`. The recovery store never gets to know of them.
        cut_off: written at last, in a transaction that nobody commits.
    """
    life = Life(kafka, topic, states, **options)
    life.write(*kept)
    snapshot = life.snapshot()
    life.write(*lost, origin=origin, begin=begin)
    life.snapshot()
    life.write(*cut_off)
    life.close()
    return snapshot


def ids(messages: list[Message]) -> list[str]:
    return [dict(message.headers() or [])["event_id"].decode() for message in messages]


def read(kafka: TestBroker, topic: str, wanted: int) -> list[Message]:
    """Return what a topic holds once it is at least as much as wanted.

    A commit that has returned cannot come to nothing; readers see it some milliseconds later.
    """
    found: list[Message] = []

    def enough() -> bool:
        found[:] = kafka.read(topic)
        return len(found) >= wanted

    await_that(enough, f"{wanted} records")
    return found


def names(begin: int, end: int) -> list[str]:
    return [f"tx{n}" for n in range(begin, end)]


def add_a_partition(kafka: TestBroker, topic: str) -> None:
    """Add a second partition to a topic of one."""
    admin = AdminClient(kafka.config)
    admin.create_partitions([NewPartitions(topic, 2)])[topic].result(30)
    await_that(lambda: len(admin.list_topics(topic).topics[topic].partitions) == 2, "partitions")


def set_largest_message(kafka: TestBroker, topic: str, size: int) -> None:
    """Set a topic's max.message.bytes."""
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
    resource.add_incremental_config(entry)
    admin = AdminClient(kafka.config)
    admin.incremental_alter_configs([resource])[resource].result(30)


def test_what_a_snapshot_follows_is_committed(kafka: TestBroker, lives: list[Life]) -> None:
    topic = kafka.topic("out", 3)
    lives.append(life := Life(kafka, topic, transaction_s=60))
    life.write(*names(0, 500))
    assert kafka.read(topic) == []  # the transaction is open
    states = life.snapshot()
    found = read(kafka, topic, 500)
    assert Counter(ids(found)) == Counter(names(0, 500))
    assert sum(each.delivered for each in life.told) == 500
    for name, state in states.items():
        mine = [m for m in found if m.partition() == int(name[-5:])]
        assert state[1:] == (mine[-1].offset() + 2, 3, b"", "test")
        row = [int(each[2:]) for each in ids(mine)]
        assert row == sorted(row)


def test_a_transaction_is_committed_when_its_time_is_up(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 1)
    lives.append(life := Life(kafka, topic, transaction_s=0.05))
    life.write("tx0")
    await_that(lambda: ids(kafka.read(topic)) == ["tx0"], "the transaction ends by itself")


def test_rows_that_come_while_a_transaction_is_committed_keep_their_order(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 1)
    lives.append(life := Life(kafka, topic, transaction_s=0.01))
    for n in range(2000):
        life.write(f"tx{n}")
    life.snapshot()
    assert ids(read(kafka, topic, 2000)) == names(0, 2000)


def test_what_was_published_after_the_snapshot_is_not_published_again(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 3)
    states = lived(kafka, topic, kept=names(0, 100), lost=names(100, 180), cut_off=names(180, 200))
    lives.append(second := Life(kafka, topic, states))
    second.write(*names(100, 250))  # the open epoch again, and more
    second.snapshot()
    assert Counter(ids(read(kafka, topic, 250))) == Counter(names(0, 250))
    # At least those; and of the last transaction what its time was up for before the crash.
    assert second.suppressed() >= 80


def test_what_was_published_may_come_again_after_the_next_snapshot(
    kafka: TestBroker, lives: list[Life]
) -> None:
    """A life that replays only a part of the open epoch, and dies after a snapshot of its own."""
    topic = kafka.topic("out", 1)
    states = lived(kafka, topic, lost=[*names(0, 100), "tx90"])  # one of them twice
    states = lived(kafka, topic, states, kept=names(0, 40), lost=names(40, 50))
    lives.append(third := Life(kafka, topic, states))
    third.write(*names(40, 100), "tx90", *names(100, 110))
    states = third.snapshot()
    assert third.suppressed() == 61
    assert ids(read(kafka, topic, 111)) == [*names(0, 100), "tx90", *names(100, 110)]
    assert {state[3] for state in states.values()} == {b""}


def test_an_id_is_suppressed_as_often_as_it_was_published(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 1)
    states = lived(kafka, topic, lost=["tx1", "tx1", "tx2"])
    lives.append(second := Life(kafka, topic, states))
    second.write("tx1", "tx2", "tx1", "tx1", "tx2")
    second.snapshot()
    assert Counter(ids(read(kafka, topic, 5))) == Counter(tx1=3, tx2=2)


def test_a_first_start_after_a_life_without_a_snapshot(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 2)
    lived(kafka, topic, lost=names(0, 50))
    lives.append(second := Life(kafka, topic, None))
    second.write(*names(0, 60))
    second.snapshot()
    assert Counter(ids(read(kafka, topic, 60))) == Counter(names(0, 60))


def test_a_new_owner_fences_the_old_one(kafka: TestBroker, lives: list[Life]) -> None:
    topic = kafka.topic("out", 1)
    with ThreadPoolExecutor(1) as elsewhere:  # partitions of one worker confirm together
        lives.append(zombie := elsewhere.submit(Life, kafka, topic, transaction_s=60).result())
    states = zombie.snapshot()
    zombie.write(*names(0, 10))  # its transaction is open …
    lives.append(owner := Life(kafka, topic, states))
    owner.write(*names(0, 12))
    owner.snapshot()
    with pytest.raises(DeliveryError, match=f"'test/{topic}/0'.*Another process writes"):
        zombie.snapshot()  # … and comes to nothing
    with pytest.raises(DeliveryError, match="Another process writes"):
        zombie.write("tx99")
    owner.write("tx12")
    owner.snapshot()
    assert ids(read(kafka, topic, 13)) == names(0, 13)


def test_an_owner_of_another_name_fences_the_old_one_too(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 1)
    with ThreadPoolExecutor(1) as elsewhere:
        lives.append(zombie := elsewhere.submit(Life, kafka, topic, transaction_s=60).result())
    states = zombie.snapshot()
    zombie.write(*names(0, 10))
    lives.append(owner := Life(kafka, topic, states, owner="renamed"))
    owner.write(*names(0, 12))
    assert {state[4] for state in owner.snapshot().values()} == {"renamed"}
    with pytest.raises(DeliveryError, match="Another process writes"):
        zombie.snapshot()
    assert ids(read(kafka, topic, 12)) == names(0, 12)


def test_what_inputs_that_are_gone_had_caused_is_forgotten(
    kafka: TestBroker, lives: list[Life]
) -> None:
    """A new store on an old output topic: old ids are not compared with for ever."""
    topic = kafka.topic("out", 1)
    lived(kafka, topic, lost=names(0, 50), origin="in/0")
    lives.append(second := Life(kafka, topic))
    second.write("new", origin="in/0", begin=50)
    assert {state[3] for state in second.snapshot().values()} == {b""}
    second.write("tx7", origin="in/0", begin=51)  # an old id, of a new event
    second.snapshot()
    assert ids(read(kafka, topic, 52)) == [*names(0, 50), "new", "tx7"]


@pytest.mark.parametrize("drained", [True, False])
def test_partitions_may_be_added_only_when_nothing_is_open(
    kafka: TestBroker, lives: list[Life], drained: bool
) -> None:
    topic = kafka.topic("out", 1)
    states = lived(kafka, topic, kept=["tx0"], lost=[] if drained else names(1, 20))
    add_a_partition(kafka, topic)
    lives.append(second := Life(kafka, topic, states))
    if drained:
        second.write("tx2", "tx3")
        second.snapshot()
        assert Counter(ids(read(kafka, topic, 3))) == Counter(["tx0", "tx2", "tx3"])
    else:
        with pytest.raises(StartupError, match=r"had 1 partitions and has 2, and \d+ records"):
            second.snapshot()


def test_a_crash_right_after_partitions_were_added_is_no_trap(
    kafka: TestBroker, lives: list[Life]
) -> None:
    """The states still tell the old number, but nothing was published under it since."""
    topic = kafka.topic("out", 1)
    states = lived(kafka, topic, kept=["tx0"])
    add_a_partition(kafka, topic)
    second = Life(kafka, topic, states)
    second.sink.refuse_moved_keys(states)
    second.write(*names(1, 20))
    second.snapshot()
    second.close()  # the epoch is lost
    lives.append(third := Life(kafka, topic, states))
    third.sink.refuse_moved_keys(states)
    third.write(*names(1, 25))
    third.snapshot()
    assert Counter(ids(read(kafka, topic, 25))) == Counter(names(0, 25))


def test_added_partitions_are_refused_before_any_of_them_is_written_to(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 1)
    states = lived(kafka, topic, kept=["tx0"], lost=names(1, 20))
    ends = lived(kafka, topic, states, kept=names(1, 20))
    add_a_partition(kafka, topic)
    sink = KafkaSink(topic, kafka.config, delivery="exactly_once", owner="test")
    with pytest.raises(StartupError, match=r"had 1 partitions and has 2, and \d+ records"):
        sink.refuse_moved_keys(states)
    sink.refuse_moved_keys(ends)  # as of a drain


def delete_records(kafka: TestBroker, topic: str, before: int) -> None:
    admin = AdminClient(kafka.config)
    at = TopicPartition(topic, 0, before)
    admin.delete_records([at])[at].result(30)


def test_a_tail_that_retention_has_cut_is_refused_unless_allowed(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 1)
    states = lived(kafka, topic, kept=names(0, 10), lost=names(10, 20))
    delete_records(kafka, topic, 15)
    lives.append(second := Life(kafka, topic, states))
    with pytest.raises(StartupError, match="records 11 to 15 are gone.*RESUME_PAST_RETENTION"):
        second.snapshot()
    lives.append(third := Life(kafka, topic, states, past_retention=True))
    third.write(*names(10, 20))
    third.snapshot()
    assert third.suppressed() == 6  # four come twice: nobody can know
    assert ids(read(kafka, topic, 10)) == names(14, 20) + names(10, 14)


def test_a_drained_flow_may_outlast_the_retention_of_its_output(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 1)
    states = lived(kafka, topic, kept=names(0, 10))
    delete_records(kafka, topic, -1)  # all, the transaction's marker too
    lives.append(second := Life(kafka, topic, states))
    second.write("tx10")
    second.snapshot()
    assert ids(read(kafka, topic, 1)) == ["tx10"]


def test_a_tail_longer_than_allowed_is_refused(kafka: TestBroker, lives: list[Life]) -> None:
    topic = kafka.topic("out", 1)
    lived(kafka, topic, lost=names(0, 100))
    lives.append(second := Life(kafka, topic, tail_max_records=50))
    with pytest.raises(
        StartupError, match=r"101 records and the recovery store knows none.*\(50\)"
    ):
        second.snapshot()


def test_a_record_that_the_topic_stops_taking_is_an_error_at_once(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 1)
    lives.append(life := Life(kafka, topic, transaction_s=60))
    life.snapshot()
    set_largest_message(kafka, topic, 100)
    life.write("x" * 500)
    with pytest.raises(DeliveryError, match=r"did not take 1 record\(s\).*[Ss]ize"):
        life.snapshot()
    assert kafka.read(topic) == []


def test_a_transaction_that_fails_is_aborted_and_written_again(
    dev_broker: DevBroker, lives: list[Life], caplog: pytest.LogCaptureFixture
) -> None:
    # The mock does not isolate transactions, so what was aborted is seen too: order tells.
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    topic = broker.topic("out", 1)
    lives.append(life := Life(broker, topic, transaction_s=60))
    life.snapshot()
    dev_broker.push_request_errors(PRODUCE, [KafkaError.TOPIC_AUTHORIZATION_FAILED])
    life.write(*names(0, 5))
    life.write(*names(5, 10))
    life.snapshot()
    assert "is aborted and written again" in caplog.text
    assert ids(broker.read(topic))[-10:] == names(0, 10)
    assert sum(each.delivered for each in life.told) == 10


class Refusing:
    """A producer that does not take a row now and then, as librdkafka does when it has come to
    think that the topic does not exist, or may not be written."""

    def __init__(self, producer: Producer, refused: set[int]) -> None:
        self._producer = producer
        self._refused = refused
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def produce(self, *arguments: Any) -> None:
        self._calls += 1
        if self._calls in self._refused:
            raise KafkaException(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))
        self._producer.produce(*arguments)


def refuse(life: Life, calls: set[int]) -> None:
    (part,) = life.parts.values()
    part._writer._producer = Refusing(part._writer._producer, calls)  # type: ignore[attr-defined]


@pytest.mark.parametrize("refused", [{1}, {3}, {10}, {4, 6}, {10, 11, 12}], ids=str)
def test_rows_that_the_client_does_not_take_are_written_again(
    kafka: TestBroker, lives: list[Life], caplog: pytest.LogCaptureFixture, refused: set[int]
) -> None:
    topic = kafka.topic("out", 1)
    lives.append(life := Life(kafka, topic, transaction_s=60))
    life.snapshot()
    refuse(life, refused)
    life.write(*names(0, 5))
    life.write(*names(5, 10))
    life.snapshot()
    assert "is aborted and written again" in caplog.text
    assert ids(read(kafka, topic, 10)) == names(0, 10)
    assert sum(each.delivered for each in life.told) == 10


def test_rows_that_the_client_never_takes_are_an_error(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 1)
    options: Any = {"transaction_s": 60, "config": {"message.timeout.ms": 1000}}
    lives.append(life := Life(kafka, topic, **options))
    states = life.snapshot()
    refuse(life, set(range(3, 1000)))
    life.write(*names(0, 5))
    with pytest.raises(DeliveryError, match=r"did not take 5 record\(s\).*authorization"):
        life.snapshot()
    assert sum(each.delivered for each in life.told) == 0
    lives.append(second := Life(kafka, topic, states))
    second.write(*names(0, 5))
    second.snapshot()
    assert ids(read(kafka, topic, 5)) == names(0, 5)


def test_a_foreign_open_transaction_does_not_hide_what_was_published(
    kafka: TestBroker, lives: list[Life]
) -> None:
    topic = kafka.topic("out", 1)
    first = Life(kafka, topic)
    states = first.snapshot()
    foreign = Producer({**kafka.config, "transactional.id": f"foreign {topic}"})
    foreign.init_transactions(30)
    foreign.begin_transaction()
    foreign.produce(topic, b"?", headers=[("event_id", b"?")])
    foreign.flush(30)
    first.write("tx0")
    first.snapshot()
    first.close()
    lives.append(second := Life(kafka, topic, states, startup_timeout_s=3))
    second.write("tx0")
    with pytest.raises(StartupError, match="a transaction of a foreign writer may be open"):
        second.snapshot()
    foreign.abort_transaction(30)
    lives.append(third := Life(kafka, topic, states))
    third.write("tx0")
    third.snapshot()
    assert ids(read(kafka, topic, 1)) == ["tx0"]


@pytest.mark.parametrize("either_copy", [False, True])
def test_two_events_with_one_id(kafka: TestBroker, lives: list[Life], either_copy: bool) -> None:
    """A life answers one and is killed; the next one meets the other first."""
    topic = kafka.topic("out", 1)
    states = lived(kafka, topic, lost=["tx1"], origin="in/1", begin=3, either_copy=either_copy)
    lives.append(second := Life(kafka, topic, states, either_copy=either_copy))
    second.write("tx1", origin="in/0", begin=7)
    if not either_copy:  # else it is dropped as the second copy
        second.write("tx1", origin="in/1", begin=3)
    second.snapshot()
    written = [dict(message.headers() or [])["origin"] for message in kafka.read(topic)]
    assert written == ([b"in/1/3"] if either_copy else [b"in/1/3", b"in/0/7"])


def test_a_batch_is_no_larger_than_the_topic_takes(kafka: TestBroker, lives: list[Life]) -> None:
    topic = kafka.topic("out", 1)
    set_largest_message(kafka, topic, 20_000)
    lives.append(life := Life(kafka, topic, transaction_s=60))
    life.write(*(f"{n:0200d}" for n in range(2000)))
    life.snapshot()
    assert len(read(kafka, topic, 2000)) == 2000
