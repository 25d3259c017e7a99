"""A disaster recovery drill: `make drill`.

Apache Kafka is started, and the flow under exactly_once, as a user starts it. Its state is backed
up, the flow is killed while it works, and its recovery directory deleted; once it is restored from
the backup, and once there is no backup and the windows are rebuilt from the topics. In the end
every transaction has one prediction, and the features are recomputed from the topics.

Each step is printed as the command that an operator would type. docs/operations.md says what it
means. 3 minutes at most; exit code 0 if all is as it should be.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.integration.flow import (
    ROOT,
    Flow,
    FlowEnv,
    environment,
    model_package,
    profiles_repo,
    write_history,
)
from tests.integration.test_cluster import progress
from tests.integration.test_rebuild import history, produce, transaction_ids
from tests.kafka.client import TestBroker, await_that
from tests.kafka.cluster import KafkaCluster, KafkaError

RUN = "python -m bytewax.run dataflows.fraud -r recovery -s 1 -b 0"


class Drill:
    """The steps, each told with what it took."""

    def __init__(self, env: FlowEnv, console: Console, seed: int) -> None:
        self._env, self._console = env, console
        self._events = history(random.Random(seed))
        self._sent = 0
        env.variables |= {"DELIVERY": "exactly_once", "AUDIT_SHARE": "1"}
        self._store = env.directory / "recovery"
        self._backup = env.directory / "backup"

    def run(self) -> bool:
        """Run all of it; tell whether everything is as it should be."""
        self.say("1", "The flow works, is drained, and its state is copied while it is stopped.")
        self.send(0.3)
        flow = self.start()
        self.all_read()
        self.command("kill -TERM $PID", "it drains: the epoch is ended, all of it is stored")
        assert flow.stop() == 0, flow.log
        self.command("cp -a recovery backup")
        shutil.copytree(self._store, self._backup)

        self.say("2", "It goes on; in mid-flow its process and its disk are lost.")
        self.lose(0.6)

        self.say("3", "The backup is restored. It knows nothing of what came after it.")
        self.command("cp -a backup recovery")
        shutil.copytree(self._backup, self._store)
        flow = self.start()
        self.all_read()
        self.note(told(flow, "published since the last snapshot"))
        assert flow.stop() == 0, flow.log
        good = self.check()

        self.say("4", "Again, and this time there is no backup.")
        shutil.rmtree(self._backup)
        self.lose(1.0)

        self.say("5", "The windows are rebuilt from the topics.")
        flow = self.start(START_AT="rebuild")
        self.all_read()
        self.note(told(flow, "rebuilding the windows from"))
        self.note(told(flow, "the windows are rebuilt"))
        assert flow.stop() == 0, flow.log
        account = flow.account()[self._env.topics["transactions"]]
        self.note(f"{account['rebuilt']} read again and not answered, {account['scored']} scored")
        return self.check() and good

    def start(self, **more: str) -> Flow:
        self.command(" ".join([*(f"{name}={value}" for name, value in more.items()), RUN]))
        began = time.monotonic()
        flow = Flow({**self._env.variables, **more}, self._store, self._env.directory / "log")
        self._env.flows.append(flow)
        flow.start()
        self.note(f"reads after {time.monotonic() - began:.1f} s")
        return flow

    def send(self, share: float) -> None:
        """Send events until this share of all has been sent.

        While the flow is down: months in a second would reach it in no order of time.
        """
        end = round(share * len(self._events))
        produce(self._env, self._events[self._sent : end])
        self.note(f"{end - self._sent} events are sent")
        self._sent = end

    def all_read(self) -> None:
        began = time.monotonic()
        await_that(lambda: progress(self._env) == self._sent, "all events are read", 60)
        self.note(f"all events are read and stored, {time.monotonic() - began:.1f} s later")

    def lose(self, share: float) -> None:
        """Lose process and store with a part of the events worked off."""
        before = progress(self._env)
        self.send(share)
        flow = self.start(RATE_LIMIT="100", RATE_BURST="100")
        half = before + (self._sent - before) // 2
        await_that(lambda: progress(self._env) > half, "half of them are read", 60)
        self.command("kill -9 $PID; rm -r recovery")
        flow.kill()
        shutil.rmtree(self._store)
        answered = self._env.count("predictions")
        self.note(f"{answered} transactions are answered, of {len(self.wanted())} sent")

    def wanted(self) -> set[str]:
        return transaction_ids(self._events[: self._sent])

    def check(self) -> bool:
        """Count predictions by transaction; have the features recomputed from the topics."""
        self.command("python -m dataflows.kafka.read --text predictions | jq .value.transaction_id")
        found = Counter(
            dict(message.headers() or ())["event_id"].decode()
            for message in self._env.read("predictions")
        )
        twice = sum(n > 1 for n in found.values())
        missing = len(self.wanted() - found.keys())
        counted = f"{len(found)} answered, {missing} not, {twice} twice"
        self.verdict(not twice and not missing, counted)

        topics = self._env.topics
        sources = [f"--{name.replace('_', '-')}=kafka:{topics[name]}" for name in
                   ("audit", "transactions", "fraud_reports")]  # fmt: skip
        self.command("python -m features.parity " + " ".join(sources))
        servers = {"KAFKA_BOOTSTRAP_SERVERS": self._env.variables["KAFKA_BOOTSTRAP_SERVERS"]}
        done = subprocess.run(
            [sys.executable, "-m", "features.parity", *sources],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, **servers},
        )  # fmt: skip
        exact = done.returncode == 0
        self.verdict(exact, "every feature as recomputed" if exact else done.stdout + done.stderr)
        return not twice and not missing and exact

    def say(self, number: str, sentence: str) -> None:
        self._console.print(f"\n[bold]{number}  {sentence}[/]")

    def command(self, line: str, why: str = "") -> None:
        comment = f"   [dim]# {why}[/]" if why else ""
        self._console.print(f"   [cyan]$ {line}[/]{comment}", soft_wrap=True)

    def note(self, what: str) -> None:
        self._console.print(f"     {what}", highlight=False, soft_wrap=True)

    def verdict(self, good: bool, what: str) -> None:
        mark = "[green]ok[/]" if good else "[red]WRONG[/]"
        self._console.print(f"     {mark}  {what}", highlight=False, soft_wrap=True)


def told(flow: Flow, words: str) -> str:
    """Return what the flow's log says with these words."""
    lines = [str(line["event"]) for line in flow.log_lines() if words in str(line["event"])]
    assert lines, flow.log
    return "log: " + lines[0]


def drill(broker: TestBroker, directory: Path, console: Console, seed: int = 20180808) -> bool:
    """Run the drill on a broker, with topics of its own; tell whether it went well."""
    (directory / "history").mkdir(parents=True)
    write_history(directory / "history")
    repo = profiles_repo(directory / "history")
    with environment(broker, model_package(), repo, directory) as env:
        return Drill(env, console, seed).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser("python -m tests.chaos.drill", description=__doc__)
    parser.parse_args(arguments)
    console = Console()
    try:
        with tempfile.TemporaryDirectory(prefix="drill-") as directory, KafkaCluster() as kafka:
            console.print(f"Apache Kafka runs at {kafka.bootstrap_servers}")
            broker = TestBroker(kafka.bootstrap_servers)
            good = drill(broker, Path(directory), console)
            broker.close()
    except KafkaError as error:
        print(f"cannot run Apache Kafka: {error}", file=sys.stderr)
        return 1
    console.print("\nThe drill went well." if good else "\n[red]The drill found what is wrong.[/]")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
