"""One process of a two-process cluster with unequal loads; see test_kafka_phase.py.

Partition 0 is the heavy worker's, 1 the light one's. Each process appends a line to
``<directory>/<partition>`` after each batch: the monotonic time in seconds, and how many events the
batch had. When a file named ``stall`` appears in the directory, the heavy worker stands still once.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink, cluster_main

from dataflows.kafka.records import Records
from dataflows.kafka.source import KafkaSource, SourceTopic


def main() -> None:
    """Run until killed."""
    options = json.loads(sys.argv[1])
    directory = Path(options["directory"])
    stall = directory / "stall"

    def work(records: Records) -> int:
        partition = int(records.partition[0])
        time.sleep(options["event_s"][partition] * len(records))
        with (directory / str(partition)).open("a") as file:
            file.write(f"{time.monotonic()} {len(records)}\n")
        if partition == 0 and stall.exists():
            stall.unlink()
            time.sleep(options["stall_s"])
        return len(records)

    flow = Dataflow("phase")
    source = KafkaSource(
        [SourceTopic(options["topic"], "at")],
        options["consumer_config"],
        group_id="phase",
        batch_size=options["batch_size"],
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
