"""What the runs of this suite use."""

from pathlib import Path

import pytest

from features import profiles
from tests.chaos.harness import Assets
from tests.handbook_day import DAY, replayed  # noqa: F401
from tests.integration.flow import feast_repo, sources_of, tiny_model  # noqa: F401
from tests.kafka.client import TestBroker


@pytest.fixture(scope="session")
def window_state(replayed: Path) -> Path:  # noqa: F811
    """Return the window state of all days before `DAY`."""
    return replayed / "state"


@pytest.fixture(scope="session")
def assets(
    kafka: TestBroker,
    handbook_dir: Path,
    window_state: Path,
    tiny_model: Path,  # noqa: F811
) -> Assets:
    """Return what a run needs; skipped without Apache Kafka."""
    feast = feast_repo(handbook_dir, DAY, handbook_dir.name + sources_of(profiles))
    return Assets(kafka, handbook_dir, DAY, window_state, tiny_model, feast)
