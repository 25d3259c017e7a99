"""Keep the log readable: in an outage librdkafka says the same many times a second."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

_SAME_EVERY_S = 30.0
_MOST_KINDS = 1000


def without_numbers(record: logging.LogRecord) -> str:
    """Return what a line says but for its numbers."""
    return re.sub(r"\d+", "", record.getMessage())


class Calm(logging.Filter):
    """Pass at most `most` lines of a kind within 30 s, and say how many were not passed.

    Lines are of a kind if they differ only in their numbers, or as `kind_of` says. Those of level
    `spare` and above always pass.

    >>> calm, line = Calm(), "FAIL [rdkafka#producer-%d]: Connection refused (after %dms)"
    >>> said = [{"msg": line % (n, 7 * n), "levelno": logging.INFO} for n in range(3)]
    >>> [calm.filter(logging.makeLogRecord(each)) for each in said]
    [True, False, False]
    """

    def __init__(
        self,
        most: int = 1,
        now_s: Callable[[], float] = time.monotonic,
        *,
        kind_of: Callable[[logging.LogRecord], str] = without_numbers,
        spare: int = logging.CRITICAL + 1,
    ) -> None:
        super().__init__()
        self._most, self._now_s, self._kind_of, self._spare = most, now_s, kind_of, spare
        #: Kind → until when they are counted, and how many there were.
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= self._spare:
            return True
        kind, now = self._kind_of(record), self._now_s()
        until, count = self._seen.get(kind, (now, 0))
        if now >= until:
            if count > self._most:
                _add(record, count - self._most)
            until, count = now + _SAME_EVERY_S, 0
            if len(self._seen) >= _MOST_KINDS:
                self._seen.clear()
        self._seen[kind] = until, count + 1
        return count < self._most


def _add(record: logging.LogRecord, hidden: int) -> None:
    """Say in a line that others like it were not shown."""
    if isinstance(record.msg, dict):  # structlog's
        record.msg = {**record.msg, "not_shown": hidden}
    else:
        record.msg = f"{record.getMessage()} ({hidden} more like it were not shown)"
        record.args = ()


logging.getLogger("librdkafka").addFilter(Calm())
