"""Injected faults raise the right alerts, in a real Prometheus, and no others.

First of the real metrics without a flow, one fault a namespace; then of the real flow on Kafka.
Rules are made faster by `faster`: what is tested here is that names, labels and matches are those
of a process; thresholds and windows are the unit tests' matter.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.flow import (
    CARDS,
    MIDNIGHT,
    ROOT,
    TERMINALS,
    Flow,
    FlowEnv,
    Sent,
    environment,
    flow_env,
    send,
    tiny_feast,
    tiny_model,
)
from tests.kafka.client import TestBroker, await_that
from tests.kafka.cluster import KafkaCluster
from tests.monitoring.exporter import FAULTS, Exporters
from tests.monitoring.live import Prometheus, faster, free_port
from tests.monitoring.rules import alerts, load, rules_of, seconds, tokens

__all__ = ["flow_env", "tiny_feast", "tiny_model"]  # fixtures

FACTOR = 60
#: Epochs of the tests' flows take a second.
STUCK = {"scoring:stuck:bool": {"60": "10"}}

#: What a fault cannot be injected for in a test's time: they compare with the day before.
DAYS = {"ScoringScoreDrift", "ScoringFlaggedShareShift"}
#: Alerts on how fast this machine is and how full its disk: not injected, and not judged.
MACHINE = {
    "ScoringLatencyBudgetBurn",
    "ScoringLatencyGoalMissed",
    "ScoringFreshnessBudgetBurn",
    "ScoringRecoveryVolumeFilling",
}


# The rules, faster


def test_faster_changes_durations_only() -> None:
    fast = faster(load(), FACTOR, least_s=0)
    for before, after in zip(rules_of(load()), rules_of(fast), strict=True):
        assert set(before) == set(after)
        for old, new in zip(tokens(before["expr"]), tokens(after["expr"]), strict=True):
            if old.kind == "duration":
                assert seconds(new.text) == pytest.approx(seconds(old.text) / FACTOR)
            else:
                assert (new.kind, new.text) == (old.kind, old.text)
        if "for" in before:
            assert seconds(after["for"]) == pytest.approx(max(1, seconds(before["for"]) / FACTOR))
        same = {"alert", "record", "labels", "annotations"} & set(before)
        assert {name: before[name] for name in same} == {name: after[name] for name in same}
    assert all("interval" not in group for group in fast["groups"])


def test_faster_keeps_room_for_scrapes_and_renames() -> None:
    file = {"groups": [{"interval": "30s", "rules": [
        {"alert": "A", "expr": 'rate(a{topic="b"}[1m]) > 60', "for": "2m"},
        {"alert": "B", "expr": "a[1h] > 60"},
    ]}]}  # fmt: skip
    fast = faster(file, 60, topics={"b": "c"}, numbers={"A": {"60": "5"}})
    assert list(rules_of(fast)) == [
        {"alert": "A", "expr": 'rate(a{topic="c"}[10000ms]) > 5', "for": "2000ms"},
        {"alert": "B", "expr": "a[60000ms] > 60"},
    ]
    with pytest.raises(AssertionError, match="no rule has"):
        faster(file, 60, numbers={"A": {"61": "5"}})


# Without a flow


def test_each_fault_raises_its_alerts_and_no_others(prometheus: str, tmp_path: Path) -> None:
    """One process a namespace, each with its fault: none leaks into another's."""
    nobody = free_port()  # nothing listens there
    expected = {name: names for name, (_, names) in FAULTS.items()}
    expected["down"] = {"ScoringFlowDown", "ScoringFreshnessBudgetBurn"}
    seen: dict[str, set[str]] = {name: set() for name in expected}
    with Exporters({name: beat for name, (beat, _) in FAULTS.items()}) as flows:
        targets = {**flows.ports, "down": nobody}
        rules = faster(load(), FACTOR, numbers=STUCK)
        with Prometheus(prometheus, tmp_path / "p", rules, targets) as running:

            def all_seen() -> bool:
                firing = running.firing()
                firing.pop("", None)  # before the first scrape there is no process at all
                for name, names in firing.items():
                    seen[name] |= names
                    assert seen[name] <= expected[name], (name, seen[name] - expected[name])
                return seen == expected

            try:
                await_that(all_seen, "all alerts", 90)
            except AssertionError:
                assert seen == expected
                raise
            assert running.problems() == []
    every = {rule["alert"] for rule in alerts()}
    assert set().union(*expected.values()) == every - DAYS - {"ScoringCrashLoop"}


def test_a_process_that_keeps_dying_is_a_crash_loop(prometheus: str, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "tests.monitoring.exporter", str(port)]
    # 15 minutes become one: time for four starts.
    with Prometheus(prometheus, tmp_path / "p", faster(load(), 15), {"loop": port}) as running:
        lives: set[str] = set()

        def scraped() -> bool:
            for sample in running.query("process_start_time_seconds"):
                lives.add(sample["value"][1])
            return len(lives) > before

        for _ in range(4):
            assert "ScoringCrashLoop" not in running.firing().get("loop", set())
            before = len(lives)
            process = subprocess.Popen(command, cwd=ROOT)
            try:
                await_that(scraped, "the process is scraped", 60)
            finally:
                process.kill()
                process.wait()
        await_that(
            lambda: "ScoringCrashLoop" in running.firing().get("loop", set()), "the alert", 60
        )


# The flow on Kafka


def transactions(first: int, count: int, bad: int = 0) -> Iterator[Sent]:
    """Return events that the flow can read, and after them some that it cannot."""
    for n in range(first, first + count):
        event = {
            "transaction_id": f"live{n:07d}",
            "card_id": CARDS[n % len(CARDS)],
            "terminal_id": TERMINALS[n % len(TERMINALS)],
            "event_time": MIDNIGHT + 100 * n,
            "amount": 20.0,
        }
        yield Sent("transactions", json.dumps(event).encode(), event["card_id"].encode())
    for n in range(bad):
        yield Sent("transactions", b"poison %d" % n, b"poison")


class Watched:
    """A running flow, the events it gets, and a Prometheus that looks at it."""

    def __init__(self, env: FlowEnv, flow: Flow, running: Prometheus) -> None:
        self.env, self.flow, self._running = env, flow, running
        self._numbers = itertools.count(step=100)

    def send(self, bad: int = 0) -> None:
        """Send a hundred events, and some that the flow cannot read."""
        topic = self.env.topics["transactions"]
        events = transactions(next(self._numbers), 100, bad)
        send(self.env.broker, [Sent(topic, sent.value, sent.key) for sent in events])

    def firing(self) -> set[str]:
        """Return the alerts that fire, but for those on the machine."""
        assert self.flow.running, self.flow.log
        assert self._running.problems() == []
        return self._running.firing().get("live", set()) - MACHINE

    def rate(self) -> float:
        """Return how many transactions are read in a second, in the last seconds."""
        topic = self.env.topics["transactions"]
        query = f'sum(rate(scoring_events_total{{topic="{topic}", outcome="scored"}}[5s]))'
        return sum(float(sample["value"][1]) for sample in self._running.query(query))


@contextmanager
def watched(prometheus: str, env: FlowEnv, directory: Path, **variables: str) -> Iterator[Watched]:
    """Start the flow of an environment, and a Prometheus with faster rules on its metrics."""
    port = free_port()
    flow = env.flow(METRICS_PORT=str(port), **variables).start()
    rules = faster(load(), FACTOR, topics=env.topics, numbers=STUCK)
    with Prometheus(prometheus, directory / "prometheus", rules, {"live": port}) as running:
        yield Watched(env, flow, running)


def test_poison_in_the_live_flow(prometheus: str, flow_env: FlowEnv, tmp_path: Path) -> None:
    with watched(prometheus, flow_env, tmp_path) as live:

        def flows() -> bool:
            live.send()
            assert live.firing() == set()
            return live.rate() > 0

        def poisoned() -> bool:
            live.send(bad=5)
            assert live.firing() <= {"ScoringDeadLetters"}
            return bool(live.firing())

        def cured() -> bool:
            live.send()
            return live.firing() == set()

        await_that(flows, "events are scored")
        await_that(poisoned, "an alert on dead letters", 90)
        await_that(cured, "no alert after the poison", 90)
        assert live.flow.stop() == 0, live.flow.log


def test_brokers_of_the_live_flow_hang(
    prometheus: str, kafka_1: KafkaCluster, tiny_model: Path, tiny_feast: Path, tmp_path: Path
) -> None:
    """SIGSTOP: connections stay, nothing is answered, and the worker waits in its snapshot."""
    broker = TestBroker(kafka_1.bootstrap_servers)
    # Records linger, so that some are on their way when it happens.
    lingering = {"KAFKA_PRODUCER_OPTIONS": '{"linger.ms": 1000}', "MESSAGE_TIMEOUT_S": "300"}
    with (
        environment(broker, tiny_model, tiny_feast, tmp_path) as env,
        watched(prometheus, env, tmp_path, **lingering) as live,
    ):

        def flows() -> bool:
            live.send()
            assert live.firing() == set()
            return live.rate() > 0

        await_that(flows, "events are scored")
        live.send()
        kafka_1.pause(1)
        stopped = {"ScoringNoEpochClosed", "ScoringStalled", "ScoringBrokersUnreachable"}

        def noticed() -> bool:
            assert live.firing() <= stopped
            return "ScoringNoEpochClosed" in live.firing()

        await_that(noticed, "an alert that no epoch ends", 90)
        kafka_1.resume(1)
        await_that(lambda: live.firing() == set(), "no alert after the outage", 90)
        await_that(flows, "events are scored again", 60)
        assert live.flow.stop() == 0, live.flow.log
    broker.close()
