"""The exceptions of attnsteer: one sentence each, naming what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence


class SteeringError(ValueError):
    """A request that cannot be carried out. ``reasons`` holds every reason, each with what the user can do."""

    def __init__(self, reasons: str | Sequence[str]):
        self.reasons: list[str] = [reasons] if isinstance(reasons, str) else list(reasons)
        super().__init__(self.reasons[0] if len(self.reasons) == 1 else "\n".join(f"- {r}" for r in self.reasons))


class WhereError(SteeringError):
    """A selection of steps, layers or heads that matches nothing; the message lists what exists."""


class NotReachedError(SteeringError, RuntimeError):
    """A selected site was never reached by the forward pass, so the result would silently lack the edit."""
