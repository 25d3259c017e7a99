"""A day of the handbook through the real flow, killed and drained on the way, against the replay.

The flow is bootstrapped with the window state of the 129 days before; the frame it is compared
with comes from one uninterrupted replay of everything.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Message

from features import parity, profiles
from features.fraud import FRAUD
from tests.handbook_day import DAY, NEXT_DAY, replayed  # noqa: F401
from tests.integration.conftest import not_draining  # noqa: F401
from tests.integration.flow import (  # noqa: F401
    FlowEnv,
    Sent,
    feast_repo,
    flow_env,
    send,
    sources_of,
    tiny_feast,
    tiny_model,
)
from tests.kafka.client import TestBroker, await_that

SEED = 20180808


def days_events(handbook_dir: Path) -> list[Sent]:
    """The day's transactions and reports as JSON, in order of stream time."""
    rows: list[tuple[int, int, str, str, dict[str, object]]] = []
    for row in pq.read_table(handbook_dir / "transactions.parquet").to_pylist():
        if DAY <= row["event_time"] < NEXT_DAY:
            event = {name: row[name] for name in ("transaction_id", "card_id", "terminal_id")}
            event |= {"event_time": row["event_time"], "amount": row["amount_cents"] / 100}
            rows.append((row["event_time"], 1, "transactions", row["card_id"], event))
    for row in pq.read_table(handbook_dir / "fraud_reports.parquet").to_pylist():
        if DAY <= row["report_time"] < NEXT_DAY:
            rows.append((row["report_time"], 0, "fraud_reports", row["terminal_id"], row))
    rows.sort(key=lambda row: row[:2])
    return [
        Sent(topic, json.dumps(event).encode(), key.encode()) for _, _, topic, key, event in rows
    ]


def offline_rows(frame: Path, ids: list[str]) -> npt.NDArray[np.float64]:
    table = pq.read_table(frame, filters=[("event_time", ">=", DAY)])
    where = {name: row for row, name in enumerate(table["transaction_id"].to_pylist())}
    matrix = np.column_stack([table[name].to_numpy() for name in FRAUD.names])
    return matrix[[where[name] for name in ids]]


def test_stream_equals_offline(
    handbook_dir: Path,
    replayed: Path,  # noqa: F811
    broker: TestBroker,
    flow_env: FlowEnv,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    sent = days_events(handbook_dir)
    transactions = [event for event in sent if event.topic == "transactions"]
    assert len(transactions) > 9_000 and len(sent) - len(transactions) > 50
    kill_after, drain_after = sorted(rng.sample(range(500, len(sent) - 500), 2))
    repo = feast_repo(handbook_dir, DAY, handbook_dir.name + sources_of(profiles))
    flow_env.variables |= {
        "AUDIT_SHARE": "1",
        "STATE_DIR": str(replayed / "state"),
        "FEAST_REPO": str(repo),
        # The embedded broker keeps 5 MiB of a partition, and the audit has one.
        "KAFKA_PRODUCER_OPTIONS": '{"compression.type": "zstd"}',
    }

    # First life: cut at random by the sending, killed while it works.
    flow = flow_env.flow(BATCH_SIZE=str(rng.randint(2, 400))).start()
    begin = 0
    while begin < kill_after:
        end = min(begin + rng.randint(1, 900), kill_after)
        send_events(broker, flow_env, sent[begin:end])
        begin = end
    killed_at = rng.randrange(kill_after // 2, kill_after - 200)
    flow_env.await_count("audit", killed_at)
    flow.kill()
    # Second life: starts with a backlog, drained in the middle of it.
    send_events(broker, flow_env, sent[kill_after:drain_after])
    flow = flow_env.flow(BATCH_SIZE=str(rng.randint(2, 400))).start()
    send_events(broker, flow_env, sent[drain_after : drain_after + 300])
    assert flow.stop() == 0
    # Third life: the rest.
    flow = flow_env.flow().start()
    send_events(broker, flow_env, sent[drain_after + 300 :])
    await_that(
        lambda: len(audited_ids(flow_env)) == len(transactions),
        "every transaction is audited",
        timeout_s=60,
    )
    assert flow.stop() == 0

    audited = [msgspec.json.decode(value(m), type=parity.Audited) for m in flow_env.read("audit")]
    online = parity.vectors(FRAUD, audited)
    expected = offline_rows(replayed / "frame.parquet", [a.transaction_id for a in audited])
    results = parity.compare(FRAUD.names, online, expected)
    assert {a.transaction_id for a in audited} == {
        json.loads(event.value or b"")["transaction_id"] for event in transactions
    }
    assert [r for r in results if r.mismatched] == []
    assert len(results) == 15 and results[0].compared >= len(transactions)

    # The command sees the same, from the topics alone …
    servers = {"KAFKA_BOOTSTRAP_SERVERS": flow_env.variables["KAFKA_BOOTSTRAP_SERVERS"]}
    for name, setting in servers.items():
        monkeypatch.setenv(name, setting)
    sources = ["--transactions", f"kafka:{flow_env.topics['transactions']}"]
    sources += ["--fraud-reports", f"kafka:{flow_env.topics['fraud_reports']}"]
    sources += ["--state", str(replayed / "state"), "--json"]
    audit = f"kafka:{flow_env.topics['audit']}"
    capsys.readouterr()
    assert parity.main(["--audit", audit, *sources]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report] == list(FRAUD.names)
    assert {row["compared"] for row in report} == {len(audited)}

    # … and from a file, in which one value is then changed in its last bit.
    lines = [value(m) for m in flow_env.read("audit")]
    record = json.loads(lines[7])
    record["features"]["card_mean_amount_7d"] = float(
        np.nextafter(record["features"]["card_mean_amount_7d"], np.inf)
    )
    lines[7] = json.dumps(record).encode()
    (tmp_path / "audit.jsonl").write_bytes(b"\n".join(lines))
    assert parity.main(["--audit", str(tmp_path / "audit.jsonl"), *sources]) == 1
    wrong = {row["name"]: row["mismatched"] for row in json.loads(capsys.readouterr().out)}
    assert {name for name, n in wrong.items() if n} == {"card_mean_amount_7d"}


def send_events(broker: TestBroker, env: FlowEnv, events: list[Sent]) -> None:
    topics = env.topics
    send(broker, [Sent(topics[e.topic], e.value, e.key) for e in events])


def audited_ids(env: FlowEnv) -> set[bytes | None]:
    return {dict(m.headers() or [])["event_id"] for m in env.read("audit")}


def value(message: Message) -> bytes:
    content = message.value()
    assert content is not None
    return content
