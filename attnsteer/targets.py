"""Targets of ``Mix``: what a head would give under another attention map, without building that map.

Notation per head: ``s_ij = scale * q_i.k_j`` (+ mask), ``L_i`` its log-sum-exp over j, ``A = softmax(s)``, ``O = A V``.

| target | output | cost beside the plain call |
|---|---|---|
| ``OwnValue("drop")`` | ``v_i`` | none |
| ``OwnValue("logit")`` | ``g v_i + (1 - g) T_i``, ``g = sigmoid(s_ii - L_i^txt)`` | O(N_img N_txt) |
| ``OwnValue("renorm")`` | ``m v_i + (1 - m) T_i``, ``m = 1 - exp(L_i^txt - L_i)`` | a second call for L |
| ``MeanValue()`` | mean of the visible values | O(N) |
| ``MeanQuery()`` | attention of one query, broadcast | O(N) |
| ``BlurredQuery()`` | attention of blurred queries | a second call |
| ``ArgmaxValue()`` | ``v_argmax`` | logits in chunks of query rows |

``L^txt`` and ``T`` are log-sum-exp and output over the text keys alone. Sources: SoftPAG (Ahn et al. 2025, arXiv 2506.10978),
PAG (Ahn et al. 2024, arXiv 2403.17377), SEG (Hong 2024, arXiv 2408.00760); joint variants as in the SD3 pipelines of diffusers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .edits import ArgmaxValue, BlurredQuery, MeanQuery, MeanValue, Mix, OwnValue, Path, Target, Tokens
from .kernels import attend_with_lse
from .site import AttentionCall

ARGMAX_ROWS = 64
"""Query rows per chunk of ``ArgmaxValue``: its largest temporary holds ``B * H * 64 * Nk * 4`` bytes (28 MB a row for FLUX
at 1024 px)."""
INFINITE_SIGMA = 9999.0
"""Above this the blur of SEG is the plain mean, as in the authors' code."""
PATH_FLOOR = 1e-6
"""Off-diagonal probability of the smoothed identity of the log-linear path, as in the authors' code."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of the arithmetic around kernels: float32, or float64 where the model runs in it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- which rows ----------------------------------------------------------------------------------------------------------
def _span(call: AttentionCall, tokens: Tokens, total: int) -> slice:
    """The slice of one kind of token; self-attention of an image model has image tokens only."""
    if tokens == "all":
        return slice(0, total)
    if call.spans is None or call.site.kind == "self":
        return slice(0, total if tokens == "image" else 0)
    span = call.spans.image if tokens == "image" else call.spans.text
    assert isinstance(span, slice)  # refusals() has been asked
    start, stop, _ = span.indices(total)
    return slice(start, max(start, stop))


def query_rows(call: AttentionCall, tokens: Tokens) -> slice:
    """The query rows that a ``Mix`` changes, as a slice with plain bounds."""
    return _span(call, tokens, call.q.shape[2])


def text_keys(call: AttentionCall) -> slice:
    """The text keys, as a slice with plain bounds; empty for self-attention."""
    return _span(call, "text", call.k.shape[2])


def _span_reasons(call: AttentionCall) -> list[str]:
    name = call.site.name
    if call.site.kind == "self":
        return []
    if call.spans is None:
        return [f"The family of {name!r} has no token layout: use tokens='all' with a target that needs none."]
    spans = (call.spans.image, call.spans.text)
    if not all(isinstance(s, slice) and s.step in (None, 1) for s in spans):
        return [
            f"The image and text tokens of {name!r} differ per row; this edit needs one contiguous slice for all rows."
        ]
    return []


def refusals(call: AttentionCall, edit: Mix) -> list[str]:
    """Why this call cannot carry a ``Mix``; empty where it can. Shapes and layout only, never values."""
    target, name, reasons = edit.target, call.site.name, []
    n_q, n_k = call.q.shape[2], call.k.shape[2]
    own = isinstance(target, OwnValue)
    if own and n_q != n_k:
        reasons.append(
            f"{target} needs a value per query; {name!r} has {n_q} queries and {n_k} keys (self or joint sites only)."
        )
    if edit.path != "linear" and target != OwnValue():
        reasons.append(f"path={edit.path!r} is defined for OwnValue() only, not for {target}: use path='linear'.")
    if isinstance(target, OwnValue) and target.text != "drop" and edit.tokens != "image":
        reasons.append(f"{target} changes image queries only: give Mix(tokens='image').")
    partial = isinstance(target, MeanQuery) and target.tokens != "all"
    if (
        edit.tokens != "all"
        or partial
        or isinstance(target, BlurredQuery)
        or (isinstance(target, OwnValue) and target.text != "drop")
    ):
        reasons += _span_reasons(call)
    if isinstance(target, BlurredQuery) and (call.spans is None or call.spans.grid is None):
        reasons.append(
            f"{target} needs the image grid, which is not known at {name!r}: use MeanQuery() (sigma = infinity)."
        )
    if edit.path == "log_linear" and call.mask is not None and call.mask.is_floating_point() and _per_query(call.mask):
        reasons.append(
            f"path='log_linear' cannot scale the additive {tuple(call.mask.shape)} mask of {name!r}: use 'chord' or 'slerp'."
        )
    return reasons


def _per_query(mask: Tensor | None) -> bool:
    """Whether a mask differs between queries."""
    return mask is not None and mask.dim() >= 2 and mask.shape[-2] != 1


# ---- small pieces --------------------------------------------------------------------------------------------------------
def per_query_head(x: Tensor, group: int) -> Tensor:
    """``(B, Hkv, N, D)`` -> ``(B, H, N, D)``: query head h reads key/value head ``h // group``. A view where group is 1."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def own_value(call: AttentionCall, rows: slice) -> Tensor:
    """``v_i`` of the chosen rows, ``(B, H, rows, Dv)``."""
    return per_query_head(call.v[:, :, rows], call.group)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a float to be added to logits; True (keep) becomes 0 and False -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def row_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """Attention of a few query rows from their explicit logits, in float32: ``(B, H, n, D)`` -> ``(B, H, n, Dv)``.

    Temporary: ``B * H * n * Nk * 4`` bytes. For n = 1 this is cheaper than any backend's launch, and it cannot be led
    astray by a causal flag.
    """
    dtype = compute_dtype(q)
    logits = _logits(q, k, scale)
    logits = logits if mask is None else logits + additive(mask, dtype)
    logits = logits if bias is None else logits + bias.to(dtype)
    peak = logits.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).min)
    weights = torch.exp(logits - peak)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)  # no visible key: zeros
    grouped = weights.unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, n, Nk)
    return torch.matmul(grouped, v.to(dtype)[:, :, None]).flatten(1, 2)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``scale * q.k`` of all given rows, ``(B, H, n, Nk)`` in float32, with k un-repeated."""
    dtype = compute_dtype(q)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, n, D)
    return (torch.matmul(grouped, k.to(dtype)[:, :, None].mT) * scale).flatten(1, 2)


def _sub_mask(call: AttentionCall, rows: slice, keys: slice) -> Tensor | None:
    """The mask of a block of queries and keys (a view)."""
    mask = call.mask_rows(rows)
    if mask is None or mask.shape[-1] == 1:
        return mask
    return mask[..., keys]


def self_logits(call: AttentionCall, rows: slice) -> Tensor:
    """``s_ii`` with the mask of the own key, ``(B, H, rows)`` in float32 (-inf where the own key is masked)."""
    dtype = compute_dtype(call.q)
    q = call.q[:, :, rows].to(dtype).unflatten(1, (call.k.shape[1], -1))  # (B, Hkv, G, rows, D)
    own = (q * call.k[:, :, None, rows].to(dtype)).sum(-1).flatten(1, 2) * call.softmax_scale
    if call.mask is None:
        return own
    mask = call.mask.diagonal(dim1=-2, dim2=-1) if _per_query(call.mask) and call.mask.shape[-1] != 1 else None
    if mask is None:  # the same for all queries, or for all keys
        mask = call.mask.squeeze(-1) if call.mask.shape[-1] == 1 and _per_query(call.mask) else call.mask[..., 0, :]
    mask = mask if mask.shape[-1] == 1 else mask[..., rows]
    return own + additive(mask, dtype)


def log_sum_exp(call: AttentionCall, rows: slice) -> Tensor:
    """``L_i`` over all visible keys, ``(B, H, rows)``: one fused call whose output is dropped."""
    n = call.q.shape[2]
    if call.is_causal and rows != slice(0, n):
        return attend_with_lse(call.q, call.k, call.v, mask=call.mask, scale=call.softmax_scale, is_causal=True)[1][
            :, :, rows
        ]
    q, mask = call.q[:, :, rows], call.mask_rows(rows)
    return attend_with_lse(q, call.k, call.v, mask=mask, scale=call.softmax_scale, is_causal=call.is_causal)[1]


# ---- targets -------------------------------------------------------------------------------------------------------------
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
    assert isinstance(target, ArgmaxValue)
    return _argmax_value(call, rows)


def _own_and_text(call: AttentionCall, renorm: bool, rows: slice) -> Tensor:
    """Own key and text keys only. Text keys honour the mask; a row without visible text gives its own value."""
    text, value = text_keys(call), own_value(call, rows)
    if text.start == text.stop:
        return value
    part, lse = attend_with_lse(
        call.q[:, :, rows],
        call.k[:, :, text],
        call.v[:, :, text],
        mask=_sub_mask(call, rows, text),
        scale=call.softmax_scale,
    )
    own = -torch.expm1(lse - log_sum_exp(call, rows)) if renorm else torch.sigmoid(self_logits(call, rows) - lse)
    own = torch.where(lse == -math.inf, torch.ones_like(own), own.clamp(0, 1))[..., None]
    return own * value + (1 - own) * part


def _mean_value(call: AttentionCall, rows: slice) -> Tensor:
    """Attention of a zero query: every visible key weighs the same (an additive mask keeps its finite values)."""
    if call.mask is None and not call.is_causal:
        return per_query_head(call.v.to(compute_dtype(call.v)).mean(dim=2, keepdim=True), call.group)
    return _one_query(call, torch.zeros_like(call.q[:, :, :1]), rows)


def _mean_query(call: AttentionCall, tokens: Tokens, rows: slice) -> Tensor:
    """Attention of the mean query over ``tokens``."""
    span = query_rows(call, tokens)
    span = query_rows(call, "all") if span.start == span.stop else span
    mean = call.q[:, :, span].to(compute_dtype(call.q)).mean(dim=2, keepdim=True)
    return _one_query(call, mean, rows)


def _one_query(call: AttentionCall, query: Tensor, rows: slice) -> Tensor:
    """Attention of the same query in every row. One row is enough unless a mask or causal order differs per row."""
    if _per_query(call.mask) or call.is_causal:
        return call.kernel(query.to(call.q.dtype).expand_as(call.q).contiguous(), call.k, call.v)[:, :, rows]
    return row_attention(query, call.k, call.v, call.softmax_scale, call.mask)


def _blurred_query(call: AttentionCall, sigma: float, rows: slice) -> Tensor:
    """Attention of the blurred image queries; text queries stay as they are."""
    assert call.spans is not None and call.spans.grid is not None
    frames, height, width = call.spans.grid
    if sigma == 0:
        return call.output[:, :, rows]
    image = query_rows(call, "image")
    if sigma > INFINITE_SIGMA and frames == 1 and rows == image:
        return _mean_query(call, "image", rows)
    queries = call.q[:, :, image].to(compute_dtype(call.q)).unflatten(2, (frames, height, width))  # (B, H, T, h, w, D)
    if sigma > INFINITE_SIGMA:
        queries = queries.mean(dim=(3, 4), keepdim=True).expand_as(queries)
    else:
        queries = blur(blur(queries, 3, sigma), 4, sigma)
    blurred = queries.flatten(2, 4).to(call.q.dtype)
    q = torch.cat([call.q[:, :, : image.start], blurred, call.q[:, :, image.stop :]], dim=2)
    return call.kernel(q, call.k, call.v)[:, :, rows]


def kernel_size(sigma: float, side: int) -> int:
    """Taps of the Gaussian along an axis of ``side`` tokens: odd, about 6 sigma, never more than ``side`` (+1 if even)."""
    wanted = math.ceil(6 * sigma)
    return min(wanted + 1 - wanted % 2, side - (side % 2 - 1))


def blur(x: Tensor, dim: int, sigma: float) -> Tensor:
    """Gaussian blur along one axis with reflect padding (the 2-D kernel of SEG is the outer product of two of these)."""
    side = x.shape[dim]
    taps = kernel_size(sigma, side)
    reach = taps // 2
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets.to(x.dtype) / sigma) ** 2)
    weights = weights / weights.sum()
    places = torch.arange(side, device=x.device)
    source = (places[:, None] + torch.arange(-reach, reach + 1, device=x.device)).abs()
    source = (side - 1) - ((side - 1) - source).abs()  # mirrored at both edges, (side, taps)
    matrix = torch.zeros(side, side, dtype=x.dtype, device=x.device).scatter_add(1, source, weights.expand(side, -1))
    return torch.matmul(x.movedim(dim, -1), matrix.T).movedim(-1, dim)


def _argmax_value(call: AttentionCall, rows: slice) -> Tensor:
    """``v`` at the strongest visible key, by chunks of ``ARGMAX_ROWS`` query rows."""
    n_q, n_k, group = call.q.shape[2], call.k.shape[2], call.group
    keys = torch.arange(n_k, device=call.q.device)
    parts = []
    for start in range(rows.start, rows.stop, ARGMAX_ROWS):
        chunk = slice(start, min(start + ARGMAX_ROWS, rows.stop))
        logits = _logits(call.q[:, :, chunk], call.k, call.softmax_scale)
        mask = call.mask_rows(chunk)
        logits = logits if mask is None else logits + additive(mask, logits.dtype)
        if call.is_causal:
            last = torch.arange(chunk.start, chunk.stop, device=keys.device) + (n_k - n_q)
            logits = logits.masked_fill(keys > last[:, None], -math.inf)
        best = logits.argmax(dim=-1).unflatten(1, (-1, group)).flatten(2, 3)  # (B, Hkv, G * chunk)
        chosen = call.v.gather(2, best[..., None].expand(-1, -1, -1, call.v.shape[-1]))
        parts.append(chosen.unflatten(2, (group, -1)).flatten(1, 2))
    return torch.cat(parts, dim=2)


# ---- non-linear paths from A to the identity -----------------------------------------------------------------------------
def path_output(call: AttentionCall, path: Path, weight: Tensor, rows: slice) -> Tensor:
    """The output at ``weight`` u (``(1 or B, H, 1, 1)``) along a path from A (u = 0) to the identity (u = 1); t = 1 - u.

    * ``chord``: ``((1-t) I + t sqrt(A))^2``, rows normalised.
    * ``slerp``: great circle between ``sqrt(A)`` and the identity on the sphere of square roots.
    * ``log_linear``: ``p^(1-t) A^t`` normalised, with p the identity smoothed by 1e-6; reaches p, not the identity, at u = 1.

    All but the own weight ``a_i = exp(s_ii - L_i)`` scales with A, so only ``a_i`` is needed: one more fused call for L.
    """
    if path == "log_linear":
        return _log_linear(call, weight, rows)
    dtype, t = weight.dtype, 1 - weight
    value = own_value(call, rows).to(dtype)
    own = torch.exp(self_logits(call, rows) - log_sum_exp(call, rows)).clamp(0, 1)[..., None].to(dtype)  # a_i
    if path == "chord":
        identity, plain = 1 - t, t
    else:
        angle = torch.arccos(own.sqrt())
        sine = torch.sin(angle).clamp_min(1e-12)
        small = angle < 1e-4  # the authors' code goes straight there
        identity = torch.where(small, 1 - t, torch.sin((1 - t) * angle) / sine)
        plain = torch.where(small, t.expand_as(angle), torch.sin(t * angle) / sine)
    diagonal = (identity + plain * own.sqrt()) ** 2
    total = plain**2 * (1 - own) + diagonal
    others = call.output[:, :, rows].to(dtype) - own * value
    return (plain**2 * others + diagonal * value) / total


def _log_linear(call: AttentionCall, weight: Tensor, rows: slice) -> Tensor:
    """Plain attention at t times the logits, then the own key re-weighted by ``(p_ii / p_ij)^(1-t)``."""
    dtype, t = weight.dtype, 1 - weight
    n = call.k.shape[2]
    mask = call.mask
    if mask is not None and mask.is_floating_point():
        mask = torch.where(mask == -math.inf, mask.to(dtype), t * mask.to(dtype))
    q = call.q.to(dtype) * t
    part, lse = attend_with_lse(
        q, call.k.to(dtype), call.v.to(dtype), mask=mask, scale=call.softmax_scale, is_causal=call.is_causal
    )
    ratio = (1 - PATH_FLOOR * (n - 1) + PATH_FLOOR) / PATH_FLOOR
    own = self_logits(call, rows)
    own = torch.where(own == -math.inf, own, t[..., 0] * own)
    gain = torch.exp(own - lse[:, :, rows])[..., None] * (ratio ** (1 - t) - 1)
    return (part[:, :, rows] + gain * own_value(call, rows).to(dtype)) / (1 + gain)
