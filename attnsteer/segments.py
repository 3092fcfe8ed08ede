"""More keys for chosen rows, merged by their log-sum-exps: the lowering of ``Segments`` and of the target ``RowKeys``.

Each segment is one fused call of the rows that have it, over the keys that it takes; the parts are merged in float32.
Rows that read nothing are in none of these calls. Beside them: one more call of the reading rows on their own keys, for
the log-sum-exp that the user's kernel does not give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .classes import log_sum_exp_rows
from .edits import RowKeys, Segments, Sources
from .kernels import attend_with_lse, merge
from .logits import additive, compute_dtype, per_query
from .site import AttentionCall, expand_rows


def refusals(call: AttentionCall, edit: Segments) -> list[str]:
    """Why this call cannot carry these segments; empty where it can. Shapes and layout only, never values."""
    name, reasons = call.site.name, source_refusals(call, edit.source, "Segments.source")
    batch, wanted = call.q.shape[0], len(edit.source[0]) if edit.source else 0
    own = edit.keys.shape[-1] if edit.keys is not None else call.k.shape[2]
    for what, tensor, last in (
        ("bias", edit.bias, own),
        ("keys", edit.keys, own),
        ("positions", edit.positions, own),
        ("queries", edit.queries, call.q.shape[2]),
    ):
        if tensor is not None and tuple(tensor.shape) not in ((batch, wanted, last), (1, wanted, last)):
            reasons.append(
                f"Segments.{what} has shape {tuple(tensor.shape)}; at {name!r} give ({batch} or 1, {wanted}, {last})."
            )
    if call.is_causal or per_query(call.mask):
        reasons.append(f"{name!r} has a mask per query or causal order, which says nothing about keys of other rows.")
    if edit.positions is not None and (call.spans is None or call.spans.rotary is None):
        reasons.append(f"The rotary positions of {name!r} are unknown, so keys cannot be moved there.")
    return reasons


def source_refusals(call: AttentionCall, source: Sources, name: str) -> list[str]:
    """Why rows cannot be read in this batch."""
    batch, lenders = call.q.shape[0], call.lender.k.shape[0]
    lengths = sorted({len(entry) for entry in source})
    if len(source) != batch or len(lengths) != 1:
        return [f"{name} has {len(source)} rows of lengths {lengths}; the batch has {batch}: one entry, one length."]
    wrong = [row for entry in source for row in entry if not -1 <= row < lenders]
    return [f"{name} reads row {wrong[0]}; there are 0 to {lenders - 1} (-1: none)."] if wrong else []


def add_segments(call: AttentionCall, steered: AttentionCall, output: Tensor, edits: Sequence[Segments]) -> Tensor:
    """The output after one softmax over the own keys and all segments.

    Args:
        call: the kernel call as the model made it: what other rows lend.
        steered: the call with masks and biases: what the own keys give.
        output: the head outputs of ``steered`` so far.
        edits: all segments of the call at once; one softmax holds them all.
    """
    reading = sorted({b for edit in edits for b, entry in enumerate(edit.source) if max(entry, default=-1) >= 0})
    if not reading:
        return output
    batch, device = output.shape[0], output.device
    rows = _index(reading, batch, device)
    total = log_sum_exp_rows(steered, rows).to(compute_dtype(output))
    merged, seen = _take(output, rows).to(total.dtype), torch.zeros_like(total, dtype=torch.bool)
    for edit in edits:
        for s in range(len(edit.source[0])):
            readers = [b for b in reading if edit.source[b][s] >= 0]
            if not readers:
                continue
            part, lse = _segment(call, edit, s, readers)
            place = _index([reading.index(b) for b in readers], len(reading), device)
            both, union = merge([_take(merged, place), part.to(total.dtype)], [_take(total, place), lse])
            seen = _put(seen, place, _take(seen, place) | (lse > -torch.inf))
            merged, total = _put(merged, place, both), _put(total, place, union)
    merged = torch.where(seen[..., None], merged.to(output.dtype), _take(output, rows))
    return _put(output, rows, merged)


def _segment(call: AttentionCall, edit: Segments, s: int, readers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the readers' queries over their s-th segment; -inf where a query does not see it."""
    batch, device = call.q.shape[0], call.q.device
    rows = _index(readers, batch, device)
    lent = torch.tensor([edit.source[b][s] for b in readers]).to(device, non_blocking=True)
    lender = call.lender
    q, k, v, mask = _take(call.q, rows), lender.k[lent], lender.v[lent], _lent_mask(lender, lent)

    def own(x: Tensor | None) -> Tensor | None:
        return None if x is None else _take(expand_rows(x.to(device), batch).expand(batch, -1, -1)[:, s], rows)

    keys, positions, bias, queries = own(edit.keys), own(edit.positions), own(edit.bias), own(edit.queries)
    if keys is not None:
        k, v = (_take_keys(x, keys) for x in (k, v))
        mask = mask if mask is None or mask.shape[-1] == 1 else _take_keys(mask.mT, keys).mT
    if positions is not None:
        k = _moved(call, k, keys, positions)
    if bias is not None:
        bias = bias.to(compute_dtype(q))[:, None, None]
        mask = bias if mask is None else additive(mask, bias.dtype) + bias
    part, lse = attend_with_lse(q, k, v, mask=mask, scale=call.softmax_scale)
    weight = _take(expand_rows(edit.weight, batch).to(lse).expand(batch, -1), rows)
    lse = lse + weight.log()[..., None]
    return part, lse if queries is None else torch.where(queries[:, None], lse, -torch.inf)


def _lent_mask(call: AttentionCall, rows: Tensor) -> Tensor | None:
    """The key mask of the rows that are read, ``(n, 1 or H, 1, Nk or 1)``."""
    if call.mask is None:
        return None
    mask = call.mask.reshape((1,) * (4 - call.mask.dim()) + call.mask.shape)
    return mask[rows] if mask.shape[0] > 1 else mask.expand(len(rows), -1, -1, -1)


def _take_keys(x: Tensor, keys: Tensor) -> Tensor:
    """Keys ``(n, M)`` of ``(n, H, Nk, D)``, ``(n, H, M, D)``."""
    return x.gather(2, keys[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))


def _moved(call: AttentionCall, k: Tensor, keys: Tensor | None, positions: Tensor) -> Tensor:
    """Keys turned from the angles of their own tokens to those of others: ``R(p') R(p)^-1 k``, pairs of channels."""
    assert call.spans is not None and call.spans.rotary is not None
    cos, sin = (x.to(device=k.device, dtype=compute_dtype(k)) for x in call.spans.rotary)  # (N, D)
    here = torch.arange(k.shape[2], device=k.device)[None] if keys is None else keys
    turn_cos = cos[positions] * cos[here] + sin[positions] * sin[here]
    turn_sin = sin[positions] * cos[here] - cos[positions] * sin[here]
    wide = k.to(turn_cos.dtype)
    real, imaginary = wide.unflatten(-1, (-1, 2)).unbind(-1)
    crossed = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (wide * turn_cos[:, None] + crossed * turn_sin[:, None]).to(k.dtype)


# ---- the target RowKeys ----------------------------------------------------------------------------------------------
def row_keys(call: AttentionCall, target: RowKeys) -> Tensor:
    """The blend of attentions to other rows' keys, by the user's kernel, ``(B, H, Nq, Dv)``; plain without share."""
    batch, device = call.q.shape[0], call.q.device
    share = shares(call, target)
    whole = share.sum(1)
    blend = torch.zeros_like(call.output, dtype=share.dtype)
    for s in range(share.shape[1]):
        readers = [b for b, entry in enumerate(target.source) if entry[s] >= 0]
        if not readers:
            continue
        rows = _index(readers, batch, device)
        lent = torch.tensor([target.source[b][s] for b in readers]).to(device, non_blocking=True)
        lender = call.lender
        part = call.kernel(_take(call.q, rows), lender.k[lent], lender.v[lent], mask=_lent_mask(lender, lent))
        fraction = _take(share[:, s] / whole.clamp_min(torch.finfo(share.dtype).tiny), rows)[:, None, :, None]
        blend = _put(blend, rows, _take(blend, rows) + fraction * part.to(share.dtype))
    return torch.where((whole > 0)[:, None, :, None], blend, call.output.to(share.dtype))


def shares(call: AttentionCall, target: RowKeys) -> Tensor:
    """``(B, S, Nq)``, 0 where a row has no source."""
    share = expand_rows(target.share.to(call.q.device, compute_dtype(call.q)), call.q.shape[0])
    there = torch.tensor([[row >= 0 for row in entry] for entry in target.source]).to(share.device, non_blocking=True)
    return torch.where(there[..., None], share, 0.0)


# ---- rows ------------------------------------------------------------------------------------------------------------
def _index(rows: Sequence[int], batch: int, device: torch.device) -> Tensor | None:
    """Rows as an index; None for all of them in order, which needs no copy."""
    if list(rows) == list(range(batch)):
        return None
    return torch.tensor(list(rows)).to(device, non_blocking=True)


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _put(x: Tensor, rows: Tensor | None, value: Tensor) -> Tensor:
    return value if rows is None else x.index_copy(0, rows, value)
