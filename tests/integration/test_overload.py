"""A rush on the real flow: what is shed, what is answered in short, and that nothing is lost."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest

from tests.integration.conftest import await_that
from tests.integration.flow import (
    CARDS,
    MIDNIGHT,
    PARTITIONS,
    TERMINALS,
    Flow,
    FlowEnv,
    Sent,
    flow_env,  # noqa: F401
    send,
    tiny_feast,  # noqa: F401
    tiny_model,  # noqa: F401
)
from tests.integration.test_distinct import replayed

CRITICAL = 400.0


def transactions(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "transaction_id": f"tx{n:05d}",
            "card_id": CARDS[n * 7 % 20],
            "terminal_id": TERMINALS[n * 11 % 15],
            "event_time": MIDNIGHT + n * 60_000,
            "amount": (n * 37 % 500) + 0.25,
        }
        for n in range(first, first + count)
    ]


def sent(env: FlowEnv, events: list[dict[str, Any]]) -> None:
    """Send them all at once, over all partitions, each card to one."""
    topic = env.topics["transactions"]
    send(
        env.broker,
        [
            Sent(
                topic,
                json.dumps(event).encode(),
                event["card_id"].encode(),
                CARDS.index(event["card_id"]) % PARTITIONS["transactions"],
            )
            for event in events
        ],
    )


def predicted(env: FlowEnv) -> dict[str, dict[str, Any]]:
    """Return transaction → prediction; each has one."""
    values = [json.loads(message.value()) for message in env.read("predictions")]
    found = {value["transaction_id"]: value for value in values}
    assert len(found) == len(values), "a transaction has two predictions"
    return found


def gauge(flow: Flow, name: str) -> float:
    lines = [line for line in flow.metrics().splitlines() if line.startswith(f"scoring_{name} ")]
    return float(lines[0].rpartition(" ")[2])


@pytest.mark.parametrize("policy", ["sample", "degrade", "drop"])
def test_in_a_rush_no_event_is_lost_and_the_windows_see_all(
    flow_env: FlowEnv,  # noqa: F811
    policy: str,
) -> None:
    """The rate limit is what makes a rush of 4,000 events one: they take five seconds."""
    env, events = flow_env, transactions(4_000)
    flow = env.flow(
        OVERLOAD_POLICY=policy,
        OVERLOAD_TARGET_MS="200",
        CRITICAL_AMOUNT=str(CRITICAL),
        RATE_LIMIT="200",
        RATE_BURST="10",
        AUDIT_SHARE="1",
        DELIVERY="exactly_once",
    ).start()
    began = time.monotonic()
    sent(env, events)
    await_that(lambda: gauge(flow, "overload_level") > 0, "an overload", 30)
    await_that(lambda: env.count("predictions") >= len(events), "all outcomes", 60)
    took_s = time.monotonic() - began
    await_that(lambda: gauge(flow, "overload_level") == 0, "the overload is over", 30)
    assert flow.stop() == 0, flow.log

    found = predicted(env)
    assert found.keys() == {event["transaction_id"] for event in events}
    modes = Counter(value["score_mode"] for value in found.values())
    reduced = {"sample": {"shed"}, "degrade": {"cached", "rule"}, "drop": {"shed"}}[policy]
    assert set(modes) - {"full"} <= reduced and modes["full"] < len(events) - 100, modes
    critical = {event["transaction_id"] for event in events if event["amount"] >= CRITICAL}
    assert {found[name]["score_mode"] for name in critical} == {"full"}
    reasons = Counter(value.get("shed") for value in found.values())
    assert set(reasons) <= {None, {"sample": "sampled", "drop": "dropped"}.get(policy)}

    account = flow.account()[env.topics["transactions"]]
    assert account["read"] == len(events) == account["scored"] + account["shed"], account
    assert account["shed"] == modes["shed"]
    # Four partitions, each with no more than its bucket.
    largest = max(Counter(CARDS.index(e["card_id"]) % 4 for e in events).values())
    assert took_s >= (largest - 10) / 200 * 0.95

    # What was shed has moved the windows: the others saw what they would have seen.
    exact = replayed([("transactions", event) for event in events])
    audited = [json.loads(message.value()) for message in env.read("audit")]
    assert len(audited) == modes["full"]
    for record in audited:
        assert record["features"] == exact[record["transaction_id"]]


@pytest.mark.parametrize("catch_up", ["score_all", "degrade", "skip"])
def test_what_came_in_a_downtime_is_told_from_what_comes_after(
    flow_env: FlowEnv,  # noqa: F811
    catch_up: str,
) -> None:
    env, events = flow_env, transactions(300)
    env.variables |= {"CATCH_UP": catch_up, "CRITICAL_AMOUNT": str(CRITICAL)}
    sent(env, events[:100])
    first = env.flow(CATCH_UP="score_all").start()
    env.await_count("predictions", 100)
    assert first.stop() == 0, first.log
    sent(env, events[100:200])
    second = env.flow().start()
    sent(env, events[200:])
    env.await_count("predictions", 300)
    assert second.stop() == 0, second.log

    found = predicted(env)
    missed = {"score_all": {"full"}, "degrade": {"cached", "rule"}, "skip": {"shed"}}[catch_up]
    for event in events:
        mode = found[event["transaction_id"]]["score_mode"]
        n = int(event["transaction_id"][2:])
        in_downtime = 100 <= n < 200 and event["amount"] < CRITICAL
        assert mode in (missed if in_downtime else {"full"}), (n, mode)
