"""The dashboard: generated, complete, and of PromQL that Prometheus can parse."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import yaml

from k8s.monitoring import dashboard
from tests.monitoring.rules import parse
from tests.monitoring.test_names import KNOWN


def test_the_committed_file_is_the_generated_one() -> None:
    assert dashboard.main(["--check"]) == 0, "run `python -m k8s.monitoring.dashboard`"


def test_every_expression_parses(promtool: str, tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:number:{number}", "expr": dashboard.plain(expr)}
        for number, (_, expr) in enumerate(dashboard.expressions())
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(
        [promtool, "check", "rules", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_the_rows_are_those_an_operator_asks_for() -> None:
    file = json.loads(dashboard.FILE.read_text())
    rows = [panel["title"] for panel in file["panels"] if panel["type"] == "row"]
    assert rows[:7] == [
        "Objectives and burn",
        "Lag",
        "Throughput",
        "Stage latency",
        "State and recovery",
        "Model and features",
        "Kafka client",
    ]


def test_panels_are_whole() -> None:
    file = json.loads(dashboard.FILE.read_text())
    ids = [panel["id"] for panel in file["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in file["panels"]]
    assert len(set(titles)) == len(titles)
    places: set[tuple[int, int]] = set()
    for panel in file["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & places, f"{panel['title']} covers another panel"
        assert max(x for x, _ in cells) < 24, f"{panel['title']} is outside"
        places |= cells


def test_legends_name_labels_that_their_expression_keeps() -> None:
    """Else Grafana shows an empty name."""
    for panel, expr in dashboard.expressions():
        kept = re.findall(r"\bby \(([^)]*)\)", expr)
        labels = {label.strip() for by in kept for label in by.split(",")}
        if not kept:
            labels = set.union(
                {"job", "instance"}, *(KNOWN[name] for name in parse(dashboard.plain(expr)).names)
            )
        legend = panel.rpartition(": ")[2]
        assert set(re.findall(r"{{(\w+)}}", legend)) <= labels, panel


def test_variables_choose_data_source_and_instance() -> None:
    file = json.loads(dashboard.FILE.read_text())
    variables = {variable["name"]: variable for variable in file["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["instance"]["allValue"] == ".*"
    text = dashboard.FILE.read_text()
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"}
    assert used == set(variables)
    for panel in file["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}", panel["title"]
