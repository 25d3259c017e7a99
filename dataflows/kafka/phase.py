"""Keep the epochs of a cluster's workers in phase.

Bytewax 0.21.1 counts the time that a worker waits for the others at an epoch's end as part of its
next epoch. So a lightly loaded worker, which ends its epochs first, gains a lead that grows with
every epoch, and has less and less time to read between one wait and the next; in the end it leads
by a whole epoch and reads one batch per epoch. (Its source starts an epoch's clock at `snapshot`,
and may read only after every worker has finished the epoch: ``src/inputs.rs``, `epoch_started`.)

The cure needs no change to the engine. The wait is the lead: measure it, and sleep through the
next epoch's end for that long. The engine looks at the clock before it calls the source, so an
epoch that a sleep carries past its end ends one call later, and the next one starts that much
later: at the time of the others.

A worker that leads by a whole epoch (after a stall of another that was longer than an epoch)
cannot do that: it is called only when its epoch is over already. It has to make the others wait
for once: in such a call, sleep for an epoch and a bit more. That bit is what it then has of its
next epoch, and the small sleeps do the rest.

Remove this when the engine starts an epoch's clock after the wait.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

_THRESHOLD_S = 0.005
_LONGEST_SLEEP_S = 0.25
_PROBE_EVERY = 32


class PhaseKeeper:
    """Sleep through epoch ends for as long as the worker keeps waiting at them.

    Call `turn` first thing in each `next_batch`, and `snapshot` in `snapshot`, of one partition
    per worker: the first that the engine calls.

    Not all of a wait is a lead: writing the snapshots takes time on every worker. What every wait
    since the last probe contained counts as that; a probe, at first after 2 epochs and later after
    32, sleeps off a wait whole, and so finds out. (CPU time tells nothing: the engine spins while
    it waits.)

    Args:
        epoch_interval_s: length of the engine's epochs; None: the shortest one seen.
        now: monotonic clock, in seconds.
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
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._interval_s = epoch_interval_s
        self._given = epoch_interval_s is not None
        self._now, self._sleep = now, sleep
        self._epoch_started: float | None = None
        self._epoch_is_new = False
        self._first_turn: float | None = None  # of this epoch
        self._turned = self._awake_since = now()
        self._usual_gap_s = 0.001
        self._last_waits_s = (0.0, 0.0)
        self._least_wait_s = math.inf  # since the last probe
        self._epochs_to_probe = 0
        self._probe_after = 2  # epochs
        self._epochs_overdue = 0
        self._debt_s = 0.0
        self.slept_s = 0.0
        self.waited_s = 0.0

    def turn(self) -> None:
        """Note a call of `next_batch`; sleep if the epoch is about to end and a wait is owed."""
        now = self._now()
        gap_s, self._turned = now - self._awake_since, now
        if self._epoch_is_new:
            self._epoch_is_new = False
            # A turn ends with the work downstream, so a usual gap is no wait.
            self._begin_epoch(now, max(0.0, gap_s - self._usual_gap_s))
        else:
            self._usual_gap_s += 0.2 * (gap_s - self._usual_gap_s)
            self._sleep_through_the_end(now)
        self._awake_since = self._now()

    def _begin_epoch(self, now: float, wait_s: float) -> None:
        self.waited_s += wait_s
        last_turn, self._first_turn = self._first_turn, now
        # A lead stays until it is slept off; a wait that comes once is another worker's doing.
        # If both answered to it, they would chase each other.
        lead_s = min(wait_s, max(self._last_waits_s))
        self._last_waits_s = (self._last_waits_s[1], wait_s)
        if self._epoch_started is None or self._interval_s is None:
            return
        # Longer sleeps would hold up what the other workers send to this one.
        longest_s = min(_LONGEST_SLEEP_S, self._interval_s / 2)
        self._epochs_to_probe -= 1
        if self._epochs_to_probe <= 0:
            self._least_wait_s = math.inf
            if lead_s <= longest_s:
                self._epochs_to_probe = self._probe_after
                self._probe_after = min(2 * self._probe_after, _PROBE_EVERY)
        else:
            self._least_wait_s = min(self._least_wait_s, wait_s)
            lead_s -= self._least_wait_s
        if lead_s > max(_THRESHOLD_S, self._usual_gap_s / 2):
            self._debt_s = min(lead_s, longest_s)
        overdue = now >= self._epoch_started + self._interval_s and wait_s > self._interval_s / 2
        self._epochs_overdue = self._epochs_overdue + 1 if overdue else 0
        if self._epochs_overdue > 2 and last_turn is not None:
            # The others end the epoch that is now beginning one period from now, and the periods
            # are longer than the interval by what the lead grows with each.
            self._epochs_overdue = self._epochs_to_probe = 0
            self._probe_after = 2
            period_s = now - last_turn
            nap_s = period_s + max(self._interval_s / 8, 3 * (period_s - self._interval_s))
            logger.warning(
                "this worker is a whole epoch ahead of the others; it sleeps %.2f s to get in step",
                nap_s,
            )
            self._take_a_nap(nap_s)

    def _sleep_through_the_end(self, now: float) -> None:
        if not self._debt_s or self._epoch_started is None or self._interval_s is None:
            return
        left_s = self._epoch_started + self._interval_s - now
        # Not too late: a call after the end is one too many. A little early costs little.
        soon_s = max(1.5 * self._usual_gap_s + 0.001, min(self._interval_s / 20, 0.02))
        if 0 < left_s <= soon_s:
            self._take_a_nap(left_s + self._debt_s)
            self._debt_s = 0.0

    def _take_a_nap(self, seconds: float) -> None:
        self._sleep(seconds)
        self.slept_s += seconds

    def snapshot(self) -> None:
        """Note the end of an epoch."""
        # The engine's clock of the new epoch is the one it read before the last `turn`.
        if self._epoch_started is not None and not self._given:
            length_s = self._turned - self._epoch_started
            if self._interval_s is None or length_s < self._interval_s:
                self._interval_s = length_s
        self._epoch_started = self._turned
        self._debt_s = 0.0
        self._epoch_is_new = True
