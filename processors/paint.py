"""PAINT: more attention to the image tokens that the vision tower itself finds informative.

Kazi Hasan Ibn Arif et al., "PAINT: Paying Attention to INformed Tokens to Mitigate Hallucination in Large
Vision-Language Model", 2025, arXiv 2501.12206 (first version: "Fixing Imbalanced Attention to Mitigate In-Context
Hallucination of Large Vision-Language Model").

    a_loc, a_sum = attention of the vision tower's class token, summed over heads, in its first and last but one layer
    SUM = the patches with a_sum > Q3 + 1.5 (Q3 - Q1)                      (the outliers; may be none)
    LOC = the ``local_ratio`` n patches with the largest a_loc, without those of SUM
    z_j <- z_j + alpha |z_j|  for j in LOC,   z_j <- z_j + beta |z_j|  for j in SUM
    row that predicts the next token, layers 2 to L - 1, all heads, every step

Defaults of the paper: alpha 0.7, beta 0.4 (code: 0.3), ratio 0.25. **Alpha of 0.7 gives repetitive text**: in the
captions that the authors published, recall falls from 78 to 60 % and texts become twice as long, so the gain in CHAIR
is mostly repetition; up to 0.5 there is neither harm nor gain. The default here is 0.5, more warns.

Fused form: as PAI; in the tower the class token's row is computed beside the user's kernel.
Cost: two rows ``(B, H, 1, patches)`` in the tower, then one row of logits for each layer and step.
Limits: a tower with a class token and one image token per patch (LLaVA-1.5). Of several pictures in a prompt each has
its own LOC and SUM (ours). The paper's spatial stream sorts row sums of a softmax, which are all 1, and is left out; so
is the "head-specific modulation" of the first abstract, for which no formula was published. The contrast with an
image-free prompt is ``ImageContrast``: attach both.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnsteer.edits import Edit, LogitEdit
from attnsteer.processor import Processor, check_number
from attnsteer.site import AttentionCall, Site, expand_rows
from attnsteer.where import Where

from .pai import image_keys, layers_from

TOWER_LAYERS = (0, -2)
"""The layers of the vision tower that give the local and the summary score."""
REPETITIVE = 0.5
"""Alpha above this gives repetitive text."""


@dataclass(frozen=True)
class PAINT(Processor):
    """Raise the logits of local and of summary image tokens.

    Args:
        where: layers (decoder layers from 0) and heads, and ``steps`` (``"prefill"``, ``"decode"``, ``"all"``). None
            takes the paper's layers, 2 to the last.
        alpha: for local tokens, 0 to 1. Paper: 0.7, which degenerates; default 0.5.
        beta: for summary tokens, 0 to 1. Paper: 0.4.
        local_ratio: share of the patches that are local, 0 to 1. Paper: 0.25.
    """

    where: Where | None = None  # type: ignore[assignment]
    alpha: float = 0.5
    beta: float = 0.4
    local_ratio: float = 0.25

    kinds: ClassVar = ("causal",)
    last_row_only: ClassVar = True
    per_row: ClassVar = ("alpha", "beta")
    samples: ClassVar = (LogitEdit(torch.ones(1, 1, 1), "absolute"),)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "local_ratio"):
            check_number(self, name, 0, 1)
        if self.alpha > REPETITIVE:
            warnings.warn(
                f"PAINT(alpha={self.alpha:g}): above {REPETITIVE:g} texts become repetitive and lose recall, although "
                "CHAIR improves: report repetition and recall.",
                stacklevel=3,
            )

    @property
    def inert(self) -> bool:
        return self.alpha == self.beta == 0

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"cls_attention": TOWER_LAYERS}

    def where_for(self, sites: Sequence[Site]) -> Where:
        return Where(layers=layers_from(sites, 2)) if self.where is None else self.where

    def react(self, call: AttentionCall) -> Edit | None:
        if "cls_attention" not in call.state:  # no picture in this prompt
            return None
        assert call.spans is not None
        assert call.spans.reading is not None
        if "gain" not in call.state:
            first, last = call.state["cls_attention"]
            local, summary = (chosen.float() for chosen in token_sets(first, last, self.local_ratio))
            gain = call.by_row(self.alpha, local) * local + call.by_row(self.beta, summary) * summary
            call.state["gain"] = gain.flatten(1)  # (B, pictures * patches), in the order of a prompt's image tokens
        lanes = max(1, len(call.lanes))
        rows = call.q.shape[0] // lanes  # beams repeat the picture of their prompt
        gain = expand_rows(call.state["gain"], rows).expand(rows, -1).to(call.q.device)
        gain = torch.cat([gain] * lanes)
        patch = call.spans.reading.image_index.to(gain.device).clamp(max=gain.shape[1] - 1)
        weight = torch.where(image_keys(call), gain.gather(1, patch), 0.0)
        return LogitEdit(weight[:, None], "absolute")


def token_sets(local: Tensor, summary: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """``LOC`` and ``SUM`` as bool ``(..., n)``, disjoint, from the two scores ``(..., n)``."""
    outliers = summary_tokens(summary)
    best = local.topk(int(ratio * local.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(outliers).scatter(-1, best, True)
    return chosen & ~outliers, outliers


def summary_tokens(score: Tensor) -> Tensor:
    """Bool ``(..., n)``: scores above ``Q3 + 1.5 (Q3 - Q1)``, with linearly interpolated quartiles."""
    low, high = torch.quantile(score.float(), torch.tensor([0.25, 0.75], device=score.device), dim=-1)
    return score > (high + 1.5 * (high - low))[..., None]
