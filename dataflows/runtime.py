"""What the fraud flow runs with: everything its settings name, opened and checked at start."""

from __future__ import annotations

import atexit
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import structlog
from bytewax.dataflow import Dataflow
from confluent_kafka import Consumer, KafkaException, Producer

from dataflows import recovery
from dataflows.kafka.errors import StartupError
from dataflows.kafka.sink import KafkaSink, poll_sinks
from dataflows.kafka.source import (
    KafkaSource,
    SourceStats,
    SourceTopic,
    install_drain_handlers,
)
from dataflows.kafka.topics import partition_counts
from dataflows.kafka.writer import Delivery
from dataflows.metrics import METRICS
from dataflows.settings import Settings, SettingsError, load
from dataflows.steps.distinct import Dedupe
from dataflows.steps.windows import Shards
from features.events import Event, EventDecoder
from features.fraud import FRAUD, SOURCES, FraudReport, Transaction
from features.online_store import OnlineStore, StoreNotReady, StoreUnavailable, freeze_gc
from features.profiles import PROFILES
from features.state_dir import StateDir, StateError
from model.package import PackageError, Thresholds
from model.scorer import Scorer

log = structlog.get_logger()

#: What an operator can mend; the message says how.
_REMEDIABLE = (
    PackageError,
    recovery.RecoveryError,
    SettingsError,
    StartupError,
    StateError,
    StoreNotReady,
    StoreUnavailable,
)

#: Steps with state that can be switched off by a setting.
OPTIONAL_STEPS = ("fraud.distinct.state",)


@dataclass(frozen=True)
class Runtime:
    """The graph's connections to the world."""

    source: KafkaSource
    #: Input topics by source code.
    topics: Sequence[str]
    decoder: EventDecoder
    shards: Shards
    store: OnlineStore
    scorer: Scorer
    thresholds: Thresholds
    reasons: int
    predictions: KafkaSink
    dead_letters: KafkaSink
    audit: KafkaSink
    audit_share: float
    #: None: events that come twice count twice.
    dedupe: Dedupe | None = None
    #: Topic → number of partitions.
    partitions: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def start(graph: Callable[[Runtime], Dataflow]) -> Dataflow:
        """Open everything, lay the graph, and look through the recovery store before it is loaded.

        On a problem that the operator must solve, say so and exit with 2. Also takes over SIGTERM
        and SIGINT, to drain, and reports the account at exit.
        """
        try:
            settings = load()
            configure_logging(settings)
            store = recovery.open_store("fraud", settings.delivery)
            runtime = Runtime.of(settings, store)
            flow = graph(runtime)
            if store is not None:
                found = recovery.check(
                    store.directory, flow, runtime.partitions, optional=OPTIONAL_STEPS
                )
                for sink in (runtime.predictions, runtime.dead_letters, runtime.audit):
                    sink.refuse_moved_keys(found.written)
                recovery.discard_open_epoch(store.directory, settings.delivery)
                if store.workers > 1:
                    recovery.fold_journals(store.directory, flow)
                else:
                    recovery.seed_windows(store.directory, flow)
                runtime.shards.stored.update(recovery.stored_windows(store.directory, flow))
                log.info(
                    "recovery store checked",
                    directory=str(store.directory),
                    snapshots=found.snapshots,
                    bytes=found.bytes,
                    resume_epoch=found.epoch,
                )
        except _REMEDIABLE as error:
            print(f"dataflows.fraud cannot start:\n{error}", file=sys.stderr)
            raise SystemExit(2) from None
        install_drain_handlers(report)
        if settings.metrics_port:
            METRICS.serve(settings.metrics_host, settings.metrics_port)
        atexit.register(report)
        freeze_gc()
        log.info(
            "starting",
            model=runtime.scorer.version,
            schema_hash=FRAUD.schema_hash,
            chunk=runtime.scorer.chunk,
            brokers=settings.kafka_bootstrap_servers,
        )
        return flow

    @staticmethod
    def of(settings: Settings, recovery_store: recovery.Store | None = None) -> Runtime:
        """Open everything the settings name.

        Raises SettingsError, StateError, PackageError, StoreNotReady, StoreUnavailable or
        StartupError, each with a remedy.
        """
        partitions = _check_kafka(settings)
        topic_of: dict[type[Event], str] = {
            Transaction: settings.transactions_topic,
            FraudReport: settings.fraud_reports_topic,
        }
        topics = [topic_of[event] for event in SOURCES]
        start = None
        if settings.state_dir is not None:
            start = StateDir(settings.state_dir, FRAUD, settings.shards)
        scorer = Scorer.load(settings.model_dir, names=FRAUD.names, schema_hash=FRAUD.schema_hash)
        store = OnlineStore.open(
            settings.feast_repo,
            PROFILES,
            cache_ttl_s=settings.feast_cache_ttl_s,
            cache_rows=settings.feast_cache_rows,
        )
        skew_ms = round(settings.max_clock_skew_s * 1000)

        def sink(topic: str, observe: Callable[[Delivery], None]) -> KafkaSink:
            return KafkaSink(
                topic,
                settings.producer(),
                delivery=settings.delivery,
                consumer_config=settings.consumer(),
                owner=settings.group_id,
                transaction_s=settings.transaction_s,
                past_retention=settings.resume_past_retention,
                tail_max_records=settings.tail_max_records,
                either_copy=settings.dedupe,
                observe=observe,
                startup_timeout_s=settings.startup_timeout_s,
            )

        def predicted(delivery: Delivery) -> None:
            answered = delivery.delivered + delivery.suppressed
            METRICS.count(settings.transactions_topic, "scored", answered)
            METRICS.count(settings.transactions_topic, "dead_lettered", delivery.too_large)
            METRICS.latency.observe_ms(delivery.latency_ms)
            written(delivery)

        def written(delivery: Delivery) -> None:
            METRICS.written.labels(delivery.topic).inc(delivery.delivered)
            METRICS.suppressed.labels(delivery.topic).inc(delivery.suppressed)

        return Runtime(
            source=KafkaSource(
                [SourceTopic(topic_of[event], event.stream_time) for event in SOURCES],
                settings.consumer(),
                group_id=settings.group_id,
                batch_size=settings.batch_size,
                start=settings.start_at,
                keep_offsets=settings.delivery != "at_most_once",
                max_clock_skew_ms=skew_ms,
                max_hold_s=settings.max_hold_s,
                buffer_records=settings.max_buffered,
                resume_past_retention=settings.resume_past_retention,
                max_skew_ms=round(settings.max_skew_s * 1000),
                peers=None if recovery_store is None else recovery_store.peers(),
                between_batches=poll_sinks,
                observe=_observe_source,
                startup_timeout_s=settings.startup_timeout_s,
            ),
            topics=topics,
            decoder=EventDecoder(
                SOURCES, max_clock_skew_ms=skew_ms, max_bytes=settings.max_event_bytes
            ),
            shards=Shards(
                settings.shards,
                start,
                journal=recovery_store is not None and recovery_store.workers == 1,
            ),
            store=store,
            scorer=scorer,
            thresholds=_thresholds(settings, scorer.manifest.thresholds),
            reasons=settings.reasons,
            predictions=sink(settings.predictions_topic, predicted),
            dead_letters=sink(settings.dead_letters_topic, written),
            audit=sink(settings.audit_topic, written),
            audit_share=settings.audit_share,
            partitions=partitions,
            dedupe=_dedupe(settings),
        )


def _check_kafka(settings: Settings) -> dict[str, int]:
    """Try the client settings, and look all topics up, before anything slow is loaded.

    Returns the number of partitions of each topic.
    """
    clients = (
        ("KAFKA_CONSUMER_OPTIONS", Consumer, {**settings.consumer(), "group.id": "startup"}),
        ("KAFKA_PRODUCER_OPTIONS", Producer, settings.producer()),
    )
    for variable, make, config in clients:
        try:
            client = make({"log_level": 0, **config})  # the error says it once
        except (KafkaException, TypeError) as error:
            # librdkafka's text may repeat a value, which may be a secret.
            named = re.search(r'property[:]? "([^"]+)"', str(error))
            what = f" {named[1]!r}" if named else ""
            raise SettingsError(
                f"{variable}: librdkafka refuses the setting{what}; see its list of settings"
            ) from None
    topics = [
        settings.transactions_topic,
        settings.fraud_reports_topic,
        settings.predictions_topic,
        settings.dead_letters_topic,
        settings.audit_topic,
    ]
    return partition_counts(client, config, topics, timeout_s=settings.startup_timeout_s)


def _dedupe(settings: Settings) -> Dedupe | None:
    if not settings.dedupe:
        return None
    return Dedupe(round(settings.dedupe_horizon_s * 1000), settings.dedupe_max_ids)


def _thresholds(settings: Settings, shipped: Thresholds) -> Thresholds:
    given = {"review": settings.review_threshold, "block": settings.block_threshold}
    chosen = msgspec.structs.replace(
        shipped, **{name: value for name, value in given.items() if value is not None}
    )
    if chosen.review > chosen.block:
        raise SettingsError(
            f"the review threshold ({chosen.review:g}) is above the block threshold "
            f"({chosen.block:g}): set REVIEW_THRESHOLD and BLOCK_THRESHOLD together, or neither"
        )
    return chosen


def _observe_source(stats: SourceStats) -> None:
    METRICS.lag.set(sum(stats.lag.values()))
    METRICS.set_skipped(stats.skipped)


def report() -> None:
    """Log the account and the latencies: what the flow did, as of now."""
    log.info(
        "stopped",
        account=METRICS.account(),
        skipped=METRICS.skipped(),
        latency_ms=METRICS.latency.percentile_ms(50, 95, 99, 99.9),
    )


def configure_logging(settings: Settings) -> None:
    """Send log lines, the standard library's too, to stderr in the chosen form."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    renderer = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            *shared,
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
