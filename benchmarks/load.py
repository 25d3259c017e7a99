"""Send card transactions, in a process of its own.

    python -m benchmarks.load --topic transactions --count 300000                a backlog
    python -m benchmarks.load --topic transactions --count 300000 --rate 10000   open loop

In an open loop every event has its intended time of sending, whatever happens to those before it;
the record's timestamp (and ``event_time``) is that time, so that a latency from it counts the
wait of events that could not be sent in time. Cards and terminals are uniform.
"""

from __future__ import annotations

import argparse
import sys
import time

import msgspec
import numpy as np
from confluent_kafka import Producer

CARDS, TERMINALS = 5_000, 10_000
_TICK_S = 0.001


class _Transaction(msgspec.Struct):
    transaction_id: str
    card_id: str
    terminal_id: str
    event_time: int
    amount: float


def main() -> int:
    """Run the command line; print one line when all is sent."""
    parser = argparse.ArgumentParser("python -m benchmarks.load", description=__doc__)
    parser.add_argument("--bootstrap-servers", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--rate", type=float, help="events/s; without it, as fast as can be")
    parser.add_argument("--name", default="tx", help="prefix of the transaction ids")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    cards = [f"C{n:05d}" for n in rng.integers(0, CARDS, options.count)]
    terminals = [f"T{n:05d}" for n in rng.integers(0, TERMINALS, options.count)]
    amounts = np.round(rng.gamma(2.0, 30.0, options.count) + 0.01, 2).tolist()
    encode = msgspec.json.Encoder().encode
    producer = Producer(
        {
            "bootstrap.servers": options.bootstrap_servers,
            "linger.ms": 1,
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": 1_000_000,
        }
    )
    began = time.time()
    sent = 0
    while sent < options.count:
        if options.rate:
            due = min(options.count, int((time.time() - began) * options.rate))
        else:
            due = min(options.count, sent + 1000)
        for n in range(sent, due):
            at = began + n / options.rate if options.rate else time.time()
            ms = int(at * 1000)
            event = _Transaction(f"{options.name}{n}", cards[n], terminals[n], ms, amounts[n])
            while True:
                try:
                    producer.produce(options.topic, encode(event), cards[n], timestamp=ms)
                    break
                except BufferError:
                    producer.poll(0.01)
        sent = due
        producer.poll(0)
        if options.rate:
            time.sleep(_TICK_S)
    left = producer.flush(60)
    print(f"{sent - left} sent in {time.time() - began:.1f} s", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
