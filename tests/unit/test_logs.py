"""Log lines: failures are told whole, without what the program had in its hands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys
from types import SimpleNamespace
import structlog
from dataflows.runtime import configure_logging
configure_logging(SimpleNamespace(log_format=sys.argv[1], log_level="info"))
card = "C4111" + "0" * 6
try:
    raise ValueError("of the test")
except ValueError:
    logging.getLogger("a library").error("it failed", exc_info=True)
    structlog.get_logger().error("we failed", exc_info=True)
"""


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_has_no_local_variables(form: str) -> None:
    """Rich, if it is there, would print them."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, form], capture_output=True, text=True, check=True
    )
    assert "C4111000000" not in done.stderr
    if form == "json":
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert [line["event"] for line in lines] == ["it failed", "we failed"]
        tracebacks = [line["exception"] for line in lines]
    else:
        tracebacks = done.stderr.split("we failed")
    for traceback in tracebacks:
        assert "Traceback (most recent call last)" in traceback
        assert "ValueError: of the test" in traceback
