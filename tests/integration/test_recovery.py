"""The recovery store in the real flow, and clusters that drain together."""

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dataflows.kafka.dev_broker import DevBroker
from features.journal import shard_key
from features.windows import SHARDS
from tests.integration.flow import (
    CARDS,
    MIDNIGHT,
    ROOT,
    TERMINALS,
    Flow,
    FlowEnv,
    Sent,
    flow_env,
    send,
    tiny_feast,
    tiny_model,
)
from tests.integration.test_kafka_flow import Flow as Cluster
from tests.integration.test_kafka_flow import event_id, ids_of, records, settings
from tests.kafka.client import TestBroker, await_that

__all__ = ["flow_env", "tiny_feast", "tiny_model"]  # fixtures


def transactions(topic: str, first: int, count: int, partition: int = -1) -> list[Sent]:
    return [
        Sent(
            topic,
            json.dumps(
                {
                    "transaction_id": f"t{n:06d}",
                    "card_id": CARDS[n % 50],
                    "terminal_id": TERMINALS[n % 37],
                    "event_time": MIDNIGHT + 1000 * n,
                    "amount": 1.0 + n / 100,
                }
            ).encode(),
            CARDS[n % 50].encode(),
            partition,
            timestamp=MIDNIGHT + 1000 * n,
        )
        for n in range(first, first + count)
    ]


def fresh(env: FlowEnv, **more: str) -> Flow:
    """Return a flow on a recovery directory that does not exist yet."""
    flow = env.flow(**more)
    flow.recovery = env.directory / "made by the flow"
    return flow


def refusal(flow: Flow) -> str:
    """Start a flow that must not start; return what it says."""
    flow.start(wait=False)
    assert flow.wait() == 2, flow.log
    assert "cannot start" in flow.log and "Traceback" not in flow.log, flow.log
    return flow.log


def show(directory: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "dataflows.state", "show", str(directory), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_flow_makes_its_store_and_goes_on_with_it(flow_env: FlowEnv) -> None:
    topic = flow_env.topics["transactions"]
    send(flow_env.broker, transactions(topic, 0, 200))
    flow = fresh(flow_env).start()
    flow_env.await_count("predictions", 200)
    directory = flow.recovery
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700

    # While it runs: shown, and not to be had by another.
    def offsets() -> int:
        keys = show(directory)["keys"]
        return sum(k["offset"] for k in keys if k["key"].startswith(f"{topic}/"))

    await_that(lambda: offsets() == 200, "the offsets in the store")
    shown = show(directory)
    cards = [key for key in shown["keys"] if key["step"] == "fraud.card.state"]
    shards = [key for key in cards if key["key"] in map(shard_key, range(SHARDS))]
    assert len(shards) == SHARDS and sum(key["entities"] for key in shards) <= 50
    assert sum(key["entries"] for key in cards) >= 200  # in a shard, in a page, or in both
    assert shown["age_s"] < 60
    second = fresh(flow_env)
    assert "is in use: pid" in refusal(second)
    flow_env.flows.remove(second)

    assert flow.stop() == 0
    send(flow_env.broker, transactions(topic, 200, 100))
    flow.start()
    flow_env.await_count("predictions", 300)
    assert flow.stop() == 0
    assert flow_env.count("predictions") == 300
    lines = [line for line in flow.log_lines() if line["event"] == "recovery store checked"]
    assert lines[-1]["snapshots"] > 10


def test_a_store_that_does_not_fit_is_refused(flow_env: FlowEnv, tmp_path: Path) -> None:
    topic = flow_env.topics["transactions"]
    send(flow_env.broker, transactions(topic, 0, 50))
    flow = fresh(flow_env).start()
    flow_env.await_count("predictions", 50)
    assert flow.stop() == 0

    assert "shards is 32" in refusal(fresh(flow_env, SHARDS="8"))
    other = flow_env.broker.topic("other", 4)
    says = refusal(fresh(flow_env, TRANSACTIONS_TOPIC=other))
    assert f"the partition '{topic}/0000" in says and "Restore the topic" in says
    fewer = flow_env.broker.topic("fewer", 1)
    says = refusal(fresh(flow_env, PREDICTIONS_TOPIC=fewer))
    assert "in step 'fraud.predictions.write'" in says

    marker = tmp_path / "executed"
    with closing(sqlite3.connect(flow.recovery / "part-0.sqlite3")) as part:
        evil = b"cpathlib\nPath.touch\n(cpathlib\nPath\n(V%s\ntRtR." % os.fsencode(marker)
        part.execute("UPDATE snaps SET ser_change = ? WHERE step_id = 'fraud.card.state'", (evil,))
        part.commit()
    says = refusal(fresh(flow_env))
    assert "'fraud.card.state', key '" in says and "has the opcode GLOBAL" in says
    assert not marker.exists()


def test_without_a_store_exactly_once_is_refused(flow_env: FlowEnv) -> None:
    flow = flow_env.flow(DELIVERY="exactly_once")
    command = [sys.executable, "-m", "bytewax.run", "dataflows.fraud"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **flow.variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "DELIVERY=exactly_once needs a recovery store: run with -r DIR" in done.stderr


def test_a_gap_is_refused_then_counted(
    dev_broker: DevBroker, tiny_model: Path, tiny_feast: Path, tmp_path: Path
) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    names = ("transactions", "fraud_reports", "predictions", "dead_letters", "audit")
    topics = {name: broker.topic(name, 1) for name in names}
    consumer = {k: v for k, v in broker.consumer_config.items() if k not in broker.config}
    variables = {
        "KAFKA_BOOTSTRAP_SERVERS": broker.config["bootstrap.servers"],
        "KAFKA_CONSUMER_OPTIONS": json.dumps(consumer),
        "MODEL_DIR": str(tiny_model),
        "FEAST_REPO": str(tiny_feast),
        **{f"{name.upper()}_TOPIC": topic for name, topic in topics.items()},
    }
    env = FlowEnv(broker, topics, variables, tmp_path)
    topic = topics["transactions"]
    small: dict[str, Any] = {"batch.num.messages": 10}
    try:
        send(broker, transactions(topic, 0, 100, 0), **small)
        flow = fresh(env).start()
        env.await_count("predictions", 100)
        assert flow.stop() == 0
        send(broker, transactions(topic, 100, 500, 0), **small)
        dev_broker.delete_records(topic, 0, 400)

        flow.start(wait=False)
        assert flow.wait() == 1
        last = flow.log_lines()[-2:]  # and the account
        said = " ".join(line["event"] for line in last)
        assert "stopped by StartupError" in said
        assert "offset 100, but the broker has only 400 to 600" in said
        assert "deleted 300 unread records. Go on with RESUME_PAST_RETENTION=true" in said

        flow.variables["RESUME_PAST_RETENTION"] = "true"
        flow.start()
        env.await_count("predictions", 300)
        counted = f'events_skipped_total{{partition="0",topic="{topic}"}} 300.0'
        assert counted in flow.metrics()
        assert flow.stop() == 0
        assert flow.log_lines()[-1]["skipped"] == {f"{topic}/0": 300}
        assert env.count("predictions") == 300
    finally:
        for started in env.flows:
            started.kill()


# Clusters


@pytest.fixture
def clusters() -> Iterator[list[Cluster]]:
    started: list[Cluster] = []
    yield started
    for cluster in started:
        cluster.kill()


def _run_into_a_drain(
    broker: TestBroker,
    directory: Path,
    clusters: list[Cluster],
    *,
    partitions: int,
    processes: int,
    told: list[int],
    apart_s: float,
    **more: Any,
) -> tuple[Cluster, Any]:
    """Start a cluster, signal the processes `told`; return it, and what runs it to its end."""
    events, copies = broker.topic("events", partitions), broker.topic("copies", 2)
    sent = records(4000, partitions)
    broker.produce(events, sent)
    options = settings(broker, [events], copies, batch_size=20, work_s=0.02, **more)
    clusters.append(first := Cluster(options, directory, processes))
    await_that(lambda: len(broker.read(copies)) > 300, "copies of the first life")
    for number in told:
        first.processes[number].send_signal(signal.SIGTERM)
        time.sleep(apart_s)

    def finish() -> Counter[str]:
        """Start again, to the end; return how often each record has been copied."""
        options.update(work_s=0.0, batch_size=500)
        clusters.append(second := Cluster(options, directory, processes))
        wanted = set(ids_of(events, sent))
        await_that(lambda: set(map(event_id, broker.read(copies))) == wanted, "all copies", 60)
        second.signal(signal.SIGTERM)
        second.wait()
        return Counter(map(event_id, broker.read(copies)))

    return first, finish


@pytest.mark.parametrize(
    ("partitions", "processes", "told", "apart_s", "look_every_s"),
    [
        pytest.param(4, 2, [0, 1], 1.2, 60.0, id="signals-an-epoch-apart"),
        pytest.param(4, 3, [1, 0, 2], 0.7, 0.1, id="three-processes"),
        pytest.param(4, 2, [1], 0.0, 0.1, id="one-signal"),
        pytest.param(1, 2, [0], 0.0, 0.1, id="one-partition-signal-to-0"),
        pytest.param(1, 2, [1], 0.0, 0.1, id="one-partition-signal-to-1"),
    ],
)
def test_a_cluster_drains_together(
    broker: TestBroker,
    tmp_path: Path,
    clusters: list[Cluster],
    partitions: int,
    processes: int,
    told: list[int],
    apart_s: float,
    look_every_s: float,
) -> None:
    """Whoever is told, and when: all exit with 0, and nothing is read twice."""
    first, finish = _run_into_a_drain(
        broker,
        tmp_path / "store",
        clusters,
        partitions=partitions,
        processes=processes,
        told=told,
        apart_s=apart_s,
        look_every_s=look_every_s,
    )
    assert first.wait() == [0] * processes, first.said()
    assert "Traceback" not in first.said(), first.said()
    assert "panicked" not in first.said(), first.said()
    assert set(finish().values()) == {1}


def test_without_a_shared_directory_nobody_is_left_behind(
    broker: TestBroker, tmp_path: Path, clusters: list[Cluster]
) -> None:
    """The process that is told drains and ends; the other sees it, ends, and loses nothing."""
    from bytewax.recovery import init_db_dir

    (tmp_path / "store").mkdir()
    init_db_dir(tmp_path / "store", 1)
    first, finish = _run_into_a_drain(
        broker,
        tmp_path / "store",
        clusters,
        partitions=4,
        processes=2,
        told=[0],
        apart_s=0.0,
        share=False,
    )
    told, other = first.wait()
    assert told == 0, first.said()
    assert other != 0
    assert max(finish().values()) <= 2
