"""Decide which events are scored in full when more come than can be.

The signal is the age of records, now minus the broker's append: it holds what waits in the broker,
in the client and in the flow itself. As in CoDel (Nichols and Jacobson, "Controlling Queue Delay",
ACM Queue 10(5), 2012; RFC 8289) it is the *smallest* age within an interval that counts: a burst
makes some records old, but a queue that is never short stands. Unlike CoDel, which drops ever more
often, the share that is scored in full is halved with each interval that the queue stands, and
doubled again when it has been short, at under half the target, for some intervals.

Whatever is decided here, every event moves the windows: it has done so before it is asked about.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Policy: TypeAlias = Literal["block", "sample", "degrade", "drop"]
CatchUp: TypeAlias = Literal["score_all", "degrade", "skip"]

#: One event of low priority in 2 ** level is scored in full.
MOST_LEVEL = 4
#: Intervals with a short queue before a level is taken back.
CALM_INTERVALS = 4
#: How far a record's timestamp may be ahead of our clock to count as fresh, in seconds.
CLOCKS_S = 1.0
#: Outages that are remembered; of older ones, what is still to be read is as if they had not been.
MOST_OUTAGES = 16


class Way(IntEnum):
    """What becomes of an event."""

    FULL = 0  #: features, profiles, model
    REDUCED = 1  #: the card's cached score, or a rule
    SAMPLED = 2  #: shed, as most of its kind
    DROPPED = 3  #: shed, being old
    SKIPPED = 4  #: shed, having come while the flow was down


class Overload:
    """Watch the age of records; say which events are scored in full.

    Args:
        policy: what becomes of events of low priority in an overload. ``block``: they wait like
            all; ``sample``: one in 2 ** level is scored, the others are shed; ``degrade``: the
            others get a reduced answer; ``drop``: those older than the target are shed.
        target_s: age that a queue may have, in seconds.
        deadline_s: age past which an event of low priority is not scored in full, at any level:
            it gets the reduced answer (``drop``: is shed; ``block``: is scored).
        catch_up: what becomes of events of low priority that came while the flow was down, which
            are those appended before it began to read, or within an outage (`interrupted`):
            ``score_all``, ``degrade`` (reduced answers) or ``skip`` (shed). They do not count for
            the level.
        interval_s: how long the queue has to stand for a level, in seconds.
        now_s: wall clock, in seconds.
        elapsed_s: monotonic clock, in seconds.

    Attributes:
        level: 0 … `MOST_LEVEL`; under ``block`` it stays 0.
        youngest_s: smallest age in the last interval that is over, in seconds.

    One per worker, on its thread.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        target_s: float,
        deadline_s: float,
        catch_up: CatchUp = "score_all",
        interval_s: float = 0.5,
        now_s: Callable[[], float] = time.time,
        elapsed_s: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < target_s <= deadline_s:
            raise ValueError(f"target {target_s} s, deadline {deadline_s} s: the first comes first")
        self.policy: Policy = policy
        self.catch_up: CatchUp = catch_up
        self.level = 0
        self.youngest_s = 0.0
        self._target_s, self._deadline_s, self._interval_s = target_s, deadline_s, interval_s
        self._now_s, self._elapsed_s = now_s, elapsed_s
        self._began_ms = now_s() * 1000
        self._outages_ms: deque[tuple[float, float]] = deque(maxlen=MOST_OUTAGES)
        self._until = elapsed_s() + interval_s
        self._least_s: float | None = None  # age, in this interval
        self._calm = 0
        self._asked = False

    def begins(self) -> None:
        """Note that the flow begins to read: what was appended before came in a downtime."""
        self._began_ms = self._now_s() * 1000

    def interrupted(self, for_s: float) -> None:
        """Note that the flow could not read in the last `for_s` seconds.

        What was appended then is missed; what had been waiting before is not.
        """
        now_ms = self._now_s() * 1000
        self._outages_ms.append((now_ms - for_s * 1000, now_ms))

    def idle(self) -> None:
        """Note that nothing waits here: the queue is short, if no event came since the last time.

        (In a cluster the events come from other processes too, which know what waits there.)
        """
        asked, self._asked = self._asked, False
        if not asked:
            self._observe(0.0)

    def ways(
        self,
        append_time: npt.NDArray[np.int64],
        critical: npt.NDArray[np.bool_],
        draws: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.uint8] | None:
        """Return the `Way` of each event of a batch, uint8 [n]; None: all are scored in full.

        `append_time` is the broker's, in ms; `critical` events are always scored in full; `draws`
        is a number of each event that is evenly distributed and the same in every life, such as a
        hash of its id: at a level the same events are chosen, whoever asks. A record more than
        `CLOCKS_S` ahead of our clock says nothing about the queue. O(n).
        """
        if len(append_time) == 0:
            return None
        self._asked = True
        now_ms = self._now_s() * 1000
        age_s = (now_ms - append_time) / 1000
        missed = append_time < self._began_ms
        oldest_ms = float(append_time.min())
        for since_ms, until_ms in self._outages_ms:
            if oldest_ms <= until_ms:
                missed |= (append_time >= since_ms) & (append_time <= until_ms)
        tell = age_s[~missed & (age_s >= -CLOCKS_S)]
        if len(tell):
            self._observe(float(tell.min()))
        found = self._live(age_s, draws)
        if missed.any():
            found = np.zeros(len(age_s), np.uint8) if found is None else found
            found[missed] = _CATCH_UP[self.catch_up]
        if found is not None:
            found[critical] = Way.FULL
            if not found.any():
                return None
        return found

    def _live(
        self, age_s: npt.NDArray[np.float64], draws: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint8] | None:
        """Return the ways of events that came while the flow ran, were none of them critical."""
        if self.policy == "block":
            return None
        late = age_s > self._deadline_s
        if not self.level and not late.any():
            return None
        if self.policy == "drop":
            old = age_s > self._target_s if self.level else late
            return np.where(old, np.uint8(Way.DROPPED), np.uint8(Way.FULL))
        chosen = draws % (1 << self.level) == 0
        other = Way.SAMPLED if self.policy == "sample" else Way.REDUCED
        full = np.where(late, np.uint8(Way.REDUCED), np.uint8(Way.FULL))
        return np.where(chosen, full, np.uint8(other))

    def _observe(self, age_s: float) -> None:
        age_s = max(0.0, age_s)
        self._least_s = age_s if self._least_s is None else min(self._least_s, age_s)
        elapsed_s = self._elapsed_s()
        # An interval in which nothing was seen says nothing: the worker may have stood still.
        if elapsed_s < self._until:
            return
        self._until = elapsed_s + self._interval_s
        self.youngest_s, self._least_s = self._least_s, None
        if self.policy == "block":
            return
        if self.youngest_s > self._target_s:
            self._calm = 0
            self.level = min(self.level + 1, MOST_LEVEL)
        elif self.youngest_s >= self._target_s / 2:
            self._calm = 0
        else:
            self._calm += 1
            if self._calm >= CALM_INTERVALS:
                self._calm = 0
                self.level = max(self.level - 1, 0)


_CATCH_UP = {"score_all": Way.FULL, "degrade": Way.REDUCED, "skip": Way.SKIPPED}
