"""A producer that sends things twice: the real flow answers once, and its windows do not notice."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from typing import Any
from zlib import crc32

import numpy as np

from features.batch import EventBatch
from features.fraud import FRAUD, SOURCES, FraudReport, Transaction
from features.offline import Replay
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

DAY = 86_400_000
COUNT = 900
#: Events come this far apart in the brokers' time; in their own, they span 24 days.
EVERY_MS = 100
HORIZON_S = 60
#: Of late, or a real broker's retention would delete them.
APPENDED = round(time.time() * 1000) - 600_000
#: Far enough for a duplicate in another partition to be read behind the original: the source
#: takes what happened first, and a duplicate's event time is the original's.
APART = 150

_Event = dict[str, Any]


def happened() -> list[tuple[str, _Event]]:
    """Return (topic, event) in order of stream time: transactions, and a report of every tenth."""
    every: list[tuple[int, str, _Event]] = []
    for n in range(COUNT):
        at = MIDNIGHT + n * (24 * DAY // COUNT)
        event: _Event = {
            "transaction_id": f"tx{n:04d}",
            "card_id": CARDS[n * 7 % 20],
            "terminal_id": TERMINALS[n * 11 % 15],
            "event_time": at,
            "amount": (n * 37 % 500) + 0.25,
        }
        every.append((at, "transactions", event))
        if n % 10 == 0:
            report = {k: event[k] for k in ("transaction_id", "terminal_id", "event_time")}
            late = at + DAY
            every.append((late, "fraud_reports", {**report, "report_time": late}))
    every.sort(key=lambda item: (item[0], item[1]))  # fraud_reports first
    return [(topic, event) for _, topic, event in every]


def partition_of(topic: str, event: _Event) -> int:
    key = str(event["card_id" if topic == "transactions" else "terminal_id"])
    return crc32(key.encode()) % PARTITIONS[topic]


def record(env: FlowEnv, topic: str, event: _Event, at_ms: int, partition: int) -> Sent:
    value = json.dumps(event).encode()
    return Sent(env.topics[topic], value, partition=partition, timestamp=at_ms)


def with_duplicates(env: FlowEnv, events: list[tuple[str, _Event]]) -> list[Sent]:
    """Send a third again, once or twice, in the same partition or another, within the horizon."""
    rng = random.Random(7)
    sent: list[tuple[int, Sent]] = []
    for position, (topic, event) in enumerate(events):
        home = partition_of(topic, event)
        at_ms = APPENDED + position * EVERY_MS
        sent.append((position, record(env, topic, event, at_ms, home)))
        for _ in range(rng.choice([0, 0, 1, 2]) if rng.random() < 0.6 else 0):
            there = home if rng.random() < 0.6 else (home + 1) % PARTITIONS[topic]
            gap = rng.randrange(1 if there == home else APART, HORIZON_S * 1000 // EVERY_MS)
            if position + gap < len(events):
                again_ms = at_ms + gap * EVERY_MS
                sent.append((position + gap, record(env, topic, event, again_ms, there)))
    sent.sort(key=lambda item: item[0])
    return [one for _, one in sent]


def replayed(events: list[tuple[str, _Event]]) -> dict[str, dict[str, float | None]]:
    """Return transaction → features, by the offline replay of what happened, each once."""
    codes = {
        "fraud_reports": SOURCES.index(FraudReport),
        "transactions": SOURCES.index(Transaction),
    }
    source = np.array([codes[topic] for topic, _ in events], np.uint8)
    answered = Replay(FRAUD, SOURCES)(
        EventBatch(
            {
                "source": source,
                "event_time": np.array([event["event_time"] for _, event in events]),
                "amount": np.array([round(100 * event.get("amount", 0)) for _, event in events]),
                "seq": np.arange(len(events)),
                **{
                    name: np.array([event.get(name, "").encode() for _, event in events])
                    for name in ("transaction_id", "card_id", "terminal_id")
                },
            }
        )
    )
    asking = answered.take(answered["source"] == codes["transactions"])
    return {
        name.decode(): {
            feature: None if np.isnan(value) else float(value)
            for feature, value in zip(FRAUD.names, row, strict=True)
        }
        for name, row in zip(
            asking["transaction_id"].tolist(), FRAUD.matrix(asking).tolist(), strict=True
        )
    }


def audited(env: FlowEnv) -> dict[str, list[_Event]]:
    found: dict[str, list[_Event]] = defaultdict(list)
    for message in env.read("audit"):
        value = json.loads(message.value())
        found[value["transaction_id"]].append(value)
    return found


def balanced(env: FlowEnv, account: dict[str, dict[str, int]]) -> bool:
    ends = {"transactions": "scored", "fraud_reports": "applied"}
    return all(
        counts["read"] == counts[end] + counts["dead_lettered"] + counts["duplicate"]
        for name, end in ends.items()
        if (counts := account.get(env.topics[name]))
    )


def read_so_far(flow: Flow) -> int:
    return sum(counts["read"] for counts in flow.account().values())


def test_what_comes_twice_is_answered_once(flow_env: FlowEnv) -> None:  # noqa: F811
    """Across a kill and a drained restart, in one partition and in two."""
    env = flow_env
    events = happened()
    expected = replayed(events)
    sent = with_duplicates(env, events)
    duplicates = len(sent) - len(events)
    assert duplicates > 250
    env.variables |= {
        "DEDUPE": "true",
        "DEDUPE_HORIZON_S": str(HORIZON_S),
        "AUDIT_SHARE": "1",
        "MAX_HOLD_S": "2",
    }
    third = len(sent) // 3

    def all_answered(n: int) -> bool:
        ids = {json.loads(one.value or b"{}")["transaction_id"] for one in sent[:n]
               if one.topic == env.topics["transactions"]}  # fmt: skip
        return audited(env).keys() >= ids

    # One life that is killed: what it did since its last snapshot is done again by the next.
    send(env.broker, sent[:third])
    killed = env.flow().start()
    await_that(lambda: read_so_far(killed) == third, "the first third", 60)
    await_that(lambda: balanced(env, killed.account()), "a balanced account", 60)
    first = sum(counts["duplicate"] for counts in killed.account().values())
    originals = {
        (one.topic, json.loads(one.value or b"{}")["transaction_id"]) for one in sent[:third]
    }
    assert first == third - len(originals) > 20
    killed.kill()

    # One that is drained.
    send(env.broker, sent[third : 2 * third])
    drained = env.flow().start()
    await_that(lambda: all_answered(2 * third), "the second third", 60)
    assert drained.stop() == 0, drained.log
    assert balanced(env, drained.account()), drained.account()

    # And one that goes on behind it; in the end come ids of so long ago that they are new.
    old = [(topic, event) for topic, event in events if topic == "transactions"][:5]
    end_ms = APPENDED + len(events) * EVERY_MS
    assert end_ms - APPENDED > HORIZON_S * 1000 + 10_000
    more = [record(env, topic, event, end_ms, partition_of(topic, event)) for topic, event in old]
    send(env.broker, [*sent[2 * third :], *more])
    last = env.flow().start()

    def complete() -> bool:
        found = audited(env)
        twice = [e["transaction_id"] for _, e in old]
        return found.keys() == expected.keys() and all(
            len({(a["partition"], a["offset"]) for a in found[name]}) == 2 for name in twice
        )

    await_that(complete, "the last third, and the old ones", 60)
    assert last.stop() == 0, last.log
    assert balanced(env, last.account()), last.account()
    assert sum(counts["dead_lettered"] for counts in last.account().values()) == 0
    assert sum(counts["duplicate"] for counts in last.account().values()) > 20

    # Each was answered for one record only (a replay's answer is of the same record), and saw
    # what it would have seen without duplicates.
    new_again = {event["transaction_id"] for _, event in old}
    for name, answers in audited(env).items():
        records = {(answer["partition"], answer["offset"]) for answer in answers}
        assert len(records) == (2 if name in new_again else 1), name
        assert answers[0]["features"] == expected[name], name
        if name not in new_again:
            assert all(answer["features"] == expected[name] for answer in answers), name
    assert any(row["terminal_risk_7d"] for row in expected.values())


def test_without_the_setting_what_comes_twice_counts_twice(flow_env: FlowEnv) -> None:  # noqa: F811
    env = flow_env
    topic, event = next(one for one in happened() if one[0] == "transactions")
    twice = [record(env, topic, event, APPENDED + n, 0) for n in range(2)]
    send(env.broker, twice)
    flow = env.flow(AUDIT_SHARE="1").start()
    env.await_count("audit", 2)
    assert flow.stop() == 0, flow.log
    (answers,) = audited(env).values()
    assert [answer["features"]["card_count_1d"] for answer in answers] == [1, 2]
    assert flow.account()[env.topics["transactions"]]["duplicate"] == 0
