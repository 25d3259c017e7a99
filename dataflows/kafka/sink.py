"""Write a stream to a Kafka topic, at least once or exactly once.

A Bytewax sink partition is a partition of the output topic; records are split over them by key
with the JVM's partitioner. How each is written is its `Writer`'s matter (`dataflows.kafka.writer`).
`snapshot` returns only when everything written in the epoch is on the brokers, so a
recovered flow never believes in a record that Kafka does not have. After a crash the epoch that
was open is computed again: written again with the same event ids (at least once), or compared with
what was published of it (exactly once).

The recovery state of a partition is (format, offset, partitions, pending, owner): the offset after
its last record, where a new owner begins to read what was published later; the number of partitions
of the topic, which must not change while an epoch is open, because keys would move; what was
published before and has yet to be suppressed (`Published.pack`), empty unless the flow is catching
up after a crash; and whose transactional id to fence, if that has changed since.

With the first batch of a life every partition of the topic is written to, be it with nothing: each
is then taken over at once, not when its own first record comes, and is in the first snapshot.

What is too large for the topic never reaches a writer: `output` returns it as dead letters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from threading import get_ident
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

import bytewax.operators as op
import numpy as np
from bytewax.dataflow import Stream, operator
from bytewax.operators import KeyedStream
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from confluent_kafka.admin import AdminClient

from dataflows.kafka.dead_letter import MAX_VALUE_BYTES, fit, reason_headers, stub
from dataflows.kafka.errors import StartupError
from dataflows.kafka.idempotent import IdempotentWriter
from dataflows.kafka.partitioner import partitions_of
from dataflows.kafka.records import OutRecords
from dataflows.kafka.security import identity
from dataflows.kafka.tail import MOST_RECORDS, Tail, read_tail
from dataflows.kafka.topics import (
    STARTUP_TIMEOUT_S,
    most_record_bytes,
    part_name,
    partition_counts,
)
from dataflows.kafka.transactional import TransactionalWriter
from dataflows.kafka.writer import Delivery, Writer
from features.keys import group

PREDICTION_TOO_LARGE = "prediction_too_large"

Guarantee: TypeAlias = Literal["at_most_once", "at_least_once", "exactly_once"]
SinkState: TypeAlias = tuple[int, int, int, bytes, str]

_FORMAT = 3
_KEYLESS = 2  # format in which what is pending was known without its key
_TELL_EVERY_S = 0.02
_BATCH_BYTES = 1_000_000  # librdkafka's default
_LEAST_RECORD_BYTES = 4096  # a dead letter without its record, and room
_logger = logging.getLogger(__name__)


def check_state(value: Any) -> SinkState:
    """Return the recovery state of a sink partition; ValueError if this version cannot read it."""
    match value:
        case (int(version), int(offset), int(partitions), bytes(pending), str(owner)) if (
            version == _FORMAT or (version == _KEYLESS and not pending)
        ):
            return version, offset, partitions, pending, owner
        case (int(written_by), *_) if written_by != _FORMAT:
            found = f"format {written_by}"
        case _:
            found = f"no format ({type(value).__name__})"
    raise ValueError(f"the state of an output partition has {found}, this version reads {_FORMAT}")


class KafkaSink(FixedPartitionedSink[OutRecords, SinkState]):
    """Write `OutRecords` to the partitions of one topic. Use it with `output`.

    Args:
        topic: output topic; it must exist. With ``exactly_once`` nobody else may write to it.
        config: librdkafka producer settings, at least ``bootstrap.servers``; they go over
            `dataflows.kafka.writer.PRODUCER_DEFAULTS`, except ``acks`` and
            ``enable.idempotence``, which are fixed.
        delivery: the guarantee. ``at_most_once`` writes like ``at_least_once``; it is the source
            that then keeps no offsets.
        consumer_config: librdkafka consumer settings, to read the partitions' tails with; only
            for ``exactly_once``. None: `config`'s address and identity.
        admin_config: librdkafka settings to ask for the topic's limits with. None: `config`.
        owner: prefix of the transactional ids, ``owner/topic/partition``; the same in every life.
        transaction_s: how long a transaction stays open at most, in seconds.
        past_retention: see `read_tail`.
        tail_max_records: see `read_tail`.
        either_copy: see `dataflows.kafka.tail.Published`; True where events are deduplicated.
        observe: called with a `Delivery` for what was delivered, on the worker thread.
        snapshotted: called on the worker thread when a partition has given its snapshot.
        startup_timeout_s: bound of the look-up of the topic.

    Raises:
        StartupError: (when the flow starts) No broker answered, the topic does not exist, or what
            was published since the snapshot cannot be told.
        DeliveryError: (when the flow runs) Kafka refused records, or did not confirm them within
            ``message.timeout.ms``, after librdkafka's own retries.
    """

    def __init__(
        self,
        topic: str,
        config: Mapping[str, Any],
        *,
        delivery: Guarantee = "at_least_once",
        consumer_config: Mapping[str, Any] | None = None,
        admin_config: Mapping[str, Any] | None = None,
        owner: str = "",
        transaction_s: float = 0.1,
        past_retention: bool = False,
        tail_max_records: int = MOST_RECORDS,
        either_copy: bool = False,
        observe: Callable[[Delivery], None] | None = None,
        snapshotted: Callable[[], None] | None = None,
        startup_timeout_s: float = STARTUP_TIMEOUT_S,
    ) -> None:
        if delivery == "exactly_once" and not owner:
            raise ValueError("exactly_once needs an owner, the prefix of its transactional ids")
        self.topic = topic
        self._config = dict(config)
        self._delivery = delivery
        self._consumer_config = consumer_config
        self._admin_config = config if admin_config is None else admin_config
        self._owner = owner
        self._transaction_s = transaction_s
        self._past_retention = past_retention
        self._tail_max_records = tail_max_records
        self._either_copy = either_copy
        self._observe = observe
        self._snapshotted = snapshotted
        self._startup_timeout_s = startup_timeout_s
        self._partitions = 0
        self._most_bytes = 0
        self._woken = False

    def __repr__(self) -> str:
        # Bytewax writes step reprs to files and to its API: no configuration, it holds secrets.
        return f"KafkaSink({self.topic!r})"

    @property
    def partitions(self) -> int:
        """Number of partitions of the topic, looked up once."""
        if not self._partitions:
            self._look_up()
        return self._partitions

    def _look_up(self) -> None:
        librdkafka = logging.getLogger("librdkafka")
        client = AdminClient(dict(self._config), logger=librdkafka)
        timeout_s = self._startup_timeout_s
        counts = partition_counts(
            client, self._config, [self.topic], timeout_s=timeout_s, role="sink"
        )
        admin = AdminClient(dict(self._admin_config), logger=librdkafka)
        self._most_bytes = most_record_bytes(admin, self._config, self.topic)
        if self._most_bytes < _LEAST_RECORD_BYTES:
            raise StartupError(
                f"{self.topic} takes records of at most {self._most_bytes} bytes: raise its "
                f"max.message.bytes, or message.max.bytes in KAFKA_PRODUCER_OPTIONS, to "
                f"{_LEAST_RECORD_BYTES} or more"
            )
        self._partitions = counts[self.topic]

    def list_parts(self) -> list[str]:
        """Name the topic's partitions."""
        group(partitions_of([b"to compile it now"], 1), 1)
        return [part_name(self.topic, partition) for partition in range(self.partitions)]

    def part_fn(self, item_key: str) -> int:
        """Route an item of `split`, whose key is the decimal partition number."""
        return int(item_key)

    def build_part(
        self, step_id: str, for_part: str, resume_state: SinkState | None
    ) -> _SinkPartition:
        """Build the writer of one partition; StartupError if the state is of another format."""
        partition = int(for_part.rpartition("/")[2])
        start, count, pending, owner, between = None, self.partitions, b"", self._owner, "/"
        if resume_state is not None:
            try:
                version, start, count, pending, owner = check_state(resume_state)
            except ValueError as error:
                raise StartupError(f"the recovery store, {for_part}: {error}") from None
            between = "." if version == _KEYLESS else "/"  # as the ids were then
        # Of more at once than the topic takes, the brokers refuse all.
        largest_batch = min(int(self._config.get("batch.size", _BATCH_BYTES)), self._most_bytes)
        config = {**self._config, "batch.size": largest_batch}
        writer: Writer
        if self._delivery == "exactly_once":
            writer = TransactionalWriter(
                self.topic,
                partition,
                config,
                # A topic's name has no "/", so no two partitions share an id, whatever the owners.
                transactional_id=f"{self._owner}/{self.topic}/{partition}",
                # A life under another name may still be about.
                predecessor=between.join([owner, self.topic, str(partition)]) if owner else "",
                tail=partial(self._tail, partition, start, count, pending),
                transaction_s=self._transaction_s,
            )
        else:
            next_offset = -1 if start is None else start
            writer = IdempotentWriter(self.topic, partition, config, next_offset)
        owner = self._owner if self._delivery == "exactly_once" else ""
        return _SinkPartition(
            self.topic, writer, self.partitions, owner, self._observe, self._snapshotted
        )

    def refuse_moved_keys(self, states: Mapping[str, SinkState]) -> None:
        """Raise StartupError if partitions were added while records of an open epoch are there.

        Call it before the flow starts, with the recovery state of each output partition by name.
        A partition looks again once its predecessor is locked out; but then the others may
        already have written what it has published.
        """
        if self._delivery != "exactly_once":
            return
        for partition in range(self.partitions):
            state = states.get(part_name(self.topic, partition))
            if state is not None and state[2] != self.partitions:
                self._tail(partition, *state[1:4], fenced=False)

    def _tail(
        self, partition: int, start: int | None, count: int, pending: bytes, *, fenced: bool = True
    ) -> Tail:
        address = {"bootstrap.servers": self._config["bootstrap.servers"], **identity(self._config)}
        tail = read_tail(
            self.topic,
            partition,
            None if start == -1 else start,
            self._consumer_config or address,
            past_retention=self._past_retention,
            most_records=self._tail_max_records,
            timeout_s=self._startup_timeout_s,
            either_copy=self._either_copy,
            fenced=fenced,
        )
        tail.published.unpack(pending)
        moved = tail.published.moved(partition, self.partitions) if count != self.partitions else 0
        if moved:
            raise StartupError(
                f"{self.topic} had {count} partitions and has {self.partitions}, and {moved} "
                f"records that were published to partition {partition} after the last snapshot "
                "belong to another one now, so they would come twice. "
                "Let the flow catch up and drain it before partitions are added. To go on now, "
                "accepting that these may come twice, start once with DELIVERY=at_least_once"
            )
        return tail

    def split(self, batches: list[OutRecords]) -> list[tuple[str, OutRecords] | OutRecords]:
        """Split batches by output partition; what is too large comes back as dead letters.

        Records keep their order within each partition. A record without a key goes to the
        partition of its event id, so that a replay puts it where it was before.
        """
        items: list[tuple[str, OutRecords] | OutRecords] = []
        count = self.partitions
        if not self._woken and batches:
            self._woken = True
            nothing = batches[0].take(np.empty(0, dtype=np.intp))
            items += [(str(partition), nothing) for partition in range(count)]
        for whole in batches:
            batch, refused = self._fitting(whole)
            if refused is not None:
                items.append(refused)
            if not len(batch):
                continue
            if count == 1:
                items.append(("0", batch))
                continue
            routed = [
                event_id if key is None else key
                for key, event_id in zip(batch.keys, batch.event_ids, strict=True)
            ]
            rows, starts = group(partitions_of(routed, count), count)
            for partition, (start, end) in enumerate(pairwise(starts.tolist())):
                if end - start == len(batch):
                    items.append((str(partition), batch))
                elif start < end:
                    items.append((str(partition), batch.take(rows[start:end])))
        return items

    def _fitting(self, batch: OutRecords) -> tuple[OutRecords, OutRecords | None]:
        """Return the records that the topic takes, and the dead letters of the others.

        A dead letter that is too large stays, without its record.
        """
        if batch.largest() <= self._most_bytes:
            return batch, None
        sizes = batch.most_bytes()
        too_large = sizes > self._most_bytes
        if not too_large.any():
            return batch, None
        fitting = batch.take(np.flatnonzero(~too_large))
        letters: list[OutRecords] = []
        for row in np.flatnonzero(too_large).tolist():
            least = stub(batch, row)
            if least is not None:
                _logger.warning(
                    "%s does not take a dead letter of %d bytes: only its reason is kept, event id "
                    "%s. Raise max.message.bytes of the topic to keep the record too",
                    self.topic,
                    sizes[row],
                    least.event_ids[0].decode("utf-8", "backslashreplace"),
                )
                fitting = OutRecords.concatenate([fitting, least])
            else:
                letters.append(self._dead_letter(batch, row, int(sizes[row])))
        if not letters:
            return fitting, None
        if self._observe is not None:
            self._observe(Delivery(self.topic, 0, np.empty(0), too_large=len(letters)))
        return fitting, OutRecords.concatenate(letters)

    def _dead_letter(self, batch: OutRecords, row: int, size: int) -> OutRecords:
        own = [] if batch.headers is None else batch.headers[row]
        key, value, headers = fit(batch.keys[row], batch.values[row], own, MAX_VALUE_BYTES)
        letter = batch.take(np.array([row]))
        letter.keys, letter.values = [key], [value]
        why = f"{size} bytes are more than {self.topic} takes ({self._most_bytes})"
        appended = int(batch.append_time[row])
        letter.headers = [
            headers + reason_headers(PREDICTION_TOO_LARGE, why, self.topic, -1, -1, appended)
        ]
        return letter


@operator
def output(step_id: str, up: Stream[OutRecords], sink: KafkaSink) -> Stream[OutRecords]:
    """Write a stream of `OutRecords` to Kafka, split over the topic's partitions by key.

    Returns the dead letters of records that are too large for the topic.
    """
    split = op.flat_map_batch("split", up, sink.split)
    fits = op.branch("fits", split, lambda item: isinstance(item, tuple))
    batches: KeyedStream[OutRecords] = fits.trues  # type: ignore[assignment]
    op.output("write", batches, sink)
    return fits.falses  # type: ignore[return-value]


class _SinkPartition(StatefulSinkPartition[OutRecords, SinkState]):
    def __init__(
        self,
        topic: str,
        writer: Writer,
        partitions: int,
        owner: str,
        observe: Callable[[Delivery], None] | None,
        snapshotted: Callable[[], None] | None,
    ) -> None:
        self.topic = topic
        self._writer = writer
        self._partitions = partitions
        self._owner = owner
        self._observe, self._snapshotted = observe, snapshotted
        self.told_at = 0.0  # monotonic seconds
        self.write_s: list[float] = []  # of each `write_batch` not told of yet
        self._thread = get_ident()
        _open_partitions.setdefault(self._thread, WeakSet()).add(self)

    def write_batch(self, values: list[OutRecords]) -> None:
        """Hand the records to the writer."""
        began = time.monotonic()
        for batch in values:
            self._writer.write(batch)
        if self._observe is not None:
            self.write_s.append(time.monotonic() - began)
        # A worker without a source, or one that waits for the others, has no turns.
        if time.monotonic() - self.told_at > 2 * _TELL_EVERY_S:
            _tell([self])

    def snapshot(self) -> SinkState:
        """Return the partition's `SinkState`, once all records are delivered.

        Raises:
            DeliveryError: Something is still outstanding after ``message.timeout.ms`` and 5 s.
        """
        for other in _open_partitions[self._thread]:
            other._writer.begin_confirm()
        self._writer.confirm()
        _tell([self])
        if self._snapshotted is not None:
            self._snapshotted()
        writer = self._writer
        return _FORMAT, writer.next_offset, self._partitions, writer.pending, self._owner

    def close(self) -> None:
        """Give up what is outstanding: without a snapshot the epoch is computed again anyway."""
        _open_partitions[self._thread].discard(self)
        self._writer.close()


_open_partitions: dict[int, WeakSet[_SinkPartition]] = {}  # by the worker's thread
_told_at: dict[int, float] = {}  # monotonic seconds, by thread


def outstanding() -> dict[str, int]:
    """Return how many records of this thread's sinks are yet to be confirmed, by topic."""
    found: dict[str, int] = {}
    for each in _open_partitions.get(get_ident(), ()):
        found[each.topic] = found.get(each.topic, 0) + each._writer.outstanding
    return found


def poll_sinks() -> None:
    """Serve the delivery reports that have come for this thread's sinks, without waiting.

    Every 20 ms (for every small batch it would cost too much) it also tells each topic's observer
    what has been delivered since the last time, and raises the DeliveryError of a writer that
    failed. A latency counts until its report is served, so somebody has to do this also when
    nothing is being written: pass it to `KafkaSource` as `between_batches`. While something is, the
    partitions see to it that it happens.
    """
    thread, now = get_ident(), time.monotonic()
    for each in _open_partitions.get(thread, ()):
        each._writer.poll()
    if now - _told_at.get(thread, -_TELL_EVERY_S) >= _TELL_EVERY_S:
        _told_at[thread] = now
        _tell(_open_partitions.get(thread, ()))


def _tell(partitions: Iterable[_SinkPartition]) -> None:
    now = time.monotonic()
    settled: dict[tuple[str, Callable[[Delivery], None]], list[Delivery]] = {}
    for each in partitions:
        each.told_at = now
        delivery = each._writer.settle()
        if delivery is not None and each._observe is not None:
            delivery = replace(delivery, write_s=np.array(each.write_s))
            each.write_s.clear()
            settled.setdefault((delivery.topic, each._observe), []).append(delivery)
    for (_, observe), deliveries in settled.items():
        observe(Delivery.sum(deliveries))
