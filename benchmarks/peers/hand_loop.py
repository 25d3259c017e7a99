"""A hand-written loop, as an experienced engineer writes it in plain Python.

Micro-batches from ``consume``, typed decoding, a deque and a running sum for each card and window,
one call of the model for the whole batch. Sums are of cents, so that they stay exact. Nothing is
durable: a restart begins with empty windows, at the group's last offset or at the beginning.
"""

from __future__ import annotations

from collections import deque

import msgspec
from confluent_kafka import Consumer, Producer

from benchmarks.peers.job import EAGER, MOST_OUTSTANDING, ROOM, WINDOWS_MS, Job, features


class Event(msgspec.Struct, gc=False):
    """A card payment."""

    transaction_id: str
    card_id: str
    terminal_id: str
    event_time: int
    amount: float


class Prediction(msgspec.Struct, gc=False):
    """What is written for each event."""

    transaction_id: str
    card_id: str
    score: float
    counts: list[int]


class Window:
    """The payments of one card in (now − length, now], their cents summed."""

    __slots__ = ("cents", "length_ms", "payments")

    def __init__(self, length_ms: int) -> None:
        self.length_ms = length_ms
        self.payments: deque[tuple[int, int]] = deque()
        self.cents = 0

    def add(self, at_ms: int, cents: int) -> None:
        """Take a payment in; forget those that have left. Payments come in order."""
        payments = self.payments
        payments.append((at_ms, cents))
        total = self.cents + cents
        start = at_ms - self.length_ms
        while payments[0][0] <= start:
            total -= payments.popleft()[1]
        self.cents = total


def main() -> None:
    """Score until killed."""
    job = Job.from_environment()
    score = job.scorer()
    consumer = Consumer(
        {
            "bootstrap.servers": job.brokers,
            "group.id": job.group,
            "auto.offset.reset": "earliest",
            **EAGER,
        }
    )
    consumer.subscribe([job.source])
    producer = Producer({"bootstrap.servers": job.brokers, "linger.ms": 5, **ROOM})
    decode = msgspec.json.Decoder(Event).decode
    encode = msgspec.json.Encoder().encode
    produce, sink = producer.produce, job.sink
    cards: dict[str, list[Window]] = {}
    while True:
        events, rows = [], []
        for message in consumer.consume(1000, 0.1):
            if message.error() is not None:
                continue
            event = decode(message.value())
            windows = cards.get(event.card_id)
            if windows is None:
                windows = cards[event.card_id] = [Window(length) for length in WINDOWS_MS]
            cents = round(event.amount * 100)
            for window in windows:
                window.add(event.event_time, cents)
            counts = [len(window.payments) for window in windows]
            totals = [window.cents for window in windows]
            events.append((event, counts))
            rows.append(features(event.amount, counts, totals))
        if not rows:
            continue
        for (event, counts), probability in zip(events, score(rows), strict=True):
            prediction = Prediction(event.transaction_id, event.card_id, probability, counts)
            produce(sink, encode(prediction), event.card_id)
        producer.poll(0)
        while len(producer) > MOST_OUTSTANDING:
            producer.poll(0.01)


if __name__ == "__main__":
    main()
