"""Outages of the brokers and of the disk, under the real flow and steady load.

For each: what the operator sees, and that in the end nothing is lost and nothing doubled. The table
in docs/outages.md says the same in words; keep the two together.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourcePatternType,
    ResourceType,
)

from tests.chaos.trial import AT_LEAST, EXACTLY, Trial, one, three, trial_on
from tests.integration.flow import tiny_feast, tiny_model
from tests.kafka.client import await_that
from tests.kafka.cluster import KafkaCluster

__all__ = ["one", "three", "tiny_feast", "tiny_model"]  # fixtures

Make = Callable[..., Trial]


def test_broker_down_at_start(one: Make) -> None:
    trial = one(STARTUP_TIMEOUT_S="2")
    trial.cluster.stop(1)
    trial.flow.start(wait=False)
    address = re.escape(trial.cluster.bootstrap_servers)
    trial.ends(f"no Kafka broker answered at '{address}' within 2 s .*: start the broker", 2)
    assert "Traceback" not in trial.flow.log
    trial.flow.variables["STARTUP_TIMEOUT_S"] = "60"
    trial.flow.start(wait=False)
    trial.await_log("no Kafka broker answers at")
    trial.cluster.start(1)
    trial.await_log("reading {", 60)
    trial.load.start()
    trial.await_answers()
    trial.finish()


@pytest.mark.parametrize(("delivery", "kill"), [(EXACTLY, True), (AT_LEAST, False)])
def test_broker_down_for_less_than_the_message_timeout(
    one: Make, delivery: str, kill: bool
) -> None:
    trial = one(delivery)
    trial.start()
    (trial.cluster.kill if kill else trial.cluster.stop)(1)
    # The writing side says so, if something was on its way; else the reading side.
    trial.await_log(
        "the brokers have confirmed nothing for [2-9] s; the flow waits|; waiting for the brokers"
    )
    trial.cluster.start(1)
    trial.await_log("the brokers confirm again, after|a broker answers again after", 60)
    trial.await_answers()
    assert len(trial.flow.log_lines()) < 100
    trial.finish()


@pytest.mark.parametrize("delivery", [EXACTLY, AT_LEAST])
def test_broker_down_for_longer_than_the_message_timeout(one: Make, delivery: str) -> None:
    # Records linger, or their transaction does, so that some are on their way when it happens;
    # a flow with nothing to deliver waits.
    lingers = {"TRANSACTION_S": "1", "KAFKA_PRODUCER_OPTIONS": '{"linger.ms": 1000}'}
    trial = one(delivery, MESSAGE_TIMEOUT_S="2", **lingers)
    trial.start()
    trial.cluster.stop(1)
    trial.ends("stopped by DeliveryError: .*See to the brokers.*restart the flow")
    trial.cluster.start(1)
    trial.restart()
    trial.finish()


@pytest.mark.parametrize(
    ("delivery", "troubles"),
    [(EXACTLY, ["leader stops", "leader dies", "coordinator hangs"]), (AT_LEAST, ["leader dies"])],
)
def test_one_of_three_brokers_goes(three: Make, delivery: str, troubles: list[str]) -> None:
    trial = three(delivery)
    cluster, topics = trial.cluster, trial.env.topics
    trial.start()
    for trouble in troubles:
        cluster.heal()
        if trouble == "coordinator hangs":
            owner = trial.env.variables["GROUP_ID"]
            broker = cluster.coordinator_of_transaction(f"{owner}.{topics['predictions']}.0")
            assert broker is not None
            cluster.pause(broker)
        else:
            reads = {cluster.leader_of(topics["transactions"], p) for p in range(4)}
            writes = [cluster.leader_of(topics["predictions"], p) for p in range(3)]
            broker = next(each for each in writes if each in reads)
            assert broker is not None
            (cluster.stop if trouble == "leader stops" else cluster.kill)(broker)
            trial.killed_leaders += trouble == "leader dies"
        trial.await_answers()
    trial.finish()


def set_least_in_sync(cluster: KafkaCluster, topic: str, least: int) -> None:
    """Let a topic take records only if so many replicas do."""
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    resource.add_incremental_config(
        ConfigEntry("min.insync.replicas", str(least), incremental_operation=AlterConfigOpType.SET)
    )
    admin = AdminClient({"bootstrap.servers": cluster.bootstrap_servers})
    admin.incremental_alter_configs([resource])[resource].result(30)


def test_no_transaction_coordinator(three: Make) -> None:
    # The coordinators cannot write; everything else goes on with two of three replicas.
    trial = three(MESSAGE_TIMEOUT_S="2")
    trial.start()
    sentence = r"stopped by DeliveryError: transactional.id '.*' could not be {}.*coordinator"
    try:
        set_least_in_sync(trial.cluster, "__transaction_state", 3)
        trial.cluster.stop(3)
        # Or its records time out first: until the coordinator knows the partition, they wait too.
        late = "stopped by DeliveryError: Kafka did not take .*_TIMED_OUT.*See to the brokers"
        trial.ends(f"{sentence.format('committed')}|{late}")
        trial.restart()
        trial.ends(sentence.format("taken over"))
    finally:
        set_least_in_sync(trial.cluster, "__transaction_state", 2)
    # The coordinator takes some seconds to be done with the transactions it could not end.
    trial.flow.variables["MESSAGE_TIMEOUT_S"] = "60"
    trial.restart()
    trial.finish()


def test_output_topic_missing_at_start(one: Make) -> None:
    trial = one()
    topic = trial.env.topics["predictions"]
    trial.cluster.delete_topic(topic)
    trial.flow.start(wait=False)
    trial.ends(f"topic '{topic}' does not exist at .*: create it, or correct the topic's name", 2)
    trial.cluster.create_topic(topic, 3)
    trial.start()
    trial.finish()


def test_output_topic_deleted_while_running(one: Make) -> None:
    trial = one(MESSAGE_TIMEOUT_S="2")
    topic = trial.env.topics["predictions"]
    trial.start()
    trial.cluster.delete_topic(topic)
    trial.ends(f"stopped by DeliveryError: .*{topic}.*restart the flow")
    trial.cluster.create_topic(topic, 3)
    trial.restart()
    trial.ends(
        f"stopped by StartupError: {topic}/. ends at [01], before the snapshot's .*recreated"
    )
    trial.flow.recovery = trial.env.directory / "new"
    trial.flow.recovery.mkdir()
    trial.restart()
    trial.finish()


@pytest.mark.parametrize("delivery", [EXACTLY, AT_LEAST])
def test_the_right_to_write_is_taken_away_for_a_while(
    tiny_model: Path, tiny_feast: Path, tmp_path: Path, delivery: str
) -> None:
    """librdkafka then refuses rows at once, without a mark on the transaction."""
    config = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
    }
    with (
        KafkaCluster(1, config=config) as cluster,
        trial_on(cluster, tiny_model, tiny_feast, tmp_path) as make,
    ):
        trial = make(delivery)
        trial.start()
        topic = trial.env.topics["predictions"]
        admin = AdminClient({"bootstrap.servers": cluster.bootstrap_servers})
        somebody_else = (ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:else", "*")
        right = AclBinding(*somebody_else, AclOperation.ALL, AclPermissionType.ALLOW)
        admin.create_acls([right])[right].result(30)
        trial.await_log("Unable to produce message|stopped by DeliveryError", 90)
        given = AclBindingFilter(*somebody_else, AclOperation.ALL, AclPermissionType.ALLOW)
        admin.delete_acls([given])[given].result(30)
        trial.load.stop()
        await_that(
            lambda: (
                not trial.flow.running or trial.answered() >= trial.load.sent - trial.read_before()
            ),
            "all is answered, or the flow has stopped",
            120,
        )
        if not trial.flow.running:
            trial.ends(f"stopped by DeliveryError: .*{topic}.*restart the flow")
            trial.restart()
        trial.finish()


def test_transaction_timeout_above_the_brokers(one: Make) -> None:
    trial = one(KAFKA_PRODUCER_OPTIONS='{"transaction.timeout.ms": 1000000}')
    trial.flow.start()
    trial.load.start()
    trial.ends("stopped by DeliveryError: .*MESSAGE_TIMEOUT_S.*transaction.max.timeout.ms: lower")


@pytest.mark.parametrize("delivery", [EXACTLY, AT_LEAST])
def test_disk_of_the_recovery_store_full(one: Make, delivery: str) -> None:
    trial = one(delivery)
    trial.start()
    store = trial.flow.recovery / "part-0.sqlite3-wal"
    await_that(lambda: store.stat().st_size > 300_000, "the store grows")
    process = trial.flow._process
    assert process is not None
    # No file of this process may grow beyond this: the log is small, the store is not.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (256_000, 256_000))
    trial.ends("stopped by a failure of the recovery store: .*See to its disk")
    trial.restart()
    trial.finish()
