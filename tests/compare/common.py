"""A comparison on a tiny random model: a few scenes, three methods, no learned answers, milliseconds a batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from attnsteer.compare import Answerer, Answers, Comparison, Method, with_controls, world
from attnsteer.processors import VHR
from attnsteer.world.train import llava

TOKENS = 3
METHODS = with_controls([Method("VHR", (VHR(),)), Method("strong", (VHR(alpha=4.0),))], [])
ROOT = Path(__file__).parents[2]


@cache
def tiny() -> tuple[Any, Any]:
    """A model of two layers and its processor; the same weights in every process."""
    torch.manual_seed(0)
    processor = llava.processor()
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


def environment() -> dict[str, str]:
    """For processes that the tests start."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
