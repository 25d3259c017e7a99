"""What the worker tells of itself, a few times a second and after each epoch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from dataflows.health import Health
from dataflows.kafka.sink import outstanding
from dataflows.kafka.source import SourceStats
from dataflows.kafka.writer import Wait
from dataflows.metrics import Metrics
from dataflows.overload import Overload


class Observer:
    """Bring what a source counts to the metrics, to the health checks, and to the overload control.

    Args:
        retention_s: input topic → for how long it keeps records; where that is not known, none.
        store: directory of the recovery store; None: there is none.
    """

    def __init__(
        self,
        metrics: Metrics,
        health: Health,
        overload: Overload | None,
        retention_s: Mapping[str, float],
        store: Path | None,
    ) -> None:
        self._metrics, self._health, self._overload = metrics, health, overload
        self._retention_s, self._store = retention_s, store
        self._epochs, self._epoch_at = 0, time.monotonic()
        self._busy_s = self._throttled_s = 0.0
        self._given_bytes = 0
        self._outages: int | None = None

    def __call__(self, stats: SourceStats) -> None:
        """Tell what has changed since the last call. O(partitions)."""
        metrics = self._metrics
        for (topic, partition), records in stats.lag.items():
            metrics.lag.labels(topic, str(partition)).set(records)
        for (topic, partition), seconds in stats.lag_s.items():
            metrics.lag_s.labels(topic, str(partition)).set(seconds)
            if topic in self._retention_s:
                left_s = self._retention_s[topic] - seconds
                metrics.headroom.labels(topic, str(partition)).set(left_s)
        for topic, newest_ms in stats.newest_ms.items():
            metrics.last_record.labels(topic).set(newest_ms / 1000)
        metrics.set_skipped(stats.skipped)
        metrics.buffered.set(stats.buffered)
        metrics.record_age.set(stats.age_s)
        metrics.busy_s.inc(stats.busy_s - self._busy_s)
        metrics.throttled_s.inc(stats.throttled_s - self._throttled_s)
        self._busy_s, self._throttled_s = stats.busy_s, stats.throttled_s
        for topic, records in outstanding().items():
            metrics.producer_queue.labels(topic).set(records)
        self._health.outage_since = stats.outage_since
        if self._health.epoch_at is None:
            self._health.reads()
        self._control(stats)
        if stats.epochs > self._epochs:
            self._epochs = stats.epochs
            self._epoch_is_over(stats)

    def _control(self, stats: SourceStats) -> None:
        if self._overload is None:
            return
        before, self._outages = self._outages, stats.outages + Wait.outages
        if self._outages != before:  # it could not read until now: for an outage, or at the start
            self._overload.interrupted()
        if not stats.buffered and not any(stats.lag.values()):
            self._overload.idle()
        self._metrics.overload_level.set(self._overload.level)

    def _epoch_is_over(self, stats: SourceStats) -> None:
        metrics, now = self._metrics, time.monotonic()
        metrics.epoch_s.observe(now - self._epoch_at)
        metrics.snapshot_s.observe(stats.snapshot_s)
        metrics.stage_s.labels("snapshot").observe(stats.snapshot_s)
        metrics.last_epoch.set(time.time())
        self._epoch_at = now
        self._health.reads()
        metrics.snapshot_bytes.set(metrics.given_bytes - self._given_bytes)
        self._given_bytes = metrics.given_bytes
        if self._store is None:
            return
        try:  # five files, once an epoch: some 20 µs
            files = self._store.glob("*.sqlite3*")
            metrics.store_bytes.set(sum(file.stat().st_size for file in files))
            volume = shutil.disk_usage(self._store)
        except OSError:  # another process ends, and its files go: the next epoch tells
            return
        metrics.volume_free.set(volume.free)
        metrics.volume_bytes.set(volume.total)
