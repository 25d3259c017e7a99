"""Keep what librdkafka says readable in an outage: it says the same many times a second."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

_SAME_EVERY_S = 30.0
_MOST_KINDS = 1000


class Calm(logging.Filter):
    """Pass a line at most every 30 s; lines that differ only in their numbers are the same.

    >>> calm, line = Calm(), "FAIL [rdkafka#producer-%d]: Connection refused (after %dms)"
    >>> [calm.filter(logging.makeLogRecord({"msg": line % (n, 7 * n)})) for n in range(3)]
    [True, False, False]
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now_s = now_s
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind, now = re.sub(r"\d+", "", record.getMessage()), self._now_s()
        if now < self._next.get(kind, now):
            return False
        if len(self._next) >= _MOST_KINDS:
            self._next.clear()
        self._next[kind] = now + _SAME_EVERY_S
        return True


logging.getLogger("librdkafka").addFilter(Calm())
