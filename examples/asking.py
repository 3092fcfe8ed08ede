"""What the examples of vision-language methods share: options, pictures, and answers with and without the methods."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from attnsteer import Processor
from attnsteer.cli.generate import answer
from attnsteer.cli.models import load
from attnsteer.world.evaluate.answers import description_scores, lonely, named

Methods = Mapping[str, Sequence[Processor]]


def options(about: str | None) -> argparse.ArgumentParser:
    """The options of an example."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="world-llava", help="embedded model, folder or hub id")
    parser.add_argument("--images", nargs="+", help="your pictures (default: scenes of the small world)")
    parser.add_argument("--question", default="Please describe this image in detail.")
    parser.add_argument("--num-scenes", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0, help="chooses the scenes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser


def compare(given: argparse.Namespace, make: Callable[[], Methods]) -> None:
    """What the model says about each picture, plain and with each method; on the small world also how often that is not
    there."""
    model, processor = load(given.model, given.device, given.dtype)
    scenes = [] if given.images else [lonely(3 * (given.seed + n) + 2) for n in range(given.num_scenes)]
    pictures = [scene.image() for scene in scenes] or [Image.open(file).convert("RGB") for file in given.images]
    methods: Methods = {"plain": (), **make()}
    answers: dict[str, list[str]] = {name: [] for name in methods}
    width = max(map(len, methods))
    for number, picture in enumerate(pictures):
        print(", ".join(scenes[number].categories) if scenes else given.images[number])
        for name, processors in methods.items():
            said = answer(model, processor, picture, given.question, processors, given.max_new_tokens)
            answers[name].append(said)
            print(f"  {name:{width}}  {said}")
            if scenes and (invented := named(said) - set(scenes[number].categories)):
                print(f"  {'':{width}}  not there: {', '.join(sorted(invented))}")
    for name, all_said in answers.items() if scenes else ():
        score = description_scores(all_said, scenes)
        print(f"{name:{width}}  CHAIR_I {score['chair_i']:.1%}, recall {score['recall']:.1%}, {len(scenes)} scenes")
