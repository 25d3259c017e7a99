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

#: After so many seconds without a look, what was seen is older by them.
_OVERDUE_S = 2.0


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
        self._looked_at = time.monotonic()
        self._stats = SourceStats()
        metrics.record_age.set_function(lambda: self._aged(self._stats.age_s))
        self._known: set[tuple[str, int]] = set()
        self._outages: int | None = None
        self._fine_at = time.monotonic()  # the last time that all was well, or could be

    def __call__(self, stats: SourceStats) -> None:
        """Tell what has changed since the last call. O(partitions)."""
        metrics = self._metrics
        self._stats, self._looked_at = stats, time.monotonic()
        for (topic, partition), records in stats.lag.items():
            metrics.lag.labels(topic, str(partition)).set(records)
        for of in stats.lag_s.keys() - self._known:
            self._known.add(of)
            self._serve_lag(*of)
        for topic, newest_ms in stats.newest_ms.items():
            metrics.last_record.labels(topic).set(newest_ms / 1000)
        metrics.set_skipped(stats.skipped)
        metrics.buffered.set(stats.buffered)
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

    def _serve_lag(self, topic: str, partition: int) -> None:
        """Let a partition's lag in seconds be computed when it is asked for."""

        def seconds() -> float:
            return self._aged(self._stats.lag_s.get((topic, partition), 0.0))

        self._metrics.lag_s.labels(topic, str(partition)).set_function(seconds)
        if topic in self._retention_s:
            kept_s = self._retention_s[topic]
            headroom = self._metrics.headroom.labels(topic, str(partition))
            headroom.set_function(lambda: kept_s - seconds())

    def _aged(self, seconds: float) -> float:
        """Return an age seen at the last look as of now: nobody looks where the worker is held up.

        While no broker answers, for all that is known something has waited since then.
        """
        unseen_s = time.monotonic() - self._looked_at
        if unseen_s > _OVERDUE_S:
            seconds += unseen_s
        since = self._health.silent_since()
        return seconds if since is None else max(seconds, time.monotonic() - since)

    def _control(self, stats: SourceStats) -> None:
        if self._overload is None:
            return
        before, self._outages = self._outages, stats.outages + Wait.outages
        now = time.monotonic()
        if before is None or stats.rebuilding:  # what comes meanwhile waits like in a downtime
            self._overload.begins()
        elif self._outages != before:
            self._overload.interrupted(now - self._fine_at)
        going_on = [since for since in (stats.outage_since, Wait.since) if since is not None]
        # An outage is noticed some time after it began.
        self._fine_at = min([self._fine_at, *going_on] if going_on else [now])
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
