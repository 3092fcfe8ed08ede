"""VHR: answers about pictures, plain and with the heads strengthened that look at the image (arXiv 2412.13949).

python examples/vhr.py
python examples/vhr.py --num-scenes 100
python examples/vhr.py --model llava-hf/llava-1.5-7b-hf --images *.jpg --device cuda
"""

from __future__ import annotations

import argparse

from PIL import Image

from attnsteer.cli.generate import answer
from attnsteer.cli.models import load
from attnsteer.processors import VHR
from attnsteer.world.evaluate.answers import description_scores, lonely, named


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="world-llava", help="embedded model, folder or hub id")
    parser.add_argument("--images", nargs="+", help="your pictures (default: scenes of the small world)")
    parser.add_argument("--question", default="Please describe this image in detail.")
    parser.add_argument("--alpha", type=float, default=2.0)
    parser.add_argument("--num-scenes", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0, help="chooses the scenes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args(arguments)

    model, processor = load(given.model, given.device, given.dtype)
    scenes = [] if given.images else [lonely(3 * (given.seed + n) + 2) for n in range(given.num_scenes)]
    pictures = [scene.image() for scene in scenes] or [Image.open(file).convert("RGB") for file in given.images]
    methods: dict[str, list[VHR]] = {"plain": [], "VHR": [VHR(alpha=given.alpha)]}
    answers: dict[str, list[str]] = {name: [] for name in methods}
    for number, picture in enumerate(pictures):
        print(", ".join(scenes[number].categories) if scenes else given.images[number])
        for name, processors in methods.items():
            said = answer(model, processor, picture, given.question, processors, given.max_new_tokens)
            answers[name].append(said)
            print(f"  {name:5}  {said}")
            if scenes and (invented := named(said) - set(scenes[number].categories)):
                print(f"         not there: {', '.join(sorted(invented))}")
    for name, all_said in answers.items() if scenes else ():
        score = description_scores(all_said, scenes)
        print(f"{name:5}  CHAIR_I {score['chair_i']:.1%}, recall {score['recall']:.1%}, {len(scenes)} scenes")


if __name__ == "__main__":
    main()
