"""The rule file, and as much of PromQL as the checks need: names, labels, numbers, durations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "k8s" / "monitoring"
RULES = MONITORING / "rules.yaml"
UNIT_TESTS = sorted((MONITORING / "tests").glob("*.yaml"))

_TOKEN = re.compile(
    r"""(?P<string>"[^"]*"|'[^']*')
    |(?P<name>[a-zA-Z_:][\w:]*)
    |(?P<duration>(?:\d+(?:ms|[smhdwy]))+)
    |(?P<number>\d+(?:\.\d+)?)
    |(?P<other>=~|!~|!=|==|>=|<=|\S)""",
    re.VERBOSE,
)
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
_UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800, "y": 31_536_000}


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass
class Query:
    """What an expression names."""

    #: Of each selector: the metric, and the label matchers as (label, operator, value).
    selectors: list[tuple[str, list[tuple[str, str, str]]]] = field(default_factory=list)
    #: Labels to group and to match by.
    grouping: set[str] = field(default_factory=set)

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.selectors}


def tokens(expr: str) -> list[Token]:
    """Split PromQL.

    >>> [(token.kind, token.text) for token in tokens('rate(a:rate5m[10m]) > 1.5')][4:]
    [('duration', '10m'), ('other', ']'), ('other', ')'), ('other', '>'), ('number', '1.5')]
    """
    return [Token(m.lastgroup or "", m[0], m.start()) for m in _TOKEN.finditer(expr)]


def parse(expr: str) -> Query:
    """Return what an expression names.

    >>> parse('sum by (job) (rate(a{x!="1"}[5m])) / on (job) group_left () b > 1')
    Query(selectors=[('a', [('x', '!=', '1')]), ('b', [])], grouping={'job'})
    """
    query, found, at = Query(), tokens(expr), 0

    def text(place: int) -> str:
        return found[place].text if place < len(found) else ""

    while at < len(found):
        token = found[at]
        at += 1
        if token.kind != "name" or token.text in _WORDS:
            continue
        if token.text in _GROUPING:
            if text(at) == "(":
                while text(at) != ")":
                    at += 1
                    if found[at].kind == "name":
                        query.grouping.add(found[at].text)
        elif text(at) != "(" and text(at) not in _GROUPING:  # else a function
            matchers = []
            if text(at) == "{":
                while text(at) != "}":
                    label, operator, value = (text(at + n) for n in (1, 2, 3))
                    if label != "}":
                        matchers.append((label, operator, value[1:-1]))
                    at += 4 if label != "}" else 1
            query.selectors.append((token.text, matchers))
    return query


def seconds(duration: str) -> float:
    """Return a duration in seconds.

    >>> seconds("1h30m")
    5400
    """
    return sum(int(n) * _UNITS_S[unit] for n, unit in re.findall(r"(\d+)(ms|[smhdwy])", duration))


def load() -> dict[str, Any]:
    """Return the rule file."""
    return dict(yaml.safe_load(RULES.read_text()))


def rules_of(file: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every rule."""
    for group in file["groups"]:
        yield from group["rules"]


def alerts() -> list[dict[str, Any]]:
    """Return the alerting rules."""
    return [rule for rule in rules_of(load()) if "alert" in rule]


def title(rule: dict[str, Any]) -> str:
    """Name a rule among all others, of which some share its name.

    >>> title({"alert": "A", "expr": "b > 1", "labels": {"severity": "page", "window": "1h"}})
    'A page 1h'
    """
    labels = " ".join(rule.get("labels", {}).values())
    return f"{rule.get('alert') or rule.get('record')} {labels}".rstrip()
