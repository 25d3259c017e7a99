"""More than can be done, a store or a broker that does not answer: the real flow under load.

For each: that it does what docs/overload.md says, that every event has its outcome in the end, and
how long it took to be as before (shown by ``-s``; docs/outages.md names them).
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.trial import AT_LEAST, EXACTLY, Trial, one
from tests.integration.feast_stores import Redis, SlowProxy, redis_server
from tests.integration.flow import MIDNIGHT, fill_repo, tiny_feast, tiny_model, write_history
from tests.kafka.client import await_that

__all__ = ["one", "redis_server", "tiny_feast", "tiny_model"]  # fixtures

Make = Callable[..., Trial]
CRITICAL = 250.0
#: How events that are not critical may be answered besides.
SPARED = {"degrade": {"cached", "rule"}, "drop": {"shed"}}


def recovers(trial: Trial, what: str, since: float) -> None:
    """Wait until the flow is not overloaded and up to date; say how long that took."""

    def as_before() -> bool:
        seen = trial.flow.samples()
        late = [s for name, s in seen.items() if name.startswith("scoring_lag_seconds{")]
        return seen.get("scoring_overload_level", 0.0) == 0 and bool(late) and max(late) < 1

    await_that(as_before, "the flow is up to date again", 120)
    print(f"{what}: {time.monotonic() - since:.1f} s")


def critical_are_full(trial: Trial) -> None:
    """Check that what is critical was scored in full, whatever happened."""
    for record in trial.env.read("predictions"):
        value = json.loads(record.value())
        n = int(value["transaction_id"][1:])
        assert value["score_mode"] == "full" or 1 + n * 37 % 300 < CRITICAL, value
        assert value["latency_ms"] >= 0


@pytest.mark.parametrize(
    ("policy", "delivery", "kill"), [("degrade", EXACTLY, True), ("drop", AT_LEAST, False)]
)
def test_a_minute_of_three_times_the_rate(
    one: Make, policy: str, delivery: str, kill: bool
) -> None:
    """The bottleneck is the rate limit, so that it is the same on every machine. A kill in the
    rush: what is computed again may be decided otherwise, and still has one outcome."""
    usual = 160
    trial = one(
        delivery,
        rate=usual,
        count=100_000,
        OVERLOAD_POLICY=policy,
        CRITICAL_AMOUNT=str(CRITICAL),
        OVERLOAD_DEADLINE_S="5",
        RATE_LIMIT="140",  # the fullest partition has 58 a second, and 173 in the rush
        RATE_BURST="140",
    )
    trial.start()
    trial.load.pace(3 * usual)
    ends = time.monotonic() + 60
    await_that(lambda: trial.flow.samples()["scoring_overload_level"] > 0, "an overload", 60)
    if kill:
        trial.flow.kill()
        trial.restart()
    await_that(lambda: time.monotonic() >= ends, "the minute is over", 60)
    trial.load.pace(usual)
    recovers(trial, f"after a minute of three times the rate, {policy}", ends)
    trial.finish()
    critical_are_full(trial)
    assert {"full"} < set(trial.modes) <= {"full"} | SPARED[policy], trial.modes


@pytest.mark.parametrize(("policy", "delivery"), [("degrade", EXACTLY), ("drop", AT_LEAST)])
def test_the_broker_stands_still(one: Make, policy: str, delivery: str) -> None:
    """What was sent meanwhile came in a downtime: it is caught up with in a way of its own."""
    catch_up = {"degrade": "degrade", "drop": "skip"}[policy]
    trial = one(delivery, OVERLOAD_POLICY=policy, CATCH_UP=catch_up, CRITICAL_AMOUNT=str(CRITICAL))
    trial.start()
    assert trial.flow.asked("/readyz")[0] == 200
    assert trial.flow.samples()["scoring_brokers_reachable"] == 1
    trial.cluster.pause(1)
    before = trial.load.sent
    await_that(lambda: trial.flow.asked("/readyz")[0] == 503, "the flow says that it waits")
    assert "no broker has answered for" in trial.flow.asked("/readyz")[1]
    assert trial.flow.samples()["scoring_brokers_reachable"] == 0
    await_that(lambda: trial.load.sent > before + 6 * trial.rate, "six seconds of events")
    assert trial.flow.asked("/healthz")[0] == 200, "a restart brings no broker back"
    trial.cluster.resume(1)
    since = time.monotonic()
    trial.await_answers()
    recovers(trial, f"after the broker stood still, {policy}", since)
    assert trial.flow.asked("/readyz")[0] == 200
    trial.finish()
    critical_are_full(trial)
    assert {"full"} < set(trial.modes) <= {"full"} | SPARED[policy], trial.modes


# The store


@pytest.fixture
def redis_repo(redis_server: Redis, tmp_path: Path) -> Callable[[int], Path]:
    """Return what fills the Redis and gives a repository that reads it by way of another port."""

    def filled(port: int) -> Path:
        history, repo = tmp_path / "history", tmp_path / "repo"
        history.mkdir()
        write_history(history)
        fill_repo(repo, history, MIDNIGHT, f"redis://127.0.0.1:{port}")
        return repo

    return filled


@pytest.fixture
def proxy(redis_server: Redis) -> Iterator[SlowProxy]:
    """What stands before the Redis and can hold its answers back."""
    with SlowProxy(redis_server.port) as found:
        yield found


@pytest.mark.parametrize("fault", ["gone", "frozen", "500 ms"])
def test_the_online_store_does_not_answer(
    one: Make,
    redis_server: Redis,
    proxy: SlowProxy,
    redis_repo: Callable[[int], Path],
    fault: str,
) -> None:
    # Profiles are good for a second, so that there is always something to ask the store for.
    trial = one(FEAST_REPO=str(redis_repo(proxy.port)), FEAST_CACHE_TTL_S="1")
    trial.start()
    await_that(lambda: reads(trial)["ok"] > 0, "the store answers")
    if fault == "gone":
        redis_server.client().save()
        redis_server.stop()
    elif fault == "frozen":
        redis_server.process.send_signal(signal.SIGSTOP)
    else:
        proxy.delay_s = 0.5
    trial.await_log("online store does not answer in time")
    await_that(lambda: opened(trial) == 1, "the breakers open")
    first = trial.answered()
    await_that(lambda: trial.answered() > first + 5 * trial.rate, "five seconds of answers")
    held_up = slower_than(trial, "profiles", 0.25)
    if fault == "gone":
        redis_server.process = subprocess.Popen(redis_server.process.args)
    elif fault == "frozen":
        redis_server.process.send_signal(signal.SIGCONT)
    else:
        proxy.delay_s = 0.0
    since = time.monotonic()
    await_that(lambda: opened(trial) == 0, "the breakers close", 60)
    trial.await_log("online store answers again")
    print(f"after the store was {fault}: {time.monotonic() - since:.1f} s")
    fine = reads(trial)["ok"]
    await_that(lambda: reads(trial)["ok"] > fine, "the store is read again")
    assert held_up == 0, "a batch was held up by half of what the store needs"
    trial.finish()
    flagged = [json.loads(r.value()).get("without", []) for r in trial.env.read("predictions")]
    assert any(flagged) and not flagged[0] and not flagged[-1], "predictions say what they lack"


def reads(trial: Trial) -> dict[str, float]:
    """Return how reads of the store ended, over all views."""
    found = dict.fromkeys(("ok", "failed", "late", "refused"), 0.0)
    for name, value in trial.flow.samples().items():
        if name.startswith("scoring_store_reads_total{"):
            found[name.split('result="')[1].split('"')[0]] += value
    return found


def opened(trial: Trial) -> float:
    """Return how many of the views' breakers are open, as a share; −1: nothing was looked up."""
    states: list[Any] = [
        value
        for name, value in trial.flow.samples().items()
        if name.startswith("scoring_store_breaker_open{")
    ]
    return sum(states) / len(states) if states else -1


def slower_than(trial: Trial, stage: str, bound_s: float) -> float:
    """Return how many micro-batches took a step longer than a bucket's bound."""
    prefix, seen = f'scoring_stage_seconds_bucket{{le="%s",stage="{stage}"}}', trial.flow.samples()
    return seen[prefix % "+Inf"] - seen[prefix % f"{bound_s:g}"]
