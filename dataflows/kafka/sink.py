"""Write records to Kafka, and know that they arrived.

A Bytewax sink partition is a partition of the output topic; records are split over them by key
with the JVM's partitioner. Each worker thread has one idempotent producer for all its sinks
(``acks=all``, librdkafka's own retries). Every delivery report is looked at. `snapshot` returns
only when everything written in the epoch is on the brokers, so a recovered flow never believes in
a record that Kafka does not have: **at least once**. After a crash the epoch that was open is
written again, with the same event ids.

Two sentences about exactly-once output, which will grow here: the sink's partition is the output
partition and its recovery state the offset after its last record, because that is where a new
owner has to start reading to find the event ids its predecessor published after the snapshot;
and the event id travels in a header, because it has to be compared without decoding the value.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import get_ident
from typing import Any
from weakref import WeakValueDictionary

import bytewax.operators as op
import numpy as np
import numpy.typing as npt
from bytewax.dataflow import Stream, operator
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from dataflows.kafka.dead_letter import DeadLetterSettings, fit, reason_headers, stub
from dataflows.kafka.partitioner import partitions_of
from dataflows.kafka.records import OutRecords
from dataflows.kafka.topics import STARTUP_TIMEOUT_S, part_name, partition_counts

PREDICTION_TOO_LARGE = "prediction_too_large"

PRODUCER_DEFAULTS: Mapping[str, Any] = {
    "linger.ms": 1,
    # The bound of an outage that the flow waits out; then it stops, and a restart replays.
    "message.timeout.ms": 60_000,
    "queue.buffering.max.kbytes": 131_072,
}
_GUARANTEES: Mapping[str, Any] = {"enable.idempotence": True, "acks": "all"}
_FLUSH_MARGIN_S = 5.0
_logger = logging.getLogger(__name__)
_UNKNOWN = -1e15  # a latency below this has no known start


class DeliveryError(RuntimeError):
    """Say which records Kafka did not take, and what to do."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """Tell an observer what became of some records of one output topic.

    Attributes:
        topic: output topic.
        delivered: records acknowledged by the brokers.
        rejected: records too large for the topic, sent to the dead-letter topic instead.
        latency_ms: float64, broker append of the cause → delivery report, in milliseconds; only
            of delivered records whose ``append_time`` is known.
    """

    topic: str
    delivered: int
    rejected: int
    latency_ms: npt.NDArray[np.float64]


class _WorkerProducer:
    """The producer that all sinks of one worker thread share. Not for use by two threads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = {**PRODUCER_DEFAULTS, **config, **_GUARANTEES}
        self.timeout_s = float(self.config["message.timeout.ms"]) / 1000 + _FLUSH_MARGIN_S
        self._fatal: KafkaError | None = None
        self.producer = Producer(
            {**self.config, "error_cb": self._on_error}, logger=logging.getLogger("librdkafka")
        )

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._fatal = error

    def raise_if_fatal(self) -> None:
        if self._fatal is not None:
            raise DeliveryError(
                f"the Kafka producer cannot go on: {self._fatal.str()} ({self._fatal.name()}). "
                "Restart the flow; the open epoch is written again"
            )

    def flush(self) -> int:
        """Wait, in bounded time, until nothing is outstanding; return how many still are."""
        remaining: int = self.producer.flush(self.timeout_s)
        self.raise_if_fatal()
        return remaining


_producers: WeakValueDictionary[tuple[int, tuple[tuple[str, str], ...]], _WorkerProducer] = (
    WeakValueDictionary()
)


def _producer_of_this_thread(config: Mapping[str, Any]) -> _WorkerProducer:
    key = (get_ident(), tuple(sorted((name, str(value)) for name, value in config.items())))
    found = _producers.get(key)
    if found is None or found._fatal is not None:
        found = _producers[key] = _WorkerProducer(config)
    return found


def poll_producers() -> None:
    """Serve the delivery reports that have come for this thread's sinks, without waiting.

    A latency counts until its report is served, so somebody has to do it also when nothing is
    being written: pass this to `KafkaSource` as `between_batches`.
    """
    thread = get_ident()
    for (owner, _), shared in list(_producers.items()):
        if owner == thread:
            shared.producer.poll(0)


class KafkaSink(FixedPartitionedSink[OutRecords, int]):
    """Write `OutRecords` to the partitions of one topic, at least once. Use it with `output`.

    Args:
        topic: output topic; it must exist.
        config: librdkafka producer settings, at least ``bootstrap.servers``; they go over
            `PRODUCER_DEFAULTS`, except ``acks`` and ``enable.idempotence``, which are fixed.
        dead_letters: where records go that are too large for the topic. None: they are an error,
            except dead letters, which are written as a `stub`.
        observe: called with a `Delivery` for each batch of delivery reports, on the worker thread.
        startup_timeout_s: bound of the look-up of the topic.

    Raises:
        StartupError: (when the flow starts) No broker answered, or the topic does not exist.
        DeliveryError: (when the flow runs) Kafka refused records, or did not confirm them within
            ``message.timeout.ms``, after librdkafka's own retries.
    """

    def __init__(
        self,
        topic: str,
        config: Mapping[str, Any],
        *,
        dead_letters: DeadLetterSettings | None = None,
        observe: Callable[[Delivery], None] | None = None,
        startup_timeout_s: float = STARTUP_TIMEOUT_S,
    ) -> None:
        self.topic = topic
        self._config = dict(config)
        self._dead_letters = dead_letters
        self._observe = observe
        self._startup_timeout_s = startup_timeout_s
        self._counts: dict[str, int] = {}
        self._shared: list[_WorkerProducer] = []  # keeps the producer alive between partitions

    def __repr__(self) -> str:
        # Bytewax writes step reprs to files and to its API: no configuration, it holds secrets.
        return f"KafkaSink({self.topic!r})"

    def _count(self, topic: str) -> int:
        if not self._counts:
            topics = [self.topic]
            if self._dead_letters is not None:
                topics.append(self._dead_letters.topic)
            shared = _producer_of_this_thread(self._config)
            self._shared.append(shared)
            self._counts = partition_counts(
                shared.producer, shared.config, topics, timeout_s=self._startup_timeout_s
            )
        return self._counts[topic]

    @property
    def partitions(self) -> int:
        """Number of partitions of the topic, looked up once."""
        return self._count(self.topic)

    def list_parts(self) -> list[str]:
        """Name the topic's partitions."""
        partitions_of([b"warm up the compiled hash"], 1)
        return [part_name(self.topic, partition) for partition in range(self.partitions)]

    def part_fn(self, item_key: str) -> int:
        """Route an item of `split`, whose key is the decimal partition number."""
        return int(item_key)

    def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> _SinkPartition:
        """Build the writer of one partition; `resume_state` is the offset after its last record."""
        dead_letters = self._dead_letters
        return _SinkPartition(
            self.topic,
            int(for_part.rpartition("/")[2]),
            _producer_of_this_thread(self._config),
            -1 if resume_state is None else resume_state,
            dead_letters,
            0 if dead_letters is None else self._count(dead_letters.topic),
            self._observe,
        )

    def split(self, batches: list[OutRecords]) -> list[tuple[str, OutRecords]]:
        """Split batches by output partition; records keep their order within each.

        A record without a key goes to the partition of its event id, so that a replay puts it
        where it was before.
        """
        items: list[tuple[str, OutRecords]] = []
        count = self.partitions
        for batch in batches:
            if not len(batch):
                continue
            if count == 1:
                items.append(("0", batch))
                continue
            routed = [
                event_id if key is None else key
                for key, event_id in zip(batch.keys, batch.event_ids, strict=True)
            ]
            partitions = partitions_of(routed, count)
            order = np.argsort(partitions, kind="stable")
            present, starts = np.unique(partitions[order], return_index=True)
            if len(present) == 1:
                items.append((str(present[0]), batch))
                continue
            for partition, rows in zip(present, np.split(order, starts[1:]), strict=True):
                items.append((str(partition), batch.take(rows)))
        return items


@operator
def output(step_id: str, up: Stream[OutRecords], sink: KafkaSink) -> None:
    """Write a stream of `OutRecords` to Kafka, split over the topic's partitions by key."""
    split = op.flat_map_batch("split", up, sink.split)
    return op.output("write", split, sink)


class _SinkPartition(StatefulSinkPartition[OutRecords, int]):
    def __init__(
        self,
        topic: str,
        partition: int,
        shared: _WorkerProducer,
        next_offset: int,
        dead_letters: DeadLetterSettings | None,
        dead_letter_partitions: int,
        observe: Callable[[Delivery], None] | None,
    ) -> None:
        self._topic = topic
        self._partition = partition
        self._shared = shared
        self._producer = shared.producer
        self._next_offset = next_offset
        self._dead_letters = dead_letters
        self._dead_letter_partitions = dead_letter_partitions
        self._observe = observe
        # Delivery reports of a partition come in the order of `produce`, so that a report needs
        # no handle: the n-th report since the last `_settle` is that of the n-th row of `_sent`.
        self._sent: deque[tuple[OutRecords, float]] = deque()  # with the wall clock, in ms
        self._settled = 0  # rows of the first batch in `_sent` that are already accounted for
        self._latencies_s: list[float] = []
        self._last: Message | None = None
        self._failures: list[tuple[KafkaError, bytes | None, bytes | None]] = []
        self._too_large: list[tuple[OutRecords, int]] = []
        self._stubs: list[tuple[int, OutRecords]] = []  # with the dead-letter partition
        self._dead_letter_failure: KafkaError | None = None
        self._rejected = 0

    # One call per record from here to `_reported`: nothing that can wait is done here.

    def write_batch(self, values: list[OutRecords]) -> None:
        """Hand the records to the producer, and look at the reports that have come."""
        for batch in values:
            self._write(batch)
        self._producer.poll(0)
        self._settle()

    def _write(self, batch: OutRecords) -> None:
        produce, topic, partition, report = (
            self._producer.produce,
            self._topic,
            self._partition,
            self._reported,
        )
        now_ms = time.time() * 1000
        plain = batch.origins is None and batch.headers is None
        refused: list[int] = []
        for row, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
            headers: Any = [("event_id", batch.event_ids[row])] if plain else batch.headers_of(row)
            try:
                produce(topic, value, key, partition, report, None, 0, headers)
            except BufferError:
                if not self._produce_when_there_is_room(key, value, headers):
                    refused.append(row)
            except KafkaException as error:
                _raise_unless_too_large(error.args[0], topic, partition)
                refused.append(row)
        sent = batch.take(np.delete(np.arange(len(batch)), refused)) if refused else batch
        if len(sent):
            self._sent.append((sent, now_ms))
        for row in refused:
            self._reject(batch, row)

    def _reported(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self._latencies_s.append(message.latency() or 0.0)
            self._last = message
        else:
            self._latencies_s.append(np.nan)
            self._failures.append((error, message.key(), message.value()))

    def _produce_when_there_is_room(
        self, key: bytes | None, value: bytes | None, headers: Any
    ) -> bool:
        deadline = time.monotonic() + self._shared.timeout_s
        while True:
            self._producer.poll(0.05)
            self._shared.raise_if_fatal()
            try:
                self._producer.produce(
                    self._topic, value, key, self._partition, self._reported, None, 0, headers
                )
            except BufferError as error:
                if time.monotonic() > deadline:
                    raise DeliveryError(
                        f"the producer's queue stayed full for {self._shared.timeout_s:g} s while "
                        f"writing to {self._topic}/{self._partition}: the brokers take nothing. "
                        "See to them, then restart the flow; the open epoch is written again"
                    ) from error
            except KafkaException as error:
                _raise_unless_too_large(error.args[0], self._topic, self._partition)
                return False
            else:
                return True

    def _settle(self) -> None:
        """Account for the reports that have come; note the rows the broker found too large."""
        if self._failures:
            self._note_failures()
        if self._latencies_s:
            latency_ms = np.array(self._latencies_s) * 1000
            self._latencies_s.clear()
            latency_ms += self._take_sent(len(latency_ms))
            if self._last is not None:
                self._next_offset = (self._last.offset() or 0) + 1
                self._last = None
            delivered = int(np.count_nonzero(~np.isnan(latency_ms)))
            self._tell(delivered, latency_ms[latency_ms > _UNKNOWN])
        self._shared.raise_if_fatal()
        if self._dead_letter_failure is not None:
            raise DeliveryError(
                f"Kafka did not take a dead letter of {self._topic}/{self._partition}: "
                f"{self._dead_letter_failure.str()}. See to the dead-letter topic, then restart"
            )

    def _tell(self, delivered: int, latency_ms: npt.NDArray[np.float64]) -> None:
        rejected, self._rejected = self._rejected, 0
        if self._observe is not None and (delivered or rejected):
            self._observe(Delivery(self._topic, delivered, rejected, latency_ms))

    def _take_sent(self, count: int) -> npt.NDArray[np.float64]:
        """Settle the next `count` rows sent; return ms from their append to their `produce`."""
        ages: list[npt.NDArray[np.float64]] = []
        while count:
            batch, now_ms = self._sent[0]
            start, stop = self._settled, min(self._settled + count, len(batch))
            appended = batch.append_time[start:stop]
            ages.append(np.where(appended >= 0, now_ms - appended, 2 * _UNKNOWN))
            count -= stop - start
            self._settled = stop
            if stop == len(batch):
                self._sent.popleft()
                self._settled = 0
        return np.concatenate(ages)

    def _note_failures(self) -> None:
        failures, self._failures = self._failures, []
        for error, key, value in failures:
            _raise_unless_too_large(error, self._topic, self._partition, len(failures))
            self._too_large.append(self._find_sent(key, value))

    def _find_sent(self, key: bytes | None, value: bytes | None) -> tuple[OutRecords, int]:
        # By content, not by position: after a failure the order of reports is not to be trusted.
        for position, (batch, _) in enumerate(self._sent):
            for row in range(0 if position else self._settled, len(batch)):
                noted = any(batch is other and row == known for other, known in self._too_large)
                if not noted and batch.values[row] == value and batch.keys[row] == key:
                    return batch, row
        raise DeliveryError(
            f"Kafka found a record of {len(value or b'')} bytes too large for "
            f"{self._topic}/{self._partition}, and it is not among those sent"
        )

    def _reject(self, batch: OutRecords, row: int) -> None:
        """Send a record that is too large to the dead-letter topic; of a dead letter, its stub."""
        size = len(batch.values[row] or b"")
        where = self._dead_letters
        if where is None:
            least = stub(batch, row)
            if least is None:
                raise DeliveryError(
                    f"a record of {size} bytes is too large for {self._topic}/{self._partition} "
                    "and the sink has no dead-letter topic: give it one, or raise "
                    "message.max.bytes here and on the topic"
                )
            _log_stub(self._topic, least)
            self._write(least)
            return
        event_id, key = batch.event_ids[row], batch.keys[row]
        routed = partitions_of([event_id if key is None else key], self._dead_letter_partitions)
        own = [] if batch.headers is None else batch.headers[row]
        key, value, headers = fit(key, batch.values[row], own, where.max_value_bytes)
        letter = batch.take(np.array([row]))
        letter.keys, letter.values = [key], [value]
        letter.headers = [
            headers
            + reason_headers(
                PREDICTION_TOO_LARGE,
                f"{size} bytes are more than {self._topic} takes",
                self._topic,
                self._partition,
                -1,
                int(batch.append_time[row]),
            )
        ]
        self._send_dead_letter(where.topic, int(routed[0]), letter)
        self._rejected += 1

    def _send_dead_letter(self, topic: str, partition: int, letter: OutRecords) -> None:
        def reported(error: KafkaError | None, message: Message | None) -> None:
            del message
            if error is None:
                return
            least = stub(letter, 0) if _is_too_large(error) else None
            if least is None:
                self._dead_letter_failure = error
            else:
                self._stubs.append((partition, least))

        headers: Any = letter.headers_of(0)
        try:
            self._producer.produce(
                topic, letter.values[0], letter.keys[0], partition, reported, None, 0, headers
            )
        except KafkaException as error:
            reported(error.args[0], None)

    def snapshot(self) -> int:
        """Return the offset after the last record delivered (-1: none yet), once all are.

        Raises:
            DeliveryError: Something is still outstanding after ``message.timeout.ms`` and 5 s.
        """
        self._flush()
        too_large, self._too_large = self._too_large, []
        for batch, row in too_large:
            # The broker judges whole batches: only alone does a record show whether it is itself
            # too large.
            self._write(batch.take(np.array([row])))
            self._flush()
            while self._too_large:
                self._reject(*self._too_large.pop())
                self._flush()
        if self._rejected:
            self._flush()
            self._tell(0, np.empty(0))
        return self._next_offset

    def _flush(self) -> None:
        outstanding = self._shared.flush()
        if self._stubs and self._dead_letters is not None:
            stubs, self._stubs = self._stubs, []
            for partition, letter in stubs:
                _log_stub(self._dead_letters.topic, letter)
                self._send_dead_letter(self._dead_letters.topic, partition, letter)
            outstanding = self._shared.flush()
        self._settle()
        if outstanding or self._sent:
            raise DeliveryError(
                f"{outstanding} records are unconfirmed {self._shared.timeout_s:g} s after the "
                f"epoch's end ({self._topic}/{self._partition} among them). See to the brokers, "
                "then restart the flow; the open epoch is written again"
            )

    def close(self) -> None:
        """Drop what is outstanding: without a snapshot the epoch is written again anyway."""
        self._sent.clear()


def _log_stub(topic: str, letter: OutRecords) -> None:
    _logger.error(
        "%s does not take a dead letter because it is too large: only its reason is kept, event id "
        "%s. Raise max.message.bytes of the topic to keep the record too",
        topic,
        letter.event_ids[0].decode("utf-8", "backslashreplace"),
    )


def _is_too_large(error: KafkaError) -> bool:
    return error.code() in (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE)


def _raise_unless_too_large(error: KafkaError, topic: str, partition: int, count: int = 1) -> None:
    if not _is_too_large(error):
        raise DeliveryError(
            f"Kafka did not take {count} record(s) for {topic}/{partition}: {error.str()} "
            f"({error.name()}), after the producer's own retries. See to the brokers and the "
            "topic, then restart the flow; the open epoch is written again"
        )
