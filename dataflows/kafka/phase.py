"""Keep the epochs of a cluster's workers in phase.

Bytewax 0.21.1 counts the time that a worker waits for the others at an epoch's end as part of its
next epoch. So a lightly loaded worker, which ends its epochs first, has less and less time to read
between one wait and the next, until it reads one batch per epoch. (Its source starts an epoch's
clock at `snapshot`, and may read only after every worker has finished the epoch:
``src/inputs.rs``, `epoch_started`.)

The cure needs no change to the engine: measure the wait, and once per epoch sleep through the
epoch's end for that long. The engine looks at the clock before it calls the source, so an epoch
that a sleep carries past its end ends one call later, and the next one starts that much later: at
the time of the others. Remove this when the engine starts the clock after the wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_THRESHOLD_S = 0.005
_LONGEST_SLEEP_S = 0.25


class PhaseKeeper:
    """Sleep through an epoch's end for as long as the worker waited at the one before.

    Call `turn` first thing in each `next_batch`, and `snapshot` in `snapshot`, of one partition
    per worker: the first that the engine calls.

    Args:
        epoch_interval_s: length of the engine's epochs; None: the shortest one seen.
        now: monotonic clock, in seconds.
        cpu: this thread's CPU time, in seconds. What the worker itself computes between a snapshot
            and the next call (pickling the snapshots) is no wait.
        sleep: blocks for some seconds.

    Attributes:
        slept_s: seconds slept so far.
        waited_s: seconds waited at epoch ends so far.
    """

    def __init__(
        self,
        epoch_interval_s: float | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._interval_s = epoch_interval_s
        self._given = epoch_interval_s is not None
        self._now, self._cpu, self._sleep = now, cpu, sleep
        self._epoch_started: float | None = None
        self._snapshot_at: float | None = None
        self._cpu_at_snapshot = 0.0
        self._last_turn = now()
        self._usual_gap_s = 0.001
        self._debt_s = 0.0
        self.slept_s = 0.0
        self.waited_s = 0.0

    def turn(self) -> None:
        """Note a call of `next_batch`; sleep if the epoch is about to end and a wait is owed."""
        now = self._now()
        if self._snapshot_at is not None:
            self._end_of_wait(now - self._snapshot_at, self._cpu() - self._cpu_at_snapshot)
            self._snapshot_at = None
        else:
            self._usual_gap_s += 0.2 * (now - self._last_turn - self._usual_gap_s)
        if self._debt_s and self._epoch_started is not None and self._interval_s is not None:
            left_s = self._epoch_started + self._interval_s - now
            # Not too late: the engine has looked at its clock just before it called us.
            if 0 < left_s <= 1.5 * self._usual_gap_s + 0.001:
                self._sleep(left_s + self._debt_s)
                self.slept_s += left_s + self._debt_s
                self._debt_s = 0.0
                now = self._now()
        self._last_turn = now

    def _end_of_wait(self, wall_s: float, cpu_s: float) -> None:
        wait_s = wall_s - cpu_s
        self.waited_s += wait_s
        # Longer sleeps would hold up what the other workers send to this one.
        longest_s = min(_LONGEST_SLEEP_S, (self._interval_s or 0.0) / 2)
        self._debt_s = min(wait_s, longest_s) if wait_s > _THRESHOLD_S else 0.0

    def snapshot(self) -> None:
        """Note the end of an epoch."""
        # The engine's clock of the new epoch is the one it read before the last `turn`.
        started = self._last_turn
        if self._epoch_started is not None and not self._given:
            length_s = started - self._epoch_started
            if self._interval_s is None or length_s < self._interval_s:
                self._interval_s = length_s
        self._epoch_started = started
        self._debt_s = 0.0
        self._snapshot_at = self._now()
        self._cpu_at_snapshot = self._cpu()
