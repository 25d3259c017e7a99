"""The offline half: replay history through the very functions that the stream runs.

``python -m features.offline`` writes the training frame (one row a transaction, features as of
that transaction) and, with ``--state``, the window state by shard as of the end, from which a
flow goes on with the next event.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features import state_dir
from features.batch import Column, EventBatch
from features.declare import FeatureSet
from features.events import Event, column_kinds
from features.fraud import FRAUD, SOURCES, FraudReport, Transaction
from features.keys import group_by_shard
from features.profiles import PROFILES, point_in_time
from features.windows import SHARDS, Layout, WindowShards, WindowState, evaluate

CHUNK_ROWS = 65_536


class Replay:
    """Compute a feature set over batches in order of arrival; the stream's oracle.

    Feed it batches of any size: the answers depend only on the order of the events.
    """

    def __init__(
        self,
        features: FeatureSet,
        sources: Sequence[type[Event]],
        shards: int = SHARDS,
        *,
        start: state_dir.StateDir | None = None,
    ) -> None:
        self.features = features
        self.sources = tuple(sources)
        self.shards = shards
        layouts = [Layout.of(view, sources, shards) for view in features.views]
        self.views = [WindowShards(layout) for layout in layouts]
        for states in self.views:
            for shard in range(shards) if start else ():
                assert start is not None
                snapshot = start.read(states.layout.view.name, shard)
                if snapshot is not None:
                    states[shard] = WindowState.restore(states.layout, snapshot)

    def __call__(self, batch: EventBatch) -> EventBatch:
        """Return the batch's answered rows with all features as columns, in the same order.

        ``seq`` must ascend. O(windows) a row, amortised.
        """
        for states in self.views:
            grouped = group_by_shard(batch[states.layout.view.key], self.shards)
            batch = evaluate(states.layout, states.update(batch, *grouped))
        answered = batch["source"] == self.sources.index(self.features.of)
        return batch.take(answered)

    def snapshots(self) -> dict[str, dict[int, bytes]]:
        """Return the window state by view and shard, of the shards that hold any."""
        return {
            states.layout.view.name: {
                shard: states[shard].snapshot()
                for shard in range(self.shards)
                if states[shard].entities
            }
            for states in self.views
        }


def interleave(
    streams: Sequence[tuple[type[Event], Iterable[EventBatch]]], sources: Sequence[type[Event]]
) -> Iterator[EventBatch]:
    """Merge streams, each sorted by its stream time, into batches in order of arrival.

    At equal stream times the event type that comes first in `sources` goes first; within a
    stream the order is kept. Adds ``source`` and ``seq``. Memory: about a chunk of each stream.
    Raises ValueError if a stream is not sorted.
    """
    order = sorted(streams, key=lambda stream: sources.index(stream[0]))
    readers = [_Reader(event, iter(batches), sources.index(event)) for event, batches in order]
    seq = 0
    while True:
        for reader in readers:
            reader.fill()
        holding = [reader for reader in readers if reader.batch is not None]
        if not holding:
            return
        # Everything before the earliest of the chunks' ends has been read; at that very time, the
        # chunk that ends there may go on, so streams of lower priority have to wait.
        first = min(holding, key=lambda reader: (reader.last, reader.source))
        until, priority = first.last, first.source
        taken = [reader.take(until, reader.source <= priority) for reader in holding]
        parts = [part for part in taken if len(part)]
        times = np.concatenate([part["#stream_time"] for part in parts])
        merged = EventBatch.concat([align(part, sources) for part in parts])
        if len(parts) > 1:
            # Parts are in order of priority, so a stable sort settles ties.
            merged = merged.take(np.argsort(times, kind="stable"))
        yield merged.with_columns({"seq": np.arange(seq, seq + len(merged))})
        seq += len(merged)


class _Reader:
    """One stream's current chunk."""

    def __init__(self, event: type[Event], batches: Iterator[EventBatch], source: int) -> None:
        self.event, self.batches, self.source = event, batches, source
        self.batch: EventBatch | None = None
        self.newest = -(2**62)

    @property
    def last(self) -> int:
        assert self.batch is not None
        return int(self.batch["#stream_time"][-1])

    def fill(self) -> None:
        while self.batch is None:
            batch = next(self.batches, None)
            if batch is None:
                return
            if len(batch) == 0:
                continue
            times = batch[self.event.stream_time]
            if times[0] < self.newest or bool((np.diff(times) < 0).any()):
                raise ValueError(
                    f"{self.event.__name__} events are not sorted by {self.event.stream_time}; "
                    "sort them: a replay goes in order of arrival"
                )
            self.newest = int(times[-1])
            source = np.full(len(batch), self.source, np.uint8)
            self.batch = batch.with_columns({"source": source, "#stream_time": times})

    def take(self, until: int, inclusive: bool) -> EventBatch:
        assert self.batch is not None
        side: Literal["left", "right"] = "right" if inclusive else "left"
        n = int(np.searchsorted(self.batch["#stream_time"], until, side=side))
        taken, rest = self.batch.take(slice(0, n)), self.batch.take(slice(n, None))
        self.batch = rest if len(rest) else None
        return taken


def align(batch: EventBatch, sources: Sequence[type[Event]]) -> EventBatch:
    """Give a batch the columns of all event types; those that it lacks are blank."""
    kinds = {name: kind for event in sources for name, kind in column_kinds(event).items()}
    blank = {
        name: np.full(len(batch), np.nan) if kind == "number" else np.zeros(len(batch), dtype)
        for name, kind in kinds.items()
        if name not in batch
        for dtype in ["S1" if kind == "key" else np.int64]
    }
    columns = {name: batch[name] for name in batch if not name.startswith("#")}
    every = {**columns, **blank}
    return EventBatch({name: every[name] for name in sorted(every)})


def read_events(
    path: Path, event: type[Event], *, until: int | None = None, chunk_rows: int = CHUNK_ROWS
) -> Iterator[EventBatch]:
    """Read events from parquet, those with stream time < `until` (ms), in chunks.

    Columns are named as the event's fields; money ``x`` is stored as int64 ``x_cents``. The file
    must be sorted by stream time. Raises ValueError naming a column that is missing or has nulls.
    """
    kinds = column_kinds(event)
    stored = {name: f"{name}_cents" if kind == "money" else name for name, kind in kinds.items()}
    file = pq.ParquetFile(path)
    missing = sorted(set(stored.values()) - set(file.schema_arrow.names))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, which {event.__name__} events need")
    for record_batch in file.iter_batches(chunk_rows, columns=list(stored.values())):
        for name in stored.values():
            if record_batch.column(name).null_count:
                raise ValueError(f"{path}: column {name} has nulls; every event needs a value")
        columns = {
            name: _from_arrow(record_batch.column(stored[name]), kind)
            for name, kind in kinds.items()
        }
        batch = EventBatch(columns)
        if until is None:
            yield batch
            continue
        yield batch.take(batch[event.stream_time] < until)
        if batch[event.stream_time][-1] >= until:
            return


def _from_arrow(array: pa.Array, kind: str) -> Column:
    if kind == "key":
        binary = array.cast(pa.binary())
        return np.asarray(binary.to_numpy(zero_copy_only=False), dtype="S")
    dtype = np.float64 if kind == "number" else np.int64
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype)


def training_frame(batch: EventBatch, features: FeatureSet) -> pa.Table:
    """Return ids (string), event time (int64 ms) and all features (float64) in model order."""
    columns: dict[str, pa.Array] = {}
    for name, kind in column_kinds(features.of).items():
        if kind == "key":
            columns[name] = pa.array(batch[name].astype(object), pa.binary()).cast(pa.string())
    columns["event_time"] = pa.array(batch["event_time"])
    matrix = features.matrix(batch)
    for i, name in enumerate(features.names):
        columns[name] = pa.array(np.ascontiguousarray(matrix[:, i]))
    return pa.table(columns)


def parse_time(text: str) -> int:
    """Read ``2018-08-08``, ``2018-08-08T12:00:00`` (UTC) or milliseconds since the epoch.

    >>> parse_time("2018-08-08"), parse_time("1533686400000")
    (1533686400000, 1533686400000)
    """
    if text.isdigit() and len(text) > 8:
        return int(text)
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser("python -m features.offline", description=__doc__)
    parser.add_argument("--transactions", type=Path, required=True, metavar="F")
    parser.add_argument("--fraud-reports", type=Path, required=True, metavar="F")
    parser.add_argument("--out", type=Path, required=True, metavar="F", help="training frame")
    parser.add_argument(
        "--until", type=parse_time, metavar="T", help="end before this stream time (UTC)"
    )
    parser.add_argument("--state", type=Path, metavar="DIR", help="write the window state here")
    parser.add_argument("--shards", type=int, default=SHARDS, help="of the state (%(default)s)")
    parser.add_argument(
        "--profiles", type=Path, metavar="DIR", help="join the nightly profiles as of each event"
    )
    parser.add_argument("--chunk-rows", type=int, default=CHUNK_ROWS, help="(%(default)s)")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    replay = Replay(FRAUD, SOURCES, options.shards)
    reading = {"until": options.until, "chunk_rows": options.chunk_rows}
    streams: list[tuple[type[Event], Iterator[EventBatch]]] = [
        (Transaction, read_events(options.transactions, Transaction, **reading)),
        (FraudReport, read_events(options.fraud_reports, FraudReport, **reading)),
    ]
    counts = np.zeros(len(SOURCES), np.int64)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    building = options.out.with_name(options.out.name + ".building")
    newest = 0
    try:
        if options.state:
            state_dir.check_writable(options.state)
        writer = None
        for batch in interleave(streams, SOURCES):
            counts += np.bincount(batch["source"], minlength=len(SOURCES))
            table = training_frame(replay(batch), FRAUD)
            if options.profiles:
                table = _with_profiles(table, options.profiles)
            writer = writer or pq.ParquetWriter(building, table.schema)
            writer.write_table(table)
            newest = _newest(batch)
        if writer is None:
            print("features.offline: no event before --until", file=sys.stderr)
            return 1
        writer.close()
        building.rename(options.out)
        read = {s.__name__: int(n) for s, n in zip(SOURCES, counts, strict=True)}
        if options.state:
            until = newest + 1 if options.until is None else options.until
            manifest = state_dir.StateManifest(
                state_dir.FORMAT, FRAUD.name, FRAUD.schema_hash, options.shards, until, read
            )
            state_dir.write_state(options.state, manifest, replay.snapshots())
    except (ValueError, OSError) as error:
        print(f"features.offline: {error}", file=sys.stderr)
        return 1
    finally:
        building.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    print(f"{', '.join(f'{n:,} {name}' for name, n in read.items())} in {seconds:.1f} s")
    return 0


def _newest(batch: EventBatch) -> int:
    last = int(batch["source"][-1])
    return int(batch[SOURCES[last].stream_time][-1])


def _with_profiles(table: pa.Table, directory: Path) -> pa.Table:
    event_time = table["event_time"].to_numpy()
    for view in PROFILES:
        keys = _from_arrow(table[view.key].combine_chunks(), "key")
        values, age_ms = point_in_time(view, keys, event_time, directory)
        for i, name in enumerate(view.columns):
            table = table.append_column(name, pa.array(np.ascontiguousarray(values[:, i])))
        table = table.append_column(f"{view.name}__age_ms", pa.array(age_ms))
    return table


if __name__ == "__main__":
    sys.exit(main())
