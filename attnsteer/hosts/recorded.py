"""What guidance keeps of a step until the scheduler steps: the conditional forward, and who is to be perturbed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
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
    """The conditional forward of the step in progress, kept until the scheduler steps.

    Attributes:
        tape: what perturbed rows can share; None where they share nothing.
        forks: for each guiding plan how many stages its rows share.
        why_whole: why nothing could be recorded; None where it could, or where the first stage is perturbed.
    """

    model: torch.nn.Module
    call: Call
    inputs: dict[str, Any]
    output: Any
    tape: Tape | None
    forks: Mapping[Plan, int]
    why_whole: str | None
    loans: dict[Site, Loan]

    @property
    def refusal(self) -> str | None:
        """Why the perturbed rows share nothing though stages lie before them; None where that is not so."""
        return self.why_whole or (self.tape.refusal if self.tape else None)

    def groups(self, lanes: Sequence[Lane]) -> list[tuple[int, list[Lane]]]:
        """The perturbed rows of each forward, with the number of stages that they share; the earliest fork first."""
        if self.refusal:
            return [(0, list(lanes))]
        ordered = sorted(lanes, key=lambda lane: self.forks[lane.plan])
        return [(fork, list(rows)) for fork, rows in groupby(ordered, key=lambda lane: self.forks[lane.plan])]

    def shares(self, sample: Tensor) -> bool:
        """Whether another call belongs to the same step: sequential passes share their latents."""
        mine = denoisers.sample_of(denoisers.family_of(self.model), self.inputs)
        return mine is sample or mine.shape != sample.shape or torch.equal(mine, sample)


class Lane(NamedTuple):
    """One perturbed row: its row of the latents, who perturbs it, and the guidance scale of this step."""

    row: int
    plan: Plan
    scale: float
