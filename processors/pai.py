"""PAI: the rows that predict pay more attention to the image.

Liu, Zheng, Chen, "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs", ECCV
2024, arXiv 2407.21771.

    z_j <- z_j + alpha |z_j|        j in image tokens, z = masked logits of the row that predicts the next token,
                                    layers 2 to L - 1, all heads, every step

Negative logits shrink toward 0, so every image logit rises. Alpha: 0.5 for LLaVA, 0.6 Shikra, 0.2 resampler models.
In prefill the last prompt row changes alone; its keys and values in deeper layers then differ, as published.

Fused form: exact. The kernel runs on all rows, and one row ``(B, H, 1, Nk)`` is computed again.
Cost: one row of logits for each layer and step.
Limits: alpha of 0.8 and more destroys the text. The paper's second part, a contrast with the logits of a prompt
without image (gamma 1.1), is ``ImageContrast``: attach both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnsteer.edits import Edit, LogitEdit
from attnsteer.processor import Processor, check_number
from attnsteer.site import AttentionCall, Site
from attnsteer.where import Where


@dataclass(frozen=True)
class PAI(Processor):
    """Raise the logits of image tokens by ``alpha`` times their size.

    Args:
        where: layers (decoder layers from 0) and heads, and ``steps`` (``"prefill"``, ``"decode"``, ``"all"``). None
            takes the paper's layers, 2 to the last.
        alpha: 0 to 1. Paper: 0.5 for LLaVA. At 0 the method is off.
    """

    where: Where | None = None  # type: ignore[assignment]
    alpha: float = 0.5

    kinds: ClassVar = ("causal",)
    last_row_only: ClassVar = True
    per_row: ClassVar = ("alpha",)
    samples: ClassVar = (LogitEdit(torch.ones(1, 1, 1), "absolute"),)

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0, 1)

    @property
    def inert(self) -> bool:
        return self.alpha == 0

    def where_for(self, sites: Sequence[Site]) -> Where:
        return Where(layers=layers_from(sites, 2)) if self.where is None else self.where

    def react(self, call: AttentionCall) -> Edit:
        image = image_keys(call)[:, None].float()
        return LogitEdit(call.by_row(self.alpha, image) * image, "absolute")


def image_keys(call: AttentionCall) -> Tensor:
    """Bool ``(B, Nk)``: the image tokens among the keys."""
    assert call.spans is not None
    assert isinstance(call.spans.image, Tensor)
    return call.spans.image.to(call.q.device)  # layers of one model may live on several devices


def layers_from(sites: Sequence[Site], first: int, omit_last: int = 0) -> list[int]:
    """Layers ``first`` to the last but ``omit_last``; the last of them where a model has fewer."""
    stop = 1 + max((site.layer for site in sites), default=0) - omit_last
    return list(range(min(first, max(stop - 1, 0)), max(stop, 1)))
