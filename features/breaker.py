"""A circuit breaker: do not wait for what has shown that it does not answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import Enum, auto


class Phase(Enum):
    """What a breaker advises."""

    #: Ask, and wait for the answer.
    CLOSED = auto()
    #: Do not ask.
    OPEN = auto()
    #: Ask, without waiting: the answer decides.
    HALF_OPEN = auto()


class Breaker:
    """Open after `trips_after` failures or late answers in a row; half open after a cool-down.

    The cool-down is `cool_down_s` ± 50 %, drawn each time, so that the processes that lost a store
    together do not return to it together. Half open, a good answer closes the breaker and a failure
    opens it again; a late answer changes nothing: a slow store may go on being asked as long as
    nobody waits for it. While open, answers to what was asked before are not listened to.

    `clock` is monotonic seconds; `uniform` draws between two numbers. Not thread-safe, but `phase`
    may be looked at from any thread.

    >>> time_s = 0.0
    >>> breaker = Breaker(lambda: time_s, trips_after=2, cool_down_s=10, uniform=max)
    >>> breaker.failed(); breaker.late(); breaker.phase.name
    'OPEN'
    >>> time_s = 15.0; breaker.phase.name
    'HALF_OPEN'
    >>> breaker.answered(); breaker.phase.name
    'CLOSED'
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        trips_after: int = 5,
        cool_down_s: float = 2.0,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if trips_after < 1 or cool_down_s <= 0:
            raise ValueError(f"trips_after={trips_after}, cool_down_s={cool_down_s}: be positive")
        self._clock = clock
        self._trips_after = trips_after
        self._cool_down_s = cool_down_s
        self._uniform = uniform
        self._in_a_row = 0
        self._opens_until: float | None = None

    @property
    def phase(self) -> Phase:
        """What to do now."""
        until = self._opens_until
        if until is None:
            return Phase.CLOSED
        return Phase.OPEN if self._clock() < until else Phase.HALF_OPEN

    def answered(self) -> None:
        """Take note of an answer in time."""
        if self.phase is not Phase.OPEN:
            self._in_a_row = 0
            self._opens_until = None

    def late(self) -> None:
        """Take note of an answer that came late, or was waited for in vain."""
        if self.phase is Phase.CLOSED:
            self._count()

    def failed(self) -> None:
        """Take note of a failure."""
        if self.phase is not Phase.OPEN:
            self._count()

    def _count(self) -> None:
        self._in_a_row += 1
        if self._in_a_row >= self._trips_after:
            cool_down_s = self._uniform(0.5 * self._cool_down_s, 1.5 * self._cool_down_s)
            self._opens_until = self._clock() + cool_down_s
