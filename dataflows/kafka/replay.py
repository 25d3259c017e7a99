"""Read dead letters back, and send the refused records to where they came from.

What has been sent back is remembered in a consumer group of the dead-letter topic, so a second
replay does not send it again. A group's commit is one offset per partition, but a replay by reason
leaves gaps; so the committed offset is that of the first dead letter still to be dealt with, and
the commit's metadata lists the ranges after it that are done.

A replay that dies between a delivery and its commit sends up to `COMMIT_EVERY` records again; one
whose delivery was not confirmed may have arrived, and is sent again too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)

from dataflows.kafka.dead_letter import (
    DETAIL,
    HEADERS,
    KEY_TRUNCATED,
    OFFSET,
    PARTITION,
    PREFIX,
    REASON,
    REPLAYED,
    SHA256,
    TIMESTAMP,
    TOPIC,
    TRUNCATED,
    read_headers,
)
from dataflows.kafka.records import Header
from dataflows.kafka.topics import STARTUP_TIMEOUT_S, partition_counts
from dataflows.kafka.writer import timeout_s as delivery_timeout_s

COMMIT_EVERY = 500
_MAX_METADATA_BYTES = 4_000  # brokers take 4096 (offset.metadata.max.bytes)


class ReplayError(RuntimeError):
    """Say why dead letters cannot be read or sent back."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A refused record and what is known of it.

    Attributes:
        partition, offset: its place in the dead-letter topic.
        reason, detail: why it was refused.
        topic, source_partition, source_offset: where it came from; offset -1: it never was there.
        timestamp: its own, milliseconds since the epoch.
        key, value: as they were, or cut, see `full_key_bytes`, `full_bytes`. None: a tombstone.
        headers: its own headers.
        full_bytes: length of the whole value if it was cut, else None.
        sha256: hex digest of the whole value if it was cut, else "".
        replayed: times it had been sent back when it was refused.
        full_key_bytes: length of the whole key if it was cut, else None.
        headers_missing: why its own headers are not kept; "": they are.
    """

    partition: int
    offset: int
    reason: str
    detail: str
    topic: str
    source_partition: int
    source_offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[Header]
    full_bytes: int | None
    sha256: str
    replayed: int
    full_key_bytes: int | None
    headers_missing: str

    @property
    def is_whole(self) -> bool:
        """Tell whether the record can be sent back without its original."""
        # Headers that cannot be read here cannot be read from the original either.
        omitted = self.headers_missing not in ("", "unreadable")
        return self.full_bytes is None and self.full_key_bytes is None and not omitted

    @staticmethod
    def of(message: Message) -> DeadLetter:
        """Read a record of the dead-letter topic; one that is no dead letter has no reason."""
        headers = read_headers(message) or []
        # The last of a name is ours; a record that was refused before carries older ones.
        found = {name: content or b"" for name, content in headers}

        def text(name: str) -> str:
            return found.get(name, b"").decode("utf-8", "replace")

        def number(name: str, default: int) -> int:
            digits = text(name)
            return int(digits) if digits.removeprefix("-").isdecimal() else default

        return DeadLetter(
            partition=message.partition() or 0,
            offset=message.offset() or 0,
            reason=text(REASON),
            detail=text(DETAIL),
            topic=text(TOPIC),
            source_partition=number(PARTITION, -1),
            source_offset=number(OFFSET, -1),
            timestamp=number(TIMESTAMP, -1),
            key=message.key(),
            value=message.value(),
            headers=_not_ours(headers),
            full_bytes=number(TRUNCATED, -1) if TRUNCATED in found else None,
            sha256=text(SHA256),
            replayed=number(REPLAYED, 0),
            full_key_bytes=number(KEY_TRUNCATED, -1) if KEY_TRUNCATED in found else None,
            headers_missing=text(HEADERS),
        )


def _not_ours(headers: Sequence[Header]) -> list[Header]:
    return [header for header in headers if not header[0].startswith(PREFIX)]


@dataclass(slots=True)
class Progress:
    """Remember which offsets of a partition are done: all below `offset`, and some after it.

    >>> progress = Progress(5)
    >>> for offset in (5, 8, 9, 12):
    ...     progress.mark(offset)
    >>> progress.offset, progress.metadata()
    (6, '8-9,12')
    >>> Progress.of(6, "8-9,12").is_done(9), progress.is_done(7)
    (True, False)
    >>> progress.skip(6, 8); progress.skip(10, 12); progress.offset
    13
    """

    offset: int
    done: set[int] = field(default_factory=set)

    @staticmethod
    def of(offset: int, metadata: str | None) -> Progress:
        """Read a commit. Raises `ReplayError` if the metadata is somebody else's."""
        done: set[int] = set()
        try:
            for part in filter(None, (metadata or "").split(",")):
                first, _, last = part.partition("-")
                done.update(range(int(first), int(last or first) + 1))
        except ValueError as error:
            raise ReplayError(
                f"the group's commit has metadata {metadata!r}, which no replay wrote: "
                "replay with another group"
            ) from error
        return Progress(offset, done)

    def is_done(self, offset: int) -> bool:
        """Tell whether the dead letter at `offset` has been dealt with."""
        return offset < self.offset or offset in self.done

    def mark(self, offset: int) -> None:
        """Note that the dead letter at `offset` has been dealt with."""
        if not self.is_done(offset):
            self.done.add(offset)
        while self.offset in self.done:
            self.done.remove(self.offset)
            self.offset += 1

    def skip(self, first: int, end: int) -> None:
        """Note that offsets in [first, end) hold no dead letter: the ends of transactions."""
        if first <= self.offset:
            self.offset = max(self.offset, end)
            self.done = {offset for offset in self.done if offset >= self.offset}
            self.mark(self.offset - 1)  # what follows it may be done
        else:
            self.done.update(range(first, end))

    def metadata(self) -> str:
        """Return the ranges done after `offset`, as a commit carries them."""
        ranges: list[list[int]] = []
        for offset in sorted(self.done):
            if ranges and offset == ranges[-1][1] + 1:
                ranges[-1][1] = offset
            else:
                ranges.append([offset, offset])
        text = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)
        if len(text) > _MAX_METADATA_BYTES:
            raise ReplayError(
                f"more than {_MAX_METADATA_BYTES} bytes of gaps are left between the dead letters "
                "replayed so far: replay the other reasons too, or give a group of its own to "
                "each reason"
            )
        return text


def read_dead_letters(
    topic: str,
    config: Mapping[str, Any],
    *,
    start: Mapping[int, int] | None = None,
    timeout_s: float = STARTUP_TIMEOUT_S,
) -> Iterator[DeadLetter]:
    """Yield the dead letters that a topic holds now, partition by partition, in order.

    Args:
        topic: the dead-letter topic.
        config: librdkafka consumer settings, at least ``bootstrap.servers``.
        start: first offset of each partition; the others are read from their beginning.
        timeout_s: bound of each wait for the brokers.

    Raises:
        StartupError: No broker answered, or the topic does not exist.
        ReplayError: Reading failed or stopped short of the end.
    """
    with closing(_consumer(config, "dead-letter-reader")) as consumer:
        count = partition_counts(consumer, config, [topic], timeout_s=timeout_s, role="source")[
            topic
        ]
        for partition in range(count):
            asked = TopicPartition(topic, partition)
            try:
                low, high = consumer.get_watermark_offsets(asked, timeout=timeout_s)
            except KafkaException as error:
                raise ReplayError(
                    f"reading {topic}/{partition} failed: {error.args[0].str()}"
                ) from error
            first = max(low, (start or {}).get(partition, low))
            for message in _records(consumer, topic, partition, first, high, timeout_s):
                yield DeadLetter.of(message)


def _consumer(config: Mapping[str, Any], group_id: str) -> Consumer:
    fixed = {
        "group.id": group_id,
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",
        "allow.auto.create.topics": False,
    }
    return Consumer({**config, **fixed})


def _records(
    consumer: Consumer, topic: str, partition: int, first: int, end: int, timeout_s: float
) -> Iterator[Message]:
    """Yield the records with offsets in [first, end)."""
    if first >= end:
        return
    consumer.assign([TopicPartition(topic, partition, first)])
    heard_at = time.monotonic()
    while True:
        # `consume` waits for all 500 or the timeout, so the timeout is short.
        messages = consumer.consume(500, 0.05)
        if messages:
            heard_at = time.monotonic()
        elif time.monotonic() - heard_at > timeout_s:
            raise ReplayError(f"{topic}/{partition} sent nothing for {timeout_s:g} s")
        for message in messages:
            error, offset = message.error(), message.offset() or 0
            if error is None:
                if offset < end:
                    yield message
                if offset >= end - 1:
                    return
            elif error.code() == KafkaError._PARTITION_EOF:
                return
            elif error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                pass  # reading needs no group; what is remembered there is asked for by itself
            elif not error.retriable():
                raise ReplayError(f"reading {topic}/{partition} failed: {error.str()}")


@dataclass(slots=True)
class Replay:
    """What a replay did, or with ``dry_run`` would do.

    Attributes:
        sent: dead letters whose original is on the brokers again, by reason.
        done_before: dead letters that an earlier replay had sent.
        impossible: those that cannot be sent back, each with the cause.
    """

    sent: dict[str, int] = field(default_factory=dict)
    done_before: int = 0
    impossible: list[tuple[DeadLetter, str]] = field(default_factory=list)


def replay(
    topic: str,
    consumer_config: Mapping[str, Any],
    producer_config: Mapping[str, Any],
    *,
    group_id: str = "dead-letter-replay",
    reason: str | None = None,
    start: Mapping[int, int] | None = None,
    dry_run: bool = False,
    timeout_s: float = STARTUP_TIMEOUT_S,
) -> Replay:
    """Send refused records back to the partitions they came from, once each.

    Records keep key, value and headers (but not headers that cannot be read) and get
    ``dlq.replayed``. What a dead letter had no room for is read from the source topic. Those that
    are refused again while the replay runs are left for the next one. A record of the flow's own,
    such as a prediction too large for its topic, is not sent: it was never read.

    Args:
        topic: the dead-letter topic.
        consumer_config, producer_config: librdkafka settings, at least ``bootstrap.servers``.
        group_id: consumer group that remembers what has been sent.
        reason: only dead letters with this reason; None: all.
        start: offset by partition from which all are sent, also those sent before.
        dry_run: look, but send and remember nothing.
        timeout_s: bound of each wait for the brokers.

    Raises:
        StartupError: No broker answered, or a topic does not exist.
        ReplayError: Reading or sending failed. What was delivered is remembered.
    """
    result = Replay()
    producer_config = {
        "message.timeout.ms": 60_000,
        **producer_config,
        "enable.idempotence": True,
    }
    producer = Producer(producer_config)
    with (
        closing(_consumer(consumer_config, group_id)) as memory,
        closing(_consumer(consumer_config, "dead-letter-originals")) as originals,
    ):
        known = partition_counts(
            memory, consumer_config, [topic], timeout_s=timeout_s, role="source"
        )
        progress = _load(memory, topic, known[topic], timeout_s)
        for partition, offset in (start or {}).items():
            if partition in progress:
                progress[partition] = Progress(offset)
        within_s = delivery_timeout_s(producer_config)
        sender = _Sender(producer, memory, topic, progress, within_s)
        first = {partition: each.offset for partition, each in progress.items()}
        letters = read_dead_letters(topic, consumer_config, start=first, timeout_s=timeout_s)
        read = dict(first)  # partition → the offset after the last dead letter that was read
        try:
            for letter in letters:
                progress[letter.partition].skip(read[letter.partition], letter.offset)
                read[letter.partition] = letter.offset + 1
                if reason is not None and letter.reason != reason:
                    continue
                if progress[letter.partition].is_done(letter.offset):
                    result.done_before += 1
                    continue
                try:
                    whole = _restored(letter, originals, timeout_s)
                except _CannotReplay as problem:
                    result.impossible.append((letter, str(problem)))
                    continue
                if dry_run:
                    result.sent[letter.reason] = result.sent.get(letter.reason, 0) + 1
                else:
                    sender.send(whole)
        except ReplayError:
            sender.commit()  # what was taken before reading failed
            raise
        sender.commit()
    result.sent.update(sender.delivered)
    return result


class _CannotReplay(Exception):
    pass


def _load(memory: Consumer, topic: str, partitions: int, timeout_s: float) -> dict[int, Progress]:
    asked = [TopicPartition(topic, partition) for partition in range(partitions)]
    try:
        found = memory.committed(asked, timeout=timeout_s)
    except KafkaException as error:
        raise ReplayError(
            f"the brokers did not say within {timeout_s:g} s what has been replayed: "
            f"{error.args[0].str()}"
        ) from error
    return {
        each.partition: Progress.of(max(each.offset, 0), each.metadata if each.offset >= 0 else "")
        for each in found
    }


def _restored(letter: DeadLetter, consumer: Consumer, timeout_s: float) -> DeadLetter:
    """Return a dead letter with the whole record, from its source topic if it was cut."""
    if letter.topic and letter.source_offset < 0:
        raise _CannotReplay(_never_read(letter))
    if not letter.topic or letter.source_partition < 0:
        raise _CannotReplay("it does not say where it came from")
    if letter.is_whole:
        return letter
    where = f"{letter.topic}/{letter.source_partition}/{letter.source_offset}"
    asked = TopicPartition(letter.topic, letter.source_partition)
    try:
        low, high = consumer.get_watermark_offsets(asked, timeout=timeout_s)
        if not low <= letter.source_offset < high:
            raise _CannotReplay(f"it was cut, and {where} is no longer on the brokers")
        records = _records(
            consumer,
            letter.topic,
            letter.source_partition,
            letter.source_offset,
            letter.source_offset + 1,
            timeout_s,
        )
        original = next(records, None)
    except (KafkaException, ReplayError) as error:
        raise _CannotReplay(f"it was cut, and {where} cannot be read: {error}") from error
    if original is None or not _is_original(letter, original):
        raise _CannotReplay(f"it was cut, and {where} now holds something else")
    headers = letter.headers
    if letter.headers_missing:
        headers = _not_ours(read_headers(original) or [])
    return dataclasses.replace(letter, key=original.key(), value=original.value(), headers=headers)


def _never_read(letter: DeadLetter) -> str:
    event = (dict(letter.headers).get("origin") or b"of unknown origin").decode("utf-8", "replace")
    return (
        f"it was never read, but is what the flow wrote about the event {event}, and "
        f"{letter.detail}. That event has been counted, and must not be sent again. What is kept "
        f"of the record is shown by `list --reason {letter.reason} --full`; for later ones, drain "
        f"the flow, raise max.message.bytes of {letter.topic}, or message.max.bytes in "
        "KAFKA_PRODUCER_OPTIONS, and start it again"
    )


def _is_original(letter: DeadLetter, record: Message) -> bool:
    """Tell whether a record has the key and the value of which the dead letter holds a part."""
    key: bytes | None = record.key()
    value: bytes | None = record.value()
    if letter.full_bytes is None:
        same_value = value == letter.value
    else:
        same_value = value is not None and hashlib.sha256(value).hexdigest() == letter.sha256
    if letter.full_key_bytes is None:
        return same_value and key == letter.key
    return (
        same_value
        and key is not None
        and len(key) == letter.full_key_bytes
        and key.startswith(letter.key or b"")
    )


class _Sender:
    """Produce the originals; remember those that were delivered, and no others.

    Attributes:
        delivered: how many were, by reason.
    """

    def __init__(
        self,
        producer: Producer,
        memory: Consumer,
        topic: str,
        progress: dict[int, Progress],
        within_s: float,
    ) -> None:
        self.delivered: Counter[str] = Counter()
        self._producer = producer
        self._memory = memory
        self._topic = topic
        self._progress = progress
        self._within_s = within_s
        self._pending = 0
        self._arrived = 0  # of the pending
        self._failed: list[str] = []

    def send(self, letter: DeadLetter) -> None:
        def delivered(error: KafkaError | None, message: Message) -> None:
            del message
            if error is None:
                self._progress[letter.partition].mark(letter.offset)
                self.delivered[letter.reason] += 1
                self._arrived += 1
            else:
                self._failed.append(f"{letter.partition}/{letter.offset}: {error.str()}")

        headers: list[Any] = [*letter.headers, (REPLAYED, b"%d" % (letter.replayed + 1))]
        produce = partial(
            self._producer.produce,
            letter.topic,
            letter.value,
            letter.key,
            letter.source_partition,
            on_delivery=delivered,
            headers=headers,
        )
        try:
            try:
                produce()
            except BufferError:
                self.commit()  # which makes room
                produce()
        except KafkaException as error:
            self._failed.append(f"{letter.partition}/{letter.offset}: {error.args[0].str()}")
        self._pending += 1
        if self._pending >= COMMIT_EVERY or self._failed:
            self.commit()

    def commit(self) -> None:
        """Wait until each has arrived or failed; remember, and raise for those that did not."""
        if not self._pending:
            return
        self._producer.flush(self._within_s)
        arrived, lost = self._arrived, self._pending - self._arrived
        self._pending = self._arrived = 0
        if arrived:
            self._remember()
        if lost:
            unanswered = f"the brokers have not answered within {self._within_s:g} s"
            why = f"the first at {self._failed[0]}" if self._failed else unanswered
            raise ReplayError(
                f"{lost} dead letters could not be sent back ({why}); {self.delivered.total()} "
                "were, and are remembered. See to the brokers, then run the replay again for the "
                "rest"
            )

    def _remember(self) -> None:
        offsets = [
            TopicPartition(self._topic, partition, each.offset, metadata=each.metadata())
            for partition, each in self._progress.items()
        ]
        try:
            self._memory.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            raise ReplayError(
                "records were sent back, but the brokers did not take the note of it "
                f"({error.args[0].str()}): the next replay sends them again"
            ) from error


def parse_start(texts: Sequence[str], partitions: int) -> dict[int, int]:
    """Read ``OFFSET`` (of every partition) or ``PARTITION:OFFSET`` arguments.

    >>> parse_start(["0:7", "2:1"], 3), parse_start(["5"], 2)
    ({0: 7, 2: 1}, {0: 5, 1: 5})
    """
    start: dict[int, int] = {}
    for text in texts:
        partition, separator, offset = text.rpartition(":")
        if not offset.isdecimal() or (separator and not partition.isdecimal()):
            raise ReplayError(f"{text!r} is neither OFFSET nor PARTITION:OFFSET")
        for each in [int(partition)] if separator else range(partitions):
            if each >= partitions:
                raise ReplayError(f"{text!r}: the topic has partitions 0 to {partitions - 1}")
            start[each] = int(offset)
    return start
