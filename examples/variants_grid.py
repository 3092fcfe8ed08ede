"""Which layer, which strength: every combination as rows of shared batches, on one sheet.

python examples/variants_grid.py
python examples/variants_grid.py --layers 0 2 4 --strengths 0.25 0.5 1 --batch-size 6
python examples/variants_grid.py --model stabilityai/stable-diffusion-3-medium-diffusers --layers 7 8 9 10 \\
    --prompt "a photo of a dog in a sports car" --num-steps 28 --batch-size 4 --device cuda
"""

from __future__ import annotations

import time

from common import load, options, show

from attnsteer import Variant, Where, run_variants
from attnsteer.processors import SoftPAG


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd3", "a cat and a pizza on a green background")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, help="pictures at a time (default: all variants of a seed)")
    parser.set_defaults(num_seeds=1)
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    variants = [
        Variant((SoftPAG(Where(layers=layer), strength=u, scale=given.scale),), f"u = {u:g}")
        for u in given.strengths
        for layer in given.layers
    ]
    seeds, size = range(given.seed, given.seed + given.num_seeds), given.batch_size
    start = time.perf_counter()
    rows: dict[str, list] = {}
    for variant, seed, picture in run_variants(
        pipe, given.prompt, variants=variants, seeds=seeds, batch_size=size, progress=True, **call
    ):
        rows.setdefault(f"{variant.name}, seed {seed}", []).append(picture)
    print(f"{len(variants) * len(seeds)} pictures in {time.perf_counter() - start:.1f} s")
    show(given, rows, [f"layer {layer}" for layer in given.layers])


if __name__ == "__main__":
    main()
