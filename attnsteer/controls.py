"""Controls: what a disturbance as strong as a method does without the method's idea.

A method helps only if it helps more than its control on the same prompts and seeds::

    Astray(method=AttendAndExcite(subjects=("dog", "car")))    the latent moves as far, in a random direction
    random_heads(where, sites, seed=0)                         as many other heads, drawn at random
    all_heads(where, sites)                                    every head of the chosen layers
    Elsewhere(method=VHR(), heads="random")                    the same where a method chooses its heads itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .edits import Edit, Reaction, Scale, Segments
from .errors import SteeringError
from .nursing import Moment, Nursing
from .processor import Processor, check_choice
from .site import AttentionCall, Kind, Site
from .where import Where


def shuffled(move: Tensor, seed: int, step: int) -> Tensor:
    """The move with its elements in a random order, the same for every picture: equal norm, another direction."""
    order = np.random.default_rng((seed, step)).permutation(move.numel())
    return move.flatten()[torch.as_tensor(order, device=move.device)].view_as(move)


@dataclass(frozen=True)
class Astray(Processor):
    """A method that moves the latent, its moves shuffled: in every step as far, in a random direction.

    The method descends as it would, with all its refinement; then the latent goes as far elsewhere. So later steps may
    find more to mend than with the method.

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

    def _redirect(self, move: Tensor, moment: Moment) -> Tensor:
        return shuffled(move, self.seed, moment.index)


HEADS = ("random", "all", "rest")
_OWN = ("where", "where_for", "plan", "react", "to_dict", "save_pretrained", "from_pretrained")


@dataclass(frozen=True)
class Elsewhere(Processor):
    """A method whose edit acts on other heads than those that it chose, as strongly.

    ``heads``: ``"random"`` deals the strengths of each layer to its heads in a random order, the same in every call;
    ``"all"`` gives every head the mean strength of the chosen ones; ``"rest"`` gives it to the heads that were not
    chosen, and nothing to those that were. A row in which nothing was chosen stays plain, and a method that treats all
    heads alike is its own control.

    Args:
        method: a processor whose edits have a strength for each head.
        heads: which heads get it.
        seed: of the order of heads; each site has another.

    Raises:
        SteeringError: a method that moves the latent (use ``Astray``), or a ``where`` beside that of the method.
    """

    method: Processor | None = None
    heads: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "heads", HEADS)
        if self.method is None or not edits_heads(self.method):
            name = type(self.method).__name__
            raise SteeringError(f"Elsewhere(method=...) needs a method that edits heads; {name} does not.")
        if self.where != Where():
            raise SteeringError("Elsewhere acts in the layers of its method: give the method a where, and it none.")

    def __getattribute__(self, name: str) -> Any:
        """Whatever the engine asks a processor is asked of the method, except for what is defined below."""
        if name in _OWN or name.startswith("_") or not hasattr(Processor, name):
            return object.__getattribute__(self, name)
        return getattr(self.method, name)

    @property
    def _inner(self) -> Processor:
        assert self.method is not None
        return self.method

    def where_for(self, sites: Sequence[Site]) -> Where:
        where = self._inner.where_for(sites)
        if where.heads != "all" and type(self._inner).react is not Processor.react:
            raise SteeringError(
                f"{type(self._inner).__name__} is held to heads={where.heads!r}, so that it cannot act on others: "
                "give it all heads, or draw its where with random_heads(where, sites)."
            )
        return where

    def plan(self, site: Site, heads: tuple[int, ...]) -> Edit | None:
        edit = self._inner.plan(site, heads)
        return None if edit is None else self._moved(edit, site)

    def react(self, call: AttentionCall) -> Reaction:
        reaction = self._inner.react(call)
        if reaction is None:
            return None
        edits = reaction if isinstance(reaction, tuple) else (reaction,)
        return tuple(self._moved(edit, call.site) for edit in edits)

    def _moved(self, edit: Edit, site: Site) -> Edit:
        names = ("weight",) if isinstance(edit, Segments) else ("weight", "bias", "heads")
        by_head = {name: found for name in names if isinstance(found := getattr(edit, name, None), Tensor)}
        neutral = 1.0 if isinstance(edit, Scale) else 0.0
        moved = {
            name: self._dealt(tensor, neutral, site)
            for name, tensor in by_head.items()
            if tensor.shape[1] == site.heads  # else one value for all heads: there are no others
        }
        return replace(edit, **moved)  # type: ignore[arg-type]

    def _dealt(self, strength: Tensor, neutral: float, site: Site) -> Tensor:
        if self.heads == "random":
            order = np.random.default_rng((self.seed, site.index)).permutation(site.heads)
            return strength[:, torch.as_tensor(order, device=strength.device)]
        return spread(strength, neutral, rest=self.heads == "rest")


def edits_heads(method: Processor) -> bool:
    """Whether a method edits attention, so that it has heads; latent updates and contrasts of predictions do not."""
    kind = type(method)
    asked = kind.plan is not Processor.plan or kind.react is not Processor.react
    return asked and not method.reads_only and method.nursing() is None


def spread(strength: Tensor, neutral: float, rest: bool) -> Tensor:
    """The mean strength of the chosen heads on all heads, or on those that were not chosen.

    Args:
        strength: ``(R, H, ...)``; a head is chosen where it is not ``neutral``, for each key or query by itself.
        neutral: the strength that leaves a head alone.
        rest: leave out the heads that were chosen.
    Returns:
        the same shape and dtype.
    """
    chosen = strength != neutral
    count = chosen.sum(1, keepdim=True)
    total = torch.where(chosen, strength.double(), 0.0).sum(1, keepdim=True)
    wanted = (~chosen if rest else torch.ones_like(chosen)) & (count > 0)
    return torch.where(wanted, total / count.clamp(min=1), neutral).to(strength.dtype)


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
