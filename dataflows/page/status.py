"""What the flow does, as one reading of its metrics; the page works out rates from two of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from prometheus_client import CollectorRegistry

#: Name of a sample → its labels and values.
Samples = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]

#: Steps in the order in which a batch meets them.
STAGES = ("decode", "card", "terminal", "profiles", "score", "encode", "produce", "snapshot")


class Latency(msgspec.Struct, frozen=True):
    """Latencies counted up to each bound in s, closed; and above the last one."""

    bounds_s: list[float]
    #: As in Prometheus, each includes those before; the last one is all.
    cumulative: list[int]


class Partition(msgspec.Struct, frozen=True):
    """How far behind one input partition is."""

    topic: str
    partition: int
    records: int | None
    #: Age of the oldest record not processed.
    seconds: float | None
    #: Until retention deletes the next record to be read; None if it never does, or not known.
    headroom_s: float | None


class Stage(msgspec.Struct, frozen=True):
    """The time one step took so far, for all batches."""

    name: str
    seconds: float
    batches: int


class Health(msgspec.Struct, frozen=True):
    """One thing that can be well or not, in words; `ok` is None where that is not known yet."""

    name: str
    ok: bool | None
    sentence: str


class Status(msgspec.Struct, frozen=True):
    """One reading. Counts and seconds are since the process started; None: not known (yet)."""

    #: Unix time of the reading, and of the start of the process.
    time: float
    started: float | None
    model_version: str | None
    schema_hash: str | None
    delivery: str | None
    overload_policy: str | None
    overload_level: int | None
    overload_name: str | None
    #: Topic → outcome → events.
    events: dict[str, dict[str, int]]
    #: Reason → refused events.
    dead_letters: dict[str, int]
    decisions: dict[str, int]
    score_modes: dict[str, int]
    latency: Latency | None
    #: The least age of the records passed on in the last quarter of a second; if none was, that of
    #: the oldest one waiting.
    record_age_s: float | None
    partitions: list[Partition]
    stages: list[Stage]
    batches: int
    batch_events: int
    worker_busy_s: float | None
    throttled_s: float | None
    #: Since an epoch became durable.
    epoch_age_s: float | None
    recovery_bytes: int | None
    resident_bytes: int | None
    health: list[Health]


@dataclass(frozen=True)
class Limits:
    """From where on something is not well."""

    #: Age of the oldest record not processed.
    lag_s: float = 60.0
    #: Time until retention deletes what is next to be read.
    headroom_s: float = 3600.0
    #: Since the last record of an input topic.
    silent_s: float = 86_400.0
    #: Free share of the volume of the recovery store.
    free: float = 0.1


def samples_of(registry: CollectorRegistry) -> Samples:
    """Return what a registry would export now."""
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def status_of(
    samples: Samples,
    now_s: float,
    *,
    limits: Limits = Limits(),
    checks: Sequence[Health] = (),
) -> Status:
    """Read a status out of samples taken at the Unix time `now_s`.

    `checks`, such as the process's own, come before what the samples say of health, and instead of
    it where they have its name; whether epochs end in time only they say. A metric that is not
    there leaves its value None or empty.
    """
    read = _Read(samples)
    model, flow = read.info("scoring_model_info"), read.info("scoring_flow_info")
    level = _whole(read.one("scoring_overload_level"))
    last_epoch = read.one("scoring_last_epoch_timestamp_seconds")
    partitions = _partitions(read)
    return Status(
        time=now_s,
        started=read.one("process_start_time_seconds"),
        model_version=model.get("version"),
        schema_hash=model.get("schema_hash"),
        delivery=flow.get("delivery"),
        overload_policy=flow.get("overload_policy"),
        overload_level=level,
        overload_name=None if level is None else _level_name(level, flow.get("overload_policy")),
        events=_events(read),
        dead_letters=read.by("scoring_dead_letters_total", "reason"),
        decisions=read.by("scoring_decisions_total", "decision"),
        score_modes=read.by("scoring_predictions_total", "score_mode"),
        latency=_latency(read),
        record_age_s=read.one("scoring_record_age_seconds"),
        partitions=partitions,
        stages=_stages(read),
        batches=_whole(read.one("scoring_batch_events_count")) or 0,
        batch_events=_whole(read.one("scoring_batch_events_sum")) or 0,
        worker_busy_s=read.one("scoring_worker_busy_seconds_total"),
        throttled_s=read.one("scoring_throttled_seconds_total"),
        epoch_age_s=now_s - last_epoch if last_epoch else None,
        recovery_bytes=_whole(read.one("scoring_recovery_store_bytes")),
        resident_bytes=_whole(read.one("process_resident_memory_bytes")),
        health=_joined(checks, _health(read, now_s, partitions, limits)),
    )


class _Read:
    """Find values among samples."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def all(self, name: str) -> Sequence[tuple[Mapping[str, str], float]]:
        return self._samples.get(name, ())

    def one(self, name: str) -> float | None:
        """Return the value of a metric without labels; None if it is not there or not a number."""
        for _, value in self.all(name):
            return None if math.isnan(value) else value
        return None

    def info(self, name: str) -> Mapping[str, str]:
        """Return the labels of the series that stands at 1: after a change there are several."""
        return next((labels for labels, value in self.all(name) if value), {})

    def by(self, name: str, label: str) -> dict[str, int]:
        """Return counts by one label, summed over the others."""
        found: dict[str, int] = {}
        for labels, value in self.all(name):
            found[labels[label]] = found.get(labels[label], 0) + int(value)
        return found


def _whole(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else int(value)


def _level_name(level: int, policy: str | None) -> str:
    """Say what the flow does at a level of overload; see `dataflows.overload`.

    At level 0 it may still answer in short what came in a downtime or is past the deadline. One
    reading does not tell: the page sees it from two.

    >>> [_level_name(level, "degrade") for level in (0, 1, 4)]
    ['normal', '1 in 2 scored in full', '1 in 16 scored in full']
    """
    if level == 0:
        return "normal"
    return "old events shed" if policy == "drop" else f"1 in {2**level} scored in full"


def _events(read: _Read) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for labels, value in read.all("scoring_events_total"):
        found.setdefault(labels["topic"], {})[labels["outcome"]] = int(value)
    return found


def _latency(read: _Read) -> Latency | None:
    buckets = sorted(
        (float(labels["le"]), int(value))
        for labels, value in read.all("scoring_end_to_end_latency_seconds_bucket")
    )
    if not buckets:
        return None
    return Latency(
        [bound for bound, _ in buckets if math.isfinite(bound)], [count for _, count in buckets]
    )


def _partitions(read: _Read) -> list[Partition]:
    found: dict[tuple[str, int], dict[str, float]] = {}
    for name in ("lag_records", "lag_seconds", "retention_headroom_seconds"):
        for labels, value in read.all(f"scoring_{name}"):
            key = labels["topic"], int(labels["partition"])
            if math.isfinite(value):
                found.setdefault(key, {})[name] = value
    return [
        Partition(
            topic,
            partition,
            _whole(values.get("lag_records")),
            values.get("lag_seconds"),
            values.get("retention_headroom_seconds"),
        )
        for (topic, partition), values in sorted(found.items())
    ]


def _stages(read: _Read) -> list[Stage]:
    seconds = {labels["stage"]: v for labels, v in read.all("scoring_stage_seconds_sum")}
    batches = read.by("scoring_stage_seconds_count", "stage")
    known = [name for name in STAGES if name in seconds]
    return [
        Stage(name, seconds[name], batches.get(name, 0))
        for name in [*known, *sorted(seconds.keys() - set(STAGES))]
    ]


# --- health ---------------------------------------------------------------------------------------


def _joined(checks: Sequence[Health], own: Sequence[Health]) -> list[Health]:
    """Put checks before the samples' own, as sentences like theirs; a name stands for one thing."""
    given = [
        Health(_capital(check.name), check.ok, f"{_capital(check.sentence).rstrip('.')}.")
        for check in checks
    ]
    names = {check.name for check in given}
    return [*given, *(health for health in own if health.name not in names)]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _health(
    read: _Read,
    now_s: float,
    partitions: Sequence[Partition],
    limits: Limits,
) -> list[Health]:
    return [
        *_brokers(read),
        *_freshness(read, partitions, limits),
        *_retention(partitions, limits),
        *_profiles(read),
        *_inputs(read, now_s, limits),
        *_volume(read, limits),
    ]


def _brokers(read: _Read) -> list[Health]:
    reachable = read.one("scoring_brokers_reachable")
    if reachable is None:
        return []
    if reachable:
        return [Health("Brokers", True, "The brokers answer.")]
    return [Health("Brokers", False, "No broker answers. The flow waits, and goes on by itself.")]


def _freshness(read: _Read, partitions: Sequence[Partition], limits: Limits) -> list[Health]:
    ages = [partition.seconds for partition in partitions if partition.seconds is not None]
    if not ages:
        return []
    if read.one("scoring_brokers_reachable") == 0:
        return [Health("Freshness", None, "No broker answers.")]
    oldest = max(ages)
    if oldest > limits.lag_s:
        return [Health("Freshness", False, f"The oldest waiting record is {span(oldest)} old.")]
    return [Health("Freshness", True, f"No record waits for more than {span(limits.lag_s)}.")]


def _retention(partitions: Sequence[Partition], limits: Limits) -> list[Health]:
    left = [p for p in partitions if p.headroom_s is not None]
    if not left:
        return []
    first = min(left, key=lambda p: p.headroom_s or 0.0)
    headroom = first.headroom_s or 0.0
    where = f"{first.topic}, partition {first.partition}"
    if headroom <= 0:
        return [Health("Retention", False, f"Records of {where} are deleted before they are read.")]
    return [
        Health(
            "Retention",
            headroom >= limits.headroom_s,
            f"Unread records are kept for {span(headroom)} more ({where}).",
        )
    ]


def _profiles(read: _Read) -> list[Health]:
    breakers = {labels["view"]: v for labels, v in read.all("scoring_store_breaker_open")}
    if not breakers:
        return []
    if refused := sorted(view for view, is_open in breakers.items() if is_open):
        return [
            Health(
                "Profiles",
                False,
                f"The store of {', '.join(refused)} does not answer. Rows from the cache, or none, "
                "are used; it is tried again by itself.",
            )
        ]
    return [Health("Profiles", True, "The online store answers.")]


def _inputs(read: _Read, now_s: float, limits: Limits) -> list[Health]:
    ages = {
        labels["topic"]: now_s - newest
        for labels, newest in read.all("scoring_last_record_timestamp_seconds")
    }
    return [
        Health(
            f"Input {topic}",
            age <= limits.silent_s,
            f"The newest record came {span(age)} ago."
            if age <= limits.silent_s
            else f"Silent for {span(age)}. Is what writes it still running?",
        )
        if age < now_s
        else Health(f"Input {topic}", None, "No record yet.")
        for topic, age in sorted(ages.items())
    ]


def _volume(read: _Read, limits: Limits) -> list[Health]:
    free = read.one("scoring_recovery_volume_free_bytes")
    size = read.one("scoring_recovery_volume_bytes")
    if free is None or not size:
        return []
    share = free / size
    sentence = f"{share:.0%} of the recovery volume is free."
    if share < limits.free:
        sentence += " When it is full, the flow stops: make room, or grow it."
    return [Health("Disk", share >= limits.free, sentence)]


def span(seconds: float) -> str:
    """Return a duration in words, to two digits or so.

    >>> [span(s) for s in (-1, 0.2, 59, 60, 5400, 7200, 200_000, 9_000_000)]
    ['0 s', '0 s', '59 s', '60 s', '90 min', '2 h', '2 days', '104 days']
    """
    seconds = max(seconds, 0.0)
    for unit, size, up_to in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds / size < up_to:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
