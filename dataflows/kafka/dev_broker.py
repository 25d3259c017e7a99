"""Run a Kafka broker for demos and fast tests, without Java and without Docker.

Every ``confluent-kafka`` wheel carries librdkafka, and librdkafka carries a *mock cluster*: real
brokers on real TCP ports, kept in memory. This module starts one in its own process::

    $ python -m dataflows.kafka.dev_broker --topic transactions:4 --topic fraud_reports:2
    {"bootstrap_servers": "127.0.0.1:39113", "pid": 4711, ...}

It stops on SIGTERM, on SIGINT, and when its standard input is a pipe that closes (so that it does
not outlive the program that started it). Tests use the class:

>>> with DevBroker({"transactions": 2}) as broker:  # doctest: +SKIP
...     broker.create_topic("predictions", partitions=2)
...     broker.broker_down()

What it is not (read in librdkafka 2.16, ``rdkafka_mock.c`` and ``rdkafka_mock_handlers.c``):

* **Retention** is 5 MiB *on the wire* (so after compression) or 100 000 record batches per
  partition, fixed in C; the oldest batches go first and silently, and no call raises the limit.
  Whoever reads behind that gets ``OFFSET_OUT_OF_RANGE``. A producer must pace itself so that no
  consumer is more than 5 MiB per partition behind; more partitions and compression help.
* **Fetch** returns one record batch per partition and request, and a fetch that finds nothing
  waits its whole ``fetch.wait.max.ms``, even if a record arrives meanwhile. For low latency give
  consumers `CONSUMER_CONFIG`. Finding a batch is a linear scan: many tiny batches are slow.
* Transactions are accepted but **not isolated**; there is no TLS, no SASL and no admin client, the
  clients' metadata requests create missing topics (4 partitions) unless they forbid it, and
  everything is gone with the process. Never use it to show a delivery guarantee.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import json
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CONSUMER_CONFIG: Mapping[str, int] = {"fetch.wait.max.ms": 2, "fetch.error.backoff.ms": 50}
"""Consumer settings for a mock cluster: it never cuts a fetch's wait short when data arrives."""

RETENTION_BYTES = 5 * 1024 * 1024
"""Bytes of record batches kept per partition, after compression; `rdkafka_mock.c` fixes it."""


def _librdkafka() -> ctypes.CDLL:
    """Open the librdkafka of the installed wheel (or of the system, for a source build)."""
    import confluent_kafka

    package = Path(confluent_kafka.__file__).parent
    candidates = [
        *sorted(package.parent.glob("confluent_kafka.libs/librdkafka*")),
        *sorted(package.glob(".dylibs/librdkafka*")),
    ]
    path = str(candidates[0]) if candidates else ctypes.util.find_library("rdkafka")
    if path is None:
        raise RuntimeError(
            "no librdkafka shared library beside the confluent_kafka package or on the system: "
            "install the confluent-kafka wheel, or point KAFKA_BOOTSTRAP_SERVERS at a real broker"
        )
    library = ctypes.CDLL(path)
    pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    int32, int16, size = ctypes.c_int32, ctypes.c_int16, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "rd_kafka_conf_new": (pointer, []),
        "rd_kafka_conf_set": (integer, [pointer, text, text, text, size]),
        "rd_kafka_new": (pointer, [integer, pointer, text, size]),
        "rd_kafka_destroy": (None, [pointer]),
        "rd_kafka_err2str": (text, [integer]),
        "rd_kafka_mock_cluster_new": (pointer, [pointer, integer]),
        "rd_kafka_mock_cluster_destroy": (None, [pointer]),
        "rd_kafka_mock_cluster_bootstraps": (text, [pointer]),
        "rd_kafka_mock_topic_create": (integer, [pointer, text, integer, integer]),
        "rd_kafka_mock_topic_delete": (integer, [pointer, text]),
        "rd_kafka_mock_topic_set_error": (None, [pointer, text, integer]),
        "rd_kafka_mock_broker_set_down": (integer, [pointer, int32]),
        "rd_kafka_mock_broker_set_up": (integer, [pointer, int32]),
        "rd_kafka_mock_broker_set_rtt": (integer, [pointer, int32, integer]),
        "rd_kafka_mock_partition_set_leader": (integer, [pointer, text, int32, int32]),
        "rd_kafka_mock_partition_delete_records": (
            integer,
            [pointer, text, int32, ctypes.c_int64],
        ),
        "rd_kafka_mock_push_request_errors_array": (
            None,
            [pointer, int16, size, ctypes.POINTER(integer)],
        ),
        "rd_kafka_mock_clear_request_errors": (None, [pointer, int16]),
        "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [pointer, int32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class MockCluster:
    """Hold a mock cluster in *this* process. Prefer `DevBroker`, which gives it its own.

    Every method with a broker number takes 1 … `brokers`. Errors raise `RuntimeError`.
    """

    def __init__(self, brokers: int = 1) -> None:
        self._library = _librdkafka()
        self._brokers = brokers
        message = ctypes.create_string_buffer(512)
        conf = self._library.rd_kafka_conf_new()
        self._library.rd_kafka_conf_set(conf, b"log_level", b"3", message, 512)
        self._handle = self._library.rd_kafka_new(0, conf, message, 512)
        if not self._handle:
            raise RuntimeError(f"cannot start the mock cluster: {message.value.decode()}")
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._handle, brokers)
        if not self._cluster:
            raise RuntimeError("cannot start the mock cluster: no free loopback port?")
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)

    @property
    def bootstrap_servers(self) -> str:
        """Addresses of all brokers, comma separated."""
        servers: bytes = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster)
        return servers.decode()

    def close(self) -> None:
        """Destroy the cluster and every record in it."""
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._handle)

    def _check(self, error: int, doing: str) -> None:
        if error:
            text: bytes = self._library.rd_kafka_err2str(error)
            raise RuntimeError(f"mock cluster cannot {doing}: {text.decode()}")

    def create_topic(self, topic: str, partitions: int) -> None:
        """Create `topic`, replicated over all brokers."""
        error = self._library.rd_kafka_mock_topic_create(
            self._cluster, topic.encode(), partitions, self._brokers
        )
        self._check(error, f"create topic {topic!r}")

    def delete_topic(self, topic: str) -> None:
        """Delete `topic` with its records."""
        error = self._library.rd_kafka_mock_topic_delete(self._cluster, topic.encode())
        self._check(error, f"delete topic {topic!r}")

    def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
        """Drop whole record batches before `before_offset`, as retention would."""
        error = self._library.rd_kafka_mock_partition_delete_records(
            self._cluster, topic.encode(), partition, before_offset
        )
        self._check(error, f"delete records of {topic}/{partition}")

    def broker_down(self, broker: int = 1) -> None:
        """Close the broker's connections and refuse new ones."""
        error = self._library.rd_kafka_mock_broker_set_down(self._cluster, broker)
        self._check(error, f"take broker {broker} down")

    def broker_up(self, broker: int = 1) -> None:
        """Let the broker accept connections again."""
        error = self._library.rd_kafka_mock_broker_set_up(self._cluster, broker)
        self._check(error, f"bring broker {broker} up")

    def set_rtt(self, milliseconds: int, broker: int = 1) -> None:
        """Delay every response of the broker by `milliseconds`."""
        error = self._library.rd_kafka_mock_broker_set_rtt(self._cluster, broker, milliseconds)
        self._check(error, f"set the round-trip time of broker {broker}")

    def set_leader(self, topic: str, partition: int, broker: int) -> None:
        """Make `broker` (-1: none) the leader of the partition."""
        error = self._library.rd_kafka_mock_partition_set_leader(
            self._cluster, topic.encode(), partition, broker
        )
        self._check(error, f"move the leader of {topic}/{partition}")

    def push_request_errors(self, api_key: int, errors: Sequence[int]) -> None:
        """Answer the next requests of `api_key` (Produce 0, Fetch 1, Metadata 3, …) with `errors`.

        `errors` are Kafka error codes as in `confluent_kafka.KafkaError`; 0 lets one request pass.
        """
        array = (ctypes.c_int * len(errors))(*errors)
        self._library.rd_kafka_mock_push_request_errors_array(
            self._cluster, api_key, len(errors), array
        )

    def clear_request_errors(self, api_key: int) -> None:
        """Forget the errors pushed for `api_key`."""
        self._library.rd_kafka_mock_clear_request_errors(self._cluster, api_key)


_COMMANDS = frozenset(
    {
        "create_topic",
        "delete_topic",
        "delete_records",
        "broker_down",
        "broker_up",
        "set_rtt",
        "set_leader",
        "push_request_errors",
        "clear_request_errors",
    }
)


class DevBroker:
    """Run a mock cluster in a child process, for as long as the ``with`` block lasts.

    The methods of `MockCluster` (`create_topic`, `broker_down`, …) act on the child, through a
    line of JSON each way.

    Args:
        topics: name → number of partitions, created before the block is entered.
        brokers: number of brokers.
        timeout_s: seconds to wait for the child to answer.

    Raises:
        RuntimeError: The child did not answer, or a command failed there.
    """

    def __init__(
        self, topics: Mapping[str, int] | None = None, *, brokers: int = 1, timeout_s: float = 30.0
    ) -> None:
        self._topics = dict(topics or {})
        self._brokers = brokers
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self.bootstrap_servers = ""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", __name__, "--brokers", str(self._brokers)]
        for topic, partitions in self._topics.items():
            command += ["--topic", f"{topic}:{partitions}"]
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.bootstrap_servers = self._answer()["bootstrap_servers"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, self._process = self._process, None
        if process is None or process.stdin is None or process.stdout is None:
            return
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdout is None:
            raise RuntimeError("the dev broker is not running: use it in a `with` block")
        ready, _, _ = select.select([process.stdout], [], [], self._timeout_s)
        line = process.stdout.readline() if ready else b""
        if not line:
            raise RuntimeError(
                f"the dev broker gave no answer within {self._timeout_s:g} s "
                f"(exit code {process.poll()}); its messages are on standard error"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _tell(self, command: str, **arguments: Any) -> None:
        if self._process is None or self._process.stdin is None:
            raise RuntimeError("the dev broker is not running: use it in a `with` block")
        line = json.dumps({"command": command, "arguments": arguments}) + "\n"
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()
        self._answer()

    def create_topic(self, topic: str, partitions: int) -> None:
        """See `MockCluster.create_topic`."""
        self._tell("create_topic", topic=topic, partitions=partitions)

    def delete_topic(self, topic: str) -> None:
        """See `MockCluster.delete_topic`."""
        self._tell("delete_topic", topic=topic)

    def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
        """See `MockCluster.delete_records`."""
        self._tell("delete_records", topic=topic, partition=partition, before_offset=before_offset)

    def broker_down(self, broker: int = 1) -> None:
        """See `MockCluster.broker_down`."""
        self._tell("broker_down", broker=broker)

    def broker_up(self, broker: int = 1) -> None:
        """See `MockCluster.broker_up`."""
        self._tell("broker_up", broker=broker)

    def set_rtt(self, milliseconds: int, broker: int = 1) -> None:
        """See `MockCluster.set_rtt`."""
        self._tell("set_rtt", milliseconds=milliseconds, broker=broker)

    def set_leader(self, topic: str, partition: int, broker: int) -> None:
        """See `MockCluster.set_leader`."""
        self._tell("set_leader", topic=topic, partition=partition, broker=broker)

    def push_request_errors(self, api_key: int, errors: Sequence[int]) -> None:
        """See `MockCluster.push_request_errors`."""
        self._tell("push_request_errors", api_key=api_key, errors=list(errors))

    def clear_request_errors(self, api_key: int) -> None:
        """See `MockCluster.clear_request_errors`."""
        self._tell("clear_request_errors", api_key=api_key)


def _obey(cluster: MockCluster, line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        if request["command"] not in _COMMANDS:
            return {"error": f"unknown command {request['command']!r}"}
        getattr(cluster, request["command"])(**request["arguments"])
    except Exception as error:
        return {"error": str(error)}
    return {"done": request["command"]}


def _topic(text: str) -> tuple[str, int]:
    name, separator, partitions = text.rpartition(":")
    if not separator or not name or not partitions.isdecimal() or not int(partitions):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:PARTITIONS, as in transactions:4")
    return name, int(partitions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; see the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m dataflows.kafka.dev_broker",
        description="In-memory Kafka for demos and tests. Prints one JSON line when ready.",
    )
    parser.add_argument(
        "--topic", action="append", type=_topic, default=[], metavar="NAME:PARTITIONS"
    )
    parser.add_argument("--brokers", type=int, default=1)
    options = parser.parse_args(arguments)

    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: None)

    cluster = MockCluster(options.brokers)
    for topic, partitions in options.topic:
        cluster.create_topic(topic, partitions)
    ready = {
        "bootstrap_servers": cluster.bootstrap_servers,
        "pid": os.getpid(),
        "topics": dict(options.topic),
        "consumer_config": dict(CONSUMER_CONFIG),
        "retention_bytes_per_partition": RETENTION_BYTES,
    }
    print(json.dumps(ready), flush=True)

    # A terminal or /dev/null on standard input says nothing about who started us; a pipe does.
    obeying = stat.S_ISFIFO(os.fstat(0).st_mode) or stat.S_ISSOCK(os.fstat(0).st_mode)
    sources = [wake, 0] if obeying else [wake]
    pending = b""
    while True:
        readable, _, _ = select.select(sources, [], [])
        if wake in readable:
            break
        data = os.read(0, 65536)
        if not data:
            break
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            print(json.dumps(_obey(cluster, line)), flush=True)
    cluster.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
