"""Attention to a part of the keys, and moving mass between two parts (VAR, 2025, arXiv 2503.03321), without a map.

For a set X of keys: ``a_X = sum_{j in X} A_ij`` and ``o_X`` the output of a softmax over X alone. Moving the fraction t
of the mass of S to N in proportion to what the keys have is

    o' = o + t a_S (o_N - o_S)

A few query rows are read from their explicit probabilities. Many rows take one fused call for each set: q and k get one
more channel, which adds -4000 to the logits of the other keys. So mask, causal order and grouped heads stay what they
are, rows of the batch may have sets of any size, and nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .edits import Redistribute
from .kernels import attend_with_lse
from .logits import additive, compute_dtype, last_rows_mask, log_sum_exp, plain_logits, softmax, weighted
from .site import AttentionCall, expand_rows

FEW_ROWS = 8
"""Calls of at most this many queries (decode steps) are read from ``B * H * 8 * Nk * 4`` bytes of probabilities."""
HIDDEN = -4000.0
"""What hidden keys have less on their logits: ``exp`` of it is 0 in float32 and float64, and it fits into float16."""
_ALL = torch.empty(0)


def key_mass(call: AttentionCall, keys: Tensor) -> Tensor:
    """``a_X`` of every query row, ``(B, H, Nq)`` in float32 (float64 for float64), in [0, 1].

    Args:
        keys: ``(R, Nk)`` bool. The same tensor object is computed once per call, with the output that
            ``Redistribute`` needs.
    """
    return call.part(keys, _part)[0]


def _part(call: AttentionCall, keys: Tensor) -> tuple[Tensor, Tensor]:
    """``a_X`` ``(B, H, Nq)``; beside it the ``A_ij`` of few rows, 0 elsewhere, ``(B, H, Nq, Nk)``, or the ``o_X`` of
    many ``(B, H, Nq, Dv)``."""
    chosen = expand_rows(keys, call.q.shape[0]).to(call.q.device)  # (1 or B, Nk)
    if _few(call):
        shares = call.part(_ALL, _probabilities) * chosen[:, None, None]
        return shares.sum(-1), shares
    scale, n_k = call.softmax_scale, call.k.shape[2]
    size = math.sqrt(-HIDDEN / scale)
    hide = torch.where(chosen, 0.0, -size).to(call.k.dtype)[:, None, :, None]
    k = torch.cat([call.k, hide.expand(call.k.shape[0], call.k.shape[1], n_k, 1)], dim=-1)
    q = torch.cat([call.q, torch.full_like(call.q[..., :1], size)], dim=-1)
    output, lse = attend_with_lse(q, k, call.v, mask=call.mask, scale=scale, is_causal=call.is_causal)
    mass = torch.exp(lse - call.part(_ALL, _log_sum_exp))
    return torch.where(lse == -math.inf, torch.zeros_like(mass), mass.clamp(max=1)), output


def _few(call: AttentionCall) -> bool:
    return call.q.shape[2] <= FEW_ROWS


def _probabilities(call: AttentionCall, _: Tensor) -> Tensor:
    """``A`` of a call of few queries, ``(B, H, Nq, Nk)``."""
    logits = plain_logits(call.q, call.k, call.softmax_scale)
    mask = last_rows_mask(call, call.q.shape[2])
    return softmax(logits if mask is None else logits + additive(mask, logits.dtype))


def _log_sum_exp(call: AttentionCall, _: Tensor) -> Tensor:
    return log_sum_exp(call, slice(0, call.q.shape[2]))


def redistribute(call: AttentionCall, output: Tensor, edit: Redistribute) -> Tensor:
    """``o + t a_S (o_N - o_S)``; rows with weight 0, or without mass on either set, keep their bits.

    Cost: three fused calls for prompts (each set, and the log-sum-exp of the row); in decode the explicit rows and one
    product of what changes in them with v.
    """
    source, from_source = call.part(edit.source, _part)
    target, to_target = call.part(edit.target, _part)
    weight = expand_rows(edit.weight, output.shape[0]).to(device=output.device, dtype=compute_dtype(output))
    pays, gets = source > 0, target > 0
    if _few(call):
        gain = source / torch.where(gets, target, 1.0)
        moved = weighted(gain[..., None] * to_target - from_source, call.v) * weight[..., None]
    else:
        moved = (weight * source)[..., None] * (to_target.to(weight.dtype) - from_source.to(weight.dtype))
    chosen = (weight != 0) & pays & gets
    return torch.where(chosen[..., None], (output.to(moved.dtype) + moved).to(output.dtype), output)


def refusals(call: AttentionCall, edit: Redistribute) -> list[str]:
    """Why this call cannot carry the edit; empty where it can. Shapes alone, never values."""
    batch, (n_q, n_k), reasons = call.q.shape[0], (call.q.shape[2], call.k.shape[2]), []
    for name, tensor, wanted in (("source", edit.source, n_k), ("target", edit.target, n_k)):
        if tensor.dim() != 2 or tensor.shape[1] != wanted or tensor.shape[0] < 1 or batch % tensor.shape[0]:
            reasons.append(
                f"Redistribute.{name} has shape {tuple(tensor.shape)}; at {call.site.name!r} give (rows, {wanted}), "
                f"where rows divides the batch of {batch}."
            )
    if edit.weight.dim() != 3 or edit.weight.shape[-1] != n_q:
        reasons.append(
            f"Redistribute.weight has shape {tuple(edit.weight.shape)}; at {call.site.name!r} give (rows, heads, "
            f"{n_q})."
        )
    return reasons
