"""One process of a two-process cluster with unequal loads; see test_kafka_phase.py.

Partition 0 is heavy: each of its batches takes 30 ms; one of partition 1 takes 1 ms. After its
time the process that reads partition 1 writes a JSON list: the seconds at which it had a batch.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink, cluster_main

from dataflows.kafka.records import Records
from dataflows.kafka.source import KafkaSource, SourceTopic

WORK_S = [0.03, 0.001]


def main() -> None:
    """Run until killed."""
    options = json.loads(sys.argv[1])
    at: list[float] = []

    def work(records: Records) -> int:
        partition = int(records.partition[0])
        time.sleep(WORK_S[partition])
        if partition == 1:
            at.append(time.monotonic())
            if at[-1] - at[0] > options["seconds"]:
                staged = Path(options["result"] + ".new")
                staged.write_text(json.dumps([moment - at[0] for moment in at]))
                staged.rename(options["result"])
                os._exit(0)
        return len(records)

    flow = Dataflow("phase")
    source = KafkaSource(
        [SourceTopic(options["topic"], "at")],
        options["consumer_config"],
        group_id="phase",
        batch_size=1,
        phase_keeping=options["phase_keeping"],
    )
    counts = op.map("work", op.input("records", flow, source), work)
    op.output("out", counts, TestingSink([]))
    cluster_main(
        flow,
        options["addresses"],
        options["process"],
        epoch_interval=timedelta(seconds=options["epoch_s"]),
    )


if __name__ == "__main__":
    main()
