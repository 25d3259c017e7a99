"""The bare loop: consume → produce and nothing else, as fast as this client can be.

    python -m benchmarks.bare --bootstrap-servers … --source transactions --sink predictions

Every record goes to the partition that it came from. Runs until it is told to stop (SIGTERM). It
keeps no offsets, looks at no delivery report and holds no state.
"""

from __future__ import annotations

import argparse
import sys

from confluent_kafka import Consumer, Producer, TopicPartition


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.bare", description=__doc__)
    parser.add_argument("--bootstrap-servers", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--sink", required=True)
    parser.add_argument("--partitions", type=int, required=True)
    options = parser.parse_args()
    address = {"bootstrap.servers": options.bootstrap_servers}
    consumer = Consumer(
        {**address, "group.id": "bare", "enable.auto.commit": False,
         "fetch.queue.backoff.ms": 2, "fetch.wait.max.ms": 10}
    )  # fmt: skip
    producer = Producer(
        {**address, "enable.idempotence": True, "linger.ms": 1,
         "queue.buffering.max.messages": 1_000_000}
    )  # fmt: skip
    consumer.assign([TopicPartition(options.source, n, 0) for n in range(options.partitions)])
    print("reading", flush=True)
    while True:
        first = consumer.poll(0.1)
        if first is None:
            continue
        for message in [first, *consumer.consume(1024, 0)]:
            while message.error() is None:
                try:
                    producer.produce(
                        options.sink, message.value(), message.key(), message.partition()
                    )
                    break
                except BufferError:
                    producer.poll(0.01)
        producer.poll(0)


if __name__ == "__main__":
    sys.exit(main())
