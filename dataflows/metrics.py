"""What the flow counts: one registry, observed once a batch, served for Prometheus.

The account must balance for each topic that is scored:
``read = scored + dead_lettered + duplicate + shed`` once a flow has drained; fraud reports are
``applied`` instead of scored.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
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

SCORE_BOUNDS = (
    0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1,
)  # fmt: skip

#: First word of every name.
NAMESPACE = "scoring"

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)

OUTCOMES = ("read", "scored", "applied", "dead_lettered", "duplicate", "shed", "rebuilt")


class ArrayHistogram(Collector):
    """A Prometheus histogram fed with arrays: a call a micro-batch, not an event.

    Values are kept until there are `_WORTH_IT` of them, or somebody looks: of a few hundred, NumPy
    spends more on the calls than on the values. One thread observes, any may look.
    """

    #: Values that are counted at once, at least.
    _WORTH_IT = 4096

    def __init__(
        self, name: str, help: str, bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._help = f"{NAMESPACE}_{name}", help
        self._bounds = np.array(bounds)
        self._buckets = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0
        self._waiting: deque[npt.NDArray[np.float64]] = deque()
        self._values = 0
        self._counting = Lock()
        registry.register(self)

    def observe(self, values: npt.NDArray[np.float64]) -> None:
        """Add values, float64 of any length; upper bounds are closed. NaN is left out.

        The array is kept for a while: the caller does not change it any more.
        """
        self._waiting.append(values)
        self._values += len(values)
        if self._values >= self._WORTH_IT:
            self._values = 0
            self._catch_up()

    def collect(self) -> Any:
        self._catch_up()
        cumulative = np.cumsum(self._buckets).tolist()
        bounds = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        buckets = list(zip(bounds, cumulative, strict=True))
        yield HistogramMetricFamily(self._name, self._help, buckets=buckets, sum_value=self._sum)

    def _catch_up(self) -> None:
        with self._counting:
            parts = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if parts:
                self._count(np.concatenate(parts))

    def _count(self, values: npt.NDArray[np.float64]) -> None:
        known = values[values == values]
        self._sum += float(known.sum())
        self._buckets += np.bincount(
            np.searchsorted(self._bounds, known), minlength=len(self._buckets)
        )


class LatencyHistogram(ArrayHistogram):
    """A latency distribution: exact to 1 % or 10 µs from 10 µs to an hour, then "an hour".

    Observes milliseconds; negative ones (clock skew) count as 0. Kept as an HDR histogram, exported
    as a Prometheus histogram, in seconds.
    """

    #: Steps a factor of e that latencies are rounded to before they are counted. In a backlog all
    #: are different, and the histogram takes them one by one.
    _STEPS = 500

    _UNIT_S = 1e-5
    _MOST_UNITS = round(3600 / _UNIT_S)

    def __init__(self, name: str, help: str, registry: CollectorRegistry) -> None:
        super().__init__(name, help, LATENCY_BOUNDS_S, registry)
        self._histogram = HdrHistogram(1, self._MOST_UNITS, 2)

    def _count(self, values: npt.NDArray[np.float64]) -> None:
        seconds = np.maximum(values, 0.0) / 1000
        super()._count(seconds)
        # HdrHistogram drops what is out of its range, and a backlog can be hours old.
        in_range = np.clip(seconds / self._UNIT_S, 1, self._MOST_UNITS)
        steps = np.bincount((np.log(in_range) * self._STEPS + 0.5).astype(np.intp))
        for step in np.flatnonzero(steps).tolist():
            unit = min(round(math.exp(step / self._STEPS)), self._MOST_UNITS)
            self._histogram.record_value(unit, int(steps[step]))

    def percentile_ms(self, *percentiles: float) -> dict[str, float | None]:
        """Return percentiles in ms, by name: ``{"p50": 2.1, …}``; None before any observation."""
        self._catch_up()
        histogram = self._histogram
        return {
            f"p{p:g}": None
            if histogram.get_total_count() == 0
            else round(histogram.get_value_at_percentile(p) * self._UNIT_S * 1000, 3)
            for p in percentiles
        }


class _LabelCached:
    """Counters, gauges and histograms of one registry; a look-up of labels costs more than to
    count, so children are kept."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        return self._cached(Counter(name, help, labels, **self._of))

    def gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return self._cached(Gauge(name, help, labels, **self._of))

    def histogram(self, name: str, help: str, bounds: Sequence[float], *labels: str) -> Histogram:
        return self._cached(Histogram(name, help, labels, buckets=bounds, **self._of))

    @property
    def _of(self) -> dict[str, Any]:
        return {"namespace": NAMESPACE, "registry": self._registry}

    @staticmethod
    def _cached(metric: _Metric) -> _Metric:
        metric.labels = cache(metric.labels)  # type: ignore[method-assign]
        return metric


class Metrics:
    """All metrics of one process. Their names begin with ``scoring_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = _LabelCached(self.registry)
        # The account, and what it is made of.
        self.events = of.counter("events", "Events by input topic and outcome", "topic", "outcome")
        self.dead_letters = of.counter(
            "dead_letters", "Refused events by input topic and reason", "topic", "reason"
        )
        self.decisions = of.counter("decisions", "Predictions by decision", "decision")
        self.predictions = of.counter(
            "predictions", "Predictions by how they were made", "score_mode"
        )
        self.late_events = of.counter(
            "late_events",
            "Events behind the newest of their shard, by view and whether they were within the "
            "allowed lateness",
            *("view", "within"),
        )
        self._skipped = of.counter(
            "events_skipped",
            "Records that retention deleted before they were read, passed over at a resume",
            *("topic", "partition"),
        )
        self.dedupe_forgotten = of.counter(
            "dedupe_forgotten",
            "Business ids forgotten before the dedupe horizon was over, for DEDUPE_MAX_IDS",
        )
        self.before_state = of.counter(
            "events_before_state",
            "Answered events from before the end of the window state that the flow began with",
            "view",
        )
        # What was written.
        self.written = of.counter(
            "records_written", "Records on the brokers for good, by output topic", "topic"
        )
        self.suppressed = of.counter(
            "records_suppressed",
            "Records not written again after a crash, being published already, by output topic",
            "topic",
        )
        self.transactions = of.counter(
            "transactions", "Kafka transactions by output topic and result", "topic", "result"
        )
        self.resume_scan = of.gauge(
            "resume_scan_records",
            "Records published after the last snapshot that were compared at the start",
            "topic",
        )
        self.producer_queue = of.gauge(
            "producer_queue_records", "Records written and not yet confirmed", "topic"
        )
        # How far behind.
        self.lag = of.gauge(
            "lag_records", "Records behind the end of a partition", "topic", "partition"
        )
        self.lag_s = of.gauge(
            "lag_seconds",
            "Age of the oldest record of a partition that was not processed; 0 at its end",
            *("topic", "partition"),
        )
        self.record_age = of.gauge(
            "record_age_seconds",
            "Smallest age of the records passed on in the last quarter of a second; if none was, "
            "of the oldest one waiting",
        )
        self.headroom = of.gauge(
            "retention_headroom_seconds",
            "Time until retention deletes what is to be read next",
            *("topic", "partition"),
        )
        self.last_record = of.gauge(
            "last_record_timestamp_seconds",
            "When the broker appended the newest record processed, by input topic",
            "topic",
        )
        self.buffered = of.gauge("buffered_records", "Records read and not yet processed")
        # Look-ups.
        self.profile_lookups = of.counter(
            "profile_lookups",
            "Events by Feast view and what was known: fresh, stale (the store did not answer), or "
            "missing",
            *("view", "result"),
        )
        self.profile_age = of.gauge(
            "profile_age_seconds", "Mean age of the rows used by the last batch", "view"
        )
        self.store_reads = of.counter(
            "store_reads",
            "Reads of the online store by Feast view: ok, failed, late, or refused (circuit open)",
            *("view", "result"),
        )
        self.breaker_open = of.gauge(
            "store_breaker_open", "1 while the online store is left alone", "view"
        )
        # The model.
        self.features_missing = of.counter(
            "features_missing", "Feature values that were not there, of events scored", "feature"
        )
        self.score = ArrayHistogram("score", "Scores", SCORE_BOUNDS, self.registry)
        self.model_info = of.gauge(
            "model_info", "1, with the model's version and schema", "version", "schema_hash"
        )
        # The process.
        self.stage_s = of.histogram(
            "stage_seconds", "Time of a micro-batch in a step", LATENCY_BOUNDS_S, "stage"
        )
        self.batch_events = of.histogram(
            "batch_events", "Events of a micro-batch", (1, 4, 16, 64, 256, 1024, 4096)
        )
        self.busy_s = of.counter(
            "worker_busy_seconds", "Time in which the worker had something to do"
        )
        self.throttled_s = of.counter(
            "throttled_seconds", "Time in which the rate limit held records back"
        )
        self.overload_level = of.gauge(
            "overload_level",
            "One event in 2 to the power of this is scored in full, but for late ones, those that "
            "came in a downtime, and critical ones",
        )
        self.brokers_reachable = of.gauge(
            "brokers_reachable", "1 unless no broker answers; NaN: none was asked yet"
        )
        self.brokers_reachable.set(math.nan)
        self.epoch_s = of.histogram(
            "epoch_seconds", "From one durable snapshot to the next", LATENCY_BOUNDS_S
        )
        self.snapshot_s = of.histogram(
            "snapshot_seconds", "How long a snapshot stopped the worker", LATENCY_BOUNDS_S
        )
        self.snapshot_bytes = of.gauge(
            "snapshot_bytes", "State given to the last snapshot, in bytes"
        )
        #: The same, of all snapshots of this life.
        self.given_bytes = 0
        self.last_epoch = of.gauge(
            "last_epoch_timestamp_seconds", "When an epoch last became durable"
        )
        self.store_bytes = of.gauge("recovery_store_bytes", "Size of the recovery store")
        self.volume_free = of.gauge(
            "recovery_volume_free_bytes", "Room left on the recovery store's volume"
        )
        self.volume_bytes = of.gauge("recovery_volume_bytes", "Size of the recovery store's volume")
        self.flow_info = of.gauge(
            "flow_info", "1, with what the flow was told to do", "delivery", "overload_policy"
        )
        self.latency = LatencyHistogram(
            "end_to_end_latency_seconds",
            "Broker append of the event to delivery report of its prediction; not of shed events",
            self.registry,
        )
        ProcessCollector(registry=self.registry)

    def expect(
        self,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        reasons: Sequence[str],
        decisions: Sequence[str],
        modes: Sequence[str],
    ) -> None:
        """Export what may be counted as 0 from now on: a rate does not see a first value.

        `reasons` are those of dead letters, `modes` how predictions are made.
        """
        for topic in inputs:
            for outcome in OUTCOMES:
                self.events.labels(topic, outcome)
            for reason in reasons:
                self.dead_letters.labels(topic, reason)
        for topic in outputs:
            self.written.labels(topic)
            self.suppressed.labels(topic)
            for result in ("committed", "aborted"):
                self.transactions.labels(topic, result)
        for decision in decisions:
            self.decisions.labels(decision)
        for mode in modes:
            self.predictions.labels(mode)

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
            if sample.name == f"{NAMESPACE}_events_skipped_total"
        }

    def account(self) -> dict[str, dict[str, int]]:
        """Return topic → outcome → events so far."""
        found: dict[str, dict[str, int]] = {}
        for metric in self.events.collect():
            for sample in metric.samples:
                if sample.name == f"{NAMESPACE}_events_total":
                    outcomes = found.setdefault(sample.labels["topic"], dict.fromkeys(OUTCOMES, 0))
                    outcomes[sample.labels["outcome"]] = int(sample.value)
        return found


METRICS = Metrics()
