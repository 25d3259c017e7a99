"""Event types as declared structs, and their decoding from JSON into columns.

An event type is a ``msgspec.Struct`` whose fields use the column types of this module. From it
come the JSON decoder, the validation and the batch's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from features.batch import Column, EventBatch

MAX_KEY_CHARACTERS = 64
#: Event times before this are refused: 1970 and seconds-instead-of-milliseconds land here.
EARLIEST_EVENT_TIME = 946_684_800_000  # 2000-01-01T00:00:00Z
#: Money is fixed point with this many units to one: cents.
MONEY_SCALE = 100
MAX_MONEY = 1_000_000_000

#: An identifier: 1 to 64 printable characters. Column dtype ``S``.
Key = Annotated[
    str, msgspec.Meta(min_length=1, max_length=MAX_KEY_CHARACTERS, extra={"column": "key"})
]
#: Milliseconds since the epoch, UTC. Column dtype int64.
EventTime = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53, extra={"column": "time"})]
#: A non-negative amount in major units with at most two decimals. Column: int64 cents.
Money = Annotated[float, msgspec.Meta(ge=0, le=MAX_MONEY, extra={"column": "money"})]
#: Any finite number; for stateless features only, since windows sum exact integers.
Number = Annotated[float, msgspec.Meta(extra={"column": "number"})]
#: A whole number. Column dtype int64; windows may sum it.
Whole = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53, extra={"column": "whole"})]

DTYPES: dict[str, Any] = {
    "key": np.dtype("S1"),
    "time": np.dtype(np.int64),
    "money": np.dtype(np.int64),
    "whole": np.dtype(np.int64),
    "number": np.dtype(np.float64),
}
#: Why a record may be refused, in a word.
REASONS = ("tombstone", "empty", "too_large", "not_utf8", "not_json", "invalid")
SCALES = {"money": MONEY_SCALE, "whole": 1}


class Event(msgspec.Struct, gc=False):
    """Declare an event type by subclassing, with fields of the types above.

    ``event_time`` is what windows go by. ``stream_time`` names the field that says when the event
    happened *to us*, by which partitions, topics and files are interleaved: the same field,
    unless the event is news about something earlier. ``identity`` names the key field by which
    the business tells events of this type apart, if there is one: two events with the same are
    the same, sent twice (see ``features/seen.py``).
    """

    stream_time: ClassVar[str] = "event_time"
    identity: ClassVar[str | None] = None


@cache
def column_kinds(event: type[Event]) -> dict[str, str]:
    """Return field name → column kind (``key``, ``time``, ``money``, ``whole``, ``number``).

    Raises TypeError for a field that does not use one of this module's column types.
    """
    kinds: dict[str, str] = {}
    for name, annotation in _annotations(event).items():
        metas = [m for m in get_args(annotation)[1:] if isinstance(m, msgspec.Meta) and m.extra]
        if not metas:
            raise TypeError(
                f"{event.__name__}.{name}: use one of the column types of features.events "
                f"(Key, EventTime, Money, Number, Whole), not {annotation!r}"
            )
        extra = metas[0].extra
        assert extra is not None
        kinds[name] = extra["column"]
    return kinds


def _annotations(event: type[Event]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(event)}


@dataclass(frozen=True)
class Refusal:
    """Why one record was refused: its row in the input, a short reason, and the detail."""

    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Decoded:
    """What became of a list of records: a batch of the accepted ones, and the refusals.

    ``rows`` gives, for each row of ``events``, its position in the input.
    """

    events: EventBatch
    rows: npt.NDArray[np.int64]
    refused: list[Refusal]


class EventDecoder:
    """Decode JSON records of several event types into one batch, refusing bad ones singly.

    Args:
        events: the event types; a record's ``source`` code is an index into them.
        max_clock_skew_ms: how far an event's time may be ahead of the broker's time of its own
            record (a replay gives the same verdict, whatever the clock says by then).
        max_bytes: longest accepted value.

    A field of one type that another type lacks is filled with ``b""``, 0 or NaN there.
    Unknown JSON members are ignored; of a repeated member the last one counts, if all are of the
    right type.
    """

    def __init__(
        self,
        events: Sequence[type[Event]],
        *,
        max_clock_skew_ms: int = 300_000,
        max_bytes: int = 65_536,
    ) -> None:
        self.events = tuple(events)
        self.max_clock_skew_ms = max_clock_skew_ms
        self.max_bytes = max_bytes
        self._decoders = [msgspec.json.Decoder(event).decode for event in self.events]
        self._kinds = [column_kinds(event) for event in self.events]
        self._columns: dict[str, str] = {}
        for event, kinds in zip(self.events, self._kinds, strict=True):
            for name, kind in kinds.items():
                if self._columns.setdefault(name, kind) != kind:
                    raise TypeError(
                        f"{event.__name__}.{name} is a {kind} column, but another event type "
                        f"declares {name} as {self._columns[name]}; rename one of them"
                    )

    def __call__(
        self,
        values: Sequence[bytes | None],
        source: npt.NDArray[np.uint8],
        append_time: npt.NDArray[np.int64],
    ) -> Decoded:
        """Decode ``values[i]``, of event type ``events[source[i]]``; O(bytes)."""
        refused: list[Refusal] = []
        row_groups: list[npt.NDArray[np.int64]] = []
        groups: list[dict[str, Column]] = []
        counts = np.bincount(source, minlength=len(self.events)).tolist()
        for code, count in enumerate(counts):
            if not count:
                continue
            if count == len(values):
                chosen, rows = values, np.arange(count)
            else:
                rows = np.flatnonzero(source == code)
                chosen = [values[i] for i in rows.tolist()]
            kept, structs = self._parse(chosen, rows, code, refused)
            kept, group = self._columnar(structs, kept, code, append_time, refused)
            row_groups.append(kept)
            groups.append(group)
        refused.sort(key=lambda refusal: refusal.row)
        rows = _joined(row_groups, "time")
        columns = {
            name: _joined(
                [
                    group[name] if name in group else _filled(kind, len(kept))
                    for group, kept in zip(groups, row_groups, strict=True)
                ],
                kind,
            )
            for name, kind in self._columns.items()
        }
        if len(groups) < 2:
            return Decoded(EventBatch(columns), rows, refused)
        order = np.argsort(rows, kind="stable")
        return Decoded(EventBatch(columns).take(order), rows[order], refused)

    def _parse(
        self,
        values: Sequence[bytes | None],
        rows: npt.NDArray[np.int64],
        code: int,
        refused: list[Refusal],
    ) -> tuple[npt.NDArray[np.int64], list[Event]]:
        decode = self._decoders[code]
        if None not in values and max(map(len, values), default=0) <= self.max_bytes:  # type: ignore[arg-type]
            try:  # one bad record never costs its neighbours: on failure, go through them singly
                return rows, [decode(value) for value in values]  # type: ignore[arg-type]
            except Exception:
                pass
        kept: list[int] = []
        structs: list[Event] = []
        for row, value in zip(rows.tolist(), values, strict=True):
            reason = self._parse_one(decode, value, structs)
            if reason is None:
                kept.append(row)
            else:
                refused.append(Refusal(row, *reason))
        return np.array(kept, np.int64), structs

    def _parse_one(
        self, decode: Callable[[bytes], Event], value: bytes | None, structs: list[Event]
    ) -> tuple[str, str] | None:
        if value is None:
            return "tombstone", "the record has no value; this topic carries events, not deletions"
        if len(value) == 0:
            return "empty", "the value is empty; expected a JSON object"
        if len(value) > self.max_bytes:
            return "too_large", f"the value has {len(value)} bytes; at most {self.max_bytes} pass"
        try:
            structs.append(decode(value))
        except msgspec.ValidationError as error:
            return "invalid", str(error)
        except UnicodeDecodeError as error:
            return "not_utf8", str(error)
        except msgspec.DecodeError as error:
            return "not_json", str(error)
        except Exception as error:  # nesting deeper than the parser goes, for one
            return "not_json", f"{type(error).__name__}: {error}"
        return None

    def _columnar(
        self,
        structs: list[Event],
        rows: npt.NDArray[np.int64],
        code: int,
        append_time: npt.NDArray[np.int64],
        refused: list[Refusal],
    ) -> tuple[npt.NDArray[np.int64], dict[str, Column]]:
        kinds = self._kinds[code]
        fields: Sequence[Sequence[Any]] = list(
            zip(*map(msgspec.structs.astuple, structs), strict=True)
        )
        if not structs:
            return rows, {name: _filled(kind, 0) for name, kind in kinds.items()}
        columns: dict[str, Column] = {}
        bad: dict[int, tuple[str, str]] = {}  # position in structs → first reason
        for (name, kind), values in zip(kinds.items(), fields, strict=True):
            if kind == "key":
                columns[name] = _key_column(name, values, bad)
            elif kind == "money":
                columns[name] = _money_column(name, values, bad)
            elif kind == "time":
                columns[name] = self._time_column(name, values, append_time[rows], bad)
            else:
                columns[name] = np.array(values, DTYPES[kind])
        if not bad:
            return rows, columns
        refused.extend(Refusal(int(rows[i]), *why) for i, why in bad.items())
        good = np.ones(len(structs), np.bool_)
        good[list(bad)] = False
        return rows[good], {name: column[good] for name, column in columns.items()}

    def _time_column(
        self,
        name: str,
        values: Sequence[int],
        append_time: npt.NDArray[np.int64],
        bad: dict[int, tuple[str, str]],
    ) -> Column:
        times = np.array(values, np.int64)
        for i in np.flatnonzero(times < EARLIEST_EVENT_TIME).tolist():
            detail = f"`$.{name}` = {values[i]} is before 2000-01-01"
            if EARLIEST_EVENT_TIME <= values[i] * 1000 < 2 * append_time[i]:
                detail += "; it looks like seconds, but times are milliseconds since the epoch"
            bad.setdefault(i, ("time_too_early", detail))
        latest = append_time + self.max_clock_skew_ms
        for i in np.flatnonzero(times > latest).tolist():
            ahead = (values[i] - int(append_time[i])) / 1000
            detail = (
                f"`$.{name}` = {values[i]} is {ahead:.3f} s ahead of the broker's time of the "
                f"record; at most {self.max_clock_skew_ms / 1000:g} s pass"
            )
            bad.setdefault(i, ("time_in_future", detail))
        return times


def _joined(parts: Sequence[Column], kind: str) -> Column:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, DTYPES[kind])


def _filled(kind: str, n: int) -> Column:
    if kind == "number":
        return np.full(n, np.nan)
    return np.zeros(n, DTYPES[kind])


def _key_column(name: str, values: Sequence[str], bad: dict[int, tuple[str, str]]) -> Column:
    joined = "".join(values)
    if not joined.isprintable():  # also catches NUL, which fixed-width bytes would lose
        for i, value in enumerate(values):
            if not value.isprintable():
                detail = f"`$.{name}` = {value!r} has characters that are not printable"
                bad.setdefault(i, ("invalid_key", detail))
        values = [value if value.isprintable() else "?" for value in values]
    if joined.isascii():
        return np.array(values, "S")
    return np.array([value.encode() for value in values], "S")


def _money_column(name: str, values: Sequence[float], bad: dict[int, tuple[str, str]]) -> Column:
    scaled = np.array(values, np.float64) * MONEY_SCALE
    cents = np.rint(scaled)
    # A double nearest to a two-decimal number below 1e9 is within 3e-5 of whole cents.
    for i in np.flatnonzero(np.abs(scaled - cents) > 1e-3).tolist():
        detail = f"`$.{name}` = {values[i]!r} has more than two decimals"
        bad.setdefault(i, ("invalid_money", detail))
    return cents.astype(np.int64)
