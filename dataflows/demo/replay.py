"""The world that the flow listens to: transactions and fraud reports, replayed onto Kafka.

Its own process, so that nothing on the screen delays it. It reads only what the stream carries:
label and scenario stay in the parquet file. It sends everything up to the first transaction,
waits for the line ``go`` on its standard input, then keeps its rate whatever the flow does (open
loop), until the time is up, the data ends or its standard input closes. With --now it waits for
nothing and leaves its standard input alone. What it has sent so far goes to standard output, one
JSON line at a time.
"""

from __future__ import annotations

import argparse
import random
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from confluent_kafka import Producer

from features.batch import EventBatch
from features.events import MONEY_SCALE, Event
from features.fraud import SOURCES, FraudReport, Transaction
from features.offline import interleave, read_events

TRANSACTIONS, FRAUD_REPORTS = "transactions", "fraud_reports"
FILES: Mapping[type[Event], str] = {
    Transaction: "transactions.parquet",
    FraudReport: "fraud_reports.parquet",
}
# The embedded broker answers a fetch with one record batch: few and large ones, then.
PRODUCER: Mapping[str, Any] = {
    "linger.ms": 5,
    "compression.type": "lz4",
    "partitioner": "murmur2_random",
}
SLICE_S = 0.005
SAY_EVERY_S = 0.2


class Sent(msgspec.Struct):
    """What has been sent so far."""

    transactions: int = 0
    fraud_reports: int = 0
    #: Of the transactions, those that no flow should accept.
    bad: int = 0
    #: Of the last event, ms; 0 before any.
    stream_time: int = 0
    replayed_s: float = 0.0
    done: bool = False

    @property
    def events(self) -> int:
        return self.transactions + self.fraud_reports


def events(handbook: Path, start: int, until: int | None = None) -> Iterator[EventBatch]:
    """Read both streams in order of arrival, stream times in [start, until), ms."""

    def later(event: type[Event]) -> Iterator[EventBatch]:
        for batch in read_events(handbook / FILES[event], event, until=until):
            times = batch[event.stream_time]
            if len(times) and times[-1] >= start:
                yield batch.take(times >= start)

    return interleave([(event, later(event)) for event in SOURCES], SOURCES)


class _Record(NamedTuple):
    topic: str
    stream_time: int
    key: bytes
    value: bytes
    bad: bool = False


def _records(batches: Iterator[EventBatch], bad_share: float) -> Iterator[_Record]:
    encode = msgspec.json.encode
    chance = random.Random(0)
    for batch in batches:
        asking = (batch["source"] == SOURCES.index(Transaction)).tolist()
        ids, cards, terminals = (
            np.char.decode(batch[name]).tolist()
            for name in ("transaction_id", "card_id", "terminal_id")
        )
        event_times, report_times = batch["event_time"].tolist(), batch["report_time"].tolist()
        amounts = (batch["amount"] / MONEY_SCALE).tolist()
        for i, is_transaction in enumerate(asking):
            if not is_transaction:
                report = FraudReport(ids[i], terminals[i], event_times[i], report_times[i])
                yield _Record(FRAUD_REPORTS, report_times[i], terminals[i].encode(), encode(report))
                continue
            event = Transaction(ids[i], cards[i], terminals[i], event_times[i], amounts[i])
            key = cards[i].encode()
            yield _Record(TRANSACTIONS, event_times[i], key, encode(event))
            if chance.random() < bad_share:
                value = chance.choice(DAMAGE)(msgspec.structs.asdict(event))
                yield _Record(TRANSACTIONS, event_times[i], key, value, bad=True)


def _damaged(**fields: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], bytes]:
    return lambda event: msgspec.json.encode(
        {**event, **{name: change(event) for name, change in fields.items()}}
    )


#: Ways to spoil an event, each of them seen in the wild. None may be accepted.
DAMAGE: tuple[Callable[[dict[str, Any]], bytes], ...] = (
    lambda event: b"<xml>" + event["transaction_id"].encode(),
    lambda event: msgspec.json.encode({k: v for k, v in event.items() if k != "card_id"}),
    _damaged(amount=lambda event: -1 - event["amount"]),
    _damaged(amount=lambda event: str(event["amount"])),
    _damaged(event_time=lambda event: event["event_time"] // 1000),  # seconds
    _damaged(event_time=lambda _: 4_102_444_800_000),  # the year 2100
)


def main() -> int:
    """Replay; see the module's docstring."""
    parser = argparse.ArgumentParser("python -m dataflows.demo.replay", description=__doc__)
    parser.add_argument("--bootstrap-servers", required=True)
    parser.add_argument("--handbook", type=Path, required=True, metavar="DIR")
    parser.add_argument("--start", type=int, required=True, metavar="MS", help="stream time")
    parser.add_argument("--rate", type=float, required=True, help="events/s")
    parser.add_argument("--duration", type=float, required=True, metavar="S")
    parser.add_argument("--bad-events", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--now", action="store_true", help="start without being told to")
    options = parser.parse_args()

    refused: list[str] = []
    producer = Producer({"bootstrap.servers": options.bootstrap_servers, **PRODUCER})
    sent = Sent()

    def send(record: _Record) -> None:
        while True:
            try:
                producer.produce(
                    record.topic,
                    record.value,
                    record.key,
                    on_delivery=lambda error, _: refused.append(error.str()) if error else None,
                )
                break
            except BufferError:
                producer.poll(0.05)
        if record.topic == TRANSACTIONS:
            sent.transactions += 1
            sent.bad += record.bad
        else:
            sent.fraud_reports += 1
        sent.stream_time = record.stream_time

    def say() -> None:
        print(msgspec.json.encode(sent).decode(), flush=True)

    ahead = _records(events(options.handbook, options.start), options.bad_events)
    for record in ahead:
        send(record)
        if record.topic == TRANSACTIONS:
            break
    producer.flush(30)
    say()
    listened_to = [] if options.now else [sys.stdin]
    if options.now or sys.stdin.readline().strip() == "go":
        began = said = time.monotonic()
        before = sent.events
        for record in ahead:
            due = began + (sent.events - before) / options.rate
            now = time.monotonic()
            if now < due:
                producer.poll(0)
                # Whatever comes on standard input, or its end, means stop.
                if select.select(listened_to, [], [], max(due - now, SLICE_S))[0]:
                    break
                now = time.monotonic()
            sent.replayed_s = now - began
            if sent.replayed_s >= options.duration or refused:
                break
            if now - said >= SAY_EVERY_S:
                said = now
                say()
            send(record)
    left = producer.flush(30)
    if left or refused:
        why = refused[0] if refused else "no answer within 30 s"
        print(f"{len(refused) + left} events did not reach the broker: {why}", file=sys.stderr)
        return 1
    sent.done = True
    say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
