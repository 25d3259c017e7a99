"""A flow that forwards what it reads: `python -m bytewax.run tests.integration.kafka_flow`.

Its settings are one JSON object in the environment variable KAFKA_FLOW.
"""

import json
import logging
import os
import time
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Dataflow

from dataflows.kafka import peers
from dataflows.kafka.records import OutRecords, Records
from dataflows.kafka.sink import Guarantee, KafkaSink, output, poll_sinks
from dataflows.kafka.source import KafkaSource, SourceTopic, install_drain_handlers
from dataflows.recovery import launched, prepare


def forwarding_flow(
    *,
    topics: list[str],
    output_topic: str,
    config: dict[str, Any],
    consumer_config: dict[str, Any],
    group_id: str,
    work_s: float = 0.0,
    delivery: Guarantee = "at_least_once",
    **source_options: Any,
) -> Dataflow:
    """Return a flow that copies records; `work_s` is what each batch costs on the way."""

    def forward(batches: list[Records]) -> list[OutRecords]:
        out = []
        for records in batches:
            time.sleep(work_s)
            origins = [
                f"{topics[source]}/{partition}/{offset}".encode()
                for source, partition, offset in zip(
                    records.source, records.partition, records.offset, strict=True
                )
            ]
            out.append(
                OutRecords(
                    [message.key() for message in records.messages],
                    [message.value() for message in records.messages],
                    records.append_time,
                    origins,
                )
            )
        return out

    flow = Dataflow("forwarding")
    source = KafkaSource(
        [SourceTopic(topic, "at") for topic in topics],
        consumer_config,
        group_id=group_id,
        between_batches=poll_sinks,
        **source_options,
    )
    records = op.input("records", flow, source)
    copies = op.flat_map_batch("forward", records, forward)
    sink = KafkaSink(
        output_topic, config, delivery=delivery, consumer_config=consumer_config, owner=group_id
    )
    output("copies", copies, sink)
    return flow


if "KAFKA_FLOW" in os.environ:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    settings = json.loads(os.environ["KAFKA_FLOW"])
    launch = launched()
    assert launch is not None and launch.directory is not None
    # How soon one process sees that another drains; long: only the agreed last epoch helps.
    peers._LOOK_EVERY_S = settings.pop("look_every_s", peers._LOOK_EVERY_S)
    if settings.pop("share", True):
        store = prepare(
            launch.directory, "forwarding", process=launch.process, processes=launch.processes
        )
        settings["peers"] = store.peers()
    install_drain_handlers()
    flow = forwarding_flow(**settings)
