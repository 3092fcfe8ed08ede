"""A-STAR: the maps of subjects are kept apart, and where they were in the step before (arXiv 2306.14544).

python examples/a_star.py
python examples/a_star.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --num-steps 50 \\
    --prompt "a cat and a dog" --subjects cat dog --device cuda
"""

from __future__ import annotations

from common import compare, load, options, setting

from attnsteer.processors import AStar


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd", "a dog and a car on a blue background")
    parser.add_argument("--subjects", nargs="+", default=["dog", "car"], help="words or phrases of the prompt")
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    subjects, level = tuple(given.subjects), setting(given, "level", 2)  # where the maps are 16 x 16
    methods = {
        "segregation alone": AStar(subjects=subjects, level=level, ret_weight=0.0),
        "A-STAR": AStar(subjects=subjects, level=level),
    }
    compare(given, pipe, call, methods)


if __name__ == "__main__":
    main()
