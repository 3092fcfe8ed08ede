"""A step of Attend-and-Excite: attnsteer against diffusers' pipeline of that name, on the configuration of SD 1.5.

    python benchmarks/speed/nursing.py --log
    python benchmarks/speed/nursing.py --steps 10 --device cuda --dtype bfloat16 --log

Every step is nursed once (no refinement), from the same noise, beside classifier-free guidance. diffusers builds the
maps of all layers and runs the whole UNet with gradient; attnsteer reads columns at one level and stops behind it.
Weights want gradients, as they do where a pipeline was loaded. Aims: at most 0.6 times the time of a nursed step, and
0.4 times the peak memory. A-STAR stands beside it: both of its losses, on the same layers.
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
import models
from measure import Ratio

from attnsteer.processors import AStar, AttendAndExcite

TOKENS = ((2,), (5,))
"""Where the subjects of "a dog and a car" stand among the text keys."""
ALWAYS = 1000
"""More steps than any schedule has."""


def excite_pipeline(pipe: Any) -> Any:
    """diffusers' pipeline of the same components."""
    from diffusers import StableDiffusionAttendAndExcitePipeline

    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    made = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = measure.parser(__doc__, repeats=5)
    models.options(parser, "sd15", steps=2, scale=0.125, size=512)
    given = parser.parse_args(arguments)
    if given.model != ["sd15"]:
        parser.error("--model: diffusers' Attend-and-Excite is a pipeline of SD 1.x: sd15.")
    return measured("sd15", given)


def cases_of(pipe: Any, size: int, steps: int) -> measure.Cases:
    side = size // 32  # of the maps at level 2
    plain = models.painter(pipe, size, steps, 7.5)
    peer = models.painter(
        excite_pipeline(pipe),
        size,
        steps,
        7.5,
        prompt=None,
        token_indices=[token for (token,) in TOKENS],
        max_iter_to_alter=ALWAYS,
        thresholds={},
        attn_res=(side, side),
    )
    nursed = AttendAndExcite(tokens=TOKENS, max_iter_to_alter=ALWAYS, thresholds={})
    return {
        "plain": plain,
        "Attend-and-Excite": models.steered(plain, pipe, nursed),
        "Attend-and-Excite of diffusers": peer,
        "A-STAR": models.steered(plain, pipe, AStar(tokens=TOKENS)),
    }


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    pipe, size, settings = models.from_options(name, given)
    ratios = []
    for case in ("Attend-and-Excite", "A-STAR"):
        ratios += [
            Ratio(case, "Attend-and-Excite of diffusers", most=0.6),
            Ratio(case, "Attend-and-Excite of diffusers", most=0.4, what="memory"),
            Ratio(case, "plain"),
        ]
    return measure.report(f"nursing-{name}", given, cases_of(pipe, size, given.steps), ratios, settings)


if __name__ == "__main__":
    main()
