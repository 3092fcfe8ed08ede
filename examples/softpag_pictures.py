"""Pictures of one prompt with and without SoftPAG, side by side, for several strengths.

python examples/softpag_pictures.py
python examples/softpag_pictures.py --model stabilityai/stable-diffusion-3-medium-diffusers --layers 9 --device cuda
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attnsteer import Where, run_variants
from attnsteer.cli.models import load
from attnsteer.cli.sheet import picture_sheet
from attnsteer.processors import SoftPAG


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="world-sd3", help="embedded model, folder or hub id")
    parser.add_argument("--prompt", default="a dog and a car on a blue background")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--num-seeds", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("outputs/softpag_pictures.png"))
    given = parser.parse_args(arguments)

    pipe, _ = load(given.model, given.device, given.dtype)
    where = Where(layers=given.layers)
    variants = [None, *(SoftPAG(where, strength=u, scale=given.scale) for u in given.strengths)]
    seeds = range(given.seed, given.seed + given.num_seeds)
    # Row by row the same noise: what differs is the steering alone.
    results = run_variants(
        pipe, given.prompt, variants=variants, seeds=seeds, num_inference_steps=given.num_steps, progress=True
    )
    pictures = [result.image for result in results]
    rows = [pictures[number :: len(variants)] for number in range(len(variants))]
    labels = ["plain", *(f"SoftPAG, strength {u:g}" for u in given.strengths)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    picture_sheet(rows, [f"seed {seed}" for seed in seeds], labels).save(given.out)
    print(given.out)


if __name__ == "__main__":
    main()
