"""A view's windows as a recovery store keeps them: of each shard a *base*, and a *journal* of rows.

To write all state at every snapshot takes the longer, the more entities are alive. So a snapshot
writes the rows that came since the last one, a *page* of the journal, and only some shards' whole
state, in turn: their new bases. A shard's state is its newest base and the rows of the pages
after it, processed anew: what the kernel makes of rows depends on their order alone, so this gives
the same state to the last bit.

Pages are numbered. A base is *as of* a page: it holds that page's rows and all earlier ones'.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from features.batch import EventBatch
from features.keys import group_by_shard, key_bytes
from features.packed import Format
from features.windows import Layout, WindowShards, WindowState

_FORMAT = Format(b"JOURNAL\0", 1, "a page of a journal")
_CHUNK_ROWS = 65_536

#: What a base is as of that holds no page's rows; pages are numbered from 1.
SEED = 0

#: What is stored of a shard: its number, the page it is as of, and the bytes of its state.
Base = tuple[Literal["base"], int, int, bytes]
#: What is stored of a page: its number and its bytes; empty if all bases are as of it.
Page = tuple[Literal["page"], int, bytes]


#: Pages that the journal goes round: each is written over after so many epochs with rows.
PAGES = 32
#: Rows of pages that a resume may have to process again, about: some 1 µs each.
MOST_ROWS = 4_000_000


class Stored(NamedTuple):
    """How far what is stored of a view's windows goes: the last page, and each shard's base."""

    last: int
    as_of: Sequence[int]


def shard_key(shard: int) -> str:
    """Return the key that a shard is stored under."""
    return f"s{shard:03d}"


def page_key(number: int) -> str:
    """Return the key that a page is stored under, until it is written over."""
    return f"page{number % PAGES:02d}"


def in_turn(as_of: Sequence[int], rows: int) -> list[int]:
    """Return the shards to write beside the next page: those whose bases are the oldest.

    So many that each is written again before a page that it needs is written over, and that the
    pages needed hold about `MOST_ROWS` at most, if each has so many `rows` as the last one.

    Args:
        as_of: which page each shard's base is as of.
        rows: of the last page.

    >>> in_turn([7, 5, 6, 7], 0), in_turn([7, 5, 6, 7], MOST_ROWS // 2)
    ([1], [1, 2])
    """
    share = max(1 / PAGES, min(1.0, rows / MOST_ROWS))
    oldest = sorted(range(len(as_of)), key=lambda shard: as_of[shard])
    return oldest[: math.ceil(share * len(as_of))]


class Journal:
    """Rows as they are added, until they are taken as a page.

    Args:
        layout: of the view. Columns that its windows do not need are not kept.

    >>> from features.fraud import CARD, FraudReport, Transaction
    >>> layout = Layout.of(CARD, [Transaction, FraudReport])
    >>> journal, states = Journal(layout), WindowShards(layout)
    >>> journal.add(EventBatch({
    ...     "source": np.zeros(2, np.uint8),
    ...     "card_id": np.array([b"a", b"b"]),
    ...     "event_time": np.array([1_000, 2_000]),
    ...     "amount": np.array([1000, 3000]),
    ... }))
    >>> len(journal)
    2
    >>> resume(states, [], [("page", 1, journal.page(1))])
    1
    >>> sum(states[shard].entities for shard in range(layout.shards)), len(journal)
    (2, 0)
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        aggregated = {name for names in layout.sums for name in names}
        aggregated |= {name for extrema in layout.extrema for name, _ in extrema}
        self._names = ["source", "event_time", *sorted(aggregated)]
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in memory; a page takes about half."""
        return sum(column[: self._rows].nbytes for column in self._columns.values())

    def add(self, batch: EventBatch) -> None:
        """Append a batch's rows. Amortised O(rows)."""
        columns = {name: batch[name] for name in self._names}
        columns["#key"] = key_bytes(batch[self._layout.view.key])
        end = self._rows + len(batch)
        for name, column in columns.items():
            kept = self._columns.get(name)
            if kept is None or len(kept) < end or kept.shape[1:] < column.shape[1:]:
                kept = self._columns[name] = _grown(kept, column, self._rows, end)
            if column.ndim == 1:
                kept[self._rows : end] = column
            else:
                kept[self._rows : end, : column.shape[1]] = column
                kept[self._rows : end, column.shape[1] :] = 0
        self._rows = end

    def page(self, number: int) -> bytes:
        """Return the rows as bytes, and forget them."""
        head = {**_described(self._layout), "page": number, "rows": self._rows}
        data = _FORMAT.pack(head, {name: c[: self._rows] for name, c in self._columns.items()})
        self.clear()
        return data

    def clear(self) -> None:
        """Forget the rows, and give up memory that was for many more."""
        if any(len(column) > 8 * max(self._rows, 1024) for column in self._columns.values()):
            self._columns = {}
        self._rows = 0


def _grown(
    kept: npt.NDArray[Any] | None, column: npt.NDArray[Any], rows: int, needed: int
) -> npt.NDArray[Any]:
    shape = column.shape[1:] if kept is None else max(kept.shape[1:], column.shape[1:])
    grown = np.zeros((max(1024, 2 * needed), *shape), column.dtype)
    if kept is not None:
        grown[(slice(rows), *map(slice, kept.shape[1:]))] = kept[:rows]
    return grown


def _described(layout: Layout) -> dict[str, Any]:
    """What a page must agree on with the view that processes its rows again."""
    return {
        "view": layout.view.name,
        "sources": [source.__name__ for source in layout.sources],
        "pages": PAGES,
    }


def describe(stored: Base | Page) -> dict[str, Any]:
    """Return the header of what is stored of a shard, or of a page that is not empty; else {}.

    Raises ValueError or TypeError for anything else.
    """
    match stored:
        case ("base", int(), int(), bytes(data)):
            return WindowState.describe(data)
        case ("page", int(), b""):
            return {}
        case ("page", int(), bytes(data)):
            return _FORMAT.describe(data)
    raise TypeError(f"{type(stored).__name__} is neither a shard's base nor a page of a journal")


def check(layout: Layout, stored: Base | Page) -> None:
    """Raise unless what is stored is of this version and fits the view; looks at headers only.

    Raises ValueError, with a remedy, or TypeError.
    """
    head = describe(stored)
    if stored[0] == "base":
        WindowState.check(layout, stored[3])
        if not 0 <= stored[1] < layout.shards:
            raise ValueError(f"there is no shard {stored[1]}, but {layout.shards} of them")
    for name, expected in _described(layout).items() if stored[0] == "page" and head else ():
        if head[name] != expected:
            raise ValueError(
                f"the {name} of the journal's page are {head[name]!r}, this version has "
                f"{expected!r}; let the version that wrote it write all shards once (run it as a "
                "cluster), or fill the windows anew (docs/upgrades.md)"
            )


def needed(bases: Collection[Base], pages: Iterable[Page], shards: int) -> list[Page]:
    """Return the pages that are newer than some shard's base, in order.

    Raises ValueError if one is missing.
    """
    oldest = min((as_of for _, _, as_of, _ in bases), default=SEED)
    if len(bases) < shards:
        oldest = SEED
    newer = sorted((page for page in pages if page[1] > oldest), key=lambda page: page[1])
    numbers = [number for _, number, _ in newer]
    if numbers and oldest != SEED:
        numbers.insert(0, oldest)
    for number, following in pairwise(numbers):
        if number < following - 1:
            raise ValueError(f"page {number + 1} of the journal of rows is missing")
    return newer


def resume(states: WindowShards, bases: Iterable[Base], pages: Iterable[Page]) -> int:
    """Restore the shards that have a base, up to the last page, and return its number.

    Shards without a base must be empty, and see every page. The rows take what it took to process
    them the first time, less the features.

    Raises ValueError if what is stored does not fit the view, or a page is missing.
    """
    as_of = np.full(len(states), SEED)
    last = SEED
    bases = list(bases)
    for _, shard, number, data in bases:
        states[shard] = WindowState.restore(states.layout, data)
        as_of[shard] = number
        last = max(last, number)
    for _, number, data in needed(bases, pages, len(states)):
        last = max(last, number)
        if data:
            _replay(states, _FORMAT.unpack(data), np.flatnonzero(as_of < number))
    return last


def _replay(
    states: WindowShards, columns: dict[str, npt.NDArray[Any]], behind: npt.NDArray[np.int64]
) -> None:
    """Have the shards `behind` process the rows that are theirs."""
    keys = columns.pop("#key")
    columns[states.layout.view.key] = np.ascontiguousarray(keys).view(f"S{keys.shape[1]}")[:, 0]
    page = EventBatch(columns)
    for start in range(0, len(page), _CHUNK_ROWS):
        batch = page.take(slice(start, start + _CHUNK_ROWS))
        rows, starts = group_by_shard(batch[states.layout.view.key], len(states))
        theirs = [rows[starts[shard] : starts[shard + 1]] for shard in behind]
        batch = batch.take(np.sort(np.concatenate(theirs)))
        states.update(batch, *group_by_shard(batch[states.layout.view.key], len(states)))
