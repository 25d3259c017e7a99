"""At most once: a restart begins at the end of the topics, whatever was read before."""

import json
from collections import Counter

from confluent_kafka import Message

from tests.integration.flow import (  # noqa: F401
    CARDS,
    MIDNIGHT,
    TERMINALS,
    FlowEnv,
    Sent,
    flow_env,
    send,
    tiny_feast,
    tiny_model,
)


def transactions(env: FlowEnv, begin: int, end: int) -> list[Sent]:
    found = []
    for n in range(begin, end):
        event = {
            "transaction_id": f"tx{n}",
            "card_id": CARDS[n % len(CARDS)],
            "terminal_id": TERMINALS[n % len(TERMINALS)],
            "event_time": MIDNIGHT + n * 1000,
            "amount": 10.0,
        }
        key = CARDS[n % len(CARDS)].encode()
        found.append(Sent(env.topics["transactions"], json.dumps(event).encode(), key))
    return found


def ids(messages: list[Message]) -> Counter[str]:
    return Counter(dict(m.headers() or [])["event_id"].decode() for m in messages)


def names(*ranges: range) -> Counter[str]:
    return Counter(f"tx{n}" for each in ranges for n in each)


def test_a_killed_flow_goes_on_with_what_is_new(flow_env: FlowEnv) -> None:  # noqa: F811
    env = flow_env
    send(env.broker, transactions(env, 0, 50))  # before there is a flow
    flow = env.flow(DELIVERY="at_most_once").start()
    send(env.broker, transactions(env, 50, 250))
    env.await_count("predictions", 200)
    flow.kill()
    send(env.broker, transactions(env, 250, 300))  # nobody reads them
    flow.start()
    send(env.broker, transactions(env, 300, 350))
    env.await_count("predictions", 250)
    assert flow.stop() == 0
    assert ids(env.read("predictions")) == names(range(50, 250), range(300, 350))
    account = flow.account()[env.topics["transactions"]]
    assert (account["read"], account["scored"]) == (50, 50)
    # No offsets: not in the group either.
    group = env.variables["GROUP_ID"]
    assert set(env.broker.committed(group, env.topics["transactions"], 4)) == {-1001}
