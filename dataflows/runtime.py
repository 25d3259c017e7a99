"""What the fraud flow runs with: everything its settings name, opened and checked at start."""

from __future__ import annotations

import atexit
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Any

import msgspec
import structlog
from bytewax.dataflow import Dataflow
from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from dataflows import measure, recovery
from dataflows.acls import acls
from dataflows.health import Health, endpoints
from dataflows.kafka import access
from dataflows.kafka.client_log import Calm, without_numbers
from dataflows.kafka.errors import StartupError
from dataflows.kafka.security import Role, variables
from dataflows.kafka.sink import PREDICTION_TOO_LARGE, KafkaSink, poll_sinks
from dataflows.kafka.source import (
    KafkaSource,
    SourceTopic,
    drain_requested,
    install_drain_handlers,
)
from dataflows.kafka.topics import partition_counts, retention_s
from dataflows.kafka.writer import Delivery, Wait
from dataflows.metrics import METRICS
from dataflows.observe import Observer
from dataflows.overload import Overload
from dataflows.page import status as page_status
from dataflows.page.app import PageError, page
from dataflows.page.recent import Recent
from dataflows.page.status import Status
from dataflows.serve import ServeError, serve
from dataflows.settings import Settings, SettingsError, load
from dataflows.steps.distinct import Dedupe
from dataflows.steps.encode import SCORE_MODES
from dataflows.steps.short_answer import LastScores
from dataflows.steps.triage import Shedding
from dataflows.steps.windows import Shards
from features.batch import EventBatch
from features.events import REASONS, Event, EventDecoder
from features.fraud import FRAUD, SOURCES, FraudReport, Transaction, at_least
from features.guarded_reads import GuardedReads
from features.online_store import OnlineStore, StoreNotReady, freeze_gc
from features.profiles import PROFILES
from features.state_dir import StateDir, StateError
from model.package import DECISIONS, PackageError, Thresholds
from model.scorer import Scorer

log = structlog.get_logger()

#: What an operator can mend; the message says how.
_REMEDIABLE = (
    PackageError,
    PageError,
    recovery.RecoveryError,
    SettingsError,
    ServeError,
    StartupError,
    StateError,
    StoreNotReady,
)

#: Log lines that say the same, in half a minute.
_MOST_LINES = 10

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
    store: GuardedReads
    scorer: Scorer
    thresholds: Thresholds
    reasons: int
    predictions: KafkaSink
    dead_letters: KafkaSink
    audit: KafkaSink
    audit_share: float
    #: None: events that come twice count twice.
    dedupe: Dedupe | None = None
    #: None: all events are scored in full, however many come.
    shedding: Shedding | None = None
    #: Told each batch of predictions; None: nobody wants to know.
    notice: Callable[[EventBatch], None] | None = None
    #: Topic → number of partitions.
    partitions: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def start(graph: Callable[[Runtime], Dataflow]) -> Dataflow:
        """Open everything, lay the graph, and look through the recovery store before it is loaded.

        On a problem that the operator must solve, say so and exit with 2. Also takes over SIGTERM
        and SIGINT, to drain, and reports the account at exit.
        """
        # Process 1 of a container hears no SIGTERM until there is a handler; nothing is begun yet.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            settings = load()
            configure_logging(settings)
            store = recovery.open_store("fraud", settings.delivery)
            health = Health(_stale_after_s(settings), lambda: Wait.since)
            recent = _serve(settings, health)
            if store is not None and store.processes > 1 and settings.peers_port:
                store = store.meet(settings.peers_port, _orphaned)
            if settings.tracing_endpoint:
                _trace(settings.tracing_endpoint)
            runtime = Runtime.of(settings, store, health, recent)
            flow = graph(runtime)
            if store is not None:
                found = recovery.check(
                    store.directory,
                    flow,
                    runtime.partitions,
                    optional=OPTIONAL_STEPS,
                    whole=store.whole,
                )
                for sink in (runtime.predictions, runtime.dead_letters, runtime.audit):
                    sink.refuse_moved_keys(found.written)
                recovery.discard_open_epoch(store.directory, settings.delivery, store.whole)
                if store.keeps_journal:
                    recovery.seed_windows(store.directory, flow)
                else:
                    recovery.fold_journals(store.directory, flow, store.whole)
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
        health.model = runtime.scorer.version
        METRICS.model_info.labels(runtime.scorer.version, FRAUD.schema_hash).set(1)
        METRICS.flow_info.labels(settings.delivery, settings.overload_policy).set(1)
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
    def of(
        settings: Settings,
        recovery_store: recovery.Store | None = None,
        health: Health | None = None,
        recent: Recent | None = None,
    ) -> Runtime:
        """Open everything the settings name.

        `health` is told how the flow is, `recent` what it flags.

        Raises SettingsError, StateError, PackageError, StoreNotReady or StartupError, each with a
        remedy.
        """
        partitions, kept_s = _check_kafka(settings)
        METRICS.brokers_reachable.set(1)
        if (
            health is not None
        ):  # asked at a scrape: in an outage the worker waits, and tells nothing
            METRICS.brokers_reachable.set_function(lambda: health.silent_since() is None)
        topic_of: dict[type[Event], str] = {
            Transaction: settings.transactions_topic,
            FraudReport: settings.fraud_reports_topic,
        }
        topics = [topic_of[event] for event in SOURCES]
        METRICS.expect(
            topics,
            [settings.predictions_topic, settings.dead_letters_topic, settings.audit_topic],
            reasons=[*REASONS, PREDICTION_TOO_LARGE],
            decisions=DECISIONS,
            modes=SCORE_MODES,
        )
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
        reads = GuardedReads(store, budget_s=settings.feast_budget_ms / 1000)
        skew_ms = round(settings.max_clock_skew_s * 1000)

        def sink(topic: str, observe: Callable[[Delivery], None]) -> KafkaSink:
            return KafkaSink(
                topic,
                settings.producer(),
                delivery=settings.delivery,
                consumer_config=settings.tail(),
                admin_config=settings.admin(),
                owner=settings.group_id,
                transaction_s=settings.transaction_s,
                past_retention=settings.resume_past_retention,
                tail_max_records=settings.tail_max_records,
                either_copy=settings.dedupe,
                observe=observe,
                snapshotted=None if health is None else health.begins,
                startup_timeout_s=settings.startup_timeout_s,
            )

        def predicted(delivery: Delivery) -> None:
            answered = delivery.delivered + delivery.suppressed - delivery.shed
            METRICS.count(settings.transactions_topic, "scored", answered)
            METRICS.count(settings.transactions_topic, "shed", delivery.shed)
            METRICS.count(settings.transactions_topic, "dead_lettered", delivery.too_large)
            refused = METRICS.dead_letters.labels(settings.transactions_topic, PREDICTION_TOO_LARGE)
            refused.inc(delivery.too_large)
            METRICS.latency.observe(delivery.latency_ms)
            written(delivery)

        def written(delivery: Delivery) -> None:
            METRICS.written.labels(delivery.topic).inc(delivery.delivered)
            METRICS.suppressed.labels(delivery.topic).inc(delivery.suppressed)
            for seconds in delivery.write_s.tolist():  # a micro-batch each
                METRICS.stage_s.labels("produce").observe(seconds)
            METRICS.resume_scan.labels(delivery.topic).inc(delivery.compared)
            for result, n in (("committed", delivery.commits), ("aborted", delivery.aborts)):
                METRICS.transactions.labels(delivery.topic, result).inc(n)

        shedding = _shedding(settings)
        rate = (settings.rate_limit, float(settings.rate_burst)) if settings.rate_limit else None
        return Runtime(
            source=KafkaSource(
                [SourceTopic(topic_of[event], event.stream_time) for event in SOURCES],
                settings.consumer(),
                group_id=settings.group_id,
                batch_size=settings.batch_size,
                start=settings.start_at,
                reach_ms=_reach_ms(settings),
                keep_offsets=settings.delivery != "at_most_once",
                max_clock_skew_ms=skew_ms,
                max_hold_s=settings.max_hold_s,
                buffer_records=settings.max_buffered,
                resume_past_retention=settings.resume_past_retention,
                max_skew_ms=round(settings.max_skew_s * 1000),
                peers=None if recovery_store is None else recovery_store.peers(),
                rate_limit=rate,
                between_batches=poll_sinks,
                observe=Observer(
                    METRICS,
                    Health() if health is None else health,
                    None if shedding is None else shedding.overload,
                    kept_s,
                    None if recovery_store is None else recovery_store.directory,
                ),
                startup_timeout_s=settings.startup_timeout_s,
            ),
            topics=topics,
            decoder=EventDecoder(
                SOURCES, max_clock_skew_ms=skew_ms, max_bytes=settings.max_event_bytes
            ),
            shards=Shards(
                settings.shards,
                start,
                journal=recovery_store is not None and recovery_store.keeps_journal,
            ),
            store=reads,
            scorer=scorer,
            thresholds=_thresholds(settings, scorer.manifest.thresholds),
            reasons=settings.reasons,
            predictions=sink(settings.predictions_topic, predicted),
            dead_letters=sink(settings.dead_letters_topic, written),
            audit=sink(settings.audit_topic, written),
            audit_share=settings.audit_share,
            partitions=partitions,
            dedupe=_dedupe(settings),
            shedding=shedding,
            notice=None if recent is None else partial(recent.add, model_version=scorer.version),
        )


def _reach_ms(settings: Settings) -> int:
    """Return how far back in time any event can matter to the answer to another, in ms."""
    dedupe = _dedupe(settings)
    return max(
        *(view.horizon_ms for view in FRAUD.views), 0 if dedupe is None else dedupe.horizon_ms
    )


def _orphaned(why: str) -> None:
    """End this process: the cluster it belongs to is no more."""
    if not drain_requested():
        log.error(f"this process ends: {why}")
        os._exit(1)  # the engine may be waiting, for ever, for one that has died


def _stale_after_s(settings: Settings) -> float:
    """Return how long an epoch may take: longer than an outage that is waited out, by either side.

    After that the flow ends by itself, and says why.
    """
    launch = recovery.launched()
    interval_s = 10.0 if launch is None else launch.interval_s
    return interval_s + 2 * (settings.message_timeout_s + 5) + 60


def _serve(settings: Settings, health: Health) -> Recent | None:
    """Serve metrics and the operator page, where they are wanted; return what the page shows."""
    if settings.metrics_port:
        monitoring = endpoints(METRICS.registry, health)
        serve(monitoring, settings.metrics_host, settings.metrics_port)
    if not settings.page_port:
        return None
    topics = [settings.fraud_reports_topic, settings.transactions_topic]
    recent = Recent(FRAUD.names, topics, FRAUD.schema_hash)

    def status() -> Status:
        checks = [page_status.Health(*astuple(check)) for check in health.all()]
        return page_status.status_of(
            page_status.samples_of(METRICS.registry), time.time(), checks=checks
        )

    token = settings.page_token.get_secret_value() or None
    served = serve(
        page(status, recent, token, host=settings.page_host), settings.page_host, settings.page_port
    )
    log.info("operator page", url=served.url)
    return recent


def _trace(endpoint: str) -> None:
    """Send spans of sampled events to a collector, from now on."""
    from dataflows.tracing import Tracing, otlp

    measure.tracing = Tracing(otlp(endpoint), "fraud")
    atexit.register(measure.tracing.close)


def _check_kafka(settings: Settings) -> tuple[dict[str, int], dict[str, float]]:
    """Try the client settings, and look all topics up, before anything slow is loaded.

    Returns the number of partitions of each topic; and for how many seconds each input topic keeps
    its records, where the brokers tell.
    """
    inputs = [settings.transactions_topic, settings.fraud_reports_topic]
    outputs = [settings.predictions_topic, settings.dead_letters_topic, settings.audit_topic]
    config = {"group.id": settings.group_id, **settings.consumer()}
    clients: tuple[tuple[Role, Callable[..., object], dict[str, Any], list[str]], ...] = (
        ("source", Consumer, config, inputs),
        ("sink", Producer, settings.producer(), outputs),
        ("admin", AdminClient, settings.admin(), []),
    )
    needed = acls(settings)
    counts: dict[str, int] = {}
    for role, make, config, topics in clients:
        try:
            make({"log_level": 0, **config})  # the error says it once
        except (KafkaException, TypeError, ValueError) as error:
            raise SettingsError(_refused_setting(role, str(error))) from None
        timeout_s = settings.startup_timeout_s
        client = AdminClient(config, logger=logging.getLogger("librdkafka"))
        partition_counts(client, config, [], timeout_s=timeout_s, role=role)  # lets it in?
        access.check(needed, role, config, timeout_s=timeout_s)
        counts |= partition_counts(client, config, topics, timeout_s=timeout_s, role=role)
    kept = {topic: retention_s(client, topic) for topic in inputs}
    return counts, {topic: seconds for topic, seconds in kept.items() if seconds is not None}


def _refused_setting(role: Role, said: str) -> str:
    """Return what is wrong with a role's librdkafka settings, without repeating a value."""
    options = "KAFKA_CONSUMER_OPTIONS" if role == "source" else "KAFKA_PRODUCER_OPTIONS"
    # librdkafka's text may repeat a value, which may be a secret.
    named = re.search(r'property:? "([^"]+)"', said)
    if named is None and (file := re.search(r"\b(ssl\.[a-z.]+) failed", said)):
        return (
            f"the {role}: librdkafka cannot use what {file[1]} names: see to "
            f"{variables(file[1].replace('.', '_'), role)}"
        )
    what = f" {named[1]!r}" if named else ""
    return f"{options}: librdkafka refuses the setting{what}; see its list of settings"


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


def _shedding(settings: Settings) -> Shedding | None:
    if not settings.sheds:
        return None
    return Shedding(
        Overload(
            settings.overload_policy,
            target_s=settings.overload_target_ms / 1000,
            deadline_s=settings.overload_deadline_s,
            catch_up=settings.catch_up,
        ),
        at_least(settings.critical_amount),
        LastScores(settings.last_scores, settings.last_score_ttl_s),
    )


def report() -> None:
    """Log the account and the latencies: what the flow did, as of now."""
    log.info(
        "stopped",
        account=METRICS.account(),
        skipped=METRICS.skipped(),
        latency_ms=METRICS.latency.percentile_ms(50, 95, 99, 99.9),
    )


def _kind_of_line(record: logging.LogRecord) -> str:
    """Return what lines have in common that say the same of different things."""
    said = record.msg
    if isinstance(said, dict):
        return f"{record.name}: {said.get('event')}"
    # All that librdkafka says comes by one format.
    return without_numbers(record) if record.name == "librdkafka" else f"{record.name}: {said}"


def configure_logging(settings: Settings) -> None:
    """Send log lines, the standard library's too, to stderr in the chosen form."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        # Plain, of the standard library's records too: rich would print local variables, which
        # hold cards and tokens, and work on it for a second.
        structlog.processors.format_exc_info,
    ]
    renderer = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Calm(_MOST_LINES, kind_of=_kind_of_line, spare=logging.ERROR))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
