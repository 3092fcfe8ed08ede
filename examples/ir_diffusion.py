"""IR-Diffusion: several subjects from reference pictures, kept apart and put in their place (arXiv 2411.19261).

One prompt for each reference, then that of the scene with all of them; all are made in one batch, and the references
stay as they are. Where the subjects are says a plain run with the same noise (a rehearsal).

python examples/ir_diffusion.py
python examples/ir_diffusion.py --model stabilityai/stable-diffusion-xl-base-1.0 --num-steps 50 \\
    --prompts "a girl in a red dress" "a white wolf" "a girl in a red dress beside a white wolf in a forest" \\
    --subjects girl wolf --device cuda
"""

from __future__ import annotations

import torch
from common import generators, load, options, setting, show, tell

from attnsteer.processors import IRDiffusion
from attnsteer.rehearsal import rehearse

STORY = ["a dog on a blue background", "a car on a blue background", "a dog and a car on a blue background"]


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd", STORY)
    parser.add_argument("--subjects", nargs="+", default=["dog", "car"], help="the word of each reference")
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    words = [*([subject] for subject in given.subjects), given.subjects]
    *references, scene = rehearse(pipe, given.prompts, words=words, generator=generators(given), **call)
    method = IRDiffusion(
        references=torch.cat(references),
        scene=scene,
        start_layer=setting(given, "start_layer", 36),  # of SDXL's 70
        mutual=setting(given, "mutual", 0.9),
    )
    rows = {"plain": tell(given, pipe, call), "IR-Diffusion": tell(given, pipe, call, method)}
    show(given, rows, given.prompts)


if __name__ == "__main__":
    main()
