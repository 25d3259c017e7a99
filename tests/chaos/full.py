"""The kill matrix, whole: ``make chaos``.

Every point twice in each of eight runs, in random order, one kill after the other on the same
topics and recovery store. Prints the table, and writes docs/kill_matrix.md.
``CHAOS_SEED=…`` repeats what is random, except for time.
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.chaos.check import Verdict
from tests.chaos.harness import POINTS, RATES, Assets, Kill, Run, Setting
from tests.chaos.instrumented import POINTS as MEANING
from tests.integration.flow import ROOT

SEED = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
TIMES = 2
SETTINGS = [
    Setting(delivery, processes, duplicates)
    for delivery in POINTS
    for processes in (1, 2)
    for duplicates in (False, True)
]
_PAGE = ROOT / "docs" / "kill_matrix.md"
_Result = tuple[Setting, Sequence[Kill], Verdict]


@pytest.fixture(scope="module")
def results() -> Iterator[list[_Result]]:
    print(f"\nCHAOS_SEED={SEED}", flush=True)
    began = time.monotonic()
    results: list[_Result] = []
    yield results
    page = _page(results, time.monotonic() - began)
    print(f"\n{page}")
    if len(results) == len(SETTINGS):
        _PAGE.write_text(page)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_kills(setting: Setting, assets: Assets, tmp_path: Path, results: list[_Result]) -> None:
    rng = random.Random(f"{SEED} {setting}")
    run = Run(assets, tmp_path / "run", setting, rng)
    verdict = Verdict()
    try:
        print(f"\n{setting}:", end=" ", flush=True)
        for kill in plan(setting, rng):
            run.kill(kill)
            print(kill.point, end=" ", flush=True)
        verdict = run.finish()
    except AssertionError as error:  # `Broken` among them
        verdict.violations.append(str(error))
    finally:
        results.append((setting, run.kills, verdict))
        run.close()
    print(verdict, flush=True)
    assert verdict.violations == []


def plan(setting: Setting, rng: random.Random) -> list[Kill]:
    """Draw the kills of a run."""
    points = list(POINTS[setting.delivery]) * TIMES
    rng.shuffle(points)
    return [Kill.draw(point, setting.processes, rng) for point in points]


def _kafka_version() -> str:
    name = {"m": "http://maven.apache.org/POM/4.0.0"}
    pom = ElementTree.parse(ROOT / "tests" / "kafka" / "pom.xml")
    for dependency in pom.iterfind("m:dependencies/m:dependency", name):
        if dependency.findtext("m:groupId", "", name) == "org.apache.kafka":
            return dependency.findtext("m:version", "", name)
    raise LookupError("tests/kafka/pom.xml names no Apache Kafka")


def _page(results: Sequence[_Result], seconds: float) -> str:
    points = list(dict.fromkeys(point for each in POINTS.values() for point in each))
    head = ["delivery", "processes", "sent twice", *points, "kills", "events", "undecodable"]
    head += ["found in the tail", "repeated", "lost, doubled or wrong"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for setting, kills, verdict in results:
        at = Counter(kill.point for kill in kills)
        cells = [
            setting.delivery,
            setting.processes,
            f"{verdict.duplicates:,}",
            *(at[point] or ("" if point in POINTS[setting.delivery] else "–") for point in points),
            len(kills),
            f"{verdict.events:,}",
            f"{verdict.bad:,}",
            f"{verdict.compared:,}" if setting.delivery == "exactly_once" else "–",
            "0" if setting.delivery == "exactly_once" else f"{verdict.repeated:,}",
            "; ".join(verdict.violations).replace("\n", " ")[:300] or "0",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    total = sum(len(kills) for _, kills, _ in results)
    wrong = sum(bool(verdict.violations) for _, _, verdict in results)
    apart = sum(not verdict.terminals for _, _, verdict in results)
    given = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
    kafka = "of a given cluster" if given else _kafka_version()
    but = (
        f" (of {apart} run(s) that fell a day of the data behind: the cards' only)" if apart else ""
    )
    meaning = "\n".join(f"- `{point}`: {what}" for point, what in MEANING.items())
    rates = " and ".join(f"{rate} (with {n} process(es))" for n, rate in RATES.items())
    return f"""# The kill matrix

    CHAOS_SEED={SEED} make chaos

{datetime.now(UTC):%Y-%m-%d}: {total} kills in {seconds / 60:.0f} minutes, {wrong} of \
{len(results)} runs with a violation. Apache Kafka {kafka}, Bytewax {version("bytewax")}, \
confluent-kafka {version("confluent-kafka")}, Python {platform.python_version()}.

{chr(10).join(lines)}

Each line is one run: the real flow on real Kafka under steady load, {rates} records a second of \
the handbook data, killed again and again (SIGKILL) on the same topics and recovery store, then \
drained. One record in a hundred is undecodable. Where the third column is not 0, one in ten is \
*sent twice* by the producer, and `DEDUPE=true`. Of two processes one is killed, and the other has \
to end by itself; sometimes both are.

{meaning}
- `random`: at a random time

*Found in the tail*: records that a next life found in the outputs beyond its snapshot, and did \
not write again. *Repeated*: predictions written again, with the same event id, \
all within replayed epochs. *Lost, doubled or wrong* is judged by a reader of committed records \
that shares no code with the flow: every event has a prediction and an audit record, every other \
record a dead letter; exactly one each (exactly once), or again only within replayed epochs and \
never twice in one life (at least once); every feature of every audit record, repeated ones too, \
equals the offline replay's bit for bit{but}; its prediction has the audited score; and what came \
in equals what went out.
"""
