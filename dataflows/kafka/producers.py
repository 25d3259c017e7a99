"""Two ways to write a partition's records: as soon as can be, or in transactions.

A `Writer` belongs to one output partition and one worker thread. `IdempotentWriter` shares one
producer with the worker's other writers and looks at every delivery report: **at least once**.
`TransactionalWriter` has a producer of its own, whose ``transactional.id`` is the partition's for
ever: **exactly once** for readers of committed records, given the rules below.

1. *Fence first, then read.* A new owner calls `init_transactions`, which ends its predecessor's
   transaction and locks the predecessor out, and only then reads what was published since the
   snapshot (`dataflows.kafka.tail`). In the other order a zombie could publish between the two.
2. *Suppress by event id.* A record whose id is in that tail is not written again; each id as many
   times as it was published. What has not come again by the next snapshot is kept in it
   (`pending`): an epoch that is computed again need not end where the first one did, so its events
   may still lie ahead. What can no longer come is forgotten.
3. *Confirm before the snapshot.* `confirm` returns once everything written is committed, so a
   snapshot never claims what Kafka does not have. What is committed and not yet in a snapshot is
   what the next owner finds in the tail.
4. *Abort and write again, or stop.* The rows of the open transaction are kept until it is
   committed. Nothing that failed is passed over.

A transaction stays open for `transaction_s` at most, and is committed by a thread of its own
(`commit_transaction` blocks for two or three round trips); rows that come meanwhile wait in order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from dataflows.kafka.errors import DeliveryError
from dataflows.kafka.records import OutRecords
from dataflows.kafka.tail import Published, Tail

PRODUCER_DEFAULTS: Mapping[str, Any] = {
    "linger.ms": 1,
    # The bound of an outage that the flow waits out; then it stops, and a restart replays.
    "message.timeout.ms": 60_000,
    "queue.buffering.max.kbytes": 131_072,
    # After an outage, not up to 10 s more.
    "reconnect.backoff.max.ms": 2_000,
    # Of 5 min: a client that missed the news of a leader asks again.
    "topic.metadata.refresh.interval.ms": 10_000,
    # A broker that hangs keeps its connections: by default nobody asks another one for 30 s, and
    # a transaction for up to 90 s, which is longer than we wait.
    "request.timeout.ms": 10_000,
    "socket.timeout.ms": 10_000,
}
_GUARANTEES: Mapping[str, Any] = {"enable.idempotence": True, "acks": "all"}
_MARGIN_S = 5.0
#: A transaction outlives the messages in it, so that their time-out is what an operator sees.
_TRANSACTION_MARGIN_MS = 30_000
_MOST_ROWS_IN_TRANSACTION = 20_000
_MOST_ROWS_WAITING = 50_000
#: What the same records would meet again: they outlived the time-out, or are too large.
_HOPELESS = frozenset(
    {
        KafkaError._MSG_TIMED_OUT,
        KafkaError._TIMED_OUT,
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_RECORD,
    }
)
_TELL_AFTER_S = 2.0
_TELL_EVERY_S = 10.0
_UNKNOWN = -1e15  # a latency below this has no known start
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delivery:
    """Tell an observer what became of some records of one output topic.

    Attributes:
        topic: output topic.
        delivered: records acknowledged by the brokers; in a transaction: committed.
        latency_ms: float64, broker append of the cause → delivery report or commit, in
            milliseconds; only of delivered records whose ``append_time`` is known.
        suppressed: records that an earlier life had published, and which were not written again.
        too_large: records that the topic does not take, which went to the dead letters.
    """

    topic: str
    delivered: int
    latency_ms: npt.NDArray[np.float64]
    suppressed: int = 0
    too_large: int = 0


class Writer(Protocol):
    """Write the records of one output partition, in order. Called by one worker thread."""

    #: Where a new owner has to begin to read, to see what was written after the last `confirm`.
    next_offset: int

    @property
    def pending(self) -> bytes:
        """What was published before `next_offset`, its events yet to come; see `Published.pack`."""

    def write(self, batch: OutRecords) -> None:
        """Take the records; wait only if there is no room for more."""

    def settle(self) -> Delivery | None:
        """Account for what has been delivered since the last call, without waiting."""

    def begin_confirm(self) -> None:
        """Send what there is: several writers confirm faster if all begin first."""

    def confirm(self) -> None:
        """Wait, in bounded time, until everything taken is on the brokers for good."""

    def close(self) -> None:
        """Give up what is not confirmed: without a snapshot it is written again anyway."""


def timeout_s(config: Mapping[str, Any]) -> float:
    """Return after how long an unconfirmed record is an error, in seconds."""
    return float({**PRODUCER_DEFAULTS, **config}["message.timeout.ms"]) / 1000 + _MARGIN_S


# At least once


class _WorkerProducer:
    """The producer that all idempotent writers of one worker thread share."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = {**PRODUCER_DEFAULTS, **config, **_GUARANTEES}
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
        wait = _Wait("delivery", self.timeout_s)
        while True:
            remaining: int = self.producer.flush(wait.slice_s())
            self.raise_if_fatal()
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
                raise _not_taken(error.args[0], topic, partition, 1) from error
        self._producer.poll(0)

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
        deadline = time.monotonic() + self._shared.timeout_s
        while True:
            self._producer.poll(0.05)
            self._shared.raise_if_fatal()
            try:
                self._producer.produce(
                    self._topic, value, key, self._partition, self._reported, None, 0, headers
                )
                return
            except BufferError as error:
                if time.monotonic() > deadline:
                    raise _no_room(self._topic, self._partition, self._shared.timeout_s) from error
            except KafkaException as error:
                raise _not_taken(error.args[0], self._topic, self._partition, 1) from error

    def settle(self) -> Delivery | None:
        self._producer.poll(0)
        self._shared.raise_if_fatal()
        if self._failures:
            raise _not_taken(self._failures[0], self._topic, self._partition, len(self._failures))
        if not self._latencies_s:
            return None
        latency_ms = np.array(self._latencies_s) * 1000
        self._latencies_s.clear()
        latency_ms += self._take_sent(len(latency_ms))
        if self._last is not None:
            self.next_offset = (self._last.offset() or 0) + 1
            self._last = None
        return Delivery(self._topic, len(latency_ms), latency_ms[latency_ms > _UNKNOWN])

    def _take_sent(self, count: int) -> npt.NDArray[np.float64]:
        """Settle the next `count` rows sent; return ms from their append to their `produce`."""
        ages: list[npt.NDArray[np.float64]] = []
        while count:
            batch, now_ms = self._sent[0]
            start, stop = self._settled, min(self._settled + count, len(batch))
            ages.append(_ages_ms(batch.append_time[start:stop], now_ms))
            count -= stop - start
            self._settled = stop
            if stop == len(batch):
                self._sent.popleft()
                self._settled = 0
        return np.concatenate(ages)

    def begin_confirm(self) -> None:
        pass  # the producer sends at once, and `confirm` flushes it for all

    def confirm(self) -> None:
        outstanding = self._shared.flush()
        if self._failures:
            self.settle()
        if outstanding:
            raise _unconfirmed(outstanding, self._topic, self._partition, self._shared.timeout_s)

    def close(self) -> None:
        self._sent.clear()


# Exactly once


class TransactionalWriter:
    """Write records in short transactions, each once: exactly once for committed readers.

    Args:
        topic, partition: where to; nobody else may write there.
        config: librdkafka producer settings, over `PRODUCER_DEFAULTS`.
        transactional_id: the partition's, the same in every life and process.
        predecessor: the one that an earlier life had, if another; it is fenced too. Empty: none.
        tail: what reads the records published since the last snapshot; called once the
            predecessor is locked out.
        transaction_s: how long a transaction stays open at most, in seconds.

    Building one returns at once: taking over happens in the writer's own thread, records wait
    until then. Raises DeliveryError (StartupError for what stands against taking over) from any
    method, also for what happened in that thread.
    """

    def __init__(
        self,
        topic: str,
        partition: int,
        config: Mapping[str, Any],
        *,
        transactional_id: str,
        predecessor: str = "",
        tail: Callable[[], Tail],
        transaction_s: float,
    ) -> None:
        self.next_offset = -1
        self._topic = topic
        self._partition = partition
        self._id = transactional_id
        self._timeout_s = timeout_s(config)
        self._transaction_s = transaction_s
        self._read_tail = tail
        # Larger requests cost less, and the commit sends at once what still lingers.
        merged = {**PRODUCER_DEFAULTS, "linger.ms": 10, **config, **_GUARANTEES}
        merged.setdefault(
            "transaction.timeout.ms", int(merged["message.timeout.ms"]) + _TRANSACTION_MARGIN_MS
        )
        self._config = merged
        self._predecessor = predecessor if predecessor != transactional_id else ""
        self._producer = self._new_producer(transactional_id)
        # Everything below is guarded by the condition, except that `_open` is the thread's own
        # while `_busy` is set.
        self._changed = threading.Condition()
        self._busy = True  # taking over, or committing: rows wait
        self._open: list[OutRecords] = []  # rows of the open transaction
        self._open_rows = 0
        self._commit_at = float("inf")  # monotonic seconds
        self._waiting: deque[OutRecords] = deque()
        self._waiting_rows = 0
        self._published = Published()
        self._suppressed = 0
        self._committed: list[tuple[list[OutRecords], float]] = []  # with the wall clock, in ms
        self._failure: BaseException | None = None
        self._confirming = self._closed = False
        self._thread = threading.Thread(
            target=self._run, name=f"commit {topic}/{partition}", daemon=True
        )
        self._thread.start()

    def _new_producer(self, transactional_id: str) -> Producer:
        config = {**self._config, "transactional.id": transactional_id}
        return Producer(config, logger=logging.getLogger("librdkafka"))

    # The worker's side

    @property
    def pending(self) -> bytes:
        return self._published.pack()

    def write(self, batch: OutRecords) -> None:
        with self._changed:
            if not self._busy:
                self._raise_failure()
                self._send(batch)
                return
            self._waiting.append(batch)
            self._waiting_rows += len(batch)
            if self._waiting_rows > _MOST_ROWS_WAITING:
                self._wait_until(
                    lambda: self._waiting_rows <= _MOST_ROWS_WAITING // 2,
                    lambda: _no_room(self._topic, self._partition, self._timeout_s),
                )
            self._raise_failure()

    def settle(self) -> Delivery | None:
        if not self._committed and not self._suppressed and self._failure is None:
            return None  # a look without the lock: what comes now is seen next time
        with self._changed:
            self._raise_failure()
            committed, self._committed = self._committed, []
            suppressed, self._suppressed = self._suppressed, 0
        latencies = [
            _ages_ms(batch.append_time, now_ms)
            for batches, now_ms in committed
            for batch in batches
        ]
        latency_ms = np.concatenate(latencies) if latencies else np.empty(0)
        return Delivery(
            self._topic, len(latency_ms), latency_ms[latency_ms > _UNKNOWN], suppressed=suppressed
        )

    def confirm(self) -> None:
        with self._changed:
            self._confirming = True
            self._changed.notify_all()
            self._wait_until(
                lambda: not (self._busy or self._open or self._waiting),
                lambda: _unconfirmed(
                    self._open_rows + self._waiting_rows,
                    self._topic,
                    self._partition,
                    self._timeout_s,
                ),
            )
            self._confirming = False
            if self._published:
                self._published.forget_passed()

    def begin_confirm(self) -> None:
        with self._changed:
            self._commit_at = min(self._commit_at, time.monotonic())
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait_until(self, condition: Callable[[], bool], late: Callable[[], DeliveryError]) -> None:
        # The thread has bounds of its own, each after the other; this is for a bug or a hang.
        done = self._changed.wait_for(
            lambda: self._failure is not None or condition(), timeout=3 * self._timeout_s
        )
        self._raise_failure()
        if not done:
            raise late()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # Either side, holding the lock, while not `_busy`

    def _send(self, batch: OutRecords) -> None:
        if self._published:
            batch = self._unpublished(batch)
        if not len(batch):
            return
        if not self._open:
            self._begin()
            self._commit_at = time.monotonic() + self._transaction_s
            self._changed.notify_all()
        self._open.append(batch)
        self._open_rows += len(batch)
        if not self._produce(batch) or self._open_rows >= _MOST_ROWS_IN_TRANSACTION:
            self.begin_confirm()

    def _begin(self) -> None:
        try:
            self._producer.begin_transaction()
        except KafkaException as error:
            raise DeliveryError(self._explain(error.args[0], "could not go on")) from error

    def _unpublished(self, batch: OutRecords) -> OutRecords:
        """Return the rows that no earlier life has published; forget those that one has."""
        origins = batch.origins or [b""] * len(batch)
        keep = [
            row
            for row, (event_id, origin) in enumerate(zip(batch.event_ids, origins, strict=True))
            if not self._published.take(event_id, origin)
        ]
        self._suppressed += len(batch) - len(keep)
        return batch if len(keep) == len(batch) else batch.take(np.array(keep, dtype=np.intp))

    def _produce(self, batch: OutRecords) -> bool:
        """Hand rows to the producer; False: the transaction is broken, which its commit will say.

        Only the last row asks for its report, to learn the offset: a row that fails breaks the
        whole transaction.
        """
        produce, topic, partition = self._producer.produce, self._topic, self._partition
        last = len(batch) - 1
        rows = zip(batch.keys, batch.values, batch.each_headers(), strict=True)
        for row, (key, value, headers) in enumerate(rows):
            report = self._reported if row == last else None
            deadline: float | None = None
            while True:
                try:
                    produce(topic, value, key, partition, report, None, 0, headers)
                    break
                except BufferError as error:
                    deadline = deadline or time.monotonic() + self._timeout_s
                    if time.monotonic() > deadline:
                        raise _no_room(topic, partition, self._timeout_s) from error
                    self._producer.poll(0.05)
                except KafkaException as error:
                    if error.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE:
                        raise _not_taken(error.args[0], topic, partition, 1) from error
                    return False
        return True

    def _reported(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            # The transaction's marker takes the next offset.
            self.next_offset = max(self.next_offset, (message.offset() or 0) + 2)

    # The thread's side

    def _run(self) -> None:
        try:
            self._take_over()
            while self._await_commit():
                self._commit()
                with self._changed:
                    self._committed.append((self._open, time.time() * 1000))
                    self._open, self._open_rows = [], 0
                    self._become_ready()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _take_over(self) -> None:
        self._fence()
        tail = self._read_tail()
        with self._changed:
            self._published = tail.published
            self.next_offset = tail.next_offset
            self._become_ready()

    def _become_ready(self) -> None:
        self._busy = False
        self._commit_at = float("inf")
        while self._waiting:
            batch = self._waiting.popleft()
            self._waiting_rows -= len(batch)
            self._send(batch)
        self._changed.notify_all()

    def _await_commit(self) -> bool:
        """Wait until the open transaction is due, and make it this thread's; False: closed."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if self._open and (self._confirming or now >= self._commit_at):
                    self._busy = True
                    return True
                self._changed.wait(self._commit_at - now if self._open else None)
            return False

    def _fence(self) -> None:
        """Lock the predecessor out, and end its transaction."""
        if self._predecessor:
            former = self._new_producer(self._predecessor)
            self._persist(former.init_transactions, "could not be taken over")
        self._persist(self._producer.init_transactions, "could not be taken over")

    def _commit(self) -> None:
        deadline, pause_s = time.monotonic() + self._timeout_s, 0.1
        while True:
            try:
                self._persist(self._producer.commit_transaction, "could not be committed")
                return
            except KafkaException as error:
                reason = error.args[0]
            if reason.code() in _HOPELESS or time.monotonic() + pause_s > deadline:
                raise _not_taken(reason, self._topic, self._partition, self._open_rows)
            _logger.warning(
                "a transaction of %s/%d is aborted and written again: %s",
                self._topic,
                self._partition,
                reason.str(),
            )
            try:
                self._persist(self._producer.abort_transaction, "could not be aborted")
            except KafkaException as error:
                raise DeliveryError(self._explain(error.args[0], "could not be aborted")) from error
            time.sleep(pause_s)
            pause_s *= 2
            self._begin()
            for batch in self._open:
                self._produce(batch)

    def _persist(self, act: Callable[[float], None], failure: str) -> None:
        """Repeat what may be repeated; raise KafkaException for what wants an abort."""
        wait = _Wait(f"transactional.id {self._id!r}", self._timeout_s)
        while True:
            try:
                act(wait.slice_s())
                wait.is_over()
                return
            except KafkaException as error:
                reason = error.args[0]
                if reason.txn_requires_abort():
                    raise
                if reason.retriable() and not wait.is_too_long():
                    time.sleep(0.1)
                    continue
                raise DeliveryError(self._explain(reason, failure)) from error

    def _explain(self, reason: KafkaError, failure: str) -> str:
        why = f": {reason.str()} ({reason.name()}). "
        if reason.code() == KafkaError._TIMED_OUT:  # its words are for programmers
            why = f" within {self._timeout_s:g} s: the brokers do not answer. "
        what = f"transactional.id {self._id!r} {failure}{why}"
        if reason.code() in (KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH):
            return what + (
                "Another process writes this partition now; this one must stop. If none was meant "
                "to, see that only one flow runs with this GROUP_ID"
            )
        if reason.code() == KafkaError.INVALID_TRANSACTION_TIMEOUT:
            return what + (
                "MESSAGE_TIMEOUT_S and 30 s are more than the brokers' transaction.max.timeout.ms: "
                "lower the one or raise the other"
            )
        return what + (
            "See to the brokers (the transaction coordinator among them), then restart the flow; "
            "the open epoch is written again, once"
        )


class _Wait:
    """Wait for the brokers in slices, so that it can be said that and how long; in one thread."""

    _next_told = 0.0  # of all waits of the process: in an outage every partition waits

    def __init__(self, what: str, bound_s: float) -> None:
        self._what, self._bound_s = what, bound_s
        self._began = time.monotonic()
        self._told = False

    def slice_s(self) -> float:
        """Return how long to wait now, in seconds."""
        left_s = self._began + self._bound_s - time.monotonic()
        return max(0.1, min(left_s, _TELL_AFTER_S))

    def is_too_long(self) -> bool:
        """Tell whether the bound is reached; if not, say that the brokers are waited for."""
        now = time.monotonic()
        waited_s = now - self._began
        if waited_s >= self._bound_s:
            return True
        if waited_s >= _TELL_AFTER_S and now >= _Wait._next_told:
            _Wait._next_told = now + _TELL_EVERY_S
            self._told = True
            _logger.warning(
                "%s: the brokers have confirmed nothing for %.0f s; the flow waits, and stops if "
                "it takes %g s",
                self._what,
                waited_s,
                self._bound_s,
            )
        return False

    def is_over(self) -> None:
        """Say that it has been worth it, if the wait was told of."""
        if self._told:
            waited_s = time.monotonic() - self._began
            _logger.warning("%s: the brokers confirm again, after %.1f s", self._what, waited_s)


def _ages_ms(append_time: npt.NDArray[np.int64], now_ms: float) -> npt.NDArray[np.float64]:
    return np.where(append_time >= 0, now_ms - append_time, 2 * _UNKNOWN)


def _not_taken(error: KafkaError, topic: str, partition: int, count: int) -> DeliveryError:
    return DeliveryError(
        f"Kafka did not take {count} record(s) for {topic}/{partition}: {error.str()} "
        f"({error.name()}), after the producer's own retries. See to the brokers and the "
        "topic, then restart the flow; the open epoch is written again"
    )


def _no_room(topic: str, partition: int, timeout_s: float) -> DeliveryError:
    return DeliveryError(
        f"the producer's queue stayed full for {timeout_s:g} s while writing to "
        f"{topic}/{partition}: the brokers take nothing. See to them, then restart the flow; the "
        "open epoch is written again"
    )


def _unconfirmed(count: int, topic: str, partition: int, timeout_s: float) -> DeliveryError:
    return DeliveryError(
        f"{count} records are unconfirmed {timeout_s:g} s after the epoch's end "
        f"({topic}/{partition} among them). See to the brokers, then restart the flow; the open "
        "epoch is written again"
    )
