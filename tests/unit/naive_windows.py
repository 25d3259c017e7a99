"""The window rule as one would write it on paper: keep every event, filter, aggregate.

The oracle of the kernel's tests. Works on rows ``(source, key, event_time, amount)`` in order of
arrival; O(n) an event.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from features.declare import (
    Aggregation,
    Count,
    FeatureView,
    Max,
    Mean,
    Min,
    Ratio,
    SincePrevious,
    Sum,
    milliseconds,
)
from features.events import SCALES, Event, column_kinds
from features.windows import CLOCK_STEP_MS


@dataclass(frozen=True)
class Row:
    source: type[Event]
    key: str
    event_time: int
    amount: int = 0


def naive_features(view: FeatureView, rows: Sequence[Row]) -> list[dict[str, float] | None]:
    """Return each row's features; None for rows that are not answered."""
    tick = view.resolution_ms or 1
    longest = max(milliseconds(window) for window in view.windows)
    horizon = longest + view.delay_ms + view.lateness_ms
    arrived: dict[str, list[tuple[int, Row]]] = {}
    newest: dict[str, int] = {}
    clock: int | None = None
    out: list[dict[str, float] | None] = []
    for row in rows:
        t = row.event_time // tick * tick
        clock = t if clock is None else max(clock, min(t, clock + CLOCK_STEP_MS))
        if row.key in newest and clock - newest[row.key] > view.idle_ms:
            arrived[row.key] = []
            del newest[row.key]
        newest[row.key] = max(newest.get(row.key, t), t)
        arrived.setdefault(row.key, []).append((t, row))
        if row.source is not view.of:
            out.append(None)
            continue
        features: list[float] = []
        for feature in view.features:
            for window in feature.over:
                upper = t - view.delay_ms
                kept = min(newest[row.key], clock) - horizon
                lower = max(upper - milliseconds(window), kept)
                inside = [(time, e) for time, e in arrived[row.key] if lower < time <= upper]
                features.append(_aggregate(feature, view, inside, row, t))
        out.append(dict(zip(view.names, features, strict=True)))
    return out


def _aggregate(
    feature: Aggregation, view: FeatureView, inside: list[tuple[int, Row]], row: Row, t: int
) -> float:
    if isinstance(feature, Ratio):
        below = _aggregate(feature.denominator, view, inside, row, t)
        above = _aggregate(feature.numerator, view, inside, row, t)
        return above / below if below else feature.empty
    rows = [(time, other) for time, other in inside if other.source is feature.source_in(view)]
    if isinstance(feature, Count):
        return float(len(rows))
    if isinstance(feature, SincePrevious):
        times = [time for time, other in rows if other is not row]
        return float(t - max(times)) if times else math.nan
    scale = SCALES[column_kinds(feature.source_in(view))[feature.column]]
    amounts = [other.amount for _, other in rows]
    if isinstance(feature, Sum):
        return sum(amounts) / scale
    if not amounts:
        return feature.empty if isinstance(feature, Mean) else math.nan
    if isinstance(feature, Mean):
        return sum(amounts) / (len(amounts) * scale)
    if isinstance(feature, Min):
        return min(amounts) / scale
    assert isinstance(feature, Max)
    return max(amounts) / scale
