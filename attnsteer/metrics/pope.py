"""POPE: questions about objects that are there and that are not.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv:2305.10355. An image
with three different objects or more gets six questions, yes and no in turn: its first three objects, and after each of
them one that is neither in the image nor asked before, by the split:

    random       any object
    popular      the most frequent one in the chosen images
    adversarial  the one most often seen together with the object just asked about

Popular and adversarial take a random one where their list is used up. The released scripts seed nothing; here the same
seed gives the same questions. How answers are read and counted: ``attnsteer.metrics.yesno``.

    asked = questions(annotated(instances), "adversarial", images=500, seed=0)     # lines of POPE's files
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SteeringError

SPLITS = ("random", "popular", "adversarial")
PER_IMAGE = 3  # of each answer


def questions(
    objects: Mapping[str, Sequence[str]],
    split: str,
    images: int | None = 500,
    seed: int = 0,
    popular: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Questions in the format of POPE's files: question_id, image, text, label.

    Args:
        objects: {image: its different objects, in order}; images with fewer than three are left out.
        split: random, popular or adversarial. The yes questions of the three are the same for the same seed.
        images: how many are drawn; None takes all, in their order.
        seed: of the images, and of the random objects.
        popular: the objects, most frequent first, where they were counted on other images than the chosen ones.

    Raises:
        SteeringError: no such split, too few images, or an image that has all objects there are.
    """
    if split not in SPLITS:
        raise SteeringError(f"There is no split {split!r}; there are {', '.join(SPLITS)}.")
    chosen = _chosen(objects, images, seed)
    counted = Counter(name for image in chosen for name in objects[image])
    names = [name for name, _ in counted.most_common()]  # stable: equal counts in order of first appearance
    popular = names if popular is None else popular
    company = _company([objects[image] for image in chosen]) if split == "adversarial" else {}
    rng, asked = random.Random(f"{seed} {split}"), []
    for image in chosen:
        taken: set[str] = set(objects[image])
        for name in objects[image][:PER_IMAGE]:
            listed = {"random": [], "popular": popular, "adversarial": company.get(name, [])}[split]
            absent = next((other for other in listed if other not in taken), None)
            if absent is None:
                absent = _any(image, names, taken, rng)
            taken.add(absent)
            asked += [(image, name, "yes"), (image, absent, "no")]
    return [
        {
            "question_id": number,
            "image": image,
            "text": question(name),
            "label": label,
        }
        for number, (image, name, label) in enumerate(asked, start=1)
    ]


def question(name: str) -> str:
    """ "Is there a dog in the image?"; "an" before a, e, i, o and u."""
    return f"Is there {'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name} in the image?"


def _chosen(objects: Mapping[str, Sequence[str]], images: int | None, seed: int) -> list[str]:
    for image, names in objects.items():
        if len(set(names)) != len(names):
            raise SteeringError(f"Objects of {image} are listed twice: {', '.join(names)}.")
    rich = [image for image, names in objects.items() if len(names) >= PER_IMAGE]
    if images is None:
        return rich
    if not 1 <= images <= len(rich):
        raise SteeringError(f"{images} images were asked for, and {len(rich)} have {PER_IMAGE} objects or more.")
    return random.Random(seed).sample(rich, images)


def _company(groups: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """For every object the others, those most often together with it first; ties in order of first appearance."""
    together: dict[str, Counter[str]] = {}
    for names in groups:
        for name in names:
            together.setdefault(name, Counter()).update(other for other in names if other != name)
    return {name: [other for other, _ in others.most_common()] for name, others in together.items()}


def _any(image: str, names: Sequence[str], taken: set[str], rng: random.Random) -> str:
    left = [name for name in names if name not in taken]
    if not left:
        raise SteeringError(
            f"Image {image} and its questions have all {len(names)} objects: none is left to ask about."
        )
    return rng.choice(left)
