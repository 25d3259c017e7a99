"""Every kind of bad input, with the reason it must be refused for; and odd input that is fine.

Used on the decoder alone and on the real flow. All records are appended at `APPENDED`.
"""

import json
from dataclasses import dataclass
from typing import Any

from features.profiles import parse_day

#: The broker's time of every record, and the furthest ahead of it an event may be.
APPENDED = parse_day("2018-08-08") + 12 * 3_600_000
MAX_SKEW_MS = 300_000
MAX_BYTES = 65_536


@dataclass(frozen=True)
class Case:
    """A record's value; refused for `reason`, the detail contains `detail`; or accepted (None)."""

    name: str
    value: bytes | None
    reason: str | None
    detail: str = ""
    topic: str = "transactions"


def transaction(**changes: Any) -> dict[str, Any]:
    """Return a good transaction with some members changed; `...` leaves a member out."""
    plain = {
        "transaction_id": "tx0000001",
        "card_id": "C0001",
        "terminal_id": "T0001",
        "event_time": APPENDED - 1000,
        "amount": 27.9,
    }
    return {name: value for name, value in (plain | changes).items() if value is not ...}


def report(**changes: Any) -> dict[str, Any]:
    """Return a good fraud report, like `transaction`."""
    plain = {
        "transaction_id": "tx0000001",
        "terminal_id": "T0001",
        "event_time": APPENDED - 86_400_000,
        "report_time": APPENDED - 1000,
    }
    return {name: value for name, value in (plain | changes).items() if value is not ...}


def wire(event: Any) -> bytes:
    """Encode as a careless producer would: ``json.dumps`` also writes NaN and Infinity."""
    return json.dumps(event).encode()


def _with(name: str, raw: bytes) -> bytes:
    """Return a good transaction whose member `name` is written as `raw`."""
    return wire(transaction(**{name: "\0"})).replace(rb'"\u0000"', raw)


FIELDS = {"transactions": transaction(), "fraud_reports": report()}

REFUSED = [
    Case("tombstone", None, "tombstone"),
    Case("empty", b"", "empty"),
    Case("white space", b" \n", "not_json"),
    Case("not JSON", b"hello", "not_json"),
    Case("cut off", wire(transaction())[:-5], "not_json"),
    Case("two objects", wire(transaction()) * 2, "not_json"),
    Case("XML", b"<transaction/>", "not_json"),
    Case("binary", bytes(range(256)), "not_json"),
    Case("byte order mark", b"\xef\xbb\xbf" + wire(transaction()), "not_json"),
    Case("UTF-16", json.dumps(transaction()).encode("utf-16"), "not_json"),
    Case("single quotes", str(transaction()).encode(), "not_json"),
    Case("a bare null", b"null", "invalid", "Expected `object`, got `null`"),
    Case("a list", wire([transaction()]), "invalid", "Expected `object`, got `array`"),
    Case("a string", wire("tx"), "invalid", "Expected `object`, got `str`"),
    Case("deep nesting", b'{"a":' * 10_000, "not_json"),
    Case("deep nesting, ignored", _with("note", b"[" * 20_000 + b"]" * 20_000), "not_json"),
    Case("NaN", wire(transaction(amount=float("nan"))), "not_json"),
    Case("Infinity", wire(transaction(amount=float("inf"))), "not_json"),
    Case("-Infinity", wire(transaction(amount=float("-inf"))), "not_json"),
    Case("NaN as a string", wire(transaction(amount="NaN")), "invalid", "$.amount"),
    Case("beyond a double", _with("amount", b"1e400"), "invalid", "$.amount"),
    Case("negative amount", wire(transaction(amount=-0.01)), "invalid", "$.amount"),
    Case("huge amount", wire(transaction(amount=1e9 + 1)), "invalid", "$.amount"),
    Case("huge whole amount", _with("amount", b"9" * 400), "invalid", "$.amount"),
    Case("three decimals", wire(transaction(amount=1.005)), "invalid_money", "1.005"),
    Case("a tiny amount", wire(transaction(amount=0.001)), "invalid_money", "$.amount"),
    Case("amount in a string", wire(transaction(amount="27.9")), "invalid", "$.amount"),
    Case("amount true", wire(transaction(amount=True)), "invalid", "$.amount"),
    Case("amount null", wire(transaction(amount=None)), "invalid", "$.amount"),
    Case("amount in a list", wire(transaction(amount=[27.9])), "invalid", "$.amount"),
    Case("twice, once wrong", b'{"amount": "x", ' + wire(transaction())[1:], "invalid", "amount"),
    Case("time in a string", wire(transaction(event_time=str(APPENDED))), "invalid", "event_time"),
    Case("time with a point", wire(transaction(event_time=APPENDED / 1)), "invalid", "event_time"),
    Case("time true", wire(transaction(event_time=True)), "invalid", "$.event_time"),
    Case("time null", wire(transaction(event_time=None)), "invalid", "$.event_time"),
    Case("huge time", wire(transaction(event_time=10**30)), "invalid", "$.event_time"),
    Case("time beyond int64", wire(transaction(event_time=2**63)), "invalid", "$.event_time"),
    Case(
        "seconds",
        wire(transaction(event_time=APPENDED // 1000)),
        "time_too_early",
        "looks like seconds",
    ),
    Case("1970", wire(transaction(event_time=0)), "time_too_early", "before 2000"),
    Case("before 1970", wire(transaction(event_time=-1)), "time_too_early"),
    Case("just before 2000", wire(transaction(event_time=946_684_799_999)), "time_too_early"),
    Case(
        "just beyond the skew",
        wire(transaction(event_time=APPENDED + MAX_SKEW_MS + 1)),
        "time_in_future",
        "300.001 s ahead",
    ),
    Case("year 3000", wire(transaction(event_time=32_503_680_000_000)), "time_in_future"),
    Case("microseconds", wire(transaction(event_time=APPENDED * 1000)), "time_in_future"),
    Case("empty key", wire(transaction(card_id="")), "invalid", "$.card_id"),
    Case("long key", wire(transaction(card_id="C" * 65)), "invalid", "$.card_id"),
    Case("long key, not ASCII", wire(transaction(card_id="é" * 65)), "invalid", "$.card_id"),
    Case("whole number for a key", wire(transaction(card_id=17)), "invalid", "$.card_id"),
    Case("true for a key", wire(transaction(card_id=True)), "invalid", "$.card_id"),
    Case("NUL in a key", wire(transaction(card_id="C\0")), "invalid_key", "$.card_id"),
    Case("NUL alone", wire(transaction(card_id="\0")), "invalid_key", "$.card_id"),
    Case("line break in a key", wire(transaction(terminal_id="T\n1")), "invalid_key", "terminal"),
    Case("DEL in a key", wire(transaction(card_id="C\x7f")), "invalid_key", "$.card_id"),
    Case("raw control in a key", _with("card_id", b'"C\x01"'), "not_json"),
    Case("lone surrogate", _with("card_id", rb'"\ud800"'), "not_json", "surrogate"),
    Case("invalid UTF-8", _with("card_id", b'"C\xff"'), "not_utf8"),
    Case("overlong UTF-8", _with("card_id", b'"\xc0\xaf"'), "not_utf8"),
    Case("10 MB", wire(transaction(note="x" * 10_000_000)), "too_large", "10000"),
    Case("a byte too long", wire(transaction()).ljust(MAX_BYTES + 1), "too_large", "65537 bytes"),
    *(
        Case(f"{topic} without {name}", wire(event | {}), "invalid", f"`{name}`", topic)
        for topic, complete in FIELDS.items()
        for name in complete
        for event in [{k: v for k, v in complete.items() if k != name}]
    ),
    Case(
        "a report of the far future",
        wire(report(report_time=APPENDED + 3_600_000)),
        "time_in_future",
        "$.report_time",
        "fraud_reports",
    ),
    Case(
        "a report about the far future",
        wire(report(event_time=APPENDED + 3_600_000)),
        "time_in_future",
        "$.event_time",
        "fraud_reports",
    ),
    Case(
        "a report in seconds",
        wire(report(event_time=APPENDED // 1000)),
        "time_too_early",
        "looks like seconds",
        "fraud_reports",
    ),
    Case("a transaction among the reports", wire(transaction()), "invalid", topic="fraud_reports"),
    Case("a report among the transactions", wire(report()), "invalid"),
    Case("a report's tombstone", None, "tombstone", topic="fraud_reports"),
]

ACCEPTED = [
    Case("plain", wire(transaction()), None),
    Case("unknown members", wire(transaction(note={"a": [1, None, "é"]}, ip="::1")), None),
    Case("a member twice: the last counts", b'{"amount": 1, ' + wire(transaction())[1:], None),
    Case("invalid UTF-8 where nobody looks", _with("note", b'"\xff"'), None),
    Case("any order", wire(dict(reversed(transaction().items()))), None),
    Case("white space", b"\n " + json.dumps(transaction(), indent=4).encode() + b"\r\n\t", None),
    Case("as long as may be", wire(transaction()).ljust(MAX_BYTES), None),
    Case("whole amount", wire(transaction(amount=27)), None),
    Case("no amount", wire(transaction(amount=0)), None),
    Case("minus zero", _with("amount", b"-0.0"), None),
    Case("exponent", _with("amount", b"2790e-2"), None),
    Case("float noise", wire(transaction(amount=0.1 + 0.2)), None),
    Case("largest amount", wire(transaction(amount=999_999_999.99)), None),
    Case("keys of other scripts", wire(transaction(card_id="карта-卡-é")), None),
    Case("raw UTF-8", json.dumps(transaction(card_id="卡"), ensure_ascii=False).encode(), None),
    Case("emoji in a surrogate pair", wire(transaction(card_id="💳")), None),
    Case("longest key", wire(transaction(card_id="💳" * 64)), None),
    Case("spaces in a key", wire(transaction(card_id=" C 1 ")), None),
    Case("as far ahead as may be", wire(transaction(event_time=APPENDED + MAX_SKEW_MS)), None),
    Case("2000", wire(transaction(event_time=946_684_800_000)), None),
    Case("report", wire(report()), None, topic="fraud_reports"),
    Case(
        "report of an unknown transaction, card and terminal",
        wire(report(transaction_id="tx-never-seen", terminal_id="T-never-seen")),
        None,
        topic="fraud_reports",
    ),
]
