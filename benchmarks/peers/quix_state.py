"""Quix Streams with its state API: a stateful function, RocksDB and a changelog topic.

https://quix.io/docs/quix-streams/advanced/stateful-processing.html
https://quix.io/docs/quix-streams/advanced/checkpointing.html

Its sliding windows (see `quix_sliding`) cost more; this is what its documentation has for state
that no window fits. Durable: at least once, changelog on, a checkpoint every 5 s (all defaults).
There is no step for many events at once, so the model is called for each.
"""

from __future__ import annotations

from typing import Any

from quixstreams import Application, State

from benchmarks.peers.job import Job, advance, features


def main() -> None:
    """Score until killed."""
    job = Job.from_environment()
    score = job.scorer()
    app = Application(
        broker_address=job.brokers,
        consumer_group=job.group,
        auto_offset_reset="earliest",
        state_dir=job.state,
    )

    def predict(event: dict[str, Any], state: State) -> dict[str, Any]:
        times, cents = state.get("payments", default=([], []))
        counts, sums = advance(times, cents, event["event_time"], round(event["amount"] * 100))
        state.set("payments", (times, cents))
        return {
            "transaction_id": event["transaction_id"],
            "card_id": event["card_id"],
            "score": score([features(event["amount"], counts, sums)])[0],
            "counts": counts,
        }

    events = app.dataframe(app.topic(job.source, value_deserializer="json"))
    predictions = events.apply(predict, stateful=True)
    predictions.to_topic(app.topic(job.sink, value_serializer="json"))
    app.run()


if __name__ == "__main__":
    main()
