"""What every integration test needs; the brokers themselves are in `tests/conftest.py`."""

from collections.abc import Iterator

import pytest

from dataflows.kafka import source
from tests.kafka.client import TestBroker, await_that

__all__ = ["TestBroker", "await_that", "not_draining"]


@pytest.fixture(autouse=True)
def not_draining() -> Iterator[None]:
    """Undo a drain request, which is for the life of a process."""
    source._drain.clear()
    yield
    source._drain.clear()
