"""SynGen: an attribute is attended to where its noun is, and nowhere else (arXiv 2306.08877).

python examples/syngen.py
python examples/syngen.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --num-steps 50 \\
    --prompt "a pink sunflower and a yellow flamingo" --subjects "pink sunflower" "yellow flamingo" --device cuda
"""

from __future__ import annotations

from common import compare, load, options, setting

from attnsteer.processors import SynGen


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd", "a red-framed dog and a cat on a blue background")
    parser.add_argument("--subjects", nargs="+", default=["red dog", "cat"], help="phrases with the noun last")
    parser.add_argument("--scale-factor", type=float, default=20.0, help="the step along the gradient")
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    level = setting(given, "level", 2)  # where the maps are 16 x 16
    compare(
        given,
        pipe,
        call,
        {"SynGen": SynGen(subjects=tuple(given.subjects), scale_factor=given.scale_factor, level=level)},
    )


if __name__ == "__main__":
    main()
