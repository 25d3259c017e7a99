"""`make demo`: the whole application on this machine, from nothing to scored transactions."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
