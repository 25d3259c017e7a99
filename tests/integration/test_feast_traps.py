"""Pin the defects of Feast 0.67.0 that features/online_store.py works around, on real stores.

Each test shows the defect itself. One that fails after an upgrade says: this workaround may go.
"""

import contextlib
import json
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import online_store
from features.profiles import CUSTOMER_PROFILE, DAY_MS
from tests.integration.feast_stores import (
    KEYS,
    LAST,
    history,
    online,
    profile_files,
    redis_server,
    run_python,
)

__all__ = ["history", "online", "profile_files", "redis_server"]  # fixtures
MIDNIGHT = LAST - DAY_MS
FIELDS = [f"customer_profile:{field}" for field in CUSTOMER_PROFILE.fields]


class FeastRepo:
    """A filled repository, and Feast's own objects for it."""

    def __init__(self, folder: Path, online: str, profile_files: Path, **config: str) -> None:
        online_store.write_repo(folder, online)
        file = folder / "feature_store.yaml"
        for old, new in config.items():
            file.write_text(file.read_text().replace(old.replace("_is_", ": "), new))
        online_store.materialize(folder, MIDNIGHT, profile_files)
        self.folder = folder
        self.feast = online_store._feature_store(folder)
        self.view = self.feast.get_feature_view("customer_profile")
        self.store = self.feast._get_provider().online_store

    def read(self, *cards: str, wanted: list[str] | None = None):
        return self.store.online_read(
            self.feast.config, self.view, [entity_key(card) for card in cards], wanted
        )

    def write(self, card: str, mean_amount: float, moment_ms: int) -> None:
        """Write one row as a materialization does."""
        from feast.protos.feast.types.Value_pb2 import Value

        row = {field: Value(double_val=mean_amount) for field in CUSTOMER_PROFILE.fields}
        row["as_of"] = Value(int64_val=moment_ms)
        moment = datetime.fromtimestamp(moment_ms / 1000, UTC)
        self.store.online_write_batch(
            self.feast.config, self.view, [(entity_key(card), row, moment, None)], None
        )

    def mean_amount(self, card: str) -> float:
        return self.read(card)[0][1]["mean_amount"].double_val


def entity_key(card: str):
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    return EntityKey(join_keys=["card_id"], entity_values=[Value(string_val=card)])


@pytest.fixture
def sqlite_repo(tmp_path, profile_files) -> FeastRepo:
    return FeastRepo(tmp_path / "repo", "sqlite", profile_files)


@pytest.fixture
def redis_repo(tmp_path, profile_files, redis_server) -> FeastRepo:
    """Redis as Feast configures it by default: with its check for newer rows."""
    return FeastRepo(
        tmp_path / "repo",
        redis_server.url,
        profile_files,
        skip_dedup_is_true="skip_dedup: false",
    )


# --- get_online_features --------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "redis"])
def either_repo(request) -> FeastRepo:
    return request.getfixturevalue(f"{request.param}_repo")


def test_ttl_is_not_enforced_online(either_repo):
    """A TTL of three days, a row of 2018, the clock of today: PRESENT (feast #6821)."""
    from feast.protos.feast.serving.ServingService_pb2 import FieldStatus

    assert either_repo.view.ttl == timedelta(days=3)
    answer = either_repo.feast.get_online_features(FIELDS, [{"card_id": "C0000"}]).proto
    assert all(list(vector.statuses) == [FieldStatus.PRESENT] for vector in answer.results)


def test_redis_answers_present_with_null_for_a_missing_entity(sqlite_repo, redis_repo):
    from feast.protos.feast.serving.ServingService_pb2 import FieldStatus

    for repo, status in ((sqlite_repo, FieldStatus.NOT_FOUND), (redis_repo, FieldStatus.PRESENT)):
        answer = repo.feast.get_online_features(FIELDS, [{"card_id": "nobody"}])
        vectors = dict(
            zip(answer.proto.metadata.feature_names.val, answer.proto.results, strict=True)
        )
        assert {vectors[name].statuses[0] for name in CUSTOMER_PROFILE.fields} == {status}
        assert answer.to_dict()["mean_amount"] == [None]
    [(moment, row)] = redis_repo.read("nobody")
    assert moment == datetime(1970, 1, 1, tzinfo=UTC)
    assert {value.WhichOneof("val") for value in row.values()} == {None}
    assert sqlite_repo.read("nobody") == [(None, None)]


_SEEN_FROM_ELSEWHERE = """
import json, sys
from pathlib import Path
import numpy as np
from features.online_store import OnlineStore, _feature_store
from features.profiles import CUSTOMER_PROFILE
repo, midnight = Path(sys.argv[1]), int(sys.argv[2])
names = [f"customer_profile:{field}" for field in CUSTOMER_PROFILE.fields]
answer = _feature_store(repo).get_online_features(names, [{"card_id": "C0000"}]).proto
values, age = OnlineStore.open(repo).lookup(CUSTOMER_PROFILE, np.array([b"C0000"]), midnight)
print(json.dumps({
    "order": list(answer.metadata.feature_names.val),
    "event_timestamp": answer.results[1].event_timestamps[0].seconds,
    "values": values.tobytes().hex(),
    "age_ms": age.tolist(),
}))
"""


def test_hash_seed_and_timezone_change_feasts_answers_and_not_ours(sqlite_repo):
    """The order of columns follows PYTHONHASHSEED; SQLite's timestamps are local time."""
    answers = []
    for seed, zone in (("0", "UTC"), ("1", "America/Sao_Paulo")):
        ran = run_python(
            _SEEN_FROM_ELSEWHERE,
            sqlite_repo.folder,
            MIDNIGHT,
            env={"PYTHONHASHSEED": seed, "TZ": zone},
        )
        assert ran.returncode == 0, ran.stderr
        answers.append(json.loads(ran.stdout))
    here, there = answers
    assert here["order"] != there["order"]
    assert sorted(here["order"]) == sorted(there["order"])
    assert here["event_timestamp"] - there["event_timestamp"] == 3 * 3600
    assert here["values"] == there["values"]
    assert here["age_ms"] == there["age_ms"] == [0.0]


# --- writing --------------------------------------------------------------------------------------


def test_sqlite_lets_older_rows_replace_newer_ones_and_keeps_whole_seconds(sqlite_repo):
    sqlite_repo.write("C0000", 1.0, MIDNIGHT + 1_999)
    [(moment, row)] = sqlite_repo.read("C0000")
    assert row["mean_amount"].double_val == 1.0
    assert moment.timestamp() * 1000 == MIDNIGHT + 1_000
    sqlite_repo.write("C0000", 2.0, MIDNIGHT - DAY_MS)
    assert sqlite_repo.mean_amount("C0000") == 2.0


def test_redis_keeps_newer_rows_and_drops_corrections(redis_repo):
    redis_repo.write("C0000", 1.0, MIDNIGHT + 1_999)
    redis_repo.write("C0000", 2.0, MIDNIGHT)
    assert redis_repo.mean_amount("C0000") == 1.0
    redis_repo.write("C0000", 3.0, MIDNIGHT + 1_999)  # the correction
    assert redis_repo.mean_amount("C0000") == 1.0


def test_redis_with_skip_dedup_behaves_as_sqlite_does(tmp_path, profile_files, redis_server):
    repo = FeastRepo(tmp_path / "repo", redis_server.url, profile_files)
    for value, moment in ((1.0, MIDNIGHT + 5), (2.0, MIDNIGHT + 5), (3.0, MIDNIGHT - 5)):
        repo.write("C0000", value, moment)
        assert repo.mean_amount("C0000") == value


def test_sqlite_in_its_default_mode_locks_readers_out(tmp_path, profile_files, monkeypatch):
    """Why materialize switches to write-ahead logging."""
    ran = {}
    for mode in ("delete", "wal"):
        if mode == "delete":
            monkeypatch.setattr(online_store, "_let_readers_in", lambda config: None)
        repo = FeastRepo(tmp_path / mode, "sqlite", profile_files)
        monkeypatch.undo()
        repo.store._get_conn(repo.feast.config).execute("PRAGMA busy_timeout = 1")
        path = repo.folder / "data" / "online.db"
        with contextlib.closing(sqlite3.connect(path)) as writer:
            assert writer.execute("PRAGMA journal_mode").fetchone() == (mode,)
            writer.execute("BEGIN EXCLUSIVE")
            try:
                ran[mode] = repo.mean_amount("C0000") > 0
            except sqlite3.OperationalError as error:
                ran[mode] = str(error)
    assert ran == {"delete": "database is locked", "wal": True}


# --- online_read ----------------------------------------------------------------------------------


def test_redis_online_read_appends_to_the_list_it_is_given(sqlite_repo, redis_repo):
    for repo, appended in ((sqlite_repo, []), (redis_repo, ["_ts:customer_profile"])):
        wanted = ["mean_amount"]
        repo.read("C0000", wanted=wanted)
        assert wanted == ["mean_amount", *appended]


def test_a_failing_redis_is_asked_for_seconds_unless_told_otherwise():
    """redis-py's default is three more attempts with growing pauses (see _bound_waiting)."""
    import redis

    assert redis.Redis().get_retry().get_retries() == 3


# --- offline --------------------------------------------------------------------------------------


def test_duckdb_join_loses_columns_that_end_in_y(tmp_path):
    """Why ProfileView refuses such names."""
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64

    stamps = pa.array([MIDNIGHT * 1000]).cast(pa.timestamp("us", tz="UTC"))
    rows = pa.table(
        {"card_id": ["C0000"], "home_x": [1.0], "home_y": [2.0], "event_timestamp": stamps}
    )
    pq.write_table(rows, tmp_path / "homes.parquet")
    online_store.write_repo(tmp_path)
    feast = online_store._feature_store(tmp_path)
    card = Entity(name="card_id", join_keys=["card_id"], value_type=ValueType.STRING)
    source = FileSource(
        name="homes", path=str(tmp_path / "homes.parquet"), timestamp_field="event_timestamp"
    )
    fields = [Field(name=name, dtype=Float64) for name in ("home_x", "home_y")]
    feast.apply([card, FeatureView(name="home", entities=[card], schema=fields, source=source)])
    asked = training_rows(["C0000"], [MIDNIGHT])
    answer = historical(feast, asked, ["home:home_x"])
    assert answer["home_x"].tolist() == [1.0]
    with pytest.raises(Exception, match="Column 'home_y' is not found"):
        historical(feast, asked, ["home:home_x", "home:home_y"])


def test_dask_drops_training_rows_and_duckdb_does_not(sqlite_repo):
    """A card whose only rows are beyond the TTL: null with DuckDB, gone with dask."""
    asked = training_rows(["C0000", "C0001"], [LAST, LAST + 30 * DAY_MS])
    answer = historical(sqlite_repo.feast, asked, FIELDS[:1])
    assert answer["x_home"].isna().tolist() == [False, True]
    file = sqlite_repo.folder / "feature_store.yaml"
    file.write_text(file.read_text().replace("type: duckdb", "type: dask"))
    dask = online_store._feature_store(sqlite_repo.folder)
    assert historical(dask, asked, FIELDS[:1])["card_id"].tolist() == ["C0000"]


def training_rows(cards: list[str], moments: list[int]) -> pd.DataFrame:
    stamps = pd.to_datetime(np.array(moments), unit="ms", utc=True)
    return pd.DataFrame({"card_id": cards, "event_timestamp": stamps})


def historical(feast, asked: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    with online_store._quiet():
        return feast.get_historical_features(asked, names).to_df()


# --- the registry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_ttl_s", [0, 600])
def test_an_old_registry_is_read_again_inside_a_request(sqlite_repo, cache_ttl_s):
    """Unless its TTL is zero. Our lookup does not go near the registry: it may be gone."""
    file = sqlite_repo.folder / "feature_store.yaml"
    old, new = "cache_ttl_seconds: 0", f"cache_ttl_seconds: {cache_ttl_s}"
    file.write_text(file.read_text().replace(old, new))
    feast = online_store._feature_store(sqlite_repo.folder)
    feast.get_online_features(FIELDS, [{"card_id": "C0000"}])
    feast.registry.cached_registry_proto_created -= timedelta(hours=1)
    before = feast.registry.cached_registry_proto_created
    feast.get_online_features(FIELDS, [{"card_id": "C0000"}])
    assert (feast.registry.cached_registry_proto_created > before) == (cache_ttl_s > 0)

    store = online_store.OnlineStore.open(sqlite_repo.folder)
    (sqlite_repo.folder / "data" / "registry.db").unlink()
    values, _ = store.lookup(CUSTOMER_PROFILE, KEYS[CUSTOMER_PROFILE][:1], MIDNIGHT)
    assert not np.isnan(values).any()
