"""Heat maps of four words: attnsteer's running means, and full maps that are stored.

    python benchmarks/speed/maps.py --log
    python benchmarks/speed/maps.py --model sd3 --device cuda --dtype bfloat16 --log

``attnsteer.heat_maps`` reads the columns of the words and keeps their means. The peer is what one writes first: every
chosen layer computes its map and keeps it, all heads, all tokens, for each step. Both are measured with a quarter of
the layers and a fifth of the steps, and with more of either. Aim: memory independent of the number of layers and steps
(3 %). Pictures are decoded, by a tiny autoencoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import measure
import models
import torch
from measure import Ratio
from torch import Tensor
from torch.nn import functional as F

import attnsteer
from attnsteer import Where

PROMPT, WORDS = "a red dog and a blue car", ["red", "dog", "blue", "car"]


@contextmanager
def storing(modules: list[torch.nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, these attention modules build their maps, which are kept."""
    kept: list[Tensor] = []
    inside: list[torch.nn.Module] = []
    fused = F.scaled_dot_product_attention

    def by_map(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if not inside:
            return fused(query, key, value, **options)
        kept.append((query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1))
        return kept[-1] @ value

    hooks = [module.register_forward_pre_hook(lambda module, _: inside.append(module)) for module in modules]
    hooks += [module.register_forward_hook(lambda *_: inside.clear()) for module in modules]
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", by_map):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, repeats=3)
    models.options(parser, "sd3", steps=20, scale=0.125, size=256)
    given = parser.parse_args(arguments)
    if not all("sd3" in name for name in given.model):
        parser.error("--model: sd3 or world-sd3.")
    return [measured(name, given) for name in given.model]


def runs(pipe: Any, size: int) -> dict[str, Callable[[int, int], Any]]:
    """Ways to run ``(layers, steps)``."""

    def call(steps: int) -> dict[str, Any]:
        return {**models.arguments(pipe, size, steps), "generator": torch.Generator().manual_seed(0)}

    def words(layers: int, steps: int) -> Any:
        return attnsteer.heat_maps(pipe, PROMPT, WORDS, where=Where(layers=range(layers)), **call(steps))

    def full(layers: int, steps: int) -> Any:
        with storing([block.attn for block in pipe.transformer.transformer_blocks[:layers]]) as kept:
            pipe(PROMPT, **call(steps))
            return kept

    return {"plain": lambda layers, steps: pipe(PROMPT, **call(steps)), "words": words, "full maps": full}


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    pipe, size, settings = models.from_options(name, given)
    ways, layers, steps = runs(pipe, size), len(pipe.transformer.transformer_blocks), given.steps
    few, short = max(1, layers // 4), max(1, steps // 5)
    cases: dict[str, Callable[[], Any]] = {}

    def case(way: str, layers: int, steps: int) -> str:
        label = f"{way}, {layers} layers, {steps} steps" if way != "plain" else f"plain, {steps} steps"
        cases[label] = lambda: ways[way](layers, steps)
        return label

    base, more, longer = (case("words", *shape) for shape in ((few, short), (layers, short), (few, steps)))
    stored = case("full maps", few, short)
    twice = case("full maps", 2 * few, short), case("full maps", few, 2 * short)
    ratios = [
        *(Ratio(big, base, most=1.03, what="memory") for big in (more, longer)),
        *(Ratio(big, stored, what="memory") for big in twice),
        Ratio(base, stored, what="memory"),
        Ratio(base, stored),
        *(Ratio(one, case("plain", 0, short)) for one in (base, more)),
    ]
    return measure.report(f"maps-{name}", given, cases, ratios, {**settings, "words": len(WORDS)})


if __name__ == "__main__":
    main()
