"""A comparison on a tiny random model: a few scenes, three methods, no learned answers, milliseconds a batch."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from attnsteer.compare import Answer, Answerer, Answers, Comparison, Method, with_controls, world
from attnsteer.processors import VHR

TOKENS = 3
METHODS = with_controls([Method("VHR", (VHR(),)), Method("strong", (VHR(alpha=4.0),))], [])
ROOT = Path(__file__).parents[2]


@cache
def tiny() -> tuple[Any, Any]:
    """A model of two layers and its processor; the same weights in every process."""
    from transformers import AutoProcessor

    from attnsteer.world import assets
    from attnsteer.world.train import llava

    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(assets.path("models/world-llava"))
    return llava.build(processor.tokenizer, 2, 2, 32).eval(), processor


@cache
def answerer() -> Answerer:
    return Answerer(*tiny())


@cache
def tasks(scenes: int = 6) -> list[Any]:
    """Both tasks, with short answers."""
    made = (world.describe(scenes), world.exists(0, scenes))
    return [replace(task, max_new_tokens=TOKENS) for task in made]


def comparison(folder: Path, methods: Sequence[Method] = METHODS, by: Any = None, **options: Any) -> Comparison:
    """Not run yet; the caller closes ``answers`` before another one opens the folder."""
    given = {"tasks": tasks()[:1], "batch_size": 2} | options
    answers = Answers(folder, given.get("rank", 0))
    return Comparison(answerer() if by is None else by, methods=methods, answers=answers, **given)


def finished(folder: Path, *arguments: Any, **options: Any) -> Comparison:
    """The same, run and closed."""
    found = comparison(folder, *arguments, **options)
    try:
        found.run()
    finally:
        found.answers.close()
    return found


def outputs(found: Comparison) -> dict[Any, str]:
    """What was said, by task, sample and method."""
    return {(k.task, k.sample, k.method): entry["output"] for k, entry in found.answers.answers.items()}


WORDS = ("dog", "cat", "car", "zebra", "pizza", "boat")
LIMITED = 0.3
"""Share of answers that end at the limit."""


class Parrot:
    """A model that says what there is, forgets some of it and makes some up; how much depends on the method."""

    digest = "parrot"

    def __init__(self, pause: float = 0.0):
        self.pause = pause

    def settings(self, limit: int) -> dict[str, Any]:
        return {"model": self.digest, "limit": limit}

    def groups(self, methods: Sequence[Method]) -> list[list[Method]]:
        return [list(methods)]

    def __call__(self, samples: Any, methods: Any, limit: int) -> Any:
        time.sleep(self.pause)
        return [[self.answer(sample, method.label) for sample in samples] for method in methods]

    def answer(self, sample: Any, label: str) -> Any:
        rng = random.Random(f"{sample.id} {'' if label == 'VHR' else label}")
        if sample.truth in (("yes",), ("no",)):
            text = rng.choice(["Yes, there is.", "No, there is no such thing.", "Perhaps."])
        else:
            often = 0.9 if label == "strong" else 0.2
            named = [*sample.truth[: rng.randint(0, 3)], *([rng.choice(WORDS)] if rng.random() < often else [])]
            text = f"A picture of {' and '.join(named)}."
        return Answer(text, (1, 2), "length" if rng.random() < LIMITED else "stop")


def environment() -> dict[str, str]:
    """For processes that the tests start."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
