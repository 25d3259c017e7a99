"""What stops a flow, in sentences for its operator."""

from __future__ import annotations

from typing import ClassVar


class FlowError(RuntimeError):
    """Say why the flow cannot start or go on: what, where, and what to do.

    The latest one is remembered: in a cluster, Bytewax 0.21.1 raises only that its network threads
    have panicked.
    """

    latest: ClassVar[FlowError | None] = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        FlowError.latest = self


class StartupError(FlowError):
    """Say why a flow cannot start: what was looked for, where, for how long, and what to do."""


class SourceError(FlowError):
    """Say why reading cannot go on: where, what the broker has, and what to do."""


class DeliveryError(FlowError):
    """Say which records Kafka did not take, and what to do."""
