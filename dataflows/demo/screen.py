"""The demo's screen: live on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dataflows.demo.observe import Flagged

LINE_EVERY_S = 5.0
FLAGGED_EVERY_S = 1.0  # a list that moves faster cannot be read
_SPARKS = "▁▂▃▄▅▆▇█"
_COLOURS = {"block": "bold red", "review": "yellow"}


@dataclass
class View:
    """Everything on the screen."""

    phase: str = "starting"
    model_version: str = ""
    rate: float = 0.0
    replayed_s: float = 0.0
    duration_s: float = 0.0
    in_per_s: float = 0.0
    out_per_s: float = 0.0
    #: p50, p95, p99 of the last seconds.
    latency_ms: Sequence[float | None] = (None, None, None)
    lag: int = 0
    stream_time: int = 0
    account: Mapping[str, int] = field(default_factory=dict)
    reports_applied: int = 0
    flagged: Sequence[Flagged] = ()
    decisions: Mapping[tuple[str, bool], int] = field(default_factory=dict)


class Screen:
    """Show views until the end of the context; the last one stays."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._view = View()
        self._in: deque[float] = deque(maxlen=24)
        self._out: deque[float] = deque(maxlen=24)
        self._shown: Sequence[Flagged] = ()
        self._flagged_at = self._line_at = self._history_at = 0.0
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, view: View) -> None:
        """Take over a new view; on anything but a terminal print a line every few seconds."""
        now = time.monotonic()
        if view.phase != self._view.phase or now - self._line_at >= LINE_EVERY_S:
            self._line_at = now
            if not self._console.is_terminal:
                self._console.print(_line(view), highlight=False, soft_wrap=True)
        self._view = view
        if now - self._history_at >= 1.0 and view.phase == "scoring" and view.in_per_s:
            self._history_at = now
            self._in.append(view.in_per_s)
            self._out.append(view.out_per_s)
        if now - self._flagged_at >= FLAGGED_EVERY_S:
            self._flagged_at = now
            self._shown = view.flagged

    def _render(self) -> RenderableType:
        view = self._view
        width = min(self._console.width, 120)
        return Group(
            Text(),
            _headline(view, width),
            Text(),
            _numbers(view, self._in, self._out, wide=width >= 100),
            Text(),
            _flagged(view, self._shown, width, max(3, min(10, self._console.height - 18))),
        )


def _headline(view: View, width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        grid.add_column(no_wrap=True)
    title = Text.assemble(("Card-fraud scoring", "bold"), ("  model ", "dim"), view.model_version)
    bar = ProgressBar(
        total=view.duration_s,
        completed=min(view.replayed_s, view.duration_s),
        width=max(8, min(40, width - 68)),
    )
    done = Text(f"{view.replayed_s:3.0f} of {view.duration_s:g} s  {view.phase}", "cyan")
    grid.add_row(title, bar, done)
    return grid


def _numbers(view: View, ins: deque[float], outs: deque[float], *, wide: bool) -> RenderableType:
    spark = 24 if wide else 12
    account = view.account
    left = Table.grid(padding=(0, 1))
    left.add_column(style="dim", min_width=6)
    left.add_column(justify="right", min_width=7)
    left.add_column(min_width=spark + 3)
    top = max([*ins, *outs, 1.0])
    left.add_row("in/s", _number(view.in_per_s), Text(_sparkline(ins, top, spark), "cyan"))
    left.add_row("out/s", _number(view.out_per_s), Text(_sparkline(outs, top, spark), "green"))
    left.add_row("lag", _number(view.lag), Text("records", "dim"))
    middle = Table.grid(padding=(0, 1))
    middle.add_column(style="dim", min_width=4)
    middle.add_column(justify="right", min_width=11)
    for name, value in zip(("p50", "p95", "p99"), view.latency_ms, strict=True):
        middle.add_row(name, Text(_ms(value), "bold"))
    right = Table.grid(padding=(0, 1))
    right.add_column(style="dim", min_width=16 if wide else 13)
    right.add_column(justify="right", min_width=9)
    right.add_row("read", _number(account.get("read", 0)))
    right.add_row("scored", _number(account.get("scored", 0)))
    right.add_row("dead-lettered", _number(account.get("dead_lettered", 0)))
    gap = (0, 5, 0, 0) if wide else (0, 2, 0, 0)
    grid = Table.grid(padding=gap)
    grid.add_row(
        Text("events and predictions", "dim italic"),
        Text("latency, last 5 s", "dim italic"),
        Text("transactions so far", "dim italic"),
    )
    grid.add_row(left, middle, right)
    stream = Text.assemble(
        ("stream time ", "dim"),
        _time(view.stream_time, "%Y-%m-%d %H:%M"),
        ("   fraud reports applied ", "dim"),
        _number(view.reports_applied),
    )
    return Group(grid, Text(), stream)


_COLUMNS = (("time", 11), ("card", 5), ("term.", 5), ("amount", 8), ("score", 5), ("verdict", 7),
            ("truth", 5))  # fmt: skip


def _flagged(view: View, flagged: Sequence[Flagged], width: int, rows: int) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, width=width, header_style="dim")
    for name, size in _COLUMNS:
        right = name in ("amount", "score")
        table.add_column(name, width=size, justify="right" if right else "left", no_wrap=True)
    table.add_column("because of", ratio=1, no_wrap=True, overflow="ellipsis")
    left = width - sum(size + 1 for _, size in _COLUMNS)
    latest = list(flagged)[-rows:][::-1]
    for item in latest:
        prediction = item.prediction
        table.add_row(
            _time(prediction.event_time, "%m-%d %H:%M"),
            prediction.card_id,
            prediction.terminal_id,
            f"{item.amount:,.2f}",
            "–" if prediction.score is None else f"{prediction.score:.3f}",
            Text(prediction.decision, _COLOURS.get(prediction.decision, "")),
            Text("fraud", "red") if item.fraud else Text("legit", "dim"),
            _reasons(item, left),
        )
    for _ in range(rows - len(latest)):
        table.add_row()
    return Group(_tally(view), Text(), table)


def _reasons(item: Flagged, width: int) -> str:
    """Return as many reasons as fit whole; at least one."""
    parts = [f"{why.feature} {why.contribution:+.2f}" for why in item.prediction.reasons]
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


def _tally(view: View) -> Text:
    parts: list[str | tuple[str, str]] = [("Flagged", "bold")]
    for decision, doing in (("block", "blocked"), ("review", "to review")):
        fraud = view.decisions.get((decision, True), 0)
        legitimate = view.decisions.get((decision, False), 0)
        parts += [
            ("   ", ""),
            (f"{fraud + legitimate:,} {doing}", _COLOURS[decision]),
            (f" ({fraud:,} fraud)", "dim"),
        ]
    return Text.assemble(*parts)


def _line(view: View) -> str:
    p50, p95, p99 = (_ms(value) for value in view.latency_ms)
    return (
        f"{view.replayed_s:3.0f} of {view.duration_s:g} s  {view.phase}: "
        f"in {_number(view.in_per_s)}/s, out {_number(view.out_per_s)}/s, "
        f"p50 {p50}, p95 {p95}, p99 {p99}, lag {_number(view.lag)}, "
        f"scored {_number(view.account.get('scored', 0))}, "
        f"dead-lettered {_number(view.account.get('dead_lettered', 0))}, "
        f"stream time {_time(view.stream_time, '%Y-%m-%d %H:%M')}"
    )


def _sparkline(values: deque[float], top: float, width: int) -> str:
    return "".join(
        _SPARKS[min(len(_SPARKS) - 1, round(value / top * (len(_SPARKS) - 1)))]
        for value in list(values)[-width:]
    )


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.1f} ms" if value < 100 else f"{value:,.0f} ms"


def _time(ms: int, form: str) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime(form) if ms else "–"
