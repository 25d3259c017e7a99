"""Pathway: an interval join of the events with themselves, by card, then a reduction per event.

https://pathway.com/developers/user-guide/temporal-data/interval-join
https://pathway.com/developers/user-guide/deployment/persistence

`windowby(intervals_over(…))` has the right windows too, but joins each event with those of all
cards, whatever its `instance`. One join with the longest window serves all three. A behavior with a
`cutoff` would let it forget old events; but it reads a backlog's partitions so far apart that a
cutoff of an hour lost half of the answers (ran), so its memory grows. `max_backlog_size` makes it
answer as it goes; without, it answers all at the end, no sooner. The model is called by batch.
Durable: at least once, `persistence.Config` with a snapshot every 10 s.
"""

from __future__ import annotations

import pathway as pw

from benchmarks.peers.job import LONGEST_MS, WINDOWS_MS, Job, features


class Event(pw.Schema):
    """A card payment."""

    transaction_id: str
    card_id: str
    event_time: int
    amount: float


def main() -> None:
    """Score until killed."""
    job = Job.from_environment()
    score = job.scorer()

    @pw.udf(deterministic=True)
    def to_cents(amount: float) -> int:
        return round(amount * 100)

    @pw.udf(deterministic=True, max_batch_size=1000)
    def predict(
        amount: list[float], counts: list[tuple[int, ...]], cents: list[tuple[int, ...]]
    ) -> list[float]:
        return score([features(*each) for each in zip(amount, counts, cents, strict=True)])

    settings = {
        "bootstrap.servers": job.brokers,
        "group.id": job.group,
        "auto.offset.reset": "earliest",
    }
    events = pw.io.kafka.read(
        settings,
        job.source,
        schema=Event,
        format="json",
        name="events",
        autocommit_duration_ms=100,
        max_backlog_size=1000,
    )
    events = events.with_columns(cents=to_cents(pw.this.amount))
    others = events.copy()
    pairs = events.interval_join(
        others,
        events.event_time,
        others.event_time,
        pw.temporal.interval(1 - LONGEST_MS, 0),
        events.card_id == others.card_id,
    ).select(
        event=events.id,
        transaction_id=events.transaction_id,
        card_id=events.card_id,
        amount=events.amount,
        cents=others.cents,
        age_ms=events.event_time - others.event_time,
    )
    inside = {
        f"in_{n}": pw.if_else(pairs.age_ms < length, 1, 0) for n, length in enumerate(WINDOWS_MS)
    }
    pairs = pairs.with_columns(**inside)
    windows = pairs.groupby(id=pairs.event).reduce(
        transaction_id=pw.reducers.unique(pairs.transaction_id),
        card_id=pw.reducers.unique(pairs.card_id),
        amount=pw.reducers.unique(pairs.amount),
        **{f"count_{n}": pw.reducers.sum(pairs[f"in_{n}"]) for n in range(3)},
        **{f"cents_{n}": pw.reducers.sum(pairs[f"in_{n}"] * pairs.cents) for n in range(3)},
    )
    windows = windows.with_columns(
        counts=pw.make_tuple(*(windows[f"count_{n}"] for n in range(3))),
        cents=pw.make_tuple(*(windows[f"cents_{n}"] for n in range(3))),
    )
    predictions = windows.select(
        pw.this.transaction_id,
        pw.this.card_id,
        score=predict(pw.this.amount, pw.this.counts, pw.this.cents),
        counts=pw.this.counts,
    )
    pw.io.kafka.write(predictions, settings, job.sink, format="json", key=predictions.card_id)
    backend = pw.persistence.Backend.filesystem(job.state)
    pw.run(
        monitoring_level=pw.MonitoringLevel.NONE,
        persistence_config=pw.persistence.Config(backend, snapshot_interval_ms=10_000),
    )


if __name__ == "__main__":
    main()
