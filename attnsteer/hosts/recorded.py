"""What guidance keeps of a step until the scheduler steps: the conditional forward, and who is to be perturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fork import Tape
from ..lending import Loan
from ..scheduler import Plan
from ..site import Site
from . import denoisers
from .base import Call


@dataclass(eq=False)
class Recorded:
    """The conditional forward of the step in progress, kept until the scheduler steps."""

    model: torch.nn.Module
    call: Call
    inputs: dict[str, Any]
    output: Any
    tape: Tape | None
    why_whole: str | None
    loans: dict[Site, Loan]

    def shares(self, sample: Tensor) -> bool:
        """Whether another call belongs to the same step: sequential passes share their latents."""
        mine = denoisers.sample_of(denoisers.family_of(self.model), self.inputs)
        return mine is sample or mine.shape != sample.shape or torch.equal(mine, sample)


class Lane(NamedTuple):
    """One perturbed row: its row of the latents, who perturbs it, and the guidance scale of this step."""

    row: int
    plan: Plan
    scale: float
