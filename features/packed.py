"""Columns of integers as bytes, each as narrow as its values allow, behind a described header.

    magic (8 bytes) · format (uint16) · length of the header (uint32) · header (JSON) · columns

State is mostly times and amounts: close to each other, and kept as int64. Stored as the distance
from the smallest they take half as much, and what a snapshot costs is the bytes it writes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

_PREFIX = struct.Struct("<8sHI")
_NARROWER = tuple(np.dtype(kind) for kind in ("<u1", "<u2", "<u4"))

Columns = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Migration:
    """How bytes of one version become those of the next: the header, and then the columns.

    `columns` is given the header as it was.
    """

    head: Callable[[dict[str, Any]], dict[str, Any]]
    columns: Callable[[dict[str, Any], dict[str, npt.NDArray[Any]]], dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Format:
    """A kind of packed bytes.

    Attributes:
        magic: the first 8 bytes.
        version: of what the header and the columns mean.
        name: what such bytes are, for errors.
        migrations: older version → how it becomes the one after it. Bytes of a version from which
            no chain of these leads to `version` are refused. What is written is always `version`.

    >>> example = Format(b"EXAMPLE.", 1, "an example")
    >>> data = example.pack({"n": 2}, {"times": np.full(100, 1_600_000_000_000)})
    >>> len(data) < 200, example.describe(data)["n"], example.unpack(data)["times"][99]
    (True, 2, np.int64(1600000000000))
    """

    magic: bytes
    version: int
    name: str
    migrations: Mapping[int, Migration] = field(default_factory=dict)

    def pack(self, head: Mapping[str, Any], columns: Columns) -> bytes:
        """Return integer arrays of any shape as bytes, with a header of JSON values. O(bytes)."""
        described, bodies = {}, []
        for name, column in columns.items():
            low, stored = _narrowed(column)
            described[name] = (column.dtype.str, stored.dtype.str, low, column.shape)
            bodies.append(stored.tobytes())
        encoded = msgspec.json.encode({**head, "columns": described})
        return b"".join([_PREFIX.pack(self.magic, self.version, len(encoded)), encoded, *bodies])

    def describe(self, data: bytes) -> dict[str, Any]:
        """Return the header, as of this version.

        Raises ValueError for bytes of another kind, or of a version that cannot be migrated.
        """
        head, migrations, _ = self._read(data)
        for migration in migrations:
            head = migration.head(head)
        return head

    def _read(self, data: bytes) -> tuple[dict[str, Any], list[Migration], int]:
        """Return the header as it was written, what it has to go through, and its length."""
        if len(data) < _PREFIX.size or not data.startswith(self.magic):
            raise ValueError(f"these bytes are not {self.name}")
        _, found, length = _PREFIX.unpack_from(data)
        steps = [self.migrations.get(version) for version in range(found, self.version)]
        migrations = [migration for migration in steps if migration is not None]
        if found > self.version or len(migrations) < len(steps):
            raise ValueError(
                f"these bytes are {self.name} of format {found}, this version reads "
                f"{self.version}; resume it with the version that wrote it, or fill the windows "
                "anew (docs/upgrades.md)"
            )
        end = _PREFIX.size + length
        return msgspec.json.decode(data[_PREFIX.size : end]), migrations, end

    def unpack(self, data: bytes) -> dict[str, npt.NDArray[Any]]:
        """Return the columns as they were; not necessarily writeable.

        Raises ValueError as `describe` does, and for bytes that end too early.
        """
        head, migrations, at = self._read(data)
        columns: dict[str, npt.NDArray[Any]] = {}
        for name, (kind, stored, low, shape) in head["columns"].items():
            size = int(np.prod(shape, dtype=np.int64))
            end = at + size * np.dtype(stored).itemsize
            if end > len(data):
                raise ValueError(f"the bytes of {self.name} are truncated")
            column = np.frombuffer(data, stored, size, at).reshape(shape)
            if stored != kind:
                column = column.astype(kind) + np.dtype(kind).type(low)
            columns[name] = column
            at = end
        for migration in migrations:
            columns = migration.columns(head, columns)
            head = migration.head(head)
        return columns


def _narrowed(column: npt.NDArray[Any]) -> tuple[int, npt.NDArray[Any]]:
    """Return the smallest value and the distances from it, if they fit into fewer bytes."""
    if column.dtype.kind == "i" and column.size:
        low, high = int(column.min()), int(column.max())
        for kind in _NARROWER:
            if kind.itemsize < column.dtype.itemsize and high - low <= np.iinfo(kind).max:
                return low, (column - column.dtype.type(low)).astype(kind)
    return 0, column
