"""Tools of these tests, which do not go together with what the flow needs, in an environment apart.

Locked by `make lock` in tools.lock, and installed once, into .cache.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CACHE

_LOCK = Path(__file__).with_name("tools.lock")


@pytest.fixture(scope="session")
def tools() -> Path:
    """Return the directory of the tools' commands, their Python among them."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}".encode()
    key = hashlib.sha256(_LOCK.read_bytes() + version).hexdigest()[:16]
    directory = CACHE / f"deploy-tools-{key}"
    done = directory / "installed"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "deploy-tools.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be installing them
        if not done.exists():
            shutil.rmtree(directory, ignore_errors=True)  # of a run that was cut short
            subprocess.run([sys.executable, "-m", "venv", directory], check=True)
            install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            install += ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(_LOCK)]
            subprocess.run([directory / "bin/python", *install], check=True)
            done.touch()
    return directory / "bin"
