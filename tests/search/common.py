"""A search on a tiny pipeline: fast, with an objective in which every head matters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from attnsteer.search import HeadHunter
from tests.tiny import pipelines

PAIRS = [("a dog", 0), ("a red car", 5)]
CALLS: dict[str, dict[str, Any]] = {
    "sd15": {"height": 48, "width": 80},
    "sd3": {"height": 48, "width": 80, "max_sequence_length": 16},
    "flux": {"height": 48, "width": 80, "max_sequence_length": 16},
}


def redness(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """A number that every pixel changes; prompts count too."""
    weights = np.arange(48 * 80 * 3).reshape(48, 80, 3) % 7
    return [float((np.asarray(i) * weights).mean()) + len(p) for i, p in zip(images, prompts, strict=True)]


_build = cache(pipelines.build)


def pipe(name: str = "sd3") -> Any:
    """One pipeline of each family for all tests."""
    return _build(name)


def hunter(name: str = "sd3", objective: Any = redness, pairs: Any = None, **options: Any) -> HeadHunter:
    """A search of two rounds, two heads each, in two steps."""
    given = {"k": 2, "rounds": 2, "steps": 2, "batch": 5, "call": CALLS[name]} | options
    return HeadHunter(pipe(name), objective, PAIRS if pairs is None else pairs, **given)
