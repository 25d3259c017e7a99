"""Read Kafka topics as one stream of micro-batches, ordered by stream time, resumable, drainable.

Every Kafka partition is a Bytewax part with its own offset in the recovery store; but one *leader*
part per worker (the first by name) reads for all of them, with one consumer, and emits the merged
rows. The other parts emit nothing and only keep their offsets. That this loses and doubles nothing
rests on how Bytewax 0.21.1 runs a `FixedPartitionedSource` (``src/inputs.rs``):

1. A part's ``next_batch`` is called only when every epoch before the part's own is finished on all
   workers, snapshots included: ``if !probe.less_than(&epoch)``. An unfinished part, on this worker
   or another, holds that frontier back.
2. Each part ends its epochs by its own clock: ``now - epoch_started >= epoch_interval``, looked at
   whether or not the part is awake; then ``snapshot`` is called and belongs to the epoch that ends.
3. All parts start in the same epoch, and those of one activation share a clock. Parts that were
   resumed in different activations end their epochs some milliseconds apart.

So while the leader is called, every local part is in the leader's epoch *N*, or has already ended
it and waits in *N* + 1; none can be behind (1). Rows that the leader emits belong to epoch *N*, and
the offset after them must be part of every part's snapshot of *N*. That is so unless a part has
already given that snapshot. We count the snapshots of each part in this life, which by (3) compares
their epochs, and emit nothing while any part has given more than the leader. Then each part's
snapshot of *N* says exactly which of its rows were emitted in epochs up to *N*. Should an engine
ever call the leader while a part is behind it, `next_batch` raises rather than guesses.

All parts of a worker are built before the first ``next_batch`` is called: snapshots are loaded in
epochs before the one that the flow resumes in, so by (1) no part runs before all loads are done,
and the parts without a snapshot are built in the activation that sees the end of the loads. A part
built later is refused.

Epoch *N* + 1 starts when *N* is durable (1), so at the leader's first call in it the offsets of *N*
are committed to the consumer group, for lag tools to see; recovery never reads them. For the same
reason a *drain* is: emit nothing more, wait for the next snapshot, and at the first call after it
stop the worker with `AbortExecution`. Ending the input instead (``StopIteration``) would make
downstream steps believe that no more data will ever come. The workers of a cluster have to do it
in the same epoch: see `dataflows.kafka.peers`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from types import FrameType, TracebackType
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from bytewax.errors import BytewaxRuntimeError
from bytewax.inputs import AbortExecution, FixedPartitionedSource, StatefulSourcePartition
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from dataflows.kafka import access
from dataflows.kafka.errors import FlowError, SourceError, StartupError
from dataflows.kafka.interleave import NO_TIME, Interleaver
from dataflows.kafka.peers import Peers
from dataflows.kafka.phase import PhaseKeeper
from dataflows.kafka.rate_limit import TokenBuckets
from dataflows.kafka.rebuild import first_unread_ms, offsets_since
from dataflows.kafka.records import Int64s, Records
from dataflows.kafka.topics import (
    STARTUP_TIMEOUT_S,
    part_name,
    partition_counts,
    watermarks,
)

logger = logging.getLogger(__name__)

CONSUMER_DEFAULTS: Mapping[str, Any] = {
    "fetch.wait.max.ms": 100,
    "fetch.error.backoff.ms": 200,
    "reconnect.backoff.max.ms": 2_000,  # of 10 s
    "topic.metadata.refresh.interval.ms": 10_000,  # of 5 min: who missed the news asks again
    "socket.timeout.ms": 10_000,  # of 60 s, as long as nobody is asked in place of one that hangs
    "queued.max.messages.kbytes": 16_384,
    "queued.min.messages": 20_000,
    # The default of 1 s starves a consumer whose small queue fills: it would wait that long.
    "fetch.queue.backoff.ms": 2,
}
_GUARANTEES: Mapping[str, Any] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
    "auto.offset.reset": "error",
    "isolation.level": "read_committed",
    "allow.auto.create.topics": False,
}
#: Later than all stream times: how far a worker may go that waits for no other.
_NO_LIMIT = np.iinfo(np.int64).max
_FIRST = "first"  # metadata of a group offset at which nothing has been read yet
_NEVER = datetime(9000, 1, 1, tzinfo=UTC)
_BUFFER_ALL_PARTITIONS = 200_000
_LOG_EVERY_S = 10.0
_DOZE = timedelta(milliseconds=6)
_PAUSE_S = 0.001  # of the engine between two turns, unless it is asked to go on at once
_DOZE_AFTER = 500  # turns, half a second
_OBSERVE_EVERY_S = 0.25
_LAST_COMMIT_S = 2.0
_PROBE_EVERY_S, _PROBE_S = 2.0, 0.5

_NOT_DECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, TypeError, RecursionError)

_LINGER_S = 5.0

_drain = threading.Event()
_leave = threading.Event()
_drained = threading.Event()
_end_process: Callable[[], None] | None = None


def request_drain() -> None:
    """Ask every source of this process to stop emitting and to end after its next snapshot."""
    _drain.set()


def drain_requested() -> bool:
    """Tell whether a drain was asked for."""
    return _drain.is_set()


def install_drain_handlers(report: Callable[[], object] | None = None) -> None:
    """Drain on SIGTERM and SIGINT, instead of dying without a snapshot. Main thread only.

    A repeated signal changes nothing: Ctrl-C in a terminal and a supervisor often send two. The
    drain takes up to one epoch, plus the time that deliveries need. A process that is still there
    5 s after it has drained (Bytewax waits for the other processes' connections) is ended with
    exit code 0; `report` is called then, since ``atexit`` is not, and before an error is told.
    """
    global _end_process

    def drain(signal_number: int, frame: FrameType | None) -> None:
        del frame
        if _leave.is_set():
            raise SystemExit(0)
        if not _drain.is_set():
            logger.info("draining after %s", signal.Signals(signal_number).name)
        _drain.set()

    def end() -> None:
        if report is not None:
            report()
        logging.shutdown()
        os._exit(0)

    def failed(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        # Timely's threads panic when a connection closes; errors of the flow itself are no panics.
        if _drained.is_set() and kind.__name__ == "PanicException":
            logger.info("another process of the cluster ended first; this one has drained")
            end()
        sys.__excepthook__(kind, error, trace)
        if report is not None:  # before the reason, which is to be the last line
            atexit.unregister(report)
            report()
        while isinstance(error, BytewaxRuntimeError) and error.__cause__ is not None:
            error = error.__cause__
        logger.error("stopped by %s", _why(error))

    sys.excepthook = failed
    signal.signal(signal.SIGTERM, drain)
    signal.signal(signal.SIGINT, drain)
    # A signal while the interpreter shuts down, after its handlers, would change the exit code.
    atexit.register(_ignore_signals_if_drained)
    _end_process = end


def _why(error: BaseException) -> str:
    """Return the reason for the operator; what Bytewax says of its store is for its authors."""
    store = re.search(r'SqliteFailure\(.*Some\("(.*)"\)', str(error))
    if store is not None:
        return (
            f"a failure of the recovery store: {store[1]}. See to its disk (is it full?), then "
            "restart the flow; the open epoch is computed again"
        )
    if type(error).__name__ == "PanicException" and FlowError.latest is not None:
        error = FlowError.latest
    return f"{type(error).__name__}: {error}"


def _ignore_signals_if_drained() -> None:
    if _drain.is_set():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_soon() -> None:
    """See to it that the process ends, if it is one that drains on signals."""
    if _end_process is not None:
        threading.Thread(target=_end_if_still_here, name="end", daemon=True).start()


def _end_if_still_here() -> None:
    time.sleep(_LINGER_S)
    logger.warning("drained %g s ago and still here: ending now", _LINGER_S)
    if _end_process is not None:
        _end_process()


def _leave_the_cluster() -> None:
    """End a process whose worker the engine never calls."""
    logger.info("all that read have drained; this process has no partitions, and ends")
    _leave.set()
    _end_soon()
    os.kill(os.getpid(), signal.SIGTERM)  # Python's handler runs in the main thread


@dataclass(frozen=True, slots=True)
class SourceTopic:
    """Name a topic, and the integer field of its JSON values that holds the stream time, in ms."""

    name: str
    stream_time: str


@dataclass(slots=True)
class SourceStats:
    """Count what a source has read. Written by worker threads, for anyone to look at.

    Attributes:
        read: records emitted, by topic.
        buffered: records read and not yet emitted.
        lag: records in the topics and not yet emitted, by (topic, partition); as of the last fetch.
        lag_s: seconds since the first of these was appended; while none of them has been fetched,
            since the last one emitted was, or since it is known that there are any; 0: none is.
        age_s: smallest age of the records emitted since the observation before, in seconds; if none
            was, `lag_s` of the partition furthest behind.
        newest_ms: when the broker appended the newest record emitted, by topic.
        busy_s: seconds in which the worker had something to do.
        throttled_s: seconds in which `rate_limit` held records back.
        epochs: epochs that are durable.
        snapshot_s: seconds for which the last epoch's snapshot stopped the worker.
        held_s: seconds spent waiting for a partition behind while others had rows.
        hold_timeouts: times such a partition was silent for too long, and was not waited for.
        skipped: records lost to retention and passed over, if that was allowed, by (topic,
            partition).
        outage_since: monotonic seconds since no broker can be reached; None: all is well.
        outages: outages that are over. `observe` is called with each before anything that came in
            it is emitted.
        rebuilding: whether records are still to come that only refill the windows.
    """

    read: dict[str, int] = field(default_factory=dict)
    buffered: int = 0
    lag: dict[tuple[str, int], int] = field(default_factory=dict)
    lag_s: dict[tuple[str, int], float] = field(default_factory=dict)
    age_s: float = 0.0
    newest_ms: dict[str, int] = field(default_factory=dict)
    busy_s: float = 0.0
    throttled_s: float = 0.0
    epochs: int = 0
    snapshot_s: float = 0.0
    held_s: float = 0.0
    hold_timeouts: int = 0
    skipped: dict[tuple[str, int], int] = field(default_factory=dict)
    outage_since: float | None = None
    outages: int = 0
    rebuilding: bool = False


#: Of a partition: the offset of the next record to emit; and while records are read again that an
#: earlier life has answered, ("rebuild", that, the offset of the first one that is to be answered).
PartState: TypeAlias = int | tuple[str, int, int]


class KafkaSource(FixedPartitionedSource[Records, PartState]):
    """Read several topics as one stream of `Records`, interleaved by stream time.

    Args:
        topics: their order is the priority of records with equal stream time, first wins; a
            record's ``source`` column is the index here. Names are recovery keys.
        config: librdkafka consumer settings, at least ``bootstrap.servers``; they go over
            `CONSUMER_DEFAULTS`. Offsets, isolation and end-of-partition settings are fixed.
        group_id: consumer group that the offsets of each durable snapshot are committed to.
        batch_size: most records per batch, or a function that says so before each batch.
        start: where a partition without a snapshot starts: at its first record, or at the end
            (``latest``; an earlier life that left no snapshot has told the group where that was);
            or (``rebuild``) as long before that place as `reach_ms` says, with the records before
            it marked as known.
        reach_ms: how far back in stream time what is made of the records reaches, for ``rebuild``.
        keep_offsets: False: every life starts at the end of the topics, whatever was read before:
            at most once.
        max_clock_skew_ms: a stream time further ahead of the broker's timestamp than this is not
            believed for ordering (one record from the year 3000 would hold up its partition);
            the record takes the stream time of the one before it.
        max_hold_s: how long a partition that is not at its end may be silent before the others
            stop waiting for it.
        buffer_records: most records buffered per partition (a tenth more for a moment); the
            whole buffer stays near 200 000 records however many partitions there are.
        resume_past_retention: if the records after a snapshot have been deleted by the topic's
            retention, go on with the first that is left, and count the gap. Default: refuse.
        stop_at_end: drain when every partition is at its end and all is emitted. For offline use
            and tests, in one process.
        epoch_interval_s: Bytewax's epoch interval, for phase keeping; None: estimated.
        phase_keeping: keep in phase with the other workers of a cluster (`dataflows.kafka.phase`).
        peers: the other processes of a cluster, to drain with them. None: each drains alone, and
            ends the others; nothing is lost, but who was not told within an epoch repeats one.
        rate_limit: (records a second, most at once) of each partition; None: as fast as can be.
        max_skew_ms: how far apart, in stream time, the processes of a cluster may be in a backlog;
            needs `peers`, see there. No epoch takes more of the stream than this.
        between_batches: called on the worker thread at each turn, every few milliseconds when
            idle; give it `dataflows.kafka.sink.poll_sinks`.
        observe: called with the `stats` on the worker thread, at most every 0.25 s, and with
            each epoch that has become durable.
        startup_timeout_s: bound of all look-ups at the start.

    Raises:
        StartupError: (when the flow starts) No broker answered, a topic does not exist, or the
            offset to go on from is no longer, or not yet, in the topic.
        SourceError: (when the flow runs) A partition or the consumer failed for good.
    """

    def __init__(
        self,
        topics: Sequence[SourceTopic],
        config: Mapping[str, Any],
        *,
        group_id: str,
        batch_size: int | Callable[[], int] = 1024,
        start: Literal["earliest", "latest", "rebuild"] = "earliest",
        reach_ms: int = 0,
        keep_offsets: bool = True,
        max_clock_skew_ms: int = 300_000,
        max_hold_s: float = 5.0,
        buffer_records: int = 20_000,
        resume_past_retention: bool = False,
        stop_at_end: bool = False,
        epoch_interval_s: float | None = None,
        phase_keeping: bool = True,
        peers: Peers | None = None,
        max_skew_ms: int = 6 * 3_600_000,
        rate_limit: tuple[float, float] | None = None,
        between_batches: Callable[[], None] | None = None,
        observe: Callable[[SourceStats], None] | None = None,
        startup_timeout_s: float = STARTUP_TIMEOUT_S,
    ) -> None:
        if not topics:
            raise ValueError("a Kafka source needs at least one topic")
        if start not in ("earliest", "latest", "rebuild"):
            raise ValueError(f"start is {start!r}; it must be 'earliest', 'latest' or 'rebuild'")
        self.topics = list(topics)
        self.stats = SourceStats(read={topic.name: 0 for topic in topics})
        self.config = {**CONSUMER_DEFAULTS, **config, **_GUARANTEES, "group.id": group_id}
        self.batch_size = batch_size if callable(batch_size) else lambda: batch_size
        self.start = start
        self.reach_ms = reach_ms
        self.keep_offsets = keep_offsets
        self.max_clock_skew_ms = max_clock_skew_ms
        self.max_hold_s = max_hold_s
        self.buffer_records = buffer_records
        self.resume_past_retention = resume_past_retention
        self.stop_at_end = stop_at_end
        self.epoch_interval_s = epoch_interval_s
        self.phase_keeping = phase_keeping
        self.peers = peers
        self.max_skew_ms = max_skew_ms
        self.rate_limit = rate_limit
        self.between_batches = between_batches
        self.observe = observe
        self.startup_timeout_s = startup_timeout_s
        self._readers: dict[int, _Reader] = {}
        self._watches = False

    def __repr__(self) -> str:
        # Bytewax writes step reprs to files and to its API: no configuration, it holds secrets.
        return f"KafkaSource({[topic.name for topic in self.topics]})"

    def list_parts(self) -> list[str]:
        """Look up the partitions of all topics. Those added later are seen after a restart."""
        thread = threading.get_ident()
        stale = self._readers.pop(thread, None)
        if stale is not None:
            stale.close()
        reader = self._readers[thread] = _Reader(self)
        if self.peers is not None and not self._watches:
            self._watches = True
            if self.peers.shared():
                self.peers.watch(request_drain, drain_requested, _leave_the_cluster)
            else:
                self.peers = None
                logger.warning(
                    "the processes of this cluster share no recovery directory: to drain them, "
                    "signal all within one epoch; one that is not ends with an error, and repeats "
                    "its last epoch when it is started again"
                )
        return reader.discover()

    def build_part(self, step_id: str, for_part: str, resume_state: PartState | None) -> _Part:
        """Build a part that goes on where it was."""
        return self._readers[threading.get_ident()].add(for_part, resume_state)


class _Part(StatefulSourcePartition[Records, PartState]):
    """One Kafka partition to Bytewax: an offset. The leader also speaks for the reader."""

    def __init__(self, name: str, reader: _Reader) -> None:
        self.name = name
        self._reader = reader

    def next_batch(self) -> list[Records]:
        return self._reader.turn(self)

    def next_awake(self) -> datetime | None:
        return self._reader.next_awake(self)

    def snapshot(self) -> PartState:
        return self._reader.snapshot(self)

    def close(self) -> None:
        self._reader.remove(self)


class _Lane:
    """A Kafka partition to the reader; its buffer and offsets are the `Interleaver`'s."""

    __slots__ = (
        "answer_from",
        "at_end_offset",
        "behind_since",
        "emitted_before",
        "high",
        "late_s",
        "name",
        "partition",
        "paused",
        "released_at",
        "resume_offset",
        "silent_s",
        "snapshots",
        "source",
        "topic",
        "topic_partition",
    )

    def __init__(
        self, name: str, topic: str, source: int, partition: int, resume_offset: int | None
    ) -> None:
        self.name = name
        self.topic = topic
        self.source = source
        self.partition = partition
        self.resume_offset = resume_offset
        self.answer_from = 0  # offset below which records are known
        self.topic_partition = TopicPartition(topic, partition)
        self.snapshots = 0
        self.at_end_offset = -1  # of the last end-of-partition event
        # Monotonic seconds: nothing was emitted since, or to come before; 0: not looked at.
        self.behind_since = 0.0
        self.emitted_before = -1  # offset, at the last observation
        self.late_s = 0.0  # age of the last record emitted, at `behind_since`
        self.high = -1  # end of the partition, when last asked while paused
        self.silent_s = 0.0  # how long the others have waited for this one
        self.released_at = -1  # `received` when waiting was given up
        self.paused = False


class _Reader:
    """Read all partitions of one worker thread, and speak for its parts.

    Life: `discover`, `add` for each part, then `turn` and `snapshot` until `remove` of the last.
    """

    def __init__(self, source: KafkaSource) -> None:
        self._source = source
        self._consumer = Consumer(
            {**source.config, "error_cb": self._on_error, "on_commit": self._on_commit},
            logger=logging.getLogger("librdkafka"),
        )
        self._listed = 0
        self._lanes: dict[str, _Lane] = {}
        self._parts = 0
        self._leader: _Lane | None = None
        self._phase: PhaseKeeper | None = None
        self._decoders = [_stream_time_decoder(topic.stream_time) for topic in source.topics]
        self._codes = {topic.name: code for code, topic in enumerate(source.topics)}
        self._epochs_seen = 0
        self._part_ahead = False
        self._drain_after: int | None = None
        # Latest stream time to emit in this epoch; None: the other workers have to be asked.
        self._horizon: int | None = _NO_LIMIT
        self._at_once = False
        self._empty_turns = 0
        self._last_turn = 0.0
        self._turn_began = 0.0
        self._gave = False  # whether the last turn returned records
        self._youngest_ms = math.inf  # age, since the last observation
        self._buckets: TokenBuckets | None = None
        # Per lane; None: no record that is still to come is known.
        self._answer_from: Int64s | None = None
        self._snapshot_began: float | None = None
        self._next_observation = 0.0
        self._next_outage_log = 0.0
        self._listen_at = 0.0
        self._paused_seen = 0
        self._next_commit_log = 0.0
        self._next_probe = 0.0
        self._committing = False

    # Start

    def discover(self) -> list[str]:
        source = self._source
        counts = partition_counts(
            self._consumer,
            source.config,
            self._codes,
            timeout_s=source.startup_timeout_s,
            role="source",
        )
        self._counts, self._listed = counts, sum(counts.values())
        return [
            part_name(topic, partition)
            for topic, count in counts.items()
            for partition in range(count)
        ]

    def add(self, name: str, resume_state: PartState | None) -> _Part:
        if self._leader is not None:
            raise SourceError(
                f"the engine built {name} after this worker began to read; this source knows "
                "Bytewax 0.21.1, which does not. Run with that version"
            )
        topic, _, partition = name.rpartition("/")
        answer_from = 0
        if isinstance(resume_state, tuple):
            _, resume_state, answer_from = resume_state
            if self._source.start != "rebuild":
                raise StartupError(
                    f"{name}: the windows are not rebuilt yet, {answer_from - resume_state} "
                    "records are still to be read again. Start with START_AT=rebuild until they are"
                )
        lane = _Lane(name, topic, self._codes[topic], int(partition), resume_state)
        lane.answer_from = answer_from
        self._lanes[name] = lane
        self._parts += 1
        return _Part(name, self)

    def _begin(self, leader: str) -> None:
        """Assign the consumer, at concrete offsets, and make `leader` the part that emits."""
        if leader != min(self._lanes):
            raise SourceError(f"the engine called {leader} before {min(self._lanes)}")
        self._leader = self._lanes[leader]
        # The order of lanes is the order of ties: topic priority, then partition.
        self._order = sorted(self._lanes.values(), key=lambda lane: (lane.source, lane.partition))
        self._index = {lane.name: index for index, lane in enumerate(self._order)}
        widest = max(lane.partition for lane in self._order) + 1
        self._table = np.full((len(self._codes), widest), -1, dtype=np.intp)
        for index, lane in enumerate(self._order):
            self._table[lane.source, lane.partition] = index
        deadline = time.monotonic() + self._source.startup_timeout_s
        offsets = self._start_offsets(deadline)
        self._merge = Interleaver([(lane.source, lane.partition) for lane in self._order], offsets)
        per_lane = max(1000, _BUFFER_ALL_PARTITIONS // len(self._order))
        self._most_buffered = min(self._source.buffer_records, per_lane)
        self._consumer.assign(
            [
                TopicPartition(lane.topic, lane.partition, offset)
                for lane, offset in zip(self._order, offsets, strict=True)
            ]
        )
        # A worker that has every partition has no others to keep in phase with.
        if self._source.phase_keeping and len(self._lanes) < self._listed:
            # A drain ends a sleep.
            self._phase = PhaseKeeper(self._source.epoch_interval_s, sleep=_drain.wait)
        if self._source.rate_limit is not None:
            self._buckets = TokenBuckets(len(self._order), *self._source.rate_limit)
        answer_from = np.array([lane.answer_from for lane in self._order], np.int64)
        if (answer_from > offsets).any():
            self._answer_from = answer_from
            self._source.stats.rebuilding = True
        self._last_turn = time.monotonic()
        self._observe()  # what was skipped, at least
        if self._source.peers is not None:
            self._source.peers.reads(self._leader.name)
            self._horizon = None
            self._wait_until = time.monotonic() + self._source.max_hold_s
        logger.info("reading %s", dict(zip(self._index, offsets, strict=True)))

    def _start_offsets(self, deadline: float) -> list[int]:
        source = self._source
        watermarks = [self._watermarks(lane, deadline) for lane in self._order]
        if not source.keep_offsets:
            return [high for _, high in watermarks]
        told: dict[str, int] = {}
        if source.start != "earliest" and any(lane.resume_offset is None for lane in self._order):
            told = self._tell_or_ask_the_group(watermarks, deadline)
        offsets = [
            self._start_offset(lane, told.get(lane.name), low, high)
            for lane, (low, high) in zip(self._order, watermarks, strict=True)
        ]
        if source.start == "rebuild" and all(lane.resume_offset is None for lane in self._order):
            for lane, offset in zip(self._order, offsets, strict=True):
                lane.answer_from = offset
            return self._offsets_to_rebuild_from(told, [low for low, _ in watermarks], deadline)
        return offsets

    def _offsets_to_rebuild_from(
        self, told: Mapping[str, int], low: Sequence[int], deadline: float
    ) -> list[int]:
        """Return where each lane begins, so that what is first answered finds its windows full.

        `told` has all partitions of which it is known where answering begins, other workers' too:
        what one of these answers first needs the windows that all have filled.
        """
        source = self._source
        unread = dict(told) | {lane.name: lane.answer_from for lane in self._order}
        now_ms = time.time() * 1000
        first_ms = first_unread_ms(source.config, unread, self._earliest_time, deadline)
        since_ms = max(0, int(min(first_ms, now_ms)) - source.reach_ms)
        found = offsets_since(
            self._consumer, [lane.topic_partition for lane in self._order], since_ms, deadline
        )
        since = datetime.fromtimestamp(since_ms / 1000, UTC).isoformat(" ", "seconds")
        offsets = []
        for lane, first, offset in zip(self._order, low, found, strict=True):
            begin = lane.answer_from if offset is None else min(offset, lane.answer_from)
            offsets.append(begin)
            if begin == first > 0:
                logger.warning(
                    "%s: records before offset %d were deleted by the topic's retention, and the "
                    "windows reach back to %s: those that reach further than this record are too "
                    "low, as after any start without state, until they have filled up",
                    lane.name,
                    first,
                    since,
                )
        again = sum(lane.answer_from - at for lane, at in zip(self._order, offsets, strict=True))
        logger.info(
            "rebuilding the windows from %s on: %d offsets are read again, and not answered",
            since,
            again,
        )
        return offsets

    def _earliest_time(self, message: Message) -> int:
        """Return the earlier of a record's timestamp and its stream time, in ms."""
        topic = message.topic()
        assert topic is not None
        code, append_time = self._codes[topic], message.timestamp()[1]
        at = int(_times(self._decoders[code], [message.value()])[0])
        return int(append_time if at == NO_TIME else min(append_time, at))

    def _tell_or_ask_the_group(
        self, watermarks: list[tuple[int, int]], deadline: float
    ) -> dict[str, int]:
        """Return where lanes without a snapshot begin, so that a crash before the first moves none.

        The end that the first life found is committed to the group, later lives ask for it.
        """
        new = [lane for lane in self._order if lane.resume_offset is None]
        bounds = {lane.name: both for lane, both in zip(self._order, watermarks, strict=True)}
        every = [
            TopicPartition(topic, n) for topic, count in self._counts.items() for n in range(count)
        ]
        try:
            found = self._consumer.committed(every, timeout=max(0.1, deadline - time.monotonic()))
            known = {part_name(at.topic, at.partition): at.offset for at in found if at.offset >= 0}
            # Of a topic that was read before, a partition without an offset has been added since.
            old = {lane.topic for lane in self._order if lane.resume_offset is not None}
            old |= {at.topic for at in found if at.offset >= 0 and at.metadata != _FIRST}
            offsets = [
                TopicPartition(
                    lane.topic,
                    lane.partition,
                    bounds[lane.name][lane.topic not in old],
                    metadata=_FIRST,
                )
                for lane in new
                if lane.name not in known
            ]
            if offsets:
                self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            raise StartupError(
                f"the group {self._source.config['group.id']!r} could not be asked, or told, where "
                f"to begin ({error.args[0].str()}): see to the brokers' group coordinator, or set "
                "START_AT=earliest"
            ) from error
        if offsets and self._source.start == "rebuild":
            logger.warning(
                "the group %r has no offset of %s: answering begins where %s now",
                self._source.config["group.id"],
                ", ".join(part_name(at.topic, at.partition) for at in offsets),
                "they end" if len(offsets) > 1 else "it ends",
            )
        return known | {part_name(at.topic, at.partition): at.offset for at in offsets}

    def _start_offset(self, lane: _Lane, told: int | None, low: int, high: int) -> int:
        offset = told if lane.resume_offset is None else lane.resume_offset
        if offset is None:
            return low
        if low <= offset <= high:
            return offset
        if offset < low and self._source.resume_past_retention:
            self._source.stats.skipped[lane.topic, lane.partition] = low - offset
            logger.error(
                "%s: %d records from offset %d on were deleted by the topic's retention before "
                "they were read; going on with offset %d, as RESUME_PAST_RETENTION allows",
                lane.name,
                low - offset,
                offset,
                low,
            )
            return low
        raise StartupError(_out_of_range(lane, offset, low, high))

    def _watermarks(self, lane: _Lane, deadline: float) -> tuple[int, int]:
        return watermarks(
            self._consumer,
            lane.topic,
            lane.partition,
            self._source.config.get("bootstrap.servers"),
            timeout_s=deadline - time.monotonic(),
        )

    # Run

    def turn(self, part: _Part) -> list[Records]:
        """Return what there is for the part to emit now: a batch, if it is the leader."""
        if self._leader is None:
            self._begin(part.name)
        leader = self._leader
        if leader is None or part.name != leader.name:
            return []
        if self._phase is not None:
            self._phase.turn()
        source = self._source
        now = time.monotonic()
        if self._gave:  # the turn, and all the work downstream
            paused_s = 0.0 if self._at_once else _PAUSE_S
            source.stats.busy_s += max(0.0, now - self._turn_began - paused_s)
            self._gave = False
        self._turn_began = now
        if source.between_batches is not None:
            source.between_batches()
        if leader.snapshots > self._epochs_seen:
            self._epoch_is_durable(leader.name, leader.snapshots)
        self._at_once = False
        if self._part_ahead:
            return []
        if _drain.is_set() and self._drain_after is None:
            self._drain_after = leader.snapshots
            if source.peers is not None:
                source.peers.drains(leader.name, leader.snapshots)
        if self._drain_after is not None:
            return []
        if now >= self._next_observation:
            self._observe()
        if source.stats.outage_since is not None:
            self._ask_for_brokers()
        records = self._read(max(1, source.batch_size()))
        known_below, self._answer_from = self._answer_from, self._still_to_rebuild()
        idle = records is None and not self._merge.buffered
        self._empty_turns = self._empty_turns + 1 if idle else 0
        if records is None:
            if source.stop_at_end and self._everything_emitted():
                self._drain_after = leader.snapshots
            return []
        if source.start == "rebuild":
            records = replace(records, known=self._known(records, known_below))
        for code, count in enumerate(np.bincount(records.source).tolist()):
            if count:
                source.stats.read[source.topics[code].name] += count
        self._youngest_ms = min(
            self._youngest_ms, time.time() * 1000 - float(records.append_time.max())
        )
        self._gave = True
        return [records]

    def _known(self, records: Records, below: Int64s | None) -> npt.NDArray[np.bool_]:
        """Tell which records an earlier life has answered; `below`: offset of each lane."""
        if below is None:
            return np.zeros(len(records), np.bool_)
        known: npt.NDArray[np.bool_] = (
            records.offset < below[self._table[records.source, records.partition]]
        )
        return known

    def _still_to_rebuild(self) -> Int64s | None:
        if self._answer_from is None or not all(map(self._is_rebuilt, range(len(self._order)))):
            return self._answer_from
        self._source.stats.rebuilding = False
        self._observe()
        logger.info("the windows are rebuilt: all that comes now is answered")
        return None

    def _is_rebuilt(self, index: int) -> bool:
        lane, merge = self._order[index], self._merge
        if merge.emitted[index] >= lane.answer_from:
            return True
        # After the last record there may be a transaction's marker, and nothing else.
        return not merge.buffered and lane.at_end_offset >= lane.answer_from

    def next_awake(self, part: _Part) -> datetime | None:
        if self._leader is None:
            return None
        if part.name != self._leader.name:
            return _NEVER
        if self._at_once:
            return datetime.now(UTC)
        # None: in a millisecond. A flow that has had nothing to do for a while looks less often.
        return datetime.now(UTC) + _DOZE if self._empty_turns > _DOZE_AFTER else None

    def snapshot(self, part: _Part) -> PartState:
        lane, leader = self._lanes[part.name], self._leader
        if leader is None:  # an epoch shorter than the start-up: `turn` comes first, so never
            raise SourceError(f"the engine snapshotted {part.name} before it was read")
        lane.snapshots += 1
        if self._snapshot_began is None:
            self._snapshot_began = time.monotonic()
        if lane is leader and self._source.peers is not None:
            self._say_where_it_begins(max(0, self._next_time()))
        if lane is leader and self._phase is not None:
            self._phase.snapshot()
        self._part_ahead = any(other.snapshots > leader.snapshots for other in self._lanes.values())
        index = self._index[part.name]
        emitted = int(self._merge.emitted[index])
        if self._answer_from is not None and emitted < self._answer_from[index]:
            return "rebuild", emitted, int(self._answer_from[index])
        return emitted

    def _epoch_is_durable(self, leader: str, epoch: int) -> None:
        behind = [lane.name for lane in self._order if lane.snapshots < epoch]
        if behind:
            raise SourceError(
                f"the engine began an epoch on {self._order[0].name} that {', '.join(behind)} has "
                "not reached; this source knows Bytewax 0.21.1, which does not. Run with that"
            )
        self._epochs_seen = epoch
        stats = self._source.stats
        stats.epochs += 1
        if self._snapshot_began is not None:
            stats.snapshot_s = time.monotonic() - self._snapshot_began
            self._snapshot_began = None
        self._observe()
        if self._source.peers is not None:
            self._horizon = None
        self._commit()
        if self._drain_after is None or epoch <= self._drain_after:
            return
        if _drain.is_set():
            _drained.set()
        peers, alone = self._source.peers, len(self._lanes) == self._listed
        if peers is not None:
            last = peers.last_epoch()
            if last is None or epoch <= last:
                return
            peers.stops(leader)
        elif not alone and epoch <= self._drain_after + 1:
            return  # others may have been told an epoch later
        self._await_commit()
        logger.info("drained")
        if peers is None and not alone and _drain.is_set() and _end_process is not None:
            # Who has not drained by now waits for this worker. Without a farewell, as
            # `AbortExecution` would send, it sees the connection close, and ends too.
            _end_process()
        if _drain.is_set():
            _end_soon()
        raise AbortExecution

    def _read(self, limit: int) -> Records | None:
        now = time.monotonic()
        elapsed_s, self._last_turn = min(now - self._last_turn, 0.5), now
        merge = self._merge
        if self._horizon is None:
            self._ask_the_others()
        # Rows that are here and may go come first: reading more would only fill the buffers.
        # Now and then all the same, for what only the client's callbacks tell: an outage.
        short = merge.ready < limit and not merge.release(limit, self._bound())
        if short or now >= self._listen_at:
            self._listen_at = now + _OBSERVE_EVERY_S
            want = min(max(2 * limit, 256), 10_000) if short else 1
            received = self._consumer.consume(want, 0)
            if received:
                self._accept(received)
                merge.release(limit, self._bound())
            # More may be waiting: do not let the engine cool down for a millisecond.
            self._at_once = len(received) == want
        if self._buckets is not None and self._answer_from is None:
            if merge.ready:
                limit = self._buckets.allowed(merge.next_lanes(limit))
            self._source.stats.throttled_s = self._buckets.throttled_s
        records = merge.take(limit)
        # Who may not emit does not wait for others, and has not looked for what they sent.
        if records is None and limit and (merge.buffered or self._source.peers is not None):
            self._give_up_on_silent_lanes(elapsed_s)
        self._pause_and_resume()
        return records

    def _accept(self, messages: list[Message]) -> None:
        events: list[Message] = []
        if any(map(Message.error, messages)):
            events = [message for message in messages if message.error()]
            messages = [message for message in messages if not message.error()]
        count = len(messages)
        if count:
            if self._source.stats.outage_since is not None:
                self._outage_is_over()
            partition = np.fromiter(map(Message.partition, messages), np.intp, count)
            if len(self._codes) == 1:
                code = np.zeros(count, np.intp)
            else:
                topics = map(Message.topic, messages)
                code = np.fromiter(map(self._codes.__getitem__, topics), np.intp, count)
            append_time = np.fromiter(
                map(itemgetter(1), map(Message.timestamp, messages)), np.int64, count
            )
            self._merge.push(
                messages,
                self._table[code, partition],
                np.fromiter(map(Message.offset, messages), np.int64, count),
                append_time,
                self._stream_times(messages, code, append_time),
            )
        for event in events:
            self._accept_event(event)

    def _stream_times(
        self, messages: list[Message], code: npt.NDArray[np.intp], append_time: Int64s
    ) -> Int64s:
        first = int(code[0])
        if (code == first).all():
            decode = self._decoders[first]
            times = _times(decode, list(map(Message.value, messages)))
        else:
            values = np.fromiter(map(Message.value, messages), object, len(messages))
            times = np.empty(len(messages), np.int64)
            for index in np.unique(code).tolist():
                rows = code == index
                times[rows] = _times(self._decoders[index], values[rows].tolist())
        believed = (times >= 0) & (times <= append_time + self._source.max_clock_skew_ms)
        return np.where(believed, times, NO_TIME)

    def _accept_event(self, event: Message) -> None:
        error = event.error()
        topic, partition, offset = event.topic(), event.partition(), event.offset()
        assert error is not None
        name = part_name(topic, partition) if topic is not None and partition is not None else ""
        lane = self._lanes.get(name)
        code = error.code()
        if code == KafkaError._PARTITION_EOF and lane is not None:
            lane.at_end_offset = offset or 0
            if self._source.stats.outage_since is not None:
                self._outage_is_over()
        elif code in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE) and lane:
            low, high = self._watermarks(lane, time.monotonic() + 5.0)
            received = int(self._merge.received[self._index[lane.name]])
            raise SourceError(_out_of_range(lane, received, low, high))
        elif code in (
            KafkaError.UNKNOWN_TOPIC_OR_PART,
            KafkaError._UNKNOWN_TOPIC,
            KafkaError._UNKNOWN_PARTITION,
        ):
            raise SourceError(
                f"{name or topic} no longer exists on the brokers ({error.str()}). Restore the "
                "topic, or start with a new recovery directory and other topics"
            )
        elif error.fatal() or not (error.retriable() or code < 0):
            if code == KafkaError.GROUP_AUTHORIZATION_FAILED:
                if self._source.keep_offsets:
                    self._on_commit(error, [])
                return  # reading does not need the group
            raise SourceError(
                f"reading {name or 'Kafka'} failed: {error.str()} ({error.name()}). "
                f"{access.not_allowed(error)}".rstrip()
            )
        else:
            self._log_outage(f"{name}: {error.str()}")

    # Order

    def _bound(self) -> tuple[int, int] | None:
        """Return the release bound of the lane furthest behind that has more to come."""
        if not any(self._merge.waiting):
            return None
        if self._horizon is None:
            return NO_TIME, -1
        latest = self._merge.latest
        limit = None if self._horizon == _NO_LIMIT else (self._horizon, len(self._order))
        # Lanes hold in the order of `bound`, so the first one that holds sets it.
        for index in np.argsort(latest, kind="stable").tolist():
            if self._holds(index):
                bound = self._merge.bound((index,))
                return bound if bound is None or limit is None else min(bound, limit)
        return limit

    def _next_time(self) -> int:
        """Return the stream time before which nothing more is to come from here, as of now.

        `NO_TIME`: not known yet; `_NO_LIMIT`: all partitions are at their end.
        """
        holding = [index for index in range(len(self._order)) if self._holds(index)]
        return min(self._merge.next_times(holding), default=_NO_LIMIT)

    def _say_where_it_begins(self, stream_time: int) -> None:
        peers, leader = self._source.peers, self._leader
        assert peers is not None and leader is not None
        peers.begins(leader.name, len(self._lanes), leader.snapshots, stream_time)

    def _ask_the_others(self) -> None:
        """Set how far to go in this epoch, if all workers have said where they begin it."""
        peers, leader = self._source.peers, self._leader
        assert peers is not None and leader is not None
        if not leader.snapshots:  # the first epoch: no snapshot has said it
            at = self._next_time()
            if at == NO_TIME and time.monotonic() < self._wait_until:
                return
            self._say_where_it_begins(max(0, at))
        slowest = peers.slowest(leader.snapshots, self._listed)
        if slowest is not None:
            self._horizon = min(slowest, _NO_LIMIT - self._source.max_skew_ms)
            self._horizon += self._source.max_skew_ms

    def _holds(self, index: int) -> bool:
        lane = self._order[index]
        received = int(self._merge.received[index])
        return received != lane.released_at and not self._at_end(lane, received)

    def _at_end(self, lane: _Lane, received: int) -> bool:
        # The event is what tells after a transaction: its marker is the last offset, not a record.
        if lane.at_end_offset >= received:
            return True
        found = self._consumer.get_watermark_offsets(lane.topic_partition, cached=True)
        return found is not None and 0 <= found[1] <= received

    def _give_up_on_silent_lanes(self, elapsed_s: float) -> None:
        """Stop waiting for lanes that have kept the others waiting for `max_hold_s`."""
        stats, merge = self._source.stats, self._merge
        stats.held_s += elapsed_s if merge.buffered else 0.0
        for index, lane in enumerate(self._order):
            if merge.waiting[index] or not self._holds(index):
                lane.silent_s = 0.0
                continue
            lane.silent_s += elapsed_s
            if lane.silent_s >= self._source.max_hold_s:
                lane.silent_s = 0.0
                lane.released_at = int(merge.received[index])
                stats.hold_timeouts += 1
                logger.warning(
                    "%s has more records but sent none for %.1f s; the others go on without it",
                    lane.name,
                    self._source.max_hold_s,
                )

    def _pause_and_resume(self) -> None:
        # Not `pause` and `resume`: after those, librdkafka 2.16 sends nothing for up to a second
        # (nobody wakes the broker's thread), and resumes at an offset of its own reckoning.
        for index, (lane, waiting) in enumerate(zip(self._order, self._merge.waiting, strict=True)):
            if not lane.paused and waiting >= self._most_buffered:
                self._consumer.incremental_unassign([lane.topic_partition])
                lane.paused = True
            elif lane.paused and waiting <= self._most_buffered // 2:
                received = int(self._merge.received[index])
                self._consumer.incremental_assign(
                    [TopicPartition(lane.topic, lane.partition, received)]
                )
                lane.paused = False

    def _everything_emitted(self) -> bool:
        received = self._merge.received.tolist()
        return not self._merge.buffered and all(
            self._at_end(lane, offset) for lane, offset in zip(self._order, received, strict=True)
        )

    # Tell

    def _observe(self) -> None:
        now, now_ms = time.monotonic(), time.time() * 1000
        self._next_observation = now + _OBSERVE_EVERY_S
        stats, merge = self._source.stats, self._merge
        stats.buffered = merge.buffered
        oldest, appended = merge.oldest().tolist(), merge.appended.tolist()
        self._look_at_a_paused_end()
        for index, lane in enumerate(self._order):
            of = lane.topic, lane.partition
            found = self._consumer.get_watermark_offsets(lane.topic_partition, cached=True)
            if found is not None and found[1] >= 0:
                nothing_here = oldest[index] < 0
                at_end = nothing_here and self._at_end(lane, int(merge.received[index]))
                high = max(found[1], lane.high)
                stats.lag[of] = 0 if at_end else max(0, high - int(merge.emitted[index]))
            if not stats.lag.get(of) or not lane.behind_since:
                lane.behind_since, lane.late_s = now, 0.0
            elif merge.emitted[index] != lane.emitted_before and appended[index] >= 0:
                lane.behind_since = now
                lane.late_s = max(0.0, (now_ms - appended[index]) / 1000)
            lane.emitted_before = int(merge.emitted[index])
            if oldest[index] >= 0:
                stats.lag_s[of] = max(0.0, (now_ms - oldest[index]) / 1000)
            else:
                stats.lag_s[of] = lane.late_s + now - lane.behind_since
            if appended[index] >= 0:
                newest_ms = max(stats.newest_ms.get(lane.topic, 0), appended[index])
                stats.newest_ms[lane.topic] = newest_ms
        if math.isinf(self._youngest_ms):
            stats.age_s = max(stats.lag_s.values())
        else:
            stats.age_s = max(0.0, self._youngest_ms / 1000)
        self._youngest_ms = math.inf
        if self._source.observe is not None:
            self._source.observe(stats)

    def _look_at_a_paused_end(self) -> None:
        """Ask for the end of one of the partitions that are paused: nothing else would tell of it.

        One round trip an observation, and none in an outage.
        """
        paused = [lane for lane in self._order if lane.paused]
        if not paused or self._source.stats.outage_since is not None:
            return
        self._paused_seen += 1
        lane = paused[self._paused_seen % len(paused)]
        with contextlib.suppress(KafkaException):  # the next observation asks another
            found = self._consumer.get_watermark_offsets(lane.topic_partition, timeout=_PROBE_S)
            if found is not None:
                lane.high = found[1]

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            raise SourceError(f"the Kafka consumer failed: {error.str()} ({error.name()})")
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            stats = self._source.stats
            if stats.outage_since is None:
                stats.outage_since = time.monotonic()
                self._next_probe = stats.outage_since  # it may have come late, and be over
            self._log_outage(error.str())

    def _log_outage(self, what: str) -> None:
        now = time.monotonic()
        if now >= self._next_outage_log:
            self._next_outage_log = now + _LOG_EVERY_S
            logger.warning("%s; waiting for the brokers", what)

    def _outage_is_over(self) -> None:
        stats = self._source.stats
        since, stats.outage_since = stats.outage_since, None
        if since is not None:
            stats.outages += 1
            self._observe()
            logger.warning("a broker answers again after %.1f s", time.monotonic() - since)

    def _ask_for_brokers(self) -> None:
        """See whether an outage is over: where nothing is sent or read, nothing else would tell."""
        now = time.monotonic()
        if now < self._next_probe:
            return
        try:
            self._consumer.list_topics(self._order[0].topic, timeout=_PROBE_S)
        except KafkaException:
            self._next_probe = time.monotonic() + _PROBE_EVERY_S
        else:
            self._outage_is_over()

    def _commit(self) -> None:
        if not self._source.keep_offsets:
            return
        offsets = [
            TopicPartition(lane.topic, lane.partition, max(int(offset), lane.answer_from))
            for lane, offset in zip(self._order, self._merge.emitted, strict=True)
        ]
        self._committing = True
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._on_commit(error.args[0], offsets)

    def _on_commit(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        del offsets
        self._committing = False
        now = time.monotonic()
        if error is not None and now >= self._next_commit_log:
            self._next_commit_log = now + _LOG_EVERY_S
            logger.warning(
                "the group %r was not told the offsets: %s. Lag tools show too much; the flow "
                "itself does not need them",
                self._source.config["group.id"],
                error.str().rstrip("."),
            )

    def _await_commit(self) -> None:
        deadline = time.monotonic() + _LAST_COMMIT_S
        while self._committing and time.monotonic() < deadline:
            self._consumer.poll(0.02)

    # Stop

    def remove(self, part: _Part) -> None:
        del part
        self._parts -= 1
        if not self._parts:
            self.close()

    def close(self) -> None:
        self._consumer.close()


def _stream_time_decoder(name: str) -> Callable[[bytes], Any]:
    record = msgspec.defstruct("StreamTime", [("ms", int)], rename={"ms": name}, gc=False)
    return msgspec.json.Decoder(record).decode


def _times(decode: Callable[[bytes], Any], values: list[Any]) -> Int64s:
    """Return the stream time of each value, in ms; `NO_TIME` where there is none."""
    try:
        return np.array([decode(value).ms for value in values], dtype=np.int64)
    except (*_NOT_DECODABLE, OverflowError):
        return np.array([_time(decode, value) for value in values], dtype=np.int64)


def _time(decode: Callable[[bytes], Any], value: Any) -> int:
    try:
        time_ms = int(decode(value).ms)
    except _NOT_DECODABLE:
        return NO_TIME
    return time_ms if 0 <= time_ms < 1 << 62 else NO_TIME


def _out_of_range(lane: _Lane, offset: int, low: int, high: int) -> str:
    if offset < low:
        return (
            f"{lane.name}: the next record to read has offset {offset}, but the broker has only "
            f"{low} to {high}: the topic's retention deleted {low - offset} unread records. Go on "
            "with RESUME_PAST_RETENTION=true (the gap is counted), or start with a new recovery "
            "directory; and make the retention longer than the longest stop"
        )
    return (
        f"{lane.name}: the next record to read has offset {offset}, but the broker has only {low} "
        f"to {high}: the topic was recreated, or lost records. Start with a new recovery directory"
    )
