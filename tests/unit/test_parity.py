"""The audit of online against offline features: what counts as equal, late, wrong, missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from features import parity
from features.batch import EventBatch
from features.events import Event
from features.fraud import FRAUD, SOURCES, FraudReport, Transaction
from features.parity import Audited, Events, audit, compare, replay

DAY = 86_400_000
START = 17_700 * DAY


def transactions(rows: Sequence[tuple[str, int, int]]) -> Events:
    """(card, event time, append time) of each, in order of offset on one partition."""
    n = len(rows)
    columns = {
        "transaction_id": np.array([f"tx{i}".encode() for i in range(n)]),
        "card_id": np.array([card.encode() for card, _, _ in rows]),
        "terminal_id": np.array([b"T1"] * n),
        "event_time": np.array([START + time for _, time, _ in rows]),
        "amount": np.arange(100, 100 + n),
        "partition": np.array([int(card[1]) for card, _, _ in rows], np.int32),
        "offset": np.arange(n),
        "append_time": np.array([START + appended for _, _, appended in rows]),
    }
    return Events(Transaction, EventBatch(columns), from_topic=True)


NO_REPORTS = Events(
    FraudReport,
    EventBatch(
        {
            "transaction_id": np.empty(0, "S1"),
            "terminal_id": np.empty(0, "S1"),
            "event_time": np.empty(0, np.int64),
            "report_time": np.empty(0, np.int64),
            "partition": np.empty(0, np.int32),
            "offset": np.empty(0, np.int64),
            "append_time": np.empty(0, np.int64),
        }
    ),
    from_topic=True,
)


def audited_by_the_stream(events: Events, **changes: float) -> list[Audited]:
    """What a flow would have written that took the events in order of append."""
    answers = replay(FRAUD, [events, NO_REPORTS], SOURCES, by_arrival=True)
    matrix = FRAUD.matrix(answers)
    records = []
    for i in range(len(answers)):
        vector = dict(zip(FRAUD.names, matrix[i].tolist(), strict=True))
        records.append(
            Audited(
                transaction_id=answers["transaction_id"][i].decode(),
                card_id=answers["card_id"][i].decode(),
                partition=int(answers["partition"][i]),
                offset=int(answers["offset"][i]),
                schema_hash=FRAUD.schema_hash,
                features={k: None if v != v else v for k, v in (vector | changes).items()},
            )
        )
    return records


def inputs(events: Events) -> dict[type[Event], Events]:
    return {Transaction: events, FraudReport: NO_REPORTS}


IN_ORDER = transactions([("c0", 0, 0), ("c1", 1000, 1000), ("c0", 2000, 2000), ("c0", 2000, 2001)])
#: The second of c0 reached the broker before the first of c1 – on another partition – and c0's
#: own third one, which happened before it, arrived after it from a terminal on partition 1.
LATE = Events(
    Transaction,
    EventBatch(
        transactions([("c0", 0, 0), ("c0", 2000, 2000), ("c0", 1000, 9000)]).batch.columns
        | {"partition": np.array([0, 0, 1], np.int32)}
    ),
    from_topic=True,
)


def test_equal_is_equal() -> None:
    results = audit(audited_by_the_stream(IN_ORDER), inputs(IN_ORDER))
    assert [r.name for r in results] == list(FRAUD.names)
    assert all((r.compared, r.mismatched, r.missing, r.late) == (4, 0, 0, 0) for r in results)


def test_late_arrivals_are_told_from_mismatches() -> None:
    results = {r.name: r for r in audit(audited_by_the_stream(LATE), inputs(LATE))}
    assert results["card_count_1d"].late == 1  # tx1 was answered before tx2 was known
    assert all(r.mismatched == 0 for r in results.values())


def test_a_wrong_value_is_a_mismatch_even_where_events_were_late() -> None:
    wrong = audited_by_the_stream(LATE, card_count_1d=7.0)
    results = {r.name: r for r in audit(wrong, inputs(LATE))}
    assert results["card_count_1d"].mismatched == 3
    assert results["card_count_1d"].largest_difference == 6.0
    assert results["card_count_7d"].mismatched == 0


def test_an_audited_card_must_be_audited_throughout() -> None:
    records = audited_by_the_stream(IN_ORDER)
    del records[2]
    assert {r.missing for r in audit(records, inputs(IN_ORDER))} == {1}
    # c1 was not chosen for the audit at all: nothing of it is missing.
    records = [record for record in audited_by_the_stream(IN_ORDER) if record.card_id == "c0"]
    assert {r.missing for r in audit(records, inputs(IN_ORDER))} == {0}


def test_an_unknown_event_cannot_be_judged() -> None:
    records = audited_by_the_stream(IN_ORDER)
    records[0].offset = 99
    with pytest.raises(ValueError, match="tx0 .0/99. was audited, but is not among the events"):
        audit(records, inputs(IN_ORDER))


def test_another_schema_cannot_be_judged() -> None:
    records = audited_by_the_stream(IN_ORDER)
    records[1].schema_hash = "feedbeef"
    with pytest.raises(ValueError, match=r"schema feedbeef.*run the version that wrote it"):
        audit(records, inputs(IN_ORDER))


def test_bits_are_compared() -> None:
    online = np.array([[0.1 + 0.2, -0.0, np.nan, np.nan]])
    offline = np.array([[0.3, 0.0, np.nan, 1.0]])
    results = compare(["sum", "zero", "both", "one"], online, offline)
    assert [r.mismatched for r in results] == [1, 1, 0, 1]
    assert results[3].largest_difference == np.inf


@pytest.mark.parametrize(
    ("lines", "code"), [("all", 0), ("one wrong", 1), ("none", 2), ("broken", 2)]
)
def test_the_command_tells_by_its_exit_code(
    lines: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Topics are read by a program that prints JSON lines; here, one that prints a file."""
    batch = IN_ORDER.batch
    with (tmp_path / "transactions").open("w") as file:
        for i in range(len(batch)):
            event = {n: batch[n][i].decode() for n in ("transaction_id", "card_id", "terminal_id")}
            event |= {"event_time": int(batch["event_time"][i])}
            event |= {"amount": int(batch["amount"][i]) / 100}
            record = {n: int(batch[n][i]) for n in ("partition", "offset", "append_time")}
            file.write(json.dumps(record | {"value": b64(json.dumps(event))}) + "\n")
    (tmp_path / "fraud_reports").write_text("")
    changes = {"card_mean_amount_30d": 5.0} if lines == "one wrong" else {}
    records = audited_by_the_stream(IN_ORDER, **changes) if lines != "none" else []
    audit_file = tmp_path / "audit.jsonl"
    audit_file.write_bytes(b"\n".join(parity.msgspec.json.encode(r) for r in records))
    reader = tmp_path / "reader.py"
    reader.write_text("import sys, pathlib; print(pathlib.Path(sys.argv[1]).read_text(), end='')")
    transactions_source = "kafka:nowhere" if lines == "broken" else f"kafka:{tmp_path}/transactions"
    arguments = ["--audit", str(audit_file), "--transactions", transactions_source]
    arguments += ["--fraud-reports", f"kafka:{tmp_path}/fraud_reports"]
    assert parity.main([*arguments, "--reader", f"{sys.executable} {reader}"]) == code
    shown = capsys.readouterr()
    if lines == "broken":
        assert "nowhere failed with exit code 1" in shown.err
    else:
        assert "card_mean_amount_30d" in shown.out or lines == "none"


def b64(text: str) -> str:
    import base64

    return base64.b64encode(text.encode()).decode()
