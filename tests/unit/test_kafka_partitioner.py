"""The partitioner agrees with the JVM's producer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflows.kafka.partitioner import murmur2, partitions_of

# org.apache.kafka.common.utils.UtilsTest#testMurmur2
JAVA_VECTORS = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


def reference(key: bytes) -> int:
    """Murmur2 as Kafka's Utils.java spells it, in Python's unbounded integers."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(key)
    whole = len(key) // 4 * 4
    for at in range(0, whole, 4):
        k = int.from_bytes(key[at : at + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = (h * m & mask) ^ k
    tail = key[whole:]
    if tail:
        h = (h ^ int.from_bytes(tail, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    h ^= h >> 15
    return h - (1 << 32) if h >= 1 << 31 else h


@pytest.mark.parametrize(("key", "expected"), JAVA_VECTORS.items())
def test_known_vectors_of_the_jvm(key: bytes, expected: int) -> None:
    assert murmur2([key]).tolist() == [expected]
    assert reference(key) == expected


@given(st.lists(st.binary(max_size=40)))
def test_every_key_of_a_batch_hashes_as_it_does_alone(keys: list[bytes]) -> None:
    assert murmur2(keys).tolist() == [reference(key) for key in keys]


@given(st.lists(st.binary(max_size=12), min_size=1), st.integers(1, 1000))
def test_partition_is_the_positive_remainder(keys: list[bytes], partitions: int) -> None:
    expected = [(reference(key) & 0x7FFFFFFF) % partitions for key in keys]
    assert partitions_of(keys, partitions).tolist() == expected
