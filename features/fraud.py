"""The flagship: what is known of a card transaction when it must be judged.

The fifteen inputs of the fraud detection handbook (chapter 3, "Baseline feature transformation"),
declared once; the stream and the offline replay both run from here. Calendar features are in UTC,
as in the handbook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from features.batch import EventBatch
from features.declare import Count, FeatureSet, FeatureView, Mean, Ratio, Value, stateless
from features.events import MONEY_SCALE, Event, EventTime, Key, Money


class Transaction(Event):
    """A card payment asking for a verdict; partitioned by card."""

    identity: ClassVar[str | None] = "transaction_id"

    transaction_id: Key
    card_id: Key
    terminal_id: Key
    event_time: EventTime
    amount: Money


class FraudReport(Event):
    """News that a transaction was fraud; ``event_time`` is the transaction's."""

    stream_time: ClassVar[str] = "report_time"
    identity: ClassVar[str | None] = "transaction_id"

    transaction_id: Key
    terminal_id: Key
    event_time: EventTime
    report_time: EventTime


#: What the flow reads. At equal stream times, what comes first here is taken first.
SOURCES = (FraudReport, Transaction)

_DAY = 86_400_000
_HOUR = 3_600_000


@stateless()
def during_weekend(event_time: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """1 on Saturday and Sunday (1970-01-01 was a Thursday)."""
    return (event_time // _DAY + 3) % 7 >= 5


@stateless()
def during_night(event_time: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """1 from midnight to 06:59:59.999."""
    return event_time % _DAY // _HOUR <= 6


WINDOWS = ("1d", "7d", "30d")

#: Terminals that work offline hand in their day's transactions at night; and a replay at
#: thousands of times real speed turns a second between two partitions into hours.
LATENESS = "1d"
#: Partitions may be read this far apart, as when two processes work off a long backlog.
IDLE = "180d"

CARD = FeatureView(
    "card",
    key="card_id",
    of=Transaction,
    lateness=LATENESS,
    idle=IDLE,
    features=[Count(over=WINDOWS), Mean("amount", over=WINDOWS)],
)

#: Fraud becomes known within seven days, so a terminal's risk is taken that long ago, when a
#: transaction that nobody has reported may count as legitimate.
TERMINAL = FeatureView(
    "terminal",
    key="terminal_id",
    of=Transaction,
    delay="7d",
    lateness=LATENESS,
    idle=IDLE,
    features=[
        Count(over=WINDOWS),
        Ratio(Count(source=FraudReport), Count(), over=WINDOWS, empty=0.0, name="risk"),
    ],
)

FRAUD = FeatureSet(
    "fraud",
    of=Transaction,
    features=[Value("amount"), during_weekend, during_night, CARD, TERMINAL],
)


def at_least(amount: float) -> Callable[[EventBatch], npt.NDArray[np.bool_]]:
    """Return what marks transactions of this amount (major units) or more: bool [n]."""
    cents = round(amount * MONEY_SCALE)
    return lambda batch: batch["amount"] >= cents


#: Every transaction above this amount is fraud, in the handbook's scenario 1.
SUSPICIOUS_AMOUNT = 220.0
#: Share of a terminal's transactions known to be fraud, 7 to 14 days ago (scenario 2: all are).
SUSPICIOUS_RISK = 0.5


def suspicious(batch: EventBatch) -> npt.NDArray[np.bool_]:
    """Return which transactions a rule would have reviewed, where no model can be asked: bool [n].

    Needs the windows' features. The handbook's first two scenarios; the third has no such mark.
    """
    large = batch["amount"] > SUSPICIOUS_AMOUNT * MONEY_SCALE
    return large | (batch["terminal_risk_7d"] >= SUSPICIOUS_RISK)
