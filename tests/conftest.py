"""Fixtures shared by all tests."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from model import handbook

CACHE = Path(__file__).parents[1] / ".cache"


@pytest.fixture(scope="session")
def handbook_dir() -> Path:
    """Return the directory of the full handbook data set, generated once per generator source."""
    source = Path(handbook.__file__).read_bytes()
    directory = CACHE / "handbook" / hashlib.sha256(source).hexdigest()[:16]
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = tempfile.mkdtemp(dir=directory.parent)
        handbook.write(handbook.simulate(), Path(staging))
        try:
            os.rename(staging, directory)
        except OSError:  # another test run was first, with the same content
            shutil.rmtree(staging)
    return directory
