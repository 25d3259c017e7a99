"""What alerts, unit tests and dashboard name is what a process exports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from dataflows.metrics import LATENCY_BOUNDS_S, METRICS, OUTCOMES, SCORE_BOUNDS
from dataflows.settings import Settings
from dataflows.steps.encode import SCORE_MODES
from k8s.monitoring import dashboard
from model.package import DECISIONS
from tests.monitoring.rules import UNIT_TESTS, load, parse, rules_of, title

#: Labels that Prometheus adds to what it scrapes.
TARGET = {"namespace", "job", "instance"}

#: Accepted values of labels that a rule may ask for; the others are not checked.
VALUES = {
    "outcome": set(OUTCOMES),
    "decision": set(DECISIONS),
    "topic": {
        field.default for name, field in Settings.model_fields.items() if name.endswith("_topic")
    },
    "score_mode": set(SCORE_MODES),
    "result": {"fresh", "stale", "missing", "ok", "failed", "late", "refused"}
    | {"committed", "aborted"},
    "job": {"fraud-scoring"},
}


def samples_of(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Return the sample names of a registry → their labels, whether or not there are any yet."""
    found: dict[str, set[str]] = {}
    for collector in registry._collector_to_names:
        labels = set(getattr(collector, "_labelnames", ()))
        for family in collector.collect():
            if family.type == "counter":
                found[f"{family.name}_total"] = labels
            elif family.type == "histogram":
                found[f"{family.name}_bucket"] = labels | {"le"}
                found[f"{family.name}_count"] = found[f"{family.name}_sum"] = labels
            else:
                found[family.name] = labels
    return found


def recorded() -> dict[str, set[str]]:
    """Return what rules record → labels it may have."""
    found: dict[str, set[str]] = {}
    for rule in rules_of(load()):
        if "record" in rule:
            labels = parse(rule["expr"]).grouping | set(rule.get("labels", {}))
            found.setdefault(rule["record"], set()).update(labels)
    return found


EXPORTED = samples_of(METRICS.registry)
KNOWN = EXPORTED | recorded() | {"up": set(), "ALERTS": {"alertname", "alertstate", "severity"}}


def check(where: str, expr: str) -> None:
    """Assert that all metrics, labels and label values of an expression exist."""
    query = parse(expr)
    every: set[str] = set(TARGET)
    for name, matchers in query.selectors:
        assert name in KNOWN, f"{where}: no process exports {name}"
        every |= KNOWN[name]
        for label, operator, value in matchers:
            assert label in KNOWN[name] | TARGET, f"{where}: {name} has no label {label}"
            if label == "le":
                bounds = SCORE_BOUNDS if name.startswith("scoring_score") else LATENCY_BOUNDS_S
                known = {f"{bound:g}" for bound in bounds} | {""}
                assert set(value.split("|")) <= known, f"{where}: no bound is {value}"
            elif label in VALUES:
                asked = set(value.split("|")) if "~" in operator else {value}
                unknown = asked - VALUES[label] - {"", ".*"}
                assert not unknown, f"{where}: {label} is never {unknown}"
    assert query.grouping <= every, f"{where}: nothing has the labels {query.grouping - every}"


@pytest.mark.parametrize("rule", list(rules_of(load())), ids=title)
def test_rules_name_what_is_exported(rule: dict[str, Any]) -> None:
    check(title(rule), rule["expr"])
    for text in rule.get("annotations", {}).values():
        for label in re.findall(r"\$labels\.(\w+)", text):
            names = parse(rule["expr"]).selectors
            has = TARGET.union(rule["labels"], *(KNOWN[name] for name, _ in names))
            assert label in has, f"{title(rule)}: there is no label {label}"


def unit_series() -> Iterator[tuple[str, str]]:
    for file in UNIT_TESTS:
        for case in yaml.safe_load(file.read_text())["tests"]:
            for series in case["input_series"]:
                yield case["name"], series["series"]


def test_unit_tests_have_the_series_of_a_real_process() -> None:
    """All labels, no others: a rule that groups by a label that is not there would pass unseen."""
    names = set()
    for where, series in unit_series():
        if series.startswith("scoring:"):  # recorded: the rules' own
            continue
        ((name, matchers),) = parse(series).selectors
        names.add(name)
        labels = {label for label, _, _ in matchers}
        assert labels - {"namespace"} == KNOWN[name] | {"job", "instance"}, (where, series)
    used = {name for rule in rules_of(load()) for name in parse(rule["expr"]).names}
    assert {name for name in used if name in EXPORTED} <= names | {
        "scoring_end_to_end_latency_seconds_bucket"
    }


@pytest.mark.parametrize(("panel", "expr"), list(dashboard.expressions()))
def test_the_dashboard_names_what_is_exported(panel: str, expr: str) -> None:
    check(panel, dashboard.plain(expr))


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    """What nobody looks at need not be exported; process_* is the client library's."""
    seen: set[str] = set()
    for rule in rules_of(load()):
        seen |= parse(rule["expr"]).names
    for _, expr in dashboard.expressions():
        seen |= parse(dashboard.plain(expr)).names
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in seen}
    exported = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in EXPORTED
        if name.startswith("scoring_")
    }
    assert exported <= families
