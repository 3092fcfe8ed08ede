"""One round of HeadHunter on SD3: candidates as rows of forked batches, and one at a time.

    python benchmarks/speed/search.py --log
    python benchmarks/speed/search.py --model sd3 --size 512 --steps 20 --device cuda --dtype bfloat16 --log

Candidates are single heads of layers from the first to the last, each with one picture, without classifier-free
guidance. One at a time, unforked, is measured twice: with attnsteer itself, and as diffusers' PAG pipeline does it, the
conditional and the perturbed row in one batch, whole layers in place of heads. The objective costs nothing, and the
autoencoder next to nothing. Aim: at least twice as many pictures a second on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import measure
import models
import torch
from guidance import pag_pipeline, without_fork
from measure import Ratio

import attnsteer
from attnsteer import Where
from attnsteer.search import HeadHunter

PROMPT = "a dog and a car"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, repeats=3)
    models.options(parser, "world-sd3 sd3", steps=2, scale=0.125, size=256)
    parser.add_argument("--candidates", type=int, default=12, help="heads that are tried (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=12, help="rows of a batch (default: %(default)s)")
    given = parser.parse_args(arguments)
    if not all("sd3" in name for name in given.model):
        parser.error("--model: sd3 or world-sd3, for which diffusers has a PAG pipeline.")
    return [measured(name, given) for name in given.model]


def candidates(pipe: Any, count: int) -> list[int]:
    """The layers of the candidates, spread over the model; several heads of one layer where it has fewer layers."""
    layers = 1 + max(site.layer for site in attnsteer.sites(pipe))
    return [i * layers // count for i in range(count)]


def hunt(pipe: Any, layers: list[int], batch: int, steps: int, call: dict[str, Any]) -> Callable[[], Any]:
    """A round of a search that adds one head."""
    heads: dict[int | str, list[int]] = {layer: list(range(layers.count(layer))) for layer in layers}

    def run() -> Any:
        hunter = HeadHunter(
            pipe,
            lambda images, prompts: [0.0] * len(images),
            [(PROMPT, 0)],
            k=1,
            rounds=1,
            steps=steps,
            batch=batch,
            where=Where(heads=heads),
            call=call,
        )
        return hunter.run()

    return run


def one_at_a_time(pipe: Any, layers: list[int], size: int, steps: int) -> Callable[[], list[Any]]:
    """diffusers' pipeline, one layer after the other."""
    pag = pag_pipeline(pipe, "blocks.0")
    call = {**models.arguments(pipe, size, steps), "prompt": PROMPT, "pag_scale": 3.0}
    processors = pag._pag_attn_processors

    def run() -> list[Any]:
        pictures = []
        for layer in layers:
            pag.set_pag_applied_layers(f"blocks.{layer}", processors)
            pictures += pag(generator=torch.Generator().manual_seed(0), **call).images
        return pictures

    return run


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    pipe, size, settings = models.from_options(name, given)
    layers = candidates(pipe, given.candidates)
    call = {k: v for k, v in models.arguments(pipe, size, given.steps).items() if k != "num_inference_steps"}
    cases = {
        "in forked batches": hunt(pipe, layers, given.batch, given.steps, call),
        "one at a time, unforked": without_fork(hunt(pipe, layers, 1, given.steps, call)),
        "one at a time, diffusers' PAG": one_at_a_time(pipe, layers, size, given.steps),
    }
    least = 2.0 if given.device == "cuda" else None
    ratios = [Ratio(case, "in forked batches", least=least) for case in list(cases)[1:]]
    settings |= {"candidates": given.candidates, "batch": given.batch}
    return measure.report(f"search-{name}", given, cases, ratios, settings)


if __name__ == "__main__":
    main()
