"""A flow under steady load on a cluster that will be broken, and the judgement in the end."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from tests.chaos.load import Item, Load
from tests.chaos.reader import Place, Reader, resume_offsets
from tests.integration.flow import CARDS, MIDNIGHT, TERMINALS, FlowEnv, environment
from tests.kafka.client import TestBroker, await_that
from tests.kafka.cluster import KafkaCluster

RATE = 200  # records per second
EXACTLY, AT_LEAST = "exactly_once", "at_least_once"
_BAD_EVERY = 50
_END_S = 45.0


def items(count: int) -> Iterator[Item]:
    """Return transactions in order, one a second of stream time, and some records that are none."""
    for n in range(count):
        at = MIDNIGHT + 1000 * n
        card = CARDS[n % 50]
        if n % _BAD_EVERY == 0:
            yield Item("transactions", card.encode(), b"no event %d" % n, None, at)
            continue
        event = {
            "transaction_id": f"t{n:06d}",
            "card_id": card,
            "terminal_id": TERMINALS[n % 37],
            "event_time": at,
            "amount": 1 + n * 37 % 300,
        }
        yield Item("transactions", card.encode(), json.dumps(event).encode(), f"t{n:06d}", at)


class Survivor(Load):
    """Load from a producer that outlives outages, and asks others soon if a broker hangs."""

    def __init__(self, servers: str, topics: Mapping[str, str], rate: float, count: int) -> None:
        super().__init__(servers, topics, list(items(count)), rate)
        self._producer = Producer(
            {
                "bootstrap.servers": servers,
                "enable.idempotence": True,
                "linger.ms": 5,
                "partitioner": "murmur2_random",
                "message.timeout.ms": 300_000,
                "reconnect.backoff.max.ms": 500,
                "request.timeout.ms": 5_000,
                "socket.timeout.ms": 5_000,
                "topic.metadata.refresh.interval.ms": 1_000,
                "log_level": 0,
            }
        )

    @property
    def items_sent(self) -> list[Item]:
        return list(self._items[: self.sent])


class Trial:
    """A flow under steady load on a cluster that will be broken, and the judgement in the end.

    `rate` is in records per second, at most `count` are sent.
    """

    def __init__(
        self,
        env: FlowEnv,
        cluster: KafkaCluster,
        delivery: str,
        rate: float = RATE,
        count: int = 20_000,
        **variables: str,
    ):
        self.env, self.cluster, self.delivery = env, cluster, delivery
        self.flow = env.flow(**{"DELIVERY": delivery, "AUDIT_SHARE": "1", **variables})
        self.rate = rate
        self.load = Survivor(cluster.bootstrap_servers, env.topics, rate, count)
        #: Where each life after the first went on reading, by partition.
        self.resumed: list[dict[Place, int]] = []
        self._sent_by_then = 0  # when the last life began
        #: Leaders that were killed: at least once, what one had not confirmed may come twice.
        self.killed_leaders = 0
        #: Predictions by how they were made; known in the end.
        self.modes: Counter[str] = Counter()

    def start(self) -> None:
        """Start the load and the first life of the flow; wait until it answers."""
        self.flow.start()
        self.load.start()
        await_that(lambda: self.load.sent > self.rate, "load")
        self.await_answers()

    def restart(self) -> None:
        """Start another life of the flow; wait until it reads."""
        self.resumed.append(resume_offsets(self.flow.recovery))
        self._sent_by_then = self.load.sent
        self.flow.start()

    def await_answers(self, timeout_s: float = 60.0) -> None:
        """Wait until all that has been sent by now is answered, in this life of the flow."""
        topic = self.env.topics["transactions"]
        wanted = self.load.sent - self.read_before()

        def answered() -> bool:
            return not self.flow.running or self.answered() >= wanted

        await_that(answered, f"{wanted} answers of {topic}", timeout_s)
        assert self.flow.running, self.flow.log

    def read_before(self) -> int:
        """Return how many records lie before the place where this life went on reading."""
        return sum(self.resumed[-1].values()) if self.resumed else 0

    def answered(self) -> int:
        try:
            account = self.flow.account().get(self.env.topics["transactions"], {})
        except OSError:  # it ends at this moment
            return 0
        return sum(n for outcome, n in account.items() if outcome != "read")

    def await_log(self, pattern: str, timeout_s: float = 30.0) -> None:
        """Wait until the flow says so."""
        await_that(
            lambda: bool(re.search(pattern, self.flow.log)) or not self.flow.running,
            f"the flow says {pattern!r}",
            timeout_s,
        )
        assert re.search(pattern, self.flow.log), self.flow.log

    def ends(self, sentence: str, code: int = 1, timeout_s: float = _END_S) -> None:
        """Check that the flow ends by itself, in bounded time, and says why in its last line."""
        assert self.flow.wait(timeout_s) == code, self.flow.log
        assert re.search(sentence, self.flow.log.splitlines()[-1]), self.flow.log

    def finish(self) -> None:
        """Stop the load, drain the flow, and check what it leaves."""
        self.load.stop()
        self.await_answers()
        assert self.flow.stop() == 0, self.flow.log
        self.check()

    def check(self) -> None:
        """Check that each record has its answers, once (or, at least once, as a replay may).

        All that was scored by the model has an audit record too, and that is all unless the flow
        was told to shed.
        """
        sent = self.load.items_sent
        names = self.env.topics
        reader = Reader(self.cluster.bootstrap_servers, names.values())
        reader.catch_up()
        reader.close()
        origins: dict[str, tuple[str, int, int]] = {}
        for record in reader.records[names["transactions"]]:
            origin = (record.topic, record.partition, record.offset)
            event = json.loads(record.value) if record.value.startswith(b"{") else None  # type: ignore
            name = event["transaction_id"] if event else "/".join(map(str, origin))
            origins[name] = origin
        assert len(origins) == len(sent)
        good = {item.event_id for item in sent} - {None}
        bad = set(origins) - good
        predictions = [json.loads(r.value or b"") for r in reader.records[names["predictions"]]]
        self.modes = Counter(each["score_mode"] for each in predictions)
        full = {each["transaction_id"] for each in predictions if each["score_mode"] == "full"}
        variables = self.flow.variables
        assert full == good or {"OVERLOAD_POLICY", "CATCH_UP"} & variables.keys(), self.modes
        # Items are numbered as they are sent.
        again_computed = {
            name
            for name in good
            for partition, offset in [origins[name][1:]]
            for resumed in self.resumed
            if int(name[1:]) < self._sent_by_then
            and offset >= resumed.get((names["transactions"], partition), 0)
        }
        for topic, expected in (("predictions", good), ("audit", full), ("dead_letters", bad)):
            records = reader.records[names[topic]]
            found = Counter((record.headers["event_id"] or b"").decode() for record in records)
            missing, foreign = expected - set(found), set(found) - expected
            if topic == "audit" and full != good:
                # The life after may decide otherwise on what is computed again.
                missing, foreign = missing - again_computed, foreign - again_computed
            assert not missing and not foreign, (topic, len(missing), len(foreign))
            again = {name: count - 1 for name, count in found.items() if count > 1}
            if self.delivery == EXACTLY:
                assert not again, (topic, len(again))
            for name, count in again.items():
                input_topic, partition, offset = origins[name]
                replays = [r for r in self.resumed if offset >= r.get((input_topic, partition), 0)]
                assert count <= len(replays) + self.killed_leaders, (topic, name, count)
        said = self.flow.log_file.read_text()
        assert not any(card in said for card in CARDS), "the log names a card"
        for topic, outcomes in self.flow.account().items():
            assert outcomes["read"] == sum(n for o, n in outcomes.items() if o != "read"), topic


@contextmanager
def trial_on(
    cluster: KafkaCluster, model: Path, feast: Path, directory: Path
) -> Iterator[Callable[..., Trial]]:
    broker = TestBroker(cluster.bootstrap_servers)
    trials: list[Trial] = []
    with environment(broker, model, feast, directory) as env:

        def make(delivery: str = EXACTLY, **more: Any) -> Trial:
            trials.append(Trial(env, cluster, delivery, **more))
            return trials[-1]

        yield make
        for trial in trials:
            trial.load._end.set()
    broker.close()


@pytest.fixture
def one(
    kafka_1: KafkaCluster, tiny_model: Path, tiny_feast: Path, tmp_path: Path
) -> Iterator[Callable[..., Trial]]:
    """Return what makes a trial on one broker."""
    with trial_on(kafka_1, tiny_model, tiny_feast, tmp_path) as make:
        yield make


@pytest.fixture
def three(
    kafka_3: KafkaCluster, tiny_model: Path, tiny_feast: Path, tmp_path: Path
) -> Iterator[Callable[..., Trial]]:
    """Return what makes a trial on three brokers."""
    with trial_on(kafka_3, tiny_model, tiny_feast, tmp_path) as make:
        yield make
