"""Which layer, which strength: every combination as rows of shared batches, on one sheet.

python examples/variants_grid.py
python examples/variants_grid.py --layers 0 2 4 6 --strengths 0.25 0.5 1 --batch-size 6
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from attnsteer import Variant, Where, run_variants
from attnsteer.cli.models import load
from attnsteer.cli.sheet import picture_sheet
from attnsteer.processors import SoftPAG


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="world-sd3", help="embedded model, folder or hub id")
    parser.add_argument("--prompt", default="a cat and a pizza on a green background")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, help="pictures at a time (default: all variants of a seed)")
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("outputs/variants_grid.png"))
    given = parser.parse_args(arguments)

    pipe, _ = load(given.model, given.device, given.dtype)
    variants = [
        Variant((SoftPAG(Where(layers=layer), strength=u, scale=given.scale),), f"layer {layer}, strength {u:g}")
        for u in given.strengths
        for layer in given.layers
    ]
    start = time.perf_counter()
    results = run_variants(
        pipe,
        given.prompt,
        variants=variants,
        seeds=[given.seed],
        batch_size=given.batch_size,
        num_inference_steps=given.num_steps,
        progress=True,
    )
    pictures = [result.image for result in results]
    print(f"{len(pictures)} variants in {time.perf_counter() - start:.1f} s")
    width = len(given.layers)
    rows = [pictures[i : i + width] for i in range(0, len(pictures), width)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    columns = [f"layer {layer}" for layer in given.layers]
    picture_sheet(rows, columns, [f"strength {u:g}" for u in given.strengths]).save(given.out)
    print(given.out)


if __name__ == "__main__":
    main()
