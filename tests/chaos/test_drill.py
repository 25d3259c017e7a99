"""The disaster recovery drill of docs/operations.md goes well."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from tests.chaos.drill import drill
from tests.kafka.client import TestBroker


def test_the_drill_goes_well(kafka: TestBroker, tmp_path: Path) -> None:
    said = io.StringIO()
    good = drill(kafka, tmp_path / "drill", Console(file=said, width=200))
    print(said.getvalue())
    assert good
    assert said.getvalue().count("ok  ") == 4
    assert "WRONG" not in said.getvalue()
