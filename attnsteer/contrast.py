"""Contrast of two predictions of the next token: what the second one is made from, and how the two are combined.

A contrastive method lets the model predict every token twice, once from the prompt as it is and once from a
*counterpart* that lacks what the answer should rest on: the prompt without its image, with noise on the picture, or
with a disturbing instruction. Both rows get the same tokens. The host runs the second row (``hosts.contrast``); a
processor names the counterpart (``Processor.contrast``) and combines the logits (``Processor.combine``) by the
functions below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Strength: TypeAlias = "float | Tensor"
"""One number for all rows, or a tensor that broadcasts against ``(B, ..., V)``, e.g. ``(B, 1, 1)``."""


@dataclass(frozen=True)
class ImageFree:
    """The same prompt without its image: image tokens and their wrappers are deleted."""


@dataclass(frozen=True)
class Noised:
    """The same prompt whose preprocessed pixels are ``signal x + noise eps``, eps ~ N(0, 1) drawn from ``seed``."""

    signal: float
    noise: float
    seed: int


@dataclass(frozen=True)
class Instructed:
    """The same picture and prompt with an instruction written into it.

    ``place``: ``"start"`` is behind the start token, where a system message stands; ``"question"`` behind the last
    image.
    """

    text: str
    place: str


Counterpart: TypeAlias = ImageFree | Noised | Instructed
"""What the second prediction is made from. Equal values share one second forward pass."""


def amplified(logits: Tensor, other: Tensor, alpha: Strength, cutoff: Strength) -> Tensor:
    """``(1 + alpha) l - alpha l'``, and ``-inf`` where ``l < log(cutoff) + max(l)``.

    Args:
        logits: ``l``, the prediction from the prompt, ``(..., V)``.
        other: ``l'``, the prediction from the counterpart, of the same shape.
        alpha: 0 leaves ``l`` with the cut.
        cutoff: least probability of a token that may still win, as a fraction of the largest, 0 to 1; 0 cuts nothing.

    Returns:
        ``(..., V)`` in float32, or float64 where ``logits`` are.

    Source: Leng et al., CVPR 2024, arXiv 2311.16922; the cut is that of contrastive decoding (Li et al., 2210.15097).
    """
    logits, other = wide(logits), wide(other)
    return torch.where(plausible(logits, cutoff), (1 + alpha) * logits - alpha * other, -math.inf)


def extrapolated(logits: Tensor, other: Tensor, gamma: Strength, cutoff: Strength) -> Tensor:
    """``s_u + gamma (s_c - s_u)`` of log-probabilities, and ``-inf`` where ``s_c < log(cutoff) + max(s_c)``.

    ``s_c = log_softmax(logits)`` is the prediction from the prompt, ``s_u = log_softmax(other)`` that without image.
    gamma = 1 gives ``s_c`` without a cut. Shapes as in ``amplified``. Source: Liu et al., ECCV 2024, arXiv 2407.21771.
    """
    with_image, without = wide(logits).log_softmax(-1), wide(other).log_softmax(-1)
    moved = without + gamma * (with_image - without)
    kept = torch.where(plausible(with_image, cutoff), moved, -math.inf)
    return torch.where(torch.as_tensor(gamma == 1, device=kept.device), with_image, kept)


def plausible(logits: Tensor, cutoff: Strength) -> Tensor:
    """Bool ``(..., V)``: tokens whose probability is at least ``cutoff`` times the largest; the best always is."""
    limit = torch.as_tensor(cutoff, dtype=logits.dtype, device=logits.device).log()
    return logits >= limit + logits.amax(-1, keepdim=True)


def wide(x: Tensor) -> Tensor:
    """Float32 of half precision; anything else as it is."""
    return x if x.dtype == torch.float64 else x.float()
