"""The rules: promtool accepts them, its unit tests pass and cover all, and they keep some order."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from dataflows.metrics import LATENCY_BOUNDS_S
from tests.monitoring.rules import (
    MONITORING,
    RULES,
    UNIT_TESTS,
    alerts,
    load,
    rules_of,
    seconds,
    title,
    tokens,
)

ALERTS = {title(rule): rule for rule in alerts()}
RECORDED = {title(rule): rule for rule in rules_of(load()) if "record" in rule}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_promtool_accepts_the_rules_and_the_configuration(promtool: str) -> None:
    for command in (
        ["check", "rules", "--lint=all", "--lint-fatal", RULES],
        ["check", "config", "--lint=all", "--lint-fatal", MONITORING / "prometheus.yaml"],
    ):
        done = run(promtool, *command)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda file: file.stem)
def test_unit_tests(promtool: str, file: Path) -> None:
    done = run(promtool, "test", "rules", file)
    assert done.returncode == 0, done.stdout


def test_thresholds_are_stated_once() -> None:
    """An alert's text tells values, not what they were compared with."""
    for name, rule in ALERTS.items():
        texts = " ".join(rule["annotations"].values())
        for token in tokens(rule["expr"]):
            if token.kind == "number" and float(token.text) > 1:
                assert not re.search(rf"\b{re.escape(token.text)}\b", texts), (name, token.text)


@pytest.mark.parametrize("name", ALERTS)
def test_labels_and_annotations(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert "{{ $labels.job }}" in rule["annotations"]["summary"]


def test_a_recorded_window_is_the_one_of_its_name() -> None:
    for name, rule in RECORDED.items():
        named = re.search(r":(?:ratio_)?(?:rate|increase)(\w+)$", rule["record"])
        if named:
            windows = {token.text for token in tokens(rule["expr"]) if token.kind == "duration"}
            assert windows == {named[1]}, name


def test_windows_hold_several_scrapes() -> None:
    """A rate needs two samples; a scrape may fail."""
    scrape = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["global"]
    for rule in rules_of(load()):
        for token in tokens(rule["expr"]):
            if token.kind == "duration":
                assert seconds(token.text) >= 4 * seconds(scrape["scrape_interval"]), title(rule)


def test_objectives_are_bounds_of_the_histogram() -> None:
    bounds = {f"{bound:g}" for bound in LATENCY_BOUNDS_S}
    asked = {rule["labels"]["le"] for rule in RECORDED.values() if "le" in rule.get("labels", {})}
    assert asked and asked <= bounds


def test_every_alert_fires_and_keeps_quiet_in_some_unit_test() -> None:
    """Each severity and window: expected once, and once not, with the same series at hand."""
    fires, quiet = set(), set()
    for file in UNIT_TESTS:
        for case in yaml.safe_load(file.read_text())["tests"]:
            for look in case.get("alert_rule_test", []):
                expected = {
                    title({"alert": look["alertname"], "labels": _own(alert["exp_labels"])})
                    for alert in look.get("exp_alerts", [])
                }
                fires |= expected
                quiet |= {
                    name
                    for name, rule in ALERTS.items()
                    if rule["alert"] == look["alertname"] and name not in expected
                }
    assert fires == set(ALERTS)
    assert quiet == set(ALERTS)


def _own(labels: dict[str, str]) -> dict[str, str]:
    """Keep the labels that rules set, in their order."""
    return {name: labels[name] for name in ("severity", "window") if name in labels}
