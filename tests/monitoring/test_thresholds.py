"""The unit tests of the rules notice every threshold, window and operator that is changed.

Each number of each expression, each window and offset, each `for`, each objective's bound, each
smallest and largest, each `and` and `unless` is changed in turn, and promtool has to fail. So that
this does not take ten minutes, a changed rule is tested with the
rules that it needs and those that need it, by the looks at those only.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflows.metrics import LATENCY_BOUNDS_S
from tests.monitoring.rules import UNIT_TESTS, load, parse, rules_of, seconds, title, tokens

RULES = {title(rule): rule for rule in rules_of(load())}

#: Numbers that are not changed: rule → number → reason.
NOT_A_THRESHOLD = {
    "ScoringRecoveryVolumeFilling ticket": {
        "0": "bytes predicted to be free: one more or less makes no difference"
    }
}


#: Operators and what they are changed to.
OTHER = {"max": "min", "min": "max", "and": "or", "unless": "and"}


def near(number: str) -> list[str]:
    """Return values near a number: the next whole ones of a small one, else a quarter off.

    >>> near("0"), near("0.5")
    (['1', '-1'], ['0.625', '0.4'])
    """
    value = float(number)
    if value.is_integer() and value < 10:
        return [f"{value + 1:g}", f"{value - 1:g}"]
    return [f"{value * 1.25:g}", f"{value / 1.25:g}"]


def mutants(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what is changed, and the rule with that change."""
    rule = RULES[name]
    # Of a rule whose name says its window, test_rules compares the two.
    named = re.search(r":(?:ratio_)?(?:rate|increase)\w+$", name_of(rule))
    for token in tokens(rule["expr"]):
        others: list[str] = []
        if token.text in NOT_A_THRESHOLD.get(name, {}):
            continue
        if token.kind == "number":
            others = near(token.text)
        elif token.kind == "duration" and not named:
            others = [f"{round(seconds(token.text) * factor)}s" for factor in (4, 0.25)]
        elif token.kind == "name" and token.text in OTHER:
            others = [OTHER[token.text]]
        for other in others:
            expr = rule["expr"][: token.start] + other + rule["expr"][token.end :]
            yield f"{token.text} → {other} at {token.start}", rule | {"expr": expr}
    if "for" in rule:
        for factor in (2, 0.5):
            other = f"{round(seconds(rule['for']) * factor)}s"
            yield f"for: {rule['for']} → {other}", rule | {"for": other}
    if "le" in rule.get("labels", {}):
        bounds = [f"{bound:g}" for bound in LATENCY_BOUNDS_S]
        at = bounds.index(rule["labels"]["le"])
        for other in (bounds[at - 1], bounds[at + 1]):
            yield f"le → {other}", rule | {"labels": rule["labels"] | {"le": other}}


def name_of(rule: dict[str, Any]) -> str:
    return str(rule.get("alert") or rule["record"])


def closure(names: set[str], more: dict[str, set[str]]) -> set[str]:
    """Return names, what they lead to, what those lead to, and so on."""
    while new := set().union(*(more[name] for name in names)) - names:
        names = names | new
    return names


def write_slice(name: str, directory: Path) -> list[Path]:
    """Write the unit tests' looks at a rule and at what is computed from it; return the files."""
    needs: dict[str, set[str]] = {name_of(rule): set() for rule in RULES.values()}
    for rule in RULES.values():
        needs[name_of(rule)] |= parse(rule["expr"]).names & set(needs)
    needed_by = {each: {other for other in needs if each in needs[other]} for each in needs}
    shown = closure({name_of(RULES[name])}, needed_by)
    kept = closure(shown, needs)
    write_rules(directory, [rule for rule in RULES.values() if name_of(rule) in kept])
    files = []
    for source in UNIT_TESTS:
        content = yaml.safe_load(source.read_text())
        content["rule_files"] = ["rules.yaml"]
        content.pop("group_eval_order", None)
        for case in content["tests"]:
            looks = case.get("alert_rule_test", []), case.get("promql_expr_test", [])
            case["alert_rule_test"] = [look for look in looks[0] if look["alertname"] in shown]
            case["promql_expr_test"] = [
                look for look in looks[1] if parse(look["expr"]).names <= shown
            ]
        content["tests"] = [
            case for case in content["tests"] if case["alert_rule_test"] or case["promql_expr_test"]
        ]
        if content["tests"]:
            files.append(directory / source.name)
            files[-1].write_text(yaml.safe_dump(content))
    return files


def write_rules(directory: Path, rules: list[dict[str, Any]]) -> None:
    file = {"groups": [{"name": "rules", "rules": rules}]}
    (directory / "rules.yaml").write_text(yaml.safe_dump(file, sort_keys=False))


@pytest.mark.parametrize("name", [name for name in RULES if any(mutants(name))])
def test_a_changed_threshold_fails_a_unit_test(promtool: str, name: str, tmp_path: Path) -> None:
    files = write_slice(name, tmp_path)
    rules = yaml.safe_load((tmp_path / "rules.yaml").read_text())["groups"][0]["rules"]

    def run() -> tuple[bool, str]:
        done = subprocess.run(
            [promtool, "test", "rules", *files], capture_output=True, text=True, check=False
        )
        return done.returncode == 0, done.stdout + done.stderr

    passed, said = run()
    assert passed, said  # unchanged
    survivors = []
    for what, changed in mutants(name):
        write_rules(tmp_path, [changed if title(rule) == name else rule for rule in rules])
        passed, said = run()
        if passed:
            survivors.append(what)
        else:  # and not because the changed rule cannot be read
            assert re.search(r"\bexp:", said), (what, said)
    assert not survivors


def test_what_is_not_changed_is_there() -> None:
    for name, numbers in NOT_A_THRESHOLD.items():
        assert set(numbers) <= {token.text for token in tokens(RULES[name]["expr"])}
