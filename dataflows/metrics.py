"""What the flow counts: one registry, observed once a batch, served for Prometheus.

The account must balance for each topic that is scored:
``read = scored + dead_lettered + duplicate + shed`` once a flow has drained; fraud reports are
``applied`` instead of scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client import values as prometheus_values
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

# Feast 0.67 sets PROMETHEUS_MULTIPROC_DIR when it is imported. If that comes first,
# prometheus_client keeps values in files, shared by name between registries; ours are our own.
prometheus_values.ValueClass = prometheus_values.MutexValue

#: Bucket bounds of latencies in seconds, on the objectives.
LATENCY_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
)  # fmt: skip

OUTCOMES = ("read", "scored", "applied", "dead_lettered", "duplicate", "shed")


class LatencyHistogram(Collector):
    """A latency distribution fed with arrays: exact to 1 % or 10 µs from 10 µs to an hour, then
    "an hour".

    Kept as an HDR histogram, exported as a Prometheus histogram.
    """

    #: Steps a factor of e that latencies are rounded to before they are counted. In a backlog all
    #: are different, and the histogram takes them one by one.
    _STEPS = 500

    _UNIT_S = 1e-5
    _MOST_UNITS = round(3600 / _UNIT_S)

    def __init__(self, name: str, help: str, registry: CollectorRegistry) -> None:
        self._name, self._help = name, help
        self._histogram = HdrHistogram(1, self._MOST_UNITS, 2)
        self._bounds = np.array(LATENCY_BOUNDS_S)
        self._buckets = np.zeros(len(LATENCY_BOUNDS_S) + 1, np.int64)
        self._sum = 0.0
        registry.register(self)

    def observe_ms(self, latencies: npt.NDArray[np.float64]) -> None:
        """Add latencies in ms, float64 of any length; negative ones (clock skew) count as 0."""
        if len(latencies) == 0:
            return
        seconds = np.maximum(latencies, 0.0) / 1000
        self._sum += float(seconds.sum())
        self._buckets += np.bincount(
            np.searchsorted(self._bounds, seconds), minlength=len(self._buckets)
        )
        # HdrHistogram drops what is out of its range, and a backlog can be hours old.
        in_range = np.clip(seconds / self._UNIT_S, 1, self._MOST_UNITS)
        steps = np.bincount((np.log(in_range) * self._STEPS + 0.5).astype(np.intp))
        for step in np.flatnonzero(steps).tolist():
            unit = min(round(math.exp(step / self._STEPS)), self._MOST_UNITS)
            self._histogram.record_value(unit, int(steps[step]))

    def percentile_ms(self, *percentiles: float) -> dict[str, float | None]:
        """Return percentiles in ms, by name: ``{"p50": 2.1, …}``; None before any observation."""
        histogram = self._histogram
        return {
            f"p{p:g}": None
            if histogram.get_total_count() == 0
            else round(histogram.get_value_at_percentile(p) * self._UNIT_S * 1000, 3)
            for p in percentiles
        }

    def collect(self) -> Any:
        cumulative = np.cumsum(self._buckets).tolist()
        bounds = [*(f"{bound:g}" for bound in LATENCY_BOUNDS_S), "+Inf"]
        buckets = list(zip(bounds, cumulative, strict=True))
        yield HistogramMetricFamily(self._name, self._help, buckets=buckets, sum_value=self._sum)


class Metrics:
    """All metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.events = Counter(
            "events", "Events by input topic and outcome", ["topic", "outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.dead_letters = Counter(
            "dead_letters", "Refused events by input topic and reason", ["topic", "reason"],
            registry=self.registry,
        )  # fmt: skip
        self.decisions = Counter(
            "decisions", "Predictions by decision", ["decision"], registry=self.registry
        )
        self.late_events = Counter(
            "late_events", "Events behind the newest of their shard, by view and whether they were "
            "within the allowed lateness", ["view", "within"], registry=self.registry,
        )  # fmt: skip
        self.written = Counter(
            "records_written", "Records on the brokers for good, by output topic", ["topic"],
            registry=self.registry,
        )  # fmt: skip
        self.suppressed = Counter(
            "records_suppressed",
            "Records not written again after a crash, being published already, by output topic",
            ["topic"],
            registry=self.registry,
        )
        self.dedupe_forgotten = Counter(
            "dedupe_forgotten",
            "Business ids forgotten before the dedupe horizon was over, for DEDUPE_MAX_IDS",
            registry=self.registry,
        )
        self.before_state = Counter(
            "events_before_state",
            "Answered events from before the end of the window state that the flow began with",
            ["view"],
            registry=self.registry,
        )
        self.profiles_missing = Counter(
            "profile_lookups_missing", "Lookups without a usable row, by Feast view", ["view"],
            registry=self.registry,
        )  # fmt: skip
        self.store_failures = Counter(
            "store_failures", "Failed reads of the online store", ["view"], registry=self.registry
        )
        self.lag = Gauge("lag_records", "Records behind the end of their partitions, all topics",
            registry=self.registry,
        )  # fmt: skip
        self._skipped = Counter(
            "events_skipped",
            "Records that retention deleted before they were read, passed over at a resume",
            ["topic", "partition"],
            registry=self.registry,
        )
        # A look-up of labels takes longer than to count.
        for counter in vars(self).values():
            if isinstance(counter, Counter):
                counter.labels = cache(counter.labels)  # type: ignore[method-assign]
        self.latency = LatencyHistogram(
            "end_to_end_latency_seconds",
            "Broker append of the event to delivery report of its prediction",
            self.registry,
        )

    def count(self, topic: str, outcome: str, n: int) -> None:
        """Add to the account of a topic."""
        if n:
            self.events.labels(topic, outcome).inc(n)

    def set_skipped(self, skipped: Mapping[tuple[str, int], int]) -> None:
        """Tell how many records retention took, in this life, by (topic, partition)."""
        so_far = self.skipped()
        for (topic, partition), n in skipped.items():
            more = n - so_far.get(f"{topic}/{partition}", 0)
            self._skipped.labels(topic, str(partition)).inc(more)

    def skipped(self) -> dict[str, int]:
        """Return "topic/partition" → records that retention took before they were read."""
        return {
            f"{sample.labels['topic']}/{sample.labels['partition']}": int(sample.value)
            for metric in self._skipped.collect()
            for sample in metric.samples
            if sample.name == "events_skipped_total"
        }

    def account(self) -> dict[str, dict[str, int]]:
        """Return topic → outcome → events so far."""
        found: dict[str, dict[str, int]] = {}
        for metric in self.events.collect():
            for sample in metric.samples:
                if sample.name == "events_total":
                    outcomes = found.setdefault(sample.labels["topic"], dict.fromkeys(OUTCOMES, 0))
                    outcomes[sample.labels["outcome"]] = int(sample.value)
        return found

    def serve(self, host: str, port: int) -> None:
        """Serve /metrics in a thread of its own."""
        start_http_server(port, host, self.registry)


METRICS = Metrics()
