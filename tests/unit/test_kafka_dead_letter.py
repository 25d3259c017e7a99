"""A dead letter holds the record as it came, and everything needed to find and replay it."""

import hashlib
from typing import Any

import pytest
from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st

from dataflows.kafka.dead_letter import dead_letters, stub
from dataflows.kafka.replay import DeadLetter, Progress, ReplayError, parse_start


def refused(
    value: bytes | None = b"not json",
    key: bytes | None = b"C0001",
    headers: list[tuple[str, bytes | None]] | None = None,
    offset: int = 7,
) -> Message:
    return Message(
        topic="transactions",
        partition=2,
        offset=offset,
        key=key,
        value=value,
        headers=headers,
        timestamp=(1, 1_700_000_000_000),
    )


def read_back(message: Message, **options: int) -> DeadLetter:
    out = dead_letters([message], ["invalid_json"], ["at byte 3"], **options)
    return DeadLetter.of(
        Message(
            topic="dead_letters",
            partition=0,
            offset=0,
            key=out.keys[0],
            value=out.values[0],
            headers=out.headers_of(0),
        )
    )


@pytest.mark.parametrize("value", [b"not json", b"", None, b"\xff\xfe"])
@pytest.mark.parametrize("key", [b"C0001", b"", None])
def test_key_and_bytes_are_kept(value: bytes | None, key: bytes | None) -> None:
    letter = read_back(refused(value, key))
    assert (letter.key, letter.value) == (key, value)
    assert (letter.reason, letter.detail) == ("invalid_json", "at byte 3")
    assert (letter.topic, letter.source_partition, letter.source_offset) == ("transactions", 2, 7)
    assert letter.timestamp == 1_700_000_000_000
    assert letter.full_bytes is None


def test_identity_and_time_are_those_of_the_refused_record() -> None:
    out = dead_letters([refused(), refused(offset=8)], ["a", "b"], ["", ""])
    assert out.event_ids == [b"transactions/2/7", b"transactions/2/8"]
    assert out.append_time.tolist() == [1_700_000_000_000] * 2


def test_a_value_that_is_too_long_is_cut_and_its_hash_kept() -> None:
    value = b"x" * 1000
    letter = read_back(refused(value), max_value_bytes=100)
    assert letter.value == b"x" * 95  # the key has the other 5
    assert letter.full_bytes == 1000
    assert letter.sha256 == hashlib.sha256(value).hexdigest()


def test_own_headers_are_kept_and_a_second_refusal_counts() -> None:
    own: list[tuple[str, bytes | None]] = [("traceparent", b"00-ab"), ("empty", None)]
    before: list[tuple[str, bytes | None]] = [
        ("dlq.reason", b"older"),
        ("dlq.replayed", b"2"),
        ("event_id", b"older"),
    ]
    letter = read_back(refused(headers=own + before))
    assert [header for header in letter.headers if header[0] not in ("event_id", "origin")] == own
    assert letter.reason == "invalid_json"
    assert letter.replayed == 2


class Unreadable:
    """A message as confluent-kafka gives it if a header's name is not UTF-8."""

    def __init__(self, message: Message) -> None:
        self._message = message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._message, name)

    def headers(self) -> Any:
        raise SystemError("returned a result with an exception set")


def test_headers_that_cannot_be_read_are_left_out() -> None:
    message: Any = Unreadable(refused())
    letter = read_back(message)
    assert (letter.key, letter.value) == (b"C0001", b"not json")
    assert (letter.reason, letter.headers_missing) == ("invalid_json", "unreadable")
    assert letter.is_whole
    assert DeadLetter.of(message).reason == ""


def test_a_record_cannot_pass_for_a_cut_one() -> None:
    letter = read_back(refused(headers=[("dlq.truncated", b"9"), ("dlq.headers", b"omitted")]))
    assert letter.is_whole


sizes = st.integers(0, 3000)


@given(
    value=st.none() | sizes,
    key=st.none() | sizes,
    headers=st.lists(st.tuples(st.sampled_from(["a", "é" * 20, "dlq.x"]), st.none() | sizes)),
    budget=sizes,
)
def test_what_is_kept_fits_the_budget_and_the_rest_is_said(
    value: int | None, key: int | None, headers: list[tuple[str, int | None]], budget: int
) -> None:
    def content(size: int | None) -> bytes | None:
        return None if size is None else b"x" * size

    own = [(name, content(size)) for name, size in headers]
    kept = [each for each in own if each[0] != "dlq.x"]
    message = refused(content(value), content(key), own)
    out = dead_letters([message], ["a"], ["b"], max_value_bytes=budget)
    letter = read_back(message, max_value_bytes=budget)
    assert letter.headers[2:] == ([] if letter.headers_missing else kept)  # event_id, origin
    held = sum(len(n.encode()) + len(c or b"") for n, c in letter.headers[2:])
    assert held + len(letter.key or b"") + len(letter.value or b"") <= budget
    for full, part, noted in (
        (value, letter.value, letter.full_bytes),
        (key, letter.key, letter.full_key_bytes),
    ):
        assert (full is None) == (part is None)
        assert noted == (None if full == (None if part is None else len(part)) else full)

    # A stub says the same of the record, and is the end.
    least = stub(out, 0) or out
    assert not least.values[0]
    assert not least.keys[0]
    assert (least.values[0] is None, least.keys[0] is None) == (value is None, key is None)
    said = dict(least.headers[0] if least.headers else [])
    assert all(name.startswith("dlq.") for name in said)
    assert said.get("dlq.truncated") == (b"%d" % value if value else None)
    if value:
        assert said["dlq.sha256"] == hashlib.sha256(b"x" * value).hexdigest().encode()
    assert said.get("dlq.key_truncated") == (b"%d" % key if key else None)
    assert ("dlq.headers" in said) == bool(kept)
    assert stub(least, 0) is None


def test_a_message_that_was_never_consumed_is_refused() -> None:
    with pytest.raises(ValueError, match="consumed"):
        dead_letters([Message(value=b"x")], ["a"], ["b"])


@given(st.integers(0, 20), st.lists(st.integers(0, 60)))
def test_progress_survives_its_commit(start: int, marks: list[int]) -> None:
    progress = Progress(start)
    for mark in marks:
        progress.mark(mark)
    again = Progress.of(progress.offset, progress.metadata())
    for offset in range(70):
        done = offset < start or offset in marks
        assert progress.is_done(offset) == done
        assert again.is_done(offset) == done
    assert not again.is_done(again.offset)


@given(st.integers(0, 9), st.lists(st.tuples(st.integers(1, 9), st.booleans())))
def test_the_ends_of_transactions_are_no_gaps(start: int, steps: list[tuple[int, bool]]) -> None:
    """Dead letters written exactly once have offsets between them that hold none."""
    progress, read, left = Progress(start), start, []
    for further, dealt_with in steps:
        offset = read + further - 1
        progress.skip(read, offset)
        if dealt_with:
            progress.mark(offset)
        else:
            left.append(offset)
        read = offset + 1
    assert [n for n in range(start, read) if not progress.is_done(n)] == left
    assert progress.offset == (left[0] if left else read)


def test_progress_refuses_what_it_cannot_keep() -> None:
    progress = Progress(0)
    for offset in range(1, 4000, 2):
        progress.mark(offset)
    with pytest.raises(ReplayError, match="replay the other reasons too"):
        progress.metadata()
    with pytest.raises(ReplayError, match="no replay wrote"):
        Progress.of(3, "somebody's note")


@pytest.mark.parametrize("text", ["x", "1:", ":", "a:3", "7:3", "-1"])
def test_a_wrong_start_is_named(text: str) -> None:
    with pytest.raises(ReplayError, match="'" + text):
        parse_start([text], 2)
