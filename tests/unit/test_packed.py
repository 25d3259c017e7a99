"""State that an older version wrote is read as if this one had written it, or refused."""

import numpy as np
import pytest

from features.packed import Format, Migration

# Three versions of one kind: times in seconds; in milliseconds; and with a clock in the header.
SECONDS = Format(b"EXAMPLE.", 1, "an example")
TO_MS = Migration(
    head=lambda head: {**head, "unit": "ms"},
    columns=lambda head, columns: {"at": columns["at"] * (1000 if head["unit"] == "s" else 1)},
)
MILLISECONDS = Format(b"EXAMPLE.", 2, "an example", {1: TO_MS})
TO_CLOCK = Migration(
    head=lambda head: {**head, "clock": 0},
    columns=lambda head, columns: {**columns, "seen": np.full(len(columns["at"]), head["n"])},
)
CLOCK = Format(b"EXAMPLE.", 3, "an example", {1: TO_MS, 2: TO_CLOCK})


def test_older_bytes_go_through_every_version_since() -> None:
    old = SECONDS.pack({"unit": "s", "n": 2}, {"at": np.array([1_600_000_000, 1_600_000_060])})
    head = CLOCK.describe(old)
    assert (head["unit"], head["clock"], head["n"]) == ("ms", 0, 2)
    columns = CLOCK.unpack(old)
    assert columns["at"].tolist() == [1_600_000_000_000, 1_600_000_060_000]
    assert columns["seen"].tolist() == [2, 2]

    middle = MILLISECONDS.pack({"unit": "ms", "n": 1}, {"at": np.array([5])})
    assert CLOCK.unpack(middle)["at"].tolist() == [5]
    new = CLOCK.pack({"unit": "ms", "n": 1, "clock": 9}, {"at": np.array([5]), "seen": np.zeros(1)})
    assert CLOCK.describe(new)["clock"] == 9


def test_newer_bytes_and_those_without_a_way_are_refused() -> None:
    new = CLOCK.pack({}, {})
    with pytest.raises(ValueError, match="of format 3, this version reads 2; resume it with the"):
        MILLISECONDS.describe(new)
    old = SECONDS.pack({}, {})
    for no_way in (Format(b"EXAMPLE.", 2, "an example"), Format(b"EXAMPLE.", 3, "", {2: TO_CLOCK})):
        with pytest.raises(ValueError, match=r"of format 1, .* \(docs/upgrades.md\)"):
            no_way.unpack(old)
