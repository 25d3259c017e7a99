"""The source against a simulated engine and broker: no row is lost or doubled at a snapshot.

The engine here is the part of Bytewax 0.21.1's `src/inputs.rs` that the source's argument rests
on: parts in name order, one clock reading per activation, `next_batch` only when every earlier
epoch is durable, `snapshot` when the part's own clock says so.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from bytewax.inputs import AbortExecution
from confluent_kafka import KafkaError, Message, TopicPartition

from dataflows.kafka import rebuild
from dataflows.kafka import source as module
from dataflows.kafka.errors import SourceError, StartupError
from dataflows.kafka.records import Records
from dataflows.kafka.source import KafkaSource, SourceTopic

INTERVAL = 10
TOPICS = [SourceTopic("reports", "report_time"), SourceTopic("transactions", "event_time")]
Row = tuple[str, int]  # part name, offset


def value(topic: str, time_ms: int) -> bytes:
    field_name = next(each.stream_time for each in TOPICS if each.name == topic)
    return msgspec.json.encode({"other": "x", field_name: time_ms})


@dataclass
class Broker:
    """The log of every partition, and what the group was told."""

    logs: dict[tuple[str, int], list[bytes | None]]
    low: dict[tuple[str, int], int] = field(default_factory=dict)
    committed: dict[tuple[str, int], int] = field(default_factory=dict)
    silent: set[tuple[str, int]] = field(default_factory=set)
    timestamp: int = 10**12
    #: Timestamps of partitions whose records do not all have the one above.
    times: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    #: Partitions whose last offset is no record, as after a transaction.
    marked: set[tuple[str, int]] = field(default_factory=set)

    def timestamps(self, key: tuple[str, int]) -> list[int]:
        return self.times.get(key, [self.timestamp] * len(self.logs[key]))


class _Metadata:
    def __init__(self, partitions: dict[str, int]) -> None:
        self.topics = {name: _Topic(count) for name, count in partitions.items()}


class _Topic:
    def __init__(self, partitions: int) -> None:
        self.partitions = dict.fromkeys(range(partitions))


class FakeConsumer:
    """Deliver the broker's records in random runs, as a fetch loop does."""

    broker: Broker
    rng: random.Random

    def __init__(self, config: dict[str, Any], logger: Any) -> None:
        del logger
        self.config = config
        self.at: dict[tuple[str, int], int] = {}
        self.told_end: dict[tuple[str, int], int] = {}
        self.paused: set[tuple[str, int]] = set()
        self.closed = False

    def list_topics(self, timeout: float) -> _Metadata:
        counts: dict[str, int] = {}
        for topic, _ in self.broker.logs:
            counts[topic] = counts.get(topic, 0) + 1
        return _Metadata(counts)

    def get_watermark_offsets(
        self, partition: TopicPartition, timeout: float = 0, cached: bool = False
    ) -> tuple[int, int]:
        key = (partition.topic, partition.partition)
        return self.broker.low.get(key, 0), len(self.broker.logs[key])

    def assign(self, partitions: list[TopicPartition]) -> None:
        self.at = {(each.topic, each.partition): each.offset for each in partitions}

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        self.paused |= {(each.topic, each.partition) for each in partitions}

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        for each in partitions:
            assert self.at[each.topic, each.partition] == each.offset
            self.paused.remove((each.topic, each.partition))

    def commit(self, offsets: list[TopicPartition], asynchronous: bool) -> None:
        for each in offsets:
            self.broker.committed[each.topic, each.partition] = each.offset
        if asynchronous:
            self.config["on_commit"](None, offsets)

    def committed(self, partitions: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        known = self.broker.committed
        return [
            TopicPartition(at.topic, at.partition, known.get((at.topic, at.partition), -1001))
            for at in partitions
        ]

    def offsets_for_times(
        self, partitions: list[TopicPartition], timeout: float
    ) -> list[TopicPartition]:
        found = []
        for at in partitions:
            times = self.broker.timestamps((at.topic, at.partition))
            low = self.broker.low.get((at.topic, at.partition), 0)
            later = [n for n, time in enumerate(times) if time >= at.offset and n >= low]
            found.append(TopicPartition(at.topic, at.partition, min(later, default=-1)))
        return found

    def poll(self, timeout: float) -> None: ...

    def consume(self, count: int, timeout: float) -> list[Message]:
        out: list[Message] = []
        keys = [key for key in self.at if key not in self.broker.silent | self.paused]
        self.rng.shuffle(keys)
        for key in keys:
            log, start = self.broker.logs[key], self.at[key]
            stop = min(len(log), start + self.rng.randint(0, 12), start + count - len(out))
            for offset in range(start, stop - (key in self.broker.marked and stop == len(log))):
                out.append(
                    Message(
                        topic=key[0],
                        partition=key[1],
                        offset=offset,
                        value=log[offset],
                        timestamp=(1, self.broker.timestamps(key)[offset]),
                    )
                )
            self.at[key] = stop
            if stop == len(log) and self.told_end.get(key) != stop and len(out) < count:
                self.told_end[key] = stop
                end = KafkaError(KafkaError._PARTITION_EOF)
                out.append(Message(topic=key[0], partition=key[1], offset=stop, error=end))
        return out

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    seed = getattr(request, "param", 0)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> Iterator[Broker]:
    logs: dict[tuple[str, int], list[bytes | None]] = {}
    for topic, partitions in (("transactions", 3), ("reports", 2)):
        for partition in range(partitions):
            times = sorted(rng.randint(0, 200) for _ in range(rng.randint(0, 120)))
            logs[topic, partition] = [value(topic, time) for time in times]
    broker = Broker(logs)
    FakeConsumer.broker, FakeConsumer.rng = broker, rng
    for each in (module, rebuild):
        monkeypatch.setattr(each, "Consumer", FakeConsumer)
    module._drain.clear()
    yield broker
    module._drain.clear()


def kafka_source(**options: Any) -> KafkaSource:
    settings = {"batch_size": 7, "max_hold_s": 1e9, **options}
    return KafkaSource(TOPICS, {"bootstrap.servers": "fake"}, group_id="g", **settings)


@dataclass
class _EnginePart:
    part: Any
    epoch: int
    started: int


class Engine:
    """One life of a Bytewax worker, resumed from `store`: part name → offset."""

    def __init__(
        self,
        source: KafkaSource,
        store: dict[str, Any],
        epoch: int,
        rng: random.Random,
        topic: str = "",
    ) -> None:
        self.rng = rng
        self.now = 0
        self.durable = epoch  # every epoch below is; the probe's frontier
        self.first_epoch = epoch
        self.emitted: list[tuple[int, Row]] = []
        self.batches: list[Records] = []
        self.snapshots: dict[int, dict[str, Any]] = {}
        self.parts: dict[str, _EnginePart] = {}
        self.aborted = False
        # The others are another worker's.
        names = [name for name in source.list_parts() if name.startswith(topic)]
        rng.shuffle(names)
        for name in sorted(names, key=lambda name: name not in store):
            # Parts with a snapshot are built in activations of their own, the rest in one.
            self.now += rng.randint(0, 4) if name in store else 0
            part = source.build_part("step", name, store.get(name))
            self.parts[name] = _EnginePart(part, epoch, self.now)

    def activate(self) -> None:
        self.now += self.rng.randint(0, 3)
        now = self.now
        for name in sorted(self.parts):
            state = self.parts[name]
            if self.durable < state.epoch:
                continue
            awake = state.part.next_awake()
            if awake is None or awake.year < 9000:
                try:
                    for records in state.part.next_batch():
                        self.batches.append(records)
                        self.emitted += [
                            (state.epoch, (f"{message.topic()}/{message.partition():05d}", offset))
                            for message, offset in zip(
                                records.messages, records.offset.tolist(), strict=True
                            )
                        ]
                except AbortExecution:
                    self.aborted = True
            if now - state.started >= INTERVAL:
                self.snapshots.setdefault(state.epoch, {})[name] = state.part.snapshot()
                state.epoch += 1
                state.started = now
        # The recovery store commits an epoch some time after the last part has left it.
        finished = min(state.epoch for state in self.parts.values())
        if self.durable < finished and self.rng.random() < 0.5:
            self.durable += 1

    def crash(self, store: dict[str, Any]) -> list[Row]:
        """End this life; update `store`, return the rows of its durable epochs."""
        for epoch in range(self.first_epoch, self.durable):
            store.update(self.snapshots[epoch])
        return [row for epoch, row in self.emitted if epoch < self.durable]


def check_exact(kept: list[Row], store: dict[str, int]) -> None:
    """The rows of durable epochs are, of each part, exactly those below its stored offset."""
    for name, offset in store.items():
        assert [at for part, at in kept if part == name] == list(range(offset)), name


def live_and_crash(broker: Broker, rng: random.Random) -> tuple[list[Row], dict[str, int]]:
    store: dict[str, int] = {}
    kept: list[Row] = []
    epoch = 1
    for _ in range(12):
        engine = Engine(kafka_source(), store, epoch, rng)
        for _ in range(rng.randint(1, 60)):
            engine.activate()
            if rng.random() < 0.1:
                partition = rng.choice(list(broker.logs))
                broker.logs[partition].append(value(partition[0], rng.randint(0, 300)))
        kept += engine.crash(store)
        check_exact(kept, store)
        epoch = engine.durable
    return kept, store


@pytest.mark.parametrize("rng", range(60), indirect=True)
def test_no_row_is_lost_or_doubled_however_the_worker_crashes(
    broker: Broker, rng: random.Random
) -> None:
    kept, store = live_and_crash(broker, rng)
    engine = Engine(kafka_source(stop_at_end=True), store, 1000, rng)
    while not engine.aborted:
        engine.activate()
    kept += engine.crash(store)
    check_exact(kept, store)
    assert store == {
        f"{topic}/{partition:05d}": len(log) for (topic, partition), log in broker.logs.items()
    }
    # The drained life told the group where it stopped.
    assert broker.committed == {key: len(log) for key, log in broker.logs.items()}


def test_the_test_above_bites(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rule "emit nothing while a part is ahead", rows are lost."""

    def snapshot_carelessly(self: Any, part: Any) -> int:
        offset = careful(self, part)
        self._part_ahead = False
        return offset

    careful = module._Reader.snapshot
    monkeypatch.setattr(module._Reader, "snapshot", snapshot_carelessly)
    caught = 0
    for seed in range(20):
        FakeConsumer.rng = random.Random(seed)
        try:
            live_and_crash(broker, FakeConsumer.rng)
        except AssertionError:
            caught += 1
    assert caught > 10


@pytest.mark.parametrize("rng", range(20), indirect=True)
def test_rows_of_a_backlog_leave_in_stream_time_order(broker: Broker, rng: random.Random) -> None:
    engine = Engine(kafka_source(stop_at_end=True), {}, 1, rng)
    while not engine.aborted:
        engine.activate()
    order = [
        (time, source, partition, offset)
        for records in engine.batches
        for time, source, partition, offset in zip(
            records.stream_time.tolist(),
            records.source.tolist(),
            records.partition.tolist(),
            records.offset.tolist(),
            strict=True,
        )
    ]
    assert order == sorted(order)
    assert len(order) == sum(map(len, broker.logs.values()))


def test_a_drain_emits_nothing_and_stops_after_the_next_durable_snapshot(
    broker: Broker, rng: random.Random
) -> None:
    engine = Engine(kafka_source(), {}, 1, rng)
    while len(engine.emitted) < 50:
        engine.activate()
    module.request_drain()
    seen, epoch = len(engine.emitted), max(state.epoch for state in engine.parts.values())
    while not engine.aborted:
        engine.activate()
    assert len(engine.emitted) == seen
    store: dict[str, int] = {}
    check_exact(engine.crash(store), store)
    assert sum(store.values()) == seen  # nothing that was emitted is read again
    assert engine.durable in (epoch, epoch + 1)


def test_a_record_from_the_far_future_does_not_hold_up_its_partition(
    broker: Broker, rng: random.Random
) -> None:
    broker.logs = {
        ("transactions", 0): [
            value("transactions", time) for time in (10, broker.timestamp + 400_000, 20)
        ],
        ("reports", 0): [value("reports", time) for time in (15, 25)],
    }
    engine = Engine(kafka_source(stop_at_end=True), {}, 1, rng)
    while not engine.aborted:
        engine.activate()
    times = [time for records in engine.batches for time in records.stream_time.tolist()]
    assert times == [10, 10, 15, 20, 25]


BAD_VALUES = [
    None,
    b"",
    b"not json",
    b"\xff\xfe",
    b"[]",
    b'{"event_time": "later"}',
    b'{"event_time": 1e99}',
    b'{"event_time": -5}',
    b'{"event_time": 99999999999999999999999999}',
    b'{"event_time": 9223372036854775807}',
    b'{"event_time": null}',
    b'{"x": ' + b"[" * 100_000,
]


def test_a_value_without_a_stream_time_keeps_its_place(broker: Broker, rng: random.Random) -> None:
    broker.logs = {
        ("transactions", 0): [value("transactions", 10), *BAD_VALUES, value("transactions", 30)],
        ("reports", 0): [value("reports", 10), value("reports", 20)],
    }
    engine = Engine(kafka_source(stop_at_end=True), {}, 1, rng)
    while not engine.aborted:
        engine.activate()
    offsets = [row for _, row in engine.emitted]
    transactions = [("transactions/00000", offset) for offset in range(len(BAD_VALUES) + 2)]
    reports = [("reports/00000", offset) for offset in range(2)]
    assert offsets == [reports[0], *transactions[:-1], reports[1], transactions[-1]]


def test_a_silent_partition_is_not_waited_for_for_ever(broker: Broker, rng: random.Random) -> None:
    broker.logs = {
        ("transactions", 0): [value("transactions", time) for time in range(100)],
        ("reports", 0): [value("reports", 50)] * 3,
    }
    broker.silent = {("reports", 0)}
    source = kafka_source(max_hold_s=0.05)
    engine = Engine(source, {}, 1, rng)
    while len(engine.emitted) < 100:
        engine.activate()
    assert source.stats.hold_timeouts == 1
    assert source.stats.held_s >= 0.05


def test_a_partition_over_its_buffer_is_paused_and_resumed(
    broker: Broker, rng: random.Random
) -> None:
    broker.logs = {
        ("transactions", 0): [value("transactions", time) for time in range(3000)],
        ("reports", 0): [value("reports", 5000)],
    }
    broker.silent = {("reports", 0)}
    source = kafka_source(buffer_records=200)
    engine = Engine(source, {}, 1, rng)
    for _ in range(2000):
        engine.activate()
    reader = next(iter(source._readers.values()))
    assert 200 <= reader._merge.buffered < 300
    assert not engine.emitted
    broker.silent = set()
    while len(engine.emitted) < 3001:
        engine.activate()


@pytest.mark.parametrize(
    ("stored", "says"),
    [(2, "retention deleted 3 unread records"), (9, "recreated, or lost records")],
)
def test_an_offset_that_is_gone_stops_the_start(
    broker: Broker, rng: random.Random, stored: int, says: str
) -> None:
    broker.logs = {("transactions", 0): [None] * 8, ("reports", 0): []}
    broker.low["transactions", 0] = 5
    engine = Engine(kafka_source(), {"transactions/00000": stored, "reports/00000": 0}, 1, rng)
    with pytest.raises(StartupError, match=says) as caught:
        engine.activate()
    assert f"transactions/00000: the next record to read has offset {stored}" in str(caught.value)
    assert "only 5 to 8" in str(caught.value)


def test_a_gap_can_be_passed_over_and_is_counted(broker: Broker, rng: random.Random) -> None:
    broker.logs = {("transactions", 0): [None] * 8, ("reports", 0): []}
    broker.low["transactions", 0] = 5
    source = kafka_source(resume_past_retention=True)
    engine = Engine(source, {"transactions/00000": 2, "reports/00000": 0}, 1, rng)
    while len(engine.emitted) < 3:
        engine.activate()
    assert source.stats.skipped == {("transactions", 0): 3}


def test_a_fresh_partition_can_start_at_its_end(broker: Broker, rng: random.Random) -> None:
    broker.logs = {("transactions", 0): [value("transactions", 1)] * 8, ("reports", 0): []}
    engine = Engine(kafka_source(start="latest"), {}, 1, rng)
    engine.activate()
    broker.logs["transactions", 0].append(value("transactions", 2))
    while not engine.emitted:
        engine.activate()
    assert [row for _, row in engine.emitted] == [("transactions/00000", 8)]

    # A crash before the first snapshot: the next life begins where this one did, not at the end.
    broker.logs["transactions", 0].append(value("transactions", 3))
    again = Engine(kafka_source(start="latest"), {}, 1, rng)
    while len(again.emitted) < 2:
        again.activate()
    assert [row for _, row in again.emitted] == [("transactions/00000", at) for at in (8, 9)]


def test_at_most_once_every_life_starts_at_the_end(broker: Broker, rng: random.Random) -> None:
    broker.logs = {("transactions", 0): [value("transactions", 1)] * 8, ("reports", 0): []}
    resumed = {"transactions/00000": 3, "reports/00000": 0}
    engine = Engine(kafka_source(keep_offsets=False), resumed, 1, rng)
    engine.activate()
    broker.logs["transactions", 0].append(value("transactions", 2))
    while not engine.emitted:
        engine.activate()
    assert [row for _, row in engine.emitted] == [("transactions/00000", 8)]
    assert not broker.committed


def test_an_engine_that_breaks_the_contract_is_refused(broker: Broker, rng: random.Random) -> None:
    source = kafka_source()
    names = source.list_parts()
    parts = {name: source.build_part("step", name, None) for name in names}
    leader = parts[min(names)]
    leader.next_batch()
    leader.snapshot()
    with pytest.raises(SourceError, match="has not reached"):
        leader.next_batch()  # the others have not ended the epoch
    with pytest.raises(SourceError, match="after this worker began to read"):
        source.build_part("step", names[0], None)


def test_an_absent_topic_is_named(broker: Broker) -> None:
    del broker.logs["reports", 0], broker.logs["reports", 1]
    with pytest.raises(StartupError, match="topic 'reports' does not exist.*transactions"):
        kafka_source().list_parts()


def test_the_consumer_is_closed_with_the_last_part(broker: Broker) -> None:
    source = kafka_source()
    parts = [source.build_part("step", name, None) for name in source.list_parts()]
    consumer = next(iter(source._readers.values()))._consumer
    for part in parts[:-1]:
        part.close()
    assert not consumer.closed  # type: ignore[attr-defined]
    parts[-1].close()
    assert consumer.closed  # type: ignore[attr-defined]


# Rebuild

HOUR = 3_600_000
ANSWER_FROM = {("transactions", 0): 15, ("reports", 0): 12}
#: The first record to be answered is the report of 12:00:00.001; this is five hours before it.
SINCE = {("transactions", 0): 8, ("reports", 0): 7}


@pytest.fixture
def history(broker: Broker) -> Broker:
    """A record an hour for 20 hours in each topic; the group stopped after 15 and 12 of them."""
    broker.logs.clear()
    broker.committed = dict(ANSWER_FROM)
    for topic, after in (("transactions", 0), ("reports", 1)):
        broker.times[topic, 0] = [hour * HOUR + after for hour in range(20)]
        broker.logs[topic, 0] = [value(topic, time) for time in broker.times[topic, 0]]
    return broker


def rebuilding(**options: Any) -> KafkaSource:
    return kafka_source(start="rebuild", reach_ms=5 * HOUR, **options)


def until(engine: Engine, rows: int) -> None:
    for _ in range(10_000):
        if len(engine.emitted) >= rows:
            return
        engine.activate()
    pytest.fail(f"only {len(engine.emitted)} rows of {rows}")


def answered(engine: Engine) -> dict[Row, bool]:
    """Return which of the rows emitted are to be answered."""
    known = [each for batch in engine.batches for each in (batch.known.tolist())]
    rows = [row for _, row in engine.emitted]
    assert len(rows) == len(set(rows)) == len(known)
    return {row: not each for row, each in zip(rows, known, strict=True)}


def rows_from(begin: dict[tuple[str, int], int]) -> dict[Row, bool]:
    """Return the rows from `begin` on, and which of them are to be answered."""
    return {
        (f"{topic}/00000", at): at >= ANSWER_FROM[topic, 0]
        for (topic, _), first in begin.items()
        for at in range(first, 20)
    }


def test_a_rebuild_reads_again_as_far_as_the_windows_reach(
    history: Broker, rng: random.Random
) -> None:
    source = rebuilding()
    engine = Engine(source, {}, 1, rng)
    until(engine, 1)
    assert source.stats.rebuilding
    until(engine, 12 + 13)
    assert answered(engine) == rows_from(SINCE)
    assert not source.stats.rebuilding
    times = [at for batch in engine.batches for at in batch.stream_time.tolist()]
    assert times == sorted(times)


def test_events_older_than_their_timestamps_are_reached_back_from(
    history: Broker, rng: random.Random
) -> None:
    history.logs["reports", 0][12] = value("reports", 9 * HOUR + 1)  # came three hours late
    engine = Engine(rebuilding(), {}, 1, rng)
    until(engine, 15 + 16)
    assert answered(engine) == rows_from({("transactions", 0): 5, ("reports", 0): 4})


def test_what_another_worker_answers_first_is_reached_back_from_too(
    history: Broker, rng: random.Random
) -> None:
    engine = Engine(rebuilding(phase_keeping=False), {}, 1, rng, "transactions")
    until(engine, 12)
    assert answered(engine) == rows_from({("transactions", 0): SINCE["transactions", 0]})


def test_a_flow_that_waits_for_events_reaches_back_from_now(
    history: Broker, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    history.committed = dict.fromkeys(history.logs, 20)
    monkeypatch.setattr(module.time, "time", lambda: 22 * HOUR / 1000)
    source = rebuilding()
    engine = Engine(source, {}, 1, rng)
    until(engine, 3 + 3)
    assert set(answered(engine)) == {
        (f"{topic}/00000", at) for topic, _ in history.logs for at in (17, 18, 19)
    }
    assert not any(answered(engine).values())
    assert not source.stats.rebuilding


@pytest.mark.parametrize("rng", range(25), indirect=True)
def test_a_crash_in_mid_rebuild_answers_no_known_row(history: Broker, rng: random.Random) -> None:
    store: dict[str, Any] = {}
    kept: list[Row] = []
    epoch, told = 1, dict(ANSWER_FROM)
    to_answer: set[Row] = set()
    while len(kept) < 12 + 13:
        engine = Engine(rebuilding(batch_size=1), store, epoch, rng)
        for _ in range(rng.randint(1, 40)):
            engine.activate()
            assert all(history.committed[key] >= at for key, at in told.items())
        assert all(answer == rows_from(SINCE)[row] for row, answer in answered(engine).items())
        to_answer |= {row for row, answer in answered(engine).items() if answer}
        kept += engine.crash(store)
        epoch = engine.durable
    assert sorted(kept) == sorted(rows_from(SINCE))
    assert to_answer == {row for row, answer in rows_from(SINCE).items() if answer}


def test_an_unfinished_rebuild_is_not_given_up_unnoticed(
    history: Broker, rng: random.Random
) -> None:
    store = {"transactions/00000": ("rebuild", 9, 15), "reports/00000": 13}
    with pytest.raises(
        StartupError, match="transactions/00000: the windows are not rebuilt.* 6 rec"
    ):
        Engine(kafka_source(), store, 1, rng)
    engine = Engine(rebuilding(), store, 1, rng)
    until(engine, 11 + 7)
    assert answered(engine) == rows_from({("transactions", 0): 9, ("reports", 0): 13})


def test_a_rebuild_says_what_retention_has_taken_from_it(
    history: Broker, rng: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    history.low["transactions", 0] = 10
    engine = Engine(rebuilding(), {}, 1, rng)
    until(engine, 10 + 13)
    assert answered(engine) == rows_from(SINCE | {("transactions", 0): 10})
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("transactions/00000: records before offset 10 were deleted")
    assert "1970-01-01 07:00:00+00:00" in warnings[0]


def test_a_rebuild_ends_before_a_marker(history: Broker, rng: random.Random) -> None:
    history.committed = dict.fromkeys(history.logs, 20)
    history.marked = set(history.logs)
    source = kafka_source(start="rebuild", reach_ms=10**15)
    engine = Engine(source, {}, 1, rng)
    until(engine, 19 + 19)
    for _ in range(100):
        engine.activate()
    assert not source.stats.rebuilding
    assert not any(answered(engine).values())
    assert all(type(each) is int for each in list(engine.snapshots.values())[-1].values())


def test_a_group_that_has_read_nothing_begins_to_answer_at_the_end(
    history: Broker, rng: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    history.committed.clear()
    history.timestamp = 19 * HOUR
    engine = Engine(rebuilding(), {}, 1, rng)
    engine.activate()
    assert history.committed == {("transactions", 0): 20, ("reports", 0): 20}
    assert "the group 'g' has no offset of" in caplog.text
    history.logs["transactions", 0].append(value("transactions", 20 * HOUR))
    history.times["transactions", 0].append(20 * HOUR)
    again = Engine(rebuilding(), {}, 1, rng)  # the first one crashed at once
    until(again, 1)
    while not any(answered(again).values()):
        again.activate()
    rows = answered(again)
    assert [row for row, answer in rows.items() if answer] == [("transactions/00000", 20)]
    assert {at for _, at in rows} == set(range(15, 21))


def test_an_ordinary_start_pays_nothing_for_it(broker: Broker, rng: random.Random) -> None:
    engine = Engine(kafka_source(), {}, 1, rng)
    until(engine, 1)
    assert all(batch.known is None for batch in engine.batches)
