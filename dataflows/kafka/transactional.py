"""Write a partition's records in short transactions: **exactly once** for committed readers.

A `TransactionalWriter` has a producer of its own, whose ``transactional.id`` is the partition's for
ever. Its rules:

1. *Fence first, then read.* A new owner calls `init_transactions`, which ends its predecessor's
   transaction and locks the predecessor out, and only then reads what was published since the
   snapshot (`dataflows.kafka.tail`). In the other order a zombie could publish between the two.
2. *Suppress by event id and origin.* A record that is in that tail is not written again; each as
   many times as it was published. What has not come again by the next snapshot is kept in it
   (`pending`): an epoch that is computed again need not end where the first one did, so its events
   may still lie ahead. What can no longer come is forgotten.
3. *Confirm before the snapshot.* `confirm` returns once everything written is committed, so a
   snapshot never claims what Kafka does not have. What is committed and not yet in a snapshot is
   what the next owner finds in the tail.
4. *Abort and write again, or stop.* The rows of the open transaction are kept until it is
   committed. Nothing that failed is passed over: what `produce` does not take (librdkafka refuses
   rows of a topic that it has come to think does not exist, or may not be written) is in no
   transaction, and would not make its commit fail.

A transaction stays open for `transaction_s` at most, and is committed by a thread of its own
(`commit_transaction` blocks for two or three round trips); rows that come meanwhile wait in order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from dataflows.kafka import access
from dataflows.kafka.errors import DeliveryError
from dataflows.kafka.records import OutRecords
from dataflows.kafka.tail import Published, Tail
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
_logger = logging.getLogger(__name__)


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
        merged = {**PRODUCER_DEFAULTS, "linger.ms": 10, **config, **GUARANTEES}
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
        self._refused: KafkaError | None = None  # why `produce` did not take all of them
        self._reports = 0  # of batches whose last row was delivered
        self._commit_at = float("inf")  # monotonic seconds
        self._waiting: deque[OutRecords] = deque()
        self._waiting_rows = 0
        self._published = Published()
        self._suppressed = self._suppressed_shed = 0
        self._aborts = 0
        self._compared = 0
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

    @property
    def outstanding(self) -> int:
        return self._open_rows + self._waiting_rows

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
                    lambda: no_room(self._topic, self._partition, self._timeout_s),
                )
            self._raise_failure()

    def poll(self) -> None:
        pass  # its thread looks for itself

    def settle(self) -> Delivery | None:
        if not (self._committed or self._suppressed or self._compared) and self._failure is None:
            return None  # a look without the lock: what comes now is seen next time
        with self._changed:
            self._raise_failure()
            committed, self._committed = self._committed, []
            suppressed, self._suppressed = self._suppressed, 0
            shed, self._suppressed_shed = self._suppressed_shed, 0
            aborts, self._aborts = self._aborts, 0
            compared, self._compared = self._compared, 0
        latencies = [
            ages_ms(batch.append_time, now_ms) for batches, now_ms in committed for batch in batches
        ]
        latency_ms = np.concatenate(latencies) if latencies else np.empty(0)
        shed += sum(batch.count_shed() for batches, _ in committed for batch in batches)
        return Delivery(
            self._topic,
            len(latency_ms),
            latency_ms[latency_ms > UNKNOWN],
            suppressed=suppressed,
            commits=len(committed),
            aborts=aborts,
            compared=compared,
            shed=shed,
        )

    def confirm(self) -> None:
        with self._changed:
            self._confirming = True
            self._changed.notify_all()
            self._wait_until(
                lambda: not (self._busy or self._open or self._waiting),
                lambda: unconfirmed(
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
        self._produce(batch)
        if self._refused is not None or self._open_rows >= _MOST_ROWS_IN_TRANSACTION:
            self.begin_confirm()

    def _begin(self) -> None:
        self._refused, self._reports = None, 0
        try:
            self._producer.begin_transaction()
        except KafkaException as error:
            raise DeliveryError(self._explain(error.args[0], "could not go on")) from error

    def _unpublished(self, batch: OutRecords) -> OutRecords:
        """Return the rows that no earlier life has published; forget those that one has."""
        origins = batch.origins or [b""] * len(batch)
        keep = [
            row
            for row, (event_id, key, origin) in enumerate(
                zip(batch.event_ids, batch.keys, origins, strict=True)
            )
            if not self._published.take(event_id, key, origin)
        ]
        if len(keep) == len(batch):
            return batch
        kept = batch.take(np.array(keep, dtype=np.intp))
        self._suppressed += len(batch) - len(keep)
        self._suppressed_shed += batch.count_shed() - kept.count_shed()
        return kept

    def _produce(self, batch: OutRecords) -> None:
        """Hand rows to the producer, unless some of the transaction were refused: see `_commit`.

        Only the last row asks for its report, to learn the offset: a row that fails once it is
        taken breaks the whole transaction.
        """
        if self._refused is not None:
            return
        produce, topic, partition = self._producer.produce, self._topic, self._partition
        last = len(batch) - 1
        rows = zip(batch.keys, batch.values, batch.each_headers(), strict=True)
        for row, (key, value, headers) in enumerate(rows):
            report = self._reported if row == last else None
            wait: Wait | None = None
            while True:
                try:
                    produce(topic, value, key, partition, report, None, 0, headers)
                    if wait is not None:
                        wait.is_over()
                    break
                except BufferError as error:
                    wait = wait or Wait("the producer's queue is full", self._timeout_s)
                    if wait.is_too_long():
                        raise no_room(topic, partition, self._timeout_s) from error
                    self._producer.poll(0.05)
                except KafkaException as error:
                    if wait is not None:
                        wait.is_over()
                    self._refused = error.args[0]
                    return

    def _reported(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self._reports += 1
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
            self._compared = len(tail.published)
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
            reason = self._refused
            if reason is None:
                try:
                    self._persist(self._producer.commit_transaction, "could not be committed")
                except KafkaException as error:
                    reason = error.args[0]
            if reason is None:
                self._check_reports()
                return
            if reason.code() in _HOPELESS or time.monotonic() + pause_s > deadline:
                raise not_taken(reason, self._topic, self._partition, self._open_rows)
            _logger.warning(
                "a transaction of %s/%d is aborted and written again: %s",
                self._topic,
                self._partition,
                reason.str(),
            )
            with self._changed:
                self._aborts += 1
            why = f"failed ({reason.str()}). {access.not_allowed(reason)}"
            try:
                self._persist(self._producer.abort_transaction, f"{why}It could not be aborted")
            except KafkaException as error:
                raise DeliveryError(
                    self._explain(error.args[0], f"{why}It could not be aborted")
                ) from error
            time.sleep(pause_s)
            pause_s *= 2
            self._begin()
            for batch in self._open:
                self._produce(batch)

    def _check_reports(self) -> None:
        """Make sure that what was committed is what was written; a commit serves all reports."""
        if self._reports != len(self._open):
            raise DeliveryError(
                f"{self._topic}/{self._partition}: a transaction of {len(self._open)} batches was "
                f"committed with {self._reports} of them. This should not happen; restart the "
                "flow: the open epoch is compared with what is there, and written"
            )

    def _persist(self, act: Callable[[float], None], failure: str) -> None:
        """Repeat what may be repeated; raise KafkaException for what wants an abort."""
        wait = Wait(f"transactional.id {self._id!r}", self._timeout_s)
        while True:
            try:
                act(wait.slice_s())
                wait.is_over()
                return
            except KafkaException as error:
                reason = error.args[0]
                if reason.txn_requires_abort():
                    if reason.code() not in _HOPELESS:
                        wait.is_over()
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
            f"{access.not_allowed(reason)}See to the brokers (the transaction coordinator among "
            "them), then restart the flow; the open epoch is written again, once"
        )
