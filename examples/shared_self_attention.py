"""ConsiStory: pictures of a set attend to the subject in the anchor pictures (arXiv 2402.03286).

Where the subject is in the anchors says a plain run with the same noise (a rehearsal), or boxes of yours.

python examples/shared_self_attention.py
python examples/shared_self_attention.py --model stabilityai/stable-diffusion-xl-base-1.0 --num-steps 50 \\
    --prompts "a cute fox in a forest" "a cute fox in the snow" "a cute fox on a sofa" --subject fox --device cuda
"""

from __future__ import annotations

import torch
from common import generators, load, options, show, tell

from attnsteer.processors import SharedSelfAttention
from attnsteer.rehearsal import rehearse

SET = ["a dog on a blue background", "a dog on a green background", "a dog and a cat on a yellow background"]


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd", SET)
    parser.add_argument("--subject", default="dog", help="a word of the anchors' prompts")
    parser.add_argument("--anchors", type=int, default=2, help="how many pictures, from the first on, all others read")
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    anchors = given.prompts[: given.anchors]
    noise = generators(given)[: given.anchors]
    masks = torch.cat(rehearse(pipe, anchors, words=[[given.subject]] * len(anchors), generator=noise, **call))
    method = SharedSelfAttention(frames=len(given.prompts), anchors=len(anchors), masks=masks)
    rows = {"plain": tell(given, pipe, call), "ConsiStory": tell(given, pipe, call, method)}
    show(given, rows, given.prompts)


if __name__ == "__main__":
    main()
