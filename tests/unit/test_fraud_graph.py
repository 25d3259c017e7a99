"""The step ids of the flow are keys of the recovery store, so they do not change by accident."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from bytewax.dataflow import Dataflow

from dataflows.fraud import graph
from dataflows.kafka.sink import KafkaSink
from dataflows.kafka.source import KafkaSource, SourceTopic
from dataflows.overload import Overload
from dataflows.runtime import Runtime
from dataflows.steps.distinct import Dedupe
from dataflows.steps.short_answer import LastScores
from dataflows.steps.triage import Shedding
from dataflows.steps.windows import Shards
from features.events import EventDecoder
from features.fraud import SOURCES, at_least
from model.package import Thresholds

#: Steps that keep something in the recovery store, by nested step id and operator.
#:
#: Renaming one (or wrapping it in another operator, or renaming the flow) makes Bytewax look for
#: its state under another key and start it *empty, silently*: offsets from the beginning, windows
#: without a past. If that is what you want, say so in the release notes: who upgrades needs a new
#: recovery directory and a new `features.offline --state`.
STATEFUL = [
    ("fraud.records", "input"),
    ("fraud.card.state", "stateful_batch"),
    ("fraud.terminal.state", "stateful_batch"),
    ("fraud.predictions.write", "output"),
    ("fraud.audit.write", "output"),
    ("fraud.dead_letters.write", "output"),
]
#: The sentence of the graph.
STEPS = ["records", "decode", "card", "terminal", "answered", "profiles", "score"]
STEPS += ["encode", "sample", "predictions", "audit", "refused", "dead_letters"]
#: With DEDUPE there is one more, between decode and card.
DISTINCT = ("fraud.distinct.state", "stateful_batch")


class _Scorer:
    version = "0123456789ab"


def laid(dedupe: Dedupe | None = None, shedding: Shedding | None = None) -> Dataflow:
    """Lay the graph over connections that are never opened."""
    nowhere = {"bootstrap.servers": "127.0.0.1:1"}
    topics = [SourceTopic(event.__name__, event.stream_time) for event in SOURCES]
    unused = cast(Any, None)
    return graph(
        Runtime(
            source=KafkaSource(topics, nowhere, group_id="g"),
            topics=[topic.name for topic in topics],
            decoder=EventDecoder(SOURCES),
            shards=Shards(16),
            store=unused,
            scorer=cast(Any, _Scorer()),
            thresholds=Thresholds(0.2, 0.9, "by hand"),
            reasons=3,
            predictions=KafkaSink("predictions", nowhere),
            dead_letters=KafkaSink("dead_letters", nowhere),
            audit=KafkaSink("audit", nowhere),
            audit_share=0.01,
            dedupe=dedupe,
            shedding=shedding,
        )
    )


def walk(steps: list[Any]) -> Iterator[tuple[str, str]]:
    for step in steps:
        yield step.step_id, type(step).__name__
        yield from walk(getattr(step, "substeps", []))


def stateful(flow: Dataflow) -> list[tuple[str, str]]:
    kinds = {"input", "output", "stateful_batch"}
    leaves = [(i, kind) for i, kind in walk(flow.substeps) if kind in kinds]
    return [(i, kind) for i, kind in leaves if not any(j.startswith(f"{i}.") for j, _ in leaves)]


def test_the_ids_of_stateful_steps_are_frozen() -> None:
    assert stateful(laid()) == STATEFUL
    assert stateful(laid(Dedupe(600_000, 1000))) == [STATEFUL[0], DISTINCT, *STATEFUL[1:]]


def test_the_graph_is_the_sentence() -> None:
    assert [step.step_id for step in laid().substeps] == [f"fraud.{step}" for step in STEPS]
    steps = [*STEPS[:2], "distinct", *STEPS[2:]]
    flow = laid(Dedupe(600_000, 1000))
    assert [step.step_id for step in flow.substeps] == [f"fraud.{step}" for step in steps]


def test_what_may_be_shed_is_told_apart_before_it_is_looked_up() -> None:
    control = Overload("degrade", target_s=1, deadline_s=10)
    flow = laid(shedding=Shedding(control, at_least(100), LastScores(10, 60)))
    found = [step.step_id.removeprefix("fraud.") for step in flow.substeps]
    at = STEPS.index("profiles")
    after = STEPS.index("encode")
    expected = [*STEPS[:at], "triage", *STEPS[at:after], "short", "decided", *STEPS[after:]]
    assert found == expected
    assert stateful(flow) == STATEFUL


def test_the_graph_keeps_to_a_page() -> None:
    source = Path(graph.__code__.co_filename).read_text()
    assert len(source.splitlines()) <= 80
