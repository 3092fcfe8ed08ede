"""SoftPAG: guidance away from a prediction whose chosen heads are softly perturbed (arXiv 2506.10978).

python examples/softpag.py
python examples/softpag.py --model stabilityai/stable-diffusion-3-medium-diffusers --layers 9 --scale 3 \\
    --num-steps 28 --prompt "a photo of a dog in a sports car" --device cuda
"""

from __future__ import annotations

from common import compare, load, options

from attnsteer import Where
from attnsteer.processors import SoftPAG


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd3", "a dog and a car on a blue background")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--scale", type=float, default=2.0)
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    where = Where(layers=given.layers)
    # Row by row the same noise: what differs is the steering alone.
    compare(given, pipe, call, {f"u = {u:g}": SoftPAG(where, strength=u, scale=given.scale) for u in given.strengths})


if __name__ == "__main__":
    main()
