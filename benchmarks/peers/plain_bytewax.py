"""Bytewax as its documentation shows it: built-in Kafka operators, `stateful_map` per card.

    python -m bytewax.run benchmarks.peers.plain_bytewax -r DIR -s 10 -b 0

https://docs.bytewax.io/stable/guide/concepts/kafka.html
https://docs.bytewax.io/stable/guide/concepts/recovery.html
https://docs.bytewax.io/stable/tutorials/recoverable-shopping-cart/index.html

Its own windows emit when they close, not for each event, so the windows are the mapper's. The model
is called by batch (`flat_map_batch`). Durable: state and offsets are in a snapshot every 10 s; but
the built-in sink does not look at delivery reports.
"""

from __future__ import annotations

from collections.abc import Iterable

import bytewax.connectors.kafka.operators as kop
import bytewax.operators as op
import msgspec
from bytewax.connectors.kafka import KafkaSinkMessage, KafkaSourceMessage
from bytewax.dataflow import Dataflow
from bytewax.recovery import init_db_dir

from benchmarks.peers.hand_loop import Event, Prediction
from benchmarks.peers.job import Job, advance, features

#: The payments of a card: times (ms) and amounts (cents).
State = tuple[list[int], list[int]]
Windowed = tuple[Event, list[int], list[int]]


def flow() -> Dataflow:
    """Lay the graph; ``bytewax.run`` calls this."""
    job = Job.from_environment()
    init_db_dir(job.state, 1)
    score = job.scorer()
    read = msgspec.json.Decoder(Event).decode
    write = msgspec.json.Encoder().encode

    def decode(message: KafkaSourceMessage[bytes, bytes]) -> tuple[str, Event]:
        event = read(message.value)
        return event.card_id, event

    def windows(state: State | None, event: Event) -> tuple[State, Windowed]:
        times, cents = state = state or ([], [])
        counts, sums = advance(times, cents, event.event_time, round(event.amount * 100))
        return state, (event, counts, sums)

    def predict(items: list[tuple[str, Windowed]]) -> Iterable[KafkaSinkMessage[bytes, bytes]]:
        rows = [features(event.amount, counts, sums) for _, (event, counts, sums) in items]
        for (card, (event, counts, _)), probability in zip(items, score(rows), strict=True):
            prediction = Prediction(event.transaction_id, card, probability, counts)
            yield KafkaSinkMessage(card.encode(), write(prediction))

    graph = Dataflow("plain_bytewax")
    records = kop.input("records", graph, brokers=[job.brokers], topics=[job.source])
    by_card = op.map("decode", records.oks, decode)
    windowed = op.stateful_map("windows", by_card, windows)
    predictions = op.flat_map_batch("score", windowed, predict)
    kop.output("predictions", predictions, brokers=[job.brokers], topic=job.sink)
    return graph
