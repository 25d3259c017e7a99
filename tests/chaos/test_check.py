"""The judge of the kill matrix, on made-up runs: what is wrong with them it must say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from features.fraud import FRAUD
from tests.chaos.check import Facts, Life, check, replayed
from tests.chaos.load import Item
from tests.chaos.reader import Place, Record
from tests.handbook_day import DAY

TOPICS = {
    name: name for name in ("transactions", "fraud_reports", "predictions", "audit", "dead_letters")
}
COUNT = 20
IN: Place = ("transactions", 0)


def transaction(n: int) -> Item:
    event = {"transaction_id": f"t{n}", "card_id": "C0001", "terminal_id": "T0001"}
    event |= {"event_time": DAY + 1000 * n, "amount": 10.5}  # type: ignore[dict-item]
    return Item("transactions", b"C0001", json.dumps(event).encode(), f"t{n}", DAY + 1000 * n)


@pytest.fixture(scope="module")
def good(window_state: Path) -> Facts:
    """A run in which all is well: each event at its own offset, the last record is no event."""
    sent = [transaction(n) for n in range(COUNT)] + [Item("transactions", b"C", b"no", None, DAY)]
    read = [Record("transactions", 0, n, item.value, {}) for n, item in enumerate(sent)]
    vectors = replayed(sent, window_state)
    predictions, audit = [], []
    for n in range(COUNT):
        header: dict[str, bytes | None] = {"event_id": b"t%d" % n}
        body: dict[str, object] = {"transaction_id": f"t{n}", "score": n / 100}
        origin = {"origin": b"transactions/0/%d" % n}
        predictions.append(Record("predictions", 0, n, json.dumps(body).encode(), header | origin))
        values = np.frombuffer(vectors[f"t{n}"]).tolist()
        vector = dict(zip(FRAUD.names, values, strict=True))
        seen = {"features": vector, "topic": "transactions", "partition": 0, "offset": n}
        audit.append(Record("audit", 0, n, json.dumps(body | seen).encode(), header))
    headers = {"dlq.topic": b"transactions", "dlq.partition": b"0", "dlq.offset": b"%d" % COUNT}
    letter = Record("dead_letters", 0, 0, b"no", dict(headers))
    records = {"transactions": read, "fraud_reports": [], "predictions": predictions,
               "audit": audit, "dead_letters": [letter]}  # fmt: skip
    # The first life wrote offsets 0 to 9, the second went on reading at 8.
    lives = [
        Life({}, {}),
        Life({IN: 8}, {("predictions", 0): 10, ("audit", 0): 10, ("dead_letters", 0): 0}),
    ]
    return Facts(True, TOPICS, sent, records, lives, window_state, together=True)


def with_records(facts: Facts, name: str, records: list[Record]) -> Facts:
    return replace(facts, records={**facts.records, name: records})


def shifted(records: list[Record], *more: Record) -> list[Record]:
    """Append records at the offsets that come next."""
    return records + [r._replace(offset=len(records) + n) for n, r in enumerate(more)]


def without(name: str, row: int) -> Callable[[Facts], Facts]:
    return lambda facts: with_records(
        facts, name, [r for n, r in enumerate(facts.records[name]) if n != row]
    )


def again(name: str, row: int) -> Callable[[Facts], Facts]:
    def change(facts: Facts) -> Facts:
        records = list(facts.records[name])
        return with_records(facts, name, shifted(records, records[row]))

    return change


def changed(name: str, row: int, old: bytes, new: bytes) -> Callable[[Facts], Facts]:
    def change(facts: Facts) -> Facts:
        records = list(facts.records[name])
        value = records[row].value
        assert value is not None and old in value
        records[row] = records[row]._replace(value=value.replace(old, new))
        return with_records(facts, name, records)

    return change


def moved(name: str, row: int, origin: bytes) -> Callable[[Facts], Facts]:
    def change(facts: Facts) -> Facts:
        records = list(facts.records[name])
        records[row] = records[row]._replace(headers=records[row].headers | {"origin": origin})
        return with_records(facts, name, records)

    return change


def test_a_good_run_is_good(good: Facts) -> None:
    verdict = check(good)
    assert verdict.violations == []
    assert (verdict.events, verdict.bad, verdict.predictions) == (COUNT, 1, COUNT)
    assert check(replace(good, exactly_once=False)).violations == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("predictions", 3), "predictions missing: t3"),
        (without("audit", 19), "audit missing: t19"),
        (without("dead_letters", 0), "dead_letters missing: transactions/0/20"),
        (without("transactions", 4), "were sent"),
        (again("predictions", 3), "predictions doubled: t3"),
        (again("audit", 3), "audit doubled: t3"),
        (again("dead_letters", 0), "dead_letters doubled: transactions/0/20"),
        (changed("predictions", 0, b"t0", b"t99"), "predictions of nothing that was sent"),
        (changed("dead_letters", 0, b"no", b"on"), "dead letters are not the record refused"),
        (changed("audit", 5, b'"amount": 10.5', b'"amount": 10.500000000000002'), "t5 ['amount']"),
        (changed("audit", 5, b'"offset": 5', b'"offset": 6'), "audit records are not of the event"),
        (changed("predictions", 5, b"0.05", b"0.5"), "predictions have another score than was aud"),
        (moved("predictions", 5, b"transactions/1/5"), "predictions are not of the event that"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(change: Callable[[Facts], Facts], says: str, good: Facts) -> None:
    violations = check(change(good)).violations
    assert any(says in violation for violation in violations), violations


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (9, None),  # written by the first life, and within what the second one replayed
        (8, None),
        (7, "predictions repeated outside of replayed epochs: t7"),
        (12, "predictions doubled within one life: t12"),
    ],
)
def test_repeats_are_for_replayed_epochs(row: int, says: str | None, good: Facts) -> None:
    verdict = check(again("predictions", row)(replace(good, exactly_once=False)))
    assert verdict.repeated == 1
    assert [v for v in verdict.violations if v] == ([] if says is None else [f"1 {says}"])


def test_terminals_are_left_out_when_a_run_fell_behind(good: Facts) -> None:
    old = json.dumps(json.loads(good.of("audit")[2].value or b"")["features"]["terminal_count_1d"])
    change = changed(
        "audit", 2, b'"terminal_count_1d": %s' % old.encode(), b'"terminal_count_1d": 999.0'
    )
    assert "terminal_count_1d" in "".join(check(change(good)).violations)
    assert check(change(replace(good, together=False))).violations == []
