"""A processor of your own in 20 lines, on a diffusion model and on a vision-language model.

It turns the chosen heads toward the plain mean of all values: attention that looks everywhere alike. Heads that only
spread averages lose nothing by it; a picture or an answer that changes shows a head that was looking somewhere.

    python examples/write_a_processor.py --layer 3 --heads 0 1
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

import attnsteer
from attnsteer import Mix, Processor, Site, Where
from attnsteer.cli.generate import answer
from attnsteer.cli.models import load
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--heads", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/write_a_processor.png"))
    given = parser.parse_args(arguments)
    processor = LookEverywhere(Where(layers=given.layer, heads=given.heads), strength=given.strength)

    pipe, _ = load("world-sd3", "cpu", "float32")
    with attnsteer.steer(pipe, processor) as steering:
        print(steering.explain())
        generator = torch.Generator().manual_seed(given.seed)
        picture = pipe("a dog on a blue background", generator=generator, num_inference_steps=given.num_steps).images[0]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(given.out)
    print(given.out)

    model, hf_processor = load("world-llava", "cpu", "float32")
    scene = sampling.sample(given.seed).image()
    for name, processors in (("plain", []), ("steered", [processor])):
        print(f"{name}: {answer(model, hf_processor, scene, 'Describe the image.', processors, 40)}")


if __name__ == "__main__":
    main()
