"""A day of the handbook, and the window state of the days before it."""

from pathlib import Path

import pytest

from features import batch, declare, events, fraud, offline, windows
from tests.integration.flow import cached, sources_of

DAY = offline.parse_time("2018-08-08")
NEXT_DAY = offline.parse_time("2018-08-09")


@pytest.fixture(scope="session")
def replayed(handbook_dir: Path) -> Path:
    """A directory with `state` as of the day's start and `frame.parquet` up to its end."""

    def build(directory: Path) -> None:
        directory.mkdir(parents=True)
        files = ["--transactions", str(handbook_dir / "transactions.parquet")]
        files += ["--fraud-reports", str(handbook_dir / "fraud_reports.parquet")]
        before = ["--out", str(directory / "before.parquet"), "--until", str(DAY)]
        assert offline.main([*files, *before, "--state", str(directory / "state")]) == 0
        frame = ["--out", str(directory / "frame.parquet"), "--until", str(NEXT_DAY)]
        assert offline.main([*files, *frame, "--chunk-rows", "50021"]) == 0

    code = sources_of(batch, declare, events, fraud, offline, windows)
    return cached("parity", handbook_dir.name + code, build)
