"""What a supervisor asks: is the flow alive, is it ready, and if not, why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that has to be so; `sentence` says what is, and if it is not well, what to do."""

    name: str
    ok: bool
    sentence: str


@dataclass(slots=True)
class Health:
    """What is known of the flow's health. Written by the worker, read by any thread.

    Attributes:
        stale_after_s: how long an epoch may take, in seconds, before the flow counts as stuck.
        now: monotonic clock, in seconds.
        epoch_at: when an epoch last became durable, or the process began, by `now`.
        reading: whether the source has begun to read.
        outage_since: since when no broker answers, by `now`; None: one does.
        model: version of the model that is loaded.
    """

    stale_after_s: float = 60.0
    now: Callable[[], float] = time.monotonic
    epoch_at: float = field(init=False)
    reading: bool = False
    outage_since: float | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        self.epoch_at = self.now()

    def alive(self) -> list[Check]:
        """Return what must be so of a process that is not to be restarted."""
        age_s = self.now() - self.epoch_at
        ok = age_s <= self.stale_after_s
        sentence = f"the last epoch ended {age_s:.0f} s ago"
        if not ok:
            sentence += (
                f", more than {self.stale_after_s:.0f}: the worker is stuck, or waits for brokers "
                "or for the recovery store's disk; its log says which"
            )
        return [Check("epoch", ok, sentence)]

    def ready(self) -> list[Check]:
        """Return what must be so of a process that does its work now."""
        model = "no model is loaded yet" if self.model is None else f"model {self.model} is loaded"
        brokers = "the brokers answer"
        if self.outage_since is not None:
            since_s = self.now() - self.outage_since
            brokers = f"no broker has answered for {since_s:.0f} s; the flow waits for them"
        elif not self.reading:
            brokers = "nothing has been read yet: the flow is starting, or resuming"
        return [
            Check("model", self.model is not None, model),
            Check("brokers", self.reading and self.outage_since is None, brokers),
        ]

    def all(self) -> list[Check]:
        """Return both."""
        return [*self.alive(), *self.ready()]


def endpoints(registry: CollectorRegistry, health: Health) -> Starlette:
    """Return what serves /metrics, /healthz and /readyz.

    The latter answer 200 or 503 with ``{"checks": [{"name", "ok", "sentence"}]}``.
    """

    def metrics(_: Request) -> Response:
        # The type says which version of the text format it is, as a scraper wants to know.
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    def answer(checks: list[Check]) -> Response:
        listed = [{"name": c.name, "ok": c.ok, "sentence": c.sentence} for c in checks]
        return JSONResponse({"checks": listed}, 200 if all(c.ok for c in checks) else 503)

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/healthz", lambda _: answer(health.alive())),
            Route("/readyz", lambda _: answer(health.all())),
        ]
    )
