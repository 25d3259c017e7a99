"""The one thing that flows: a columnar micro-batch of events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[Any]

#: Provenance of a row: which source it came from (index into the flow's sources), where it stood
#: in Kafka, when the broker appended it (ms), and its place in the flow's order of processing.
PROVENANCE = {
    "source": np.uint8,
    "partition": np.int32,
    "offset": np.int64,
    "append_time": np.int64,
    "seq": np.int64,
}


class EventBatch:
    """Hold events as one NumPy array per column, all of the same length, in order of arrival.

    Keys are fixed-width bytes (``S``, UTF-8), times int64 milliseconds, money int64 fixed point,
    features float64. A step takes a batch and returns one with more columns; arrays are never
    changed in place, so batches may share them.

    >>> batch = EventBatch({"card_id": np.array([b"a", b"b"]), "amount": np.array([100, 250])})
    >>> len(batch), batch["amount"].tolist()
    (2, [100, 250])
    >>> batch.take(batch["amount"] > 200)["card_id"].tolist()
    [b'b']
    """

    __slots__ = ("columns",)

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.columns = dict(columns)
        if len(set(map(len, self.columns.values()))) > 1:
            lengths = {name: len(column) for name, column in self.columns.items()}
            raise ValueError(f"columns of one batch must have one length, got {lengths}")

    def __len__(self) -> int:
        for column in self.columns.values():
            return len(column)
        return 0

    def __getitem__(self, name: str) -> Column:
        try:
            return self.columns[name]
        except KeyError:
            known = ", ".join(self.columns)
            raise KeyError(f"batch has no column {name!r}; it has: {known}") from None

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __repr__(self) -> str:
        return f"EventBatch({len(self)} rows: {', '.join(self.columns)})"

    def __getstate__(self) -> dict[str, Column]:
        return self.columns

    def __setstate__(self, columns: dict[str, Column]) -> None:
        self.columns = columns

    def with_columns(self, columns: Mapping[str, Column]) -> EventBatch:
        """Return a batch with these columns added or replaced; the others are shared."""
        return EventBatch({**self.columns, **columns})

    def take(self, rows: npt.NDArray[Any] | slice) -> EventBatch:
        """Return the given rows: indices (any order), a boolean mask, or a slice (a view)."""
        if isinstance(rows, slice):
            return EventBatch({name: column[rows] for name, column in self.columns.items()})
        if rows.dtype == np.bool_:
            rows = np.flatnonzero(rows)
        return EventBatch(
            {name: column.take(rows, axis=0) for name, column in self.columns.items()}
        )

    @staticmethod
    def concat(batches: Sequence[EventBatch]) -> EventBatch:
        """Return the rows of several batches, one after the other.

        Every batch must have the same columns; key columns widen to the widest.
        """
        if len(batches) == 1:
            return batches[0]
        if not batches:
            raise ValueError("cannot concatenate zero batches")
        names = batches[0].columns.keys()
        for batch in batches:
            if batch.columns.keys() != names:
                raise ValueError(
                    "batches with different columns cannot be concatenated: "
                    f"{sorted(names)} and {sorted(batch.columns)}"
                )
        return EventBatch(
            {name: np.concatenate([batch.columns[name] for batch in batches]) for name in names}
        )

    def split(self, parts: npt.NDArray[np.integer[Any]]) -> list[tuple[int, EventBatch]]:
        """Split rows by their part number, keeping the order within each part.

        ``parts`` is one non-negative integer a row. Returns ``(part, batch)`` pairs in ascending
        order of part, only for parts that occur. One gather, then views: O(rows + parts).

        >>> batch = EventBatch({"x": np.array([10, 11, 12])})
        >>> [(part, b["x"].tolist()) for part, b in batch.split(np.array([1, 0, 1]))]
        [(0, [11]), (1, [10, 12])]
        """
        if len(self) == 0:
            return []
        first = int(parts[0])
        if len(parts) == 1 or bool((parts == first).all()):
            return [(first, self)]
        order = np.argsort(parts, kind="stable")
        grouped = self.take(order)
        sorted_parts = parts[order]
        starts = np.flatnonzero(np.diff(sorted_parts, prepend=sorted_parts[0] - 1))
        ends = np.append(starts[1:], len(parts))
        return [
            (int(sorted_parts[start]), grouped.take(slice(int(start), int(end))))
            for start, end in zip(starts, ends, strict=True)
        ]


def in_order(batches: Iterable[EventBatch]) -> EventBatch | None:
    """Merge batches back into the order of processing (column ``seq``); None if there is no row."""
    present = [batch for batch in batches if len(batch)]
    if not present:
        return None
    merged = EventBatch.concat(present)
    if len(present) == 1:
        return merged
    return merged.take(np.argsort(merged["seq"], kind="stable"))
