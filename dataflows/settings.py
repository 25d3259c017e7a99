"""Every knob of the flow: an environment variable, with unit, default, range and one line of help.

``python -m dataflows.settings`` prints the table; the README's is checked against it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from pydantic import Field, SecretStr, ValidationError, create_model, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableError

from dataflows.kafka import security
from features.windows import SHARDS

#: 30 s less than what brokers allow a transaction by default (transaction.max.timeout.ms).
_MOST_TIMEOUT_S = 870
_TOPICS = (
    *("TRANSACTIONS_TOPIC", "FRAUD_REPORTS_TOPIC"),
    *("PREDICTIONS_TOPIC", "DEAD_LETTERS_TOPIC", "AUDIT_TOPIC"),
)


class SettingsError(ValueError):
    """The configuration is missing something or contradicts itself; each line says what."""


if TYPE_CHECKING:
    _Security = BaseSettings
else:  # `kafka_sasl_username`, …, and the same for each role
    _Security = create_model("_Security", __base__=BaseSettings, **security.fields())


class Settings(_Security):
    """Settings of the fraud flow, read from the environment and an optional file.

    The file is named by ``SETTINGS_FILE`` and holds ``NAME=value`` lines; ``SECRETS_DIR`` names a
    directory with a file for each variable, such as a mounted Kubernetes secret. The environment
    goes over both, and the file over the directory.
    """

    model_config = SettingsConfigDict(extra="ignore", frozen=True, env_ignore_empty=True)

    kafka_bootstrap_servers: str = Field(
        description="Addresses of the brokers, host:port, separated by commas", min_length=1
    )
    kafka_consumer_options: SecretStr = Field(
        SecretStr("{}"),
        description="More librdkafka settings for reading, as a JSON object; never printed",
    )
    kafka_producer_options: SecretStr = Field(
        SecretStr("{}"),
        description="More librdkafka settings for writing, as a JSON object; never printed",
    )
    group_id: str = Field(
        "fraud-scoring", description="Consumer group that offsets are committed to, for lag tools"
    )
    start_at: Literal["earliest", "latest", "rebuild"] = Field(
        "earliest",
        description="Where a partition without a snapshot is read from; `latest` means the end, "
        "or where GROUP_ID stopped; `rebuild`: answers begin there too, after what the windows "
        "reach back to has been read again",
    )
    resume_past_retention: bool = Field(
        False,
        description="Go on, and count the gap, when retention deleted records not yet read",
    )
    transactions_topic: str = Field("transactions", description="Topic of card transactions")
    fraud_reports_topic: str = Field("fraud_reports", description="Topic of fraud reports")
    predictions_topic: str = Field("predictions", description="Topic of predictions")
    dead_letters_topic: str = Field("dead_letters", description="Topic of refused events")
    audit_topic: str = Field("audit", description="Topic of full feature vectors, for audits")
    audit_share: float = Field(
        0.01, ge=0, le=1, description="Share of cards whose feature vectors go to the audit topic"
    )
    delivery: Literal["at_least_once", "exactly_once", "at_most_once"] = Field(
        "at_least_once", description="Guarantee for what is written; see docs/delivery.md"
    )
    transaction_s: float = Field(
        0.1, ge=0.01, le=60, description="How long a transaction stays open, exactly_once (s)"
    )
    tail_max_records: int = Field(
        2_000_000,
        ge=0,
        le=1_000_000_000,
        description="Most records of a partition compared at start, exactly_once (400 bytes each)",
    )
    message_timeout_s: float = Field(
        60, gt=1, le=3600, description="How long an outage of the brokers is waited out (s)"
    )
    startup_timeout_s: float = Field(
        30, gt=0, le=600, description="How long brokers and topics are waited for at start (s)"
    )
    batch_size: int = Field(
        4096, ge=1, le=65_536, description="Most events in a micro-batch; less when fewer are there"
    )
    max_buffered: int = Field(
        20_000, ge=1000, le=10_000_000, description="Most records buffered of one partition"
    )
    max_hold_s: float = Field(
        5, ge=0, le=3600, description="How long a silent partition holds up the others' order (s)"
    )
    max_skew_s: float = Field(
        21_600,
        gt=0,
        le=31_536_000,
        description="How far apart, in stream time, a cluster's processes may be in a backlog (s)",
    )
    shards: int = Field(
        SHARDS, ge=1, le=999, description="Virtual shards of the window state; fixed for its life"
    )
    state_dir: Path | None = Field(
        None, description="Window state (features.offline --state) to start from without a snapshot"
    )
    dedupe: bool = Field(
        False, description="Drop events whose business id came before, within the horizon"
    )
    dedupe_horizon_s: float = Field(
        600, ge=1, le=604_800, description="How far apart duplicates are, by the brokers' time (s)"
    )
    dedupe_max_ids: int = Field(
        1_000_000,
        ge=1000,
        le=1_000_000_000,
        description="Most ids remembered, oldest forgotten first (24 bytes each per snapshot)",
    )
    max_clock_skew_s: float = Field(
        300, ge=0, le=86_400, description="How far event times may be ahead of the broker's (s)"
    )
    max_event_bytes: int = Field(
        65_536, ge=256, le=16_777_216, description="Longest event accepted (bytes)"
    )
    model_dir: Path = Field(description="Model package (python -m model.train --out)")
    review_threshold: float | None = Field(
        None, ge=0, le=1, description="Score to review from; the model package's if unset"
    )
    block_threshold: float | None = Field(
        None, ge=0, le=1, description="Score to block from; the model package's if unset"
    )
    reasons: int = Field(
        3, ge=0, le=15, description="Features named with each flagged transaction; 0 names none"
    )
    feast_repo: Path = Field(description="Feast repository with the profiles' online store")
    feast_cache_ttl_s: float = Field(
        300, gt=0, le=86_400, description="How long a profile is served from the cache (s)"
    )
    feast_cache_rows: int = Field(
        100_000, ge=1, le=100_000_000, description="Most profiles cached of each view"
    )
    feast_budget_ms: float = Field(
        20,
        ge=1,
        le=10_000,
        description="How long a micro-batch waits for the online store (ms); docs/overload.md",
    )
    rate_limit: float = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Most events read of each input partition (1/s), which holds up the others if "
        "it is reached; 0 is no limit",
    )
    rate_burst: int = Field(
        1000,
        ge=1,
        le=10_000_000,
        description="Most events of a partition at once, under RATE_LIMIT",
    )
    overload_policy: Literal["block", "sample", "degrade", "drop"] = Field(
        "block",
        description="What becomes of events below CRITICAL_AMOUNT in an overload: they wait, one "
        "in some is scored, most are answered in short, or old ones dropped; docs/overload.md",
    )
    overload_target_ms: float = Field(
        500, ge=1, le=3_600_000, description="Age of records above which there is an overload (ms)"
    )
    overload_deadline_s: float = Field(
        30, gt=0, le=86_400, description="Age past which an event is answered in short at best (s)"
    )
    catch_up: Literal["score_all", "degrade", "skip"] = Field(
        "score_all",
        description="What becomes of events below CRITICAL_AMOUNT that came in a downtime",
    )
    critical_amount: float = Field(
        200,
        ge=0,
        le=1_000_000_000,
        description="Amount from which a transaction is always scored in full",
    )
    last_scores: int = Field(
        100_000, ge=1, le=100_000_000, description="Most cards whose last score is kept"
    )
    last_score_ttl_s: float = Field(
        86_400, gt=0, le=31_536_000, description="How long a card's last score may answer (s)"
    )
    metrics_host: str = Field("127.0.0.1", description="Address the metrics are served at")
    metrics_port: int = Field(
        0, ge=0, le=65_535, description="Port of /metrics for Prometheus; 0 serves none"
    )
    tracing_endpoint: str = Field(
        "",
        description="OTLP/HTTP collector that traces of sampled events go to, such as "
        "http://127.0.0.1:4318; none if unset",
    )
    peers_port: int = Field(
        0,
        ge=0,
        le=65_535,
        description="Port at which the processes of a cluster meet whose recovery directories are "
        "their own; 0 where they share one",
    )
    page_port: int = Field(
        0, ge=0, le=65_535, description="Port of the operator page; 0 serves none"
    )
    page_host: str = Field("127.0.0.1", description="Address the operator page is served at")
    page_token: SecretStr = Field(
        SecretStr(""),
        description="What the operator page asks for, needed away from loopback; never printed",
    )
    log_format: Literal["console", "json"] = Field("console", description="How log lines look")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log line shown"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        review, block = self.review_threshold, self.block_threshold
        if review is not None and block is not None and review > block:
            raise ValueError(
                f"REVIEW_THRESHOLD ({review}) is above BLOCK_THRESHOLD ({block}): everything sent "
                "to review would be blocked; lower the first or raise the second"
            )
        if self.delivery == "exactly_once" and self.message_timeout_s > _MOST_TIMEOUT_S:
            raise ValueError(
                f"MESSAGE_TIMEOUT_S ({self.message_timeout_s:g}) is too long for exactly_once: a "
                f"transaction lasts 15 minutes at most; accepted: (1, {_MOST_TIMEOUT_S}]"
            )
        if self.start_at == "rebuild" and self.delivery == "at_most_once":
            raise ValueError(
                "START_AT=rebuild does not go with DELIVERY=at_most_once, under which every life "
                "starts at the end of the topics, whatever was read before"
            )
        if self.start_at == "rebuild" and self.state_dir is not None:
            raise ValueError(
                "START_AT=rebuild and STATE_DIR both fill the windows, and events would count "
                "twice: keep one (with STATE_DIR, START_AT=latest goes on where GROUP_ID stopped)"
            )
        if self.overload_target_ms > self.overload_deadline_s * 1000:
            raise ValueError(
                f"OVERLOAD_TARGET_MS ({self.overload_target_ms:g}) is above OVERLOAD_DEADLINE_S "
                f"({self.overload_deadline_s:g} s): lower the first or raise the second"
            )
        topics: dict[str, str] = {}
        for variable in _TOPICS:
            other = topics.setdefault(getattr(self, variable.lower()), variable)
            if other != variable:
                raise ValueError(
                    f"{variable} and {other} name the same topic, "
                    f"{getattr(self, variable.lower())!r}; each needs its own"
                )
        return self

    @property
    def sheds(self) -> bool:
        """Whether events may be answered in short, or not at all."""
        return self.overload_policy != "block" or self.catch_up != "score_all"

    def consumer(self) -> dict[str, Any]:
        """Return the librdkafka settings of the source: of everything that reads events."""
        return self._client("source", self._options("kafka_consumer_options"))

    def producer(self) -> dict[str, Any]:
        """Return the librdkafka settings of the sink: of everything that writes."""
        timeout_ms = round(self.message_timeout_s * 1000)
        options = self._options("kafka_producer_options")
        return {"message.timeout.ms": timeout_ms, **self._client("sink", options)}

    def tail(self) -> dict[str, Any]:
        """Return the librdkafka settings of the sink where it reads back what was published."""
        reading = self._options("kafka_consumer_options")
        own = security.identity(self._options("kafka_producer_options"))
        return self._client("sink", {**reading, **own})

    def admin(self) -> dict[str, Any]:
        """Return the librdkafka settings of what asks for topic settings, and creates topics."""
        return self._client("admin", self._options("kafka_producer_options"))

    def _options(self, name: str) -> dict[str, Any]:
        given: SecretStr = getattr(self, name)
        try:
            return msgspec.json.decode(given.get_secret_value(), type=dict[str, Any])
        except msgspec.MsgspecError as error:
            message = f"{name.upper()} is not a JSON object of librdkafka settings ({error})"
            raise SettingsError(message) from None

    def _client(self, role: security.Role, options: dict[str, Any]) -> dict[str, Any]:
        try:
            given = security.client_settings(self, role, options)
        except security.SecurityError as error:
            raise SettingsError(str(error)) from None
        return {"bootstrap.servers": self.kafka_bootstrap_servers, **given}


def load(**overrides: Any) -> Settings:
    """Read the settings; raise SettingsError naming every variable that is missing or wrong."""
    file = os.environ.get("SETTINGS_FILE") or None
    if file is not None and not Path(file).is_file():
        raise SettingsError(f"SETTINGS_FILE={file}: there is no such file")
    secrets = os.environ.get("SECRETS_DIR") or None
    if secrets is not None and not Path(secrets).is_dir():
        raise SettingsError(f"SECRETS_DIR={secrets}: there is no such directory")
    try:
        if secrets is not None:
            _refuse_empty(Path(secrets))
        return Settings(_env_file=file, _secrets_dir=secrets, **overrides)  # type: ignore[call-arg]
    except (OSError, UnicodeDecodeError, UnreadableError) as error:
        named = {"SETTINGS_FILE": file, "SECRETS_DIR": secrets}
        given = " or ".join(f"{name}={path}" for name, path in named.items() if path)
        raise SettingsError(f"{given} cannot be read: {error.__cause__ or error}") from None
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None


def _refuse_empty(secrets: Path) -> None:
    """Raise SettingsError if a secret that is not given otherwise is an empty file."""
    empty = [
        file.name
        for file in sorted(secrets.iterdir())
        if file.name.lower() in Settings.model_fields
        and not os.environ.get(file.name.upper())
        and file.is_file()
        and not file.read_text().strip()
    ]
    if empty:
        raise SettingsError(
            f"SECRETS_DIR={secrets}: nothing is in {', '.join(empty)}. "
            "Write the secret into the file, or remove it where none is needed"
        )


def load_for_tools(bootstrap_servers: str | None = None) -> Settings:
    """Read the settings as `load` does, but need no model and no store; take these brokers."""
    given: dict[str, Any] = {"model_dir": Path(), "feast_repo": Path()}
    if bootstrap_servers:
        given["kafka_bootstrap_servers"] = bootstrap_servers
    return load(**given)


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        variable = ".".join(str(part) for part in problem["loc"]).upper()
        if not variable:
            lines.append(problem["msg"].removeprefix("Value error, "))
            continue
        field = Settings.model_fields[variable.lower()]
        if problem["type"] == "missing":
            lines.append(f"{variable} is not set: {field.description}")
        else:
            given = "(hidden)" if _is_secret(variable.lower()) else repr(problem["input"])
            lines.append(
                f"{variable}={given}: {problem['msg']} – {field.description}; "
                f"accepted: {_accepted(variable.lower())}"
            )
    return "\n".join(lines)


def _is_secret(name: str) -> bool:
    return Settings.model_fields[name].annotation in (SecretStr, SecretStr | None)


def _accepted(name: str) -> str:
    field = Settings.model_fields[name]
    schema = Settings.model_json_schema()["properties"][name]
    schema = next((s for s in schema.get("anyOf", []) if s.get("type") != "null"), schema)
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum")
    if low is not None:
        opening = "(" if "exclusiveMinimum" in schema else "["
        return f"{opening}{low:,}, {high:,}]"
    if _is_secret(name):
        return "JSON" if name.endswith("_options") else "text"
    if field.annotation is bool:
        return "`true` or `false`"
    return "path" if schema.get("format") == "path" else "text"


def table() -> str:
    """Return all settings as a Markdown table; those of a role are told of in one line."""
    lines = ["| variable | default | accepted | meaning |", "|---|---|---|---|"]
    shared = [security.field(name) for name in security.SETTINGS]
    of_roles = {security.field(name, role) for name in security.SETTINGS for role in security.ROLES}
    for name in Settings.model_fields:
        if name in of_roles or name in shared:
            continue
        lines.append(_row(name))
        if name == "kafka_producer_options":
            lines += [_row(each) for each in shared]
            roles = ", ".join(f"`KAFKA_{role.upper()}_…`" for role in security.ROLES)
            lines.append(
                f"| {roles} | – | as above | Any of these {len(shared)} for one role alone, as "
                "`KAFKA_SINK_SASL_USERNAME`; docs/security.md |"
            )
    return "\n".join(lines)


def _row(name: str) -> str:
    field = Settings.model_fields[name]
    if field.is_required():
        default = "**required**"
    elif isinstance(field.default, SecretStr):
        default = f"`{field.default.get_secret_value()}`"
    else:
        default = f"`{field.default}`"
    default = "–" if default in ("`None`", "``") else default
    return f"| `{name.upper()}` | {default} | {_accepted(name)} | {field.description} |"


if __name__ == "__main__":
    print(table())
