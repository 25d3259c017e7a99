"""Send card transactions, in a process of its own.

    python -m benchmarks.load --topic transactions --count 300000                a backlog
    python -m benchmarks.load --topic transactions --count 300000 --rate 10000   open loop

In an open loop every event has its intended time of sending, whatever happens to those before it;
the record's timestamp is that time, and the transaction's id ends with it (``tx17-1700000000123``,
in ms), so that a latency from it counts the wait of events that could not be sent in time.

The events' own times go faster: each card has two transactions a day, as in the handbook, so a
million events of 5,000 cards are 100 days. They end now. (Were they the times of sending, a card
would pay hundreds of times within a minute, the model would flag most of it, and to explain that
would be most of the work.)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from confluent_kafka import Producer

CARDS, TERMINALS = 5_000, 10_000
PER_CARD_AND_DAY = 2
_DAY_MS = 86_400_000
#: How cards are drawn: all alike; one has a fifth of the events; Zipf's law, exponent 1.1.
KEYS = ("uniform", "hot", "zipf")
_HOT_SHARE, _ZIPF = 0.2, 1.1
#: A burst is the first second of every five.
_BURST_S, _PERIOD_S = 1.0, 5.0
_TICK_S = 0.001


class _Transaction(msgspec.Struct):
    transaction_id: str
    card_id: str
    terminal_id: str
    event_time: int
    amount: float


def cards(
    rng: np.random.Generator, count: int, keys: str, population: int
) -> npt.NDArray[np.int64]:
    """Draw the card number of each event, in [0, `population`)."""
    if keys == "zipf":
        weights = 1.0 / np.arange(1, population + 1) ** _ZIPF
        return rng.choice(population, count, p=weights / weights.sum())
    drawn = rng.integers(0, population, count)
    if keys == "hot":
        drawn[rng.random(count) < _HOT_SHARE] = 0
    return drawn


def event_times_ms(count: int, population: int, end_ms: float) -> npt.NDArray[np.int64]:
    """Return the own times of `count` events of so many cards, evenly spread up to `end_ms`.

    >>> event_times_ms(3, 1, 86_400_000.0).tolist()
    [0, 43200000, 86400000]
    """
    step_ms = _DAY_MS / (PER_CARD_AND_DAY * population)
    return np.rint(end_ms - step_ms * np.arange(count)[::-1]).astype(np.int64)


def due_by_plan(elapsed_s: float, plan: Sequence[tuple[float, float]]) -> float:
    """Return how many events are to be sent by then, for a plan of (events/s, seconds).

    >>> plan = [(10.0, 2.0), (30.0, 1.0)]
    >>> [due_by_plan(s, plan) for s in (1.0, 2.5, 3.0, 9.0)]
    [10.0, 35.0, 50.0, 50.0]
    """
    total = 0.0
    for rate, seconds in plan:
        within = min(max(elapsed_s, 0.0), seconds)
        total += rate * within
        elapsed_s -= seconds
    return total


def parse_plan(text: str) -> list[tuple[float, float]]:
    """Parse ``10000:20,30000:60``, which is events/s : seconds.

    >>> parse_plan("10:2,30:0.5")
    [(10.0, 2.0), (30.0, 0.5)]
    """
    pairs = [step.split(":") for step in text.split(",")]
    return [(float(rate), float(seconds)) for rate, seconds in pairs]


def due(elapsed_s: float, rate: float, burst: float) -> float:
    """Return how many events are to be sent by then.

    With `burst` > 1, the first second of every five has `burst` times the rate and the others
    less, so that the average is `rate`.

    >>> due(1.0, 100, 1), due(1.0, 100, 3), due(5.0, 100, 3), due(6.0, 100, 3)
    (100.0, 300.0, 500.0, 800.0)
    """
    if burst <= 1:
        return elapsed_s * rate
    periods, rest = divmod(elapsed_s, _PERIOD_S)
    slow = rate * (_PERIOD_S - burst * _BURST_S) / (_PERIOD_S - _BURST_S)
    within = rate * burst * min(rest, _BURST_S) + slow * max(0.0, rest - _BURST_S)
    return rate * _PERIOD_S * periods + within


def main() -> int:
    """Run the command line; print one line when all is sent."""
    parser = argparse.ArgumentParser("python -m benchmarks.load", description=__doc__)
    parser.add_argument("--bootstrap-servers", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--rate", type=float, help="events/s; without it, as fast as can be")
    parser.add_argument(
        "--plan", type=parse_plan, help="events/s:seconds,… instead of --rate, an open loop too"
    )
    parser.add_argument("--burst", type=float, default=1, help="factor, below 5; 1: none")
    parser.add_argument("--keys", choices=KEYS, default="uniform", help="how cards are drawn")
    parser.add_argument("--cards", type=int, default=CARDS)
    parser.add_argument("--name", default="tx", help="prefix of the transaction ids")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    drawn = cards(rng, options.count, options.keys, options.cards)
    names = [f"C{n:07d}" for n in drawn.tolist()]
    terminals = [f"T{n:05d}" for n in rng.integers(0, TERMINALS, options.count).tolist()]
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
    open_loop = options.rate is not None or options.plan is not None
    began = time.time()
    own_ms = event_times_ms(options.count, options.cards, began * 1000).tolist()
    sent, since = 0, 0.0
    while sent < options.count:
        now = time.time() - began
        if options.plan:
            planned = int(due_by_plan(now, options.plan))
        elif options.rate:
            planned = int(due(now, options.rate, options.burst))
        else:
            planned = sent + 1000
        until = min(options.count, planned)
        # Those since the last look were due evenly in between, to a millisecond or two.
        step = (now - since) / (until - sent) if until > sent else 0.0
        for n in range(sent, until):
            at = began + since + (n - sent + 1) * step if open_loop else time.time()
            ms = int(at * 1000)
            identity = f"{options.name}{n}-{ms}"
            event = _Transaction(identity, names[n], terminals[n], own_ms[n], amounts[n])
            while True:
                try:
                    producer.produce(options.topic, encode(event), names[n], timestamp=ms)
                    break
                except BufferError:
                    producer.poll(0.01)
        sent, since = until, now
        producer.poll(0)
        if open_loop:
            time.sleep(_TICK_S)
    left = producer.flush(60)
    print(f"{sent - left} sent in {time.time() - began:.1f} s", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
