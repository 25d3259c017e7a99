"""A recovery store is lost: the windows are refilled from the topics (``START_AT=rebuild``)."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.chaos import check
from tests.chaos.load import Item
from tests.integration.flow import (
    CARDS,
    MIDNIGHT,
    PARTITIONS,
    TERMINALS,
    FlowEnv,
    Sent,
    flow_env,
    send,
    tiny_feast,
    tiny_model,
)
from tests.integration.test_cluster import (
    Start,
    balance,
    differing,
    once_each,
    progress,
    start,
)
from tests.integration.test_exactly_once import delete_records
from tests.kafka.client import TestBroker, await_that

__all__ = ["flow_env", "start", "tiny_feast", "tiny_model"]  # fixtures

_DAY_MS = 86_400_000
#: The windows reach back 38 days, so a rebuild has to leave some of these events unread.
_DAYS, _A_DAY = 70, 60


def history(rng: random.Random) -> list[Item]:
    """Return events in stream-time order: transactions, and reports of fraud days later.

    No report comes so late that the processes of a cluster could disagree about it.
    """
    items = []
    for n in range(_DAYS * _A_DAY):
        at = MIDNIGHT + (n * _DAY_MS) // _A_DAY
        card, terminal = rng.choice(CARDS), rng.choice(TERMINALS)
        ids = {"transaction_id": f"t{n:06d}", "card_id": card, "terminal_id": terminal}
        event = ids | {"event_time": at, "amount": rng.randrange(100, 30_000) / 100}
        name = ids["transaction_id"]
        items.append(Item("transactions", card.encode(), json.dumps(event).encode(), name, at))
        if rng.random() < 0.1:
            known = at + rng.randrange(_DAY_MS, 5 * _DAY_MS)
            if known > MIDNIGHT + _DAYS * _DAY_MS:
                continue  # not known yet
            report = ids | {"event_time": at, "report_time": known}
            body = json.dumps(report).encode()
            items.append(Item("fraud_reports", terminal.encode(), body, name, known))
    return sorted(items, key=lambda item: (item.stream_time, item.topic))


def produce(env: FlowEnv, items: Sequence[Item]) -> None:
    """Send events with the timestamps of their time, as if the topics had filled over the days."""
    records = [
        Sent(env.topics[item.topic], item.value, item.key, timestamp=item.stream_time)
        for item in items
    ]
    send(env.broker, records, partitioner="murmur2_random", **{"enable.idempotence": True})


def lose_the_store(env: FlowEnv, items: Sequence[Item]) -> None:
    """Work some events off under exactly_once; SIGKILL in mid-flow; delete the recovery store."""
    env.variables |= {"DELIVERY": "exactly_once", "AUDIT_SHARE": "1"}
    produce(env, items)
    flow = env.flow(RATE_LIMIT="120", RATE_BURST="120").start()
    await_that(lambda: progress(env) > 0.7 * len(items), "most events are read in epochs", 60)
    flow.kill()
    assert progress(env) < len(items)
    assert env.count("predictions") < len(transaction_ids(items))
    shutil.rmtree(flow.recovery)


def done(env: FlowEnv, items: Sequence[Item], timeout_s: float = 90) -> None:
    await_that(lambda: progress(env) == len(items), "all events are read", timeout_s)


def transaction_ids(items: Sequence[Item]) -> set[str]:
    return {str(item.event_id) for item in items if item.topic == "transactions"}


def with_duplicates(items: Sequence[Item], rng: random.Random) -> list[Item]:
    """Let one in ten events come again, after the next one."""
    found: list[Item] = []
    again: Item | None = None
    for item in items:
        found.append(item)
        if again is not None:
            found.append(replace(again, stream_time=item.stream_time, again=True))
        again = item if rng.random() < 0.1 else None
    return found


@pytest.mark.parametrize(("processes", "dedupe"), [(1, False), (1, True), (2, False)])
def test_a_lost_store_is_rebuilt_without_a_trace(
    kafka: TestBroker, flow_env: FlowEnv, start: Start, processes: int, dedupe: bool
) -> None:
    """Each event has one prediction, and its features are those of an uninterrupted replay."""
    sent = history(random.Random(1))
    if dedupe:
        sent = with_duplicates(sent, random.Random(2))
        flow_env.variables |= {"DEDUPE": "true", "DEDUPE_HORIZON_S": "7200"}
    before, later = sent[:3800], sent[3800:]
    lose_the_store(flow_env, before)
    produce(flow_env, later)
    stopped_at = progress(flow_env)

    # The next life has no store; it dies while it reads again what was answered before.
    flow_env.variables["START_AT"] = "rebuild"
    second = flow_env.flow(BATCH_SIZE="1")
    second.start()
    await_that(
        lambda: second.account().get(flow_env.topics["transactions"], {}).get("rebuilt", 0) > 200,
        "some events are read again",
    )
    second.kill()
    assert "rebuilding the windows" in second.log
    assert progress(flow_env) >= stopped_at
    shutil.rmtree(second.recovery)  # the disk again

    # Processes at most so far apart that none takes a transaction before a report it counts.
    variables = {**flow_env.variables, "BATCH_SIZE": "50", "MAX_SKEW_S": str(40 * 3600)}
    cluster = start("dataflows.fraud", variables, flow_env.directory / "third", processes)
    cluster.await_reading(PARTITIONS["transactions"] + PARTITIONS["fraud_reports"])
    done(flow_env, sent)
    assert cluster.drain(0) == [0] * processes, cluster.said()

    vectors = once_each(kafka, flow_env.topics, transaction_ids(sent))
    assert differing(vectors, check.replayed(sent, None)) == {}
    account = balance(cluster, flow_env.topics["transactions"])
    # Not from the beginning of the topic: what no window reaches is not read.
    print(account)
    assert 200 < account["rebuilt"] < stopped_at - 200
    assert (account["duplicate"] > 100) == dedupe
    assert balance(cluster, flow_env.topics["fraud_reports"])["rebuilt"] > 50
    assert cluster.said().count("the windows are rebuilt") == processes


def test_a_topic_shorter_than_the_windows_is_told_of(kafka: TestBroker, flow_env: FlowEnv) -> None:
    sent = history(random.Random(2))
    lose_the_store(flow_env, sent[:2000])
    produce(flow_env, sent[2000:])
    kept_from = kafka.committed(flow_env.variables["GROUP_ID"], flow_env.topics["transactions"], 1)[
        0
    ]
    delete_records(kafka, flow_env.topics["transactions"], kept_from - 50)
    flow = flow_env.flow(START_AT="rebuild")
    flow.start()
    done(flow_env, sent)
    assert flow.stop() == 0
    warnings = [line["event"] for line in flow.log_lines() if line["level"] == "warning"]
    name = f"{flow_env.topics['transactions']}/00000"
    told = [line for line in warnings if f"{name}: records before offset {kept_from - 50}" in line]
    assert len(told) == 1, flow.log
    answered = Counter(
        json.loads(message.value() or b"")["transaction_id"]
        for message in flow_env.read("predictions")
    )
    assert answered == Counter(transaction_ids(sent))


def test_a_group_that_never_read_begins_with_full_windows(
    kafka: TestBroker, flow_env: FlowEnv
) -> None:
    """Nothing that is there is answered, and the windows know it all the same."""
    sent = history(random.Random(3))
    by_ms = round(time.time() * 1000) - sent[-1].stream_time
    moved = [shifted(item, by_ms) for item in sent]
    produce(flow_env, moved[:-20])
    flow_env.variables["AUDIT_SHARE"] = "1"
    flow = flow_env.flow(START_AT="rebuild").start()
    assert "has no offset of" in flow.log
    await_that(lambda: "the windows are rebuilt" in flow.log, "the windows are rebuilt")
    assert flow.stop() == 0
    produce(flow_env, moved[-20:])
    flow = flow_env.flow(START_AT="rebuild").start()
    done(flow_env, moved)
    assert flow.stop() == 0
    vectors = once_each(kafka, flow_env.topics, transaction_ids(moved[-20:]))
    expected = check.replayed(moved, None)
    assert differing(vectors, {key: expected[key] for key in vectors}) == {}


def shifted(item: Item, by_ms: int) -> Item:
    """Return an event that happened so much later."""
    event = json.loads(item.value or b"")
    for name in ("event_time", "report_time"):
        if name in event:
            event[name] += by_ms
    body = json.dumps(event).encode()
    return Item(item.topic, item.key, body, item.event_id, item.stream_time + by_ms)
