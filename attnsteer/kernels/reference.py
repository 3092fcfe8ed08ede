"""The explicit map, in float64: the oracle of every fused form, and nothing that a model run should call.

Memory: ``B * H * Nq * Nk * 8`` bytes, several times over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def class_mask(table: Tensor, q_class: Tensor, k_class: Tensor) -> Tensor:
    """The explicit mask ``(R, 1, Nq, Nk)`` of classes ``(R, Nq)`` and ``(R, Nk)`` under a table ``(R or 1, C, C)``."""
    table = table.expand(q_class.shape[0], -1, -1)
    return torch.stack([t[a][:, b] for t, a, b in zip(table, q_class, k_class, strict=True)])[:, None]


def segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Sequence[Sequence[int]],
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    keys: Tensor | None = None,
    queries: Tensor | None = None,
    mask: Tensor | None = None,
    lent_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One explicit softmax per row over its own keys and those of other rows, ``(B, H, Nq, Dv)`` float64.

    Args:
        source, weight, bias, keys, queries: as in ``edits.Segments``, one entry per row of the batch.
        mask: on the own keys. lent_mask: ``(B, 1 or H, 1, Nk)`` on the keys that a row lends.
    """
    own = logits(q, k, mask=mask, scale=scale)
    values = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    rows = []
    for b, entry in enumerate(source):
        columns, vectors = [own[b]], [values[b]]
        for s, j in enumerate(entry):
            if j < 0:
                continue
            lent = logits(q[b : b + 1], k[j : j + 1], mask=None if lent_mask is None else lent_mask[j], scale=scale)[0]
            chosen = torch.arange(k.shape[2], device=q.device) if keys is None else keys[b, s]
            part = lent[:, :, chosen] + weight[b].double().log()[:, None, None]
            part = part if bias is None else part + bias[b, s].double()
            hidden = torch.zeros_like(part[0], dtype=torch.bool) if queries is None else ~queries[b, s][:, None]
            columns.append(part.masked_fill(hidden, -math.inf))
            vectors.append(values[j][:, chosen])
        rows.append(torch.softmax(torch.cat(columns, dim=-1), dim=-1) @ torch.cat(vectors, dim=1))
    return torch.stack(rows)


def reasons(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> list[str]:
    """Always empty: the oracle takes everything."""
    return []
