"""Write a partition's records as soon as can be: **at least once**.

A worker's writers share one producer, and every delivery report is looked at.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from threading import get_ident
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from dataflows.kafka.errors import DeliveryError
from dataflows.kafka.records import OutRecords
from dataflows.kafka.writer import (
    GUARANTEES,
    PRODUCER_DEFAULTS,
    UNKNOWN,
    Delivery,
    Wait,
    ages_ms,
    no_room,
    not_taken,
    timeout_s,
    unconfirmed,
)


class _WorkerProducer:
    """The producer that all idempotent writers of one worker thread share."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = {**PRODUCER_DEFAULTS, **config, **GUARANTEES}
        self.timeout_s = timeout_s(config)
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
        wait = Wait("delivery", self.timeout_s)
        before = len(self.producer)
        while True:
            remaining: int = self.producer.flush(wait.slice_s())
            self.raise_if_fatal()
            if remaining < before:
                wait.goes_on()
            before = remaining
            if not remaining:
                wait.is_over()
                return 0
            if wait.is_too_long():
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


class IdempotentWriter:
    """Write records as they come: at least once.

    Args:
        topic, partition: where to.
        config: librdkafka producer settings, over `PRODUCER_DEFAULTS`.
        next_offset: the offset after the last record of an earlier life.

    Raises DeliveryError from any method.
    """

    def __init__(
        self, topic: str, partition: int, config: Mapping[str, Any], next_offset: int
    ) -> None:
        self.next_offset = next_offset
        self._topic = topic
        self._partition = partition
        self._shared = _producer_of_this_thread(config)
        self._producer = self._shared.producer
        # Delivery reports of a partition come in the order of `produce`, so that a report needs
        # no handle: the n-th report since the last `settle` is that of the n-th row of `_sent`.
        self._sent: deque[tuple[OutRecords, float]] = deque()  # with the wall clock, in ms
        self._settled = 0  # rows of the first batch in `_sent` that are already accounted for
        self._latencies_s: list[float] = []
        self._last: Message | None = None
        self._failures: list[KafkaError] = []

    @property
    def pending(self) -> bytes:
        return b""

    @property
    def outstanding(self) -> int:
        return sum(len(batch) for batch, _ in self._sent) - self._settled - len(self._latencies_s)

    # One call per record from here to `_reported`: nothing that can wait is done here.

    def write(self, batch: OutRecords) -> None:
        produce, topic, partition, report = (
            self._producer.produce,
            self._topic,
            self._partition,
            self._reported,
        )
        now_ms = time.time() * 1000
        self._sent.append((batch, now_ms))
        rows = zip(batch.keys, batch.values, batch.each_headers(), strict=True)
        for key, value, headers in rows:
            try:
                produce(topic, value, key, partition, report, None, 0, headers)
            except BufferError:
                self._produce_when_there_is_room(key, value, headers)
            except KafkaException as error:
                raise not_taken(error.args[0], topic, partition, 1) from error

    def _reported(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self._latencies_s.append(message.latency() or 0.0)
            self._last = message
        else:
            self._latencies_s.append(np.nan)
            self._failures.append(error)

    def _produce_when_there_is_room(
        self, key: bytes | None, value: bytes | None, headers: Any
    ) -> None:
        wait = Wait("the producer's queue is full", self._shared.timeout_s)
        while True:
            self._producer.poll(0.05)
            self._shared.raise_if_fatal()
            try:
                self._producer.produce(
                    self._topic, value, key, self._partition, self._reported, None, 0, headers
                )
                wait.is_over()
                return
            except BufferError as error:
                if wait.is_too_long():
                    raise no_room(self._topic, self._partition, self._shared.timeout_s) from error
            except KafkaException as error:
                raise not_taken(error.args[0], self._topic, self._partition, 1) from error

    def poll(self) -> None:
        self._producer.poll(0)

    def settle(self) -> Delivery | None:
        self._producer.poll(0)
        self._shared.raise_if_fatal()
        if self._failures:
            raise not_taken(self._failures[0], self._topic, self._partition, len(self._failures))
        if not self._latencies_s:
            return None
        latency_ms = np.array(self._latencies_s) * 1000
        self._latencies_s.clear()
        before_ms, shed = self._take_sent(len(latency_ms))
        latency_ms += before_ms
        if self._last is not None:
            offset, self._last = self._last.offset(), None
            if offset is not None and offset >= 0:  # a retry of what the broker has does not tell
                self.next_offset = offset + 1
        known = latency_ms[latency_ms > UNKNOWN]
        return Delivery(self._topic, len(latency_ms), known, shed=shed)

    def _take_sent(self, count: int) -> tuple[npt.NDArray[np.float64], int]:
        """Settle the next `count` rows sent.

        Returns ms from their append to their `produce`, and how many of them are of shed events.
        """
        shed = 0
        appended: list[npt.NDArray[np.int64]] = []
        sent_ms: list[float] = []
        while count:
            batch, now_ms = self._sent[0]
            start, stop = self._settled, min(self._settled + count, len(batch))
            appended.append(batch.append_time[start:stop])
            sent_ms.append(now_ms)
            shed += batch.count_shed(start, stop)
            count -= stop - start
            self._settled = stop
            if stop == len(batch):
                self._sent.popleft()
                self._settled = 0
        each_ms = np.repeat(sent_ms, [len(part) for part in appended])
        return ages_ms(np.concatenate(appended), each_ms), shed

    def begin_confirm(self) -> None:
        pass  # the producer sends at once, and `confirm` flushes it for all

    def confirm(self) -> None:
        outstanding = self._shared.flush()
        if self._failures:
            self.settle()
        if outstanding:
            raise unconfirmed(outstanding, self._topic, self._partition, self._shared.timeout_s)

    def close(self) -> None:
        self._sent.clear()
