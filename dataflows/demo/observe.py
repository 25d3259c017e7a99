"""What can be seen of a running flow from outside: its metrics and its predictions."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from confluent_kafka import Consumer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

PREDICTIONS = "predictions"


@dataclass(frozen=True)
class Sample:
    """One scrape of the flow's /metrics."""

    at_s: float
    events: Mapping[tuple[str, str], int]  # (topic, outcome) → so far
    lag: int
    #: Cumulative counts by upper bound in seconds.
    latency: Mapping[float, float]

    def count(self, topic: str, outcome: str) -> int:
        return self.events.get((topic, outcome), 0)


def scrape(port: int, timeout_s: float = 1.0) -> Sample | None:
    """Read the metrics at a loopback port; None if nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    events: dict[tuple[str, str], int] = {}
    latency: dict[float, float] = {}
    lag = 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "scoring_events_total":
                key = sample.labels["topic"], sample.labels["outcome"]
                events[key] = int(sample.value)
            elif sample.name == "scoring_end_to_end_latency_seconds_bucket":
                latency[float(sample.labels["le"])] = sample.value
            elif sample.name == "scoring_lag_records":
                lag += int(sample.value)
    return Sample(time.monotonic(), events, lag, latency)


class Recent:
    """Rates and percentiles over the last few seconds, from samples."""

    def __init__(self, window_s: float = 5.0) -> None:
        self._window_s = window_s
        self._samples: deque[Sample] = deque()

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)
        while sample.at_s - self._samples[0].at_s > self._window_s and len(self._samples) > 2:
            self._samples.popleft()

    def rate(self, outcome: str, *topics: str) -> float:
        """Return events/s with an outcome, all `topics` together."""
        if len(self._samples) < 2:
            return 0.0
        first, last = self._samples[0], self._samples[-1]
        counted = sum(last.count(t, outcome) - first.count(t, outcome) for t in topics)
        return counted / (last.at_s - first.at_s)

    def latency_ms(self, *percentiles: float) -> list[float | None]:
        """Return end-to-end percentiles, interpolated within the histogram's buckets."""
        if len(self._samples) < 2:
            return [None] * len(percentiles)
        first, last = self._samples[0].latency, self._samples[-1].latency
        counts = {bound: n - first.get(bound, 0) for bound, n in last.items()}
        return [percentile_ms(counts, p) for p in percentiles]


def percentile_ms(cumulative: Mapping[float, float], percentile: float) -> float | None:
    """Interpolate a percentile in a cumulative histogram (bounds in seconds); None if empty.

    >>> percentile_ms({0.001: 0, 0.002: 100, float("inf"): 100}, 50)
    1.5
    """
    total = cumulative.get(float("inf"), 0)
    if not total:
        return None
    rank = total * percentile / 100
    below_bound, below = 0.0, 0.0
    for bound in sorted(cumulative):
        n = cumulative[bound]
        if n >= rank:
            if bound == float("inf"):
                return below_bound * 1000
            share = (rank - below) / (n - below) if n > below else 1.0
            return round((below_bound + share * (bound - below_bound)) * 1000, 3)
        below_bound, below = bound, n
    return below_bound * 1000


class Reason(msgspec.Struct, gc=False):
    """See `dataflows.steps.encode.Reason`."""

    feature: str
    contribution: float


class Prediction(msgspec.Struct, gc=False):
    """What the demo reads of a prediction record."""

    transaction_id: str
    card_id: str
    terminal_id: str
    event_time: int
    score: float | None
    decision: str
    reasons: list[Reason] = []


class Truth:
    """What the simulator knows of each transaction; the stream never does."""

    def __init__(self, ids: Any, labels: Any, amount_cents: Any) -> None:
        """Take arrays in ascending order of ids: bytes, int8, int64."""
        self._ids, self._labels, self._cents = ids, labels, amount_cents

    def rows(self, transaction_ids: Any) -> Any:
        """Return the rows of ids (a bytes array), int64; raise KeyError for an unknown one."""
        rows = np.minimum(np.searchsorted(self._ids, transaction_ids), len(self._ids) - 1)
        if not np.array_equal(self._ids[rows], transaction_ids):
            raise KeyError("predictions for transactions that nobody sent")
        return rows

    def frauds(self, transaction_ids: Any) -> Any:
        """Return a bool array: which of the ids are fraud."""
        return self._labels[self.rows(transaction_ids)] != 0

    def of(self, transaction_id: str) -> tuple[bool, float]:
        """Return whether it is fraud, and its amount in major units."""
        row = self.rows(np.array([transaction_id.encode()]))[0]
        return bool(self._labels[row]), float(self._cents[row]) / 100


@dataclass(frozen=True)
class Flagged:
    """A prediction that was not approved, and the truth."""

    prediction: Prediction
    amount: float
    fraud: bool


@dataclass
class Predictions:
    """Read the predictions topic from its beginning, in a thread of its own."""

    #: Of the flagged ones, how many to keep.
    keep: int = 40
    scores: dict[str, float | None] = field(default_factory=dict)
    records: int = 0
    flagged: deque[Flagged] = field(default_factory=deque)
    #: (decision, is fraud) → how many, approved ones left out.
    decisions: Counter[tuple[str, bool]] = field(default_factory=Counter)
    failed: str | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self, config: Mapping[str, Any], partitions: int, truth: Truth) -> None:
        """Begin to read; `config` is librdkafka's."""
        self._truth = truth
        self._thread = threading.Thread(target=self._run, args=(config, partitions), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading, if it has begun; bounded."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10)

    def _run(self, config: Mapping[str, Any], partitions: int) -> None:
        ours = {"group.id": "demo", "auto.offset.reset": "error", "enable.auto.commit": False}
        try:
            consumer = Consumer({**config, **ours, "log_level": 0})
            consumer.assign([TopicPartition(PREDICTIONS, p, 0) for p in range(partitions)])
            decode = msgspec.json.Decoder(Prediction).decode
            while not self._stop.is_set():
                for message in consumer.consume(2000, 0.1):
                    if message.error():
                        if message.error().retriable():
                            continue
                        raise RuntimeError(message.error().str())
                    self._take(decode(message.value()))
            consumer.close()
        except Exception as error:
            self.failed = f"reading the predictions failed: {error}"

    def _take(self, prediction: Prediction) -> None:
        self.records += 1
        self.scores[prediction.transaction_id] = prediction.score
        if prediction.decision == "approve":
            return
        fraud, amount = self._truth.of(prediction.transaction_id)
        self.decisions[prediction.decision, fraud] += 1
        self.flagged.append(Flagged(prediction, amount, fraud))
        while len(self.flagged) > self.keep:
            self.flagged.popleft()
