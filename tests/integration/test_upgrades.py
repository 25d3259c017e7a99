"""What docs/upgrades.md says of a change, done to a flow between two of its lives."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import msgspec
import pytest

from features.fraud import FRAUD
from model import package
from tests.chaos import check
from tests.integration.flow import FlowEnv, flow_env, tiny_feast, tiny_model
from tests.integration.test_cluster import differing, once_each
from tests.integration.test_rebuild import done, history, produce, transaction_ids
from tests.integration.test_recovery import fresh, refusal
from tests.kafka.client import TestBroker

__all__ = ["flow_env", "tiny_feast", "tiny_model"]  # fixtures

ROOT = Path(__file__).parents[2]


def test_what_the_store_refuses_is_rebuilt(kafka: TestBroker, flow_env: FlowEnv) -> None:
    """Another number of shards: what goes for it goes for all that changes the windows."""
    sent = history(random.Random(4))
    produce(flow_env, sent[:3000])
    flow_env.variables |= {"DELIVERY": "exactly_once", "AUDIT_SHARE": "1"}
    flow = fresh(flow_env).start()
    done(flow_env, sent[:3000])
    assert flow.stop() == 0

    produce(flow_env, sent[3000:])
    assert "START_AT=rebuild" in refusal(fresh(flow_env, SHARDS="7"))
    flow = flow_env.flow(SHARDS="7", START_AT="rebuild")
    flow.recovery = flow_env.directory / "new"
    flow.start()
    done(flow_env, sent)
    assert flow.stop() == 0
    vectors = once_each(kafka, flow_env.topics, transaction_ids(sent))
    assert differing(vectors, check.replayed(sent, None)) == {}

    # Then the setting goes, and the store with its seven shards stays.
    flow.variables["START_AT"] = "earliest"
    assert flow.start().stop() == 0


def test_another_model_of_the_same_features_goes_on(flow_env: FlowEnv, tmp_path: Path) -> None:
    sent = history(random.Random(5))[:600]
    old = Path(flow_env.variables["MODEL_DIR"])
    manifest, files = package.read(old, names=FRAUD.names, schema_hash=FRAUD.schema_hash)
    stricter = msgspec.structs.replace(manifest.thresholds, review=0.0)
    new = package.write(
        tmp_path / "stricter",
        msgspec.structs.replace(manifest, thresholds=stricter),
        {name: files[name] for name in (package.MODEL, package.GOLDEN)},
    )
    versions, counts = [], []
    for begin, model in ((0, old), (200, tmp_path / "stricter"), (400, old)):  # and back
        produce(flow_env, sent[begin : begin + 200])
        flow = fresh(flow_env, MODEL_DIR=str(model)).start()
        done(flow_env, sent[: begin + 200])
        assert flow.stop() == 0
        found = [json.loads(message.value() or b"") for message in flow_env.read("predictions")]
        versions.append({each["model_version"] for each in found})
        counts.append(len(found))
    assert counts == [len(transaction_ids(sent[:end])) for end in (200, 400, 600)]
    assert versions == [{manifest.version}, {manifest.version, new.version}, versions[1]]


def test_every_test_that_the_page_names_is_there() -> None:
    page = (ROOT / "docs" / "upgrades.md").read_text()
    named = re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)", page)
    assert len(named) > 10
    missing = [
        (name, file) for name, file in named if f"def {name}(" not in (ROOT / file).read_text()
    ]
    assert missing == []


@pytest.mark.parametrize("command", ["dataflows.state export", "dataflows.parts move"])
def test_the_page_has_the_commands(command: str) -> None:
    assert f"python -m {command}" in (ROOT / "docs" / "upgrades.md").read_text()
