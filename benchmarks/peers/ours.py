"""The job on this project's core: what another use than fraud takes.

    python -m bytewax.run benchmarks.peers.ours -r DIR -s 10 -b 0

Source, decoding, windows, scoring and sink are the project's; only the declarations and the form
of the prediction are the job's. Durable: at least once, window state and offsets in a snapshot
every 10 s, every delivery report checked, bad records to a dead-letter topic.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import bytewax.operators as op
import msgspec
from bytewax.dataflow import Dataflow, Stream, operator

from benchmarks.peers.job import Job
from dataflows import recovery
from dataflows.kafka.records import OutRecords
from dataflows.kafka.sink import KafkaSink, output, poll_sinks
from dataflows.kafka.source import KafkaSource, SourceTopic, install_drain_handlers
from dataflows.steps.decode import decode
from dataflows.steps.score import score
from dataflows.steps.windows import Shards, windows
from features.batch import EventBatch
from features.declare import Count, FeatureSet, FeatureView, Mean, Sum, Value
from features.events import Event, EventDecoder, EventTime, Key, Money
from features.windows import SHARDS
from model.scorer import Scorer


class Payment(Event):
    """A card payment."""

    identity: ClassVar[str | None] = "transaction_id"

    transaction_id: Key
    card_id: Key
    terminal_id: Key
    event_time: EventTime
    amount: Money


WINDOWS = ("10m", "30m", "1h")
CARD = FeatureView(
    "card",
    key="card_id",
    of=Payment,
    features=[Count(over=WINDOWS), Sum("amount", over=WINDOWS), Mean("amount", over=WINDOWS)],
)
FEATURES = FeatureSet("peers", of=Payment, features=[Value("amount"), CARD])


class Prediction(msgspec.Struct, gc=False):
    """What is written for each event."""

    transaction_id: str
    card_id: str
    score: float
    counts: tuple[int, int, int]


@operator
def encode(step_id: str, up: Stream[EventBatch]) -> Stream[OutRecords]:
    """Write each event's prediction as JSON, keyed by card."""
    encoder = msgspec.json.Encoder()

    def run(batches: list[EventBatch]) -> Iterable[OutRecords]:
        for batch in batches:
            counts = (batch[f"card_count_{window}"].astype(int).tolist() for window in WINDOWS)
            predictions = map(
                Prediction,
                map(bytes.decode, batch["transaction_id"].tolist()),
                map(bytes.decode, batch["card_id"].tolist()),
                batch["score"].tolist(),
                zip(*counts, strict=True),
            )
            yield OutRecords(
                keys=batch["card_id"].tolist(),
                values=list(map(encoder.encode, predictions)),
                append_time=batch["append_time"],
                event_ids=batch["transaction_id"].tolist(),
            )

    return op.flat_map_batch("encode", up, run)


def flow() -> Dataflow:
    """Lay the graph; ``bytewax.run`` calls this."""
    job = Job.from_environment()
    clients = {"bootstrap.servers": job.brokers}
    scorer = Scorer.load(job.package, names=FEATURES.names, schema_hash=FEATURES.schema_hash)
    store = recovery.open_store("peers", "at_least_once")
    install_drain_handlers()
    source = KafkaSource(
        [SourceTopic(job.source, Payment.stream_time)],
        clients,
        group_id=job.group,
        between_batches=poll_sinks,
    )
    graph = Dataflow("peers")
    records = op.input("records", graph, source)
    events = decode("decode", records, EventDecoder([Payment]), [job.source])
    card = windows(
        "card", events.accepted, CARD, [Payment], Shards(SHARDS, journal=store is not None)
    )
    scored = score("score", card, FEATURES, scorer, scorer.manifest.thresholds, reasons=0)
    too_large = output("predictions", encode("encode", scored), KafkaSink(job.sink, clients))
    refused = op.merge("refused", events.refused, too_large)
    output("dead_letters", refused, KafkaSink(f"{job.sink}_dead", clients))
    return graph
