"""Where the monitoring files are, and the programs that check them."""

import shutil

import pytest


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name} on PATH (Debian: apt install prometheus)")
    return found


@pytest.fixture(scope="session")
def promtool() -> str:
    """Return the path of promtool; skip the test where there is none."""
    return _program("promtool")


@pytest.fixture(scope="session")
def prometheus() -> str:
    """Return the path of Prometheus; skip the test where there is none."""
    return _program("prometheus")
