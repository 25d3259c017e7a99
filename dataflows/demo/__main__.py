"""Show the whole application at work on this machine; see ``make demo``.

Prepares what is missing, starts an embedded broker and the flow, replays transactions and fraud
reports at a rate, shows what happens, drains, and prints one JSON line: what was read, what
became of it, how fast, and how precise the scores were, online and offline.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from dataflows.demo import ROOT, judge
from dataflows.demo.observe import PREDICTIONS, Predictions, Recent, Sample, Truth, scrape
from dataflows.demo.prepare import DemoError, Prepared, failure, plan, prepare
from dataflows.demo.processes import Guard, Process
from dataflows.demo.replay import FRAUD_REPORTS, TRANSACTIONS, Sent
from dataflows.demo.screen import Screen, View

TOPICS = {TRANSACTIONS: 4, FRAUD_REPORTS: 2, PREDICTIONS: 4, "dead_letters": 1, "audit": 1}
START_WITHIN_S = 120.0
CATCH_UP_WITHIN_S = 60.0
DRAIN_WITHIN_S = 90.0
TICK_S = 0.25
SECOND_INTERRUPT_AFTER_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0, 1 after a failure, 130 if interrupted before it could drain."""
    options = _options(arguments)
    console = Console(stderr=True, highlight=False)
    home: Path = options.dir.resolve()
    home.mkdir(parents=True, exist_ok=True)
    stopping = _Stopping()
    try:
        with _only_one(home), _nothing_outside(home), Guard() as guard:
            prepared = plan(home, options.start, options.handbook)
            prepare(prepared, home, guard, console)
            demo = Demo(prepared, home, guard, console, options)
            try:
                summary = demo.run(stopping)
            finally:
                demo.close()
    except KeyboardInterrupt:
        print("demo: interrupted; everything it started has been stopped", file=sys.stderr)
        return 130
    except (DemoError, OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary), flush=True)
    if unbalanced := judge.imbalance(summary):
        print(f"demo: the account does not balance: {unbalanced}", file=sys.stderr)
        return 1
    return 0


class Demo:
    """One run: broker, flow, replay, screen."""

    def __init__(
        self,
        prepared: Prepared,
        home: Path,
        guard: Guard,
        console: Console,
        options: argparse.Namespace,
    ) -> None:
        self.prepared, self.home, self.console, self.options = prepared, home, console, options
        self._guard = guard
        self._logs = {name: home / f"{name}.log" for name in ("broker", "flow", "replay")}
        for log in self._logs.values():
            log.unlink(missing_ok=True)
        self._recovery = home / "recovery"
        self._running: dict[str, Process] = {}
        self._sent = Sent()
        self._sample: Sample | None = None
        self._recent = Recent()
        self._predictions = Predictions()

    def run(self, stopping: _Stopping) -> dict[str, Any]:
        """Return the summary; raise DemoError, showing the end of a log, if a process fails."""
        began = time.monotonic()
        with self.console.status("starting the broker and the flow") as status:
            broker = self._start_broker()
            self._start_flow(broker)
            self._start_replay(broker)
            config = {
                "bootstrap.servers": broker["bootstrap_servers"],
                **broker["consumer_config"],
            }
            truth = judge.truth(self.prepared.handbook, self.prepared.start)
            self._predictions.start(config, TOPICS[PREDICTIONS], truth)

            def first_is_scored() -> bool:
                status.update(
                    f"starting the broker and the flow ({time.monotonic() - began:.0f} s)"
                )
                self._look()
                return self._predictions.records > 0

            if not self._await(first_is_scored, START_WITHIN_S):
                raise failure(
                    f"the flow scored nothing within {START_WITHIN_S:g} s", self._logs["flow"]
                )
        self.console.print(
            f"[dim]The first transaction was scored {time.monotonic() - _BEGAN:.1f} s after the "
            "start of the demo.[/]\n"
            f"Operator page, as long as it runs: http://127.0.0.1:{self._page_port}"
        )
        version = json.loads((self.prepared.model / "manifest.json").read_text())["version"]
        with Screen(self.console) as screen:
            view = View(
                model_version=version, rate=self.options.rate, duration_s=self.options.duration
            )

            def look(phase: str) -> None:
                self._look()
                screen.show(self._fill(view, phase))

            with stopping.by_request():
                self._recent = Recent()  # what came before was the start
                self._tell_replay("go")
                while not self._sent.done and not stopping.requested:
                    self._check()
                    look("scoring")
                    time.sleep(TICK_S)
                self._stop_replay(look)
                caught_up = self._await(self._all_answered, CATCH_UP_WITHIN_S, look, "catching up")
                code = self._drain(look)
                look("drained")
        return self._summary(version, code, caught_up, truth)

    def close(self) -> None:
        """Stop reading the predictions; processes that still run are the guard's to end."""
        self._predictions.close()

    # --- processes --------------------------------------------------------------------------------

    def _start_broker(self) -> dict[str, Any]:
        """Start the broker; the flow makes a recovery store anew."""
        topics = [word for topic, n in TOPICS.items() for word in ("--topic", f"{topic}:{n}")]
        broker = self._running["broker"] = self._guard.start(
            "dataflows.kafka.dev_broker",
            topics,
            log=self._logs["broker"],
            piped=True,
            stdout_to_log=False,
        )
        shutil.rmtree(self._recovery, ignore_errors=True)
        assert broker.stdout is not None
        line = broker.stdout.readline()
        if not line:
            broker.wait()
            raise failure("the broker did not start", self._logs["broker"])
        started: dict[str, Any] = json.loads(line)
        return started

    def _start_flow(self, broker: dict[str, Any]) -> None:
        no_settings = self.home / "tmp" / "no-settings"  # whatever file the caller's flows use
        no_settings.touch()
        self._port, self._page_port = _free_port(), _free_port()
        self._running["flow"] = self._guard.start(
            "bytewax.run",
            ["dataflows.fraud", "-r", str(self._recovery), "-s", "2", "-b", "0"],
            log=self._logs["flow"],
            env={
                "KAFKA_BOOTSTRAP_SERVERS": broker["bootstrap_servers"],
                "KAFKA_CONSUMER_OPTIONS": json.dumps(broker["consumer_config"]),
                "KAFKA_PRODUCER_OPTIONS": "{}",
                "TRANSACTIONS_TOPIC": TRANSACTIONS,
                "FRAUD_REPORTS_TOPIC": FRAUD_REPORTS,
                "PREDICTIONS_TOPIC": PREDICTIONS,
                "DEAD_LETTERS_TOPIC": "dead_letters",
                "AUDIT_TOPIC": "audit",
                "START_AT": "earliest",
                "STATE_DIR": str(self.prepared.state),
                "MODEL_DIR": str(self.prepared.model),
                "FEAST_REPO": str(self.prepared.feast),
                "METRICS_HOST": "127.0.0.1",
                "METRICS_PORT": str(self._port),
                "PAGE_HOST": "127.0.0.1",
                "PAGE_PORT": str(self._page_port),
                "PAGE_TOKEN": "",
                "LOG_FORMAT": "json",
                "LOG_LEVEL": "info",
                "SETTINGS_FILE": str(no_settings),
            },
        )

    def _start_replay(self, broker: dict[str, Any]) -> None:
        replay = self._running["replay"] = self._guard.start(
            "dataflows.demo.replay",
            [
                *("--bootstrap-servers", broker["bootstrap_servers"]),
                *("--handbook", str(self.prepared.handbook)),
                *("--start", str(self.prepared.start)),
                *("--rate", str(self.options.rate)),
                *("--duration", str(self.options.duration)),
                *("--bad-events", str(self.options.bad_events)),
            ],
            log=self._logs["replay"],
            piped=True,
            stdout_to_log=False,
        )

        def listen() -> None:
            assert replay.stdout is not None
            for line in replay.stdout:
                self._sent = msgspec.json.decode(line, type=Sent)

        self._listening = threading.Thread(target=listen, daemon=True)
        self._listening.start()

    def _tell_replay(self, word: str) -> None:
        pipe = self._running["replay"].stdin
        assert pipe is not None
        pipe.write(f"{word}\n".encode())
        pipe.flush()

    def _stop_replay(self, look: Callable[[str], None]) -> None:
        replay = self._running["replay"]
        assert replay.stdin is not None
        replay.stdin.close()

        def ended() -> bool:
            return self._guard.ended(replay)

        if not self._await(ended, 40, look, "catching up"):
            raise failure("the replay did not end", self._logs["replay"])
        self._listening.join(5)
        if replay.returncode:
            raise failure("the replay failed", self._logs["replay"])
        del self._running["replay"]

    def _drain(self, look: Callable[[str], None]) -> int:
        """Stop the flow as an operator would; return its exit code."""
        flow = self._running.pop("flow")
        flow.send_signal(signal.SIGTERM)
        if not self._await(lambda: self._guard.ended(flow), DRAIN_WITHIN_S, look, "draining"):
            raise failure(f"the flow did not drain within {DRAIN_WITHIN_S:g} s", self._logs["flow"])
        if flow.returncode:
            raise failure(
                f"the flow ended with {flow.returncode} after SIGTERM", self._logs["flow"]
            )
        return flow.returncode

    def _check(self) -> None:
        """Raise DemoError if a process has ended that should be running."""
        for name, process in self._running.items():
            ended = self._guard.ended(process)
            if ended and (name != "replay" or process.returncode):
                raise failure(
                    f"the {name} ended by itself with {process.returncode}", self._logs[name]
                )
        if self._predictions.failed:
            raise DemoError(self._predictions.failed)

    def _await(
        self,
        condition: Callable[[], bool],
        within_s: float,
        look: Callable[[str], None] = lambda _: None,
        phase: str = "",
    ) -> bool:
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            self._check()
            look(phase)
            time.sleep(TICK_S / 2)
        return True

    # --- what is seen -----------------------------------------------------------------------------

    def _look(self) -> None:
        if "flow" in self._running and (sample := scrape(self._port)):
            self._sample = sample
            self._recent.add(sample)

    def _all_answered(self) -> bool:
        """Whether every event sent has been read, and every transaction read has its outcome."""
        sample = self._sample
        if sample is None:
            return False
        outcomes = sum(sample.count(TRANSACTIONS, end) for end in judge.ENDS)
        return (
            outcomes == sample.count(TRANSACTIONS, "read") == self._sent.transactions
            and sample.count(FRAUD_REPORTS, "read") == self._sent.fraud_reports
            and self._predictions.records >= sample.count(TRANSACTIONS, "scored")
        )

    def _fill(self, view: View, phase: str) -> View:
        sample, recent = self._sample, self._recent
        view = View(
            phase=phase,
            model_version=view.model_version,
            rate=view.rate,
            duration_s=view.duration_s,
            replayed_s=self._sent.replayed_s,
            stream_time=self._sent.stream_time,
            flagged=list(self._predictions.flagged),
            decisions=dict(self._predictions.decisions),
        )
        if sample is not None:
            view.in_per_s = recent.rate("read", TRANSACTIONS, FRAUD_REPORTS)
            view.out_per_s = recent.rate("scored", TRANSACTIONS)
            view.latency_ms = recent.latency_ms(50, 95, 99)
            view.lag = sample.lag
            view.account = {end: sample.count(TRANSACTIONS, end) for end in ("read", *judge.ENDS)}
            view.reports_applied = sample.count(FRAUD_REPORTS, "applied")
        return view

    def _summary(self, version: str, code: int, caught_up: bool, truth: Truth) -> dict[str, Any]:
        stopped = self._stopped_line()
        account = stopped["account"]
        transactions = account.get(TRANSACTIONS, {})
        reports = account.get(FRAUD_REPORTS, {})
        self._await(
            lambda: self._predictions.records >= transactions.get("scored", 0), 10
        )  # the broker still runs
        self._predictions.close()
        if self._predictions.failed:
            raise DemoError(self._predictions.failed)
        with self.console.status("scoring the same transactions offline"):
            compared = judge.compare(
                self._predictions.scores,
                judge.score_offline(
                    self.prepared.handbook,
                    self.prepared.state,
                    self.prepared.model,
                    self.prepared.start,
                    self._sent.stream_time,
                ),
                truth,
            )
        if not caught_up:
            self.console.print(
                f"[yellow]The flow had not caught up {CATCH_UP_WITHIN_S:g} s after the replay; "
                "what it had not read is not in the account.[/]"
            )
        if compared["scores_different"]:
            self.console.print(
                f"[yellow]{compared['scores_different']:,} scores differ from the offline ones: "
                "their fraud reports or transactions arrived in another order.[/]"
            )
        self._running.pop("broker").terminate()
        return {
            **{name: transactions.get(name, 0) for name in ("read", *judge.ENDS)},
            "sent": self._sent.transactions,
            "fraud_reports": {
                name: reports.get(name, 0) for name in ("read", "applied", "dead_lettered")
            },
            "latency_ms": stopped["latency_ms"],
            **compared,
            "rate": self.options.rate,
            "duration_s": round(self._sent.replayed_s, 1),
            "model_version": version,
            "drained": code == 0,
        }

    def _stopped_line(self) -> dict[str, Any]:
        log = self._logs["flow"]
        for line in reversed(log.read_text(errors="replace").splitlines()):
            if '"stopped"' in line:
                found: dict[str, Any] = json.loads(line)
                return found
        raise failure("the flow ended without its account", log)


class _Stopping:
    """SIGINT and SIGTERM: at once while preparing, by a request while scoring.

    A second one a moment later stops at once in any case. (The moment: a signal to a process and
    to its group, as from `make`, arrives twice.)
    """

    def __init__(self) -> None:
        self.requested = False
        self._polite = False
        self._first = 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @contextmanager
    def by_request(self) -> Iterator[None]:
        self._polite = True
        yield
        self._polite = False

    def _on_signal(self, *_: object) -> None:
        now = time.monotonic()
        if not self._polite:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first = True, now
        elif now - self._first > SECOND_INTERRUPT_AFTER_S:
            raise KeyboardInterrupt


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    with (home / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise DemoError(
                f"another demo is running here (process {lock.read().strip() or 'unknown'}, "
                f"{home}/lock); wait for its end or stop it with Ctrl-C"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def _nothing_outside(home: Path) -> Iterator[None]:
    """Let this process, and all it starts, keep temporary files and caches under `home`."""
    temporary = home / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    # ONNX Runtime and Feast are among those that would write to the user's own.
    os.environ.update(TMPDIR=str(temporary), XDG_CACHE_HOME=str(temporary), FEAST_USAGE="False")
    os.environ["PYTHONUNBUFFERED"] = "1"
    yield


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m dataflows.demo", description=__doc__)

    def positive(text: str) -> float:
        value = float(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    def share(text: str) -> float:
        value = float(text)
        if not 0 <= value <= 1:
            raise ValueError
        return value

    positive.__name__, share.__name__ = "positive number", "share (0 to 1)"
    parser.add_argument(
        "--rate", type=positive, metavar="N", default=os.environ.get("RATE") or "500",
        help="events/s; default: environment variable RATE, or 500",
    )  # fmt: skip
    parser.add_argument(
        "--duration", type=positive, metavar="S", default=os.environ.get("DURATION") or "60",
        help="seconds of replay; default: environment variable DURATION, or 60",
    )  # fmt: skip
    parser.add_argument(
        "--bad-events", type=share, metavar="SHARE", default=0.002,
        help="spoiled copies sent beside the transactions (%(default)s of them)",
    )  # fmt: skip
    parser.add_argument(
        "--start", metavar="DAY", default="2018-08-08",
        help="midnight (UTC) at which the history ends and the stream begins (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", default=os.environ.get("DEMO_DIR") or f"{ROOT}/.demo",
        help="where everything is kept; default: environment variable DEMO_DIR, or .demo",
    )  # fmt: skip
    parser.add_argument(
        "--handbook", type=Path, metavar="DIR", help="data of model.handbook, instead of generating"
    )
    return parser.parse_args(arguments)


_BEGAN = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
