"""Judge what a run has left: is everything there, once, and right?

Nothing here is imported from the flow. What must be true of the features comes from the offline
replay of what was sent.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from features.events import EventDecoder
from features.fraud import FRAUD, SOURCES
from features.offline import Replay
from features.state_dir import StateDir
from features.windows import SHARDS
from tests.chaos.load import Item
from tests.chaos.reader import Place, Record

_SHOWN = 3
_CHUNK = 1000


@dataclass(frozen=True)
class Life:
    """One life of the flow: where it went on reading, and the outputs' ends when it began."""

    resumed: Mapping[Place, int]
    began: Mapping[Place, int]


@dataclass
class Verdict:
    """What became of a run."""

    #: Events sent, each counted once, and records that were none.
    events: int = 0
    bad: int = 0
    duplicates: int = 0
    predictions: int = 0
    #: Records beyond the first of each event (at least once).
    repeated: int = 0
    #: Records that no exactly-once flow could have told from new ones without its tail scan.
    compared: int = 0
    #: Audit records whose terminal features were compared too.
    terminals: int = 0
    violations: list[str] = field(default_factory=list)

    def against(self, what: str, found: Sequence[object]) -> None:
        """Note a violation, if there is any."""
        if found:
            shown = ", ".join(map(str, found[:_SHOWN]))
            self.violations.append(f"{len(found)} {what}: {shown}")


@dataclass(frozen=True)
class Facts:
    """What is known of a run: what was sent, what is on the brokers, and the flow's lives."""

    exactly_once: bool
    topics: Mapping[str, str]
    sent: Sequence[Item]
    records: Mapping[str, Sequence[Record]]
    lives: Sequence[Life]
    state: Path
    #: No event was read later than the flow's bound for late ones, compared with any other.
    together: bool

    def of(self, name: str) -> Sequence[Record]:
        """Return the records of a topic, by its name in the settings."""
        return self.records[self.topics[name]]


#: Where an event was first appended: partition and offset with topic.
_Origin = tuple[str, int, int]


def check(facts: Facts) -> Verdict:
    """Return everything that is wrong, and the counts."""
    verdict = Verdict()
    first, bad = _inputs(facts, verdict)
    verdict.events = len({i.event_id for i in facts.sent if i.topic == "transactions"} - {None})
    verdict.bad = len(bad)
    verdict.duplicates = sum(item.again for item in facts.sent)
    verdict.predictions = len(facts.of("predictions"))

    answered = {key: origin for (topic, key), origin in first.items() if topic == "transactions"}
    _delivered(facts, verdict, "predictions", answered, _business_id)
    _delivered(facts, verdict, "audit", answered, _business_id)
    _delivered(facts, verdict, "dead_letters", {_name(o): o for o in bad}, _origin_of_letter)

    letters = [_origin_of_letter(record) for record in facts.of("dead_letters")]
    values = {_name(origin): value for origin, value in bad.items()}
    pairs = zip(letters, facts.of("dead_letters"), strict=True)
    wrong = [key for key, record in pairs if key in values and values[key] != record.value]
    verdict.against("dead letters are not the record refused", wrong)
    _features(facts, verdict, answered)
    if facts.exactly_once:
        _conserved(facts, verdict)
    return verdict


def _inputs(
    facts: Facts, verdict: Verdict
) -> tuple[dict[tuple[str, str], _Origin], dict[_Origin, bytes | None]]:
    """Return where each event came first, and the records that are none, by origin."""
    first: dict[tuple[str, str], _Origin] = {}
    bad: dict[_Origin, bytes | None] = {}
    refused = {item.value for item in facts.sent if item.event_id is None}
    for name in ("transactions", "fraud_reports"):
        found = facts.of(name)
        sent = sum(item.topic == name for item in facts.sent)
        if len(found) != sent:
            verdict.violations.append(f"{name}: {sent} were sent, {len(found)} are there")
        for record in sorted(found, key=lambda r: (r.partition, r.offset)):
            origin = (record.topic, record.partition, record.offset)
            if record.value in refused:
                bad[origin] = record.value
            else:
                event_id = json.loads(record.value or b"")["transaction_id"]
                first.setdefault((name, event_id), origin)
    return first, bad


def _business_id(record: Record) -> str:
    found = str(json.loads(record.value or b"")["transaction_id"])
    return found if record.headers.get("event_id") == found.encode() else f"{found} (its header)"


def _origin_of_letter(record: Record) -> str:
    parts = [record.headers.get(f"dlq.{name}") or b"" for name in ("topic", "partition", "offset")]
    return b"/".join(parts).decode()


def event_time(record: Record) -> int | None:
    """Return when a transaction happened, in ms; None if the record is no event."""
    try:
        return int(json.loads(record.value or b"")["event_time"])
    except (ValueError, KeyError, TypeError):
        return None


def _name(origin: _Origin) -> str:
    return "/".join(map(str, origin))


def _delivered(
    facts: Facts,
    verdict: Verdict,
    name: str,
    expected: Mapping[str, _Origin],
    key_of: Callable[[Record], str],
) -> None:
    """Check that each of `expected` is there, as often as may be, and nothing else."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in facts.of(name):
        found[key_of(record)].append(record)
    verdict.against(f"{name} missing", [key for key in expected if key not in found])
    verdict.against(f"{name} of nothing that was sent", [k for k in found if k not in expected])
    repeated = {key: records for key, records in found.items() if len(records) > 1}
    if name == "predictions":
        elsewhere = [
            key
            for key, records in found.items()
            for record in records
            if key in expected and record.headers.get("origin") != _name(expected[key]).encode()
        ]
        verdict.against("predictions are not of the event that came first", elsewhere)
        verdict.repeated = sum(len(records) - 1 for records in repeated.values())
    if facts.exactly_once:
        verdict.against(f"{name} doubled", list(repeated))
        return
    # A life may write again what an earlier one wrote, if its epoch was not stored: that is what
    # lies behind the offset that the later one went on from. Within a life, each comes once.
    lives: dict[Place, list[int]] = {}
    for record in facts.of(name):
        if record.place not in lives:
            lives[record.place] = [life.began.get(record.place, 0) for life in facts.lives]
    outside, twice = [], []
    for key, records in found.items():
        if key not in expected:
            continue
        topic, partition, offset = expected[key]
        wrote = [bisect_right(lives[r.place], r.offset) - 1 for r in records]
        if len(set(wrote)) < len(wrote):
            twice.append(key)
        resumed = [facts.lives[life].resumed.get((topic, partition), 0) for life in wrote]
        if any(offset < begin for begin in resumed):
            outside.append(key)
    verdict.against(f"{name} doubled within one life", twice)
    verdict.against(f"{name} repeated outside of replayed epochs", outside)


def _features(facts: Facts, verdict: Verdict, answered: Mapping[str, _Origin]) -> None:
    """Compare every audit record with the offline replay, bit for bit."""
    vectors = replayed(facts.sent, facts.state)
    names = list(FRAUD.names)
    compared = {i for i, name in enumerate(names) if facts.together or "terminal" not in name}
    differ, elsewhere = [], []
    for record in facts.of("audit"):
        audited = json.loads(record.value or b"")
        key = audited["transaction_id"]
        if key not in vectors or key not in answered:
            continue  # told of already
        values = [audited["features"][name] for name in names]
        online = np.array([np.nan if value is None else value for value in values])
        offline = np.frombuffer(vectors[key])
        wrong = np.flatnonzero(online.view(np.int64) != offline.view(np.int64))
        if found := [names[i] for i in wrong if i in compared]:
            differ.append(f"{key} {found}")
        if (audited["topic"], audited["partition"], audited["offset"]) != answered[key]:
            elsewhere.append(key)
    scores = dict(map(_scored, facts.of("audit")))
    predicted = map(_scored, facts.of("predictions"))
    other_scores = [key for key, score in predicted if key in scores and scores[key] != score]
    verdict.against("predictions have another score than was audited", other_scores)
    verdict.terminals = len(facts.of("audit")) if facts.together else 0
    verdict.against("audit records differ from the offline replay", differ)
    verdict.against("audit records are not of the event that came first", elsewhere)


def _scored(record: Record) -> tuple[str, float | None]:
    body = json.loads(record.value or b"")
    return body["transaction_id"], body["score"]


def replayed(sent: Sequence[Item], state: Path | None) -> dict[str, bytes]:
    """Return the features of each transaction sent, by its id, as the offline half computes them.

    In the order of sending, which is that of stream time; events sent again do not count.
    """
    topics = {"fraud_reports": 0, "transactions": 1}
    events = [item for item in sent if item.event_id is not None and not item.again]
    start = None if state is None else StateDir(state, FRAUD, SHARDS)
    shards = SHARDS if start is None else start.manifest.shards
    replay = Replay(FRAUD, SOURCES, shards, start=start)
    decoder = EventDecoder(SOURCES)
    vectors: dict[str, bytes] = {}
    for begin in range(0, len(events), _CHUNK):
        chunk = events[begin : begin + _CHUNK]
        source = np.array([topics[item.topic] for item in chunk], np.uint8)
        now = np.full(len(chunk), 2**52)
        decoded = decoder([item.value for item in chunk], source, now)
        assert not decoded.refused
        batch = decoded.events.with_columns(
            {"source": source, "seq": np.arange(begin, begin + len(chunk))}
        )
        answers = replay(batch)
        matrix = np.ascontiguousarray(FRAUD.matrix(answers), np.float64)
        for key, row in zip(answers["transaction_id"].tolist(), matrix, strict=True):
            vectors[key.decode()] = row.tobytes()
    return vectors


def _conserved(facts: Facts, verdict: Verdict) -> None:
    letters = Counter(
        (record.headers.get("dlq.topic") or b"").decode() for record in facts.of("dead_letters")
    )
    came = len(facts.of("transactions"))
    again = sum(item.again for item in facts.sent if item.topic == "transactions")
    went = len(facts.of("predictions")) + letters[facts.topics["transactions"]] + again
    if came != went:
        verdict.violations.append(f"{came} transactions came in, {went} are accounted for")
