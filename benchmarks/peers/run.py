"""One run of one contender: start it on a backlog, read what it writes, and stop it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import psutil
from confluent_kafka import Consumer, TopicPartition

from benchmarks.peers.backlog import Backlog, Int, check
from benchmarks.peers.contenders import CEILING, ROOT, CannotInstall, Contender
from benchmarks.peers.job import EAGER, PARTITIONS, Job
from benchmarks.peers.report import Result
from dataflows.demo.processes import Guard
from tests.kafka.cluster import KafkaCluster

_SAMPLE_S = 0.1


@dataclass
class Course:
    """The broker, the events on it, and what is right."""

    cluster: KafkaCluster
    guard: Guard
    package: Path
    folder: Path
    backlog: Backlog
    counts: Int
    scores: Sequence[float]
    topics: dict[float, str] = field(default_factory=dict)
    runs: int = 0

    def source(self, share: float) -> tuple[str, int]:
        """Return the topic with the events of a share of the cards, and their number."""
        events = self.backlog.share(share)
        if share not in self.topics:
            topic = self.topics[share] = f"events_{len(self.topics)}"
            self.cluster.create_topic(topic, PARTITIONS)
            self.backlog.send(self.cluster.bootstrap_servers, topic, events)
        return self.topics[share], len(events)

    def run(self, contender: Contender, limit_s: float) -> Result:
        """Let a contender work off its share; give up after `limit_s` seconds."""
        source, count = self.source(contender.share)
        try:
            python = contender.python()
        except CannotInstall as error:
            return Result(count, failure=f"cannot be installed: {error}")
        self.runs += 1
        sink = f"predictions_{self.runs}_{contender.module}"
        self.cluster.create_topic(sink, PARTITIONS)
        self.cluster.create_topic(f"{sink}_dead", 1)
        state = self.folder / sink
        state.mkdir()
        job = Job(self.cluster.bootstrap_servers, source, sink, self.package, state / "state")
        job.state.mkdir(mode=0o700)
        log = state / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [str(python), *contender.arguments(job.state)],
                cwd=ROOT,
                env={**_clean(), **job.environment()},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.guard.adopt(process)
        began = time.monotonic(), _others_cpu_s()
        try:
            seen = _read(job, count, limit_s, process)
            available_s = (time.monotonic() - began[0]) * psutil.cpu_count()
            others = max(0.0, (_others_cpu_s() - began[1]) / available_s)
        finally:
            _stop(process, self.guard)
        result = self._result(contender, count, seen, log)
        result = dataclasses.replace(result, others=others)
        self.cluster.delete_topic(sink)
        shutil.rmtree(job.state, ignore_errors=True)
        return result

    def _result(self, contender: Contender, count: int, seen: Seen, log: Path) -> Result:
        failure = ""
        if seen.exit_code is not None:
            said = log.read_text(errors="replace").strip().splitlines()
            why = said[-1].replace(f"{ROOT}/", "")[:200] if said else "it said nothing"
            failure = f"ended with {seen.exit_code}: {why}"
        elif len(seen.values) < count:
            failure = f"given up after {seen.seconds:.0f} s"
        answers = "it gives none"
        if contender.name != CEILING:
            try:
                answers = str(check(seen.values, self.counts, self.scores))
            except msgspec.MsgspecError as error:
                answers, failure = "not readable", failure or str(error)
        rate, cpu_us = seen.steady()
        if seen.counts and seen.at_once:
            answers += ", but all at once; rate with its start"
        return Result(
            count,
            len(seen.values),
            rate,
            cpu_us,
            seen.rss_bytes,
            seen.seconds,
            answers=answers,
            failure=failure,
        )


@dataclass
class Seen:
    """What the reader saw: values, and how many there were when."""

    values: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    cpu_times: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    rss_bytes: int = 0
    seconds: float = 0.0
    exit_code: int | None = None

    def sample(self, process: psutil.Process) -> None:
        """Take the CPU time and memory of a process and its children."""
        cpu_s, rss_bytes = 0.0, 0
        try:
            for one in [process, *process.children(recursive=True)]:
                spent = one.cpu_times()
                cpu_s += spent.user + spent.system
                rss_bytes += one.memory_info().rss
        except psutil.Error:  # it has just ended
            return
        self.cpu_times.append(time.monotonic())
        self.cpu_s.append(cpu_s)
        self.rss_bytes = max(self.rss_bytes, rss_bytes)

    def steady(self) -> tuple[float, float]:
        """Return events/s and CPU µs per event from the first tenth received to the last.

        Who answers all at once has done the work before: it is then the whole run that counts, its
        start included (see `at_once`).
        """
        if not self.counts:
            return 0.0, 0.0
        first = int(np.searchsorted(self.counts, self.counts[-1] / 10))
        at, before = self.times[first], self.counts[first]
        if self.at_once:
            at, before = self.began, 0
        events, seconds = self.counts[-1] - before, self.times[-1] - at
        began, ended = np.interp([at, self.times[-1]], self.cpu_times, self.cpu_s).tolist()
        return events / seconds, (ended - began) / events * 1e6

    @property
    def at_once(self) -> bool:
        """Whether the last nine tenths came within a tenth of the time before them."""
        first = int(np.searchsorted(self.counts, self.counts[-1] / 10))
        waited = self.times[first] - self.began
        return self.times[-1] - self.times[first] < waited / 10


def _read(job: Job, count: int, limit_s: float, process: subprocess.Popen[bytes]) -> Seen:
    """Receive predictions as a consumer of committed records does, until all are there."""
    consumer = Consumer(
        {
            "bootstrap.servers": job.brokers,
            "group.id": f"{job.sink}-reader",
            "isolation.level": "read_committed",
            "fetch.wait.max.ms": 10,
            "enable.auto.commit": False,
            **EAGER,
        }
    )
    consumer.assign([TopicPartition(job.sink, n, 0) for n in range(PARTITIONS)])
    seen, measured = Seen(), psutil.Process(process.pid)
    next_sample = seen.began
    while len(seen.values) < count:
        messages = consumer.consume(10_000, 0.05)
        now = time.monotonic()
        values = [message.value() for message in messages if message.error() is None]
        if values:
            seen.values += values
            seen.times.append(now)
            seen.counts.append(len(seen.values))
        if now >= next_sample:
            seen.sample(measured)
            next_sample = now + _SAMPLE_S
        if not values and process.poll() is not None:
            seen.exit_code = process.returncode
            break
        if now - seen.began > limit_s:
            break
    seen.sample(measured)
    seen.seconds = time.monotonic() - seen.began
    consumer.close()
    return seen


def _others_cpu_s() -> float:
    """Return the CPU time of all that is not us, the broker or a contender, since some moment."""
    busy = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    total = sum(getattr(busy, name, 0.0) for name in names)
    us = psutil.Process()
    for one in [us, *us.children(recursive=True)]:
        try:
            spent = one.cpu_times()
        except psutil.Error:  # it has just ended
            continue
        total -= spent.user + spent.system
    return total


def _stop(process: subprocess.Popen[bytes], guard: Guard) -> None:
    """Kill a contender and its children: what it would do at its end is not measured."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    guard.ended(process)


def _clean() -> dict[str, str]:
    """Return our environment without what would lead another interpreter to our packages."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "SETTINGS_FILE")
    return {name: value for name, value in os.environ.items() if name not in ours}
