"""VAF (ClearSight): image logits up, system prompt down, for every query behind the image.

Yin, Si, Wang, "ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large Language
Models", CVPR 2025, arXiv 2503.13107.

    z_j <- (1 + alpha) z_j          j in image tokens
    z_j <- (1 - beta)  z_j          j in system tokens: those in front of the first image
    rows: the prompt's behind the image, and every decode step; layers 9 to 14 of 32; before the mask and the softmax

The factor multiplies a signed logit: a *negative* image logit falls. This is as published (PAI differs).

Fused form: exact; scaling column j of z is scaling key j. The user's kernel runs a second time with scaled keys, which
never reach the cache, and rows behind the image take that result.
Cost: twice the attention of 6 layers. ``head_fraction`` adds two fused calls.
Limits: beta is 0.05 in the authors' code and 0.1 or 0.15 in notes about the paper. Chat templates without a system
message leave a handful of tokens in front of the image, and the suppression then does next to nothing. The paper
restricts the change to heads that look at the image, its code does not; how such heads are found is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnsteer.edits import Edit, LogitEdit
from attnsteer.processor import Processor, check_number
from attnsteer.redistribute import key_mass
from attnsteer.site import AttentionCall, Site
from attnsteer.where import Where

from .pai import image_keys


@dataclass(frozen=True)
class VAF(Processor):
    """Scale the logits of image tokens by ``1 + alpha`` and those of system tokens by ``1 - beta``.

    Args:
        where: layers (decoder layers from 0) and heads, and ``steps`` (``"prefill"``, ``"decode"``, ``"all"``). None
            takes layers 9 to 14, as published for 32 layers; elsewhere the same share of the depth (ours).
        alpha: 0 to 1. Authors' code: 0.15.
        beta: 0 to 1. Authors' code: 0.05.
        head_fraction: above 0 to 1: in each row, the share of the heads that changes, those with most attention on the
            image (ours; the paper says about half). Default: 1, all heads, as the authors' code.
    """

    where: Where | None = None  # type: ignore[assignment]
    alpha: float = 0.15
    beta: float = 0.05
    head_fraction: float = 1.0

    kinds: ClassVar = ("causal",)
    per_row: ClassVar = ("alpha", "beta")
    samples: ClassVar = (LogitEdit(torch.ones(1, 1, 1), "signed"),)

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0, 1)
        check_number(self, "beta", 0, 1)
        check_number(self, "head_fraction", 0.01, 1)

    @property
    def inert(self) -> bool:
        return self.alpha == self.beta == 0

    def where_for(self, sites: Sequence[Site]) -> Where:
        return Where(layers=middle_layers(sites)) if self.where is None else self.where

    def react(self, call: AttentionCall) -> Edit:
        assert call.spans is not None
        assert call.spans.reading is not None
        keys, system = image_keys(call), call.spans.reading.before_image.to(call.q.device).float()
        image = keys.float()
        weight = call.by_row(self.alpha, image) * image - call.by_row(self.beta, system) * system
        heads = None if self.head_fraction == 1 else looking_heads(key_mass(call, keys), self.head_fraction)
        return LogitEdit(weight[:, None], "signed", call.spans.reading.after_image, heads)


def looking_heads(mass: Tensor, fraction: float) -> Tensor:
    """Bool ``(B, H, Nq)``: in each row the ``ceil(fraction * H)`` heads with most mass on the image."""
    count = math.ceil(fraction * mass.shape[1])
    best = mass.topk(count, dim=1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, best, True)


def middle_layers(sites: Sequence[Site]) -> list[int]:
    """Layers 9 to 14 of 32; the same share of another depth."""
    total = 1 + max((site.layer for site in sites), default=0)
    first = round(total * 9 / 32)
    return list(range(first, max(first + 1, round(total * 15 / 32))))
