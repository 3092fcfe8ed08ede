"""Pieces of the attention map that are small: chosen rows, own keys, log-sum-exps. Never the whole map.

Notation per head: ``s_ij = scale * q_i.k_j`` plus the mask, ``L_i`` its log-sum-exp over j, ``A_ij = exp(s_ij - L_i)``.
Arithmetic is float32, or float64 where the model runs in it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernels import attend_with_lse
from .site import AttentionCall


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of the arithmetic around kernels."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_query_head(x: Tensor, group: int) -> Tensor:
    """``(B, Hkv, N, D)`` -> ``(B, H, N, D)``: query head h reads head ``h // group``. No copy where group is 1."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a float to be added to logits; True (keep) becomes 0 and False -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def per_query(mask: Tensor | None) -> bool:
    """Whether a mask may differ between queries."""
    return mask is not None and mask.dim() >= 2 and mask.shape[-2] != 1


def plain_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``scale * q.k`` of the given rows and keys, ``(B, H, n, m)``, with k un-repeated. Callers keep n or m small."""
    dtype, (batch, heads, n, dim) = compute_dtype(q), q.shape
    grouped = q.to(dtype).reshape(batch, k.shape[1], heads // k.shape[1] * n, dim)  # a group shares one product
    return (torch.matmul(grouped, k.to(dtype).mT) * scale).view(batch, heads, n, k.shape[2])


def row_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """Attention of a few query rows from their explicit logits: ``(B, H, n, D)`` -> ``(B, H, n, Dv)``.

    Temporary: ``B * H * n * Nk * 4`` bytes. Masks and biases are explicit, so no causal flag can lead it astray. A row
    without a visible key gives zeros.
    """
    dtype = compute_dtype(q)
    logits = plain_logits(q, k, scale)
    logits = logits if mask is None else logits + additive(mask, dtype)
    return weighted(softmax(logits if bias is None else logits + bias.to(dtype)), v)


def softmax(logits: Tensor) -> Tensor:
    """Probabilities of masked logits along the last axis; a row without a visible key gives zeros."""
    peak = logits.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    weights = torch.exp(logits - peak)
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    """``sum_j w_ij v_j`` of a few rows: ``(B, H, n, Nk)`` and v un-repeated -> ``(B, H, n, Dv)``."""
    batch, heads, n, n_k = weights.shape
    grouped = weights.reshape(batch, v.shape[1], heads // v.shape[1] * n, n_k)  # a group shares one product
    return torch.matmul(grouped, v.to(weights.dtype)).view(batch, heads, n, v.shape[3])


def last_rows_mask(call: AttentionCall, n: int) -> Tensor | None:
    """The mask of the last n queries with the causal order in it, so that no flag is needed."""
    n_q, n_k = call.q.shape[2], call.k.shape[2]
    mask = call.mask_rows(slice(n_q - n, n_q))
    if not call.is_causal or n == 1:  # the last query sees every key
        return mask
    keys = torch.arange(n_k, device=call.q.device)
    seen = keys <= (keys[n_k - n :, None])  # (n, Nk)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask + additive(seen, mask.dtype)


_SIGNED, _MASKED, _WEIGHTS = torch.empty(3, 0)
"""Names of what an ``AttentionCall`` keeps of the rows that predict."""


def predicting_rows(call: AttentionCall) -> slice:
    """The query rows that predict a token."""
    total = call.q.shape[2]
    return slice(total - min(call.predicts, total), total)


def predicting_logits(call: AttentionCall, masked: bool = True) -> Tensor:
    """The logits of the rows that predict, ``(B, H, n, Nk)``, behind the mask or before it. Computed once for a call,
    whoever asks."""
    return call.part(_MASKED, _masked) if masked else call.part(_SIGNED, _signed)


def predicting_weights(call: AttentionCall) -> Tensor:
    """The plain attention of the rows that predict, ``(B, H, n, Nk)``. Computed once for a call, whoever asks."""
    return call.part(_WEIGHTS, lambda call, _: softmax(predicting_logits(call)))


def _signed(call: AttentionCall, _: Tensor) -> Tensor:
    return plain_logits(call.q[:, :, predicting_rows(call)], call.k, call.softmax_scale)


def _masked(call: AttentionCall, _: Tensor) -> Tensor:
    return behind_mask(call, predicting_logits(call, masked=False))


def behind_mask(call: AttentionCall, logits: Tensor) -> Tensor:
    """Logits of the last rows ``(B, H, n, Nk)`` with the mask on them."""
    mask = last_rows_mask(call, logits.shape[2])
    if mask is None:
        return logits
    return torch.where(mask, logits, -math.inf) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)


def block_mask(call: AttentionCall, rows: slice, keys: slice) -> Tensor | None:
    """The mask of a block of queries and keys, a view."""
    mask = call.mask_rows(rows)
    return mask if mask is None or mask.shape[-1] == 1 else mask[..., keys]


def own_logits(call: AttentionCall, rows: slice) -> Tensor:
    """``s_ii`` of sites with a key per query, ``(B, H, rows)``; -inf where the own key is masked."""
    dtype = compute_dtype(call.q)
    q = call.q[:, :, rows].to(dtype).unflatten(1, (call.k.shape[1], -1))  # (B, Hkv, G, rows, D)
    own = (q * call.k[:, :, None, rows].to(dtype)).sum(-1).flatten(1, 2) * call.softmax_scale
    if call.mask is None:
        return own
    n = call.q.shape[2]
    diagonal = call.mask.expand(*call.mask.shape[:-2], n, n).diagonal(dim1=-2, dim2=-1)  # views
    return own + additive(diagonal[..., rows], dtype)


def log_sum_exp(call: AttentionCall, rows: slice) -> Tensor:
    """``L_i`` of the chosen rows over their visible keys, ``(B, H, rows)``: a fused call whose output is dropped."""
    q, k, v, mask = call.q[:, :, rows], call.k, call.v, call.mask_rows(rows)
    if call.is_causal:  # the last chosen row sees the keys up to `seen`, so the order stays aligned at the lower right
        seen = slice(0, rows.stop + k.shape[2] - call.q.shape[2])
        k, v = k[:, :, seen], v[:, :, seen]
        mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., seen]
    return attend_with_lse(q, k, v, mask=mask, scale=call.softmax_scale, is_causal=call.is_causal)[1]


def own_weight(call: AttentionCall, rows: slice) -> Tensor:
    """``A_ii`` in [0, 1], ``(B, H, rows)``; 0 for rows that see nothing."""
    lse = log_sum_exp(call, rows)
    weight = torch.exp(own_logits(call, rows) - lse).clamp(0, 1)
    return torch.where(lse == -math.inf, torch.zeros_like(weight), weight)
