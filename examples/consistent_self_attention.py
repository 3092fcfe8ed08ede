"""StoryDiffusion: pictures of a story attend to random tokens of each other (arXiv 2405.01434).

python examples/consistent_self_attention.py
python examples/consistent_self_attention.py --model stabilityai/stable-diffusion-xl-base-1.0 --num-steps 50 \\
    --prompts "a man with a red hat in a kitchen" "a man with a red hat on a beach" "a man with a red hat at a desk" \\
    --device cuda
"""

from __future__ import annotations

from common import load, options, show, tell

from attnsteer.processors import ConsistentSelfAttention

STORY = ["a dog on a blue background", "a dog and a car on a blue background", "a dog and a cat on a green background"]


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd", STORY)
    parser.add_argument("--writers", type=int, help="how many pictures, from the first on, lend tokens (default: all)")
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    method = ConsistentSelfAttention(frames=len(given.prompts), writers=given.writers)
    rows = {"plain": tell(given, pipe, call), "StoryDiffusion": tell(given, pipe, call, method)}
    show(given, rows, given.prompts)


if __name__ == "__main__":
    main()
