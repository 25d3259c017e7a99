"""The online store on real SQLite and Redis: it answers what the offline join does, bit for bit."""

import contextlib
import gc
import json
import shutil
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import online_store, profiles
from features.online_store import OnlineStore, StoreNotReady, StoreUnavailable
from features.profiles import CUSTOMER_PROFILE, DAY_MS, PROFILES, TERMINAL_PROFILE
from tests.integration.feast_stores import (
    FIRST,
    KEYS,
    LAST,
    ROOT,
    Clock,
    build_profiles,
    history,
    online,
    profile_files,
    redis_server,
    run_python,
    spy,
    write_history,
)

__all__ = ["history", "online", "profile_files", "redis_server"]  # fixtures
MIDNIGHT = LAST - DAY_MS
AS_NAMED = [pytest.param(view, id=view.name) for view in PROFILES]


@pytest.fixture(scope="module")
def repo(online, profile_files, tmp_path_factory) -> Path:
    """A repository filled as of MIDNIGHT. Tests that write make their own."""
    return filled(tmp_path_factory.mktemp("repo"), online(), profile_files, MIDNIGHT)


def filled(folder: Path, online: str, profile_files: Path, *midnights: int) -> Path:
    online_store.write_repo(folder, online)
    for midnight in midnights:
        rows = online_store.materialize(folder, midnight, profile_files)
        assert rows == {"customer_profile": 150, "terminal_profile": 100}
    return folder


def opened(repo: Path, reads: list[list[bytes]], **options) -> OnlineStore:
    """Open a store that records the keys of every read."""
    store = OnlineStore.open(repo, clock=options.pop("clock", Clock()), **options)
    for reader in store._readers.values():
        reader.read = spy(reads, reader.read)
    return store


def bits(values: np.ndarray) -> list[int]:
    """NaN equals NaN, and nothing else equals anything but itself."""
    return np.where(np.isnan(values), np.nan, values).view(np.int64).tolist()


# --- what it answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("view", AS_NAMED)
def test_online_equals_offline_bit_for_bit(repo, profile_files, view):
    keys = np.append(KEYS[view], [b"nobody", b"", b"\xff\xfe"])
    rng = np.random.default_rng(0)
    moments = MIDNIGHT + rng.integers(0, DAY_MS, len(keys))
    online_values, online_age = OnlineStore.open(repo).lookup(view, keys, moments)
    offline_values, offline_age = profiles.point_in_time(view, keys, moments, profile_files)
    assert bits(online_values) == bits(offline_values)
    assert bits(online_age) == bits(offline_age)
    assert np.isnan(online_values[-3:]).all() and np.isnan(online_age[-3:]).all()
    assert not np.isnan(online_values[: len(KEYS[view]) // 2]).any()
    # 20 % of the entities have no history: position known, the rest not
    silent = online_values[len(KEYS[view]) - 1]
    assert not np.isnan(silent[:2]).any() and np.isnan(silent[2:]).all()


@pytest.mark.parametrize("view", AS_NAMED)
def test_a_row_is_served_from_its_midnight_to_the_end_of_its_ttl(repo, view):
    store, key = OnlineStore.open(repo), KEYS[view][:1]
    for age, served in (
        (-1, False),  # the row is from the event's future
        (0, True),
        (view.ttl_ms, True),
        (view.ttl_ms + 1, False),
    ):
        values, age_ms = store.lookup(view, key, MIDNIGHT + age)
        assert age_ms.tolist() == [age]  # stale or not, how old it is stays visible
        assert np.isnan(values).all() != served


def test_feasts_own_training_join_agrees(repo, profile_files):
    """get_historical_features on DuckDB is an independent implementation of the same rule."""
    rng = np.random.default_rng(2)
    rows = 400
    moments = rng.integers(FIRST - DAY_MS, LAST + 5 * DAY_MS, rows)
    midnights = rng.random(rows) < 0.2  # exactly at a midnight, and exactly at the end of the TTL
    moments[midnights] -= moments[midnights] % DAY_MS
    feast = online_store._feature_store(repo)
    for view in PROFILES:
        keys = rng.choice(np.append(KEYS[view], b"nobody"), rows)
        asked = pd.DataFrame(
            {
                "row": np.arange(rows),
                view.key: keys.astype("U"),
                "event_timestamp": pd.to_datetime(moments, unit="ms", utc=True),
            }
        )
        names = [*view.fields, "as_of"]
        with online_store._quiet():
            answer = feast.get_historical_features(asked, [f"{view.name}:{n}" for n in names])
            answer = answer.to_df().sort_values("row")
        values, age = profiles.point_in_time(view, keys, moments, profile_files)
        expected = answer[list(view.fields)].to_numpy(dtype=np.float64)
        assert bits(values) == bits(np.ascontiguousarray(expected))
        assert bits(age) == bits(moments - answer["as_of"].to_numpy(dtype=np.float64))
        assert 0 < np.isnan(age).sum() < rows


# --- the cache ------------------------------------------------------------------------------------


def test_a_key_is_read_once_until_its_entry_expires(repo):
    reads: list[list[bytes]] = []
    clock = Clock()
    store = opened(repo, reads, clock=clock, cache_ttl_s=60)
    keys = np.array([b"C0001", b"nobody", b"C0001", b"C0002", b"nobody"])
    first = store.lookup(CUSTOMER_PROFILE, keys, MIDNIGHT)
    assert reads == [[b"C0001", b"C0002", b"nobody"]]  # each once, unknown ones too
    clock.now += 59.9
    again = store.lookup(CUSTOMER_PROFILE, keys, MIDNIGHT)
    assert len(reads) == 1
    assert bits(first[0]) == bits(again[0]) and bits(first[1]) == bits(again[1])
    store.lookup(CUSTOMER_PROFILE, np.array([b"C0003", b"C0002"]), MIDNIGHT)
    assert reads[1:] == [[b"C0003"]]
    clock.now += 0.2
    store.lookup(CUSTOMER_PROFILE, keys, MIDNIGHT)
    assert reads[2:] == [[b"C0001", b"C0002", b"nobody"]]
    counts = store.counts(CUSTOMER_PROFILE)
    assert (counts.hits, counts.misses, counts.reads) == (6, 11, 3)
    assert store.counts(TERMINAL_PROFILE).misses == 0


@pytest.mark.parametrize("cache_rows", [1, 7, 64, 10_000])
def test_any_bound_and_any_batches_give_the_same_answers(repo, profile_files, cache_rows):
    rng = np.random.default_rng(cache_rows)
    clock = Clock()
    store = opened(repo, [], clock=clock, cache_ttl_s=30, cache_rows=cache_rows)
    pool = np.append(KEYS[CUSTOMER_PROFILE], [b"nobody", b"no one"])
    for _ in range(60):
        clock.now += rng.exponential(5)
        keys = rng.choice(pool[: rng.integers(1, len(pool) + 1)], rng.integers(0, 40))
        moments = MIDNIGHT + rng.integers(-DAY_MS, 4 * DAY_MS, len(keys))
        values, age = store.lookup(CUSTOMER_PROFILE, keys, moments)
        # offline, as it would be if MIDNIGHT were the newest row there is
        newest, since = profiles.point_in_time(
            CUSTOMER_PROFILE, keys, np.full(len(keys), MIDNIGHT), profile_files
        )
        expected_age = moments - MIDNIGHT + since
        newest[~profiles.is_served(CUSTOMER_PROFILE, expected_age)] = np.nan
        assert bits(values) == bits(newest) and bits(age) == bits(expected_age)
        assert len(store._caches["customer_profile"]) <= cache_rows


def test_what_is_asked_for_again_and_again_stays(repo):
    reads: list[list[bytes]] = []
    store = opened(repo, reads, cache_rows=10)
    hot = KEYS[CUSTOMER_PROFILE][:3]
    for cold in KEYS[CUSTOMER_PROFILE][3:]:
        store.lookup(CUSTOMER_PROFILE, np.append(hot, cold), MIDNIGHT)
    assert sum(key in hot for keys in reads for key in keys) == 3
    assert store.counts(CUSTOMER_PROFILE).evicted == len(KEYS[CUSTOMER_PROFILE]) - 10


def test_keys_of_different_width_are_the_same_keys(repo):
    reads: list[list[bytes]] = []
    store = opened(repo, reads)
    store.lookup(CUSTOMER_PROFILE, np.array([b"C0001"], dtype="S5"), MIDNIGHT)
    store.lookup(CUSTOMER_PROFILE, np.array([b"C0001"], dtype="S32"), MIDNIGHT)
    assert reads == [[b"C0001"]]
    values, age = store.lookup(CUSTOMER_PROFILE, np.array([], dtype="S5"), MIDNIGHT)
    assert values.shape == (0, 5) and age.shape == (0,) and len(reads) == 1


def test_many_misses_are_few_reads(repo):
    store = OnlineStore.open(repo)
    keys = np.array([f"X{n:06d}".encode() for n in range(3 * online_store.KEYS_PER_READ + 1)])
    keys[-1] = b"C0000"
    values, _ = store.lookup(CUSTOMER_PROFILE, keys, MIDNIGHT)
    assert np.isnan(values[:-1]).all() and not np.isnan(values[-1]).any()


def test_every_read_asks_for_the_same_columns(repo, monkeypatch):
    """Redis appends to the list it is given: a list kept between reads would grow for ever."""
    store, asked = OnlineStore.open(repo), []
    real = store._readers["customer_profile"]._online_store

    class Listening:
        def online_read(self, config, view, keys, wanted):
            asked.append(list(wanted))
            return real.online_read(config, view, keys, wanted)

    monkeypatch.setattr(store._readers["customer_profile"], "_online_store", Listening())
    for key in KEYS[CUSTOMER_PROFILE][:3]:
        store.lookup(CUSTOMER_PROFILE, np.array([key]), MIDNIGHT)
    assert asked == [[*CUSTOMER_PROFILE.fields, "as_of"]] * 3


# --- failure --------------------------------------------------------------------------------------


def check_degraded(store: OnlineStore, reads: list[list[bytes]]) -> None:
    """After `C0000` was read and the store broke: typed error, nothing cached, cache answers."""
    both = np.array([b"C0000", b"C0001"])
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="did not answer for 1 keys of customer_profile"):
            store.lookup(CUSTOMER_PROFILE, both, MIDNIGHT)
    count = len(reads)
    store.clock.now += 1e6  # expired long ago, but all there is
    rows, missed = store.cached(CUSTOMER_PROFILE, both, expired=True)
    assert not np.isnan(rows.values[0]).any() and rows.as_of[0] == MIDNIGHT
    assert missed.tolist() == [1] and len(reads) == count


def test_sqlite_that_breaks(profile_files, tmp_path):
    repo, reads = filled(tmp_path, "sqlite", profile_files, MIDNIGHT), []
    store = opened(repo, reads)
    store.lookup(CUSTOMER_PROFILE, np.array([b"C0000"]), MIDNIGHT)
    with contextlib.closing(sqlite3.connect(repo / "data" / "online.db")) as connection:
        connection.execute("ALTER TABLE fraud_customer_profile RENAME TO elsewhere")
        connection.commit()
        check_degraded(store, reads)
        connection.execute("ALTER TABLE elsewhere RENAME TO fraud_customer_profile")
    values, _ = store.lookup(CUSTOMER_PROFILE, np.array([b"C0000", b"C0001"]), MIDNIGHT)
    assert not np.isnan(values).any()


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_redis_that_breaks(how, profile_files, redis_server, tmp_path, caplog):
    repo, reads = filled(tmp_path / "repo", redis_server.url, profile_files, MIDNIGHT), []
    store = opened(repo, reads)
    store.lookup(CUSTOMER_PROFILE, np.array([b"C0000"]), MIDNIGHT)
    if how == "killed":
        redis_server.stop()
        check_degraded(store, reads)
        # It opens all the same: a flow that is restarted meanwhile has to start.
        again = OnlineStore.open(repo)
        assert "the online store does not answer (redis did not answer" in caplog.text
        with pytest.raises(StoreUnavailable, match="redis did not answer"):
            again.lookup(CUSTOMER_PROFILE, np.array([b"C0000"]), MIDNIGHT)
        return
    redis_server.process.send_signal(signal.SIGSTOP)  # the connection stays, no answer comes
    check_degraded(store, reads)
    redis_server.process.send_signal(signal.SIGCONT)
    redis_server.client().ping()
    values, _ = store.lookup(CUSTOMER_PROFILE, np.array([b"C0000", b"C0001"]), MIDNIGHT)
    assert not np.isnan(values).any()  # the late replies of before were not taken for these


def test_a_store_that_is_not_there_is_named_with_the_remedy(profile_files, tmp_path):
    remedy = r"FEAST_REPO=.*python -m features\.profiles materialize --repo"
    with pytest.raises(StoreNotReady, match=f"no feature_store.yaml there.*{remedy[11:]}"):
        OnlineStore.open(tmp_path / "absent")
    online_store.write_repo(tmp_path)
    with pytest.raises(StoreNotReady, match=remedy) as not_registered:
        OnlineStore.open(tmp_path)
    assert "is not registered" in str(not_registered.value)
    feast = online_store._feature_store(tmp_path)
    from features.feast_repo.definitions import definitions

    feast.apply(definitions(profile_files))
    with pytest.raises(StoreNotReady, match="nothing is materialized for customer_profile"):
        OnlineStore.open(tmp_path)
    filled(tmp_path, "sqlite", profile_files, MIDNIGHT)
    other = profiles.ProfileView("customer_profile", "card_id", ("x_home", "shoe_size"), 1)
    with pytest.raises(StoreNotReady, match="registered with key, fields and TTL"):
        OnlineStore.open(tmp_path, [other])
    with pytest.raises(ValueError, match="cache_rows=0"):
        OnlineStore.open(tmp_path, cache_rows=0)


@pytest.mark.parametrize("given", ["localhost", "secret", "localhost:six,db=0", "password=secret"])
def test_an_address_without_a_port_is_refused_and_not_shown(monkeypatch, given):
    monkeypatch.setenv("FEAST_REDIS", given)
    with pytest.raises(StoreNotReady, match="names no host and port. Write host:port") as refused:
        OnlineStore.open(ROOT / "features" / "feast_repo" / "feature_store.redis.yaml")
    assert "secret" not in str(refused.value)


def test_a_configuration_that_feast_does_not_take_is_named(tmp_path):
    (tmp_path / "feature_store.yaml").write_text("project: 7 and so on\nprovider: [none]\n")
    with pytest.raises(StoreNotReady, match=r"feature_store.yaml is no configuration that Feast"):
        OnlineStore.open(tmp_path)


def test_the_redis_alternative_names_its_variable(monkeypatch):
    monkeypatch.delenv("FEAST_REDIS", raising=False)
    with pytest.raises(StoreNotReady, match=r"\$\{FEAST_REDIS\} is not set"):
        OnlineStore.open(ROOT / "features" / "feast_repo" / "feature_store.redis.yaml")


# --- materialize ----------------------------------------------------------------------------------


def test_a_new_midnight_arrives_when_the_cache_entry_expires(online, profile_files, tmp_path):
    repo, clock = filled(tmp_path, online(), profile_files, MIDNIGHT), Clock()
    store = OnlineStore.open(repo, clock=clock, cache_ttl_s=60)
    key, moment = KEYS[CUSTOMER_PROFILE][:1], LAST + 5
    before = store.lookup(CUSTOMER_PROFILE, key, moment)
    online_store.materialize(repo, LAST, profile_files)
    assert bits(store.lookup(CUSTOMER_PROFILE, key, moment)[0]) == bits(before[0])
    clock.now += 61
    values, age = store.lookup(CUSTOMER_PROFILE, key, moment)
    expected, _ = profiles.point_in_time(CUSTOMER_PROFILE, key, np.array([moment]), profile_files)
    assert bits(values) == bits(expected) != bits(before[0])
    assert age.tolist() == [5.0]


def test_older_rows_replace_newer_ones_only_on_request(online, profile_files, tmp_path):
    repo = filled(tmp_path, online(), profile_files, LAST)
    with pytest.raises(StoreNotReady, match="already as of 2018-06-12, later than 2018-06-11"):
        online_store.materialize(repo, MIDNIGHT, profile_files)
    _, age = OnlineStore.open(repo).lookup(CUSTOMER_PROFILE, KEYS[CUSTOMER_PROFILE], LAST)
    assert not age.any()
    online_store.materialize(repo, MIDNIGHT, profile_files, allow_older=True)
    _, age = OnlineStore.open(repo).lookup(CUSTOMER_PROFILE, KEYS[CUSTOMER_PROFILE], MIDNIGHT)
    assert not age.any()


def test_a_corrected_midnight_reaches_the_store(online, profile_files, tmp_path):
    repo = filled(tmp_path / "repo", online(), profile_files, MIDNIGHT)
    write_history(tmp_path, seed=99)
    corrected = build_profiles(tmp_path, tmp_path / "profiles")
    online_store.materialize(repo, MIDNIGHT, corrected)
    for view in PROFILES:
        values, _ = OnlineStore.open(repo).lookup(view, KEYS[view], MIDNIGHT)
        moments = np.full(len(KEYS[view]), MIDNIGHT)
        expected, _ = profiles.point_in_time(view, KEYS[view], moments, corrected)
        old, _ = profiles.point_in_time(view, KEYS[view], moments, profile_files)
        assert bits(values) == bits(expected) != bits(old)


def test_a_store_that_drops_corrections_is_found_out(profile_files, redis_server, tmp_path):
    repo = filled(tmp_path / "repo", redis_server.url, profile_files, MIDNIGHT)
    config = repo / "feature_store.yaml"
    config.write_text(config.read_text().replace("skip_dedup: true", "skip_dedup: false"))
    write_history(tmp_path, seed=99)
    corrected = build_profiles(tmp_path, tmp_path / "profiles")
    with pytest.raises(StoreNotReady, match="150 of 150 rows of customer_profile.*skip_dedup"):
        online_store.materialize(repo, MIDNIGHT, corrected)


def test_readers_go_on_while_sqlite_is_written(profile_files, tmp_path):
    repo = filled(tmp_path, "sqlite", profile_files, MIDNIGHT)
    store = OnlineStore.open(repo)
    with contextlib.closing(sqlite3.connect(repo / "data" / "online.db")) as writer:
        writer.execute("BEGIN EXCLUSIVE")  # in rollback-journal mode this locks readers out
        writer.execute("UPDATE fraud_customer_profile SET value = NULL")
        values, _ = store.lookup(CUSTOMER_PROFILE, KEYS[CUSTOMER_PROFILE][:1], MIDNIGHT)
        assert not np.isnan(values).any()
        writer.rollback()


def test_materialize_command(profile_files, tmp_path, capsys):
    online_store.write_repo(tmp_path / "repo")
    command = ["materialize", "--repo", str(tmp_path / "repo"), "--until", "2018-06-11"]
    assert profiles.main(command) == 1
    assert "no customer_profile of 2018-06-11" in capsys.readouterr().err
    shutil.copytree(profile_files, tmp_path / "repo" / "data" / "profiles")
    assert profiles.main(command) == 0
    output = capsys.readouterr()
    assert "terminal_profile: 100 rows as of 2018-06-11" in output.out
    assert len(output.out.splitlines()) == 2 and not output.err  # nothing of Feast's own


# --- the repository -------------------------------------------------------------------------------


def test_the_checked_in_configuration_is_the_generated_one():
    folder = ROOT / "features" / "feast_repo"
    assert (folder / "feature_store.yaml").read_text() == online_store.render_config()
    redis = (folder / "feature_store.redis.yaml").read_text()
    assert redis == online_store.render_config("${FEAST_REDIS}")


def test_feast_is_told_exactly_what_is_declared(repo):
    feast = online_store._feature_store(repo)
    assert {view.name for view in feast.list_feature_views()} == {view.name for view in PROFILES}
    for view in PROFILES:
        registered = feast.get_feature_view(view.name)
        types = {field.name: str(field.dtype) for field in registered.features}
        assert types == {**dict.fromkeys(view.fields, "Float64"), "as_of": "Int64"}
        assert registered.ttl.total_seconds() * 1000 == view.ttl_ms
        assert registered.join_keys == [view.key]
    assert feast.config.registry.cache_ttl_seconds == 0


def test_feasts_own_command_works_on_the_checked_in_repository(profile_files, tmp_path):
    """As a newcomer would try it, on a copy, to leave the checkout alone."""
    shutil.copytree(
        ROOT / "features" / "feast_repo", tmp_path / "feast_repo", ignore=lambda *_: ["data"]
    )
    code = "import sys; from feast.cli.cli import cli; cli(['-c', sys.argv[1], 'apply'])"
    answer = run_python(
        code, tmp_path / "feast_repo", env={"FEAST_PROFILES": str(profile_files)}, cwd=tmp_path
    )
    assert answer.returncode == 0, answer.stderr
    assert "Created feature view customer_profile" in answer.stdout


def test_no_connection_string_lets_a_read_wait_for_ever(profile_files, redis_server, tmp_path):
    for number, (given, expected) in enumerate([("", 1.0), (",socket_timeout=0.25", 0.25)]):
        online = f"127.0.0.1:{redis_server.port},db={number}{given}"
        repo = filled(tmp_path / str(number), online, profile_files, MIDNIGHT)
        reader = OnlineStore.open(repo)._readers["customer_profile"]
        pool = reader._online_store._get_client(reader._config.online_store).connection_pool
        connection = pool.get_connection()
        assert (connection.socket_timeout, connection.socket_connect_timeout) == (expected, 1.0)
        pool.release(connection)


def test_connection_strings_keep_secrets_whole():
    assert online_store._connection_string("rediss://me:p%40ss=1@h/3") == (
        "h:6379,db=3,ssl=true,username=me,password=p@ss=1,"
        "socket_timeout=1.0,socket_connect_timeout=1.0"
    )
    with pytest.raises(ValueError, match="holds a comma"):
        online_store._connection_string("redis://:a,b@h")


# --- start-up cost --------------------------------------------------------------------------------


def test_importing_the_adapter_does_not_import_feast():
    code = (
        "import sys, json, features.online_store, features.profiles\n"
        "print(json.dumps([name for name in ('feast', 'redis', 'pandas', 'duckdb', 'google') "
        "if name in sys.modules]))"
    )
    answer = run_python(code)
    assert json.loads(answer.stdout) == [], answer.stderr


def test_freeze_gc_leaves_nothing_to_scan():
    before = gc.get_threshold()
    try:
        online_store.freeze_gc(threshold=12_345)
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold()[0] == 12_345
        assert len(gc.get_objects()) < 5_000
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def test_the_oracle_would_notice(repo, profile_files, tmp_path):
    """One bit in one value of the files is enough to fail the comparison above."""
    copy = tmp_path / "profiles"
    shutil.copytree(profile_files, copy)
    file = profiles.day_file(copy, CUSTOMER_PROFILE, MIDNIGHT)
    table = pq.read_table(file)
    means = table["mean_amount"].to_numpy().copy()
    means[0] = np.nextafter(means[0], np.inf)
    place = table.schema.get_field_index("mean_amount")
    pq.write_table(table.set_column(place, "mean_amount", pa.array(means, from_pandas=True)), file)
    keys, moments = KEYS[CUSTOMER_PROFILE], np.full(150, MIDNIGHT)
    online_values, _ = OnlineStore.open(repo).lookup(CUSTOMER_PROFILE, keys, moments)
    changed, _ = profiles.point_in_time(CUSTOMER_PROFILE, keys, moments, copy)
    assert bits(online_values) != bits(changed)
