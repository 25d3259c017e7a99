"""The decoder: every record is accepted, exactly, or refused, with its reason, and alone."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.events import (
    EARLIEST_EVENT_TIME,
    MAX_MONEY,
    Decoded,
    Event,
    EventDecoder,
    EventTime,
    Key,
    Money,
    Number,
    Refusal,
    Whole,
    column_kinds,
)
from features.fraud import SOURCES, FraudReport, Transaction
from tests.bad_input import (
    ACCEPTED,
    APPENDED,
    MAX_BYTES,
    MAX_SKEW_MS,
    REFUSED,
    Case,
    report,
    transaction,
    wire,
)

TOPICS = {"transactions": SOURCES.index(Transaction), "fraud_reports": SOURCES.index(FraudReport)}
DECODER = EventDecoder(SOURCES, max_clock_skew_ms=MAX_SKEW_MS, max_bytes=MAX_BYTES)
SETTINGS = settings(max_examples=200, deadline=None)


def decode(records: list[tuple[bytes | None, int]], appended: list[int] | None = None) -> Decoded:
    """Decode (value, source) pairs."""
    return DECODER(
        [value for value, _ in records],
        np.array([source for _, source in records], np.uint8),
        np.array(appended or [APPENDED] * len(records), np.int64),
    )


def rows_of(decoded: Decoded) -> dict[int, dict[str, Any]]:
    """Return input row → column → value."""
    columns = {name: decoded.events[name].tolist() for name in decoded.events}
    return {
        row: {name: column[i] for name, column in columns.items()}
        for i, row in enumerate(decoded.rows.tolist())
    }


# The list of bad input, each record alone and all of them together


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_bad_input_is_refused_with_its_reason(case: Case) -> None:
    decoded = decode([(case.value, TOPICS[case.topic])])
    assert len(decoded.events) == len(decoded.rows) == 0
    (refusal,) = decoded.refused
    assert refusal.row == 0
    assert refusal.reason == case.reason, refusal
    assert case.detail in refusal.detail
    assert refusal.detail


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_odd_input_is_accepted(case: Case) -> None:
    decoded = decode([(case.value, TOPICS[case.topic])])
    assert decoded.refused == []
    (row,) = rows_of(decoded).values()
    assert case.value is not None
    assert row == blank() | columns_of(json.loads(case.value.decode(errors="replace")))


def test_bad_input_leaves_its_neighbours_alone() -> None:
    """All cases in one batch: each has the outcome that it has alone."""
    good = Case("good", wire(transaction(card_id="neighbour")), None)
    cases = [case for bad in REFUSED for case in (good, bad)] + ACCEPTED
    decoded = decode([(case.value, TOPICS[case.topic]) for case in cases])
    reasons = {refusal.row: refusal.reason for refusal in decoded.refused}
    assert [reasons.get(row) for row in range(len(cases))] == [case.reason for case in cases]
    found = rows_of(decoded)
    for row, case in enumerate(cases):
        if case.reason is None:
            (alone,) = rows_of(decode([(case.value, TOPICS[case.topic])])).values()
            assert found[row] == alone, case.name


# An oracle: the rules once more, on what the standard library reads


def blank() -> dict[str, Any]:
    columns = {k: v for event in SOURCES for k, v in column_kinds(event).items()}
    return {name: b"" if kind == "key" else 0 for name, kind in columns.items()}


def columns_of(document: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a good event."""
    columns: dict[str, Any] = {}
    for name in blank():
        if name in document:
            value = document[name]
            if name == "amount":
                columns[name] = int((Decimal(repr(value)) * 100).to_integral_value())
            else:
                columns[name] = value.encode() if isinstance(value, str) else value
    return columns


def is_good(document: Any, event: type[Event], appended: int) -> bool:
    if not isinstance(document, dict):
        return False
    for name, kind in column_kinds(event).items():
        value = document.get(name)
        if kind == "key":
            if not (isinstance(value, str) and 1 <= len(value) <= 64 and value.isprintable()):
                return False
        elif kind == "time":
            if type(value) is not int:
                return False
            if not EARLIEST_EVENT_TIME <= value <= appended + MAX_SKEW_MS:
                return False
        else:
            if type(value) not in (int, float) or not math.isfinite(value):
                return False
            cents = Decimal(repr(value)) * 100
            if not 0 <= value <= MAX_MONEY or abs(cents - round(cents)) > Decimal("0.001"):
                return False
    return True


MOSTLY_GOOD_KEYS = st.text("abcC019é卡💳", min_size=1, max_size=12) | st.text(max_size=70)
TIMES = st.integers(APPENDED - 10**9, APPENDED) | st.integers(-(2**70), 2**70)
AMOUNTS = (
    st.integers(0, 10**11).map(lambda cents: cents / 100)
    | st.integers(0, 10**6)
    | st.floats(allow_nan=True)
)
ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just([1])
REMOVED = st.just(...)


def documents(event: type[Event]) -> st.SearchStrategy[Any]:
    good = {"key": MOSTLY_GOOD_KEYS, "time": TIMES, "money": AMOUNTS}
    fields = {name: good[kind] for name, kind in column_kinds(event).items()}
    make = transaction if event is Transaction else report
    changes = st.fixed_dictionaries({}, optional=fields)
    spoiled = st.fixed_dictionaries({}, optional=dict.fromkeys(fields, ANYTHING | REMOVED))
    return st.builds(lambda a, b: make(**a, **b), changes, st.just({})) | st.builds(
        lambda a, b: make(**(a | b)), changes, spoiled
    )


DOCUMENTS = st.sampled_from(range(len(SOURCES))).flatmap(
    lambda source: st.tuples(documents(SOURCES[source]), st.just(source))
)
SKEWS = st.integers(-(10**9), 10**9)


@SETTINGS
@given(st.lists(st.tuples(DOCUMENTS, SKEWS), max_size=12))
def test_accepted_are_exactly_the_good_and_read_as_the_standard_library_reads_them(
    drawn: list[tuple[tuple[Any, int], int]],
) -> None:
    records = [(wire(document), source) for (document, source), _ in drawn]
    appended = [APPENDED + skew for _, skew in drawn]
    decoded = decode(records, appended)
    expected = {
        row: blank() | columns_of({k: document[k] for k in column_kinds(SOURCES[source])})
        for row, (((document, source), _), time) in enumerate(zip(drawn, appended, strict=True))
        if is_good(document, SOURCES[source], time)
    }
    assert rows_of(decoded) == expected


# Fuzz: anything at all

VALID = [case.value for case in ACCEPTED if case.value is not None and len(case.value) < 1000]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid record with some bytes replaced, removed, inserted, or a stretch repeated."""
    value = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(value) - 1, 0)))
        until = at + draw(st.integers(0, 4))
        value[at:until] = draw(
            st.binary(max_size=3)
            | st.sampled_from(
                [b"\0", b"\xff", b'"', b"{", b"}", b",", b"\\u", b"e9", b"-", b"null"]
            )
            | st.just(bytes(value[at : at + 40]))
        )
    return bytes(value)


VALUES = st.none() | st.binary(max_size=40) | mutated() | st.sampled_from(VALID)
RECORDS = st.lists(st.tuples(VALUES, st.integers(0, len(SOURCES) - 1)), max_size=16)


@settings(max_examples=400, deadline=None)
@given(RECORDS)
def test_any_bytes_are_accepted_or_refused_once_each_as_if_alone(
    records: list[tuple[bytes | None, int]],
) -> None:
    decoded = decode(records)
    refused = [refusal.row for refusal in decoded.refused]
    assert sorted([*decoded.rows.tolist(), *refused]) == list(range(len(records)))
    assert decoded.rows.tolist() == sorted(decoded.rows.tolist())
    assert refused == sorted(refused)
    together = rows_of(decoded)
    for row, record in enumerate(records):
        alone = decode([record])
        if alone.refused:
            (why,) = alone.refused
            assert Refusal(row, why.reason, why.detail) in decoded.refused
        else:
            assert together[row] == rows_of(alone)[0]
            event = SOURCES[record[1]]
            document = json.loads((record[0] or b"").decode(errors="replace"))
            assert is_good(document, event, APPENDED)
            fields = {name: document[name] for name in column_kinds(event)}
            assert together[row] == blank() | columns_of(fields)


@SETTINGS
@given(st.lists(st.integers(0, 10**11), min_size=1, max_size=50), st.booleans())
def test_two_decimals_are_exact(cents: list[int], as_text: bool) -> None:
    def written(amount: int) -> bytes:
        if as_text:
            return b"%d.%02d" % divmod(amount, 100)
        return json.dumps(amount / 100).encode()

    template = wire(transaction(amount=12345))
    values = [template.replace(b"12345", written(amount)) for amount in cents]
    decoded = decode([(value, TOPICS["transactions"]) for value in values])
    assert decoded.refused == []
    assert decoded.events["amount"].dtype == np.int64
    assert decoded.events["amount"].tolist() == cents


@SETTINGS
@given(st.integers(0, 10**12 - 1).filter(lambda mills: mills % 10), st.booleans())
def test_three_decimals_are_refused(mills: int, as_text: bool) -> None:
    written = b"%d.%03d" % divmod(mills, 1000) if as_text else json.dumps(mills / 1000).encode()
    value = wire(transaction(amount=12345)).replace(b"12345", written)
    decoded = decode([(value, TOPICS["transactions"])])
    assert [refusal.reason for refusal in decoded.refused] == ["invalid_money"]


def test_the_verdict_depends_on_the_brokers_time_not_on_the_clock() -> None:
    """A record of the year 2100 is fine in a topic of the year 2100."""
    later = APPENDED + 82 * 365 * 86_400_000
    record = (wire(transaction(event_time=later)), TOPICS["transactions"])
    assert decode([record], [later]).refused == []
    assert [r.reason for r in decode([record], [APPENDED]).refused] == ["time_in_future"]
    # Each record by its own time.
    both = decode([record, record], [APPENDED, later])
    assert both.rows.tolist() == [1]


def test_nothing_in_nothing_out() -> None:
    decoded = decode([])
    assert len(decoded.events) == 0
    assert decoded.refused == []
    assert set(decoded.events) == blank().keys()


@pytest.mark.parametrize("bad", [False, True])
def test_columns_have_the_declared_dtypes(bad: bool) -> None:
    records: list[tuple[bytes | None, int]] = [(wire(report()), 0), (wire(transaction()), 1)]
    decoded = decode(records + [(b"?", 0)] * bad)
    kinds = {k: v for event in SOURCES for k, v in column_kinds(event).items()}
    for name, kind in kinds.items():
        column = decoded.events[name]
        assert column.dtype.kind == "S" if kind == "key" else column.dtype == np.int64


# Declarations


class Reading(Event):
    sensor: Key
    event_time: EventTime
    value: Number
    level: Whole


def test_numbers_and_whole_numbers() -> None:
    decoder = EventDecoder([Reading, Transaction])
    reading = {"sensor": "s", "event_time": APPENDED, "value": -1.25e-3, "level": -(2**53)}
    decoded = decoder(
        [wire(reading), wire(reading | {"level": 2**53 + 1}), wire(transaction())],
        np.array([0, 0, 1], np.uint8),
        np.full(3, APPENDED),
    )
    assert decoded.events["value"].tolist()[0] == -1.25e-3
    assert np.isnan(decoded.events["value"][1])  # a transaction has none
    assert decoded.events["level"].tolist() == [-(2**53), 0]
    assert [(r.row, r.reason) for r in decoded.refused] == [(1, "invalid")]


def test_a_plain_annotation_is_refused_with_the_types_to_use() -> None:
    class Careless(Event):
        event_time: int

    with pytest.raises(TypeError, match=r"Careless\.event_time: use one of .*Key, EventTime"):
        column_kinds(Careless)


def test_event_types_must_agree_about_a_column() -> None:
    class Other(Event):
        event_time: EventTime
        amount: Whole

    with pytest.raises(TypeError, match="amount is a whole column.* as money; rename one"):
        EventDecoder([Transaction, Other])


def test_money_and_number_may_be_declared_alike() -> None:
    """Kinds go by annotation, not by Python type: Money and Number are both floats."""

    class Both(Event):
        event_time: EventTime
        price: Money
        ratio: Number

    assert column_kinds(Both) == {"event_time": "time", "price": "money", "ratio": "number"}
