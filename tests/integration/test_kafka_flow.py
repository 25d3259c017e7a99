"""Source and sink in real Bytewax, on a real socket: order, drain, crash, cluster, outage."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import run_main
from confluent_kafka import Message

from dataflows.kafka.dev_broker import CONSUMER_CONFIG, DevBroker
from dataflows.kafka.errors import SourceError, StartupError
from tests.integration.kafka_flow import forwarding_flow
from tests.kafka.client import TestBroker, await_that

ROOT = Path(__file__).parents[2]
EPOCH = timedelta(seconds=0.2)


def records(count: int, partitions: int, seed: int = 0) -> list[tuple[int, bytes, bytes]]:
    """Return (partition, key, value) of `count` records in stream-time order."""
    rng = random.Random(seed)
    return [
        (rng.randrange(partitions), b"key%d" % (number % 50), b'{"at": %d}' % (1000 + number))
        for number in range(count)
    ]


def event_id(message: Message) -> str:
    return dict(message.headers() or [])["event_id"].decode()


def ids_of(topic: str, sent: list[tuple[int, bytes, bytes]]) -> list[str]:
    """Return the event ids that the flow gives to the records sent to a topic, in order."""
    offsets: Counter[int] = Counter()
    ids = []
    for partition, _, _ in sent:
        ids.append(f"{topic}/{partition}/{offsets[partition]}")
        offsets[partition] += 1
    return ids


class Flow:
    """Processes of `python -m bytewax.run tests.integration.kafka_flow`."""

    def __init__(self, settings: dict[str, Any], recovery: Path, processes: int = 1) -> None:
        ports = [_free_port() for _ in range(processes)]
        addresses = ";".join(f"127.0.0.1:{port}" for port in ports)
        self.logs = [recovery.parent / f"process_{time.monotonic_ns()}" for _ in ports]
        self.processes = []
        for index, log in enumerate(self.logs):
            command = [sys.executable, "-m", "bytewax.run", "tests.integration.kafka_flow"]
            command += ["-r", str(recovery), "-s", "1", "-b", "0"]
            if processes > 1:
                command += ["-i", str(index), "-a", addresses]
            with log.open("wb") as out:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env={**os.environ, "KAFKA_FLOW": json.dumps(settings)},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )

    def signal(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)

    def wait(self) -> list[int]:
        try:
            return [process.wait(timeout=60) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def recovery(tmp_path: Path) -> Path:
    directory = tmp_path / "recovery"
    directory.mkdir()
    init_db_dir(directory, 1)
    return directory


@pytest.fixture
def flows() -> Iterator[list[Flow]]:
    started: list[Flow] = []
    yield started
    for flow in started:
        flow.kill()


def settings(broker: TestBroker, topics: list[str], output: str, **more: Any) -> dict[str, Any]:
    return {
        "topics": topics,
        "output_topic": output,
        "config": broker.config,
        "consumer_config": broker.consumer_config,
        "group_id": f"group_{output}",
        **more,
    }


def run_to_the_end(options: dict[str, Any], recovery: Path) -> None:
    run_main(
        forwarding_flow(**options, stop_at_end=True),
        epoch_interval=EPOCH,
        recovery_config=RecoveryConfig(recovery),
    )


@contextmanager
def stops_with(kind: type[Exception], says: str) -> Iterator[None]:
    """Expect a flow to fail because of one of our errors, inside Bytewax's own."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - what it is, is looked at below
        yield
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    assert error is not None, f"no {kind.__name__} in {caught.value!r}"
    assert re.search(says, str(error)), str(error)


def test_topics_are_merged_copied_once_and_not_read_again(
    broker: TestBroker, recovery: Path
) -> None:
    reports, events = broker.topic("reports", 2), broker.topic("events", 4)
    copies = broker.topic("copies", 3)
    sent, reported = records(3000, 4), records(600, 2, seed=1)
    broker.produce(events, sent)
    broker.produce(reports, reported)
    options = settings(broker, [reports, events], copies)

    run_to_the_end(options, recovery)

    found = broker.read(copies)
    assert Counter(map(event_id, found)) == Counter(
        ids_of(events, sent) + ids_of(reports, reported)
    )
    for partition in range(3):
        mine = [message for message in found if message.partition() == partition]
        order = [
            (json.loads(message.value())["at"], event_id(message).startswith(events))
            for message in mine
        ]
        assert order == sorted(order)  # by stream time, reports first
    assert sum(broker.committed(options["group_id"], events, 4)) == 3000
    assert sum(broker.committed(options["group_id"], reports, 2)) == 600

    more = records(100, 4, seed=2)
    broker.produce(events, more)
    run_to_the_end(options, recovery)
    again = broker.read(copies)
    assert len(again) == 3700
    assert len(set(map(event_id, again))) == 3700


def test_records_survive_many_pauses(broker: TestBroker, recovery: Path) -> None:
    """What a paused partition had fetched is thrown away, and fetched again, in time."""
    ahead, behind = broker.topic("ahead", 1), broker.topic("behind", 1)
    copies = broker.topic("copies", 1)
    # Small record batches, so that the partitions do not arrive whole.
    small: dict[str, Any] = {"batch.num.messages": 100}
    broker.produce(ahead, [(0, b"a", b'{"at": %d}' % n) for n in range(12_000)], **small)
    broker.produce(behind, [(0, b"b", b'{"at": %d}' % n) for n in range(0, 12_000, 3)], **small)
    options = settings(broker, [ahead, behind], copies, buffer_records=50, batch_size=20)
    started = time.monotonic()
    run_to_the_end(options, recovery)
    assert time.monotonic() - started < 30  # with pause() and resume(): minutes
    found = broker.read(copies)
    assert len(found) == 16_000
    assert len(set(map(event_id, found))) == 16_000
    times = [json.loads(message.value())["at"] for message in found]
    assert times == sorted(times)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_drains(
    broker: TestBroker, recovery: Path, flows: list[Flow], number: int, processes: int
) -> None:
    """Exit code 0, and a restart reads on where the drained flow stopped."""
    events, copies = broker.topic("events", 4), broker.topic("copies", 2)
    sent = records(4000, 4)
    broker.produce(events, sent)
    options = settings(broker, [events], copies, batch_size=20, work_s=0.01)

    flows.append(first := Flow(options, recovery, processes))
    await_that(lambda: len(broker.read(copies)) > 300, "copies of the first life")
    first.signal(number)
    assert first.wait() == [0] * processes, first.said()
    assert "Traceback" not in first.said()
    copied = len(broker.read(copies))
    assert copied < 4000

    flows.append(second := Flow(options, recovery, processes))
    await_that(lambda: len(broker.read(copies)) >= 4000, "copies of the second life", 60)
    second.signal(number)
    assert second.wait() == [0] * processes, second.said()
    assert Counter(map(event_id, broker.read(copies))) == Counter(ids_of(events, sent))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_kill_loses_nothing_and_repeats_at_most_the_open_epoch(
    broker: TestBroker, recovery: Path, flows: list[Flow], processes: int
) -> None:
    events, copies = broker.topic("events", 4), broker.topic("copies", 2)
    sent = records(6000, 4)
    broker.produce(events, sent[:5500])
    options = settings(broker, [events], copies, batch_size=10, work_s=0.01)
    kills = 3
    rng = random.Random(7)
    for life in range(kills):
        before = len(broker.read(copies))
        flows.append(flow := Flow(options, recovery, processes))
        await_that(
            lambda before=before: len(broker.read(copies)) > before + 500,
            f"copies of life {life}",
        )
        time.sleep(rng.random() * 0.5)  # a random moment within the epoch
        flow.kill()
    flows.append(last := Flow({**options, "work_s": 0.0, "batch_size": 500}, recovery, processes))
    broker.produce(events, sent[5500:])  # so that having all copies means that this life reads
    wanted = set(ids_of(events, sent))
    await_that(lambda: set(map(event_id, broker.read(copies))) == wanted, "all copies", 60)
    last.signal(signal.SIGTERM)
    assert last.wait() == [0] * processes, last.said()
    times = Counter(map(event_id, broker.read(copies)))
    assert set(times) == wanted
    assert max(times.values()) <= 1 + kills


def test_an_absent_broker_is_reported_in_time(recovery: Path) -> None:
    options = {
        "topics": ["events"],
        "output_topic": "copies",
        "config": {"bootstrap.servers": "127.0.0.1:1"},
        "consumer_config": {"bootstrap.servers": "127.0.0.1:1"},
        "group_id": "g",
        "startup_timeout_s": 1.0,
    }
    started = time.monotonic()
    with stops_with(StartupError, r"127\.0\.0\.1:1' within 1 s .* KAFKA_BOOTSTRAP_SERVERS"):
        run_to_the_end(options, recovery)
    assert time.monotonic() - started < 10


def test_an_absent_topic_is_reported_and_not_created(broker: TestBroker, recovery: Path) -> None:
    events = broker.topic("events", 1)
    options = settings(broker, [events, "no_such_topic"], events)
    with stops_with(StartupError, "topic 'no_such_topic' does not exist"):
        run_to_the_end(options, recovery)
    with stops_with(StartupError, "topic 'no_such_output' does not exist"):
        run_to_the_end(settings(broker, [events], "no_such_output"), recovery)
    with stops_with(StartupError, "topic 'no_such_topic' does not exist"):
        run_to_the_end(options, recovery)


def test_an_outage_is_waited_out(dev_broker: DevBroker, recovery: Path, flows: list[Flow]) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    events, copies = broker.topic("events", 2), broker.topic("copies", 2)
    sent = records(3000, 2)
    broker.produce(events, sent)
    options = settings(broker, [events], copies, batch_size=20, work_s=0.005)
    flows.append(flow := Flow(options, recovery))
    await_that(lambda: len(broker.read(copies)) > 200, "first copies")
    dev_broker.broker_down()
    await_that(lambda: "waiting for the brokers" in flow.said(), "a warning")
    time.sleep(2)  # longer than an epoch
    dev_broker.broker_up()
    wanted = set(ids_of(events, sent))
    await_that(lambda: set(map(event_id, broker.read(copies))) == wanted, "all copies", 60)
    flow.signal(signal.SIGTERM)
    assert flow.wait() == [0], flow.said()
    assert len(broker.read(copies)) == len(wanted)


def test_falling_behind_retention_stops_with_the_offsets(
    dev_broker: DevBroker, recovery: Path
) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    events, copies = broker.topic("events", 1), broker.topic("copies", 1)
    small: dict[str, Any] = {"batch.num.messages": 100}
    broker.produce(events, [(0, b"k", b'{"at": %d}' % n) for n in range(100)], **small)
    run_to_the_end(settings(broker, [events], copies), recovery)
    broker.produce(events, [(0, b"k", b'{"at": %d}' % n) for n in range(100, 3000)], **small)
    dev_broker.delete_records(events, 0, 2000)
    with stops_with(StartupError, "offset 100, but the broker has only 2000 to 3000"):
        run_to_the_end(settings(broker, [events], copies), recovery)
    run_to_the_end(settings(broker, [events], copies, resume_past_retention=True), recovery)
    assert len(broker.read(copies)) == 1100


def test_records_deleted_while_reading_are_an_error_not_a_gap(
    dev_broker: DevBroker, recovery: Path
) -> None:
    broker = TestBroker(dev_broker.bootstrap_servers, dev_broker)
    events, copies = broker.topic("events", 1), broker.topic("copies", 1)
    small: dict[str, Any] = {"batch.num.messages": 100}
    broker.produce(events, [(0, b"k", b'{"at": %d}' % n) for n in range(2000)], **small)
    options = settings(broker, [events], copies, batch_size=10, work_s=0.005)
    options["consumer_config"] = {
        **options["consumer_config"],
        **CONSUMER_CONFIG,
        "queued.min.messages": 1,
    }
    flow = forwarding_flow(**options)
    deleted = []

    def delete_once() -> None:
        if not deleted:
            deleted.append(dev_broker.delete_records(events, 0, 1900))

    timer = threading.Timer(0.3, delete_once)
    timer.start()
    with stops_with(SourceError, "the broker has only 1900 to 2000"):
        run_main(flow, epoch_interval=EPOCH, recovery_config=RecoveryConfig(recovery))
