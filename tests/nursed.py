"""What the tests of latent updates share: token maps by hand, and tiny pipelines with words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnsteer.nursing import LevelMaps, Moment, TokenMaps
from attnsteer.processors import AStar
from tests.test_maps import smoothed
from tests.tiny import pipelines

Groups = tuple[tuple[tuple[int, ...], ...], ...]
NOW = Moment(3, 50)
WORDS = ("dog", "red car")
PROMPTS = ("a dog and a red car", "the red car and a zebra dog", "a blue dog on a red red car")


def view(maps: Tensor, groups: Groups, rest: tuple[int, ...] = (), **levels: Tensor) -> TokenMaps:
    """Maps ``(n, h, w)`` at level 2, and further levels as ``l1=..., l0=...`` of one pair of layer and head each."""
    found: dict[int | None, LevelMaps] = {2: LevelMaps(maps, 1)}
    found |= {int(name[1:]): LevelMaps(m, 1) for name, m in levels.items()}
    return TokenMaps(found, groups, rest)


def prepared(maps: Tensor) -> list[Tensor]:
    """Softmax over tokens and smoothing, pixel by pixel."""
    n, h, w = maps.shape
    out = torch.zeros_like(maps)
    for i in range(h):
        for j in range(w):
            exponents = [torch.exp(100 * maps[t, i, j]) for t in range(n)]
            for t in range(n):
                out[t, i, j] = exponents[t] / sum(exponents)
    return [smoothed(m) for m in out]


def random_maps(n: int = 6, h: int = 4, w: int = 5, seed: int = 1) -> Tensor:
    """Raw probabilities: small, of different size."""
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.rand(n, h, w, generator=generator, dtype=torch.float64) ** 2


def generate(pipe: Any, name: str, prompts: Sequence[str] | str = PROMPTS[:2], **options: Any) -> Tensor:
    """The latents of a call with these prompts, seeds 0, 1, ... (or ``seeds=``)."""
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = options.pop("seeds", range(len(listed)))
    steps, cfg = options.pop("steps", 2), options.pop("cfg", True)
    kwargs = pipelines.call_kwargs(name, len(listed), cfg, steps)
    kwargs |= {"prompt": listed, "generator": [torch.Generator().manual_seed(s) for s in seeds]}
    kwargs |= {"output_type": "latent", **options}
    return pipe(**kwargs, return_dict=False)[0]


LEVEL = {"sd15": 0, "sdxl": 1, "sd3": 0, "sd35": 0, "flux": 0}
"""Where the tiny models have cross-attention; without a meaning for transformers."""


def astar(name: str, **given: Any) -> AStar:
    """A-STAR with a step that can be seen."""
    return AStar(**{"subjects": ("dog", "car"), "level": LEVEL[name], "scale_factor": 2.0, **given})
