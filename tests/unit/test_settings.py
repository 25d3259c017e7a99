"""Settings: every knob explains itself, everything wrong is named, secrets stay secret."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from dataflows.kafka import security
from dataflows.settings import Settings, SettingsError, load, table
from features.windows import SHARDS

ROOT = Path(__file__).parents[2]
REQUIRED = {
    "KAFKA_BOOTSTRAP_SERVERS": "broker:9092",
    "MODEL_DIR": "/models/current",
    "FEAST_REPO": "/feast",
}
#: A wrong value of each variable that can be wrong alone.
WRONG = {
    "RESUME_PAST_RETENTION": "maybe",
    "START_AT": "middle",
    "AUDIT_SHARE": "1.5",
    "DELIVERY": "maybe",
    "TRANSACTION_S": "0",
    "TAIL_MAX_RECORDS": "-1",
    "MESSAGE_TIMEOUT_S": "1",
    "STARTUP_TIMEOUT_S": "0",
    "BATCH_SIZE": "0",
    "MAX_BUFFERED": "999",
    "MAX_HOLD_S": "-1",
    "MAX_SKEW_S": "0",
    "SHARDS": "1000",
    "DEDUPE": "perhaps",
    "DEDUPE_HORIZON_S": "604801",
    "DEDUPE_MAX_IDS": "999",
    "MAX_CLOCK_SKEW_S": "86401",
    "MAX_EVENT_BYTES": "many",
    "REVIEW_THRESHOLD": "-0.1",
    "BLOCK_THRESHOLD": "nan",
    "REASONS": "2.5",
    "FEAST_CACHE_TTL_S": "0",
    "FEAST_CACHE_ROWS": "0",
    "FEAST_BUDGET_MS": "0",
    "PEERS_PORT": "65536",
    "RATE_LIMIT": "-1",
    "RATE_BURST": "0",
    "OVERLOAD_POLICY": "panic",
    "OVERLOAD_TARGET_MS": "0",
    "OVERLOAD_DEADLINE_S": "0",
    "CATCH_UP": "later",
    "CRITICAL_AMOUNT": "-1",
    "LAST_SCORES": "0",
    "LAST_SCORE_TTL_S": "0",
    "METRICS_PORT": "65536",
    "PAGE_PORT": "-1",
    "LOG_FORMAT": "xml",
    "LOG_LEVEL": "loud",
}
TEXT = {name for name, field in Settings.model_fields.items() if field.annotation is str}
SECRETS = ("kafka_consumer_options", "kafka_producer_options")
#: Of TLS and SASL, tests/unit/test_security.py.
SECURITY = {security.field(n, role) for n in security.SETTINGS for role in (None, *security.ROLES)}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment with the required variables and no other of ours."""
    for name in ["SETTINGS_FILE", *Settings.model_fields]:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)
    for name, value in REQUIRED.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def load_all() -> None:
    settings = load()
    settings.consumer()
    settings.producer()


def refusal() -> str:
    with pytest.raises(SettingsError) as caught:
        load_all()
    return str(caught.value)


def test_the_required_variables_are_enough() -> None:
    settings = load()
    assert settings.model_dir == Path("/models/current")
    assert settings.consumer() == {"bootstrap.servers": "broker:9092"}
    assert settings.producer() == {"bootstrap.servers": "broker:9092", "message.timeout.ms": 60_000}


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("empty", [True, False])
def test_a_missing_variable_is_named_with_its_meaning(
    environment: pytest.MonkeyPatch, name: str, empty: bool
) -> None:
    if empty:
        environment.setenv(name, "")
    else:
        environment.delenv(name)
    description = Settings.model_fields[name.lower()].description
    assert refusal() == f"{name} is not set: {description}"


def test_everything_missing_is_told_at_once(environment: pytest.MonkeyPatch) -> None:
    for name in REQUIRED:
        environment.delenv(name)
    environment.setenv("SHARDS", "0")
    lines = refusal().splitlines()
    assert {re.split(r"[ =]", line)[0] for line in lines} == {*REQUIRED, "SHARDS"}
    assert len(lines) == 4


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_with_what_is_accepted(
    environment: pytest.MonkeyPatch, name: str
) -> None:
    environment.setenv(name, WRONG[name])
    (line,) = refusal().splitlines()
    assert line.startswith(f"{name}='{WRONG[name]}': ")
    (row,) = [row for row in table().splitlines() if row.startswith(f"| `{name}` |")]
    accepted, description = (cell.strip() for cell in row.split("|")[3:5])
    assert line.endswith(f"{description}; accepted: {accepted}")


def test_every_variable_that_can_be_wrong_is_tested() -> None:
    paths = {"state_dir", "model_dir", "feast_repo"}
    checked = {name.lower() for name in WRONG}
    others = TEXT | paths | SECURITY | {*SECRETS, "page_token"}
    assert checked == Settings.model_fields.keys() - others


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("value", ["hunter2", '["hunter2"]', '"hunter2"', '{"hunter2"', "17"])
def test_options_that_are_no_object_are_refused_without_being_shown(
    environment: pytest.MonkeyPatch, name: str, value: str
) -> None:
    environment.setenv(name.upper(), value)
    message = refusal()
    assert f"{name.upper()} is not a JSON object" in message
    assert "hunter2" not in message


def test_secrets_are_never_shown(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("KAFKA_CONSUMER_OPTIONS", '{"sasl.password": "hunter2"}')
    environment.setenv("KAFKA_PRODUCER_OPTIONS", '{"sasl.password": "hunter2"}')
    settings = load()
    assert settings.consumer()["sasl.password"] == "hunter2"
    assert settings.producer()["sasl.password"] == "hunter2"
    environment.setenv("PAGE_TOKEN", "hunter2")
    settings = load()
    assert settings.page_token.get_secret_value() == "hunter2"
    shown = [repr(settings), str(settings), table(), settings.model_dump_json()]
    environment.setenv("SHARDS", "0")
    shown.append(refusal())
    with pytest.raises(SettingsError, match=r"KAFKA_CONSUMER_OPTIONS=\(hidden\)") as caught:
        load(kafka_consumer_options=["hunter2"])
    shown.append(str(caught.value))
    assert not [text for text in shown if "hunter2" in text]


def test_options_go_over_the_defaults(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MESSAGE_TIMEOUT_S", "2.5")
    assert load().producer()["message.timeout.ms"] == 2500
    environment.setenv("KAFKA_PRODUCER_OPTIONS", '{"message.timeout.ms": 7, "linger.ms": 0}')
    assert load().producer()["message.timeout.ms"] == 7
    assert "linger.ms" not in load().consumer()


def test_thresholds_that_contradict_each_other(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("REVIEW_THRESHOLD", "0.9")
    environment.setenv("BLOCK_THRESHOLD", "0.5")
    message = refusal()
    assert message.startswith("REVIEW_THRESHOLD (0.9) is above BLOCK_THRESHOLD (0.5)")
    environment.setenv("BLOCK_THRESHOLD", "0.9")
    assert load().block_threshold == 0.9


def test_a_rebuild_excludes_what_contradicts_it(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("START_AT", "rebuild")
    assert load().start_at == "rebuild"
    environment.setenv("STATE_DIR", "state")
    assert refusal().startswith("START_AT=rebuild and STATE_DIR both fill the windows")
    environment.setenv("DELIVERY", "at_most_once")
    assert refusal().startswith("START_AT=rebuild does not go with DELIVERY=at_most_once")


def test_topics_that_are_the_same(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AUDIT_TOPIC", "transactions")
    message = refusal()
    assert message.startswith("AUDIT_TOPIC and TRANSACTIONS_TOPIC name the same topic")


def test_the_environment_goes_over_the_file(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.env"
    file.write_text("# ours\nSHARDS=32\nGROUP_ID='from the file'\nSOMETHING_ELSE=1\nBATCH_SIZE=\n")
    environment.setenv("SETTINGS_FILE", str(file))
    environment.setenv("SHARDS", "64")
    settings = load()
    assert (settings.shards, settings.group_id) == (64, "from the file")
    assert settings.batch_size == Settings.model_fields["batch_size"].default
    environment.setenv("SHARDS", "")  # an empty variable is one that is not set
    assert load().shards == 32


def test_the_file_may_hold_everything(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings.env"
    file.write_text("".join(f"{name}={value}\n" for name, value in REQUIRED.items()))
    environment.setenv("SETTINGS_FILE", str(file))
    for name in REQUIRED:
        environment.delenv(name)
    assert load().kafka_bootstrap_servers == "broker:9092"


def test_a_file_that_is_not_there(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("SETTINGS_FILE", str(tmp_path / "typo.env"))
    assert re.fullmatch(r"SETTINGS_FILE=.*typo\.env: there is no such file", refusal())
    environment.setenv("SETTINGS_FILE", "")
    assert load().shards == SHARDS


def test_an_empty_secret_is_no_secret(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("SECRETS_DIR", str(tmp_path))
    (tmp_path / "KAFKA_SASL_PASSWORD").write_text("\n")
    (tmp_path / "PAGE_TOKEN").write_text("")
    (tmp_path / "ca.pem").write_text("")  # no setting
    assert refusal().startswith(
        f"SECRETS_DIR={tmp_path}: nothing is in KAFKA_SASL_PASSWORD, PAGE_TOKEN. Write the secret"
    )
    (tmp_path / "KAFKA_SASL_PASSWORD").write_text("secret\n")
    environment.setenv("PAGE_TOKEN", "given otherwise")
    assert load().page_token.get_secret_value() == "given otherwise"


def test_a_file_that_is_no_text(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    environment.setenv("SETTINGS_FILE", str(tmp_path / "binary"))
    assert re.match(r"SETTINGS_FILE=.*binary cannot be read", refusal())


def test_every_knob_is_described_with_its_unit() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if name.endswith("_s"):
            assert "(s)" in field.description, name
        if name.endswith("_bytes"):
            assert "(bytes)" in field.description, name
        if isinstance(field.default, SecretStr):
            assert "never printed" in field.description, name


def test_the_table_has_every_knob_once() -> None:
    rows = table().splitlines()[2:]
    told = [row.split("`")[1] for row in rows]
    of_roles = [name for name in told if name.endswith("_…")]
    assert of_roles == ["KAFKA_SOURCE_…"]  # and the other roles', on one line
    names = {name.upper() for name in Settings.model_fields}
    roles = tuple(f"KAFKA_{role.upper()}_" for role in security.ROLES)
    assert len(told) == len(set(told))
    assert set(told) - {*of_roles} == {name for name in names if not name.startswith(roles)}
    assert all(row.count("|") == 5 for row in rows)
    assert [row.split("`")[1] for row in rows if "**required**" in row] == list(REQUIRED)


def test_the_flow_refuses_to_start_without_settings(tmp_path: Path) -> None:
    names = {"SETTINGS_FILE", *(name.upper() for name in Settings.model_fields)}
    ended = subprocess.run(
        [sys.executable, "-m", "bytewax.run", "dataflows.fraud"],
        cwd=tmp_path,
        env={
            **{k: v for k, v in os.environ.items() if k.upper() not in names},
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    first, *lines = ended.stderr.splitlines()
    assert first == "dataflows.fraud cannot start:"
    assert {line.split()[0] for line in lines} == set(REQUIRED)


def test_a_target_beyond_the_deadline(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OVERLOAD_TARGET_MS", "30001")
    assert "OVERLOAD_TARGET_MS (30001) is above OVERLOAD_DEADLINE_S (30 s)" in refusal()
    environment.setenv("OVERLOAD_DEADLINE_S", "30.001")
    assert not load().sheds
    environment.setenv("CATCH_UP", "skip")
    assert load().sheds


def test_a_transaction_cannot_outlast_what_brokers_allow(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MESSAGE_TIMEOUT_S", "871")
    assert load().message_timeout_s == 871
    environment.setenv("DELIVERY", "exactly_once")
    assert "MESSAGE_TIMEOUT_S (871) is too long for exactly_once" in refusal()
