"""PAG: guidance away from a prediction whose attention maps are the identity (arXiv 2403.17377).

python examples/pag.py
python examples/pag.py --model stabilityai/stable-diffusion-xl-base-1.0 --num-steps 50 \\
    --prompt "an insect robot preparing a delicious meal" --device cuda
"""

from __future__ import annotations

from common import compare, load, options

from attnsteer import Where
from attnsteer.processors import PAG


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd", "a dog and a car on a blue background")
    parser.add_argument("--layers", default="mid_block*", help="names and globs of the layers to perturb")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0], help="w of the guidance")
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    compare(given, pipe, call, {f"PAG, w = {w:g}": PAG(Where(layers=given.layers), scale=w) for w in given.scales})


if __name__ == "__main__":
    main()
