"""The closed vocabulary of edits: what a processor may ask for at one attention call.

Every weight is a float32 tensor whose first axis is the batch row (or 1 for all rows) and whose second is the head, so
that variants of a method share one kernel call. A weight of 0 leaves that row and head untouched, bit for bit.

Order of composition at one site (``ORDER``): replace q, k, v; then masks and biases; then further key segments;
then ``Mix``; then ``Scale``. ``Replace``, ``ClassMask``, ``LogitEdit``, ``Segments`` and ``Redistribute`` join this
table together with the first method that needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .site import expand_rows

Tokens = Literal["all", "image", "text"]
Path = Literal["linear", "chord", "slerp", "log_linear"]


@dataclass(frozen=True)
class OwnValue:
    """Each query attends to itself alone: ``o_i = v_i`` (PAG, SoftPAG). In joint sequences ``text`` says what becomes
    of the text keys: ``drop`` (identity map), ``logit`` (softmax over own key and text keys) or ``renorm`` (the image
    mass moves to the own key, text weights stay)."""

    text: Literal["drop", "logit", "renorm"] = "drop"


@dataclass(frozen=True)
class MeanValue:
    """Uniform attention over the visible keys: ``o_i = mean_j v_j``."""


@dataclass(frozen=True)
class MeanQuery:
    """Every query replaced by the mean query over ``tokens`` (SEG with infinite sigma): one query row, broadcast."""

    tokens: Tokens = "all"


@dataclass(frozen=True)
class BlurredQuery:
    """Image queries blurred by a Gaussian of ``sigma`` tokens over the image grid (SEG)."""

    sigma: float


@dataclass(frozen=True)
class ArgmaxValue:
    """Each query attends to its strongest key alone: ``o_i = v_argmax``."""


Target: TypeAlias = OwnValue | MeanValue | MeanQuery | BlurredQuery | ArgmaxValue


@dataclass(frozen=True, eq=False)
class Mix:
    """``output = lerp(output, target, weight)`` on the chosen query tokens.

    Args:
        target: what to mix in.
        weight: ``(R, H)`` float32 in [0, 1]; R is the number of batch rows or 1.
        tokens: the query tokens that change; the others keep the plain output.
        path: how to go from the plain map (0) to the target (1); all but ``linear`` are for ``OwnValue()`` only.
    """

    target: Target
    weight: Tensor
    tokens: Tokens = "all"
    path: Path = "linear"


@dataclass(frozen=True, eq=False)
class Scale:
    """``output = weight * output`` per row and head, before the output projection. ``weight``: ``(R, H)`` float32."""

    weight: Tensor


@dataclass(frozen=True, eq=False)
class KeyBias:
    """``logits += bias`` on chosen keys; ``exp(bias)`` times the weight, then renormalised, is the same thing.

    Args:
        bias: ``(R, H or 1, Nk)`` float32, finite (masking is not a bias).
        queries: ``all`` or ``last`` (only the last query row, the one that predicts the next token).
    """

    bias: Tensor
    queries: Literal["all", "last"] = "all"


Edit: TypeAlias = KeyBias | Mix | Scale
ORDER: tuple[type, ...] = (KeyBias, Mix, Scale)


def _key(edit: Edit) -> tuple[object, ...]:
    """Edits with equal keys differ in their tensor alone, so they can share one lowering."""
    if isinstance(edit, Mix):
        return (Mix, edit.target, edit.tokens, edit.path)
    if isinstance(edit, KeyBias):
        return (KeyBias, edit.queries, tuple(edit.bias.shape[1:]))
    return (Scale,)


def _tensor(edit: Edit) -> Tensor:
    return edit.bias if isinstance(edit, KeyBias) else edit.weight


def _with_tensor(edit: Edit, tensor: Tensor) -> Edit:
    return replace(edit, bias=tensor) if isinstance(edit, KeyBias) else replace(edit, weight=tensor)


def stack_rows(rows: Sequence[Sequence[Edit]]) -> tuple[Edit, ...]:
    """Merge the edits of single rows (tensors ``(1, ...)``) into edits of the whole batch (tensors ``(R, ...)``).

    A row that does not ask for an edit gets its neutral value there: weight 0 (``Mix``), 1 (``Scale``), bias 0. Rows
    may ask for different edits; two edits of one row with the same key stay two, and the order within a row is kept.
    Equal rows collapse to one.
    """
    slots: list[tuple[tuple[object, ...], dict[int, Edit]]] = []
    for r, edits in enumerate(rows):
        last = -1
        for edit in sorted(edits, key=lambda edit: ORDER.index(type(edit))):
            key = _key(edit)
            last += 1  # the next slot of this key behind the row's previous edit, else a new one right there
            found = [i for i in range(last, len(slots)) if slots[i][0] == key]
            if found:
                last = found[0]
            else:
                slots.insert(last, (key, {}))
            slots[last][1][r] = edit
    stacked: list[Edit] = []
    for _, members in slots:
        sample = next(iter(members.values()))
        neutral: Callable[[Tensor], Tensor] = torch.ones_like if isinstance(sample, Scale) else torch.zeros_like
        parts = [_tensor(members[r]) if r in members else neutral(_tensor(sample)) for r in range(len(rows))]
        if all(torch.equal(part, parts[0]) for part in parts[1:]):
            parts = parts[:1]
        stacked.append(_with_tensor(sample, torch.cat(parts)))
    return tuple(sorted(stacked, key=lambda edit: ORDER.index(type(edit))))


def restrict(edit: Edit, mask: Tensor, lanes: int = 1) -> Edit:
    """The edit where ``mask`` holds, its neutral value elsewhere.

    Args:
        mask: bool ``(R or 1, H)``, rows and heads of one lane. Fewer rows than the lane has stand for contiguous
            repetition.
        lanes: how often the rows of the mask repeat as blocks, one after the other.
    """
    tensor = _tensor(edit)
    if mask.shape[0] > 1:
        rows = max(tensor.shape[0], lanes * mask.shape[0])
        tensor, mask = expand_rows(tensor, rows), torch.cat([expand_rows(mask, rows // lanes)] * lanes)
    neutral = torch.ones_like(tensor) if isinstance(edit, Scale) else torch.zeros_like(tensor)
    return _with_tensor(edit, torch.where(mask[..., None] if tensor.dim() == 3 else mask, tensor, neutral))


def tile_rows(edit: Edit, batch: int, lanes: int) -> Edit:
    """An edit of ``batch`` rows for a batch that holds these rows ``lanes`` times, one block after the other."""
    tensor = _tensor(edit)
    return edit if tensor.shape[0] == 1 else _with_tensor(edit, torch.cat([expand_rows(tensor, batch)] * lanes))
