"""The explicit map, in float64: the oracle of every fused form, and nothing that a model run should call.

Memory: ``B * H * Nq * Nk * 8`` bytes, several times over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logits(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False
) -> Tensor:
    """``scale * q k^T`` plus mask and causal order, ``(B, H, Nq, Nk)`` float64."""
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.double() @ k.double().repeat_interleave(group, dim=1).mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        n_q, n_k = scores.shape[-2:]
        hidden = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).triu(n_k - n_q + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores


def probabilities(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False
) -> Tensor:
    """The attention map, ``(B, H, Nq, Nk)`` float64; rows without a visible key are zero."""
    return torch.softmax(logits(q, k, mask=mask, scale=scale, is_causal=is_causal), dim=-1).nan_to_num(0.0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, Nq, Dv)`` in the dtype of q and log-sum-exp ``(B, H, Nq)``."""
    group = q.shape[1] // k.shape[1]
    scores = logits(q, k, mask=mask, scale=scale, is_causal=is_causal)
    output = torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v.double().repeat_interleave(group, dim=1)
    lse = scores.logsumexp(dim=-1)
    return output.to(q.dtype), lse if q.dtype == torch.float64 else lse.float()


def reasons(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> list[str]:
    """Always empty: the oracle takes everything."""
    return []
