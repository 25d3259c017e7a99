"""The metrics of a flow that is well, or has one fault; without the flow.

python -m tests.monitoring.exporter PORT        a process of its own, that is well
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from prometheus_client import start_http_server

from dataflows.metrics import Metrics

VIEWS = ("customer_profile", "terminal_profile")
HOUR_S = 3600.0
BEAT_S = 0.5

#: What happens to the metrics every `BEAT_S`.
Beat = Callable[[Metrics], None]


def well(metrics: Metrics, events: int = 100) -> None:
    """Process events, each within 5 ms; two of a hundred are flagged."""
    now = time.time()
    flagged = events // 50
    for topic, n, outcome in (
        ("transactions", events, "scored"),
        ("fraud_reports", events // 50, "applied"),
    ):
        metrics.count(topic, "read", n)
        metrics.count(topic, outcome, n)
        metrics.last_record.labels(topic).set(now)
        metrics.lag.labels(topic, "0").set(0)
        metrics.lag_s.labels(topic, "0").set(0)
        metrics.headroom.labels(topic, "0").set(7 * 24 * HOUR_S)
    metrics.predictions.labels("full").inc(events)
    metrics.decisions.labels("approve").inc(events - flagged)
    metrics.decisions.labels("review").inc(flagged)
    metrics.latency.observe(np.full(events, 5.0))
    metrics.score.observe(np.linspace(0, 1, events))
    for view in VIEWS:
        metrics.profile_lookups.labels(view, "fresh").inc(events)
        metrics.profile_age.labels(view).set(12 * HOUR_S)
        metrics.breaker_open.labels(view).set(0)
    metrics.brokers_reachable.set(1)
    metrics.last_epoch.set(now)
    metrics.volume_free.set(6e9)
    metrics.volume_bytes.set(10e9)
    metrics.model_info.labels("1", "x").set(1)


def _dead_letters(metrics: Metrics) -> None:
    well(metrics)
    metrics.count("transactions", "read", 2)
    metrics.count("transactions", "dead_lettered", 2)


def _shedding(metrics: Metrics) -> None:
    well(metrics)
    metrics.count("transactions", "read", 2)
    metrics.count("transactions", "shed", 2)


def _degraded(metrics: Metrics) -> None:
    well(metrics)
    metrics.predictions.labels("cached").inc(10)


def _slow(metrics: Metrics) -> None:
    well(metrics)
    metrics.latency.observe(np.full(50, 400.0))


def _not_fast(metrics: Metrics) -> None:
    well(metrics)
    metrics.latency.observe(np.full(5, 40.0))


def _behind(metrics: Metrics) -> None:
    well(metrics)
    metrics.lag_s.labels("transactions", "0").set(8)


def _stalled(metrics: Metrics) -> None:
    well(metrics, events=0)
    metrics.lag.labels("transactions", "0").set(3)


def _no_epoch(metrics: Metrics) -> None:
    well(metrics)
    metrics.last_epoch.set(time.time() - 600)


def _no_broker(metrics: Metrics) -> None:
    well(metrics)
    metrics.brokers_reachable.set(0)


def _late(metrics: Metrics) -> None:
    well(metrics)
    metrics.headroom.labels("transactions", "0").set(0.5 * HOUR_S)


def _lost(metrics: Metrics) -> None:
    well(metrics)
    metrics.set_skipped({("transactions", 0): 7})


def _full(metrics: Metrics) -> None:
    well(metrics)
    metrics.volume_free.set(0.5e9)


def _silent(metrics: Metrics) -> None:
    well(metrics)
    metrics.last_record.labels("fraud_reports").set(time.time() - 25 * HOUR_S)


def _missing(metrics: Metrics) -> None:
    well(metrics)
    metrics.features_missing.labels("terminal_risk_1d").inc(5)


def _stale(metrics: Metrics) -> None:
    well(metrics)
    metrics.profile_lookups.labels("terminal_profile", "stale").inc(50)


def _old(metrics: Metrics) -> None:
    well(metrics)
    metrics.profile_age.labels("terminal_profile").set(48 * HOUR_S)


def _breaker(metrics: Metrics) -> None:
    well(metrics)
    metrics.breaker_open.labels("terminal_profile").set(1)


def _two_models(metrics: Metrics) -> None:
    well(metrics)
    metrics.model_info.labels("2", "x").set(1)


#: Fault → what it does, the alerts that it must raise.
FAULTS: dict[str, tuple[Beat, set[str]]] = {
    "none": (well, set()),
    "dead letters": (_dead_letters, {"ScoringDeadLetters"}),
    "shedding": (_shedding, {"ScoringShedding"}),
    "degraded": (_degraded, {"ScoringDegraded"}),
    "slow": (_slow, {"ScoringLatencyBudgetBurn", "ScoringLatencyGoalMissed"}),
    "not fast": (_not_fast, {"ScoringLatencyGoalMissed"}),
    "behind": (_behind, {"ScoringFreshnessBudgetBurn"}),
    "stalled": (_stalled, {"ScoringStalled"}),
    "no epoch": (_no_epoch, {"ScoringNoEpochClosed", "ScoringFreshnessBudgetBurn"}),
    "no broker": (_no_broker, {"ScoringBrokersUnreachable", "ScoringFreshnessBudgetBurn"}),
    "late": (_late, {"ScoringRetentionHeadroom"}),
    "lost": (_lost, {"ScoringRecordsLost"}),
    "full": (_full, {"ScoringRecoveryVolumeFilling"}),
    "silent": (_silent, {"ScoringReportStreamSilent"}),
    "missing": (_missing, {"ScoringFeatureMissing"}),
    "stale": (_stale, {"ScoringProfilesNotFresh"}),
    "old": (_old, {"ScoringProfilesOld"}),
    "breaker": (_breaker, {"ScoringStoreBreakerOpen"}),
    "two models": (_two_models, {"ScoringModelMismatch"}),
}


class Exporters:
    """Serve the metrics of flows on ports of their own, as long as the ``with`` block lasts."""

    def __init__(self, beats: dict[str, Beat]) -> None:
        self._beats = [(Metrics(), beat) for beat in beats.values()]
        for metrics, beat in self._beats:
            beat(metrics)
        self._servers = [
            start_http_server(0, "127.0.0.1", registry=metrics.registry)
            for metrics, _ in self._beats
        ]
        #: Name of the flow → port.
        self.ports = {
            name: int(server.server_port)
            for name, (server, _) in zip(beats, self._servers, strict=True)
        }
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Exporters:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for server, thread in self._servers:
            server.shutdown()
            server.server_close()
            thread.join()

    def _run(self) -> None:
        while not self._over.wait(BEAT_S):
            for metrics, beat in self._beats:
                beat(metrics)


def main(arguments: Sequence[str]) -> None:
    """Serve until killed."""
    metrics = Metrics()
    well(metrics)
    start_http_server(int(arguments[0]), "127.0.0.1", registry=metrics.registry)
    while True:
        time.sleep(BEAT_S)
        well(metrics)


if __name__ == "__main__":
    main(sys.argv[1:])
