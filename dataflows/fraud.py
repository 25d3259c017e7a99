"""Card-fraud scoring: transactions and fraud reports in, predictions out.

    python -m bytewax.run dataflows.fraud -r recovery -s 10 -b 0

Configured by environment: ``python -m dataflows.settings`` prints what there is.
"""

from __future__ import annotations

import bytewax.operators as op
from bytewax.dataflow import Dataflow

from dataflows.kafka.sink import output
from dataflows.runtime import Runtime
from dataflows.steps.answered import answered
from dataflows.steps.decode import decode
from dataflows.steps.distinct import distinct
from dataflows.steps.encode import audit, encode
from dataflows.steps.lookup import lookup
from dataflows.steps.score import score
from dataflows.steps.short_answer import short_answer
from dataflows.steps.triage import triage
from dataflows.steps.windows import windows
from features.fraud import CARD, FRAUD, SOURCES, TERMINAL, suspicious
from features.profiles import PROFILES


def graph(run: Runtime) -> Dataflow:
    """Lay the graph.

    Step ids are keys of the recovery store: renaming one silently starts its state empty, so
    tests/unit/test_fraud_graph.py freezes them.
    """
    flow = Dataflow("fraud")
    records = op.input("records", flow, run.source)
    events = decode("decode", records, run.decoder, run.topics)
    fresh = events.accepted
    if run.dedupe is not None:
        fresh = distinct(
            "distinct", fresh, CARD.key, SOURCES, run.topics, run.dedupe, run.shards.count
        )
    card = windows("card", fresh, CARD, SOURCES, run.shards)
    terminal = windows("terminal", card, TERMINAL, SOURCES, run.shards)
    asking = answered("answered", terminal, FRAUD, SOURCES, run.topics)
    if run.shedding is not None:
        ways = triage("triage", asking, run.shedding)
        asking = ways.full
    last = None if run.shedding is None else run.shedding.last
    profiled = lookup("profiles", asking, run.store, PROFILES)
    scored = score("score", profiled, FRAUD, run.scorer, run.thresholds, run.reasons, last)
    decided = scored
    if run.shedding is not None:
        short = short_answer("short", ways.short, run.shedding.last, run.thresholds, suspicious)
        decided = op.merge("decided", scored, short)
    predictions = encode("encode", decided, FRAUD, run.scorer.version, run.topics, run.notice)
    audited = audit("sample", scored, FRAUD, run.scorer.version, run.topics, run.audit_share)
    too_large = output("predictions", predictions, run.predictions)
    unaudited = output("audit", audited, run.audit)
    refused = op.merge("refused", events.refused, too_large, unaudited)
    output("dead_letters", refused, run.dead_letters)
    return flow


def flow() -> Dataflow:
    """Open what the environment names and return the flow; ``bytewax.run`` calls this."""
    return Runtime.start(graph)
