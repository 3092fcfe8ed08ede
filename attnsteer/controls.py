"""Controls: what a disturbance as strong as a method does without the method's idea.

A method helps only if it helps more than its control on the same prompts and seeds::

    Astray(method=AttendAndExcite(subjects=("dog", "car")))    the latent moves as far, in a random direction
    random_heads(where, sites, seed=0)                         as many other heads, drawn at random
    all_heads(where, sites)                                    every head of the chosen layers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .errors import SteeringError
from .nursing import Moment, Nursing
from .processor import Processor
from .site import Kind, Site
from .where import Where


def shuffled(gradient: Tensor, seed: int, step: int) -> Tensor:
    """The gradient with its elements in a random order, the same for every picture: equal norm, another direction."""
    order = np.random.default_rng((seed, step)).permutation(gradient.numel())
    return gradient.flatten()[torch.as_tensor(order, device=gradient.device)].view_as(gradient)


@dataclass(frozen=True)
class Astray(Processor):
    """A method that moves the latent, its gradients shuffled: as long and as many steps, in random directions.

    Refinement repeats as long as the method's own rule asks for it, so it mostly runs to its limit.

    Args:
        method: a processor with a loss on attention maps (Attend-and-Excite and its relatives).
        seed: of the order of elements; each step has another.

    Raises:
        SteeringError: a method that does not move the latent, or a ``where`` beside that of the method.
    """

    method: Processor | None = None
    seed: int = 0

    kinds: ClassVar[tuple[Kind, ...]] = ()  # each object has those of its method

    def __post_init__(self) -> None:
        if self.method is None or self.method.nursing() is None:
            name = type(self.method).__name__
            raise SteeringError(f"Astray(method=...) needs a method that moves the latent; {name} does not.")
        if self.where != Where():
            raise SteeringError("Astray acts where its method does: give the method a where, and Astray none.")
        object.__setattr__(self, "kinds", self.method.kinds)

    @property
    def inert(self) -> bool:
        return self.method is None or self.method.inert

    def where_for(self, sites: Sequence[Site]) -> Where:
        assert self.method is not None
        return self.method.where_for(sites)

    def nursing(self) -> Nursing | None:
        own = self.method.nursing() if self.method else None
        return replace(own, redirect=self._redirect) if own else None

    def _redirect(self, gradient: Tensor, moment: Moment) -> Tensor:
        return shuffled(gradient, self.seed, moment.index)


def random_heads(
    where: Where, sites: Sequence[Site], seed: int = 0, kinds: Sequence[Kind] = ("joint", "self")
) -> Where:
    """As many heads as ``where`` selects, drawn from all the others of the model.

    Args:
        where: what the method uses.
        sites: of the model, ``attnsteer.sites(pipe)``.
        seed: of the draw.
        kinds: kinds of sites on which the method acts, in order of preference.

    Raises:
        SteeringError: fewer other heads than ``where`` selects.
    """
    taken = {(site.name, head) for site, heads in where.select(sites, kinds).items() for head in heads}
    every = Where(steps=where.steps).select(sites, kinds)
    others = [(site.name, head) for site, heads in every.items() for head in heads if (site.name, head) not in taken]
    if len(others) < len(taken):
        raise SteeringError(f"{len(taken)} heads are selected and only {len(others)} are left to draw from.")
    drawn: dict[int | str, list[int]] = {}
    for place in sorted(np.random.default_rng(seed).choice(len(others), len(taken), replace=False)):
        name, head = others[place]
        drawn.setdefault(name, []).append(head)
    return Where(heads=drawn, steps=where.steps)


def all_heads(where: Where, sites: Sequence[Site], kinds: Sequence[Kind] = ("joint", "self")) -> Where:
    """Every head of the layers that ``where`` selects."""
    every: dict[int | str, tuple[int, ...]] = {
        site.name: tuple(range(site.heads)) for site in where.select(sites, kinds)
    }
    return Where(heads=every, steps=where.steps)
