"""CARVE and ViCrop: ask again with the part of the picture that a question is about (arXiv 2509.06461, 2502.17422).

python examples/carve.py
python examples/carve.py --num-scenes 4 --seed 10
python examples/carve.py --model llava-hf/llava-1.5-7b-hf --images *.jpg --question "What is on the sign?" --device cuda
python examples/carve.py --model Qwen/Qwen2.5-VL-3B-Instruct --images *.jpg --question "What time is it?" --device cuda
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import show
from PIL import Image

from attnsteer.cli.generate import answer
from attnsteer.cli.models import load
from attnsteer.heat.pictures import overlay
from attnsteer.processors import CARVE, ViCrop
from attnsteer.world import sampling


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="world-llava", help="embedded model, folder or hub id")
    parser.add_argument("--images", nargs="+", help="your pictures (default: scenes of the small world)")
    parser.add_argument("--question", help="about every picture (default: for the last object of each scene)")
    parser.add_argument("--num-scenes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="chooses the scenes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("outputs/carve.png"))
    given = parser.parse_args(arguments)

    model, processor = load(given.model, given.device, given.dtype)
    scenes = [] if given.images else [sampling.sample(given.seed + n) for n in range(given.num_scenes)]
    pictures = [scene.image() for scene in scenes] or [Image.open(file).convert("RGB") for file in given.images]
    asked = [f"Is there a {scene.objects[-1].name} in the image?" for scene in scenes]
    same = [given.question or "What is in the image?"] * len(pictures)
    questions = asked if scenes and not given.question else same
    embedded = given.model == "world-llava"  # knows one picture and its own questions, and sees 64 x 64 pixels
    fit: dict[str, Any] = {"final_images": "refined", "suffix": ""} if embedded else {}
    side = 32 if embedded else None
    methods: dict[str, Any] = {"CARVE": CARVE(**fit), "ViCrop": ViCrop(map="grad-att", side=side, **fit)}
    rows: dict[str, list[Image.Image]] = {"picture": []}
    for picture, question in zip(pictures, questions, strict=True):
        print(f"{question}\n  plain   {answer(model, processor, picture, question, [], 32)}")
        rows["picture"].append(picture)
        for name, method in methods.items():
            found = method.answer(model, processor, picture, question)
            print(f"  {name:7} {found.answer}")
            rows.setdefault(f"{name} looks", []).append(overlay(found.heat, picture, picture.size))
            rows.setdefault(f"{name} shows", []).append(found.refined)
    show(given, rows, [f"question {number + 1}" for number in range(len(pictures))])


if __name__ == "__main__":
    main()
