"""Divide & Bind: every subject gets places of high contrast, and its attribute the same places (arXiv 2307.10864).

python examples/divide_and_bind.py
python examples/divide_and_bind.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --num-steps 50 \\
    --prompt "a purple dog and a green bench" --subjects "purple dog" "green bench" \\
    --max-refinement-steps 100 50 --device cuda
"""

from __future__ import annotations

from common import compare, load, options, setting

from attnsteer.processors import DivideAndBind


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd", "a red-framed dog and a cat on a blue background")
    parser.add_argument("--subjects", nargs="+", default=["red dog", "cat"], help="attribute and noun, or a noun")
    parser.add_argument(
        "--max-refinement-steps", type=int, nargs=2, default=[20, 10], help="most repetitions at step 0 and later"
    )
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    first, later = given.max_refinement_steps
    method = DivideAndBind(
        subjects=tuple(given.subjects),
        level=setting(given, "level", 2),  # where the maps are 16 x 16
        max_refinement_steps=(first, later),
    )
    compare(given, pipe, call, {"Divide & Bind": method})


if __name__ == "__main__":
    main()
