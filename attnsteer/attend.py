"""``attend``: one attention call with edits, lowered onto fused kernels. No ``Nq x Nk`` map is ever built here.

``Replace`` first makes another call of it. Then four phases, keyed by the type of edit:

1. ``INPUTS``: q, k, v or the mask change before the user's kernel runs (``ClassMask``, ``KeyBias`` on all queries);
2. ``rows.py``: chosen query rows are computed again (``LogitEdit``, ``KeyBias`` on the rows that predict);
3. ``Segments``, all at once: keys of other rows join the softmax (``segments.py``);
4. ``OUTPUTS``: head outputs change (``Redistribute``, ``Mix``, ``Scale``).

A head that an edit leaves alone keeps its bits: the choice between edited and plain output is a ``torch.where`` on the
weight, never an interpolation at 0 (which turns -0.0 into 0.0 and inf into nan). Weights are tensors all the way, so a
compiled call serves every strength with one graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import redistribute as sinks
from . import rows, segments, targets
from .classes import mask_classes
from .edits import (
    ORDER,
    ClassMask,
    Edit,
    KeyBias,
    LogitEdit,
    MeanValue,
    Mix,
    OwnValue,
    Redistribute,
    Replace,
    RowKeys,
    Scale,
    Segments,
    acting_rows,
)
from .errors import SteeringError
from .logits import compute_dtype
from .site import AttentionCall, expand_rows


def attend(call: AttentionCall, edits: Sequence[Edit]) -> Tensor:
    """The head outputs of one attention call with its edits.

    Args:
        call: the kernel call as the model made it.
        edits: in any order; they compose in the order of ``edits.ORDER`` and, within one type, as given (a bias on all
            queries before one on the last).

    Returns:
        ``(B, H, Nq, Dv)`` in the dtype of the kernel. Without edits this is ``call.output`` itself.

    Raises:
        SteeringError: edits that this call cannot carry; all reasons at once, before anything is computed.
    """
    edits = sorted(edits, key=_turn)
    reasons = [reason for edit in edits for reason in refusals(call, edit)] + _mask_reasons(call, edits)
    reasons += conflicts(edits)
    if reasons:
        raise SteeringError(reasons)
    for edit in edits:
        if isinstance(edit, Replace):
            call = replace_queries(call, edit)
    edits = [edit for edit in edits if not isinstance(edit, Replace)]
    output, steered = call.output, call
    joining = [edit for edit in edits if isinstance(edit, Segments)]
    again = [edit for edit in edits if _is_row(edit)]
    for edit in edits:
        if _is_input(edit):
            steered, touched = INPUTS[type(edit)](steered, edit)
            output = torch.where(touched, steered.output, output)
        elif isinstance(edit, Segments):
            if edit is joining[0]:
                output = segments.add_segments(call, steered, output, joining)
        elif _is_row(edit):
            if edit is again[0]:
                output = rows.edit_rows(steered, output, again)
        else:
            lends = isinstance(edit, Mix) and isinstance(edit.target, RowKeys)  # what rows lend is not steered
            output = OUTPUTS[type(edit)](call if lends else steered, output, edit)
    return output


def _is_input(edit: Edit) -> bool:
    return isinstance(edit, ClassMask) or (isinstance(edit, KeyBias) and edit.queries == "all")


def _is_row(edit: Edit) -> bool:
    return isinstance(edit, LogitEdit) or (isinstance(edit, KeyBias) and edit.queries == "last")


def _turn(edit: Edit) -> tuple[int, bool]:
    return ORDER.index(type(edit)), not _is_input(edit)


# ---- refusals --------------------------------------------------------------------------------------------------------
def refusals(call: AttentionCall, edit: Edit) -> list[str]:
    """Why this call cannot carry an edit; empty where it can. Looks at shapes and layout only, never at values."""
    heads = call.q.shape[1]
    if isinstance(edit, Mix):
        return _shape_reasons(call, edit.weight.shape, (heads,), "Mix.weight") + targets.refusals(call, edit)
    if isinstance(edit, Scale):
        return _shape_reasons(call, edit.weight.shape, (heads,), "Scale.weight")
    if isinstance(edit, Replace):
        reasons = _shape_reasons(call, edit.weight.shape, (heads,), "Replace.weight")
        given, wanted = tuple(edit.query.shape), tuple(call.q.shape)
        if given != wanted:
            reasons.append(f"Replace.query has shape {given}; the queries of {call.site.name!r} have {wanted}.")
        return reasons
    if isinstance(edit, Segments):
        return _shape_reasons(call, edit.weight.shape, (heads,), "Segments.weight") + segments.refusals(call, edit)
    if isinstance(edit, ClassMask):
        return _shape_reasons(call, edit.weight.shape, (heads,), "ClassMask.weight") + _class_reasons(call, edit)
    if isinstance(edit, Redistribute):
        return _shape_reasons(call, edit.weight.shape[:2], (heads,), "Redistribute.weight") + sinks.refusals(call, edit)
    if isinstance(edit, LogitEdit):
        return _shape_reasons(call, edit.weight.shape[:2], (1, heads), "LogitEdit.weight") + rows.refusals(call, edit)
    reasons = _shape_reasons(call, edit.bias.shape[:2], (1, heads), "KeyBias.bias")
    return reasons + rows.bias_refusals(call, edit)


def _shape_reasons(call: AttentionCall, shape: torch.Size, heads: tuple[int, ...], name: str) -> list[str]:
    batch = call.q.shape[0]
    if len(shape) == 2 and shape[1] in heads and shape[0] > 0 and batch % shape[0] == 0:
        return []
    allowed = " or ".join(map(str, heads))
    return [
        f"{name} starts with shape {tuple(shape)}; at {call.site.name!r} give (rows, {allowed}), where rows divides "
        f"the batch of {batch}."
    ]


def _class_reasons(call: AttentionCall, edit: ClassMask) -> list[str]:
    found = (tuple(edit.classes.q_class.shape), tuple(edit.classes.k_class.shape))
    sizes, rows = (call.q.shape[2], call.k.shape[2]), found[0][0]
    reasons = []
    if (found[0][1], found[1][1]) != sizes or call.q.shape[0] % rows:
        reasons.append(
            f"ClassMask has classes of {found[0]} queries and {found[1]} keys; {call.site.name!r} has {sizes[0]} and "
            f"{sizes[1]} in {call.q.shape[0]} rows."
        )
    if call.is_causal:
        reasons.append(f"ClassMask takes queries out of their order, and {call.site.name!r} is causal.")
    return reasons


def _mask_reasons(call: AttentionCall, edits: Sequence[Edit]) -> list[str]:
    """Edits that look at logits must be able to read the mask; own values and scales need not."""
    seeing = [e for e in edits if not isinstance(e, (Scale, Replace))]
    blind = all(isinstance(e, Mix) and (e.target, e.path) == (OwnValue(), "linear") for e in seeing)
    mask: object = None if blind else call.mask
    if mask is None:
        return []
    if not isinstance(mask, Tensor):
        return [
            f"{call.site.name!r} has a {type(mask).__name__} for a mask, which cannot be read here: use a tensor mask."
        ]
    full = (call.q.shape[0], call.q.shape[1], call.q.shape[2], call.k.shape[2])
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) == 4 and all(size in (1, wanted) for size, wanted in zip(shape, full, strict=True)):
        return []
    return [f"The {tuple(mask.shape)} mask of {call.site.name!r} does not broadcast to (B, H, Nq, Nk) = {full}."]


def conflicts(edits: Sequence[Edit]) -> list[str]:
    """Pairs that do not compose: a bias on the last row and class masks are invisible to whoever looks at logits."""
    mixes = [e for e in edits if isinstance(e, Mix) and not isinstance(e.target, RowKeys)]
    looks = [e for e in mixes if e.target not in (OwnValue(), MeanValue()) or e.path != "linear"]
    partial = [e for e in mixes if e.target not in (OwnValue(), OwnValue("logit")) or e.path != "linear"]
    masks = [e for e in edits if isinstance(e, ClassMask)]
    reasons = []

    def refuse(one: str, other: Edit, way: str) -> None:
        name = f"Mix({other.target}, path={other.path!r})" if isinstance(other, Mix) else type(other).__name__
        reasons.append(f"{one} and {name} do not compose at one site: choose different layers{way}.")

    segmented = [e for e in edits if isinstance(e, Segments)]
    if any(isinstance(edit, KeyBias) and edit.queries == "last" for edit in edits):
        for other in (looks + masks + segmented)[:1]:
            refuse("KeyBias(queries='last')", other, ", or use KeyBias(queries='all')")
    if any(isinstance(edit, LogitEdit) for edit in edits):
        for other in (looks + masks + segmented + [e for e in mixes if e.target == MeanValue()])[:1]:
            refuse("LogitEdit", other, "")
    reasons += _meeting_conflicts(edits, partial)
    for other in (looks + [e for e in mixes if e.target == MeanValue()])[:1] if masks else ():
        refuse("ClassMask", other, ", or a target that reads no map")
    for other in partial[:1] if any(isinstance(edit, Segments) for edit in edits) else ():  # it knows own keys alone
        refuse("Segments (keys of other rows)", other, ", or the own value as target and path='linear'")
    if len(masks) > 1 and _meet(masks):
        reasons.append("Two ClassMasks on one row and head do not compose: make one table of both.")
    return reasons


def _meeting_conflicts(edits: Sequence[Edit], partial: Sequence[Edit]) -> list[str]:
    """Pairs that do not compose where they meet in a row; rows of a batch may have one each."""
    moves: list[Edit] = [e for e in edits if isinstance(e, Redistribute)]
    signed: list[Edit] = [e for e in edits if isinstance(e, LogitEdit) and e.form == "signed"]
    changers: list[Edit] = [e for e in edits if isinstance(e, (KeyBias, LogitEdit, ClassMask, Segments))]
    reasons = []
    changers += partial
    for other in [e for e in changers if any(_same_row(e, move) for move in moves)][:1]:
        name = f"Mix({other.target})" if isinstance(other, Mix) else type(other).__name__
        reasons.append(f"Redistribute and {name} do not compose at one site: choose different layers.")
    for same in (moves, signed):
        if any(_same_row(one, two) for i, one in enumerate(same) for two in same[:i]):
            name = "Redistribute" if same is moves else "signed LogitEdit"
            reasons.append(f"Two {name} edits at one site do not compose: choose different layers.")
    return reasons


def _same_row(one: Edit, two: Edit) -> bool:
    """Whether two edits act on one row. Where it is not known which rows they are held to, this looks at values, and
    waits for the device; compiled code trusts ``attach``, which has looked at what each row was given."""
    if torch.compiler.is_compiling():
        return False
    if one.held and two.held and not any(a and b for a, b in zip(one.held, two.held, strict=True)):
        return False
    acts = [acting_rows(edit) for edit in (one, two)]
    rows = math.lcm(*(len(act) for act in acts))
    return bool((expand_rows(acts[0], rows) & expand_rows(acts[1], rows).to(acts[0].device)).any())


def _meet(masks: Sequence[ClassMask]) -> bool:
    """Whether a row and head has several masks. Looks at values, in the rare case of several masks alone."""
    rows = max(edit.weight.shape[0] for edit in masks)
    return bool(sum((expand_rows(edit.weight, rows) != 0).int() for edit in masks).gt(1).any())  # type: ignore


# ---- before all phases -----------------------------------------------------------------------------------------------
def replace_queries(call: AttentionCall, edit: Replace) -> AttentionCall:
    """The call with other queries; those of a row and head of weight 0 keep their bits."""
    weight = _weight(edit.weight, call.q)
    blend = torch.lerp(call.q.to(weight.dtype), edit.query.to(weight.dtype), weight).to(call.q.dtype)
    return replace(call, q=torch.where(weight != 0, blend, call.q))


# ---- phase 1: inputs -------------------------------------------------------------------------------------------------
def bias_keys(call: AttentionCall, edit: KeyBias) -> tuple[AttentionCall, Tensor]:
    """``logits += bias`` for all queries, as extra channels of q and k (FlashBias, 2025, arXiv 2505.12044).

    One form for every call: mask, causal flag and backend stay what they are, where an additive mask would blow a
    causal flag or a ``(B, 1, Nq, Nk)`` mask up to one float map per head. The G query heads of a group share their key
    head, so each gets a channel of its own: ``q' = [q, onehot(h mod G)]`` and ``k' = [k, bias_h / scale]``. In half
    precision every channel comes twice; the second holds what rounding took from the first. Widths are padded to a
    multiple of 8, v's too, because fused kernels want equal widths. Cost: one more kernel call, at most 2 G + 7
    channels wider.

    Returns:
        The changed call, and a bool ``(1 or B, 1 or H, 1, 1)``: the rows and heads that have a bias at all.
    """
    q, k = call.q, call.k
    batch, heads, n_q, dim = q.shape
    scale = call.softmax_scale
    bias = expand_rows(edit.bias, batch).to(device=q.device, dtype=compute_dtype(q))
    touched = (bias != 0).any(dim=-1)[:, :, None, None]
    channels = 1 if bias.shape[1] == 1 else call.group
    wanted = (bias / scale).unflatten(1, (-1, channels)).mT  # (R, 1 or Hkv, Nk, channels)
    high = wanted.to(k.dtype)
    parts = [high] if k.dtype == wanted.dtype else [high, (wanted - high).to(k.dtype)]
    extra_k = torch.cat(parts, dim=-1).expand(batch, k.shape[1], -1, -1)
    select = torch.eye(channels, dtype=q.dtype, device=q.device).repeat(heads // channels, len(parts))  # (H, extra)
    extra_q = select[None, :, None].expand(batch, -1, n_q, -1)
    unused = max(-(-(dim + select.shape[-1]) // 8) * 8, call.v.shape[-1]) - dim - select.shape[-1]
    wide_q = F.pad(torch.cat([q, extra_q], dim=-1), (0, unused))
    wide_k = F.pad(torch.cat([k, extra_k], dim=-1), (0, unused))
    return replace(call, q=wide_q, k=wide_k, kernel=_wide_kernel(call), scale=scale), touched


def _wide_kernel(call: AttentionCall) -> Callable[..., Tensor]:
    """The call's kernel for q and k with extra channels: v padded to their width, the softmax scale as it was."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
        if call.scale is None:  # the kernel derives its scale from the width that it sees
            q = q * (q.shape[-1] / call.q.shape[-1]) ** 0.5
        return call.kernel(q, k, F.pad(v, (0, q.shape[-1] - v.shape[-1])), **mask)[..., : v.shape[-1]]

    return kernel


# ---- phase 4: outputs ------------------------------------------------------------------------------------------------
def mix(call: AttentionCall, output: Tensor, edit: Mix) -> Tensor:
    """``lerp(output, target, weight)`` on the chosen query rows: one pass over the output beside the target's own cost.

    A non-linear path starts from the plain map of the call, not from what earlier mixes made of its output.
    """
    span = targets.query_rows(call, edit.tokens)
    if span.start == span.stop:
        return output
    weight, plain = _weight(edit.weight, output), output[:, :, span]
    if edit.path == "linear":
        target = targets.target_output(call, edit.target, span)
        mixed = torch.lerp(plain.to(weight.dtype), target.to(weight.dtype), weight)
    else:
        mixed = targets.path_output(call, edit.path, weight, span)
    chosen = weight != 0
    if isinstance(edit.target, RowKeys):  # queries without a share stay as they are
        chosen = chosen & (segments.shares(call, edit.target).sum(1)[:, None, span, None] > 0)
    mixed = torch.where(chosen, mixed.to(output.dtype), plain)
    if span == slice(0, output.shape[2]):
        return mixed
    return torch.cat([output[:, :, : span.start], mixed, output[:, :, span.stop :]], dim=2)


def scale(call: AttentionCall, output: Tensor, edit: Scale) -> Tensor:
    """``weight * output``. Weight 1 keeps the bits; weight 0 gives zeros even where the output overflowed."""
    weight = _weight(edit.weight, output)
    return torch.where(weight == 0, torch.zeros_like(output), (output * weight).to(output.dtype))


def _weight(weight: Tensor, output: Tensor) -> Tensor:
    """``(R, H)`` -> ``(1 or B, H, 1, 1)`` in the precision of the arithmetic."""
    expanded = expand_rows(weight, output.shape[0])
    return expanded.to(device=output.device, dtype=compute_dtype(output))[:, :, None, None]


INPUTS: dict[type, Callable[..., tuple[AttentionCall, Tensor]]] = {ClassMask: mask_classes, KeyBias: bias_keys}
OUTPUTS: dict[type, Callable[..., Tensor]] = {Redistribute: sinks.redistribute, Mix: mix, Scale: scale}
