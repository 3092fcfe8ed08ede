"""SEG: guidance away from a prediction with blurred queries (arXiv 2408.00760).

python examples/seg.py
python examples/seg.py --model stabilityai/stable-diffusion-xl-base-1.0 --num-steps 50 --sigmas 10 inf \\
    --prompt "a photo of an astronaut riding a horse" --device cuda
"""

from __future__ import annotations

from common import compare, load, options

from attnsteer import Where
from attnsteer.processors import SEG


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd", "a dog and a car on a blue background")
    parser.add_argument("--layers", default="mid_block*", help="names and globs of the layers to perturb")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[1.0, float("inf")], help="widths of the blur")
    parser.add_argument("--scale", type=float, default=3.0)
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    where = Where(layers=given.layers)
    compare(given, pipe, call, {f"SEG, sigma {s:g}": SEG(where, sigma=s, scale=given.scale) for s in given.sigmas})


if __name__ == "__main__":
    main()
