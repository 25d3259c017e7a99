"""Token buckets against a bucket that is filled drop by drop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflows.kafka.rate_limit import TokenBuckets

STEPS = st.lists(
    st.tuples(st.integers(0, 2_000), st.lists(st.integers(0, 2), max_size=40)), max_size=20
)


@given(steps=STEPS, rate=st.integers(1, 50), burst=st.integers(1, 20))
def test_the_next_records_go_until_one_has_no_token(
    steps: list[tuple[int, list[int]]], rate: int, burst: int
) -> None:
    """The oracle counts thousandths of a token, in integers; time is in ms."""
    clock = [0.0]
    buckets = TokenBuckets(3, rate, burst, now=lambda: clock[0])
    ms, tokens = 0, [burst * 1000] * 3
    for wait_ms, partitions in steps:
        ms += wait_ms
        clock[0] = ms / 1000
        tokens = [min(each + wait_ms * rate, burst * 1000) for each in tokens]
        expected = 0
        for partition in partitions:
            if tokens[partition] < 1000:
                break
            tokens[partition] -= 1000
            expected += 1
        assert buckets.allowed(np.array(partitions, np.intp)) == expected


@given(steps=STEPS, rate=st.integers(1, 50), burst=st.integers(1, 20))
def test_no_stretch_of_time_has_more_than_the_rate_and_a_burst(
    steps: list[tuple[int, list[int]]], rate: int, burst: int
) -> None:
    clock = [0.0]
    buckets = TokenBuckets(3, rate, burst, now=lambda: clock[0])
    gone: list[tuple[float, int]] = []
    for wait_ms, partitions in steps:
        clock[0] += wait_ms / 1000
        allowed = buckets.allowed(np.array(partitions, np.intp))
        gone += [(clock[0], partition) for partition in partitions[:allowed]]
    for partition in range(3):
        own = [at for at, of in gone if of == partition]
        for first in range(len(own)):
            for last in range(first, len(own)):
                most = burst + rate * (own[last] - own[first])
                assert last - first + 1 <= most + 1e-6


def test_the_time_in_which_records_were_held_back_is_told() -> None:
    clock = [0.0]
    buckets = TokenBuckets(1, rate=1, burst=1, now=lambda: clock[0])
    for at, records, throttled_s in [(0.0, 2, 0.0), (0.5, 1, 0.5), (1.0, 1, 1.0), (5.0, 1, 1.0)]:
        clock[0] = at
        buckets.allowed(np.zeros(records, np.intp))
        assert buckets.throttled_s == pytest.approx(throttled_s)


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0.5)])
def test_a_bucket_that_lets_nothing_through_is_refused(rate: float, burst: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        TokenBuckets(1, rate, burst)
