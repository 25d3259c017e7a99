"""Steady load: the handbook's events in order, at a fixed rate whatever the flow does.

Keyed as in production (transactions by card, reports by terminal, Java's partitioner). One in a
hundred records is no event, and, if asked for, one in ten is sent again, up to 2000 events
later.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from confluent_kafka import Producer

_TICK_S = 0.02
_BAD = (b"hello", b"", None, b'{"transaction_id": "tx', b"[]", b"\xff\xfe\x00", b'{"amount": -1}')
_BAD_SHARE = 0.01
_AGAIN_SHARE = 0.1
_AGAIN_WITHIN = 2_000


@dataclass(frozen=True)
class Item:
    """A record to send. `event_id` is the business id; None: it is not an event."""

    topic: str
    key: bytes
    value: bytes | None
    event_id: str | None
    stream_time: int
    #: It was sent before.
    again: bool = False


def with_trouble(events: Sequence[Item], rng: random.Random, *, duplicates: bool) -> list[Item]:
    """Mix in what is no event, and events sent again."""
    items: list[Item] = []
    later: list[tuple[int, int, Item]] = []  # due at this place, in order of addition
    for place, event in enumerate(events):
        while later and later[0][0] <= place:
            items.append(heapq.heappop(later)[2])
        items.append(event)
        if duplicates and rng.random() < _AGAIN_SHARE:
            again = Item(event.topic, event.key, event.value, event.event_id, event.stream_time,
                         again=True)  # fmt: skip
            due = place + 1 + int(rng.random() ** 2 * _AGAIN_WITHIN)
            heapq.heappush(later, (due, place, again))
        if rng.random() < _BAD_SHARE:
            items.append(Item(event.topic, event.key, rng.choice(_BAD), None, event.stream_time))
    return items


class Load(threading.Thread):
    """Send items, by and by, until told to stop.

    Args:
        servers: the brokers.
        topics: name in `Item.topic` → topic.
        items: what to send.
        rate: records per second.
    """

    def __init__(
        self, servers: str, topics: Mapping[str, str], items: Sequence[Item], rate: float
    ) -> None:
        super().__init__(name="load", daemon=True)
        self._topics, self._items = topics, items
        #: Since when it sends how many records a second, and how many it had sent by then.
        self._pace = (time.monotonic(), 0, rate)
        self._producer = Producer(
            {
                "bootstrap.servers": servers,
                "enable.idempotence": True,
                "linger.ms": 5,
                "partitioner": "murmur2_random",
            }
        )
        self._end = threading.Event()
        self._failures: list[object] = []
        self.sent = 0

    @property
    def ended(self) -> bool:
        """Tell whether all items have been sent, so that the load is no longer steady."""
        return self.sent == len(self._items)

    @property
    def stream_time(self) -> int:
        """Stream time of the last item sent, in ms."""
        return self._items[max(self.sent - 1, 0)].stream_time

    def pace(self, rate: float) -> None:
        """Send so many records a second from now on."""
        self._pace = (time.monotonic(), self.sent, rate)

    def run(self) -> None:
        self.pace(self._pace[2])
        while not self._end.wait(_TICK_S):
            since, before, rate = self._pace
            due = before + int((time.monotonic() - since) * rate)
            due = max(self.sent, min(due, len(self._items)))
            for item in self._items[self.sent : due]:
                self._producer.produce(
                    self._topics[item.topic], item.value, item.key, on_delivery=self._delivered
                )
            self.sent = due
            self._producer.poll(0)

    def _delivered(self, error: object, _: object) -> None:
        if error is not None:
            self._failures.append(error)

    def stop(self) -> list[Item]:
        """Stop, wait until the brokers have all, and return what was sent."""
        self._end.set()
        self.join()
        left = self._producer.flush(60)
        assert not left and not self._failures, f"{left} unsent, {self._failures[:3]}"
        return list(self._items[: self.sent])
