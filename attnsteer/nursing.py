"""Nursing the latent: a loss on the attention maps of words, and how the latent goes down its slope before each step.

All methods of this kind (generative semantic nursing) share one loop, that of Attend-and-Excite::

    at step i:   L = loss(maps(z));   while the step refines and a subject is too weak:  z <- z - s_i dL/dz
                 z <- z - s_i dL/dz   while i < stop;      then the ordinary prediction on the new z

A method gives a ``Nursing``: which words, which loss, how long the steps. What a loss sees are ``TokenMaps`` of one
picture; the hosts find the words in the prompt, take the maps from a gradient pass and move the latent.

The scheduler must go on from the latent it is given. PNDM (the usual one of SD 1.x) does not in its second step, whose
update is lost; schedulers that lose more of them are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .errors import SteeringError
from .logits import compute_dtype
from .site import Site
from .where import Where

Word: TypeAlias = str | tuple[int, ...]
"""A word or phrase of the prompt, or the positions of its tokens."""
Groups: TypeAlias = tuple[tuple[Word, ...], ...]
"""Each group is one subject: its words."""


@dataclass(frozen=True)
class Moment:
    """The step in progress: position, length of the schedule, and the scheduler's timestep."""

    index: int
    total: int
    timestep: float = 0.0


@dataclass(frozen=True, eq=False)
class LevelMaps:
    """Maps of n tokens, ``(n, h, w)``: the mean over ``count`` pairs of layer and head."""

    mean: Tensor
    count: int


@dataclass(frozen=True, eq=False)
class TokenMaps:
    """Where in one picture the tokens of its prompt are looked at from, for the tokens of one text encoder.

    Attributes:
        levels: maps by level (how often the latent was halved; None in transformers), with gradient.
        groups: for each group, for each word, the positions of its pieces among the n tokens.
        rest: positions of the other words of the prompt, without special tokens; None where the pipeline got
            embeddings, so that the n tokens are those of the groups alone.
    """

    levels: Mapping[int | None, LevelMaps]
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    rest: tuple[int, ...] | None = ()

    @property
    def maps(self) -> Tensor:
        """``(n, h, w)``, the mean over every layer and head that was read.

        Raises:
            SteeringError: the layers have maps of different sizes.
        """
        sizes = {tuple(level.mean.shape[1:]) for level in self.levels.values()}
        if len(sizes) > 1:
            found = ", ".join(f"{h} x {w}" for h, w in sorted(sizes))
            raise SteeringError(f"The selected layers have maps of different sizes ({found}): choose layers of one.")
        return weighted_mean(list(self.levels.values()))

    def other_words(self) -> tuple[int, ...]:
        """``rest``, for losses that need all words of the prompt.

        Raises:
            SteeringError: which these are is not known.
        """
        if self.rest is None:
            raise SteeringError(
                "This loss compares the subjects with the other words of the prompt, and embeddings do not say which "
                "text keys these are: give the prompt as text, or for a UNet padding=True where the method has it."
            )
        return self.rest


def weighted_mean(parts: Sequence[LevelMaps]) -> Tensor:
    """The mean over every layer and head of several levels."""
    first, *rest = (part.mean * part.count for part in parts)
    return sum(rest, start=first) / sum(part.count for part in parts)


class Slope(NamedTuple):
    """What a loss says about one picture.

    Attributes:
        loss: scalar with gradient; where it is exactly 0 the latent stays.
        presence: scalar; refinement goes on while it is below the threshold of the step. None: it always goes on.
        memory: what the loss wants to find again in the next step (detached).
    """

    loss: Tensor
    presence: Tensor | None = None
    memory: Any = None


LossFunction: TypeAlias = Callable[[Sequence[TokenMaps], Any, Moment], Slope]
"""``loss(maps of every text encoder, memory of the last step or None, moment)``, for one picture."""


@dataclass(frozen=True, eq=False)
class Nursing:
    """What a method wants of the latent.

    Attributes:
        groups: the subjects, each a tuple of words.
        loss: see ``LossFunction``; called for each picture, never for a mean of them.
        step_size: length of a step along the gradient of the raw loss.
        stop: no update from this position on (refinement apart).
        refine: position -> threshold of ``Slope.presence``.
        rounds: most updates of one refinement.
        padding: a UNet's maps hold all tokens but the first and the last, with the end and the padding of the prompt;
            else only those of its words. Joint attention gives the words alone. Of embeddings the words are not known
            (``TokenMaps.rest``).
        velocity: instead of moving the latent, add this multiple of the gradient to the predicted velocity.
        level, finer: which layers are read where the user leaves it open, see ``map_layers``; None: all selected ones.
        redirect: what a picture's move in a step, refinement and update together, is replaced by; for controls.
    """

    groups: Groups
    loss: LossFunction
    step_size: Callable[[Moment], float]
    stop: float = math.inf
    refine: Mapping[int, float] = field(default_factory=dict)
    rounds: Callable[[int], int] = lambda index: 20
    padding: bool = True
    velocity: Callable[[Moment], float] | None = None
    level: int | None = None
    finer: bool = False
    redirect: Callable[[Tensor, Moment], Tensor] | None = None

    def acts(self, moment: Moment) -> bool:
        return moment.index < self.stop or moment.index in self.refine


# ---- the loop --------------------------------------------------------------------------------------------------------
Evaluate: TypeAlias = Callable[[Tensor, Sequence[int]], tuple[list[Slope], Tensor]]
"""``evaluate(latents of these rows, rows) -> (slopes, gradients)``; both of the given rows alone."""


def descend(latent: Tensor, jobs: Sequence[Nursing], evaluate: Evaluate, moment: Moment) -> tuple[Tensor, list[Slope]]:
    """One step of every row: refinement as long as the row needs it, then the update. Rows do not see each other.

    Args:
        latent: ``(R, ...)``.
        jobs: what moves each row.

    Returns:
        The new latents and the slopes of the last gradient pass of each row.
    """
    rows = list(range(len(jobs)))
    start = latent
    slopes, gradient = evaluate(latent, rows)
    lagging = [r for r in rows if _lags(slopes[r], jobs[r], moment)]
    done = 0
    while lagging:
        measured = list(slopes)
        latent = _move(latent, gradient, slopes, jobs, lagging, moment)
        found, fresh = evaluate(latent[lagging], lagging)
        for r, slope in zip(lagging, found, strict=True):
            slopes[r] = slope
        gradient = gradient.index_copy(0, torch.tensor(lagging, device=gradient.device), fresh)
        done += 1
        # the published loop looks at what it measured before the update
        lagging = [r for r in lagging if done < jobs[r].rounds(moment.index) and _lags(measured[r], jobs[r], moment)]
    last = [r for r in rows if moment.index < jobs[r].stop and jobs[r].velocity is None]
    return redirected(start, _move(latent, gradient, slopes, jobs, last, moment), jobs, moment), slopes


def redirected(start: Tensor, end: Tensor, jobs: Sequence[Nursing], moment: Moment) -> Tensor:
    """Where rows end whose job redirects the move from ``start`` to ``end``; the others end where they do."""
    if not any(job.redirect for job in jobs):
        return end
    wide = compute_dtype(start)
    moves = zip(start.to(wide), end.to(wide), jobs, strict=True)
    turned = [a + job.redirect(b - a, moment) if job.redirect else b for a, b, job in moves]
    return torch.stack(turned).to(end.dtype)


def _lags(slope: Slope, job: Nursing, moment: Moment) -> bool:
    if job.velocity is not None or moment.index not in job.refine or job.rounds(moment.index) < 1:
        return False
    if float(slope.loss) == 0:  # it would stay where it is
        return False
    return slope.presence is None or float(slope.presence) < job.refine[moment.index]


def _move(
    latent: Tensor, gradient: Tensor, slopes: Sequence[Slope], jobs: Sequence[Nursing], rows: Sequence[int], at: Moment
) -> Tensor:
    """``z - s dL/dz`` in the chosen rows whose loss is not 0; the others keep their bits."""
    wide = compute_dtype(latent)
    sizes = [job.step_size(at) if r in rows and float(slopes[r].loss) != 0 else 0.0 for r, job in enumerate(jobs)]
    if not any(sizes):
        return latent
    size = torch.tensor(sizes, dtype=wide, device=latent.device).view(-1, *[1] * (latent.dim() - 1))
    moved = (latent.to(wide) - size * gradient.to(wide)).to(latent.dtype)
    return torch.where(size != 0, moved, latent)


# ---- what methods share ----------------------------------------------------------------------------------------------
def root_decay(size: float, bounds: tuple[float, float]) -> Callable[[Moment], float]:
    """``size * sqrt(linspace(start, stop, total)[index])``: Attend-and-Excite's step, 20 to 14.14 by default."""
    start, stop = bounds
    return lambda at: size * math.sqrt(start + (stop - start) * (at.index / max(1, at.total - 1)))


def map_layers(where: Where, sites: Sequence[Site], level: int, finer: bool = False) -> Where:
    """The layers that a method reads by default; an explicit choice of layers or of heads by layer stays as it is.

    UNets: cross-attention at the level (2 is 16 x 16 for SD 1.x at 512 pixels, 32 x 32 for SDXL at 1024), with
    ``finer`` also at all levels above. Joint attention: the middle third of the layers.

    Raises:
        SteeringError: a UNet without cross-attention at that level; says which levels it has.
    """
    if where.layers != "all" or isinstance(where.heads, Mapping):
        return where
    joint = sorted({site.layer for site in sites if site.kind == "joint"})
    if joint:
        middle = joint[len(joint) // 3 : max(len(joint) // 3 + 1, 2 * len(joint) // 3)]
        return replace(where, layers=middle)
    cross = [site for site in sites if site.kind == "cross"]
    if not cross or cross[0].level is None:
        return where
    levels = sorted({site.level for site in cross if site.level is not None})
    if level not in levels:
        raise SteeringError(
            f"level={level}: this UNet has no cross-attention where the latent is halved {level} times; its levels "
            f"are {', '.join(map(str, levels))}. Give one of these, or where=Where(layers=...)."
        )
    chosen = [s.name for s in cross if s.level == level or (finer and s.level is not None and s.level < level)]
    return replace(where, layers=chosen)


def subject_entries(
    views: Sequence[TokenMaps],
    prepare: Callable[[Tensor], Tensor],
    read: Callable[[TokenMaps], Tensor] | None = None,
    apart: bool = False,
) -> list[list[list[Tensor]]]:
    """Group -> word -> its maps after ``prepare``, which gets all tokens of an encoder, ``(n, h, w)``.

    One text encoder: a map for each piece of the word. Several: their tokens differ, so each gives the mean of its
    pieces, and these are averaged to one map.

    Args:
        apart: ``prepare`` treats each token by itself, so that the other words of the prompt need not be known.
    """
    if not apart:
        for view in views:
            view.other_words()  # says where they are not known
    prepared = [prepare(read(view) if read else view.maps) for view in views]
    if len(views) == 1:
        return [[[prepared[0][i] for i in word] for word in group] for group in views[0].groups]
    found = []
    for g, group in enumerate(views[0].groups):
        means = [
            [m[list(view.groups[g][w])].mean(dim=0) for m, view in zip(prepared, views, strict=True)]
            for w in range(len(group))
        ]
        found.append([[mean_map(mean)] for mean in means])
    return found


def mean_map(entries: Sequence[Tensor]) -> Tensor:
    """The mean of the pieces of a word."""
    return torch.stack(list(entries)).mean(dim=0)


def word_groups(owner: Any, phrases: bool = False) -> Groups:
    """The groups of a processor from its ``subjects`` (words to be found) or its ``tokens`` (positions).

    Args:
        phrases: a subject is several words: strings are split at spaces, and each entry of ``tokens`` holds one token
            for each word. Else a subject is one word or phrase, and its tokens are pieces of it.

    Raises:
        SteeringError: neither or both, or something that is no word or no position.
    """
    name, subjects, tokens = type(owner).__name__, owner.subjects, owner.tokens
    if bool(subjects) == bool(tokens):
        raise SteeringError(
            f'{name} needs the words that it shall care for: subjects=("dog", "car"), or their positions: '
            "tokens=((2,), (5,)); one of both."
        )
    if isinstance(subjects, str):
        raise SteeringError(f"{name}(subjects={subjects!r}) is one string: give a tuple of words.")
    if tokens:
        for entry in tokens:
            if isinstance(entry, int) or not entry or not all(type(i) is int and i >= 0 for i in entry):
                raise SteeringError(f"{name}(tokens={tokens!r}): give a tuple of positions from 0 for each subject.")
        return tuple(tuple((i,) for i in entry) if phrases else (tuple(entry),) for entry in tokens)
    groups = tuple(
        (tuple(entry.split()) if phrases else (entry,)) if isinstance(entry, str) else tuple(entry)
        for entry in subjects
    )
    if not all(group and all(isinstance(word, str) and word.strip() for word in group) for group in groups):
        raise SteeringError(f"{name}(subjects={subjects!r}): give at least one word for each subject.")
    return groups
