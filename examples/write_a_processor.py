"""A processor of your own in 20 lines, on a diffusion model and on a vision-language model.

It turns the chosen heads toward the plain mean of all values: attention that looks everywhere alike. Heads that only
spread averages lose nothing by it; a picture or an answer that changes shows a head that was looking somewhere.

python examples/write_a_processor.py --layer 3 --heads 0 1
python examples/write_a_processor.py --model stabilityai/stable-diffusion-3-medium-diffusers --layer 12 --device cuda
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import compare, load, options

import attnsteer
from attnsteer import Mix, Processor, Site, Where
from attnsteer.cli import models
from attnsteer.cli.generate import answer
from attnsteer.edits import MeanValue
from attnsteer.world import sampling


@dataclass(frozen=True)
class LookEverywhere(Processor):
    """``output = lerp(output, mean of the visible values, strength)`` in the chosen heads."""

    strength: float = 1.0
    token_agnostic = True  # nothing here asks which token is text and which is image

    @property
    def inert(self) -> bool:
        return self.strength == 0

    def plan(self, site: Site, heads: tuple[int, ...]) -> Mix:
        weight = torch.zeros(1, site.heads)  # one row for all rows of the batch
        weight[:, list(heads)] = self.strength
        return Mix(MeanValue(), weight)


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd3", "a dog on a blue background")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--heads", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--strength", type=float, default=1.0)
    given = parser.parse_args(arguments)
    processor = LookEverywhere(Where(layers=given.layer, heads=given.heads), strength=given.strength)

    pipe, call = load(given)
    print(attnsteer.explain(pipe, processor))
    compare(given, pipe, call, {"steered": processor})

    model, hf_processor = models.load("world-llava", given.device, given.dtype)
    scene = sampling.sample(given.seed).image()
    for name, processors in (("plain", []), ("steered", [processor])):
        print(f"{name}: {answer(model, hf_processor, scene, 'Describe the image.', processors, 40)}")


if __name__ == "__main__":
    main()
