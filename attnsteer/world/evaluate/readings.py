"""How well the judge reads rendered scenes, of combinations that its training never had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from attnsteer.world import sampling
from attnsteer.world.catalog import CATEGORIES, CORE
from attnsteer.world.evaluate.pictures import RIGHT, shares, wishes
from attnsteer.world.judge import Judge
from attnsteer.world.scenes import Scene

Progress = Callable[[Sequence[Any]], Iterable[Any]]


def drawn(count: int, seed: int = 0) -> list[Scene]:
    """`count` varied test scenes of all 67 categories, and `count` / 100 scenes of each category alone."""
    every = [category.name for category in CATEGORIES]
    scenes = list(sampling.stream("test", count, seed, categories=every, style=sampling.VARIED))
    for name in every:
        alone = sampling.stream("test", max(1, count // 100), seed, categories=[name], count=1, style=sampling.VARIED)
        scenes += alone
    return scenes


def balanced(truth: Sequence[Scene], seen: Sequence[Scene]) -> dict[str, float]:
    """For each category: half the share of scenes with it where it is seen, half the share without where it is not."""
    found = {}
    for category in CATEGORIES:
        there = np.array([category.name in scene.counts for scene in truth])
        said = np.array([category.name in scene.counts for scene in seen])
        found[category.name] = float((said[there].mean() + (~said[~there]).mean()) / 2)
    return found


def framed(truth: Sequence[Scene], seen: Sequence[Scene]) -> tuple[int, int]:
    """Objects with the right frame (or rightly none), and all objects of categories that are there and seen once."""
    pairs = [
        (one.frame, next(other.frame for other in b.objects if other.name == one.name))
        for a, b in zip(truth, seen, strict=True)
        for one in a.objects
        if a.counts[one.name] == b.counts.get(one.name) == 1
    ]
    return sum(x == y for x, y in pairs), len(pairs)


def compare(truth: Sequence[Scene], seen: Sequence[Scene]) -> dict[str, float]:
    """Balanced accuracy of presence, worst and mean over categories; shares of scenes with all right, by subject."""
    present = balanced(truth, seen)
    right, asked = framed(truth, seen)
    both = list(zip(truth, seen, strict=True))
    return {
        "worst_category": min(present.values()),
        "mean_category": float(np.mean(list(present.values()))),
        "worst_core_category": min(present[name] for name in CORE),
        "mean_core_category": float(np.mean([present[name] for name in CORE])),
        "categories": sum(set(a.categories) == set(b.categories) for a, b in both) / len(both),
        "counts": sum(a.counts == b.counts for a, b in both) / len(both),
        "frames": right / max(1, asked),
        "backgrounds": sum((a.background, a.gradient) == (b.background, b.gradient) for a, b in both) / len(both),
    }


def evaluate_judge(judge: Judge, count: int = 2000, seed: int = 0, progress: Progress = iter) -> dict[str, float]:
    """All numbers about the judge, with `true_...`: what it says of true pictures of the picture models' prompts."""
    truth = drawn(count, seed)
    seen: list[Scene] = []
    for first in progress(range(0, len(truth), 64)):
        seen += judge([scene.image() for scene in truth[first : first + 64]])
    asked = [wish for kind in RIGHT for wish in wishes(kind)]
    true = shares(asked, judge([wish.scene.image() for wish in asked]))
    return {"scenes": len(truth), **compare(truth, seen), **{f"true_{key}": value for key, value in true.items()}}
