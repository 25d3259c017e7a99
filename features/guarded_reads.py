"""Look profiles up within a time budget, whatever the online store does.

A read from the store runs in a thread of its own, and a batch waits for it at most its budget; then
it goes on with what the cache has, however old, or with NaN, and says so. What arrives late is in
the cache for the next batch. One read per view is under way at a time; keys that come up meanwhile
are not queued: the next batch with misses asks for its own. A failed attempt is repeated after an
exponential backoff with full jitter, and after a few failures or late answers in a row a circuit
breaker lets no event wait, until a read in the background has shown that the store is back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from queue import SimpleQueue
from typing import Literal

import numpy as np
import numpy.typing as npt
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from features.breaker import Breaker, Phase
from features.online_store import Keys, OnlineStore, Rows, StoreUnavailable, as_of_event
from features.profiles import Float64s, Int64s, ProfileView

KEY_S = 100e-6
"""What each key adds to the time allowed for a read: to encode and decode a key is this process's
own work (20–75 µs)."""

MOST_KEYS = 128
"""Keys of a read that a batch waits for. A cold cache misses thousands at once; they are asked for
so many at a time for as long as the budget lasts, so that what the store answers in it is used, and
the rest behind the batch. So whatever the store does, a view costs at most MOST_KEYS × KEY_S, 13
ms, over the budget."""

BACKOFF_S = 0.005
"""Bound of the random pause before the first repetition; it doubles each time."""

MOST_BACKOFF_S = 0.2

Waiting = Callable[[float], bool]
"""Waits for at most so many seconds, and tells whether what is waited for is over."""


class Served(IntEnum):
    """How one event's profile was served; odd when the store did not answer."""

    #: The row the store holds, as of at most the cache's TTL ago.
    FRESH = 0
    #: The row of a cache entry past its TTL.
    STALE = 1
    #: NaN: the store has no row for the event: entity unknown, row too old or of its future.
    MISSING = 2
    #: NaN: nothing usable was cached.
    UNAVAILABLE = 3


@dataclass(frozen=True)
class Profiles:
    """What is known of a batch's entities, for one view."""

    #: [n, fields], in declared order; NaN in rows that are missing or unavailable.
    values: Float64s
    #: [n], event time − as_of; NaN where no row is known.
    age_ms: Float64s
    #: [n], of Served.
    served: npt.NDArray[np.uint8]
    #: How the read ended that the batch needed, if it needed one. `failed` and `late`: the budget
    #: ran out, with or without an error of the store; `refused`: the breaker let nobody wait.
    read: Literal["ok", "failed", "late", "refused"] | None
    #: What is wrong with the store, when `read` is not ok.
    why: str


class ReadingThread:
    """Run one piece of work after the other in one daemon thread, started by the first.

    A daemon: a read that hangs must not hold up the end of the process.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], None], threading.Event]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, work: Callable[[], None]) -> Waiting:
        """Take on work, which must not raise."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="profile-reads", daemon=True)
            self._thread.start()
        over = threading.Event()
        self._queue.put((work, over))
        return over.wait

    def _run(self) -> None:
        while True:
            work, over = self._queue.get()
            work()
            over.set()


@dataclass
class _Read:
    """A read of distinct keys, under way or over. The reading thread writes the last five."""

    keys: Keys
    #: When it is late, on the store's clock.
    due: float
    #: Whether a batch has waited for it in vain, which its breaker knows.
    overdue: bool = False
    rows: Rows | None = None
    #: The last error of the store.
    why: str = ""
    bug: Exception | None = None
    began: float = 0.0
    took_s: float = 0.0


@dataclass
class _View:
    """A view and how reading it goes."""

    declared: ProfileView
    breaker: Breaker
    read: _Read | None = None
    #: For `read`.
    wait: Waiting = field(default=lambda _: True)
    why: str = ""


@dataclass
class _Budget:
    """How long a batch may yet wait."""

    left_s: float


class GuardedReads:
    """An online store that a batch never waits for longer than its budget.

    `budget_s` is for a batch, all its views together, plus KEY_S for each key read, of MOST_KEYS a
    view at most: no batch waits longer, whether the store answers, is slow or hangs. Keys that it
    had no time for are read behind it, at once, for the next. Only waiting counts. `read_s` bounds
    one read
    with all its repetitions: none starts later (one attempt takes STORE_TIMEOUT_S at most, if the
    store's client keeps to it). From here on the store's `read` is called in the reading thread
    only, so its client is not used by two threads at once. Threads may share a GuardedReads.

    >>> reads = GuardedReads(OnlineStore.open(repo, PROFILES))                  # doctest: +SKIP
    >>> (customers,) = reads.lookup([(CUSTOMER_PROFILE, keys)], event_time_ms)  # doctest: +SKIP
    >>> customers.values[customers.served == Served.FRESH]                      # doctest: +SKIP
    """

    def __init__(
        self,
        store: OnlineStore,
        *,
        budget_s: float = 0.02,
        read_s: float = 1.0,
        breaker: Callable[[Callable[[], float]], Breaker] = Breaker,
        in_background: Callable[[Callable[[], None]], Waiting] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if budget_s < 0 or read_s < 0:
            raise ValueError(f"budget_s={budget_s}, read_s={read_s}: neither may be below 0")
        self._store = store
        self._clock = store.clock
        self._budget_s = budget_s
        self._read_s = read_s
        self._in_background = in_background or ReadingThread()
        self._sleep = sleep
        self._views = {view.name: _View(view, breaker(self._clock)) for view in store.views}
        #: Guards the caches and what is under way; never held while waiting.
        self._lock = threading.Lock()

    def lookup(
        self, asked: Iterable[tuple[ProfileView, Keys]], now_ms: Int64s | int
    ) -> list[Profiles]:
        """Return the profiles of one batch for each (view, keys), as `OnlineStore.lookup` does.

        Keys are bytes [n] (dtype S, UTF-8), `now_ms` the event times (int64 [n], or one for all).
        Never raises StoreUnavailable. A row of an old cache entry is used however long ago it was
        cached, but not past the view's own TTL.
        """
        budget = _Budget(self._budget_s)
        found = []
        for view, keys in asked:
            found.append(self._one(self._views[view.name], keys, now_ms, budget))
            # What one view's keys were quicker than allowed pays for nothing else.
            budget.left_s = min(budget.left_s, self._budget_s)
        return found

    def is_open(self, view: ProfileView) -> bool:
        """Tell whether events do not wait for the store, for this view."""
        return self._views[view.name].breaker.phase is not Phase.CLOSED

    def _one(self, view: _View, keys: Keys, now_ms: Int64s | int, budget: _Budget) -> Profiles:
        rows, unanswered, how = self._answers(view, keys, budget)
        if len(unanswered):
            with self._lock:
                old, _ = self._store.cached(view.declared, keys[unanswered], expired=True)
            rows.values[unanswered], rows.as_of[unanswered] = old
        age_ms, used = as_of_event(view.declared, rows, now_ms)
        served = (~used).view(np.uint8) * np.uint8(Served.MISSING)
        if len(unanswered):
            served[unanswered] += 1
        why = "" if how in (None, "ok") else view.why
        return Profiles(rows.values, age_ms, served, how, why)

    def _answers(
        self, view: _View, keys: Keys, budget: _Budget
    ) -> tuple[Rows, npt.NDArray[np.intp], Literal["ok", "failed", "late", "refused"] | None]:
        """Return fresh rows, the positions that are left without, and how the read went.

        O(n), and O(misses² / MOST_KEYS) for what is read.
        """
        with self._lock:
            self._settle(view)
            rows, missed = self._store.cached(view.declared, keys)
        how: Literal["ok"] | None = None
        granted = False
        while len(missed):
            with self._lock:
                self._settle(view)
                phase = view.breaker.phase
                ours = view.read is None and phase is not Phase.OPEN
                if ours:
                    wanted = np.unique(keys[missed])
                    behind = granted and budget.left_s <= 0
                    self._begin(view, wanted if behind else wanted[:MOST_KEYS])
                read, wait = view.read, view.wait
            if read is None or phase is not Phase.CLOSED:
                return rows, missed, "refused"
            if ours and not granted:
                budget.left_s += KEY_S * len(read.keys)
                granted = True
            since = self._clock()
            over = wait(max(budget.left_s, 0.0))
            budget.left_s -= self._clock() - since
            if not over:
                with self._lock:
                    # Another batch's, or what was asked for after an answer, may take its time.
                    if (ours and how is None) or self._clock() >= read.due:
                        view.breaker.late()
                        read.overdue = True
                    view.why = read.why or f"no answer within {self._budget_s * 1000:g} ms"
                return rows, missed, "failed" if read.why else "late"
            with self._lock:
                self._settle(view)
            if read.rows is None:
                return rows, missed, "failed"
            how = "ok"
            if ours:
                place = np.minimum(np.searchsorted(read.keys, keys[missed]), len(read.keys) - 1)
                brought = read.keys[place] == keys[missed]
                found = Rows(read.rows.values[place], read.rows.as_of[place])
            else:  # another batch's, maybe of some of our keys, and maybe long ago
                with self._lock:
                    found, without = self._store.cached(view.declared, keys[missed])
                brought = np.ones(len(missed), np.bool_)
                brought[without] = False
            rows.values[missed[brought]] = found.values[brought]
            rows.as_of[missed[brought]] = found.as_of[brought]
            missed = missed[~brought]
        return rows, missed, how

    def _begin(self, view: _View, keys: Keys) -> None:
        """Start a read in the background."""
        read = _Read(keys, due=self._clock() + (self._budget_s + KEY_S * len(keys)))
        view.read = read
        view.wait = self._in_background(lambda: self._attempt(view, read))

    def _settle(self, view: _View) -> None:
        """Take in what a read that is over has brought."""
        read = view.read
        if read is None or not view.wait(0.0):
            return
        view.read = None
        if read.bug is not None:
            raise read.bug
        if read.rows is None:
            view.why = read.why
            if not read.overdue or view.breaker.phase is Phase.HALF_OPEN:
                view.breaker.failed()
            return
        self._store.keep(view.declared, read.keys, read.rows, read.began)
        if read.took_s <= self._budget_s + KEY_S * len(read.keys):
            view.breaker.answered()
        elif not read.overdue:
            view.why = f"an answer took {read.took_s * 1000:.0f} ms"
            view.breaker.late()

    def _attempt(self, view: _View, read: _Read) -> None:
        """Read, again and again if that fails. Runs in the background."""
        read.began = self._clock()

        def attempt() -> Rows:
            if read.why and view.breaker.phase is not Phase.CLOSED:  # it opened meanwhile
                raise StoreUnavailable(read.why)
            return self._store.read(view.declared, read.keys)

        def enough(state: RetryCallState) -> bool:
            next_s = self._clock() - read.began + state.upcoming_sleep
            return next_s >= self._read_s or view.breaker.phase is not Phase.CLOSED

        def note(state: RetryCallState) -> None:
            read.why = str(state.outcome and state.outcome.exception())

        again = Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            wait=wait_random_exponential(multiplier=BACKOFF_S, max=MOST_BACKOFF_S),
            stop=enough,
            after=note,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            read.rows = again(attempt)
        except StoreUnavailable:
            pass  # noted
        except Exception as bug:  # for the worker to raise: here nobody would see it
            read.bug = bug
        read.took_s = self._clock() - read.began
