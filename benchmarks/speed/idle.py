"""What it costs to have something attached that does nothing: pipelines, attached and plain.

    python benchmarks/speed/idle.py --log
    python benchmarks/speed/idle.py --model sd15 sdxl sd3 flux --steps 20 --device cuda --dtype bfloat16 --log

Two ways of doing nothing: strength 0, and steps that never come (a window of noise levels that no schedule has).
Aim: at most 1.02 times the plain pipeline on a CPU, 1.01 on a GPU, while attached; attaching and detaching for each
picture is told beside it. The embedded models are the hardest case: a step of
theirs takes a few milliseconds, so every microsecond of Python shows.
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
import models
from measure import Parts, Ratio

from attnsteer import Where
from attnsteer.processors import SoftPAG

NEVER = Where(steps={"sigma": (1e6, 1e7)})


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, repeats=31)
    models.options(parser, "world-sd world-sd3 world-flux", steps=10)
    given = parser.parse_args(arguments)
    return [measured(name, given) for name in given.model]


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    pipe, size, settings = models.from_options(name, given)
    plain = models.painter(pipe, size, given.steps)

    def between() -> Parts:
        """A picture, timed without the attaching around it."""
        return Parts(attached=measure.clock(plain, given.device)[0])

    cases = {
        "plain": plain,
        "strength 0": models.steered(between, pipe, SoftPAG(strength=0.0)),
        "steps that never come": models.steered(between, pipe, SoftPAG(NEVER)),
    }
    most = 1.01 if given.device == "cuda" else 1.02
    idle = list(cases)[1:]
    ratios = [Ratio(f"{case}: attached", "plain", most=most) for case in idle]
    ratios += [Ratio(case, "plain") for case in idle]
    return measure.report(f"idle-{name}", given, cases, ratios, settings)


if __name__ == "__main__":
    main()
