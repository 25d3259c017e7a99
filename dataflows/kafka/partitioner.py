"""Choose the partition of a key as the JVM's producer does, so that all writers agree.

Java's default partitioner takes ``toPositive(murmur2(key)) % partitions``; librdkafka's takes CRC32
unless told otherwise. Consumers that join topics by partition need one of the two everywhere.
The hash is ``org.apache.kafka.common.utils.Utils.murmur2`` (seed 0x9747b28c).
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from dataflows.kafka.records import Int32s, Int64s, UInt8s


@numba.njit(cache=True, nogil=True)
def _murmur2(data: UInt8s, ends: Int64s, out: Int32s) -> None:  # pragma: no cover - compiled
    m = np.uint32(0x5BD1E995)
    start = 0
    for row in range(len(ends)):
        end = ends[row]
        length = end - start
        h = np.uint32(0x9747B28C) ^ np.uint32(length)
        at = start
        while end - at >= 4:
            k = (
                np.uint32(data[at])
                | np.uint32(data[at + 1]) << np.uint32(8)
                | np.uint32(data[at + 2]) << np.uint32(16)
                | np.uint32(data[at + 3]) << np.uint32(24)
            )
            k = np.uint32(k * m)
            k ^= k >> np.uint32(24)
            k = np.uint32(k * m)
            h = np.uint32(np.uint32(h * m) ^ k)
            at += 4
        rest = end - at
        if rest == 3:
            h ^= np.uint32(data[at + 2]) << np.uint32(16)
        if rest >= 2:
            h ^= np.uint32(data[at + 1]) << np.uint32(8)
        if rest >= 1:
            h = np.uint32(np.uint32(h ^ np.uint32(data[at])) * m)
        h ^= h >> np.uint32(13)
        h = np.uint32(h * m)
        h ^= h >> np.uint32(15)
        out[row] = np.int32(h)
        start = end


def murmur2(keys: Sequence[bytes]) -> Int32s:
    """Hash each key. Returns int32, signed as in Java. O(bytes).

    >>> murmur2([b"21", b"foobar"]).tolist()
    [-973932308, -790332482]
    """
    data = np.frombuffer(b"".join(keys), dtype=np.uint8)
    lengths = np.fromiter(map(len, keys), dtype=np.int64, count=len(keys))
    out = np.empty(len(keys), dtype=np.int32)
    _murmur2(data, np.cumsum(lengths), out)
    return out


def partitions_of(keys: Sequence[bytes], partitions: int) -> Int32s:
    """Return the partition of each key, int32 in [0, `partitions`), equal to the JVM producer's.

    >>> partitions_of([b"21", b"foobar"], 4).tolist()
    [0, 2]
    """
    return (murmur2(keys) & np.int32(0x7FFFFFFF)) % np.int32(partitions)
