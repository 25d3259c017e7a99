"""Is what the stream computed what the offline replay computes? Per feature, bit for bit.

    python -m features.parity --audit kafka:audit \\
        --transactions kafka:transactions --fraud-reports kafka:fraud_reports --state DIR

Audit records carry the feature vectors that the model saw. Their events, from topics or from
parquet, are replayed offline and the two compared. Exit code 0: all equal; 1: some value differs
or is missing; 2: it could not be told.

An event that arrived late was answered before earlier ones were known; a replay in order of
stream time knows them. With events from topics, the broker's append times tell: a value that
differs from the replay by stream time but equals the replay by append time is counted as *late*,
not as a mismatch.

Topics are read by another program, by default this project's ``python -m dataflows.kafka.read``,
because nothing in this package knows Kafka.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from features.batch import Column, EventBatch
from features.declare import FeatureSet
from features.events import Event, EventDecoder
from features.fraud import FRAUD, SOURCES, FraudReport, Transaction
from features.offline import CHUNK_ROWS, Replay, align, interleave, parse_time, read_events
from features.state_dir import StateDir
from features.windows import SHARDS

KAFKA = "kafka:"


class Audited(msgspec.Struct):
    """The part of an audit record that is compared."""

    transaction_id: str
    card_id: str
    partition: int
    offset: int
    schema_hash: str
    features: dict[str, float | None]


class _Record(msgspec.Struct):
    """A line of the topic reader's output."""

    partition: int
    offset: int
    append_time: int
    value: bytes | None  # base64 in JSON


@dataclass(frozen=True)
class FeatureParity:
    """How one feature compares, in numbers of values."""

    name: str
    compared: int
    mismatched: int
    missing: int
    late: int
    #: Largest |online − offline| among mismatches; infinity if one of the two was missing (NaN).
    largest_difference: float


def compare(
    names: Sequence[str],
    online: npt.NDArray[np.float64],
    offline: npt.NDArray[np.float64],
    by_arrival: npt.NDArray[np.float64] | None = None,
    missing: int = 0,
) -> list[FeatureParity]:
    """Compare feature matrices of the same rows, float64 (rows, features); NaN equals NaN.

    Args:
        names: the features, in column order.
        online: what the stream computed.
        offline: the replay in order of stream time.
        by_arrival: the replay in order of arrival, which explains late events.
        missing: rows that the stream should have and has not.

    >>> a, b = np.array([[1.0, np.nan]]), np.array([[1.5, np.nan]])
    >>> [(f.name, f.mismatched, f.largest_difference) for f in compare(["x", "y"], a, b)]
    [('x', 1, 0.5), ('y', 0, 0.0)]
    """
    different = _different(online, offline)
    late = np.zeros_like(different)
    if by_arrival is not None:
        late = different & ~_different(online, by_arrival)
    wrong = different & ~late
    distance = np.abs(online - offline)
    distance[np.isnan(distance)] = np.inf
    return [
        FeatureParity(
            name,
            len(online),
            int(wrong[:, i].sum()),
            missing,
            int(late[:, i].sum()),
            float(distance[wrong[:, i], i].max(initial=0.0)),
        )
        for i, name in enumerate(names)
    ]


def _different(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Compare bits, so that −0.0 is not 0.0; any NaN equals any other."""
    same: npt.NDArray[np.bool_] = a.view(np.int64) == b.view(np.int64)
    return ~(same | (np.isnan(a) & np.isnan(b)))


def vectors(features: FeatureSet, audited: Sequence[Audited]) -> npt.NDArray[np.float64]:
    """Return audited feature vectors in model order, null as NaN.

    Raises ValueError for a record of another schema, or without one of the features.
    """
    for record in audited:
        if record.schema_hash != features.schema_hash:
            raise ValueError(
                f"transaction {record.transaction_id} was audited with schema "
                f"{record.schema_hash}, this version has {features.schema_hash}; run the version "
                "that wrote it"
            )
    out = np.empty((len(audited), len(features.names)))
    for i, record in enumerate(audited):
        for j, name in enumerate(features.names):
            if name not in record.features:
                raise ValueError(f"the audit of {record.transaction_id} lacks {name}")
            value = record.features[name]
            out[i, j] = np.nan if value is None else value
    return out


@dataclass(frozen=True)
class Events:
    """The events of one type, with what is known of their way through Kafka."""

    event: type[Event]
    batch: EventBatch  # columns of the event type, and partition, offset, append_time
    from_topic: bool

    def by_stream_time(self) -> npt.NDArray[np.int64]:
        """Return the key that the flow interleaves by: within a partition it never falls."""
        times = self.batch[self.event.stream_time].copy()
        for partition in np.unique(self.batch["partition"]):
            rows = self.batch["partition"] == partition
            times[rows] = np.maximum.accumulate(times[rows])
        return times


def replay(
    features: FeatureSet,
    events: Sequence[Events],
    sources: Sequence[type[Event]],
    *,
    shards: int = SHARDS,
    start: StateDir | None = None,
    by_arrival: bool = False,
) -> EventBatch:
    """Replay events by stream time, or by append time, and return the answered rows.

    Events of one partition stay in order. At equal times `sources` gives the priority.
    """
    parts, times = [], []
    for each in sorted(events, key=lambda e: sources.index(e.event)):
        source = np.full(len(each.batch), sources.index(each.event), np.uint8)
        order = np.lexsort((each.batch["offset"], each.batch["partition"]))
        ordered = Events(each.event, each.batch.take(order), each.from_topic)
        parts.append(align(ordered.batch.with_columns({"source": source}), sources))
        times.append(ordered.batch["append_time"] if by_arrival else ordered.by_stream_time())
    everything = EventBatch.concat(parts).take(np.argsort(np.concatenate(times), kind="stable"))
    everything = everything.with_columns({"seq": np.arange(len(everything))})
    run = Replay(features, sources, shards, start=start)
    answers = [
        run(everything.take(slice(at, at + CHUNK_ROWS)))
        for at in range(0, len(everything), CHUNK_ROWS)
    ]
    return EventBatch.concat(answers)


def read_audit(source: str, reader: Sequence[str]) -> list[Audited]:
    """Read audit records from ``kafka:TOPIC`` or from a file of JSON lines."""
    decode = msgspec.json.Decoder(Audited).decode
    if source.startswith(KAFKA):
        return [decode(r.value) for r in _read_topic(source, reader) if r.value is not None]
    return [decode(line) for line in Path(source).read_bytes().splitlines() if line]


def read(
    source: str,
    event: type[Event],
    reader: Sequence[str],
    until: int | None,
    **limits: int,
) -> Events:
    """Read events from ``kafka:TOPIC``, or from parquet.

    `limits` are EventDecoder's; give the flow's, so that what it refused is refused here.
    """
    if not source.startswith(KAFKA):
        batches = list(
            interleave([(event, read_events(Path(source), event, until=until))], [event])
        )
        batch = EventBatch.concat(batches)
        n = len(batch)
        place: dict[str, Column] = {"partition": np.zeros(n, np.int32), "offset": np.arange(n)}
        return Events(event, batch.with_columns({**place, "append_time": np.arange(n)}), False)
    records = list(_read_topic(source, reader))
    append_time = np.array([record.append_time for record in records], np.int64)
    decoded = EventDecoder([event], **limits)(
        [record.value for record in records], np.zeros(len(records), np.uint8), append_time
    )
    rows = decoded.rows
    place = {
        "partition": np.array([record.partition for record in records], np.int32)[rows],
        "offset": np.array([record.offset for record in records], np.int64)[rows],
        "append_time": append_time[rows],
    }
    batch = decoded.events.with_columns(place)
    if until is not None:
        batch = batch.take(batch[event.stream_time] < until)
    return Events(event, batch, True)


def _read_topic(source: str, reader: Sequence[str]) -> Iterator[_Record]:
    command = [*reader, source.removeprefix(KAFKA)]
    decode = msgspec.json.Decoder(_Record).decode
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield decode(line)
    if process.returncode:
        raise ValueError(f"{' '.join(command)} failed with exit code {process.returncode}")


def audit(
    audited: Sequence[Audited],
    events: Mapping[type[Event], Events],
    *,
    features: FeatureSet = FRAUD,
    sources: Sequence[type[Event]] = SOURCES,
    shards: int = SHARDS,
    start: StateDir | None = None,
) -> list[FeatureParity]:
    """Compare audit records with a replay of the events; a record seen twice is compared twice.

    Missing are events of the audited keys, up to the last one audited, without a record. Raises
    ValueError if an audit record's event is not among the events.
    """
    inputs = list(events.values())
    asked = events[features.of]
    straight = replay(features, inputs, sources, shards=shards, start=start)
    position = {identity: row for row, identity in enumerate(_identities(straight, asked))}
    rows = []
    for record in audited:
        identity: object = (record.partition, record.offset)
        if not asked.from_topic:
            identity = record.transaction_id.encode()
        if identity not in position:
            raise ValueError(
                f"transaction {record.transaction_id} ({record.partition}/{record.offset}) was "
                "audited, but is not among the events given; give the events the flow read"
            )
        rows.append(position[identity])
    expected = features.matrix(straight)[rows]
    arrival = None
    if all(each.from_topic for each in inputs):
        late = replay(features, inputs, sources, shards=shards, start=start, by_arrival=True)
        where = {identity: row for row, identity in enumerate(_identities(late, asked))}
        order = [where[identity] for identity in _identities(straight, asked)]
        arrival = features.matrix(late)[order][rows]
    cards = {record.card_id.encode() for record in audited}
    unseen = set(range(max(rows, default=-1) + 1)) - set(rows)
    missing = sum(bytes(straight["card_id"][row]) in cards for row in unseen)
    return compare(features.names, vectors(features, audited), expected, arrival, missing)


def _identities(batch: EventBatch, events: Events) -> list[object]:
    if events.from_topic:
        return list(zip(batch["partition"].tolist(), batch["offset"].tolist(), strict=True))
    return list(batch["transaction_id"].tolist())


def table(results: Sequence[FeatureParity]) -> Table:
    """Return the comparison as a table."""
    out = Table()
    out.add_column("feature", no_wrap=True)
    for heading in ("compared", "mismatched", "missing", "late", "largest diff."):
        out.add_column(heading, justify="right")
    for r in results:
        style = "bold red" if r.mismatched or r.missing else None
        counts = [f"{n:,}" for n in (r.compared, r.mismatched, r.missing, r.late)]
        out.add_row(r.name, *counts, f"{r.largest_difference:g}", style=style)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        "python -m features.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = {"required": True, "metavar": "SOURCE"}
    parser.add_argument("--audit", help="kafka:TOPIC or a file of JSON lines", **source)  # type: ignore[arg-type]
    parser.add_argument("--transactions", help="kafka:TOPIC or parquet", **source)  # type: ignore[arg-type]
    parser.add_argument("--fraud-reports", help="kafka:TOPIC or parquet", **source)  # type: ignore[arg-type]
    parser.add_argument("--state", type=Path, help="window state that the flow started from")
    parser.add_argument("--shards", type=int, default=SHARDS, help="of the flow (%(default)s)")
    parser.add_argument("--until", type=parse_time, help="ignore events from this stream time on")
    parser.add_argument(
        "--max-clock-skew-s", type=float, default=300, help="of the flow (%(default)s)"
    )
    parser.add_argument("--max-event-bytes", type=int, default=65_536, help="(%(default)s)")
    parser.add_argument(
        "--reader",
        default=f"{sys.executable} -m dataflows.kafka.read",
        help="command that prints a topic's records as JSON lines (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    reader = options.reader.split()
    limits = {
        "max_clock_skew_ms": round(options.max_clock_skew_s * 1000),
        "max_bytes": options.max_event_bytes,
    }
    try:
        start = StateDir(options.state, FRAUD, options.shards) if options.state else None
        results = audit(
            read_audit(options.audit, reader),
            {
                Transaction: read(
                    options.transactions, Transaction, reader, options.until, **limits
                ),
                FraudReport: read(
                    options.fraud_reports, FraudReport, reader, options.until, **limits
                ),
            },
            shards=options.shards,
            start=start,
        )
    except (ValueError, OSError) as error:
        print(f"features.parity: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([msgspec.to_builtins(result) for result in results], indent=2))
    else:
        Console().print(table(results))
    if results[0].compared == 0:
        print("features.parity: there is no audit record to compare", file=sys.stderr)
        return 2
    return 1 if any(result.mismatched or result.missing for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
