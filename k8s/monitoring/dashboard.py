"""Write the Grafana dashboard, dashboard.json (Grafana 10 and later).

    python -m k8s.monitoring.dashboard            writes it
    python -m k8s.monitoring.dashboard --check    exits with 1 if it is not what would be written

`$of` in an expression stands for the matchers of the variables; the recorded series and alerts
have no instance: `$flow`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dashboard.json")

_FLOW = 'namespace=~"$namespace", job=~"$job"'
_MATCHERS = {"$of": f'{_FLOW}, instance=~"$instance"', "$flow": _FLOW}
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT, _COLUMNS = 24, 8, 3


@dataclass(frozen=True)
class Panel:
    """A graph: legend → expression. `unit` is one of Grafana's; `kind` a type of its panels."""

    title: str
    unit: str
    series: dict[str, str]
    kind: str = "timeseries"
    help: str = ""
    stacked: bool = False


def quantiles(metric: str, by: str = "", *shares: float) -> dict[str, str]:
    """Return the legend and expression of quantiles of a histogram, each by a label or overall.

    >>> list(quantiles("scoring_epoch_seconds", "", 0.5))
    ['p50']
    """
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return {
        f"p{share * 100:g}{legend}": f"histogram_quantile({share:g}, sum by ({labels}) "
        f"(rate({metric}_bucket{{$of}}[$__rate_interval])))"
        for share in shares
    }


def rate(metric: str, *by: str) -> dict[str, str]:
    """Return the legend and expression of a counter's rate, summed by labels."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by) or metric
    return {legend: f"sum by ({', '.join(by)}) (rate({metric}{{$of}}[$__rate_interval]))"}


def mean(metric: str) -> dict[str, str]:
    """Return the legend and expression of a histogram's mean."""
    total, count = (f"sum(rate({metric}_{of}{{$of}}[$__rate_interval]))" for of in ("sum", "count"))
    return {"mean": f"{total} / {count}"}


_LATENCY = "scoring_end_to_end_latency_seconds"

ROWS: dict[str, list[Panel]] = {
    "Objectives and burn": [
        Panel(
            "Alerts that fire",
            "none",
            {"{{alertname}}": 'max by (alertname, severity) (ALERTS{alertstate="firing", $flow})'},
            "stat",
            "Empty: none does. What to do about each is in docs/runbooks.md.",
        ),
        Panel(
            "Budget spent in three days",
            "percentunit",
            {"{{slo}}": "scoring:slo_burn:rate3d{$flow}"},
            "stat",
            "100 % is what the objective allows in three days.",
        ),
        Panel(
            "Burn rate",
            "none",
            {
                "{{slo}} 1 h": "scoring:slo_burn:rate1h{$flow}",
                "{{slo}} 6 h": "scoring:slo_burn:rate6h{$flow}",
            },
            help="1 spends exactly the budget; the pages are in k8s/monitoring/rules.yaml.",
        ),
        Panel(
            "Latency",
            "s",
            quantiles(_LATENCY, "", 0.5, 0.95, 0.99, 0.999),
            help="From the broker's append of the event to the delivery report of its prediction.",
        ),
        Panel(
            "Predictions in time",
            "percentunit",
            {
                "within {{le}} s": f'sum by (le) (rate({_LATENCY}_bucket{{le=~"0.015|0.1", $of}}'
                "[$__rate_interval])) / on () group_left () "
                f"sum(rate({_LATENCY}_count{{$of}}[$__rate_interval]))"
            },
        ),
        Panel("Behind, down or stuck", "bool_yes_no", {"{{job}}": "scoring:behind:bool{$flow}"}),
    ],
    "Lag": [
        Panel(
            "Records behind", "short", {"{{topic}}": "sum by (topic) (scoring_lag_records{$of})"}
        ),
        Panel(
            "Age of the oldest record that waits",
            "s",
            {"{{topic}} {{partition}}": "max by (topic, partition) (scoring_lag_seconds{$of})"},
        ),
        Panel(
            "Smallest age of a record",
            "s",
            {"{{instance}}": "scoring_record_age_seconds{$of}"},
            help="Of the records passed on in the last quarter of a second; if none was, of the "
            "oldest one waiting.",
        ),
        Panel(
            "Time until retention deletes what is unread",
            "s",
            {"{{topic}}": "min by (topic) (scoring_retention_headroom_seconds{$of})"},
        ),
        Panel(
            "Since the newest record",
            "s",
            {"{{topic}}": "time() - max by (topic) (scoring_last_record_timestamp_seconds{$of})"},
        ),
        Panel("Records buffered", "short", {"{{instance}}": "scoring_buffered_records{$of}"}),
    ],
    "Throughput": [
        Panel("Events", "eps", rate("scoring_events_total", "topic", "outcome")),
        Panel("Decisions", "eps", rate("scoring_decisions_total", "decision"), stacked=True),
        Panel("Predictions", "eps", rate("scoring_predictions_total", "score_mode"), stacked=True),
        Panel("Dead letters", "eps", rate("scoring_dead_letters_total", "topic", "reason")),
        Panel("Late events", "eps", rate("scoring_late_events_total", "view", "within")),
        Panel(
            "Events of a micro-batch",
            "short",
            mean("scoring_batch_events") | quantiles("scoring_batch_events", "", 0.5, 0.99),
        ),
        Panel(
            "Utilisation",
            "percentunit",
            {"{{instance}}": "rate(scoring_worker_busy_seconds_total{$of}[$__rate_interval])"},
            help="Share of the time in which the worker had something to do.",
        ),
        Panel(
            "Held back by the rate limit",
            "percentunit",
            {"{{instance}}": "rate(scoring_throttled_seconds_total{$of}[$__rate_interval])"},
        ),
        Panel("Overload level", "none", {"{{instance}}": "scoring_overload_level{$of}"}),
    ],
    "Stage latency": [
        Panel(
            "Share of the worker's time",
            "percentunit",
            rate("scoring_stage_seconds_sum", "stage"),
            stacked=True,
        ),
        Panel(
            "Time of a micro-batch, mean",
            "s",
            {
                "{{stage}}": "sum by (stage) (rate(scoring_stage_seconds_sum{$of}"
                "[$__rate_interval])) / "
                "sum by (stage) (rate(scoring_stage_seconds_count{$of}[$__rate_interval]))"
            },
        ),
        Panel("Time of a micro-batch, p99", "s", quantiles("scoring_stage_seconds", "stage", 0.99)),
    ],
    "State and recovery": [
        Panel("Since the last epoch", "s", {"{{instance}}": "scoring:epoch_age:seconds{$of}"}),
        Panel(
            "Length of an epoch",
            "s",
            mean("scoring_epoch_seconds") | quantiles("scoring_epoch_seconds", "", 0.99),
        ),
        Panel(
            "Pause of a snapshot",
            "s",
            mean("scoring_snapshot_seconds") | quantiles("scoring_snapshot_seconds", "", 0.99),
        ),
        Panel(
            "State in a snapshot",
            "bytes",
            {"{{instance}}": "scoring_snapshot_bytes{$of}"},
            help="What was given to the last one: state that an epoch did not touch is not in it.",
        ),
        Panel("Recovery store", "bytes", {"{{instance}}": "scoring_recovery_store_bytes{$of}"}),
        Panel(
            "Room on its volume",
            "percentunit",
            {
                "{{instance}}": "scoring_recovery_volume_free_bytes{$of} "
                "/ scoring_recovery_volume_bytes{$of}"
            },
        ),
        Panel(
            "Records compared at the last start",
            "short",
            {"{{topic}}": "sum by (topic) (scoring_resume_scan_records{$of})"},
        ),
        Panel(
            "What a restart could not do",
            "short",
            {
                "deleted unread, {{topic}}": "sum by (topic) (scoring_events_skipped_total{$of})",
                "before the state, {{view}}": "sum by (view) "
                "(scoring_events_before_state_total{$of})",
                "ids forgotten early": "sum(scoring_dedupe_forgotten_total{$of})",
            },
            help="Deleted by retention before they were read; answered without all of their past; "
            "duplicates of which may pass.",
        ),
        Panel(
            "Starts within an hour",
            "short",
            {"{{instance}}": "changes(process_start_time_seconds{$of}[1h])"},
        ),
    ],
    "Model and features": [
        Panel(
            "Model",
            "none",
            {
                "{{version}} {{schema_hash}}": "count by (version, schema_hash) "
                "(scoring_model_info{$of})"
            },
            "stat",
            "Processes by model version and schema.",
        ),
        Panel(
            "Scores",
            "none",
            {"{{le}}": "sum by (le) (increase(scoring_score_bucket{$of}[$__rate_interval]))"},
            "heatmap",
        ),
        Panel(
            "Flagged events",
            "percentunit",
            {
                "flagged": 'sum(rate(scoring_decisions_total{decision!="approve", $of}'
                "[$__rate_interval])) / sum(rate(scoring_decisions_total{$of}[$__rate_interval]))",
                "a day before": 'sum(rate(scoring_decisions_total{decision!="approve", $of}'
                "[$__rate_interval] offset 1d)) / "
                "sum(rate(scoring_decisions_total{$of}[$__rate_interval] offset 1d))",
            },
        ),
        Panel(
            "Missing values",
            "percentunit",
            {
                "{{feature}}": "sum by (feature) (rate(scoring_features_missing_total{$of}"
                "[$__rate_interval])) / on () group_left () "
                'sum(rate(scoring_predictions_total{score_mode="full", $of}[$__rate_interval]))'
            },
        ),
        Panel("Profile look-ups", "eps", rate("scoring_profile_lookups_total", "view", "result")),
        Panel(
            "Age of profiles",
            "s",
            {"{{view}}": "max by (view) (scoring_profile_age_seconds{$of})"},
        ),
        Panel("Reads of the store", "ops", rate("scoring_store_reads_total", "view", "result")),
        Panel(
            "Store left alone",
            "bool_yes_no",
            {"{{view}} {{instance}}": "scoring_store_breaker_open{$of}"},
            help="The circuit breaker is open.",
        ),
    ],
    "Kafka client": [
        Panel(
            "A broker answers",
            "bool_yes_no",
            {"{{instance}}": "scoring_brokers_reachable{$of}"},
        ),
        Panel(
            "Records not yet confirmed",
            "short",
            {"{{topic}}": "sum by (topic) (scoring_producer_queue_records{$of})"},
        ),
        Panel("Records written", "wps", rate("scoring_records_written_total", "topic")),
        Panel(
            "Records not written again after a crash",
            "wps",
            rate("scoring_records_suppressed_total", "topic"),
        ),
        Panel("Transactions", "ops", rate("scoring_transactions_total", "topic", "result")),
        Panel(
            "Flow",
            "none",
            {
                "{{delivery}} {{overload_policy}}": "count by (delivery, overload_policy) "
                "(scoring_flow_info{$of})"
            },
            "stat",
            "Processes by guarantee and overload policy.",
        ),
    ],
    "Process": [
        Panel(
            "CPU, cores",
            "none",
            {"{{instance}}": "rate(process_cpu_seconds_total{$of}[$__rate_interval])"},
        ),
        Panel("Memory", "bytes", {"{{instance}}": "process_resident_memory_bytes{$of}"}),
        Panel("Open files", "short", {"{{instance}}": "process_open_fds{$of}"}),
    ],
}

STARTS = "changes(process_start_time_seconds{$of}[2m]) > 0"


def expressions() -> Iterator[tuple[str, str]]:
    """Yield (panel, expression) of the whole dashboard, with Grafana's variables in it."""
    for row, panels in ROWS.items():
        for panel in panels:
            for legend, expr in panel.series.items():
                yield f"{row}: {panel.title}: {legend}", _written(expr)
    yield "annotation: starts", _written(STARTS)


def plain(expr: str) -> str:
    """Return PromQL without Grafana's variables."""
    for name, value in (
        ("$__rate_interval", "5m"),
        ("$namespace", ".*"),
        ("$job", ".*"),
        ("$instance", ".*"),
    ):
        expr = expr.replace(name, value)
    return expr


def dashboard() -> dict[str, Any]:
    """Return Grafana's dashboard model."""
    ids = itertools.count(1)
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": next(ids),
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1},
                "panels": [],
            }
        )
        y += 1
        for place, panel in enumerate(row):
            at = {
                "x": place % _COLUMNS * (_WIDTH // _COLUMNS),
                "y": y + place // _COLUMNS * _HEIGHT,
                "w": _WIDTH // _COLUMNS,
                "h": _HEIGHT,
            }
            panels.append({"id": next(ids), "gridPos": at, **_panel(panel)})
        y += -(-len(row) // _COLUMNS) * _HEIGHT
    return {
        "uid": "scoring-flow",
        "title": "Scoring flow",
        "description": "Generated by k8s/monitoring/dashboard.py: change that.",
        "tags": ["scoring"],
        "editable": True,
        "graphTooltip": 1,  # one cross-hair for all panels
        "schemaVersion": 38,
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "timezone": "",
        "templating": {"list": [_data_source(), *map(_variable, ("namespace", "job", "instance"))]},
        "annotations": {
            "list": [
                {
                    "name": "Starts",
                    "datasource": _SOURCE,
                    "enable": True,
                    "iconColor": "blue",
                    "expr": _written(STARTS),
                    "titleFormat": "{{instance}} started",
                }
            ]
        },
        "panels": panels,
    }


def _written(expr: str) -> str:
    for name, matchers in _MATCHERS.items():
        expr = expr.replace(name, matchers)
    return expr


def _panel(panel: Panel) -> dict[str, Any]:
    once = panel.kind == "stat"
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": _SOURCE,
            "expr": _written(expr),
            "legendFormat": legend,
            "editorMode": "code",
            "format": "heatmap" if panel.kind == "heatmap" else "time_series",
            "instant": once,
            "range": not once,
        }
        for number, (legend, expr) in enumerate(panel.series.items())
    ]
    defaults: dict[str, Any] = {"unit": panel.unit}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults["min"] = 0
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 40 if panel.stacked else 8,
            "showPoints": "never",
            "stacking": {"group": "A", "mode": "normal" if panel.stacked else "none"},
        }
        options = {
            "legend": {
                "showLegend": True,
                "displayMode": "table",
                "placement": "bottom",
                "calcs": ["lastNotNull", "max"],
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "stat":
        defaults["noValue"] = "none"
        options = {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "value_and_name",
            "colorMode": "none",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
        }
    elif panel.kind == "heatmap":
        options = {
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Blues", "steps": 64, "scale": "exponential"},
            "legend": {"show": True},
            "tooltip": {"mode": "single", "yHistogram": False},
            "yAxis": {"axisPlacement": "left", "unit": "none"},
        }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


def _data_source() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "refresh": 1,
    }


def _variable(label: str) -> dict[str, Any]:
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": f"label_values(scoring_flow_info, {label})", "refId": label},
        "refresh": 2,  # with the time range
        "sort": 1,
        "hide": 0,
        "includeAll": True,
        # Also what has no such label, as without Kubernetes nothing has a namespace.
        "allValue": ".*",
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser("python -m k8s.monitoring.dashboard", description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    text = json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"
    if options.check:
        if FILE.exists() and FILE.read_text() == text:
            return 0
        print(f"{FILE} is not what this module writes: run it without --check", file=sys.stderr)
        return 1
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
