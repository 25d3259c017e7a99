"""The compiled cache answers like a dictionary and a list with a hand going round it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from features.column_cache import ColumnCache

TTL_S = 10.0
#: Few enough that they meet again, long and short ones, and of the empty key too.
KEYS = [b"", *(b"%d" % n for n in range(12)), *(b"a key of %d bytes or so" % n for n in range(4))]

_compiled = ColumnCache(1, 1, 1.0)  # no example is to wait for it
_compiled.put(np.array([b"x"]), np.zeros((1, 1)), np.zeros(1), now=0)
_compiled.fetch(np.array([b"x"]), now=0)


class Naive:
    """The same, one key at a time."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.held: list[list] = []  # key, value, expires, asked
        self.hand = 0

    def fetch(self, key: bytes, now: float) -> float | None:
        for row in self.held:
            if row[0] == key and row[2] > now:
                row[3] = True
                return row[1]
        return None

    def put(self, key: bytes, value: float, now: float) -> bool:
        """Return whether another key was lost."""
        for row in self.held:
            if row[0] == key:
                row[1:3] = value, now + TTL_S
                return False
        if len(self.held) < self.rows:
            self.held.append([key, value, now + TTL_S, False])
            return False
        while self.held[self.hand][3]:
            self.held[self.hand][3] = False
            self.hand = (self.hand + 1) % self.rows
        self.held[self.hand] = [key, value, now + TTL_S, False]
        self.hand = (self.hand + 1) % self.rows
        return True


@given(
    st.integers(1, 9),
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(KEYS), max_size=6),
            st.lists(st.sampled_from(KEYS), max_size=12, unique=True),
            st.sampled_from([0.0, 1.0, 4.0, 9.0, 10.0]),
        ),
        max_size=20,
    ),
)
def test_it_answers_like_the_naive_one(
    rows: int, steps: list[tuple[list[bytes], list[bytes], float]]
) -> None:
    cache, naive, now, value = ColumnCache(2, rows, TTL_S), Naive(rows), 0.0, 0.0
    for asked, given_, passes in steps:
        values, as_of, missed = cache.fetch(np.array(asked, "S"), now)
        expected = [naive.fetch(key, now) for key in asked]
        assert missed.tolist() == [i for i, each in enumerate(expected) if each is None]
        for i, each in enumerate(expected):
            found = [*values[i].tolist(), as_of[i]]
            assert (
                found == [each, each + 0.25, each + 0.5]
                if each is not None
                else all(np.isnan(found))
            )
        numbers = value + np.arange(len(given_))
        value += len(given_)
        lost = cache.put(
            np.array(given_, "S"), np.stack([numbers, numbers + 0.25], axis=1), numbers + 0.5, now
        )
        # Of more than fit, the last ones stay.
        pairs = list(zip(given_, numbers.tolist(), strict=True))[-rows:]
        assert lost == sum(naive.put(key, number, now) for key, number in pairs)
        assert len(cache) == len(naive.held) <= rows
        now += passes


def test_a_key_that_begins_like_another_is_another() -> None:
    cache = ColumnCache(1, 10, TTL_S)
    cache.put(np.array([b"12345678"]), np.ones((1, 1)), np.ones(1), now=0)
    assert cache.fetch(np.array([b"123456789"]), now=0)[2].tolist() == [0]
    assert cache.fetch(np.array([b"1234567"]), now=0)[2].tolist() == [0]
    assert cache.fetch(np.array([b"12345678"], "S32"), now=0)[2].tolist() == []
