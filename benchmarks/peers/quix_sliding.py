"""Quix Streams with its own sliding windows, one after the other.

https://quix.io/docs/quix-streams/windowing.html#time-based-sliding-windows

A window's result takes the event's place and the window's start becomes its time. `Latest` carries
the event and what the windows before have said through to the next, and `set_timestamp` sets the
time right again. Windows hold both their ends, hence 1 ms less. Sums are of floats. Durable: at
least once, a RocksDB store and a changelog topic for each window, a checkpoint every 5 s (all
defaults).
"""

from __future__ import annotations

from typing import Any

from quixstreams import Application
from quixstreams.dataframe.windows import Count, Latest, Mean, Sum

from benchmarks.peers.job import WINDOWS_MS, Job


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

    def carry(window: dict[str, Any]) -> dict[str, Any]:
        event = window["event"]
        before = event.get("windows", [])
        return {**event, "windows": [*before, [window["count"], window["sum"], window["mean"]]]}

    def predict(event: dict[str, Any]) -> dict[str, Any]:
        counts, sums, means = zip(*event["windows"], strict=True)
        return {
            "transaction_id": event["transaction_id"],
            "card_id": event["card_id"],
            "score": score([[event["amount"], *counts, *sums, *means]])[0],
            "counts": counts,
        }

    events = app.dataframe(app.topic(job.source, value_deserializer="json"))
    for length_ms in WINDOWS_MS:
        windows = events.sliding_window(duration_ms=length_ms - 1)
        aggregated = windows.agg(
            count=Count(), sum=Sum("amount"), mean=Mean("amount"), event=Latest()
        )
        events = aggregated.current().apply(carry)
        events = events.set_timestamp(lambda event, key, timestamp, headers: event["event_time"])
    events.apply(predict).to_topic(app.topic(job.sink, value_serializer="json"))
    app.run()


if __name__ == "__main__":
    main()
