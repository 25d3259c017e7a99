"""Reads under guard: the budget holds, and every row says where it comes from.

A fake thread and a fake clock for what a store may do in time; the real thread for what only
threads do.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from features import guarded_reads
from features.breaker import Breaker, Phase
from features.guarded_reads import GuardedReads, Profiles, ReadingThread, Served
from features.online_store import OnlineStore, Rows, StoreUnavailable
from features.profiles import ProfileView

CARD = ProfileView("card_profile", "card_id", ("x", "y_position"), ttl_ms=10**9)
SHOP = ProfileView("shop_profile", "terminal_id", ("risk",), ttl_ms=10**9)
NOW_MS = 10**6
FRESH, STALE, MISSING, UNAVAILABLE = Served


def bytes_of(*keys: str) -> np.ndarray:
    return np.array([key.encode() for key in keys], "S")


@dataclass
class Reader:
    """A store of one view: key → number; `before` is called with the keys of every read."""

    view: ProfileView
    known: dict[str, float]
    before: Callable[[list[bytes]], object] = lambda keys: None

    def read(self, keys: list[bytes]) -> Rows:
        self.before(keys)
        found = np.array([self.known.get(key.decode(), np.nan) for key in keys])
        return Rows(found[:, None] + np.arange(len(self.view.fields)), found)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def guarded(
    *readers: Reader, clock: Callable[[], float] = time.monotonic, **options
) -> GuardedReads:
    ttl_s = options.pop("cache_ttl_s", 60.0)
    rows = options.pop("cache_rows", 100)
    named = {reader.view.name: reader for reader in readers}
    store = OnlineStore(named, clock=clock, cache_ttl_s=ttl_s, cache_rows=rows)
    return GuardedReads(store, **options)


def ask(reads: GuardedReads, view: ProfileView, *keys: str) -> Profiles:
    (found,) = reads.lookup([(view, bytes_of(*keys))], NOW_MS)
    return found


def at_once(work: Callable[[], None]) -> Callable[[float], bool]:
    """Run work where it is asked for, instead of in the background."""
    work()
    return lambda timeout_s: True


# Breaker


def test_a_breaker_opens_half_opens_and_closes() -> None:
    clock = Clock()
    breaker = Breaker(clock, trips_after=3, cool_down_s=10, uniform=lambda low, high: high)
    for note in (breaker.failed, breaker.late, breaker.answered, breaker.late, breaker.failed):
        note()
        assert breaker.phase is Phase.CLOSED  # never three in a row
    breaker.failed()
    assert breaker.phase is Phase.OPEN
    clock.now = 14.9
    breaker.answered()  # to what was asked before
    breaker.failed()
    assert breaker.phase is Phase.OPEN
    clock.now = 15.0
    breaker.late()
    assert breaker.phase is Phase.HALF_OPEN
    breaker.failed()
    assert breaker.phase is Phase.OPEN
    clock.now = 30.0
    assert breaker.phase is Phase.HALF_OPEN
    breaker.answered()
    assert breaker.phase is Phase.CLOSED
    breaker.failed()
    breaker.failed()
    assert breaker.phase is Phase.CLOSED  # counted anew


def test_cool_downs_differ() -> None:
    random.seed(1)
    ends = []
    for _ in range(200):
        clock = Clock()
        breaker = Breaker(clock, trips_after=1, cool_down_s=10)
        breaker.failed()
        ends.append(breaker._opens_until)
    assert min(ends) >= 5 and max(ends) <= 15
    assert min(ends) < 6 and max(ends) > 14 and len(set(ends)) > 190


@pytest.mark.parametrize("wrong", [{"trips_after": 0}, {"cool_down_s": 0}])
def test_a_breaker_that_could_not_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="be positive"):
        Breaker(Clock(), **wrong)


# A model of it all


BUDGET, KEY, MOST, TTL, COOL, TRIPS = 20.0, 1.0, 3, 60.0, 100.0, 3


@dataclass
class Job:
    """A read as the fake thread knows it: what the store will do was decided when it was asked."""

    work: Callable[[], None]
    start: float
    end: float
    fails: bool
    truth: dict[str, dict[str, float]]


@dataclass
class World:
    """A clock, a store, and the one thread that reads it, all in whole seconds."""

    now: float = 0.0
    took: float = 1.0
    fails: bool = False
    truth: dict[str, dict[str, float]] = field(default_factory=lambda: {"a": {}, "b": {}})
    queue: list[Job] = field(default_factory=list)
    running: Job | None = None
    moment: float = 0.0  # in the thread
    free_at: float = 0.0
    begun: int = 0

    def clock(self) -> float:
        return self.now if self.running is None else self.moment

    def read(self, view: ProfileView, keys: list[bytes]) -> Rows:
        assert self.running is not None, "the store was read outside its thread"
        self.moment = self.running.end
        if self.running.fails:
            raise StoreUnavailable("down")
        return Reader(view, self.running.truth[view.name]).read(keys)

    def in_background(self, work: Callable[[], None]) -> Callable[[float], bool]:
        start = max(self.now, self.free_at)
        self.free_at = start + self.took
        truth = {view: dict(known) for view, known in self.truth.items()}
        job = Job(work, start, self.free_at, self.fails, truth)
        self.queue.append(job)
        self.begun += 1
        assert len(self.queue) <= len(self.truth), "more than one read of a view under way"

        def wait(timeout_s: float) -> bool:
            assert timeout_s >= 0
            until = max(self.now, min(job.end, self.now + timeout_s))
            while self.queue and self.queue[0].end <= until:
                self.running = self.queue.pop(0)
                self.moment = self.running.start
                self.running.work()
                self.running = None
            self.now = until
            return job.end <= until

        return wait


@dataclass
class Asked:
    """A read as the oracle knows it."""

    keys: set[str]
    due: float
    start: float
    end: float
    #: None: it fails.
    rows: dict[str, float] | None
    vain: bool = False
    heard: bool = False


class Oracle:
    """The same in lists, from the words of the module: no cache, no columns, no thread."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.now = 0.0
        self.free_at = 0.0
        self.reads: dict[str, list[Asked]] = {"a": [], "b": []}
        self.bad = {"a": 0, "b": 0}
        self.tripped: dict[str, float | None] = {"a": None, "b": None}

    def phase(self, view: str) -> str:
        tripped = self.tripped[view]
        if tripped is None:
            return "closed"
        return "open" if self.now < tripped + COOL else "half open"

    def note(self, view: str, what: str) -> None:
        phase = self.phase(view)
        if phase == "open" or (phase == "half open" and what == "late"):
            return
        if what == "good":
            self.bad[view], self.tripped[view] = 0, None
            return
        self.bad[view] += 1
        if self.bad[view] >= TRIPS:
            self.tripped[view] = self.now

    def under_way(self, view: str) -> Asked | None:
        return next((read for read in self.reads[view] if not read.heard), None)

    def hear(self, view: str) -> None:
        read = self.under_way(view)
        if read is None or read.end > self.now:
            return
        read.heard = True
        if read.rows is None:
            if not read.vain or self.phase(view) == "half open":
                self.note(view, "bad")
        elif read.end - read.start <= BUDGET + KEY * len(read.keys):
            self.note(view, "good")
        elif not read.vain:
            self.note(view, "late")

    def newest(self, view: str, key: str) -> Asked | None:
        brought = (r for r in self.reads[view] if r.heard and r.rows is not None and key in r.keys)
        return max(brought, key=lambda read: read.end, default=None)

    def is_fresh(self, view: str, key: str) -> bool:
        read = self.newest(view, key)
        return read is not None and read.start + TTL > self.now

    def turn(self, view: str, keys: set[str], left: float) -> tuple[str | None, set[str], float]:
        """Return how the read went, the keys left without an answer, and the budget left."""
        waited, granted = None, False
        self.hear(view)
        lacking = {key for key in keys if not self.is_fresh(view, key)}
        while True:
            self.hear(view)
            if not lacking:
                return waited, lacking, left
            phase, read = self.phase(view), self.under_way(view)
            mine = read is None and phase != "open"
            if mine:
                start = max(self.now, self.free_at)
                self.free_at = start + self.world.took
                truth = None if self.world.fails else dict(self.world.truth[view])
                behind = granted and left <= 0
                wanted = set(lacking) if behind else set(sorted(lacking)[:MOST])
                due = self.now + BUDGET + KEY * len(wanted)
                read = Asked(wanted, due, start, self.free_at, truth)
                self.reads[view].append(read)
            if phase != "closed":
                return "refused", lacking, left
            assert read is not None
            if mine and not granted:
                left += KEY * len(read.keys)
                granted = True
            patience = max(left, 0)
            if read.end > self.now + patience:
                self.now += patience
                if (mine and waited is None) or self.now >= read.due:
                    self.note(view, "late")
                    read.vain = True
                return "late", lacking, left - patience
            left -= max(read.end - self.now, 0)
            self.now = max(self.now, read.end)
            self.hear(view)
            if read.rows is None:
                return "failed", lacking, left
            waited = "ok"
            if mine:
                lacking -= read.keys
            else:
                lacking = {key for key in lacking if not self.is_fresh(view, key)}

    def served(self, view: str, key: str, unanswered: bool) -> tuple[float, Served]:
        read = self.newest(view, key)
        value = np.nan if read is None or read.rows is None else read.rows.get(key, np.nan)
        if np.isnan(value):
            return value, UNAVAILABLE if unanswered else MISSING
        return value, STALE if unanswered else FRESH


NAMES = ["a", "b"]
SOME_KEYS = st.lists(st.sampled_from(["k0", "k1", "k2", "k3", "k4"]), max_size=6)


class Guarded(RuleBasedStateMachine):
    """Whatever a store does, rows, flags, waiting times and breakers are the oracle's."""

    def __init__(self) -> None:
        super().__init__()
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(guarded_reads, "KEY_S", KEY)
        self.patched.setattr(guarded_reads, "MOST_KEYS", MOST)
        self.world = World()
        self.oracle = Oracle(self.world)
        self.views = {name: ProfileView(name, "key", ("x",), ttl_ms=10**9) for name in NAMES}

        @dataclass
        class Store:
            view: ProfileView
            world: World

            def read(self, keys: list[bytes]) -> Rows:
                return self.world.read(self.view, keys)

        readers = {name: Store(view, self.world) for name, view in self.views.items()}
        store = OnlineStore(readers, clock=self.world.clock, cache_ttl_s=TTL, cache_rows=50)
        self.reads = GuardedReads(
            store,
            budget_s=BUDGET,
            read_s=0.0,  # no repetition: those are tested below
            breaker=lambda clock: Breaker(
                clock, trips_after=TRIPS, cool_down_s=COOL, uniform=lambda a, b: (a + b) / 2
            ),
            in_background=self.world.in_background,
        )

    def teardown(self) -> None:
        self.patched.undo()

    @rule(took=st.sampled_from([1, 9, 20, 21, 24, 50, 150, 700]), fails=st.booleans())
    def the_store_becomes(self, took: int, fails: bool) -> None:
        self.world.took, self.world.fails = float(took), fails

    @rule(seconds=st.sampled_from([1, 7, 21, 59, 60, 100, 400]))
    def time_passes(self, seconds: int) -> None:
        self.world.now += seconds
        self.oracle.now = self.world.now

    @rule(
        view=st.sampled_from(NAMES),
        key=st.sampled_from(["k0", "k1", "k2"]),
        value=st.integers(0, 9),
    )
    def a_row_is_written(self, view: str, key: str, value: int) -> None:
        self.world.truth[view][key] = float(value)

    @rule(
        views=st.sampled_from([["a"], ["a"], ["b"], ["a", "b"], ["b", "a"]]),
        some=st.tuples(SOME_KEYS, SOME_KEYS),
    )
    def a_batch_comes(self, views: list[str], some: tuple[list[str], list[str]]) -> None:
        keys = dict(zip(views, some, strict=False))
        before, begun = self.world.now, self.world.begun
        asked = [(self.views[view], bytes_of(*keys[view])) for view in views]
        found = self.reads.lookup(asked, NOW_MS)

        left = BUDGET
        for view, profiles in zip(views, found, strict=True):
            how, lacking, left = self.oracle.turn(view, set(keys[view]), left)
            assert profiles.read == how
            left = min(left, BUDGET)
            assert bool(profiles.why) == (how not in (None, "ok"))
            expected = [self.oracle.served(view, key, key in lacking) for key in keys[view]]
            values = [value for value, _ in expected]
            np.testing.assert_array_equal(profiles.values[:, 0], values)
            np.testing.assert_array_equal(profiles.age_ms, NOW_MS - np.array(values))
            assert profiles.served.tolist() == [served for _, served in expected]
        assert self.world.now == self.oracle.now
        assert self.world.begun == sum(map(len, self.oracle.reads.values()))
        waited = self.world.now - before
        assert waited <= BUDGET + KEY * sum(min(len(set(some)), MOST) for some in keys.values())
        if all(profiles.read is None for profiles in found):
            assert self.world.begun == begun and waited == 0
        if all(profiles.read in (None, "refused") for profiles in found):
            assert waited == 0

    @invariant()
    def breakers_agree(self) -> None:
        for name, view in self.views.items():
            assert self.reads.is_open(view) == (self.oracle.phase(name) != "closed")


TestGuarded = Guarded.TestCase
TestGuarded.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


# Repetitions


def failing(times: int, clock: Clock, attempt_s: float = 0.0) -> tuple[Reader, list[float]]:
    """Return a reader that fails so many times first, and the times it was asked at."""
    asked: list[float] = []

    def before(keys: list[bytes]) -> None:
        asked.append(clock.now)
        clock.now += attempt_s
        if len(asked) <= times:
            raise StoreUnavailable(f"no {len(asked)}")

    return Reader(CARD, {"C1": 5.0}, before), asked


def test_failures_are_repeated_after_exponential_backoff_with_full_jitter() -> None:
    random.seed(7)
    pauses: list[list[float]] = [[] for _ in range(8)]
    for _ in range(100):
        clock = Clock()
        reader, asked = failing(8, clock)
        reads = guarded(reader, clock=clock, in_background=at_once, sleep=clock.sleep, read_s=9e9)
        found = ask(reads, CARD, "C1")
        assert found.values.tolist() == [[5.0, 6.0]] and found.served.tolist() == [FRESH]
        assert len(asked) == 9
        for nth, pause in enumerate(np.diff(asked)):
            pauses[nth].append(float(pause))
    for nth, drawn in enumerate(pauses):
        bound = min(guarded_reads.BACKOFF_S * 2**nth, guarded_reads.MOST_BACKOFF_S)
        assert max(drawn) <= bound
        assert max(drawn) > 0.9 * bound and min(drawn) < 0.1 * bound  # from nothing to the bound


def test_no_repetition_starts_after_the_reads_own_bound() -> None:
    for attempt_s in (0.0, 0.03, 0.4, 2.0):
        clock = Clock()
        reader, asked = failing(10**9, clock, attempt_s)
        reads = guarded(reader, clock=clock, in_background=at_once, sleep=clock.sleep, read_s=1.0)
        found = ask(reads, CARD, "C1", "C2")
        assert found.served.tolist() == [UNAVAILABLE] * 2 and found.read == "failed"
        assert found.why == f"no {len(asked)}"
        assert asked[-1] < 1.0 and len(asked) > (1 if attempt_s < 0.5 else 0)


def test_repetitions_end_when_the_breaker_opens() -> None:
    clock = Clock()
    reader, asked = failing(10**9, clock)

    def sleep(seconds: float) -> None:
        if len(asked) == 3:  # batches have waited in vain meanwhile
            for _ in range(5):
                reads._views[CARD.name].breaker.late()

    reads = guarded(reader, clock=clock, in_background=at_once, sleep=sleep, read_s=9e9)
    assert ask(reads, CARD, "C1").read == "failed"
    assert reads.is_open(CARD) and len(asked) == 3


def test_a_bug_is_not_repeated_and_not_hidden() -> None:
    asked = []

    def before(keys: list[bytes]) -> None:
        asked.append(keys)
        raise TypeError("a bug")

    reads = guarded(Reader(CARD, {}, before))
    with pytest.raises(TypeError, match="a bug"):
        ask(reads, CARD, "C1")
    assert len(asked) == 1


# What is known of a row


def test_every_row_says_where_it_comes_from() -> None:
    clock, down = Clock(), [False]

    def before(keys: list[bytes]) -> None:
        if down[0]:
            raise StoreUnavailable("gone")

    # C2's row is of the event's future, C3's too old for the view.
    reader = Reader(CARD, {"C1": 5.0, "C2": NOW_MS + 1.0, "C3": NOW_MS - 1e9 - 1}, before)
    reads = guarded(reader, clock=clock, in_background=at_once, read_s=0.0, cache_ttl_s=10)
    keys = ("C1", "C2", "C3", "nobody")
    found = ask(reads, CARD, *keys)
    assert found.served.tolist() == [FRESH, MISSING, MISSING, MISSING] and found.read == "ok"
    np.testing.assert_array_equal(found.age_ms, [NOW_MS - 5, -1, 1e9 + 1, np.nan])
    down[0], clock.now = True, 10.0
    found = ask(reads, CARD, *keys, "C9")
    assert found.served.tolist() == [STALE, *([UNAVAILABLE] * 4)] and found.read == "failed"
    np.testing.assert_array_equal(found.values[:, 0], [5, *([np.nan] * 4)])
    assert found.why == "gone"
    down[0] = False
    reader.known["C9"] = 7.0  # what failed was not cached as unknown
    found = ask(reads, CARD, *keys, "C9")
    assert found.served.tolist() == [FRESH, MISSING, MISSING, MISSING, FRESH]
    assert found.why == ""


@pytest.mark.parametrize("cache_rows", [1, 3, 100])
def test_a_batch_gets_its_answer_though_the_cache_is_small(cache_rows: int) -> None:
    known = {f"C{n}": float(n) for n in range(20)}
    reads = guarded(Reader(CARD, known), in_background=at_once, cache_rows=cache_rows)
    keys = [f"C{n % 20}" for n in range(0, 60, 3)]
    for _ in range(2):
        found = ask(reads, CARD, *keys)
        assert found.values[:, 0].tolist() == [known[key] for key in keys]
        assert not found.served.any()


def test_bounds_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"budget_s=-1.*may be below 0"):
        guarded(Reader(CARD, {}), budget_s=-1.0)


# The thread


class Recorded:
    """The real thread; keeps what batches were ready to wait, and how much was asked of it."""

    def __init__(self) -> None:
        self.thread = ReadingThread()
        self.waits: list[float] = []
        self.begun = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[float], bool]:
        self.begun += 1
        over = self.thread(work)

        def wait(timeout_s: float) -> bool:
            self.waits.append(timeout_s)
            return over(timeout_s)

        return wait


def test_hits_leave_the_thread_alone() -> None:
    thread = Recorded()
    reads = guarded(Reader(CARD, {"C1": 1.0}), in_background=thread, budget_s=5.0)
    empty = ask(reads, CARD)
    assert empty.values.shape == (0, 2) and empty.served.shape == (0,)
    assert thread.thread._thread is None, "started before there was anything to read"
    assert ask(reads, CARD, "C1", "C2").read == "ok"
    asked = thread.begun, len(thread.waits)
    for _ in range(3):
        found = ask(reads, CARD, "C2", "C1")
        assert found.read is None and found.served.tolist() == [MISSING, FRESH]
    assert (thread.begun, len(thread.waits)) == asked


def test_a_store_that_hangs_costs_each_batch_its_budget_then_nothing() -> None:
    release, thread = threading.Event(), Recorded()
    hanging = [Reader(view, {"K1": 1.0}, lambda keys: release.wait(60)) for view in (CARD, SHOP)]
    reads = guarded(*hanging, in_background=thread, budget_s=0.01)
    assert thread.begun == 0
    refused = 0
    for n in range(30):
        before = len(thread.waits)
        asked = [(view, bytes_of("K1", f"K{n}")) for view in (CARD, SHOP)]
        for found in reads.lookup(asked, NOW_MS):
            assert found.served.tolist() == [UNAVAILABLE] * 2
            assert found.read in ("late", "refused") and found.why == "no answer within 10 ms"
            refused += found.read == "refused"
        assert sum(thread.waits[before:]) <= 0.01 + 5 * guarded_reads.KEY_S
    assert thread.begun == 2, "one read of each view, however many batches ask"
    assert reads.is_open(CARD) and reads.is_open(SHOP) and refused >= 2 * 30 - 2 * 5
    release.set()


def test_thousands_of_cold_keys_cost_no_more_of_a_store_that_hangs() -> None:
    release, thread = threading.Event(), Recorded()
    hanging = [Reader(view, {}, lambda keys: release.wait(60)) for view in (CARD, SHOP)]
    reads = guarded(*hanging, in_background=thread, budget_s=0.01)
    keys = bytes_of(*(f"K{n}" for n in range(4096)))
    for found in reads.lookup([(view, keys) for view in (CARD, SHOP)], NOW_MS):
        assert found.read == "late" and set(found.served.tolist()) == {UNAVAILABLE}
    assert sum(thread.waits) <= 0.01 + 2 * guarded_reads.MOST_KEYS * guarded_reads.KEY_S
    release.set()


def test_thousands_of_cold_keys_are_all_read_if_the_store_answers() -> None:
    asked: list[list[bytes]] = []
    known = {f"K{n}": float(n) for n in range(0, 4096, 2)}
    reads = guarded(Reader(CARD, known, asked.append), budget_s=5.0, cache_rows=50)
    order = random.Random(1).sample(range(4096), 4096)
    found = ask(reads, CARD, *(f"K{n}" for n in order))
    assert found.read == "ok"
    expected = [n if n % 2 == 0 else np.nan for n in order]
    np.testing.assert_array_equal(found.values[:, 0], expected)
    assert max(map(len, asked)) == guarded_reads.MOST_KEYS
    once = sorted(key for keys in asked for key in keys)
    assert once == sorted(f"K{n}".encode() for n in range(4096))


@pytest.mark.parametrize("latency_ms", [1, 5, 12, 20, 32, 33, 40, 100, 400])
def test_a_slow_store_costs_a_batch_no_more_than_one_that_hangs(latency_ms: int) -> None:
    world = World(took=latency_ms / 1000, truth={CARD.name: {}, SHOP.name: {}})
    for number in range(4096):
        for known in world.truth.values():
            known[f"K{number}"] = float(number)
    keys = bytes_of(*(f"K{number}" for number in range(4096)))

    @dataclass
    class Store:
        view: ProfileView

        def read(self, keys: list[bytes]) -> Rows:
            return world.read(self.view, keys)

    readers = {view.name: Store(view) for view in (CARD, SHOP)}
    reads = GuardedReads(
        OnlineStore(readers, clock=world.clock, cache_ttl_s=1e6, cache_rows=10_000),
        in_background=world.in_background,
    )
    most_s = 0.02 + 2 * guarded_reads.MOST_KEYS * guarded_reads.KEY_S
    opened = False
    for _ in range(200):
        before = world.now
        found = reads.lookup([(view, keys) for view in (CARD, SHOP)], NOW_MS)
        assert world.now - before <= most_s + 1e-9
        opened |= reads.is_open(CARD)
        world.now += 0.1
        # What was not answered in time is not made up.
        for profiles in found:
            fresh = profiles.served == Served.FRESH
            assert (profiles.values[fresh, 0] == np.arange(4096)[fresh]).all()
            assert np.isnan(profiles.values[~fresh]).all()
    # Behind the batches, all of it is read in the end, and a store that is quick enough for one
    # read is not given up for the number of the keys.
    if latency_ms <= 20:
        assert not opened
        assert all((profiles.served == Served.FRESH).all() for profiles in found)
    if latency_ms >= 50:
        assert opened


def test_what_comes_late_is_there_for_the_next_batch() -> None:
    release = threading.Event()
    reader = Reader(CARD, {"C1": 1.0}, lambda keys: release.wait(60))
    reads = guarded(reader, budget_s=0.001)
    assert ask(reads, CARD, "C1").served.tolist() == [UNAVAILABLE]
    release.set()
    late = reads._views[CARD.name]
    assert late.wait(60)
    asked = []
    reader.before = asked.append
    assert ask(reads, CARD, "C1").served.tolist() == [FRESH]
    assert asked == []


def test_an_error_is_told_from_silence() -> None:
    """While its repetitions go on, the batch's time runs out."""

    def refuse(keys: list[bytes]) -> None:
        raise StoreUnavailable("connection refused")

    reads = guarded(Reader(CARD, {}, refuse), budget_s=0.2, read_s=60.0)
    found = ask(reads, CARD, "C1")
    assert found.read == "failed" and found.why == "connection refused"
    while not reads.is_open(CARD):
        ask(reads, CARD, "C1")
    assert reads._views[CARD.name].wait(60), "repeated past the breaker"


def test_threads_may_share_it() -> None:
    known = {f"C{n}": float(n) for n in range(50)}

    def before(keys: list[bytes]) -> None:
        time.sleep(random.random() / 1000)
        if random.random() < 0.05:
            raise StoreUnavailable("now and then")

    reads = guarded(Reader(CARD, known, before), budget_s=0.5, cache_ttl_s=0.005, cache_rows=20)
    wrong: list[Profiles] = []

    def worker(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            keys = rng.choices([*known, "nobody"], k=rng.randrange(8))
            found = ask(reads, CARD, *keys)
            expected = np.array([known.get(key, np.nan) for key in keys])
            there = ~np.isnan(found.values[:, 0])
            right = (found.values[there, 0] == expected[there]).all()
            if not right or ((found.served < MISSING) != there).any():
                wrong.append(found)

    workers: Sequence[threading.Thread] = [
        threading.Thread(target=worker, args=(n,)) for n in (1, 2)
    ]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
