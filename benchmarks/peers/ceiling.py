"""The ceiling: consume and produce, nothing between. No window, no model, nothing durable."""

from __future__ import annotations

from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks.peers.job import EAGER, MOST_OUTSTANDING, PARTITIONS, ROOM, Job


def main() -> None:
    """Copy records until killed."""
    job = Job.from_environment()
    consumer = Consumer({"bootstrap.servers": job.brokers, "group.id": job.group, **EAGER})
    consumer.assign([TopicPartition(job.source, n, 0) for n in range(PARTITIONS)])
    producer = Producer({"bootstrap.servers": job.brokers, "linger.ms": 5, **ROOM})
    while True:
        for message in consumer.consume(1000, 0.1):
            if message.error() is None:
                producer.produce(job.sink, message.value(), message.key())
        producer.poll(0)
        while len(producer) > MOST_OUTSTANDING:
            producer.poll(0.01)


if __name__ == "__main__":
    main()
