"""CONFORM: words of one subject attract each other's maps, those of different subjects repel (arXiv 2312.06059).

python examples/conform.py
python examples/conform.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --num-steps 50 \\
    --prompt "a green backpack and a brown suitcase" --subjects "green backpack" "brown suitcase" --device cuda
"""

from __future__ import annotations

from common import compare, load, options, setting

from attnsteer.processors import Conform


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd", "a red-framed dog and a cat on a blue background")
    parser.add_argument("--subjects", nargs="+", default=["red dog", "cat"], help="attributes and noun, or a noun")
    parser.add_argument("--max-refinement-steps", type=int, default=20, help="repetitions at steps 0, 10 and 20")
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    method = Conform(
        subjects=tuple(given.subjects),
        level=setting(given, "level", 2),  # where the maps are 16 x 16
        max_refinement_steps=given.max_refinement_steps,
    )
    compare(given, pipe, call, {"CONFORM": method})


if __name__ == "__main__":
    main()
