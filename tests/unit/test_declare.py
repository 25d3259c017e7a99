"""Declarations: the schema hash follows every answer's meaning, and mistakes are explained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features import declare
from features.batch import EventBatch
from features.declare import (
    Count,
    FeatureSet,
    FeatureView,
    Max,
    Mean,
    Ratio,
    Stateless,
    Sum,
    Value,
    milliseconds,
    stateless,
)
from features.events import Event, EventTime, Key, Money, Number, Whole

ROOT = Path(__file__).parents[2]


class Sale(Event):
    shop: Key
    event_time: EventTime
    amount: Money


class Claim(Event):
    shop: Key
    event_time: EventTime


@stateless(version=1)
def is_large(amount: Any) -> Any:
    return amount > 100_00


VIEW = FeatureView(
    "shop",
    key="shop",
    of=Sale,
    delay="1h",
    lateness="1h",
    features=[
        Count(over=("1d", "7d")),
        Mean("amount", over=("1d",)),
        Ratio(Count(source=Claim), Count(), over=("1d",), empty=0.0, name="risk"),
    ],
)
SET = FeatureSet("test", of=Sale, features=[Value("amount"), is_large, VIEW])


def with_view(**changes: Any) -> FeatureSet:
    return replace(SET, features=[Value("amount"), is_large, replace(VIEW, **changes)])


def with_amount(kind: Any) -> FeatureSet:
    """The same declaration of an event whose `amount` is of another kind."""
    changed = type("Sale", (Event,), {"__annotations__": {**Sale.__annotations__, "amount": kind}})
    view = replace(VIEW, of=changed, features=[Count(over=("1d",))])
    return FeatureSet("test", of=changed, features=[is_large, view])


@stateless(version=2)
def is_large_2(amount: Any) -> Any:
    return amount > 100_00


OTHERS: dict[str, Callable[[], FeatureSet]] = {
    "a feature more": lambda: with_view(features=[*VIEW.features, Max("amount", over=("1d",))]),
    "a feature less": lambda: with_view(features=VIEW.features[1:]),
    "another name": lambda: with_view(
        features=[replace(VIEW.features[0], name="n"), *VIEW.features[1:]]
    ),
    "another name of the view": lambda: with_view(name="store"),
    "another order of features": lambda: with_view(features=VIEW.features[::-1]),
    "another order of the set": lambda: replace(SET, features=[is_large, Value("amount"), VIEW]),
    "another order of windows": lambda: with_view(
        features=[Count(over=("7d", "1d")), *VIEW.features[1:]]
    ),
    "another window": lambda: with_view(features=[Count(over=("1d", "8d")), *VIEW.features[1:]]),
    "another aggregation, same name": lambda: with_view(
        features=[Sum("amount", over=("1d", "7d"), name="count"), *VIEW.features[1:]]
    ),
    "another value for empty windows": lambda: with_view(
        features=[VIEW.features[0], Mean("amount", over=("1d",), empty=0.0), VIEW.features[2]]
    ),
    "another value for an empty ratio": lambda: with_view(
        features=[*VIEW.features[:2], replace(VIEW.features[2], empty=1.0)]
    ),
    "another source": lambda: with_view(
        features=[Count(source=Claim, over=("1d", "7d"), name="count"), *VIEW.features[1:]]
    ),
    "another source in a ratio": lambda: with_view(
        features=[*VIEW.features[:2], replace(VIEW.features[2], denominator=Count(source=Claim))]
    ),
    "another delay": lambda: with_view(delay="2h"),
    "another lateness": lambda: with_view(lateness="2h"),
    "a resolution": lambda: with_view(resolution="1m"),
    "another resolution": lambda: with_view(resolution="1h"),
    "another version of a function": lambda: replace(
        SET, features=[Value("amount"), replace(is_large_2, name="is_large"), VIEW]
    ),
    "other columns of a function": lambda: replace(
        SET, features=[Value("amount"), replace(is_large, columns=("event_time",)), VIEW]
    ),
}


def test_the_schema_hash_follows_every_change() -> None:
    hashes = {name: make().schema_hash for name, make in OTHERS.items()}
    hashes["unchanged"] = SET.schema_hash
    assert len(set(hashes.values())) == len(hashes), hashes


@pytest.mark.parametrize("kind", [Number, Whole])
def test_the_schema_hash_follows_a_columns_type(kind: Any) -> None:
    assert with_amount(kind).schema_hash != with_amount(Money).schema_hash
    assert with_amount(Money).schema_hash == with_amount(Money).schema_hash


def test_the_schema_hash_follows_the_type_of_a_column_without_windows() -> None:
    def of(kind: Any) -> FeatureSet:
        return FeatureSet("test", of=with_amount(kind).of, features=[Value("amount")])

    assert of(Whole).schema_hash != of(Money).schema_hash  # 100 times larger


@pytest.mark.parametrize("constant", ["WINDOW_RULE_VERSION", "MONEY_SCALE"])
def test_the_schema_hash_follows_the_rules(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declare, constant, 1000)
    assert replace(SET).schema_hash != SET.schema_hash


def test_the_schema_hash_ignores_how_it_is_written() -> None:
    """Lists or tuples, 24h or 1d in `delay`, the function's own identity."""
    assert with_view(features=tuple(VIEW.features)).schema_hash == SET.schema_hash
    assert with_view(delay="60m").schema_hash == SET.schema_hash
    other_object = replace(is_large, function=lambda amount: amount > 100_00)
    again = replace(SET, features=[Value("amount"), other_object, VIEW])
    assert again.schema_hash == SET.schema_hash


def test_the_schema_hash_is_the_same_in_every_process() -> None:
    code = "from tests.unit.test_declare import SET; print(SET.schema_hash)"
    for seed in ("0", "1", "random"):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.strip() == SET.schema_hash


def test_names_state_the_computation() -> None:
    assert SET.names == (
        "amount",
        "is_large",
        "shop_count_1d",
        "shop_count_7d",
        "shop_mean_amount_1d",
        "shop_risk_1d",
    )
    of_claims = replace(VIEW, features=[Count(source=Claim, over=("1d",))])
    assert of_claims.names == ("shop_count_claim_1d",)


def test_the_matrix_has_the_features_in_order() -> None:
    """`amount` is a column in cents and a feature in major units."""
    batch = EventBatch(
        {
            "amount": np.array([150_25, 99]),
            "shop_risk_1d": np.array([0.5, 0.25]),
            "shop_count_7d": np.array([3.0, 4.0]),
            "shop_count_1d": np.array([1.0, 2.0]),
            "shop_mean_amount_1d": np.array([7.0, np.nan]),
        }
    )
    matrix = SET.matrix(batch)
    assert matrix.dtype == np.float64 and matrix.flags.c_contiguous
    expected = [[150.25, 1, 1, 3, 7, 0.5], [0.99, 0, 2, 4, np.nan, 0.25]]
    np.testing.assert_array_equal(matrix, expected)
    assert SET.matrix(batch.take(slice(0, 0))).shape == (0, 6)


def test_the_table_has_every_feature_in_order() -> None:
    rows = SET.table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(SET.names)
    assert "| (t − 1h − 7d, t − 1h] | shop |" in rows[3]
    assert "count of Claim ÷ count of Sale" in rows[5]
    assert "mean of Sale.amount" in rows[4]
    assert "(t − 7d, t]" in with_view(delay="0ms").table().splitlines()[5]


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("0ms", 0),
        ("250ms", 250),
        ("10s", 10_000),
        ("5m", 300_000),
        ("12h", 43_200_000),
        ("30d", 2_592_000_000),
        ("007d", 604_800_000),
    ],
)
def test_durations(duration: str, expected: int) -> None:
    assert milliseconds(duration) == expected


@pytest.mark.parametrize(
    "duration", ["", "7", "d", "7 d", " 7d", "7d ", "-7d", "1.5h", "7D", "7days", "1h30m", "7d\n"]
)
def test_what_is_no_duration_is_explained(duration: str) -> None:
    with pytest.raises(ValueError, match="is not a duration: write a whole number and a unit out"):
        milliseconds(duration)


class Unkeyed(Event):
    event_time: EventTime
    shop: Number


class Timeless(Event):
    shop: Key


class Odd(Event):
    shop: Key
    event_time: EventTime
    ratio: Number


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "no window": (
        lambda: replace(VIEW, features=[Count()]),
        "'shop' declares no feature over any window",
    ),
    "a name twice in a view": (
        lambda: replace(VIEW, features=[Count(over=("1d",)), Count(over=("1d",))]),
        r"'shop' declares a name twice: \('shop_count_1d', 'shop_count_1d'\)",
    ),
    "a name twice in a set": (
        lambda: replace(SET, features=[Value("amount"), Value("amount")]),
        "'test' has a name twice",
    ),
    "a key that is no key": (
        lambda: FeatureView("v", "shop", of=Unkeyed, features=[Count(over=("1d",))]),
        "keyed by 'shop', but Unkeyed has no such key field",
    ),
    "a source without the key": (
        lambda: replace(VIEW, key="card"),
        "keyed by 'card', but Sale has no such key field",
    ),
    "no time": (
        lambda: FeatureView("v", "shop", of=Timeless, features=[Count(over=("1d",))]),
        "Timeless has no event_time, so it has no windows",
    ),
    "a float summed": (
        lambda: FeatureView("v", "shop", of=Odd, features=[Sum("ratio", over=("1d",))]),
        r"Sum needs an exact column \(Money or Whole\), and Odd\.ratio is not one",
    ),
    "a float at its largest": (
        lambda: FeatureView("v", "shop", of=Odd, features=[Max("ratio", over=("1d",))]),
        r"Max needs an exact column .* Odd\.ratio",
    ),
    "a column that is not there": (
        lambda: FeatureView("v", "shop", of=Odd, features=[Mean("amount", over=("1d",))]),
        r"Odd\.amount is not one",
    ),
    "a view of another event": (
        lambda: FeatureSet("s", of=Claim, features=[VIEW]),
        "'s' is of Claim, its view 'shop' of Sale; they must agree",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake: str) -> None:
    make, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make()


def test_stateless_functions_are_called_with_the_columns_they_name() -> None:
    @stateless()
    def difference(amount: Any, event_time: Any) -> Any:
        return amount - event_time

    assert isinstance(difference, Stateless)
    batch = EventBatch({"event_time": np.array([1, 2]), "amount": np.array([10, 20])})
    found = difference.evaluate(batch, Sale)
    assert found.tolist() == [9.0, 18.0] and found.dtype == np.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delay": "7 days"}, "'7 days' is not a duration"),
        ({"lateness": "soon"}, "'soon' is not a duration"),
        ({"resolution": "0ms"}, "longer than zero"),
        ({"features": [Count(over="1d")]}, r"over='1d' is one string; write over=\['1d'\]"),
        ({"features": [Count(over=["0d"])]}, "longer than zero"),
    ],
)
def test_a_view_that_cannot_be_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_view(**changes)
