"""Faust (faust-streaming): an agent, and a `Table` with the payments of each card.

https://faust-streaming.github.io/faust/userguide/tables.html
https://faust-streaming.github.io/faust/userguide/agents.html

    python -m benchmarks.peers.faust -L uvloop worker --without-web

Its windowed tables are of tumbling and hopping windows, which cannot tell the last hour as of an
event, so the table holds each card's payments, and is set anew after each as the guide asks. Events
are taken singly: with `Stream.take` the store would look every key up in the partition of the last
event taken. Durable: at least once, RocksDB (recommended in production) and a changelog topic,
offsets committed every 2.8 s (all defaults). With the C extensions, orjson and uvloop.
"""

from __future__ import annotations

from typing import Any

import faust

from benchmarks.peers.job import PARTITIONS, Job, advance, features

job = Job.from_environment()
score = job.scorer()
app = faust.App(
    job.group,
    broker=f"kafka://{job.brokers}",
    store="rocksdb://",
    datadir=str(job.state),
    topic_partitions=PARTITIONS,
    producer_linger=0.005,
)


class Event(faust.Record, serializer="json"):
    """A card payment."""

    transaction_id: str
    card_id: str
    terminal_id: str
    event_time: int
    amount: float


events = app.topic(job.source, key_type=str, value_type=Event)
predictions = app.topic(job.sink, key_type=str, value_serializer="json")
payments: Any = app.Table("payments", default=lambda: [[], []], partitions=PARTITIONS)


@app.agent(events)
async def predict(stream: Any) -> None:
    """Score each event."""
    async for event in stream:
        times, cents = payments[event.card_id]
        counts, sums = advance(times, cents, event.event_time, round(event.amount * 100))
        payments[event.card_id] = [times, cents]
        prediction = {
            "transaction_id": event.transaction_id,
            "card_id": event.card_id,
            "score": score([features(event.amount, counts, sums)])[0],
            "counts": counts,
        }
        await predictions.send(key=event.card_id, value=prediction)


if __name__ == "__main__":
    app.main()
