"""A cache of rows of numbers by key, asked for whole batches of keys at once."""

from __future__ import annotations

from typing import NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

from features.keys import find, hash_of, key_bytes, occupy

Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

_KEY_BYTES = 8
_USED, _HAND = 0, 1


class _Table(NamedTuple):
    slots: npt.NDArray[np.int32]  # hash table, see features.keys
    hashes: npt.NDArray[np.uint64]  # per row, as all below
    keys: npt.NDArray[np.uint8]  # the key's bytes, zero padded
    values: Float64s
    as_of: Float64s
    expires: Float64s
    asked: npt.NDArray[np.bool_]  # since the hand last passed it
    places: Int64s  # rows used, and where the hand is


@nb.njit(cache=True)
def _fetch(table, keys, now, values, as_of, missed):  # type: ignore[no-untyped-def]
    """Copy what is fresh at `now`; note which keys are not, and return how many."""
    misses = 0
    for i in range(len(keys)):
        row = find(table, hash_of(keys[i], keys.shape[1]), keys[i])
        if row >= 0 and table.expires[row] > now:
            table.asked[row] = True
            values[i] = table.values[row]
            as_of[i] = table.as_of[row]
        else:
            values[i] = np.nan
            as_of[i] = np.nan
            missed[misses] = i
            misses += 1
    return misses


@nb.njit(cache=True)
def _put(table, keys, values, as_of, expires):  # type: ignore[no-untyped-def]
    """Store rows of distinct keys, not more than the table holds; return how many it lost."""
    evicted = 0
    rows = len(table.hashes)
    for i in range(len(keys)):
        h = hash_of(keys[i], keys.shape[1])
        row = find(table, h, keys[i])
        if row < 0:
            if table.places[_USED] < rows:
                row = table.places[_USED]
                table.places[_USED] += 1
            else:
                row = table.places[_HAND]
                while table.asked[row]:
                    table.asked[row] = False
                    row = (row + 1) % rows
                table.places[_HAND] = (row + 1) % rows
                _remove(table, row)
                evicted += 1
            table.hashes[row] = h
            table.keys[row, :] = 0
            for j in range(min(keys.shape[1], table.keys.shape[1])):
                table.keys[row, j] = keys[i, j]
            occupy(table, h, row)
        table.values[row] = values[i]
        table.as_of[row] = as_of[i]
        table.expires[row] = expires
    return evicted


@nb.njit(cache=True)
def _remove(table, row):  # type: ignore[no-untyped-def]
    """Take a row out of the hash table, and close the gap (Knuth, vol. 3, algorithm 6.4 R)."""
    mask = np.int64(len(table.slots) - 1)
    gap = np.int64(table.hashes[row] & np.uint64(mask))
    while table.slots[gap] != row:
        gap = (gap + 1) & mask
    slot = (gap + 1) & mask
    while table.slots[slot] >= 0:
        home = np.int64(table.hashes[table.slots[slot]] & np.uint64(mask))
        if (slot - home) & mask >= (slot - gap) & mask:  # it may stand in the gap
            table.slots[gap] = table.slots[slot]
            gap = slot
        slot = (slot + 1) & mask
    table.slots[gap] = -1


class ColumnCache:
    """Keep rows of `fields` float64 and a time ``as_of`` by key, each for `ttl_s` seconds.

    At most `rows` rows; when full, the clock algorithm replaces one that was not asked for since
    the hand last passed it. Compiled: a key costs some 50 ns, and a batch one call.

    >>> cache = ColumnCache(fields=1, rows=2, ttl_s=60)
    >>> keys = np.array([b"a", b"b"])
    >>> cache.put(keys[:1], np.array([[1.5]]), np.array([100.0]), now=0)
    0
    >>> cache.fetch(keys, now=59)
    (array([[1.5],
           [nan]]), array([100.,  nan]), array([1]))
    """

    def __init__(self, fields: int, rows: int, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._table = _Table(
            slots=np.full(1 << (2 * rows).bit_length(), -1, np.int32),
            hashes=np.zeros(rows, np.uint64),
            keys=np.zeros((rows, _KEY_BYTES), np.uint8),
            values=np.zeros((rows, fields)),
            as_of=np.zeros(rows),
            expires=np.zeros(rows),
            asked=np.zeros(rows, np.bool_),
            places=np.zeros(2, np.int64),
        )

    def __len__(self) -> int:
        return int(self._table.places[_USED])

    def fetch(
        self, keys: npt.NDArray[np.bytes_], now: float
    ) -> tuple[Float64s, Float64s, npt.NDArray[np.intp]]:
        """Return values [n, fields] and as_of [n], NaN where missed, and the positions missed.

        `keys` is [n] of dtype S, in any number; a row is fresh until ``now`` (monotonic seconds)
        reaches the time it was put plus the TTL.
        """
        n = len(keys)
        values, as_of = np.empty((n, self._table.values.shape[1])), np.empty(n)
        missed = np.empty(n, np.intp)
        bytes_ = self._fitting(keys)
        misses = _fetch(self._table, bytes_, float(now), values, as_of, missed)
        return values, as_of, missed[:misses]

    def put(
        self, keys: npt.NDArray[np.bytes_], values: Float64s, as_of: Float64s, now: float
    ) -> int:
        """Store rows of distinct keys, of more than fit the last; return how many were replaced."""
        rows = len(self._table.hashes)
        bytes_ = self._fitting(keys[-rows:])
        expires = float(now + self._ttl_s)
        return int(_put(self._table, bytes_, values[-rows:], as_of[-rows:], expires))

    def _fitting(self, keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint8]:
        """Return the keys' bytes; the table has room for as many in a key from now on."""
        bytes_, held = key_bytes(keys), self._table.keys
        if bytes_.shape[1] > held.shape[1]:
            wider = np.zeros((len(held), -(-bytes_.shape[1] // _KEY_BYTES) * _KEY_BYTES), np.uint8)
            wider[:, : held.shape[1]] = held
            self._table = self._table._replace(keys=wider)
        return bytes_
