"""What a source counts reaches the metrics, the health checks and the overload control."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from dataflows import observe
from dataflows.health import Health, endpoints
from dataflows.kafka import writer
from dataflows.kafka.source import SourceStats
from dataflows.kafka.writer import Wait
from dataflows.metrics import Metrics
from dataflows.observe import Observer
from dataflows.overload import Overload


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"scoring_{name}", labels)


def test_counts_of_the_source_are_served(tmp_path: Path) -> None:
    (tmp_path / "part-0.sqlite3").write_bytes(b"x" * 1000)
    (tmp_path / "part-0.sqlite3-wal").write_bytes(b"x" * 24)
    metrics, health = Metrics(), Health()
    observer = Observer(metrics, health, None, {"tx": 3600.0}, tmp_path)
    stats = SourceStats(
        lag={("tx", 0): 7, ("news", 1): 0},
        lag_s={("tx", 0): 2.5, ("news", 1): 0.0},
        newest_ms={"tx": 1_700_000_000_500},
        buffered=5,
        busy_s=1.5,
        throttled_s=0.25,
        age_s=0.1,
    )
    for _ in range(2):  # counters grow by what is new
        observer(stats)
    assert value(metrics, "lag_records", topic="tx", partition="0") == 7
    assert value(metrics, "lag_seconds", topic="tx", partition="0") == 2.5
    assert value(metrics, "retention_headroom_seconds", topic="tx", partition="0") == 3597.5
    assert value(metrics, "retention_headroom_seconds", topic="news", partition="1") is None
    assert value(metrics, "last_record_timestamp_seconds", topic="tx") == 1_700_000_000.5
    assert value(metrics, "buffered_records") == 5
    assert value(metrics, "worker_busy_seconds_total") == 1.5
    assert value(metrics, "throttled_seconds_total") == 0.25
    assert value(metrics, "record_age_seconds") == 0.1
    assert value(metrics, "epoch_seconds_count") == 0

    metrics.given_bytes = 300
    stats.epochs, stats.snapshot_s, stats.outage_since = 1, 0.02, 1.0
    observer(stats)
    assert value(metrics, "epoch_seconds_count") == 1
    assert value(metrics, "snapshot_seconds_sum") == 0.02
    assert value(metrics, "snapshot_bytes") == 300
    assert value(metrics, "recovery_store_bytes") == 1024
    assert value(metrics, "recovery_volume_bytes") == shutil.disk_usage(tmp_path).total
    assert health.silent_since() == 1.0


def test_the_end_of_an_outage_and_an_empty_queue_reach_the_control(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1_000_000.0]
    control = Overload(
        "degrade", target_s=0.5, deadline_s=5, now_s=lambda: now[0], elapsed_s=lambda: now[0]
    )
    observer = Observer(Metrics(), Health(), control, {}, None)
    control.level = 1
    stats = SourceStats(lag={("tx", 0): 1})

    def observed_for(seconds: int) -> int:
        for _ in range(2 * seconds):
            now[0] += 0.5
            observer(stats)
        return control.level

    assert observed_for(20) == 1, "something waits, and nothing is known of its age"
    stats.lag["tx", 0] = 0
    assert observed_for(3) == 0

    began_ms = control._began_ms
    elapsed = [500.0]
    monkeypatch.setattr(observe.time, "monotonic", lambda: elapsed[0])
    observer(stats)
    for told in ("reading", "writing", "of nothing until it was over"):
        elapsed[0] += 100
        now[0] += 100
        observer(stats)  # all is well
        if told == "reading":
            stats.outage_since = elapsed[0] - 3  # noticed late
        elif told == "writing":
            monkeypatch.setattr(Wait, "since", elapsed[0] - 3)
        for _ in range(4):
            elapsed[0] += 0.5
            now[0] += 0.5
            if told != "of nothing until it was over":
                observer(stats)
        elapsed[0] += 1
        now[0] += 1
        stats.outage_since = None
        monkeypatch.setattr(Wait, "since", None)
        stats.outages += 1
        observer(stats)
        lasted_ms = 3_000 if told == "of nothing until it was over" else 6_000
        assert control._outages_ms[-1] == (now[0] * 1000 - lasted_ms, now[0] * 1000)
    assert control._began_ms == began_ms
    assert len(control._outages_ms) == 3


def test_lag_goes_on_while_nobody_looks_and_while_no_broker_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elapsed = [500.0]
    monkeypatch.setattr(observe.time, "monotonic", lambda: elapsed[0])
    metrics, health = Metrics(), Health(now=lambda: elapsed[0])
    observer = Observer(metrics, health, None, {"tx": 3600.0}, None)
    lag_s = {("tx", 0): 2.5, ("tx", 1): 0.0}
    stats = SourceStats(lag_s=lag_s, age_s=0.25)

    def served() -> list[float | None]:
        lags = [value(metrics, "lag_seconds", topic="tx", partition=p) for p in "01"]
        headroom = value(metrics, "retention_headroom_seconds", topic="tx", partition="0")
        return [*lags, value(metrics, "record_age_seconds"), headroom]

    observer(stats)
    assert served() == [2.5, 0.0, 0.25, 3597.5]
    elapsed[0] += 1.0  # between two looks
    assert served() == [2.5, 0.0, 0.25, 3597.5]
    elapsed[0] += 9.0  # held up, for whatever reason
    assert served() == [12.5, 10.0, 10.25, 3587.5]
    observer(stats)
    stats.outage_since = 503.0  # the source looks on, and hears nothing
    observer(stats)
    assert served() == [7.0, 7.0, 7.0, 3593.0]
    stats.outage_since = None
    observer(stats)
    assert served() == [2.5, 0.0, 0.25, 3597.5]


def test_the_flow_begins_to_read_when_it_first_says_so() -> None:
    now = [100.0]
    control = Overload("drop", target_s=0.5, deadline_s=5, now_s=lambda: now[0])
    observer = Observer(Metrics(), Health(), control, {}, None)
    now[0] = 130.0  # to resume took a while
    observer(SourceStats(lag={("tx", 0): 1}))
    assert control._began_ms == 130_000


def test_a_wait_for_confirmations_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_TELL_AFTER_S", 0.0)
    health = Health(unconfirmed_since=lambda: Wait.since)
    health.model = "v1"
    health.reads()
    waits, before = [Wait("delivery", 60), Wait("delivery", 60)], Wait.outages
    waits[0].goes_on()
    assert Wait.outages == before, "it was not silent for long enough"
    assert all(check.ok for check in health.ready())
    assert not any(wait.is_too_long() for wait in waits)
    assert [check.ok for check in health.ready()] == [True, False]
    for wait in waits:
        wait.is_over()
    assert all(check.ok for check in health.ready())
    assert Wait.outages == before + 1, "one outage, however many partitions waited"


def test_files_that_go_while_they_are_looked_at_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()
    observer = Observer(metrics, Health(), None, {}, tmp_path)
    gone = tmp_path / "part-0.sqlite3-wal"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [gone])
    observer(SourceStats(epochs=1))
    assert value(metrics, "epoch_seconds_count") == 1


def test_health_is_what_a_supervisor_needs() -> None:
    now = [100.0]
    health = Health(stale_after_s=60, now=lambda: now[0])
    metrics = Metrics()
    metrics.count("tx", "read", 3)
    client = TestClient(endpoints(metrics.registry, health))
    now[0] += 1000
    assert client.get("/healthz").status_code == 200, "a long start is no reason for a restart"
    now[0] = 100.0
    starting = client.get("/readyz")
    assert starting.status_code == 503
    assert [check["ok"] for check in starting.json()["checks"]] == [True, False, False]

    health.model = "v1"
    health.reads()
    assert client.get("/readyz").status_code == 200
    health.outage_since = 90.0
    outage = client.get("/readyz")
    assert outage.status_code == 503
    assert "no broker has answered for 10 s" in outage.text
    assert client.get("/healthz").status_code == 200, "a restart brings no broker back"

    now[0] += 60.1
    stuck = client.get("/healthz")
    assert stuck.status_code == 503
    assert "160" not in stuck.text and "60 s ago" in stuck.text
    health.epoch_at = now[0]
    assert client.get("/healthz").status_code == 200

    served = client.get("/metrics")
    assert served.headers["content-type"].startswith("text/plain; version=")
    assert 'scoring_events_total{outcome="read",topic="tx"} 3.0' in served.text


@pytest.mark.parametrize("path", ["/", "/metric"])
def test_nothing_else_is_served(path: str) -> None:
    assert TestClient(endpoints(Metrics().registry, Health())).get(path).status_code == 404
