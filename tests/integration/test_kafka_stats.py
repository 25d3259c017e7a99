"""What a source says of itself while it reads: how far behind, how old, and whether brokers answer.

The engine is not needed for that: its part is called as the engine would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any

import pytest
from confluent_kafka import Producer

from dataflows.kafka.dev_broker import CONSUMER_CONFIG, DevBroker
from dataflows.kafka.source import KafkaSource, SourceStats, SourceTopic
from tests.kafka.client import await_that

PARTITIONS = 2


@contextmanager
def reading(broker: DevBroker, **options: Any) -> Iterator[tuple[KafkaSource, Callable[[], int]]]:
    """Yield a source of the topic ``tx``, and what has it read once: how many records came."""
    config = {"bootstrap.servers": broker.bootstrap_servers, **CONSUMER_CONFIG}
    source = KafkaSource([SourceTopic("tx", "at")], config, group_id="stats", **options)
    parts = [source.build_part("read", name, None) for name in source.list_parts()]
    leader = min(parts, key=lambda part: part.name)

    def turn() -> int:
        return sum(map(len, leader.next_batch()))

    try:
        yield source, turn
    finally:
        for part in parts:
            part.close()


@pytest.fixture
def broker() -> Iterator[DevBroker]:
    with DevBroker({"tx": PARTITIONS}) as started:
        yield started


def sent(producer: Producer, count: int) -> None:
    for n in range(count):
        value = b'{"at": %d}' % int(time.time() * 1000)
        producer.produce("tx", value, partition=n % PARTITIONS)
    assert not producer.flush(10)


def producer_of(broker: DevBroker) -> Producer:
    return Producer({"bootstrap.servers": broker.bootstrap_servers, "linger.ms": 0})


def test_who_keeps_up_is_not_behind_though_records_are_always_under_way(broker: DevBroker) -> None:
    """At every look something is there that was not emitted: it is young, and never the same."""
    looks: list[tuple[int, float]] = []

    def look(stats: SourceStats) -> None:
        looks.append((sum(stats.lag.values()), max(stats.lag_s.values())))

    producer, rounds_s, emitted, rounds = producer_of(broker), [0.0], 0, 0
    with reading(broker, observe=look, batch_size=10) as (_, turn):
        sent(producer, 40)
        # Four looks a second; on a quiet machine some find nothing under way. Twenty that do are
        # asked for, and a source that never sees any is not waited for longer than a minute.
        while sum(records > 0 for records, _ in looks) < 20 and len(looks) < 240:
            began = time.monotonic()
            sent(producer, 20)
            rounds += 1
            while emitted < 20 * rounds:  # 40 are left, never the same
                emitted += turn()
            rounds_s.append(time.monotonic() - began)
    late = [seconds for records, seconds in looks if records]
    assert len(late) >= 20, looks
    # A record waits for three rounds, and for those who share the machine.
    assert max(late) < 1.0 + 5 * max(rounds_s), (looks, max(rounds_s))


def test_a_backlog_is_old_at_every_look(broker: DevBroker) -> None:
    """However often the buffers are empty when it is looked: one lane, read in small batches."""
    looks: list[tuple[int, float]] = []

    def look(stats: SourceStats) -> None:
        if stats.read["tx"]:
            looks.append((stats.lag["tx", 0], stats.lag_s["tx", 0]))

    producer, old_s = producer_of(broker), 3600
    long_ago = int((time.time() - old_s) * 1000)
    for _ in range(5_000):
        producer.produce("tx", b'{"at": 1}', partition=0, timestamp=long_ago)
    assert not producer.flush(10)
    with reading(broker, observe=look, batch_size=128) as (source, turn):
        while source.stats.read["tx"] < 4_000:
            if turn():
                source_of = next(iter(source._readers.values()))
                source_of._observe()
    assert looks and all(lag and seconds > old_s - 1 for lag, seconds in looks), looks


def test_what_is_not_read_grows_old(broker: DevBroker) -> None:
    seen: list[tuple[float, float]] = []
    producer = producer_of(broker)

    def look(stats: SourceStats) -> None:
        seen.append((max(stats.lag_s.values()), stats.age_s))

    # One record a minute may pass.
    with reading(broker, observe=look, rate_limit=(1 / 60, 1)) as (source, turn):
        sent(producer, 10)
        await_that(lambda: turn() > 0, "the first")

        def are_old() -> bool:
            turn()
            return bool(seen) and seen[-1][0] > 1.0

        await_that(are_old, "what waits grows old")
        assert seen[-1][1] == pytest.approx(seen[-1][0]), "nothing was emitted: the oldest's age"
        assert sum(source.stats.lag.values()) >= 8 and source.stats.buffered >= 8
        assert source.stats.throttled_s > 0.5


@pytest.mark.parametrize("traffic", [False, True])
def test_the_end_of_an_outage_is_noticed_and_told_first(broker: DevBroker, traffic: bool) -> None:
    told: list[tuple[int, bool, int]] = []
    emitted = [0]

    def look(stats: SourceStats) -> None:
        told.append((stats.outages, stats.outage_since is not None, emitted[0]))

    producer = producer_of(broker)
    with reading(broker, observe=look) as (source, turn):

        def turned() -> int:
            count = turn()
            emitted[0] += count
            return count

        sent(producer, 10)
        await_that(lambda: turned() >= 0 and emitted[0] == 10, "all is read")
        broker.broker_down()

        def outage() -> bool:
            turned()
            return source.stats.outage_since is not None

        await_that(outage, "the outage is noticed")
        if traffic:
            producer.produce("tx", b'{"at": 1}', partition=0)
        broker.broker_up()

        def over() -> bool:
            turned()
            return source.stats.outage_since is None

        await_that(over, "its end is noticed", 30)
        if traffic:
            await_that(lambda: turned() >= 0 and emitted[0] == 11, "what came in it")
    first = next(look for look in told if look[0] == 1)
    assert first[1:] == (False, 10), "told before what came in it was emitted"


def full_soon(
    broker: DevBroker,
) -> AbstractContextManager[tuple[KafkaSource, Callable[[], int]]]:
    """Return what `reading` does, of a source that emits a record a minute.

    It asks for more at each turn, so it goes on reading: the rest of what comes waits.
    """
    turns = count(1)
    return reading(
        broker, rate_limit=(1 / 60, 1), buffer_records=100, batch_size=lambda: next(turns)
    )


def filled(producer: Producer, turn: Callable[[], int], source: KafkaSource) -> None:
    """Read until a buffer is full and its partition paused."""
    sent(producer, 2_000)

    def full() -> bool:
        turn()
        return any(lane.paused for reader in source._readers.values() for lane in reader._order)

    await_that(full, "a partition is paused", 30)


def test_lag_grows_while_the_buffers_are_full(broker: DevBroker) -> None:
    producer = producer_of(broker)
    with full_soon(broker) as (source, turn):
        filled(producer, turn, source)
        sent(producer, 1_000)

        def seen() -> bool:
            turn()
            return sum(source.stats.lag.values()) == 3_000 - source.stats.read["tx"]

        await_that(seen, "what was appended is seen")


def test_an_outage_is_noticed_while_the_buffers_are_full(broker: DevBroker) -> None:
    producer = producer_of(broker)
    with full_soon(broker) as (source, turn):
        filled(producer, turn, source)
        for down in (True, False):
            (broker.broker_down if down else broker.broker_up)()

            def noticed(down: bool = down) -> bool:
                turn()
                return (source.stats.outage_since is not None) == down

            await_that(noticed, "it is noticed", 30)
        assert source.stats.outages == 1 and source.stats.buffered >= 100
