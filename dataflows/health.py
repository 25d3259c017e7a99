"""What a supervisor asks: is the flow alive, is it ready, and if not, why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

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
        unconfirmed_since: returns since when brokers have confirmed nothing that was written, by
            `now`; None: they do, or nothing was.
        now: monotonic clock, in seconds.
        started: whether the flow has begun to read, or, in a process without input partitions, to
            write.
        epoch_at: when an epoch last became durable, or the flow began to read, by `now`; None: it
            has not, or this process has no input partitions, and is not told of epochs.
        outage_since: since when no broker answers who reads, by `now`; None: one does.
        model: version of the model that is loaded.
    """

    stale_after_s: float = 60.0
    unconfirmed_since: Callable[[], float | None] = lambda: None
    now: Callable[[], float] = time.monotonic
    started: bool = False
    epoch_at: float | None = None
    outage_since: float | None = None
    model: str | None = None

    def begins(self) -> None:
        """Note that the flow has begun."""
        self.started = True

    def reads(self) -> None:
        """Note that the flow has begun to read, or that an epoch has ended."""
        self.started = True
        self.epoch_at = self.now()

    def silent_since(self) -> float | None:
        """Return since when no broker answers, by `now`; None: one does."""
        both = self.outage_since, self.unconfirmed_since()
        return min((since for since in both if since is not None), default=None)

    def alive(self) -> list[Check]:
        """Return what must be so of a process that is not to be restarted."""
        epoch_at = self.epoch_at
        if epoch_at is None:
            return [Check("epoch", True, "nothing is read yet, or by other processes")]
        age_s = self.now() - epoch_at
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
        brokers, started, silent = "the brokers answer", self.started, None
        since = self.silent_since()
        if since is not None:
            silent = self.now() - since
            brokers = f"no broker has answered for {silent:.0f} s; the flow waits for them"
        elif not started:
            brokers = "nothing has been read yet: the flow is starting, or resuming"
        return [
            Check("model", self.model is not None, model),
            Check("brokers", started and silent is None, brokers),
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
