"""Edits of chosen query rows: the rows that predict new tokens, or those behind the image.

The rows that predict (``AttentionCall.predicts``, nearly always one) are computed from their explicit logits, which
takes any change of a logit. All other rows can carry a signed change alone: ``z_j (1 + w_j)`` is what the same query
gives with the key ``(1 + w_j) k_j``, so the user's kernel runs once more with scaled keys. Those never reach the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .edits import Edit, KeyBias, LogitEdit
from .logits import behind_mask, compute_dtype, predicting_logits, softmax, weighted
from .site import AttentionCall, expand_rows


def edit_rows(call: AttentionCall, output: Tensor, edits: Sequence[Edit]) -> Tensor:
    """Every ``LogitEdit`` and every ``KeyBias`` on the rows that predict, in the order given, which puts the biases
    first. Rows and heads with a weight of 0 keep their bits."""
    signed = [edit for edit in edits if isinstance(edit, LogitEdit) and edit.form == "signed"]
    for edit in signed:
        if edit.queries is not None:
            output = _scale_keys(call, output, edit, edit.queries)
    if len(signed) == len(edits) == 1 and signed[0].queries is not None:
        return output
    return _edit_last(call, output, edits, min(call.predicts, call.q.shape[2]))


def _scale_keys(call: AttentionCall, output: Tensor, edit: LogitEdit, queries: Tensor) -> Tensor:
    """``z_j += w_j z_j`` on chosen rows of the map, by one more call of the user's kernel (one for each query head of a
    group where heads have weights of their own: a group shares its keys).

    Cost: that call on all rows, and a copy of the keys.
    """
    batch, n_q = call.q.shape[0], call.q.shape[2]
    weight = expand_rows(edit.weight, batch).to(device=output.device)  # (1 or B, H or 1, Nk)
    factor = (1 + weight.to(compute_dtype(call.q)))[..., None]
    if weight.shape[1] == 1 or call.group == 1:
        changed = call.kernel(call.q, _scaled(call.k, factor), call.v)
    else:
        changed = torch.empty_like(output)
        for member in range(call.group):
            some = slice(member, None, call.group)
            changed[:, some] = call.kernel(call.q, _scaled(call.k, factor[:, some]), call.v)[:, some]
    chosen = expand_rows(queries, batch).to(output.device)[:, None] & _heads(edit, output, n_q)  # (B, 1 or H, Nq)
    chosen = chosen & (weight != 0).any(-1, keepdim=True)
    return torch.where(chosen[..., None], changed, output)


def _scaled(k: Tensor, factor: Tensor) -> Tensor:
    return (k * factor).to(k.dtype)


def _heads(edit: LogitEdit, output: Tensor, n: int) -> Tensor:
    """Bool ``(1 or B, 1 or H, 1 or n)``: the heads that change in the last n rows."""
    if edit.heads is None:
        return torch.ones(1, 1, 1, dtype=torch.bool, device=output.device)
    heads = expand_rows(edit.heads, output.shape[0]).to(output.device)
    return heads[..., None] if heads.dim() == 2 else heads[..., heads.shape[2] - n :]


def _edit_last(call: AttentionCall, output: Tensor, edits: Sequence[Edit], n: int) -> Tensor:
    """The last n rows from their ``(B, H, n, Nk)`` logits. Signed changes act in front of the mask, the others behind
    it, each on what the one before it left."""
    if n == 0:
        return output
    changes = [(edit, *_change(edit, output, n)) for edit in edits]
    signed = [weight for edit, weight, _ in changes if isinstance(edit, LogitEdit) and edit.form == "signed"]
    logits = predicting_logits(call, masked=not signed)
    for weight in signed:
        logits = logits + weight.to(logits.dtype) * logits
    logits = behind_mask(call, logits) if signed else logits
    lowest = torch.finfo(logits.dtype).min / 4  # eager hides keys by the lowest number: leave it so
    for edit, weight, _ in changes:
        if isinstance(edit, KeyBias):
            logits = logits + weight.to(logits.dtype)
        elif isinstance(edit, LogitEdit) and edit.form == "absolute":
            logits = torch.where(logits < lowest, logits, logits + weight.to(logits.dtype) * logits.abs())
    touched = functools.reduce(torch.logical_or, [touch for _, _, touch in changes])
    first = output.shape[2] - n
    row = torch.where(touched, weighted(softmax(logits), call.v).to(output.dtype), output[:, :, first:])
    return row if first == 0 else torch.cat([output[:, :, :first], row], dim=2)


def _change(edit: Edit, output: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The weight of an edit in the last n rows, ``(1 or B, H or 1, 1 or n, Nk)``, and where it is not 0 at all."""
    batch = output.shape[0]
    if isinstance(edit, KeyBias):
        bias = expand_rows(edit.bias, batch).to(output.device)
        weight = bias if bias.dim() == 4 else bias[:, :, None]
        return weight, (weight != 0).any(-1, keepdim=True)
    assert isinstance(edit, LogitEdit)
    weight = expand_rows(edit.weight, batch).to(output.device)[:, :, None]
    if edit.heads is not None:
        weight = torch.where(_heads(edit, output, n)[..., None], weight, 0.0)
    if edit.queries is not None:
        weight = torch.where(expand_rows(edit.queries, batch).to(output.device)[:, None, -n:, None], weight, 0.0)
    return weight, (weight != 0).any(-1, keepdim=True)


# ---- refusals --------------------------------------------------------------------------------------------------------
def bias_refusals(call: AttentionCall, edit: KeyBias) -> list[str]:
    """Why the keys or the rows of a bias are not those of a call."""
    shape, name, n_k = tuple(edit.bias.shape), call.site.name, call.k.shape[2]
    reasons = _key_reasons(call, edit.bias, "KeyBias.bias")
    if len(shape) == 4 and (edit.queries != "last" or shape[2] not in (1, call.predicts)):
        reasons.append(
            f"KeyBias.bias has shape {shape}; at {name!r} give (rows, heads, {n_k}), or with queries='last' also "
            f"(rows, heads, {call.predicts}, {n_k}): {call.predicts} queries predict new tokens."
        )
    return reasons


def refusals(call: AttentionCall, edit: LogitEdit) -> list[str]:
    """Why this call cannot carry a ``LogitEdit``; empty where it can. Shapes alone, never values."""
    batch, heads, n_q = call.q.shape[:3]
    reasons = _key_reasons(call, edit.weight, "LogitEdit.weight")
    if edit.form == "absolute" and edit.queries is not None:
        reasons.append("LogitEdit(form='absolute') changes the rows that predict new tokens alone: give queries=None.")
    for name, tensor, wanted in (("queries", edit.queries, (n_q,)), ("heads", edit.heads, (heads, n_q))):
        if tensor is None:
            continue
        allowed = [wanted] if name == "queries" else [wanted[:1], wanted]
        if tuple(tensor.shape[1:]) not in allowed or tensor.shape[0] < 1 or batch % tensor.shape[0]:
            shapes = " or ".join(f"(rows, {', '.join(map(str, shape))})" for shape in allowed)
            reasons.append(
                f"LogitEdit.{name} has shape {tuple(tensor.shape)}; at {call.site.name!r} give {shapes}, where rows "
                f"divides the batch of {batch}."
            )
    return reasons


def _key_reasons(call: AttentionCall, tensor: Tensor, name: str) -> list[str]:
    if tensor.shape[-1] == call.k.shape[2]:
        return []
    return [f"{name} covers {tensor.shape[-1]} keys; {call.site.name!r} has {call.k.shape[2]}."]
