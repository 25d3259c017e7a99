"""Each alert has its paragraph, and what the paragraphs name exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import msgspec
import pytest
from confluent_kafka import Message

from dataflows.kafka.read import readable
from dataflows.settings import Settings
from dataflows.steps.encode import Prediction
from tests.monitoring.rules import ROOT, alerts
from tests.monitoring.test_names import KNOWN

RUNBOOKS = ROOT / "docs" / "runbooks.md"
TEXT = RUNBOOKS.read_text()
#: Heading → its text.
PARAGRAPHS = dict(re.findall(r"^### (\w+)\n\n(.*?)\n*(?=\n##|\Z)", TEXT, re.M | re.S))
CODE = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", TEXT)]
COMMANDS = sorted({code.split(" | ")[0] for code in CODE if code.startswith("python -m ")})
#: What a command that reads a topic may be given: the default names, or any.
TOPICS = {
    field.default for name, field in Settings.model_fields.items() if name.endswith("_topic")
} | {"TOPIC"}

#: One that was shed.
PREDICTION = Prediction("T1", "C1", "M1", 0, None, None, "v", "x", 5, "shed", shed="skipped")


def test_each_alert_has_a_paragraph_and_each_paragraph_an_alert() -> None:
    assert set(PARAGRAPHS) == {rule["alert"] for rule in alerts()}
    for rule in alerts():
        file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert ROOT / file == RUNBOOKS
        assert anchor == rule["alert"].lower()  # what a heading's anchor is


@pytest.mark.parametrize("name", PARAGRAPHS)
def test_a_paragraph_says_who_is_called_and_what_to_do(name: str) -> None:
    text = PARAGRAPHS[name]
    severities = {rule["labels"]["severity"] for rule in alerts() if rule["alert"] == name}
    assert set(re.findall(r"\*\*(page|ticket)\b", text)) == severities
    for part in ("*Look", "*Do*", "*Worse*"):
        assert part in text, part


def test_links_lead_somewhere() -> None:
    anchors = {name.lower() for name in PARAGRAPHS}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        file, _, anchor = target.partition("#")
        assert (RUNBOOKS.parent / file).exists() if file else anchor in anchors, target


def test_metrics_exist() -> None:
    named = {code for code in CODE if re.fullmatch(r"(scoring|process)_\w+", code)}
    assert named
    assert named <= set(KNOWN) | {re.sub(r"_(bucket|sum|count)$", "", name) for name in KNOWN}


def test_settings_exist() -> None:
    named = {name for code in CODE for name in re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", code)}
    assert "MESSAGE_TIMEOUT_S" in named
    assert named <= {name.upper() for name in Settings.model_fields}


@cache
def _help(module: str, command: str) -> str:
    arguments = [command] if command else []
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, "--help"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"python -m {module} {command}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str) -> None:
    """The module, its subcommand and its options, by its own help."""
    module, *rest = command.removeprefix("python -m ").split()
    assert Path(ROOT, *module.split(".")).with_suffix(".py").exists(), module
    listed = re.search(r"{([\w,-]+)}", _help(module, ""))
    commands = listed[1].split(",") if listed else []
    command = rest[0] if rest and rest[0] in commands else ""
    assert command or not rest or rest[0].startswith("-") or not commands, rest
    for option in (word for word in rest if word.startswith("--")):
        assert re.search(rf"{option}\b", _help(module, command)), (module, command, option)
    if module == "dataflows.kafka.read":
        topics = [word for word in rest if not word.startswith("--")]
        assert len(topics) == 1, topics
        assert set(topics) <= TOPICS, f"no topic is called {topics[0]}"


JQ = {code.split(" | jq ", 1)[1] for code in CODE if " | jq " in code}


@pytest.mark.parametrize("arguments", sorted(JQ))
def test_jq_finds_what_a_record_has(arguments: str) -> None:
    """What is asked for is in the lines that the reader writes, here of a prediction."""
    jq = shutil.which("jq")
    if jq is None:
        pytest.skip("needs jq (Debian: apt install jq)")
    value = msgspec.json.encode(PREDICTION)
    record = Message(key=b"C1", value=value, headers=[("origin", b"transactions/0/1")])
    line = msgspec.json.encode({"append_time": 5, **readable(record)})
    done = subprocess.run(
        [jq, *shlex.split(arguments)], input=line, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() not in (b"", b"null")


def test_the_operations_guide_lists_the_alerts() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    listed = re.findall(r"^\| \[(\w+)\]\(runbooks\.md#(\w+)\)", guide, re.M)
    assert sorted(name for name, _ in listed) == sorted({rule["alert"] for rule in alerts()})
    assert all(anchor == name.lower() for name, anchor in listed)


@pytest.mark.parametrize("page", ["operations.md", "upgrades.md"])
def test_links_of_the_guides_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "docs" / page).read_text()):
        file, _, anchor = target.partition("#")
        found = ROOT / "docs" / (file or page)
        assert found.exists(), target
        headings = re.findall(r"^#+ (.*)$", found.read_text(), re.M) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
        assert not anchor or anchor in anchors, target
