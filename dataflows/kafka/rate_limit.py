"""A token bucket for each partition that is read."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt


class TokenBuckets:
    """Allow each of `count` partitions `rate` records a second, and `burst` at once.

    Every bucket begins full. O(count) a call.

    Args:
        count: partitions.
        rate: records a second, of each.
        burst: most records at once, of each; at least 1.
        now: monotonic clock, in seconds.

    Attributes:
        throttled_s: seconds in which some partition had more than its bucket allowed.

    >>> clock = [0.0]
    >>> buckets = TokenBuckets(2, rate=10, burst=3, now=lambda: clock[0])
    >>> buckets.allowed(np.array([0, 0, 1, 0, 0, 1]))
    4
    >>> buckets.allowed(np.array([0, 1]))
    0
    >>> clock[0] = 0.1
    >>> buckets.allowed(np.array([0, 1]))
    2
    """

    def __init__(
        self, count: int, rate: float, burst: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        if rate <= 0 or burst < 1:
            raise ValueError(f"rate={rate}, burst={burst}: a bucket needs a rate and room for one")
        self._rate, self._burst, self._now = rate, burst, now
        self._tokens = np.full(count, float(burst))
        self._at = now()
        self._held = False
        self.throttled_s = 0.0

    def allowed(self, partitions: npt.NDArray[np.integer]) -> int:
        """Return how many of the next records may go, and take their tokens.

        `partitions` [n] says whose they are, in their order: the first one without a token holds
        up all behind it, since order is kept.
        """
        now = self._now()
        elapsed_s, self._at = now - self._at, now
        if self._held:
            self.throttled_s += elapsed_s
        self._tokens = np.minimum(self._tokens + elapsed_s * self._rate, self._burst)
        allowed = len(partitions)
        for partition in np.unique(partitions).tolist():
            own = np.flatnonzero(partitions == partition)
            tokens = int(self._tokens[partition] + 1e-9)  # 0.1 × 10 is not quite 1
            if len(own) > tokens:
                allowed = min(allowed, int(own[tokens]))
        self._held = allowed < len(partitions)
        taken = partitions[:allowed]
        self._tokens -= np.bincount(taken, minlength=len(self._tokens))
        return allowed
