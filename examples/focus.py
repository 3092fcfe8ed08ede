"""FOCUS: disentangled subjects in joint attention (arXiv 2510.02315).

python examples/focus.py
python examples/focus.py --model stabilityai/stable-diffusion-3.5-medium --num-steps 28 \\
    --prompt "a black cat and a brown dog" --subjects "black cat" "brown dog" --device cuda
python examples/focus.py --model black-forest-labs/FLUX.1-dev --layers "transformer_blocks.*" --num-steps 28 \\
    --prompt "a horse and a bear" --subjects horse bear --device cuda
"""

from __future__ import annotations

from common import compare, load, options

from attnsteer import Where
from attnsteer.processors import Focus


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd3", "a dog and a car on a blue background")
    parser.add_argument("--subjects", nargs="+", default=["dog", "car"], help="the words of each subject")
    parser.add_argument("--layers", default="all", help="names and globs (default: the middle third)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 5.0], help="lambda of the control")
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    where, subjects = Where(layers=given.layers), tuple(given.subjects)
    compare(given, pipe, call, {f"FOCUS, {x:g}": Focus(where, subjects=subjects, scale=x) for x in given.scales})


if __name__ == "__main__":
    main()
