"""What the judge of the small world tells about pictures: detections for GenEval, and which named objects are there.

It sees categories, boxes, frames and the background; colours of objects it does not know. A request for those is an
error (``geneval.UnseenError``) and not a wrong picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .geneval import Detection, Rules

if TYPE_CHECKING:
    from ...world.evaluate.pictures import Wish
    from ...world.judge import Judge
    from ...world.scenes import Object

RULES = Rules(score=0.0, counting=0.0)
"""The judge has thresholds of its own; GenEval's are those of another detector."""
TAGS = {
    "one": "single_object",
    "two": "two_object",
    "three": "three_object",
    "count": "counting",
    "frame": "frame",
    "place": "position",
}
"""GenEval's names, and two like them, for the kinds of prompts of ``world.evaluate.pictures``."""


def detections(judge: Judge, pictures: Sequence[Image.Image], batch: int = 64) -> list[list[Detection]]:
    """The objects of each picture; boxes in its pixels. ``frame`` is "" where an object has none.

    The score is the mean probability of the category in those cells of the box that it wins.
    """
    found = []
    for first in range(0, len(pictures), batch):
        some = pictures[first : first + batch]
        for picture, pixels, category, *rest in zip(some, *judge.cells(some), strict=True):
            scene = judge.scene(pixels, category, *rest)
            factors = [side / scene.size for side in picture.size] * 2
            sure = [_score(category, judge.settings.categories.index(each.name) + 1, each) for each in scene.objects]
            found.append(
                [
                    Detection(each.name, _scaled(each.box, factors), score, frame=each.frame)
                    for each, score in zip(scene.objects, sure, strict=True)
                ]
            )
    return found


def described(judge: Judge, checkpoint: str) -> dict[str, Any]:
    """What a report says about a judge.

    Args:
        checkpoint: its name, or where it is.
    """
    from ...digests import weights_of
    from ...world.judge import SIZE

    ready = {"size": {"height": SIZE, "width": SIZE}, "resample": "bicubic", "range": "-1..1"}
    found = {"checkpoint": checkpoint, "weights": weights_of(judge.network), "dtype": "float32"}
    return {**found, "preprocessing": ready}


@dataclass(frozen=True)
class Presence:
    """objects: the share of the named categories that are seen; all: whether every one is; only: and no other."""

    objects: float
    all: bool
    only: bool


def presence(named: set[str], seen: Sequence[Detection]) -> Presence:
    """Of the categories that a prompt names (``world.evaluate.answers.named``) in a picture.

    Raises:
        ValueError: none is named.
    """
    if not named:
        raise ValueError("The prompt names no category of the small world.")
    there = {each.name for each in seen}
    return Presence(len(named & there) / len(named), named <= there, named == there)


def request(wish: Wish) -> dict[str, Any]:
    """A prompt of the small world as one of GenEval's requests, whose rules of position then hold, not the world's."""
    scene = wish.scene
    include: list[dict[str, Any]] = [{"class": name, "count": count} for name, count in scene.counts.items()]
    whole: dict[str, Any] = {"tag": TAGS[wish.kind], "prompt": wish.prompt, "include": include}
    if wish.kind == "count":
        whole["exclude"] = [{"class": each["class"], "count": each["count"] + 1} for each in include]
    if wish.kind == "frame":
        frames = {thing.name: thing.frame for thing in scene.objects}
        whole["include"] = [{**each, "frame": frames[each["class"]]} for each in include]
    if wish.kind == "place":
        relation = next(name for i, name, j in scene.relations if (i, j) == (0, 1))
        whole["include"] = [include[1], {**include[0], "position": [relation, 0]}]
    return whole


def _score(category: np.ndarray, number: int, thing: Object) -> float:
    """``category``: probabilities ``(cells, cells, categories + 1)`` of a square picture."""
    cells = len(category)
    from ...world.judge import CELL

    middle = (np.arange(cells) + 0.5) * CELL
    left, top, right, bottom = thing.box
    inside = ((middle >= top) & (middle < bottom))[:, None] & ((middle >= left) & (middle < right))
    mine = inside & (category.argmax(-1) == number)
    return float(category[..., number][mine].mean()) if mine.any() else 0.0


def _scaled(box: Sequence[float], factors: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(side * factor) for side, factor in zip(box, factors, strict=True))
    return left, top, right, bottom
