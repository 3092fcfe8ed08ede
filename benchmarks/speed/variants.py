"""Eight variants of one prompt: as rows of one batch, and one after the other.

    python benchmarks/speed/variants.py --log
    python benchmarks/speed/variants.py --model sd15 sdxl sd3 --size 512 --steps 10 --device cuda --dtype bfloat16 --log

SoftPAG of eight strengths in the middle layer, the same prompt and noise, without classifier-free guidance: each
picture is one conditional and one perturbed row, forked at the layer. Both ways run ``attnsteer.run_variants``, with
one call of the pipeline for all or one for each. Aim: at least 4 times the throughput on a GPU at 512 pixels, where a
single row leaves it idle; on a CPU at least as fast.
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
import models
from guidance import middle
from measure import Ratio

import attnsteer
from attnsteer.processors import SoftPAG

PROMPT = "a dog and a car"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, repeats=5)
    models.options(parser, "world-sd world-sd3 sd15", steps=4, scale=0.125, size=256)
    parser.add_argument("--count", type=int, default=8, help="variants (default: %(default)s)")
    given = parser.parse_args(arguments)
    return [measured(name, given) for name in given.model]


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    pipe, size, settings = models.from_options(name, given)
    where, _ = middle(pipe)
    wanted = [SoftPAG(where, strength=(i + 1) / given.count) for i in range(given.count)]
    call = {**models.arguments(pipe, size, given.steps), "output_type": "latent"}

    def run(batch: int) -> list[Any]:
        found = attnsteer.run_variants(pipe, PROMPT, variants=wanted, batch_size=batch, **call)
        return [picture for _, _, picture in found]

    cases = {"one by one": lambda: run(1), "in one batch": lambda: run(given.count)}
    least = 4.0 if given.device == "cuda" else 1.0
    ratios = [Ratio("one by one", "in one batch", least=least), Ratio("in one batch", "one by one", what="memory")]
    return measure.report(f"variants-{name}", given, cases, ratios, {**settings, "variants": given.count})


if __name__ == "__main__":
    main()
