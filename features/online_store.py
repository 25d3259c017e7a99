"""Read profiles from Feast's online store: ordered, aged, cached, batched. The one Feast adapter.

`import feast` takes a second and 200 MB, so it happens inside `OnlineStore.open` and `materialize`,
never when this module is imported. Feast's `get_online_features` is not used: its column order
depends on PYTHONHASHSEED, it does not enforce the TTL (0.67.0, both pinned by
tests/integration/test_feast_traps.py), and it costs about twice what `online_read` does.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from features.column_cache import ColumnCache
from features.profiles import (
    AS_OF,
    PROFILES,
    Float64s,
    Int64s,
    ProfileView,
    day_file,
    day_name,
    is_served,
)

Keys = npt.NDArray[np.bytes_]

_HOST_AND_PORT = re.compile(r".+:[0-9]{1,5}")

KEYS_PER_READ = 1_000
"""Bounds one `online_read`: SQLite limits the parameters of a statement, Redis one reply."""

STORE_TIMEOUT_S = 1.0
"""How long one read may wait for a connection, a reply, or SQLite's lock. Not how long an event
waits for a read: see features.guarded_reads."""


_logger = logging.getLogger(__name__)


class StoreNotReady(RuntimeError):
    """The online store is not there, not filled, or not the one the views declare."""


class StoreUnavailable(RuntimeError):
    """A read from the online store failed; nothing of it was cached. The caller decides."""


@dataclass
class CacheCounts:
    """Count what one view's cache did since it was opened. A miss is one key of one event."""

    hits: int = 0
    misses: int = 0
    reads: int = 0
    evicted: int = 0


class Rows(NamedTuple):
    """What a store says of keys: values float64 [n, fields] and as_of ms float64 [n], both NaN
    where the entity is unknown."""

    values: Float64s
    as_of: Float64s


class Reader(Protocol):
    """What an OnlineStore asks of the store behind it, for one view."""

    @property
    def view(self) -> ProfileView: ...

    def read(self, keys: list[bytes]) -> Rows:
        """Read distinct keys; raise StoreUnavailable if that fails."""


class OnlineStore:
    """Look profiles up by key, waiting for the store as long as it takes.

    One per process; not thread-safe, except that `read` may be called from one thread while others
    call the rest. A flow looks up through features.guarded_reads.

    >>> store = OnlineStore.open(repo, PROFILES)                                # doctest: +SKIP
    >>> values, age_ms = store.lookup(CUSTOMER_PROFILE, keys, event_time_ms)    # doctest: +SKIP
    """

    def __init__(
        self,
        readers: Mapping[str, Reader],
        *,
        clock: Callable[[], float],
        cache_ttl_s: float,
        cache_rows: int,
    ) -> None:
        self.clock = clock
        self._readers = readers
        self._caches = {
            name: ColumnCache(len(reader.view.fields), cache_rows, cache_ttl_s)
            for name, reader in readers.items()
        }
        self._counts = {name: CacheCounts() for name in readers}

    @property
    def views(self) -> list[ProfileView]:
        """The views that can be looked up."""
        return [reader.view for reader in self._readers.values()]

    @classmethod
    def open(
        cls,
        repo: Path,
        views: Sequence[ProfileView] = PROFILES,
        *,
        clock: Callable[[], float] = time.monotonic,
        cache_ttl_s: float = 300.0,
        cache_rows: int = 100_000,
    ) -> OnlineStore:
        """Open the store of a Feast repository (a directory, or its YAML file) for reading.

        `clock` is monotonic seconds; rows are read again `cache_ttl_s` after they were read, and at
        most `cache_rows` rows per view are kept. Imports Feast (1–2 s). Reads once from every view;
        that the store does not answer is logged, and no error: it may be back before it is needed.
        Raises StoreNotReady when the repository, a view, or its data is missing or differs from the
        declaration.
        """
        if cache_rows < 1 or cache_ttl_s <= 0:
            raise ValueError(f"cache_rows={cache_rows}, cache_ttl_s={cache_ttl_s}: be positive")
        feast_store = _feature_store(repo)
        readers = {view.name: _Reader(feast_store, view, repo) for view in views}
        for reader in readers.values():
            reader.require_rows()
        try:
            for reader in readers.values():
                reader.read([b""])
        except StoreUnavailable as error:
            _logger.warning(
                "the online store does not answer (%s): until it does, profiles are missing. See "
                "that it runs, and that FEAST_REPO=%s names its address",
                error,
                repo,
            )
        return cls(readers, clock=clock, cache_ttl_s=cache_ttl_s, cache_rows=cache_rows)

    def lookup(
        self, view: ProfileView, keys: Keys, now_ms: Int64s | int
    ) -> tuple[Float64s, Float64s]:
        """Return each key's fields and their age, as of the event's own time.

        `keys` is a bytes array [n] (dtype S, UTF-8), `now_ms` the event times (int64 [n], or one
        for all). Returns values float64 [n, len(view.fields)] in declared order, and age_ms float64
        [n] = now − as_of, NaN when the entity is unknown. A row is NaN when its entity is unknown,
        its age is above the view's TTL, or below zero: the store holds only the newest row, and a
        row later than the event would tell it the future (`age_ms` still says how stale it is).

        Unknown entities are cached as well. All misses, each key once, cost one batched read.
        Raises StoreUnavailable if that read fails; nothing of it is cached.
        """
        since = self.clock()
        rows, missed = self.cached(view, keys)
        if len(missed):
            wanted, place = np.unique(keys[missed], return_inverse=True)
            answer = self.read(view, wanted)
            self.keep(view, wanted, answer, since)
            rows.values[missed], rows.as_of[missed] = answer.values[place], answer.as_of[place]
        age_ms, _ = as_of_event(view, rows, now_ms)
        return rows.values, age_ms

    def cached(
        self, view: ProfileView, keys: Keys, *, expired: bool = False
    ) -> tuple[Rows, npt.NDArray[np.intp]]:
        """Return what the cache holds of the keys, and the positions of those it does not.

        `expired`: rows past the cache's TTL are taken as well, however old.
        """
        now = -np.inf if expired else self.clock()
        values, as_of, missed = self._caches[view.name].fetch(keys, now)
        if not expired:
            counts = self._counts[view.name]
            counts.hits += len(keys) - len(missed)
            counts.misses += len(missed)
        return Rows(values, as_of), missed

    def read(self, view: ProfileView, keys: Keys) -> Rows:
        """Read distinct keys from the store, past the cache. Raises StoreUnavailable."""
        self._counts[view.name].reads += 1
        return self._readers[view.name].read(keys.tolist())

    def keep(self, view: ProfileView, keys: Keys, rows: Rows, since: float) -> None:
        """Cache the rows of distinct keys, read at `since` by the clock."""
        cache, counts = self._caches[view.name], self._counts[view.name]
        counts.evicted += cache.put(keys, rows.values, rows.as_of, since)

    def counts(self, view: ProfileView) -> CacheCounts:
        """Return the counters of a view's cache (live)."""
        return self._counts[view.name]


def as_of_event(
    view: ProfileView, rows: Rows, now_ms: Int64s | int
) -> tuple[Float64s, npt.NDArray[np.bool_]]:
    """Make rows NaN, in place, that the event may not use; return ages in ms and which are used."""
    age_ms: Float64s = now_ms - rows.as_of
    used = is_served(view, age_ms)
    if not used.all():
        rows.values[~used] = np.nan
    return age_ms, used


def freeze_gc(threshold: int = 50_000) -> None:
    """Take what start-up allocated out of garbage collection, and collect less often.

    Feast leaves 200 000 objects, and a full collection over them stops the worker for 120–180 ms.
    Call once, after every import and warm-up.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(threshold, 20, 20)


class _Reader:
    """Read one view's rows with one batched `online_read` per KEYS_PER_READ keys."""

    def __init__(self, feast_store: Any, view: ProfileView, repo: Path) -> None:
        from feast.errors import FeatureViewNotFoundException
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        try:
            registered = feast_store.get_feature_view(view.name)
        except FeatureViewNotFoundException:
            raise StoreNotReady(
                f"FEAST_REPO={repo}: {view.name} is not registered there. {_FILL.format(repo)}"
            ) from None
        _require_same_schema(view, registered, repo)
        self.view = view
        self._repo = repo
        self._config = feast_store.config
        self._registered = registered
        self._online_store = feast_store._get_provider().online_store
        self._entity_key, self._value = EntityKey, Value
        _bound_waiting(self._online_store, self._config)

    def require_rows(self) -> None:
        """Raise StoreNotReady unless something was materialized."""
        if self._registered.most_recent_end_time is None:
            raise StoreNotReady(
                f"FEAST_REPO={self._repo}: nothing is materialized for {self.view.name}. "
                f"{_FILL.format(self._repo)}"
            )

    def read(self, keys: list[bytes]) -> Rows:
        """Read distinct keys, KEYS_PER_READ at a time. Raises StoreUnavailable."""
        values = np.full((len(keys), len(self.view.fields)), np.nan)
        as_of = np.full(len(keys), np.nan)
        for start in range(0, len(keys), KEYS_PER_READ):
            for row, found in enumerate(self._answers(keys[start : start + KEYS_PER_READ]), start):
                # Redis answers for an unknown entity, too: with nulls.
                stamp = found.get(AS_OF) if found else None
                if found and stamp is not None and stamp.HasField("int64_val"):
                    as_of[row] = stamp.int64_val
                    values[row] = [_double(found.get(field)) for field in self.view.fields]
        return Rows(values, as_of)

    def _answers(self, keys: list[bytes]) -> Iterable[dict[str, Any] | None]:
        join_keys = [self.view.key]
        entity_keys = [
            self._entity_key(
                join_keys=join_keys,
                entity_values=[self._value(string_val=key.decode("utf-8", "replace"))],
            )
            for key in keys
        ]
        wanted = [*self.view.fields, AS_OF]  # a new list every time: Redis appends to it
        try:
            answers = self._online_store.online_read(
                self._config, self._registered, entity_keys, wanted
            )
        except Exception as error:  # every store raises its own kind
            raise StoreUnavailable(
                f"{self._config.online_store.type} did not answer for {len(keys)} keys of "
                f"{self.view.name}: {type(error).__name__}: {error}"
            ) from error
        return (found for _, found in answers)


def _double(value: Any) -> float:
    """Decode one field of a row; null and absent are NaN."""
    known = value is not None and value.HasField("double_val")
    return value.double_val if known else float("nan")


# --- the repository -------------------------------------------------------------------------------

_FILL = (
    "Fill it: python -m features.profiles build …, then "
    "python -m features.profiles materialize --repo {} --until DAY"
)

_CONFIG = """\
# A Feast repository. Relative paths are relative to this file. Feast replaces ${{NAME}} by the
# environment variable. Written by features.online_store.write_repo.
project: fraud
provider: local
entity_key_serialization_version: 3
registry:
  path: data/registry.db
  cache_ttl_seconds: 0  # never refresh inside a request; a restart reads it anew
offline_store:
  type: duckdb
online_store:
{online_store}"""

_SQLITE = """\
  type: sqlite
  path: data/online.db
"""

_REDIS = """\
  type: redis
  # host:port,key=value,…  For instance localhost:6379,db=0,ssl=true,password=…
  connection_string: "{connection}"
  # Otherwise Redis drops a corrected row with an unchanged timestamp. What this switches off,
  # older rows never replacing newer ones, `python -m features.profiles materialize` sees to.
  skip_dedup: true
"""


def write_repo(repo: Path, online: str = "sqlite") -> None:
    """Write `feature_store.yaml` into a directory; Feast needs nothing else there.

    `online` is "sqlite", a URL redis://[[user]:password@]host[:port][/db] (rediss:// for TLS), or a
    connection string in Feast's notation, in which ${NAME} stands for an environment variable.
    """
    repo.mkdir(parents=True, exist_ok=True)
    (repo / "feature_store.yaml").write_text(render_config(online), encoding="utf-8")


def render_config(online: str = "sqlite") -> str:
    """Return the text `write_repo` writes."""
    if online == "sqlite":
        return _CONFIG.format(online_store=_SQLITE)
    return _CONFIG.format(online_store=_REDIS.format(connection=_connection_string(online)))


def _connection_string(online: str) -> str:
    """Turn a Redis URL into Feast's notation, with bounded waits; leave others as they are.

    >>> _connection_string("redis://:secret@cache:6380/2")
    'cache:6380,db=2,password=secret,socket_timeout=1.0,socket_connect_timeout=1.0'
    >>> _connection_string("${FEAST_REDIS}")
    '${FEAST_REDIS}'
    """
    if not online.startswith(("redis://", "rediss://")):
        return online
    url = urlsplit(online)
    parts = [f"{url.hostname or 'localhost'}:{url.port or 6379}"]
    if url.path.strip("/"):
        parts.append(f"db={url.path.strip('/')}")
    if url.scheme == "rediss":
        parts.append("ssl=true")
    for name, secret in (("username", url.username), ("password", url.password)):
        if secret:
            if "," in unquote(secret):
                raise ValueError(f"the {name} of the Redis URL holds a comma: Feast cannot pass it")
            parts.append(f"{name}={unquote(secret)}")
    parts += [f"socket_timeout={STORE_TIMEOUT_S}", f"socket_connect_timeout={STORE_TIMEOUT_S}"]
    return ",".join(parts)


def materialize(
    repo: Path, midnight_ms: int, profiles: Path | None = None, *, allow_older: bool = False
) -> dict[str, int]:
    """Load the rows of one midnight into the online store; return the rows loaded per view.

    `profiles` is what `features.profiles.build` wrote, by default data/profiles in the repository.
    Registers the views, writes, reads everything back, and compares it bit for bit. Safe to repeat,
    and while a flow reads. Raises StoreNotReady when that day's files are missing, when the store
    holds newer rows (unless `allow_older`: SQLite would let the older ones win, Redis may drop
    them), or when it does not answer what was written.
    """
    folder = repo if repo.is_dir() else repo.parent
    profiles = folder / "data" / "profiles" if profiles is None else profiles
    day = day_name(midnight_ms)
    for view in PROFILES:
        if not day_file(profiles, view, midnight_ms).is_file():
            raise StoreNotReady(
                f"no {view.name} of {day} in {profiles}: run python -m features.profiles build "
                f"--out {profiles} --until {day} first"
            )
    feast_store = _feature_store(repo)
    from features.feast_repo.definitions import definitions

    with _quiet():
        feast_store.apply(definitions(profiles))
    _let_readers_in(feast_store.config)

    rows: dict[str, int] = {}
    for view in PROFILES:
        table = pq.read_table(day_file(profiles, view, midnight_ms))
        keys = [key.encode() for key in table[view.key].to_pylist()]
        reader = _Reader(feast_store, view, repo)
        newest = np.nanmax(reader.read(keys).as_of, initial=-np.inf)
        if newest > midnight_ms and not allow_older:
            raise StoreNotReady(
                f"{view.name} in FEAST_REPO={repo} is already as of {day_name(int(newest))}, later "
                f"than {day}; to go back, add --allow-older"
            )
        moment = datetime.fromtimestamp(midnight_ms / 1000, UTC)
        with _quiet():
            feast_store.materialize(moment, moment, feature_views=[view.name])
        values, as_of = reader.read(keys)
        expected = np.column_stack([table[field].to_numpy() for field in view.fields])
        wrong = np.flatnonzero(
            (as_of != midnight_ms) | (values.view(np.int64) != expected.view(np.int64)).any(axis=1)
        )
        if len(wrong):
            raise StoreNotReady(
                f"{len(wrong)} of {len(keys)} rows of {view.name} in FEAST_REPO={repo} are not "
                f"those of {day}, first {keys[wrong[0]].decode()}; if the store is Redis, set "
                "skip_dedup: true in its feature_store.yaml"
            )
        rows[view.name] = len(keys)
    return rows


def _feature_store(repo: Path) -> Any:
    """Open a Feast repository given as its directory or as its YAML file."""
    config = repo / "feature_store.yaml" if repo.is_dir() else repo
    if not config.is_file():
        raise StoreNotReady(
            f"FEAST_REPO={repo}: no feature_store.yaml there. Set it to a Feast repository, for "
            f"instance features/feast_repo. {_FILL.format(repo)}"
        )
    with _unchecked_types():
        from feast import FeatureStore
        from feast.repo_config import FeastConfigError

    try:
        store = FeatureStore(repo_path=str(config.parent), fs_yaml_file=config)
    except FeastConfigError as error:
        raise StoreNotReady(
            f"{config} is no configuration that Feast takes; correct it: {error}"
        ) from None
    connection = getattr(store.config.online_store, "connection_string", None)
    if connection is None:
        return store
    if "${" in connection:
        raise StoreNotReady(f"{config}: {connection} is not set; set it to host:port,key=value,…")
    addresses = [part for part in connection.split(",") if "=" not in part]
    if not addresses or not all(_HOST_AND_PORT.fullmatch(each) for each in addresses):
        raise StoreNotReady(  # without what was given: there may be a password in it
            f"{config}: connection_string (FEAST_REDIS) names no host and port. Write "
            "host:port,key=value,… such as localhost:6379,db=0"
        )
    return store


@contextlib.contextmanager
def _unchecked_types() -> Iterator[None]:
    """Import Feast without typeguard, which parses and compiles the source of its classes anew.

    That is 3.4 of the 4.2 s that the import takes (`python -X importtime`, Feast 0.67), at every
    start. What it would check are the arguments that Feast's own classes are called with.
    """
    try:
        import typeguard
    except ImportError:
        yield
        return
    checked = typeguard.typechecked

    def unchecked(target: Any = None, **_: Any) -> Any:
        return unchecked if target is None else target

    typeguard.typechecked = unchecked
    try:
        yield
    finally:
        typeguard.typechecked = checked


def _require_same_schema(view: ProfileView, registered: Any, repo: Path) -> None:
    there = (
        sorted(registered.join_keys),
        sorted(field.name for field in registered.features),
        registered.ttl.total_seconds() * 1000,
    )
    here = ([view.key], sorted([*view.fields, AS_OF]), view.ttl_ms)
    if there != here:
        raise StoreNotReady(
            f"FEAST_REPO={repo}: {view.name} is registered with key, fields and TTL {there}, but "
            f"declared with {here}. {_FILL.format(repo)}"
        )


def _bound_waiting(online_store: Any, config: Any) -> None:
    """Let no read wait for ever; the defaults do, or for seconds."""
    if config.online_store.type == "redis":
        from redis.backoff import NoBackoff
        from redis.exceptions import ConnectionError
        from redis.retry import Retry

        client = online_store._get_client(config.online_store)
        # redis-py 7 tries four times with a growing pause, after timeouts, too; once more, at once,
        # is for a connection that was dropped while idle.
        client.set_retry(Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)))
        pool = getattr(client, "connection_pool", None)  # a cluster has one per node
        if pool is not None:
            for name in ("socket_timeout", "socket_connect_timeout"):
                if pool.connection_kwargs.get(name) is None:
                    pool.connection_kwargs[name] = STORE_TIMEOUT_S
    elif config.online_store.type == "sqlite":
        milliseconds = int(STORE_TIMEOUT_S * 1000)
        online_store._get_conn(config).execute(f"PRAGMA busy_timeout = {milliseconds}")


def _let_readers_in(config: Any) -> None:
    """Switch SQLite to write-ahead logging (it stays so), or a materialization stops readers."""
    if config.online_store.type == "sqlite":
        import sqlite3

        path = config.repo_path / config.online_store.path
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Feast's progress bars and its dependencies' deprecation warnings off the terminal."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
