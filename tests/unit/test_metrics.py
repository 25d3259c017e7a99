"""The account and the latencies: what is counted is what is served and logged."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dataflows.metrics import LATENCY_BOUNDS_S, OUTCOMES, LatencyHistogram, Metrics


def served(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def histogram() -> tuple[LatencyHistogram, CollectorRegistry]:
    registry = CollectorRegistry()
    return LatencyHistogram("latency_seconds", "of a test", registry), registry


LATENCIES_MS = st.lists(
    st.floats(0, 4_000_000) | st.sampled_from([bound * 1000 for bound in LATENCY_BOUNDS_S]),
    max_size=40,
)


@settings(deadline=None)
@given(st.lists(LATENCIES_MS, max_size=4))
def test_buckets_are_those_of_a_naive_count(parts: list[list[float]]) -> None:
    """Cumulative, upper bounds closed, whatever the arrays they came in."""
    latency, registry = histogram()
    for part in parts:
        latency.observe(np.array(part))
    every = [ms / 1000 for part in parts for ms in part]
    samples = served(registry)
    for bound in LATENCY_BOUNDS_S:
        count = samples["scoring_latency_seconds_bucket", (("le", f"{bound:g}"),)]
        assert count == sum(seconds <= bound for seconds in every), bound
    assert samples["scoring_latency_seconds_bucket", (("le", "+Inf"),)] == len(every)
    assert samples["scoring_latency_seconds_count", ()] == len(every)
    assert samples["scoring_latency_seconds_sum", ()] == pytest.approx(sum(every))


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 3_600_000), min_size=1, max_size=200))
def test_percentiles_are_within_a_percent(latencies: list[float]) -> None:
    latency, _ = histogram()
    latency.observe(np.array(latencies))
    for percent in (50, 95, 99, 99.9):
        rank = max(1, int(percent / 100 * len(latencies) + 0.5))  # HdrHistogram's: the nearest
        exact = sorted(latencies)[rank - 1]
        (found,) = latency.percentile_ms(percent).values()
        assert found == pytest.approx(exact, rel=0.011, abs=0.011)


def test_nothing_observed_is_missed_while_somebody_looks() -> None:
    latency, registry = histogram()
    observed = threading.Event()

    def look() -> None:
        while not observed.is_set():
            generate_latest(registry)

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(2_000):
        latency.observe(np.full(100, 3.0))
    observed.set()
    looking.join()
    assert served(registry)["scoring_latency_seconds_count", ()] == 200_000
    assert latency.percentile_ms(50)["p50"] == pytest.approx(3, rel=0.01)


def test_clock_skew_counts_as_nothing_and_hours_as_an_hour() -> None:
    """A backlog of yesterday must show in the percentiles, not vanish from them."""
    latency, registry = histogram()
    latency.observe(np.array([-5.0, 2.0, 86_400_000.0, 86_400_000.0]))
    assert latency.percentile_ms(99)["p99"] == pytest.approx(3_600_000, rel=0.011)
    assert latency.percentile_ms(25)["p25"] == pytest.approx(0.01, abs=0.001)
    samples = served(registry)
    assert samples["scoring_latency_seconds_bucket", (("le", "0.001"),)] == 1
    assert samples["scoring_latency_seconds_sum", ()] == pytest.approx(172_800.002)


def test_percentiles_before_any_observation_are_none() -> None:
    latency, registry = histogram()
    latency.observe(np.empty(0))
    assert latency.percentile_ms(50, 99.9) == {"p50": None, "p99.9": None}
    assert served(registry)["scoring_latency_seconds_count", ()] == 0


def test_the_account_is_what_was_counted() -> None:
    metrics = Metrics()
    metrics.count("a", "read", 7)
    metrics.count("a", "scored", 5)
    metrics.count("a", "dead_lettered", 2)
    metrics.count("a", "read", 3)
    metrics.count("b", "applied", 1)
    metrics.count("b", "shed", 0)
    blank = dict.fromkeys(OUTCOMES, 0)
    assert metrics.account() == {
        "a": blank | {"read": 10, "scored": 5, "dead_lettered": 2},
        "b": blank | {"applied": 1},
    }
    labels = ("outcome", "read"), ("topic", "a")
    assert served(metrics.registry)["scoring_events_total", labels] == 10


def test_two_metrics_do_not_share_their_registry() -> None:
    one, two = Metrics(), Metrics()
    one.count("a", "read", 1)
    assert two.account() == {}


def test_values_are_the_process_own_even_where_feast_came_first() -> None:
    """Feast's import makes prometheus_client share values by name, through files."""
    code = (
        "import feast.metrics; from dataflows.metrics import Metrics; a, b = Metrics(), Metrics();"
        "a.count('t', 'read', 3); print(b.events.labels('t', 'read')._value.get())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"] or done.stdout.split() == ["0.0"]
