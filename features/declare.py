"""Features as data: what is computed, over which events, windows and keys.

From one declaration come the online state, the offline frame, the model's input order, the
documentation table and the schema hash that ties a model to the features it was trained on.

**The window rule.** For an event of key *k* at event time *t*, window *w* and delay *d*, a window
holds the events of *k* that have **arrived** so far with timestamp in **(t − d − w, t − d]**. With
``delay="0ms"`` the event itself is included; of events with the same timestamp, those that
arrived earlier are. The value is a pure function of that set, so an event that arrives late is
answered as of its own time, and corrects every later answer. Events more than ``lateness`` behind
the newest one of their key find windows cut off at
*newest − (longest window + delay + lateness)*: older entries have been reclaimed. A key that its
shard has heard nothing of for ``idle`` is forgotten; its next event starts anew.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from features.batch import Column, EventBatch
from features.events import MONEY_SCALE, SCALES, Event, column_kinds

#: Raise when the answers of the window kernel change their meaning: it is part of every schema
#: hash, so that no model scores features it was not trained on.
WINDOW_RULE_VERSION = 1

Float = npt.NDArray[np.float64]

_UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


@cache
def milliseconds(duration: str) -> int:
    """Read a duration such as ``"30d"``, ``"12h"``, ``"5m"``, ``"10s"`` or ``"250ms"``.

    >>> milliseconds("7d"), milliseconds("0ms")
    (604800000, 0)
    """
    match = re.fullmatch(r"(\d+)(ms|s|m|h|d)", duration)
    if match is None:
        raise ValueError(
            f"{duration!r} is not a duration: write a whole number and a unit out of "
            f"{', '.join(_UNITS)}, such as '30d' or '250ms'"
        )
    return int(match[1]) * _UNITS[match[2]]


#: Which of a view's windows, shortest first: a slice or a list of positions.
At = slice | list[int]


class Answers(Protocol):
    """What the kernel knows of each row's windows: arrays windows × rows (see features.windows)."""

    def count(self, source: type[Event], at: At) -> npt.NDArray[np.int64]: ...
    def total(self, source: type[Event], column: str, at: At) -> npt.NDArray[np.int64]: ...
    def smallest(self, source: type[Event], column: str, at: At) -> Float: ...
    def largest(self, source: type[Event], column: str, at: At) -> Float: ...

    def since_previous(self, source: type[Event]) -> Float:
        """Return ms, one value a row, whatever the window; NaN if there was none."""


@dataclass(frozen=True, kw_only=True)
class _Windowed:
    """What every windowed aggregation declares: its windows, and the events it is over."""

    over: Sequence[str] = ()
    #: Event type aggregated; the view's own by default.
    source: type[Event] | None = None
    name: str | None = None

    def source_in(self, view: FeatureView) -> type[Event]:
        return self.source or view.of

    def stem(self, view: FeatureView) -> str:
        """Return the feature's name without its view and window."""
        if self.name:
            return self.name
        parts = [re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()]
        if self.source not in (None, view.of):
            assert self.source is not None
            parts.append(re.sub(r"(?<!^)(?=[A-Z])", "_", self.source.__name__).lower())
        column = getattr(self, "column", None)
        return "_".join([*parts, column] if column else parts)

    def sums(self, view: FeatureView) -> Iterator[tuple[type[Event], str | None]]:
        """Yield the (source, column) pairs to keep sums of; a column of None is a mere count."""
        yield self.source_in(view), getattr(self, "column", None)

    def extrema(self, view: FeatureView) -> Iterator[tuple[type[Event], str, int]]:
        """Yield the (source, column, sign) triples to keep maxima of; sign −1 makes a minimum."""
        yield from ()


@dataclass(frozen=True)
class Count(_Windowed):
    """Count events. Never missing: an empty window counts 0."""

    def evaluate(self, answers: Answers, view: FeatureView, at: At) -> Float:
        return answers.count(self.source_in(view), at).astype(np.float64, order="C")


@dataclass(frozen=True)
class Sum(_Windowed):
    """Sum a fixed-point column, in its major units. An empty window sums to 0."""

    column: str

    def evaluate(self, answers: Answers, view: FeatureView, at: At) -> Float:
        source = self.source_in(view)
        return answers.total(source, self.column, at) / _scale(source, self.column)


@dataclass(frozen=True)
class Mean(_Windowed):
    """Average a fixed-point column, in its major units: exact sum ÷ (count × scale).

    An empty window has the mean ``empty`` (NaN unless declared).
    """

    column: str
    empty: float = field(default=np.nan, kw_only=True)

    def evaluate(self, answers: Answers, view: FeatureView, at: At) -> Float:
        source = self.source_in(view)
        total = answers.total(source, self.column, at)
        count = answers.count(source, at) * _scale(source, self.column)
        return _divide(total, count, self.empty)


@dataclass(frozen=True)
class Min(_Windowed):
    """The smallest value of a fixed-point column, in major units; NaN for an empty window."""

    column: str

    def evaluate(self, answers: Answers, view: FeatureView, at: At) -> Float:
        source = self.source_in(view)
        return answers.smallest(source, self.column, at) / _scale(source, self.column)

    def extrema(self, view: FeatureView) -> Iterator[tuple[type[Event], str, int]]:
        yield self.source_in(view), self.column, -1


@dataclass(frozen=True)
class Max(_Windowed):
    """The largest value of a fixed-point column, in major units; NaN for an empty window."""

    column: str

    def evaluate(self, answers: Answers, view: FeatureView, at: At) -> Float:
        source = self.source_in(view)
        return answers.largest(source, self.column, at) / _scale(source, self.column)

    def extrema(self, view: FeatureView) -> Iterator[tuple[type[Event], str, int]]:
        yield self.source_in(view), self.column, 1


@dataclass(frozen=True)
class Ratio(_Windowed):
    """Divide one count or sum by another over the same window; ``empty`` if the latter is 0."""

    numerator: Count | Sum
    denominator: Count | Sum
    empty: float = field(default=np.nan, kw_only=True)

    def evaluate(self, answers: Answers, view: FeatureView, at: At) -> Float:
        above = self.numerator.evaluate(answers, view, at)
        below = self.denominator.evaluate(answers, view, at)
        return _divide(above, below, self.empty)

    def sums(self, view: FeatureView) -> Iterator[tuple[type[Event], str | None]]:
        yield from self.numerator.sums(view)
        yield from self.denominator.sums(view)


@dataclass(frozen=True)
class SincePrevious(_Windowed):
    """Milliseconds since the key's previous event in the window, itself excluded; NaN if none."""

    def evaluate(self, answers: Answers, view: FeatureView, at: At) -> Float:
        since = answers.since_previous(self.source_in(view))
        reach = np.array([milliseconds(window) + view.delay_ms for window in self.over])
        return np.where(since < reach[:, np.newaxis], since, np.nan)


Aggregation = Count | Sum | Mean | Min | Max | Ratio | SincePrevious


def _scale(source: type[Event], column: str) -> int:
    return SCALES[column_kinds(source)[column]]


def _divide(above: npt.NDArray[Any], below: npt.NDArray[Any], empty: float) -> Float:
    out = np.full(above.shape, empty, np.float64)
    np.divide(above, below, out=out, where=below != 0)
    return out


@dataclass(frozen=True)
class Value:
    """The event's own value of a column, money in major units."""

    column: str

    @property
    def name(self) -> str:
        return self.column

    def evaluate(self, batch: EventBatch, of: type[Event]) -> Float:
        scale = SCALES.get(column_kinds(of)[self.column], 1)
        return batch[self.column] / np.float64(scale)

    def describe(self) -> dict[str, Any]:
        return {"value": self.column}


@dataclass(frozen=True)
class Stateless:
    """A feature of the event alone: a vectorised function of its columns."""

    name: str
    columns: tuple[str, ...]
    function: Callable[..., npt.NDArray[Any]] = field(compare=False)
    version: int

    def __call__(self, *columns: Column) -> Float:
        return self.function(*columns).astype(np.float64)

    def evaluate(self, batch: EventBatch, of: type[Event]) -> Float:
        return self(*(batch[column] for column in self.columns))

    def describe(self) -> dict[str, Any]:
        return {"stateless": self.name, "columns": self.columns, "version": self.version}


def stateless(*, version: int = 1) -> Callable[[Callable[..., npt.NDArray[Any]]], Stateless]:
    """Declare a function of an event's columns as a feature of the same name.

    The parameters name the columns; arrays of n rows in, an array of n rows out. Raise
    ``version`` whenever the answers change: it is part of the schema hash.

    >>> @stateless()
    ... def is_large(amount):
    ...     return amount > 100_00
    >>> is_large(np.array([99_00, 101_00])).tolist()
    [0.0, 1.0]
    """

    def declare(function: Callable[..., npt.NDArray[Any]]) -> Stateless:
        columns = tuple(inspect.signature(function).parameters)
        return Stateless(function.__name__, columns, function, version)

    return declare


@dataclass(frozen=True)
class FeatureView:
    """Windowed features of one key.

    Args:
        name: prefix of its features' names, and part of the state's identity.
        key: the key column; every source aggregated must have it.
        of: the event type that is answered.
        delay: how far back the windows end (see the window rule above).
        lateness: how far an event may be behind the newest of its key and still be answered
            exactly; costs memory.
        idle: how long after its last event a key is remembered, by the clock of its shard (the
            newest event time, which one event advances by an hour at most). At least, and by
            default twice, the longest window + delay + lateness.
        resolution: floor all event times to a multiple of it and merge entries of the same tick,
            which bounds the memory of very hot keys: the window rule then holds for the floored
            times. ``"1ms"`` merges equal timestamps and is exact; None keeps every entry.
    """

    name: str
    key: str
    of: type[Event]
    features: Sequence[Aggregation]
    delay: str = "0ms"
    lateness: str = "1h"
    idle: str | None = None
    resolution: str | None = None

    def __post_init__(self) -> None:
        for name in ("delay", "lateness", "idle", "resolution"):
            if (duration := getattr(self, name)) is not None:
                milliseconds(duration)
        for feature in self.features:
            if isinstance(feature.over, str):
                raise ValueError(
                    f"feature view {self.name!r}: over={feature.over!r} is one string; write "
                    f"over=[{feature.over!r}]"
                )
        if any(milliseconds(window) == 0 for window in self.windows) or self.resolution_ms == 0:
            raise ValueError(
                f"feature view {self.name!r}: windows and resolution are longer than zero"
            )
        if self.windows and self.idle_ms < self.horizon_ms:
            raise ValueError(
                f"feature view {self.name!r}: idle={self.idle!r} is shorter than the longest "
                "window + delay + lateness"
            )
        names = self.names
        if not names:
            raise ValueError(f"feature view {self.name!r} declares no feature over any window")
        if len(set(names)) < len(names):
            raise ValueError(f"feature view {self.name!r} declares a name twice: {names}")
        for source in self.sources:
            kinds = column_kinds(source)
            if kinds.get(self.key) != "key":
                raise ValueError(
                    f"feature view {self.name!r} is keyed by {self.key!r}, but "
                    f"{source.__name__} has no such key field"
                )
            if "event_time" not in kinds:
                raise ValueError(f"{source.__name__} has no event_time, so it has no windows")
        for feature in self.features:
            wanted = [*feature.sums(self), *((s, c) for s, c, _ in feature.extrema(self))]
            for source, column in wanted:
                if column is not None and column_kinds(source).get(column) not in SCALES:
                    raise ValueError(
                        f"feature view {self.name!r}: {type(feature).__name__} needs an exact "
                        f"column (Money or Whole), and {source.__name__}.{column} is not one"
                    )

    @cached_property
    def delay_ms(self) -> int:
        return milliseconds(self.delay)

    @cached_property
    def lateness_ms(self) -> int:
        return milliseconds(self.lateness)

    @cached_property
    def horizon_ms(self) -> int:
        """How far back of a key's newest event entries are kept."""
        return milliseconds(self.windows[-1]) + self.delay_ms + self.lateness_ms

    @cached_property
    def idle_ms(self) -> int:
        return 2 * self.horizon_ms if self.idle is None else milliseconds(self.idle)

    @cached_property
    def resolution_ms(self) -> int | None:
        return None if self.resolution is None else milliseconds(self.resolution)

    @cached_property
    def windows(self) -> tuple[str, ...]:
        """All windows of its features, shortest first."""
        return tuple(sorted({w for f in self.features for w in f.over}, key=milliseconds))

    @cached_property
    def sources(self) -> tuple[type[Event], ...]:
        """All event types its features aggregate, in order of declaration."""
        return tuple(dict.fromkeys(source for f in self.features for source, _ in f.sums(self)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(
            f"{self.name}_{feature.stem(self)}_{window}"
            for feature in self.features
            for window in feature.over
        )

    @cached_property
    def _at(self) -> list[At]:
        """Where each feature's windows stand among the view's."""
        places = [[self.windows.index(window) for window in f.over] for f in self.features]
        return [slice(None) if at == list(range(len(self.windows))) else at for at in places]

    def evaluate(self, answers: Answers) -> dict[str, Float]:
        """Turn the kernel's answers into the view's features, one float64 a row."""
        values: list[Float] = []
        for feature, at in zip(self.features, self._at, strict=True):
            values.extend(feature.evaluate(answers, self, at))
        return dict(zip(self.names, values, strict=True))

    def describe(self) -> dict[str, Any]:
        """Return everything that determines the view's answers, as plain data."""
        return {
            "view": self.name,
            "key": self.key,
            "of": self.of.__name__,
            "delay_ms": self.delay_ms,
            "lateness_ms": self.lateness_ms,
            "idle_ms": self.idle_ms,
            "resolution_ms": self.resolution_ms,
            "features": [_describe(feature) for feature in self.features],
            "sources": {source.__name__: column_kinds(source) for source in self.sources},
        }


def _describe(feature: Aggregation) -> dict[str, Any]:
    description: dict[str, Any] = {"aggregation": type(feature).__name__}
    for name in feature.__dataclass_fields__:
        value = getattr(feature, name)
        if isinstance(value, Count | Sum):
            value = _describe(value)
        elif isinstance(value, type):
            value = value.__name__
        elif name == "over":
            value = [milliseconds(window) for window in value]
        elif isinstance(value, float):
            value = repr(value)
        description[name] = value
    return description


@dataclass(frozen=True)
class FeatureSet:
    """The features of one model, in its input order."""

    name: str
    of: type[Event]
    features: Sequence[Value | Stateless | FeatureView]

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"feature set {self.name!r} has a name twice: {self.names}")
        for view in self.views:
            if view.of is not self.of:
                raise ValueError(
                    f"feature set {self.name!r} is of {self.of.__name__}, its view "
                    f"{view.name!r} of {view.of.__name__}; they must agree"
                )

    @cached_property
    def views(self) -> tuple[FeatureView, ...]:
        return tuple(f for f in self.features if isinstance(f, FeatureView))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Feature names in model order."""
        names: list[str] = []
        for feature in self.features:
            names.extend(feature.names if isinstance(feature, FeatureView) else [feature.name])
        return tuple(names)

    @cached_property
    def schema_hash(self) -> str:
        """Sixteen hex digits that change whenever a name, the order or an answer's meaning does."""
        description = {
            "window_rule": WINDOW_RULE_VERSION,
            "money_scale": MONEY_SCALE,
            "dtype": "float64",
            "of": self.of.__name__,
            "columns": column_kinds(self.of),
            "names": self.names,
            "features": [feature.describe() for feature in self.features],
        }
        return hashlib.sha256(msgspec.json.encode(description, order="sorted")).hexdigest()[:16]

    def evaluate_stateless(self, batch: EventBatch) -> dict[str, Float]:
        """Compute the features that need no state, for rows of the set's own event type."""
        return {
            feature.name: feature.evaluate(batch, self.of)
            for feature in self.features
            if not isinstance(feature, FeatureView)
        }

    def matrix(self, columns: EventBatch) -> Float:
        """Stack the features in model order: float64, shape (rows, features), C-contiguous.

        ``amount`` is both an event column (cents) and a feature (major units): stateless
        features are computed here, from the event's own columns.
        """
        out = np.empty((len(columns), len(self.names)), np.float64)
        own = self.evaluate_stateless(columns)
        for i, name in enumerate(self.names):
            out[:, i] = own[name] if name in own else columns[name]
        return out

    def table(self) -> str:
        """Return the features as a Markdown table, in model order."""
        rows = ["| # | feature | computed from | over | key |", "|---|---|---|---|---|"]
        cells: list[tuple[str, str, str, str]] = []
        for feature in self.features:
            if isinstance(feature, Value):
                cells.append((feature.name, "the event's own value", "this event", "–"))
            elif isinstance(feature, Stateless):
                what = f"{feature.name}({', '.join(feature.columns)})"
                cells.append((feature.name, what, "this event", "–"))
            else:
                names = iter(feature.names)
                for aggregation in feature.features:
                    for window in aggregation.over:
                        span = f"(t − {window}, t]"
                        if feature.delay_ms:
                            span = f"(t − {feature.delay} − {window}, t − {feature.delay}]"
                        cells.append((next(names), _what(aggregation, feature), span, feature.key))
        rows += [
            f"| {i} | `{name}` | {what} | {over} | {key} |"
            for i, (name, what, over, key) in enumerate(cells, 1)
        ]
        return "\n".join(rows)


def _what(feature: Aggregation, view: FeatureView) -> str:
    if isinstance(feature, Ratio):
        above, below = _what(feature.numerator, view), _what(feature.denominator, view)
        return f"{above} ÷ {below}"
    column = getattr(feature, "column", None)
    of = f"{feature.source_in(view).__name__}{'.' + column if column else ''}"
    return f"{type(feature).__name__.lower()} of {of}"
