"""Attend-and-Excite: every subject of the prompt gets a place that attends to it (arXiv 2301.13826).

python examples/attend_and_excite.py
python examples/attend_and_excite.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --num-steps 50 \\
    --prompt "a cat and a frog" --subjects cat frog --device cuda
"""

from __future__ import annotations

from common import compare, load, options, setting

from attnsteer.processors import AttendAndExcite


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd", "a dog and a car on a blue background")
    parser.add_argument("--subjects", nargs="+", default=["dog", "car"], help="words or phrases of the prompt")
    parser.add_argument("--max-refinement-steps", type=int, default=20, help="most repetitions of an update")
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    method = AttendAndExcite(
        subjects=tuple(given.subjects),
        level=setting(given, "level", 2),  # where the maps are 16 x 16
        max_refinement_steps=given.max_refinement_steps,
    )
    compare(given, pipe, call, {"Attend-and-Excite": method})


if __name__ == "__main__":
    main()
