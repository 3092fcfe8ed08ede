"""Where the subjects of a story are, from the cross-attention of the run itself, anew after every step.

At the cross-attention layers of one resolution every step leaves its maps ``(B, n, text keys)``, the mean over heads.
When it is over, the columns of the subject's words in each anchor picture are averaged over layers, and over the last
steps; each map is resized to the resolutions that share, and Otsu's split makes a mask of it. A subject of several
words is the union of their masks.

Cost: ``B n Nk`` float32 for each of these layers until the step is over, and one wait for the device a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .capture import probabilities
from .errors import SteeringError
from .layouts import pad
from .nursing import Groups
from .site import AttentionCall, Site
from .steps import StepEnd
from .stories import to_grid

LEVEL = 2
"""How often the latent was halved at the layers whose maps count: 32 x 32 for SDXL at 1024 px."""


def map_sites(sites: Sequence[Site]) -> list[Site]:
    """The cross-attention layers whose resolution is next to ``LEVEL`` (the finer one of two that are); all of them
    where sites have no resolution."""
    cross = [site for site in sites if site.kind == "cross"]
    levels = sorted(site.level or 0 for site in cross)
    best = min(levels, key=lambda level: abs(level - LEVEL), default=0)
    return [site for site in cross if (site.level or 0) == best]


def look(call: AttentionCall) -> None:
    """Keep the maps of the first forward of a step in ``call.state``."""
    if "map" in call.state:  # sequential passes of guidance: the conditional one comes first
        return
    if call.spans is None or call.spans.grid is None or call.spans.grid[0] != 1:
        raise SteeringError(f"{call.site.name!r} has no image grid of one frame: maps of words are for pictures.")
    call.state["map"] = probabilities(call, slice(None), slice(None)).mean(1)
    call.state["plane"] = call.spans.grid[1:]


def refresh(
    states: Mapping[Site, dict[str, Any]], end: StepEnd, words: Groups, frames: int, anchors: int, window: int
) -> None:
    """Give every sharing site the subject tokens of this step's maps: ``state["subjects"]``, see ``subject_tokens``.

    Args:
        states: of all sites; those that share left their ``grid``.
        words: groups whose union is the subject.
        frames, anchors: pictures of a story, and how many of them, from the first on, are read.
        window: how many steps count.
    """
    seen = [state for state in states.values() if "map" in state]
    if not seen:
        return
    total = torch.stack([state.pop("map") for state in seen]).mean(0)  # (B, n, text keys)
    cond = total[end.conditional(total.shape[0])]
    none = cond.new_zeros(len(words), cond.shape[1])
    maps = []
    for picture in range(len(cond)):
        if picture % frames < anchors:
            columns = end.columns(words, picture, cond.shape[2]) if end.mine[picture] else []
            maps.append(torch.stack([cond[picture][:, c].mean(-1) for c in columns]) if columns else none)
    history = seen[0].setdefault("history", [])
    history.append(torch.stack(maps))  # (anchors of all stories, words, n)
    del history[:-window]
    mean = torch.stack(history).mean(0).unflatten(-1, seen[0]["plane"]).cpu()
    sharing = [state for state in states.values() if "grid" in state]
    laid = {grid: subject_tokens(mean, grid, anchors) for grid in {state["grid"] for state in sharing}}
    for state in sharing:
        state["subjects"] = tuple(x.to(total.device) for x in laid[state["grid"]])


@torch.compiler.disable
def subject_tokens(maps: Tensor, grid: tuple[int, int, int], anchors: int) -> tuple[Tensor, Tensor]:
    """Subject tokens of maps ``(sets * anchors, words, h, w)`` on a grid: which tokens, and which entries are real,
    both ``(sets, anchors, m)``."""
    masks = to_grid(maps.flatten(0, 1), grid).unflatten(0, maps.shape[:2]).any(1)
    tokens, real = pad([mask.nonzero().flatten() for mask in masks])
    return tokens.unflatten(0, (-1, anchors)), real.unflatten(0, (-1, anchors))
