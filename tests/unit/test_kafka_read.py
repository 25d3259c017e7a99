"""A topic is printed as text for people, and as base64 for programs; one JSON object a line."""

import json
import sys
from typing import Any

import pytest
from confluent_kafka import Message

from dataflows.kafka import read

WHERE = {"topic": "t", "partition": 3, "offset": 7, "append_time": 99}
PREDICTION = b'{"transaction_id": "tx1", "score": 0.10, "id": 12345678901234567890123}'


def record(
    value: bytes | None, key: bytes | None = b"C1", headers: list[tuple[str, Any]] | None = None
) -> Message:
    return Message(
        topic="t", partition=3, offset=7, key=key, value=value, headers=headers, timestamp=(2, 99)
    )


def printed(
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    message: Message,
    *options: str,
) -> bytes:
    monkeypatch.setattr(read, "read_topic", lambda topic, config: iter([message]))
    assert read.main(["t", "--bootstrap-servers", "unused", *options]) == 0
    sys.stdout.flush()
    (line,) = capfdbinary.readouterr().out.splitlines()
    return line


def test_a_prediction_can_be_read(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    message = record(PREDICTION, headers=[("event_id", b"tx1")])
    line = printed(monkeypatch, capfdbinary, message, "--text")
    assert json.loads(line) == {
        **WHERE,
        "key": "C1",
        "headers": [{"name": "event_id", "value": "tx1"}],
        "value": json.loads(PREDICTION),
    }
    assert b"0.10" in line and b"12345678901234567890123" in line  # as they were written


def test_programs_get_the_bytes(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    line = printed(monkeypatch, capfdbinary, record(b"{}", headers=[("a", b"b")]))
    assert json.loads(line) == {**WHERE, "key": "QzE=", "value": "e30="}


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (None, {"value": None}),
        (b"", {"value": ""}),
        ("größer".encode(), {"value": "größer"}),
        (b"\xff\x00", {"value_base64": "/wA="}),
        (b'{"a": "\xff"}', {"value_base64": "eyJhIjogIv8ifQ=="}),
        (b'{"a":\n [1,\n 2]}', {"value": {"a": [1, 2]}}),
        (b"[1, 2]", {"value": "[1, 2]"}),
        (b"17", {"value": "17"}),
        (b'{"a": NaN}', {"value": '{"a": NaN}'}),
        (b'{"a":' * 9999, {"value": '{"a":' * 9999}),
    ],
)
def test_text_where_it_is_text(
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    content: bytes | None,
    shown: dict[str, Any],
) -> None:
    line = json.loads(printed(monkeypatch, capfdbinary, record(content), "--text"))
    assert {name: line[name] for name in line if name.startswith("value")} == shown


def test_keys_and_headers_that_are_no_text_say_so() -> None:
    shown = read.readable(record(b"x", b"\xff", [("a", None), ("a", b"\xff"), ("b", b"{}")]))
    assert shown == {
        "key_base64": "/w==",
        "headers": [
            {"name": "a", "value": None},
            {"name": "a", "value_base64": "/w=="},
            {"name": "b", "value": "{}"},
        ],
        "value": "x",
    }
