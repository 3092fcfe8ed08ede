"""Two plain models stepped by hand, token by token and without a cache: the oracle of every contrast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnsteer.hosts.counterparts import noised
from attnsteer.hosts.vlm_families import PIXELS
from attnsteer.hosts.vlm_inputs import with_answer
from attnsteer.processors import VCD, ImageContrast
from tests.hosts.common import GREEDY
from tests.tiny import vlms

SPECIAL = vlms.VIDEO + 1
"""Ids below are no text: nobody generates them."""
Pair = tuple[dict[str, Any], dict[str, Any]]
"""One row alone, and its counterpart."""
Combine = Callable[[list[float], list[float], int], list[float]]
"""Logits of one row, those of its counterpart, and the number of tokens before."""


def vcd(alpha: float, beta: float) -> Combine:
    def combine(logits: list[float], other: list[float], _: int) -> list[float]:
        floor = math.log(beta) + max(logits)
        return [(1 + alpha) * a - alpha * b if a >= floor else -math.inf for a, b in zip(logits, other, strict=True)]

    return combine


def pai(gamma: float, cutoff: float) -> Combine:
    def log_softmax(x: list[float]) -> list[float]:
        top = max(x)
        total = top + math.log(sum(math.exp(v - top) for v in x))
        return [v - total for v in x]

    def combine(logits: list[float], other: list[float], _: int) -> list[float]:
        s_c, s_u = log_softmax(logits), log_softmax(other)
        floor = math.log(cutoff) + max(s_c)
        return [u + gamma * (c - u) if c >= floor else -math.inf for c, u in zip(s_c, s_u, strict=True)]

    return combine


def without_image(inputs: dict[str, Any]) -> dict[str, Any]:
    """One row without its image tokens, wrappers and pixels."""
    drop = {vlms.IMAGE, vlms.VISION_START, vlms.VISION_END}
    kept = [i for i, token in enumerate(inputs["input_ids"][0].tolist()) if token not in drop]
    width = inputs["input_ids"].shape
    given = {name: value[:, kept] for name, value in inputs.items() if value.shape == width}
    given.pop("mm_token_type_ids", None)  # without a grid Qwen-VL would rather have none
    return given


def with_prefix(inputs: dict[str, Any], prefix: Sequence[int], at: int) -> dict[str, Any]:
    """One row with tokens written in front of position ``at``."""
    width, changed = inputs["input_ids"].shape, dict(inputs)
    for name, value in inputs.items():
        if value.shape == width:
            fill = {"input_ids": list(prefix), "attention_mask": [1] * len(prefix)}.get(name, [0] * len(prefix))
            changed[name] = torch.cat([value[:, :at], value.new_tensor([fill]), value[:, at:]], 1)
    return changed


def logits_after(model: Any, inputs: dict[str, Any], answer: Sequence[int]) -> list[float]:
    """The plain model's next-token logits of one row behind an answer, from scratch."""
    longer = with_answer(inputs, torch.tensor([list(answer)], dtype=torch.long), model.config) if answer else inputs
    return model(**longer, use_cache=False).logits[0, -1].tolist()


def combined(model: Any, pair: Pair, answer: Sequence[int], how: Combine) -> list[float]:
    return how(*(logits_after(model, inputs, answer) for inputs in pair), len(answer))


def greedy(model: Any, pair: Pair, how: Combine, count: int = 5) -> list[int]:
    """The tokens that the combined logits choose."""
    answer: list[int] = []
    for _ in range(count):
        scores = combined(model, pair, answer, how)
        scores[:SPECIAL] = [-math.inf] * SPECIAL
        answer.append(max(range(len(scores)), key=scores.__getitem__))
    return answer


def beams(model: Any, pair: Pair, how: Combine, width: int, count: int) -> list[int]:
    """The best of ``width`` beams, each with two predictions of its own."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(count):
        found = []
        for total, answer in running:
            scores = torch.tensor(combined(model, pair, answer, how)).log_softmax(-1).tolist()
            scores[:SPECIAL] = [-math.inf] * SPECIAL
            found += [(total + score, [*answer, token]) for token, score in enumerate(scores)]
        running = sorted(found, key=lambda entry: -entry[0])[:width]
    return running[0][1]


def sampled(model: Any, pairs: Sequence[Pair], how: Combine, count: int) -> list[list[int]]:
    """Tokens of several rows drawn from the combined logits with torch's own random numbers."""
    answers: list[list[int]] = [[] for _ in pairs]
    for _ in range(count):
        scores = torch.tensor([combined(model, pair, a, how) for pair, a in zip(pairs, answers, strict=True)])
        scores[:, :SPECIAL] = -math.inf
        for answer, token in zip(answers, torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist(), strict=True):
            answer.append(token)
    return answers


def rows_of(inputs: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Pair]:
    """Every row alone and without padding, and its counterpart."""
    rows = [vlms.row(inputs, row) for row in range(len(inputs["input_ids"]))]
    return [(row, change(row)) for row in rows]


def pixels_of(inputs: dict[str, Any]) -> Tensor:
    return next(inputs[name] for name in PIXELS if name in inputs)


# ---- two methods and what they say -----------------------------------------------------------------------------------
TEXT_ONLY = {**GREEDY, "suppress_tokens": list(range(SPECIAL))}
IMAGE = ImageContrast(gamma=2.5, cutoff=0.02)
IMAGE_ORACLE = pai(2.5, 0.02)
NOISE = VCD(alpha=2.0, beta=0.02, noise_step=900, seed=3)
NOISE_ORACLE = vcd(2.0, 0.02)


def with_noise(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, **noised(inputs, NOISE.contrast())}


def answers(model: Any, inputs: dict[str, Any], count: int = 5, **options: Any) -> list[list[int]]:
    return model.generate(**inputs, **{**TEXT_ONLY, **options})[:, -count:].tolist()
