"""Targets of ``Mix``: what a head would give under another attention map, without building that map.

| target | output (notation: ``logits.py``) | cost beside the plain call |
|---|---|---|
| ``OwnValue("drop")`` | ``v_i`` | none |
| ``OwnValue("logit")`` | ``g v_i + (1 - g) T_i``, ``g = sigmoid(s_ii - L_i^txt)`` | O(N_img N_txt) |
| ``OwnValue("renorm")`` | ``m v_i + (1 - m) T_i``, ``m = 1 - exp(L_i^txt - L_i)`` | a second call, for L |
| ``MeanValue()`` | mean of the visible values | O(N) |
| ``MeanQuery()`` | attention of one query, broadcast | O(N) |
| ``BlurredQuery()`` | attention of blurred queries | a second call |
| ``ArgmaxValue()`` | ``v`` at the strongest key | logits in chunks of query rows |
| ``RowKeys()`` | attention to other rows' keys, blended per query | one call per source of the reading rows |

``T`` and ``L^txt`` are output and log-sum-exp over the text keys alone. Sources: SoftPAG (Ahn et al. 2025, arXiv
2506.10978), PAG (Ahn et al. 2024, arXiv 2403.17377), SEG (Hong 2024, arXiv 2408.00760); the joint variant "logit" is
that of the SD3 PAG pipelines of diffusers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .edits import BlurredQuery, MeanQuery, MeanValue, Mix, OwnValue, Path, RowKeys, Target, Tokens
from .kernels import attend_with_lse
from .logits import (
    additive,
    block_mask,
    compute_dtype,
    log_sum_exp,
    own_logits,
    own_weight,
    per_query,
    per_query_head,
    plain_logits,
    row_attention,
)
from .segments import row_keys, source_refusals
from .site import AttentionCall

ARGMAX_ROWS = 64
"""Query rows per chunk of ``ArgmaxValue``: its largest temporary holds ``B * H * 64 * Nk * 4`` bytes (28 MB for one row
of FLUX at 1024 px)."""
INFINITE_SIGMA = 9999.0
"""Above this the blur of SEG is the plain mean, as in the authors' code."""
PATH_FLOOR = 1e-6
"""Off-diagonal probability of the smoothed identity of the log-linear path, as in the authors' code."""


# ---- which rows ------------------------------------------------------------------------------------------------------
def query_rows(call: AttentionCall, tokens: Tokens) -> slice:
    """The query rows of one kind of token, as a slice with plain bounds."""
    n = call.q.shape[2]
    if call.site.kind in ("self", "cross") and tokens != "all":  # image queries only
        return slice(0, n if tokens == "image" else 0)
    return _span(call, tokens, n)


def text_keys(call: AttentionCall) -> slice:
    """The text keys, as a slice with plain bounds; empty for self-attention."""
    return slice(0, 0) if call.site.kind == "self" else _span(call, "text", call.k.shape[2])


def _span(call: AttentionCall, tokens: Tokens, total: int) -> slice:
    if tokens == "all" or call.spans is None:
        return slice(0, total)
    span = call.spans.image if tokens == "image" else call.spans.text
    if not isinstance(span, slice):
        raise TypeError(f"{tokens} tokens of {call.site.name!r} differ per row")  # refusals() was not asked
    start, stop, _ = span.indices(total)
    return slice(start, max(start, stop))


def refusals(call: AttentionCall, edit: Mix) -> list[str]:
    """Why this call cannot carry a ``Mix``; empty where it can. Shapes and layout only, never values."""
    target, name, reasons = edit.target, call.site.name, []
    n_q, n_k = call.q.shape[2], call.k.shape[2]
    joint_variant = isinstance(target, OwnValue) and target.text != "drop"
    blurred = isinstance(target, BlurredQuery)
    if isinstance(target, OwnValue) and n_q != n_k:
        reasons.append(
            f"{target} needs a key per query; {name!r} has {n_q} queries and {n_k} keys: choose self or joint sites."
        )
    if edit.path != "linear" and target != OwnValue():
        reasons.append(f"path={edit.path!r} is defined for OwnValue() only, not for {target}: use path='linear'.")
    if isinstance(target, RowKeys):
        reasons += _lending_reasons(call, target)
    if joint_variant and edit.tokens != "image":
        reasons.append(f"{target} changes image queries only: give Mix(tokens='image').")
    if joint_variant and call.is_causal:
        reasons.append(f"{target} has no causal form, and {name!r} is causal: use OwnValue().")
    if joint_variant or blurred or edit.tokens != "all" or (isinstance(target, MeanQuery) and target.tokens != "all"):
        reasons += _layout_reasons(call)
    if blurred and (call.spans is None or call.spans.grid is None):
        reasons.append(
            f"{target} needs the image grid, unknown at {name!r}: use MeanQuery(), which is sigma = infinity."
        )
    if edit.path == "log_linear" and per_query(call.mask) and call.mask is not None and call.mask.is_floating_point():
        shape = tuple(call.mask.shape)
        reasons.append(f"path='log_linear' cannot scale the additive {shape} mask of {name!r}: use 'chord' or 'slerp'.")
    return reasons


def _lending_reasons(call: AttentionCall, target: RowKeys) -> list[str]:
    """Why other rows cannot lend their keys here."""
    reasons = source_refusals(call, target.source, "RowKeys.source")
    wanted = (len(target.source[0]) if target.source else 0, call.q.shape[2])
    shape = tuple(target.share.shape)
    if shape not in ((1, *wanted), (call.q.shape[0], *wanted)):
        reasons.append(
            f"RowKeys.share has shape {shape}; at {call.site.name!r} give ({call.q.shape[0]} or 1, {wanted[0]}, "
            f"{wanted[1]})."
        )
    if call.is_causal or per_query(call.mask):
        reasons.append(f"{call.site.name!r} has a mask per query or causal order, which says nothing about other rows.")
    return reasons


def _layout_reasons(call: AttentionCall) -> list[str]:
    """Why image and text queries cannot be told apart by one slice."""
    name, kind = call.site.name, call.site.kind
    if kind in ("self", "cross"):
        return []
    if call.spans is None:
        return [f"The token layout of {name!r} is unknown: use tokens='all' and a target that needs no layout."]
    spans = (call.spans.image, call.spans.text)
    if not all(isinstance(s, slice) and s.step in (None, 1) for s in spans):
        return [f"Image and text tokens of {name!r} differ per row; this edit needs one slice that holds for all rows."]
    if call.q.shape[2] != call.k.shape[2]:
        return [
            f"The queries of {name!r} are not its keys, so its image and text queries are unknown: use tokens='all'."
        ]
    return []


# ---- targets ---------------------------------------------------------------------------------------------------------
def target_output(call: AttentionCall, target: Target, rows: slice) -> Tensor:
    """The output of a target on the chosen query rows, broadcastable to ``(B, H, rows, Dv)``."""
    if isinstance(target, OwnValue):
        return own_value(call, rows) if target.text == "drop" else _own_and_text(call, target.text == "renorm", rows)
    if isinstance(target, MeanValue):
        return _mean_value(call, rows)
    if isinstance(target, MeanQuery):
        return _mean_query(call, target.tokens, rows)
    if isinstance(target, BlurredQuery):
        return _blurred_query(call, target.sigma, rows)
    if isinstance(target, RowKeys):
        return row_keys(call, target)[:, :, rows]
    return _argmax_value(call, rows)


def own_value(call: AttentionCall, rows: slice) -> Tensor:
    """``v_i`` of the chosen rows, ``(B, H, rows, Dv)``. The own key counts as visible whatever the mask says."""
    return per_query_head(call.v[:, :, rows], call.group)


def _own_and_text(call: AttentionCall, renorm: bool, rows: slice) -> Tensor:
    """Own key and text keys only. Masks hold as in the plain call; a row without visible text gives its own value."""
    text, value = text_keys(call), own_value(call, rows)
    if text.start == text.stop:
        return value
    q, k, v = call.q[:, :, rows], call.k[:, :, text], call.v[:, :, text]
    part, lse = attend_with_lse(q, k, v, mask=block_mask(call, rows, text), scale=call.softmax_scale)
    own = -torch.expm1(lse - log_sum_exp(call, rows)) if renorm else torch.sigmoid(own_logits(call, rows) - lse)
    own = torch.where(lse == -math.inf, torch.ones_like(own), own.clamp(0, 1))[..., None]
    return own * value + (1 - own) * part


def _mean_value(call: AttentionCall, rows: slice) -> Tensor:
    """Attention of a zero query: every visible key weighs the same (an additive mask keeps its finite values)."""
    if call.mask is None and not call.is_causal:
        return per_query_head(call.v.to(compute_dtype(call.v)).mean(dim=2, keepdim=True), call.group)
    return _one_query(call, torch.zeros_like(call.q[:, :, :1]), rows)


def _mean_query(call: AttentionCall, tokens: Tokens, rows: slice) -> Tensor:
    """Attention of the mean query over ``tokens``; over all of them where there is none of that kind."""
    span = query_rows(call, tokens)
    chosen = call.q if span.start == span.stop else call.q[:, :, span]
    return _one_query(call, chosen.to(compute_dtype(call.q)).mean(dim=2, keepdim=True), rows)


def _one_query(call: AttentionCall, query: Tensor, rows: slice) -> Tensor:
    """Attention of the same query in every row. One row is enough unless a mask or causal order differs per row."""
    if per_query(call.mask) or call.is_causal:
        return call.kernel(query.to(call.q.dtype).expand_as(call.q).contiguous(), call.k, call.v)[:, :, rows]
    return row_attention(query, call.k, call.v, call.softmax_scale, call.mask)


def _argmax_value(call: AttentionCall, rows: slice) -> Tensor:
    """``v`` at the strongest visible key, by chunks of ``ARGMAX_ROWS`` query rows."""
    n_q, n_k, group = call.q.shape[2], call.k.shape[2], call.group
    keys = torch.arange(n_k, device=call.q.device)
    parts = []
    for start in range(rows.start, rows.stop, ARGMAX_ROWS):
        chunk = slice(start, min(start + ARGMAX_ROWS, rows.stop))
        logits = plain_logits(call.q[:, :, chunk], call.k, call.softmax_scale)
        mask = call.mask_rows(chunk)
        logits = logits if mask is None else logits + additive(mask, logits.dtype)
        if call.is_causal:
            last = torch.arange(chunk.start, chunk.stop, device=keys.device) + (n_k - n_q)
            logits = logits.masked_fill(keys > last[:, None], -math.inf)
        best = logits.argmax(dim=-1).unflatten(1, (-1, group)).flatten(2, 3)  # (B, Hkv, G * chunk)
        chosen = call.v.gather(2, best[..., None].expand(-1, -1, -1, call.v.shape[-1]))
        parts.append(chosen.unflatten(2, (group, -1)).flatten(1, 2))
    return torch.cat(parts, dim=2)


# ---- blur (SEG) ------------------------------------------------------------------------------------------------------
def _blurred_query(call: AttentionCall, sigma: float, rows: slice) -> Tensor:
    """Attention of the blurred image queries; text queries stay as they are, frames are blurred one by one."""
    if sigma == 0:
        return call.output[:, :, rows]
    image = query_rows(call, "image")
    if sigma > INFINITE_SIGMA and rows == image and _grid(call)[0] == 1:
        return _mean_query(call, "image", rows)
    blurred = _blur_grid(call.q[:, :, image], _grid(call), sigma)
    q = torch.cat([call.q[:, :, : image.start], blurred, call.q[:, :, image.stop :]], dim=2)
    return call.kernel(q, call.k, call.v)[:, :, rows]


def _grid(call: AttentionCall) -> tuple[int, int, int]:
    if call.spans is None or call.spans.grid is None:
        raise TypeError(f"the image grid of {call.site.name!r} is unknown")  # refusals() was not asked
    return call.spans.grid


def _blur_grid(q: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """Image queries ``(B, H, T*h*w, D)`` blurred over ``(h, w)``, in the dtype they came in."""
    x = q.to(compute_dtype(q)).unflatten(2, grid)  # (B, H, T, h, w, D)
    if sigma > INFINITE_SIGMA:
        x = x.mean(dim=(3, 4), keepdim=True).expand_as(x)
    else:
        x = blur(blur(x, 3, sigma), 4, sigma)
    return x.flatten(2, 4).to(q.dtype)


def kernel_size(sigma: float, side: int) -> int:
    """Taps of the Gaussian along an axis of ``side`` tokens: odd, about 6 sigma, at most ``side`` (+1 where even)."""
    wanted = math.ceil(6 * sigma)
    return min(wanted + 1 - wanted % 2, side - (side % 2 - 1))


def blur(x: Tensor, dim: int, sigma: float) -> Tensor:
    """Gaussian blur along one axis with reflect padding, as a ``side x side`` matrix.

    The 2-D kernel of SEG is the outer product of two of these; kernel sizes are clipped per axis.
    """
    side = x.shape[dim]
    reach = kernel_size(sigma, side) // 2
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets.to(x.dtype) / sigma) ** 2)
    source = (torch.arange(side, device=x.device)[:, None] + offsets).abs()
    source = (side - 1) - ((side - 1) - source).abs()  # mirrored at both edges, (side, taps)
    matrix = torch.zeros(side, side, dtype=x.dtype, device=x.device)
    matrix = matrix.scatter_add(1, source, (weights / weights.sum()).expand(side, -1))
    return torch.matmul(x.movedim(dim, -1), matrix.T).movedim(-1, dim)


# ---- non-linear paths from A to the identity -------------------------------------------------------------------------
def path_output(call: AttentionCall, path: Path, weight: Tensor, rows: slice) -> Tensor:
    """The output at ``weight`` u along a path from A (u = 0) to the identity (u = 1), with t = 1 - u.

    * ``chord``: ``((1-t) I + t sqrt(A))^2``, rows normalised.
    * ``slerp``: the great circle between ``sqrt(A)`` and the identity on the sphere of square roots.
    * ``log_linear``: ``p^(1-t) A^t``, normalised; p is the identity smoothed by 1e-6, and u = 1 gives p.

    All but the own weight ``A_ii`` scales with A, so the output follows from O, v and ``A_ii``: one more fused call.

    Args:
        weight: ``(1 or B, H, 1, 1)`` in float32 or float64, u in [0, 1].
    """
    if path == "log_linear":
        return _log_linear(call, weight, rows)
    dtype, t = weight.dtype, 1 - weight
    value = own_value(call, rows).to(dtype)
    own = own_weight(call, rows)[..., None].to(dtype)
    if path == "chord":
        identity, plain = 1 - t, t
    else:
        angle = torch.arccos(own.sqrt())
        straight = angle < 1e-4  # the chord, as in the authors' code
        sine = torch.sin(angle).clamp_min(1e-12)
        identity = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
        plain = torch.where(straight, t, torch.sin(t * angle) / sine)
    diagonal = (identity + plain * own.sqrt()) ** 2
    total = plain**2 * (1 - own) + diagonal
    others = call.output[:, :, rows].to(dtype) - own * value
    return (plain**2 * others + diagonal * value) / total


def _log_linear(call: AttentionCall, weight: Tensor, rows: slice) -> Tensor:
    """Plain attention at t times the logits, then the own key re-weighted by ``(p_ii / p_ij)^(1-t)``."""
    dtype, t, mask = weight.dtype, 1 - weight, call.mask
    if mask is not None and mask.is_floating_point():
        mask = torch.where(mask == -math.inf, mask.to(dtype), t * mask.to(dtype))
    q, k, v = call.q.to(dtype) * t, call.k.to(dtype), call.v.to(dtype)
    part, lse = attend_with_lse(q, k, v, mask=mask, scale=call.softmax_scale, is_causal=call.is_causal)
    part, lse = part[:, :, rows], lse[:, :, rows]
    own = own_logits(call, rows)
    own = torch.where((own == -math.inf) | (lse == -math.inf), -math.inf, t[..., 0] * own - lse)[..., None]
    ratio = (1 - PATH_FLOOR * (call.k.shape[2] - 1) + PATH_FLOOR) / PATH_FLOOR
    gain = torch.exp(own) * (ratio ** (1 - t) - 1)
    return (part + gain * own_value(call, rows).to(dtype)) / (1 + gain)
