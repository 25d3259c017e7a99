"""Fixtures shared by all tests: the data set, and the brokers.

`broker` is for every test that needs Kafka. `kafka` is the same where that is Apache Kafka, else
the test is skipped: for tests of delivery guarantees, which the embedded broker cannot give.
Tests that break things ask for a broker of their own: `dev_broker`, `kafka_1` or `kafka_3`.
"""

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataflows.kafka.dev_broker import DevBroker
from model import handbook
from tests.kafka import cluster
from tests.kafka.client import TestBroker
from tests.kafka.cluster import KafkaCluster

CACHE = Path(__file__).parents[1] / ".cache"

#: Why tests had to do without Apache Kafka; for the summary.
_without_kafka: list[str] = []


@pytest.fixture(scope="session")
def handbook_dir() -> Path:
    """Return the directory of the full handbook data set, generated once per generator source."""
    source = Path(handbook.__file__).read_bytes()
    directory = CACHE / "handbook" / hashlib.sha256(source).hexdigest()[:16]
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = tempfile.mkdtemp(dir=directory.parent)
        handbook.write(handbook.simulate(), Path(staging))
        try:
            os.rename(staging, directory)
        except OSError:  # another test run was first, with the same content
            shutil.rmtree(staging)
    return directory


@functools.cache
def _no_cluster() -> str | None:
    """Return why Apache Kafka cannot be started here, or None if it can."""
    wanted = os.environ.get("TEST_BROKER", "")
    if wanted not in ("", "kafka", "embedded"):
        pytest.exit(f"TEST_BROKER={wanted} is neither `kafka` nor `embedded`", 2)
    reason = "TEST_BROKER=embedded" if wanted == "embedded" else cluster.unavailable()
    if reason is not None:
        if wanted == "kafka":
            pytest.exit(f"TEST_BROKER=kafka, but {reason}", 2)
        _without_kafka.append(reason)
    return reason


@pytest.fixture(scope="session")
def broker() -> Iterator[TestBroker]:
    """Return the broker that tests share, each with topics of its own.

    The cluster that KAFKA_BOOTSTRAP_SERVERS names, or Apache Kafka started for this run, or the
    embedded broker where that is not possible or TEST_BROKER=embedded. TEST_BROKER=kafka ends the
    run where Apache Kafka is not possible.
    """
    servers = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
    if servers:
        shared = TestBroker(servers)
        yield shared
        shared.close()
    elif _no_cluster() is None:
        with KafkaCluster() as started:
            shared = TestBroker(started.bootstrap_servers)
            yield shared
            shared.close()
    else:
        with DevBroker() as dev:
            shared = TestBroker(dev.bootstrap_servers, dev)
            yield shared
            shared.close()


@pytest.fixture(scope="session")
def kafka(broker: TestBroker) -> TestBroker:
    """Return `broker` if it is Apache Kafka; skip the test if it is the embedded one."""
    if broker.dev is not None:
        pytest.skip(f"needs Apache Kafka: {_no_cluster()}")
    return broker


@pytest.fixture
def dev_broker() -> Iterator[DevBroker]:
    """Return an embedded broker of the test's own, to be broken at will."""
    with DevBroker() as dev:
        yield dev


def _cluster(brokers: int) -> Iterator[KafkaCluster]:
    reason = _no_cluster()
    if reason is not None:
        pytest.skip(f"needs Apache Kafka: {reason}")
    with KafkaCluster(brokers) as started:
        yield started


@pytest.fixture(scope="module")
def _kafka_1() -> Iterator[KafkaCluster]:
    yield from _cluster(1)


@pytest.fixture(scope="module")
def _kafka_3() -> Iterator[KafkaCluster]:
    yield from _cluster(3)


@pytest.fixture
def kafka_1(_kafka_1: KafkaCluster) -> KafkaCluster:
    """Return one Apache Kafka broker of the module's own, whole again, to be broken at will."""
    _kafka_1.heal()
    return _kafka_1


@pytest.fixture
def kafka_3(_kafka_3: KafkaCluster) -> KafkaCluster:
    """Return three Apache Kafka brokers of the module's own, whole again, to be broken at will."""
    _kafka_3.heal()
    return _kafka_3


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it loudly when delivery guarantees were not tested."""
    for reason in _without_kafka:
        terminalreporter.section("delivery", red=True)
        terminalreporter.line(f"DELIVERY GUARANTEES WERE NOT TESTED: {reason}", red=True)
