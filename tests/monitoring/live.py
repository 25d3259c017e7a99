"""A real Prometheus with the rules made faster, and what it says of them."""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from tests.kafka.client import await_that
from tests.monitoring.rules import rules_of, seconds, tokens

#: How often processes are scraped and rules evaluated.
SCRAPE_S = 2
#: Recorded or alerting rule → its number → the one to take instead.
Numbers = Mapping[str, Mapping[str, str]]


def faster(
    file: Mapping[str, Any],
    factor: float,
    *,
    least_s: float = 5 * SCRAPE_S,
    topics: Mapping[str, str] | None = None,
    numbers: Numbers | None = None,
) -> dict[str, Any]:
    """Return the rules with all durations divided by `factor`, for a test that cannot wait.

    Windows and offsets become `least_s` at least, which must hold some scrapes; `for` a second.
    Groups lose their interval. `topics` renames topics in matchers; `numbers` replaces thresholds
    that are seconds themselves. Nothing else changes.
    """
    fast = copy.deepcopy(dict(file))
    unused = {(name, old) for name, changed in (numbers or {}).items() for old in changed}
    for group in fast["groups"]:
        group.pop("interval", None)
    for rule in rules_of(fast):
        name = rule.get("alert") or rule["record"]
        changes = (numbers or {}).get(name, {})
        expr, at = "", 0
        for token in tokens(rule["expr"]):
            new = token.text
            if token.kind == "duration":
                new = f"{max(least_s, seconds(token.text) / factor) * 1000:.0f}ms"
            elif token.kind == "number" and token.text in changes:
                new = changes[token.text]
                unused.discard((name, token.text))
            elif token.kind == "string" and token.text[1:-1] in (topics or {}):
                new = f'"{(topics or {})[token.text[1:-1]]}"'
            expr += rule["expr"][at : token.start] + new
            at = token.end
        rule["expr"] = expr + rule["expr"][at:]
        if "for" in rule:
            rule["for"] = f"{max(1.0, seconds(rule['for']) / factor) * 1000:.0f}ms"
    assert not unused, f"no rule has {unused}"
    return fast


class Prometheus:
    """Run Prometheus on rules and targets for as long as the ``with`` block lasts.

    Args:
        binary: its path.
        directory: an empty one, for configuration, data and log.
        rules: a rule file's content.
        targets: namespace → port on this machine of a process to scrape.
    """

    def __init__(
        self, binary: str, directory: Path, rules: Mapping[str, Any], targets: Mapping[str, int]
    ) -> None:
        self._binary, self._directory = binary, directory
        directory.mkdir()
        (directory / "rules.yaml").write_text(yaml.safe_dump(dict(rules)))
        scraped = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": namespace}}
            for namespace, port in targets.items()
        ]
        config = {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "fraud-scoring", "static_configs": scraped}],
        }
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> Self:
        self._url = f"http://127.0.0.1:{free_port()}"
        self._log = (self._directory / "log").open("wb")
        self._process = subprocess.Popen(
            [
                self._binary,
                f"--config.file={self._directory}/prometheus.yaml",
                f"--storage.tsdb.path={self._directory}/data",
                f"--web.listen-address={self._url.removeprefix('http://')}",
                "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            await_that(self._ready, "Prometheus is ready")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def firing(self) -> dict[str, set[str]]:
        """Return namespace → names of the alerts that fire now; "" is the one of no namespace."""
        found: dict[str, set[str]] = {}
        for alert in self._get("/api/v1/alerts")["alerts"]:
            if alert["state"] == "firing":
                labels = alert["labels"]
                found.setdefault(labels.get("namespace", ""), set()).add(labels["alertname"])
        return found

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Return an expression's samples: ``[{"metric": {…}, "value": [time, "1"]}]``."""
        query = urllib.parse.urlencode({"query": expr})
        return list(self._get(f"/api/v1/query?{query}")["result"])

    def problems(self) -> list[str]:
        """Return what went wrong in the evaluation of rules, such as a match that is ambiguous."""
        groups: Iterable[dict[str, Any]] = self._get("/api/v1/rules")["groups"]
        return [
            f"{rule['name']}: {rule['lastError']}"
            for group in groups
            for rule in group["rules"]
            if rule.get("lastError")
        ]

    def _ready(self) -> bool:
        said = (self._directory / "log").read_text()
        assert self._process.poll() is None, said
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url + path, timeout=30) as answer:
            return json.load(answer)["data"]

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def free_port() -> int:
    """Return a port that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
