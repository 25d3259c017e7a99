"""What writes the records of one output partition, and what all kinds of writers share.

The kinds: `dataflows.kafka.idempotent` (at least once) and `dataflows.kafka.transactional` (exactly
once).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from confluent_kafka import KafkaError

from dataflows.kafka import access
from dataflows.kafka.errors import DeliveryError
from dataflows.kafka.records import OutRecords

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
GUARANTEES: Mapping[str, Any] = {
    "enable.idempotence": True,
    "acks": "all",
    "delivery.report.only.error": False,
}
_MARGIN_S = 5.0
_TELL_AFTER_S = 2.0
_TELL_EVERY_S = 10.0
UNKNOWN = -1e15  # a latency below this has no known start
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
        shed: how many of the delivered and suppressed say that their event is not answered.
        too_large: records that the topic does not take, which went to the dead letters.
        commits: transactions committed.
        aborts: transactions aborted, to be written again.
        write_s: float64, seconds that it took the worker to hand each micro-batch over.
        compared: records found behind the last snapshot, when the partition was taken over.
    """

    topic: str
    delivered: int
    latency_ms: npt.NDArray[np.float64]
    suppressed: int = 0
    too_large: int = 0
    commits: int = 0
    aborts: int = 0
    compared: int = 0
    shed: int = 0
    write_s: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    @staticmethod
    def sum(deliveries: Sequence[Delivery]) -> Delivery:
        """Return several partitions' deliveries of one topic as one."""
        if len(deliveries) == 1:
            return deliveries[0]
        return Delivery(
            deliveries[0].topic,
            sum(each.delivered for each in deliveries),
            np.concatenate([each.latency_ms for each in deliveries]),
            sum(each.suppressed for each in deliveries),
            sum(each.too_large for each in deliveries),
            sum(each.commits for each in deliveries),
            sum(each.aborts for each in deliveries),
            sum(each.compared for each in deliveries),
            sum(each.shed for each in deliveries),
            np.concatenate([each.write_s for each in deliveries]),
        )


class Writer(Protocol):
    """Write the records of one output partition, in order. Called by one worker thread."""

    #: Where a new owner has to begin to read, to see what was written after the last `confirm`.
    next_offset: int

    @property
    def pending(self) -> bytes:
        """What was published before `next_offset`, its events yet to come; see `Published.pack`."""

    @property
    def outstanding(self) -> int:
        """Records taken that are not known to be on the brokers for good."""

    def write(self, batch: OutRecords) -> None:
        """Take the records; wait only if there is no room for more."""

    def poll(self) -> None:
        """Serve the delivery reports that have come: a latency counts until then."""

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


class Wait:
    """Wait for the brokers in slices, so that it can be said that and how long; in one thread.

    Of the whole process, for anyone to look at:

    Attributes:
        since: since when the brokers have confirmed nothing, monotonic seconds; None: they do.
        outages: how often they did again.
    """

    since: ClassVar[float | None] = None
    outages: ClassVar[int] = 0
    _next_told = 0.0  # of all waits of the process: in an outage every partition waits

    def __init__(self, what: str, bound_s: float) -> None:
        self._what, self._bound_s = what, bound_s
        self._began = self._silent_since = time.monotonic()
        self._noted = self._told = False

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
        if now - self._silent_since < _TELL_AFTER_S:
            return False
        self._noted = True
        if Wait.since is None:
            Wait.since = self._silent_since
        if now >= Wait._next_told:
            Wait._next_told = now + _TELL_EVERY_S
            self._told = True
            _logger.warning(
                "%s: the brokers have confirmed nothing for %.0f s; the flow waits, and stops if "
                "it takes %g s",
                self._what,
                now - self._silent_since,
                self._bound_s,
            )
        return False

    def goes_on(self) -> None:
        """Note that the brokers have confirmed something: they are slow, not silent."""
        self.is_over()
        self._silent_since = time.monotonic()
        self._noted = self._told = False

    def is_over(self) -> None:
        """Say that it has been worth it, if the wait was told of."""
        if self._noted and Wait.since is not None:
            Wait.since = None
            Wait.outages += 1
        if self._told:
            waited_s = time.monotonic() - self._silent_since
            _logger.warning("%s: the brokers confirm again, after %.1f s", self._what, waited_s)


def ages_ms(
    append_time: npt.NDArray[np.int64], now_ms: float | npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    return np.where(append_time >= 0, now_ms - append_time, 2 * UNKNOWN)


def not_taken(error: KafkaError, topic: str, partition: int, count: int) -> DeliveryError:
    return DeliveryError(
        f"Kafka did not take {count} record(s) for {topic}/{partition}: {error.str()} "
        f"({error.name()}), after the producer's own retries. "
        f"{access.not_allowed(error)}See to the brokers and the topic, then restart the flow; the "
        "open epoch is written again"
    )


def no_room(topic: str, partition: int, timeout_s: float) -> DeliveryError:
    return DeliveryError(
        f"the producer's queue stayed full for {timeout_s:g} s while writing to "
        f"{topic}/{partition}: the brokers take nothing. See to them, then restart the flow; the "
        "open epoch is written again"
    )


def unconfirmed(count: int, topic: str, partition: int, timeout_s: float) -> DeliveryError:
    return DeliveryError(
        f"{count} records are unconfirmed {timeout_s:g} s after the epoch's end "
        f"({topic}/{partition} among them). See to the brokers, then restart the flow; the open "
        "epoch is written again"
    )
