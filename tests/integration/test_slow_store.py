"""A real online store that is slow, silent, locked or gone: batches keep their time budget, rows
come from the old cache and say so, and fresh ones come back with the store."""

from __future__ import annotations

import contextlib
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from features import guarded_reads, online_store, profiles
from features.guarded_reads import GuardedReads, Profiles, ReadingThread, Served
from features.online_store import OnlineStore
from features.profiles import CUSTOMER_PROFILE, DAY_MS, PROFILES
from tests.integration.conftest import await_that
from tests.integration.feast_stores import (
    KEYS,
    LAST,
    Redis,
    SlowProxy,
    history,
    profile_files,
    redis_server,
)

__all__ = ["history", "profile_files", "redis_server"]  # fixtures
MIDNIGHT = LAST - DAY_MS
BUDGET_S = 0.03
DELAY_S = 0.5
CACHE_TTL_S = 60.0
TRIPS_AFTER = 5  # the breaker's default
FRESH, STALE, MISSING, UNAVAILABLE = Served
#: 3 known to the cache from the beginning, and how many later ones.
OLD, BATCHES = 3, 12


@dataclass
class ShiftedClock:
    """The monotonic clock, which a test may push ahead."""

    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


@dataclass
class Asking:
    """Looks up what a batch would, and checks how long it waits and what it is told."""

    repo: Path
    offline: Path
    clock: ShiftedClock = field(default_factory=ShiftedClock)
    #: How long a batch was ready to wait, and whether an answer came by then.
    waits: list[tuple[float, bool]] = field(default_factory=list)
    #: The old keys are in the cache, and all is compiled.
    warm: bool = False

    def __post_init__(self) -> None:
        store = OnlineStore.open(self.repo, clock=self.clock, cache_ttl_s=CACHE_TTL_S)
        thread = ReadingThread()

        def recorded(work: Callable[[], None]) -> Callable[[float], bool]:
            over = thread(work)

            def wait(timeout_s: float) -> bool:
                answered = over(timeout_s)
                self.waits.append((timeout_s, answered))
                return answered

            return wait

        self.reads = GuardedReads(store, budget_s=BUDGET_S, in_background=recorded)

    def batch(self, *later: int) -> list[Profiles]:
        """Look the old keys up, the named later ones, and one that nobody knows; in both views."""
        asked = []
        for view in PROFILES:
            keys = KEYS[view]
            asked.append((view, np.r_[keys[:OLD], keys[[OLD + n for n in later]], [b"nobody"]]))
        waited, since = len(self.waits), time.monotonic()
        found = self.reads.lookup(asked, MIDNIGHT)
        took_s = time.monotonic() - since
        allowed = BUDGET_S + guarded_reads.KEY_S * sum(len(keys) for _, keys in asked)
        waits = self.waits[waited:]
        assert all(ready_s <= allowed for ready_s, _ in waits)
        assert sum(ready_s for ready_s, answered in waits if not answered) <= allowed
        # Generous: what must not be waited for takes twice as long.
        assert took_s < DELAY_S / 2 or not self.warm, "a batch was held up"
        for (view, keys), profile in zip(asked, found, strict=True):
            moments = np.full(len(keys), MIDNIGHT)
            expected, _ = profiles.point_in_time(view, keys, moments, self.offline)
            there = profile.served < MISSING
            np.testing.assert_array_equal(profile.values[there], expected[there])
            assert np.isnan(profile.values[~there]).all()
            assert (there[:OLD].all() or not self.warm) and not there[-1]
        return found

    def all_fresh(self, *later: int) -> bool:
        """Tell whether a batch gets everything from the store, and what nobody knows is known."""
        return all(
            set(found.served[:-1].tolist()) == {FRESH} and found.served[-1] == MISSING
            for found in self.batch(*later)
        )

    def is_open(self) -> bool:
        return all(self.reads.is_open(view) for view in PROFILES)


@dataclass
class Place:
    """Where a store is, and what its tests need to break it."""

    asking: Asking
    redis: Redis | None = None
    proxy: SlowProxy | None = None


Fault = Callable[[Place, pytest.MonkeyPatch], contextlib.AbstractContextManager[None]]


def filled(folder: Path, online: str, files: Path) -> Path:
    online_store.write_repo(folder, online)
    online_store.materialize(folder, MIDNIGHT, files)
    return folder


@contextlib.contextmanager
def slow(place: Place, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every answer comes half a second late."""
    place.proxy.delay_s = DELAY_S
    yield
    place.proxy.delay_s = 0.0


@contextlib.contextmanager
def frozen(place: Place, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connections stay, no answer comes."""
    place.redis.process.send_signal(signal.SIGSTOP)
    yield
    place.redis.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def killed(place: Place, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gone, then there again with what it held."""
    place.redis.client().save()
    place.redis.stop()
    yield
    place.redis.process = subprocess.Popen(place.redis.process.args)
    await_that(place.redis.client().dbsize, "redis has loaded its rows")


@contextlib.contextmanager
def nameless(place: Place, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The connection is lost, and the name server does not answer, nor give up."""
    answer, resolve = threading.Event(), socket.getaddrinfo

    def getaddrinfo(*arguments, **options):
        if threading.current_thread().name == "profile-reads":
            assert answer.wait(60)
        return resolve(*arguments, **options)

    patch.setattr(socket, "getaddrinfo", getaddrinfo)
    place.redis.client().client_kill_filter(_type="normal", skipme=True)
    yield
    answer.set()


@contextlib.contextmanager
def locked(place: Place, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Somebody writes to a SQLite file without write-ahead logging."""
    with contextlib.closing(sqlite3.connect(place.asking.repo / "data/online.db")) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        yield
        writer.rollback()


@pytest.fixture
def place_of(profile_files, request, tmp_path, monkeypatch) -> Callable[[Fault], Place]:
    """Return what sets a store up for a fault."""

    def made(fault: Fault) -> Place:
        if fault is locked:
            monkeypatch.setattr(online_store, "_let_readers_in", lambda config: None)
            repo = filled(tmp_path / "repo", "sqlite", profile_files)
            return Place(Asking(repo, profile_files))
        redis = request.getfixturevalue("redis_server")
        if fault is not slow:
            repo = filled(tmp_path / "repo", redis.url, profile_files)
            return Place(Asking(repo, profile_files), redis)
        proxy = SlowProxy(redis.port)
        request.addfinalizer(proxy.close)
        repo = filled(tmp_path / "repo", f"redis://127.0.0.1:{proxy.port}", profile_files)
        return Place(Asking(repo, profile_files), redis, proxy)

    return made


def warm(asking: Asking) -> None:
    """Have the old keys in the cache, and past its TTL."""
    while not asking.all_fresh():
        asking.clock.ahead_s += 4  # past a cool-down, should the machine have been too slow
    asking.clock.ahead_s += CACHE_TTL_S
    asking.warm = True


@pytest.mark.parametrize("fault", [slow, frozen, killed, nameless, locked])
def test_scoring_goes_on_without_its_store(fault, place_of, monkeypatch):
    place = place_of(fault)
    asking = place.asking
    warm(asking)
    ended: dict[str, list[str]] = {view.name: [] for view in PROFILES}
    with fault(place, monkeypatch):
        since = time.monotonic()
        for n in range(BATCHES):
            for view, found in zip(PROFILES, asking.batch(n), strict=True):
                ended[view.name].append(found.read)
                assert found.read in ("late", "failed", "refused") and found.why
                if fault is not slow or time.monotonic() - since < DELAY_S:  # nothing came yet
                    assert found.served.tolist() == [STALE] * OLD + [UNAVAILABLE] * 2
        assert asking.is_open()
        for how in ended.values():
            waited = BATCHES - how.count("refused")
            assert waited <= TRIPS_AFTER and how[waited:] == ["refused"] * (BATCHES - waited)
    asking.clock.ahead_s += 4
    await_that(lambda: asking.all_fresh(*range(BATCHES)), "everything is fresh again")

    def is_waited_for() -> bool:
        asking.clock.ahead_s += CACHE_TTL_S
        return [found.read for found in asking.batch(0)] == ["ok", "ok"]

    await_that(is_waited_for, "batches wait for the store again, and get their answer")
    assert not any(asking.reads.is_open(view) for view in PROFILES)


def test_a_slow_store_fills_the_cache_though_nobody_waits(place_of, monkeypatch):
    place = place_of(slow)
    asking = place.asking
    warm(asking)
    with slow(place, monkeypatch):
        for n in range(BATCHES):
            asking.batch(n)
        assert asking.is_open()
        asking.clock.ahead_s += 4  # half open
        waits = len(asking.waits)
        await_that(lambda: asking.all_fresh(*range(BATCHES)), "late answers are in the cache")
        assert not any(ready_s for ready_s, _ in asking.waits[waits:]), "somebody waited"
        assert asking.is_open(), "closed by a late answer"


def test_a_store_that_answers_is_not_cut_short(place_of, profile_files):
    """Cold, for every key there is: exact, as without a guard."""
    asking = place_of(frozen).asking
    reads = GuardedReads(OnlineStore.open(asking.repo), budget_s=10.0)
    moments = MIDNIGHT + np.arange(len(KEYS[CUSTOMER_PROFILE])) * 1000
    (found,) = reads.lookup([(CUSTOMER_PROFILE, KEYS[CUSTOMER_PROFILE])], moments)
    alone = OnlineStore.open(asking.repo).lookup(CUSTOMER_PROFILE, KEYS[CUSTOMER_PROFILE], moments)
    np.testing.assert_array_equal(found.values, alone[0])
    np.testing.assert_array_equal(found.age_ms, alone[1])
    assert found.read == "ok" and not found.served.any()
