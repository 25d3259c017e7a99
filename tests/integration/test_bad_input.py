"""Everything bad that can be sent, between good events, through the real flow.

Nothing stops it, nothing is lost, everything is counted, and what it refuses is kept as it came.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from typing import Any

from bytewax.recovery import init_db_dir
from confluent_kafka import Message

from dataflows.metrics import OUTCOMES
from tests.bad_input import ACCEPTED, APPENDED, REFUSED, Case, transaction, wire
from tests.integration.flow import (
    PARTITIONS,
    ROOT,
    Flow,
    FlowEnv,
    Sent,
    flow_env,  # noqa: F401
    send,
    tiny_feast,  # noqa: F401
    tiny_model,  # noqa: F401
)
from tests.kafka.client import await_that

#: Headers as they come in the wild: bytes that are no text, none at all, and a name twice.
HEADERS: list[tuple[str, bytes | None]] = [
    ("trace", b"\x00\xff"),
    ("empty", b""),
    ("null", None),
    ("trace", b"again"),
]


def bad_and_good() -> list[Case]:
    """Nothing but bad ones first; then each bad and each odd one between good transactions."""
    cases = list(REFUSED)
    for i, case in enumerate([*REFUSED, *ACCEPTED]):
        good = transaction(transaction_id=f"good{i:03d}", card_id=f"C{i % 50:04d}")
        cases += [Case(f"good {i}", wire(good), None), case]
    return cases


def records_of(env: FlowEnv, cases: list[Case], first: int = 0) -> list[Sent]:
    return [
        Sent(
            env.topics[case.topic],
            case.value,
            key=None if n % 7 == 0 else b"\xff\x00key%d" % n,
            partition=n % PARTITIONS[case.topic],
            headers=[*HEADERS, ("number", b"%d" % n)],
            timestamp=APPENDED,
        )
        for n, case in enumerate(cases, first)
    ]


def number_of(message: Message) -> int:
    (number,) = [value for name, value in message.headers() or [] if name == "number"]
    return int(number)


def expected_account(env: FlowEnv, cases: list[Case]) -> dict[str, dict[str, int]]:
    account = {}
    for topic, done in (("transactions", "scored"), ("fraud_reports", "applied")):
        mine = [case for case in cases if case.topic == topic]
        bad = sum(case.reason is not None for case in mine)
        counts = {"read": len(mine), done: len(mine) - bad, "dead_lettered": bad}
        account[env.topics[topic]] = dict.fromkeys(OUTCOMES, 0) | counts
    return account


def listed(env: FlowEnv, *arguments: str) -> list[dict[str, Any]]:
    """Run `python -m dataflows.dead_letter list --json` as an operator would."""
    ran = subprocess.run(
        [sys.executable, "-m", "dataflows.dead_letter", "list", "--json", *arguments],
        cwd=ROOT,
        env={**os.environ, **env.variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_bad_input_stops_nothing_and_is_kept_as_it_came(flow_env: FlowEnv) -> None:  # noqa: F811
    env = flow_env
    cases = bad_and_good()
    bad = {n: case for n, case in enumerate(cases) if case.reason is not None}
    scored = [case for case in cases if case.reason is None and case.topic == "transactions"]
    records = records_of(env, cases)
    # Compressed: the embedded broker keeps 5 MiB of a partition, and there are 10 MB to send.
    # What a producer gone mad has left is there before the flow: a crash loop would begin here.
    backlog = len(REFUSED)
    send(env.broker, records[:backlog], **{"compression.type": "lz4"})
    flow = env.flow(AUDIT_SHARE="1").start()
    env.await_count("dead_letters", backlog)
    send(env.broker, records[backlog:], **{"compression.type": "lz4"})

    predictions = env.await_count("predictions", len(scored))
    letters = env.await_count("dead_letters", len(bad))
    assert flow.running

    # All the good ones, once each.
    found = Counter(json.loads(message.value())["transaction_id"] for message in predictions)
    assert found == Counter(json.loads(c.value.decode(errors="replace"))["transaction_id"]
                            for c in scored if c.value is not None)  # fmt: skip
    assert env.count("audit") == len(scored)

    # All the bad ones, once each, as they came.
    assert Counter(map(number_of, letters)) == Counter(list(bad))
    for message in letters:
        sent, case = records[number_of(message)], bad[number_of(message)]
        headers = dict(message.headers() or [])
        assert message.key() == sent.key, case.name
        assert [h for h in message.headers() or [] if h[0] in dict(sent.headers)] == sent.headers
        assert headers["dlq.reason"].decode() == case.reason
        assert case.detail in headers["dlq.detail"].decode(), case.name
        assert headers["dlq.topic"].decode() == sent.topic
        assert int(headers["dlq.partition"]) == sent.partition
        assert int(headers["dlq.timestamp"]) == APPENDED
        if case.name == "10 MB":  # more than the topic takes: cut, with the hash of the whole
            assert case.value is not None and len(message.value()) > 899_000
            assert case.value.startswith(message.value())
            assert int(headers["dlq.truncated"]) == len(case.value)
            digest = hashlib.sha256(case.value).hexdigest()
            assert headers["dlq.sha256"].decode() == digest
        else:
            assert message.value() == case.value, case.name

    # Everything is counted, and an operator can see it.
    expected = expected_account(env, cases)
    await_that(lambda: flow.account() == expected, "the account of what was delivered")
    by_reason = Counter(str(case.reason) for case in bad.values())
    assert Counter(line["reason"] for line in listed(env, "--limit", "10000")) == by_reason
    seconds = listed(env, "--reason", "time_too_early")
    assert len(seconds) == by_reason["time_too_early"]
    assert sum("looks like seconds" in line["detail"] for line in seconds) == 4

    # SIGTERM drains, as does SIGINT, and a restart goes on behind it.
    assert flow.stop(signal.SIGTERM) == 0, flow.log
    assert flow.account() == expected
    assert "Traceback" not in flow.log
    more = [case for case in cases if "good" in case.name][:8] + REFUSED[:2]
    again = env.flow().start()
    send(env.broker, records_of(env, more, first=len(cases)))
    assert len(env.await_count("predictions", len(scored) + 8)) == len(scored) + 8
    assert len(env.await_count("dead_letters", len(bad) + 2)) == len(bad) + 2
    assert again.stop(signal.SIGINT) == 0, again.log
    assert again.account() == expected_account(env, more)
    assert (env.count("predictions"), env.count("dead_letters")) == (len(scored) + 8, len(bad) + 2)


def test_a_flow_that_cannot_start_says_what_to_do(flow_env: FlowEnv) -> None:  # noqa: F811
    """Readable, quick, and before anything is read."""
    cases = {
        "MODEL_DIR": ("/nowhere", "/nowhere"),
        "FEAST_REPO": ("/nowhere", "FEAST_REPO"),
        "STATE_DIR": ("/nowhere", "features.offline --state"),
        "KAFKA_CONSUMER_OPTIONS": ("[1]", "KAFKA_CONSUMER_OPTIONS is not a JSON object"),
    }
    started: list[tuple[Flow, str]] = []
    for variable, (value, said) in cases.items():
        flow = flow_env.flow(**{variable: value})
        flow.recovery = flow_env.directory / f"recovery_{variable}"  # one flow each at a time
        flow.recovery.mkdir()
        init_db_dir(flow.recovery, 1)
        started.append((flow.start(wait=False), said))
    for flow, said in started:
        assert (flow.wait(90), "Traceback" in flow.log) == (2, False), flow.log
        assert "cannot start" in flow.log and said in flow.log, flow.log
