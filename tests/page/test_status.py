"""A status is what the metrics say, in a real registry."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dataflows.health import Health as HealthOf
from dataflows.metrics import Metrics
from dataflows.page.status import STAGES, Health, Limits, Status, samples_of, status_of
from tests.page.feed import BEGAN_S, BOUNDS, VERSION, samples

NOW_S = BEGAN_S + 100


def status(**other: Any) -> Status:
    return status_of(samples(100, **other), NOW_S)


def verdict(name: str, **other: Any) -> tuple[bool | None, str]:
    found = {health.name: health for health in status(**other).health}[name]
    return found.ok, found.sentence


def test_a_registry_with_nothing_in_it() -> None:
    """The page comes up before the first metric does."""
    empty = status_of(samples_of(CollectorRegistry()), NOW_S)
    assert empty.time == NOW_S
    assert empty.health == []
    for field in msgspec.structs.fields(Status):
        value = getattr(empty, field.name)
        if field.name != "time":
            assert value in (None, 0, {}, []), field.name


def test_every_value_comes_out_of_a_real_registry() -> None:
    registry = CollectorRegistry()

    def gauge(name: str, value: float, **labels: str) -> None:
        made[name] = made.get(name) or Gauge(name, name, list(labels), registry=registry)
        (made[name].labels(**labels) if labels else made[name]).set(value)

    made: dict[str, Any] = {}
    counters: dict[str, tuple[list[str], dict[tuple[str, ...], int]]] = {
        "events": (["topic", "outcome"], {("a", "read"): 7, ("a", "scored"): 5, ("b", "read"): 3}),
        "dead_letters": (["topic", "reason"], {("a", "bad_json"): 2, ("b", "bad_json"): 4}),
        "decisions": (["decision"], {("block",): 1, ("approve",): 4}),
        "predictions": (["score_mode"], {("full",): 4, ("rule",): 1}),
    }
    for name, (labels, series) in counters.items():
        counter = Counter(name, name, labels, namespace="scoring", registry=registry)
        for values, n in series.items():
            counter.labels(*values).inc(n)
    for name, seconds in {"worker_busy_seconds": 12.5, "throttled_seconds": 1.5}.items():
        Counter(name, name, namespace="scoring", registry=registry).inc(seconds)
    gauge("scoring_model_info", 1, version="abc", schema_hash="def")
    gauge("scoring_flow_info", 1, delivery="exactly_once", overload_policy="degrade")
    gauge("scoring_overload_level", 2)
    gauge("scoring_record_age_seconds", 0.25)
    gauge("scoring_recovery_store_bytes", 4096)
    gauge("scoring_last_epoch_timestamp_seconds", NOW_S - 4)
    gauge("process_start_time_seconds", BEGAN_S)
    gauge("process_resident_memory_bytes", 1e6)
    for partition, (records, seconds, headroom) in {
        "1": (5, 0.5, 100.0),
        "0": (7, 0.0, math.inf),
    }.items():
        gauge("scoring_lag_records", records, topic="a", partition=partition)
        gauge("scoring_lag_seconds", seconds, topic="a", partition=partition)
        gauge("scoring_retention_headroom_seconds", headroom, topic="a", partition=partition)
    stage = Histogram("stage_seconds", "stages", ["stage"], namespace="scoring", registry=registry)
    stage.labels("score").observe(0.5)
    stage.labels("score").observe(0.25)
    stage.labels("decode").observe(0.125)
    stage.labels("of tomorrow").observe(1)
    batch = Histogram("batch_events", "sizes", namespace="scoring", registry=registry)
    batch.observe(30)
    batch.observe(12)
    latency = Histogram(
        "end_to_end_latency_seconds", "latency", namespace="scoring", buckets=BOUNDS,
        registry=registry,
    )  # fmt: skip
    for seconds in (0.0005, 0.003, 0.003, 99.0):
        latency.observe(seconds)

    found = status_of(samples_of(registry), NOW_S)
    assert (found.model_version, found.schema_hash) == ("abc", "def")
    assert (found.delivery, found.overload_policy) == ("exactly_once", "degrade")
    assert (found.overload_level, found.overload_name) == (2, "1 in 4 scored in full")
    assert found.events == {"a": {"read": 7, "scored": 5}, "b": {"read": 3}}
    assert found.dead_letters == {"bad_json": 6}
    assert found.decisions == {"block": 1, "approve": 4}
    assert found.score_modes == {"full": 4, "rule": 1}
    assert (found.worker_busy_s, found.throttled_s, found.record_age_s) == (12.5, 1.5, 0.25)
    assert (found.recovery_bytes, found.resident_bytes) == (4096, 1_000_000)
    assert (found.started, found.epoch_age_s) == (BEGAN_S, 4)
    assert [(p.partition, p.records, p.seconds, p.headroom_s) for p in found.partitions] == [
        (0, 7, 0.0, None),
        (1, 5, 0.5, 100.0),
    ]
    assert [(s.name, s.seconds, s.batches) for s in found.stages] == [
        ("decode", 0.125, 1),
        ("score", 0.75, 2),
        ("of tomorrow", 1, 1),
    ]
    assert (found.batches, found.batch_events) == (2, 42)
    assert found.latency is not None
    assert found.latency.bounds_s == list(BOUNDS)
    assert found.latency.cumulative == [1, 1, *[3] * (len(BOUNDS) - 2), 4]


def test_values_are_json() -> None:
    """Neither NaN nor infinity is."""
    odd = status(record_age_seconds=[({}, math.nan)], throttled_seconds_total=[({}, math.inf)])
    decoded = msgspec.json.decode(msgspec.json.encode(odd))
    assert decoded["record_age_s"] is None
    assert decoded["throttled_s"] is None


def test_stages_are_in_the_order_of_the_flow() -> None:
    assert [stage.name for stage in status().stages] == list(STAGES)


def test_after_a_change_of_model_the_new_one_is_named() -> None:
    both = [
        ({"version": "old", "schema_hash": "x"}, 0.0),
        ({"version": "new", "schema_hash": "x"}, 1.0),
    ]
    assert status(model_info=both).model_version == "new"


def test_under_the_policy_drop_nothing_is_sampled() -> None:
    dropping = [({"delivery": "at_least_once", "overload_policy": "drop"}, 1)]
    found = status(overload_level=[({}, 1)], flow_info=dropping)
    assert found.overload_name == "old events shed"


def test_checks_come_first_and_stand_for_what_they_name() -> None:
    checks = [Health("ready", False, "the graph is not built"), Health("brokers", False, "gone")]
    found = status_of(samples(1), NOW_S, checks=checks).health
    assert found[:2] == [
        Health("Ready", False, "The graph is not built."),
        Health("Brokers", False, "Gone."),
    ]
    assert [health.name for health in found].count("Brokers") == 1
    assert len({health.name for health in found}) == len(found) > 4


def test_all_that_is_read_is_exported() -> None:
    """Under the names of the metrics module: one that is renamed there would vanish here."""

    class Asked(dict[str, Any]):
        names: ClassVar[set[str]] = set()

        def get(self, name: str, default: Any = None) -> Any:
            self.names.add(name)
            return super().get(name, default)

    status_of(Asked(samples(1)), NOW_S)
    exported = {family.name for family in Metrics().registry.collect()}
    suffix = re.compile(r"_(total|bucket|sum|count)$")
    unknown = {n for n in Asked.names if not {n, suffix.sub("", n)} & exported}
    assert len(Asked.names) > 20
    assert unknown == set()


def test_a_flow_that_is_well_says_so() -> None:
    found = status()
    assert found.model_version == VERSION
    assert [health.name for health in found.health if not health.ok] == []
    assert {"Brokers", "Freshness", "Retention", "Profiles", "Disk"} <= {
        health.name for health in found.health
    }


@pytest.mark.parametrize(
    ("name", "other", "expected", "words"),
    [
        ("Brokers", {"brokers_reachable": [({}, 0)]}, False, "No broker answers"),
        ("Freshness", {"brokers_reachable": [({}, 0)]}, None, "No broker answers"),
        (
            "Freshness",
            {"lag_seconds": [({"topic": "a", "partition": "0"}, 61)]},
            False,
            "61 s old",
        ),
        (
            "Retention",
            {"retention_headroom_seconds": [({"topic": "a", "partition": "3"}, 3599)]},
            False,
            "60 min more (a, partition 3)",
        ),
        (
            "Retention",
            {"retention_headroom_seconds": [({"topic": "a", "partition": "3"}, -1)]},
            False,
            "deleted before they are read",
        ),
        ("Profiles", {"store_breaker_open": [({"view": "v"}, 1)]}, False, "store of v"),
        (
            "Input t",
            {"last_record_timestamp_seconds": [({"topic": "t"}, NOW_S - 86_401)]},
            False,
            "Silent for 24 h",
        ),
        (
            "Input t",
            {"last_record_timestamp_seconds": [({"topic": "t"}, 0)]},
            None,
            "No record yet",
        ),
        ("Disk", {"recovery_volume_free_bytes": [({}, 9e9)]}, False, "9% of"),
        ("Disk", {"recovery_volume_free_bytes": [({}, 11e9)]}, True, "11% of"),
    ],
)
def test_what_is_not_well_is_said(
    name: str, other: dict[str, Any], expected: bool | None, words: str
) -> None:
    ok, sentence = verdict(name, **other)
    assert ok is expected
    assert words in sentence


def test_whether_epochs_end_is_said_once_by_the_process() -> None:
    """As /healthz says it: it knows how long its epochs may take."""
    old = samples(100, last_epoch_timestamp_seconds=[({}, NOW_S - 150)])
    assert [h for h in status_of(old, NOW_S).health if h.name == "Epoch"] == []
    (check,) = HealthOf(stale_after_s=200.0, now=lambda: 1000.0, epoch_at=850.0).alive()
    found = status_of(old, NOW_S, checks=[Health(check.name, check.ok, check.sentence)])
    assert [h for h in found.health if h.name == "Epoch"] == [
        Health("Epoch", True, "The last epoch ended 150 s ago.")
    ]
    assert found.epoch_age_s == 150


def test_brokers_that_were_not_asked_yet_are_not_known() -> None:
    unknown = status(brokers_reachable=[({}, math.nan)])
    assert "Brokers" not in {health.name for health in unknown.health}


def test_a_partition_that_is_never_deleted_is_no_retention() -> None:
    forever = [({"topic": "a", "partition": "0"}, math.inf)]
    names = {health.name for health in status(retention_headroom_seconds=forever).health}
    assert "Retention" not in names


def test_limits_are_given() -> None:
    late = {"lag_seconds": [({"topic": "a", "partition": "0"}, 5)]}
    found = status_of(samples(100, **late), NOW_S, limits=Limits(lag_s=4))
    assert [health.ok for health in found.health if health.name == "Freshness"] == [False]
