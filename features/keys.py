"""Keys as fixed-width bytes: their hash, their virtual shard, and a hash table for compiled code.

The table is any named tuple with ``slots`` (int32, a power of two, row or −1, at most half full),
``hashes`` (uint64, by row) and ``keys`` (uint8, by row: the key's bytes, zero padded).

numba compiles what is here into its callers, and caches those by the time stamps of *their* files:
after a change here, touch features/windows.py and features/column_cache.py.
"""

from __future__ import annotations

import numba as nb
import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]


@nb.njit(cache=True, inline="always")
def hash_of(key, width):  # type: ignore[no-untyped-def]
    """FNV-1a over the key's bytes, finished like MurmurHash3; independent of padding."""
    while width > 0 and key[width - 1] == 0:
        width -= 1
    h = np.uint64(0xCBF29CE484222325)
    for i in range(width):
        h = (h ^ np.uint64(key[i])) * np.uint64(0x100000001B3)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


@nb.njit(cache=True)
def _shards_of(keys, shards, out):  # type: ignore[no-untyped-def]
    for i in range(len(keys)):
        # The low bits choose the slot within a shard, so take the high ones here.
        out[i] = np.int64((hash_of(keys[i], keys.shape[1]) >> np.uint64(32)) % np.uint64(shards))


def shards_of(keys: npt.NDArray[np.bytes_], shards: int) -> npt.NDArray[np.int64]:
    """Return the virtual shard of each key: a stable hash, the same in every process and run.

    >>> shards_of(np.array([b"C0001", b"C0002", b"C0001"]), 16).tolist()
    [5, 3, 5]
    """
    out = np.empty(len(keys), np.int64)
    _shards_of(key_bytes(keys), shards, out)
    return out


def key_bytes(keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint8]:
    """Return the bytes of keys [n] of dtype S, uint8 [n, width], zero padded, for compiled code."""
    if not (keys.flags.c_contiguous and keys.flags.writeable):
        keys = np.require(keys, requirements=["C", "W"])
    return keys.view(np.uint8).reshape(len(keys), keys.dtype.itemsize)


@nb.njit(cache=True, inline="always")
def find(table, h, key):  # type: ignore[no-untyped-def]
    """Return the row with this key, or −1."""
    mask = np.int64(len(table.slots) - 1)
    slot = np.int64(h & np.uint64(mask))
    while True:
        row = table.slots[slot]
        if row < 0:
            return np.int64(-1)
        if table.hashes[row] == h:
            same = True
            for j in range(table.keys.shape[1]):
                byte = key[j] if j < len(key) else np.uint8(0)
                if table.keys[row, j] != byte:
                    same = False
                    break
            if same:
                return np.int64(row)
        slot = (slot + 1) & mask


@nb.njit(cache=True, inline="always")
def occupy(table, h, row):  # type: ignore[no-untyped-def]
    """Enter a row, whose key is not there yet, into the table; the caller has made sure of room."""
    mask = np.int64(len(table.slots) - 1)
    slot = np.int64(h & np.uint64(mask))
    while table.slots[slot] >= 0:
        slot = (slot + 1) & mask
    table.slots[slot] = row


@nb.njit(cache=True)
def _group(parts, rows, starts):  # type: ignore[no-untyped-def]
    starts[:] = 0
    for part in parts:
        starts[part + 1] += 1
    for part in range(len(starts) - 1):
        starts[part + 1] += starts[part]
    place = starts.copy()
    for row in range(len(parts)):
        part = parts[row]
        rows[place[part]] = row
        place[part] += 1


def group(parts: npt.NDArray[np.signedinteger], count: int) -> tuple[Int, Int]:
    """Return row numbers grouped by part, in [0, `count`), and where each part's begin.

    Rows of part p are ``rows[starts[p]:starts[p + 1]]``, in ascending order. O(rows + parts).

    >>> rows, starts = group(np.array([2, 0, 2]), 3)
    >>> rows.tolist(), starts.tolist()
    ([1, 0, 2], [0, 1, 1, 3])
    """
    rows, starts = np.empty(len(parts), np.int64), np.empty(count + 1, np.int64)
    _group(parts, rows, starts)
    return rows, starts


def group_by_shard(keys: npt.NDArray[np.bytes_], shards: int) -> tuple[Int, Int]:
    """Return row numbers grouped by the shard of their key, and where each shard's begin; `group`.

    >>> rows, starts = group_by_shard(np.array([b"C0001", b"C0002", b"C0001"]), 6)
    >>> rows.tolist(), starts.tolist()
    ([0, 2, 1], [0, 0, 2, 2, 3, 3, 3])
    """
    return group(shards_of(keys, shards), shards)
