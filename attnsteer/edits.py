"""The closed vocabulary of edits: what a processor may ask for at one attention call.

Every weight is a float32 tensor whose first axis is the batch row (or 1 for all rows) and whose second is the head, so
that variants of a method share one kernel call. A weight of 0 leaves that row and head untouched, bit for bit.

Order of composition at one site (``ORDER``): replace q, k, v; then masks and biases; then further key segments;
then ``Redistribute``; then ``Mix``; then ``Scale``.

Edits that read other rows of the batch (``Segments``, ``Mix`` toward ``RowKeys``) name them by position, so they come
from ``react``, which sees the batch. Their ``source`` is a plain tuple: rows that read nothing cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .classes import TokenClasses
from .errors import SteeringError
from .site import expand_rows

Tokens = Literal["all", "image", "text"]
Path = Literal["linear", "chord", "slerp", "log_linear"]
Sources: TypeAlias = tuple[tuple[int, ...], ...]
"""For every row of the batch the rows that it reads, -1 where there is none; all entries have one length."""


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


@dataclass(frozen=True, eq=False)
class RowKeys:
    """The own queries on the keys and values of other rows, blended per query:
    ``o_i = sum_s share_si attention(q_i, k of row s, v of row s) / sum_s share_si``. Queries without a share keep the
    plain output.

    Args:
        source: the rows to read.
        share: ``(R, S, Nq)`` float32, >= 0.
    """

    source: Sources
    share: Tensor


Target: TypeAlias = OwnValue | MeanValue | MeanQuery | BlurredQuery | ArgmaxValue | RowKeys


@dataclass(frozen=True, eq=False)
class _Held:
    """What the engine notes on every edit.

    ``held``: the variants of the batch, yes or no in order, outside of which an edit is neutral; None where the host
    does not know. So two edits that cannot meet are told apart without a look at their weights.
    """

    held: tuple[bool, ...] | None = field(default=None, kw_only=True, repr=False)


@dataclass(frozen=True, eq=False)
class Replace(_Held):
    """Other queries: ``q <- lerp(q, query, weight)``. All other edits of the call see the new ones.

    Args:
        query: ``(B, H, Nq, D)``, e.g. of another pass on the same rows.
        weight: ``(R, H)`` float32 in [0, 1]; 0 leaves a row and head alone.
    """

    query: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Mix(_Held):
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
class Scale(_Held):
    """``output = weight * output`` per row and head, before the output projection. ``weight``: ``(R, H)`` float32."""

    weight: Tensor


@dataclass(frozen=True, eq=False)
class KeyBias(_Held):
    """``logits += bias`` on chosen keys; ``exp(bias)`` times the weight, then renormalised, is the same thing.

    Args:
        bias: ``(R, H or 1, Nk)`` float32, finite (masking is not a bias). For ``last`` also ``(R, H or 1, n, Nk)``, a
            bias for each of the n = ``call.predicts`` rows.
        queries: ``all``, or ``last``: only the rows that predict new tokens (``AttentionCall.predicts``).
    """

    bias: Tensor
    queries: Literal["all", "last"] = "all"


@dataclass(frozen=True, eq=False)
class LogitEdit(_Held):
    """A change of chosen logits in proportion to themselves, before the softmax.

    ``signed``: ``z_j += w_j z_j`` with z before the mask (VAF); ``absolute``: ``z_j += w_j |z_j|`` with z behind the
    mask, so that every visible logit moves the same way (PAI, PAINT).

    Args:
        weight: ``(R, H or 1, Nk)`` float32, finite; 0 leaves a key alone.
        form: ``signed`` or ``absolute``.
        queries: ``(R, Nq)`` bool, the rows that change (``signed`` alone); None: those that predict new tokens.
        heads: ``(R, H)`` or ``(R, H, Nq)`` bool, the heads that change; None: all.
    """

    weight: Tensor
    form: Literal["signed", "absolute"]
    queries: Tensor | None = None
    heads: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Redistribute(_Held):
    """Moves a fraction of a row's probability on the keys ``source`` to the keys ``target``, in proportion to what they
    have: ``A_S *= 1 - t`` and ``A_N *= 1 + t a_S / a_N`` with ``a_X = sum_{j in X} A_j``. Rows keep their sum.

    Args:
        source, target: ``(R, Nk)`` bool, disjoint. Rows of the map without mass on either stay as they are.
        weight: ``(R, H, Nq)`` float32 in [0, 1]: the fraction t of each row of the map; 0 leaves it alone.
    """

    source: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class ClassMask(_Held):
    """Who may look at whom, by classes of tokens: a query sees the keys of the classes that its own class may see.

    Args:
        classes: the classes of queries and keys and the table; made once and used in many calls.
        weight: ``(R, H)`` float32; 0 leaves a row and head alone, anything else masks it.
    """

    classes: TokenClasses
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Segments(_Held):
    """More keys for chosen rows: those of other rows (or their own again), in one softmax with the row's own keys.

    ``logits_i = [s_i over own keys | s_i + bias_1 + log(weight) over segment 1 | ...]``. Segments bring the key mask of
    the row that they come from; ``KeyBias`` and ``ClassMask`` concern the own keys alone.

    Args:
        source: the rows to read, S for each row.
        weight: ``(R, H)`` float32, >= 0: factor on the weights of all segment keys; 0 leaves a row and head alone.
        bias: ``(R, S, M)`` float32 on the logits of the segment keys; -inf hides a key. None: all keys as they are.
        keys: ``(R, S, M)`` which keys of the source, in any order and number; None takes all (M = Nk).
        queries: ``(R, S, Nq)`` bool, which queries see the segment; None: all.
        positions: ``(R, S, M)`` tokens whose position the keys take (models with rotary positions only).
    """

    source: Sources
    weight: Tensor
    bias: Tensor | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None
    positions: Tensor | None = None


Edit: TypeAlias = Replace | ClassMask | KeyBias | LogitEdit | Segments | Redistribute | Mix | Scale
Reaction: TypeAlias = Edit | tuple[Edit, ...] | None
"""What a processor answers to a call."""
ORDER: tuple[type, ...] = (Replace, ClassMask, KeyBias, LogitEdit, Segments, Redistribute, Mix, Scale)
_PER_ROW: dict[type, tuple[str, ...]] = {
    KeyBias: ("bias",),
    LogitEdit: ("weight", "queries", "heads"),
    Redistribute: ("weight", "source", "target"),
}
"""The tensors of an edit whose first axis is the batch row; ``("weight",)`` where nothing else is said. The first one
says how strong the edit is."""


def sources(edit: Edit) -> Sources | None:
    """The rows that an edit reads; None where every row looks at itself alone."""
    if isinstance(edit, Segments):
        return edit.source
    if isinstance(edit, Mix) and isinstance(edit.target, RowKeys):
        return edit.target.source
    return None


def map_tensors(edit: Edit, change: Callable[[Tensor], Tensor]) -> Edit:
    """The edit with every per-row tensor changed."""
    return _with_tensors(edit, {name: change(tensor) for name, tensor in _tensors(edit).items()})


def acting_rows(edit: Edit) -> Tensor:
    """Bool ``(R,)``: the rows in which an edit does anything."""
    acts = (_tensor(edit) != 0).flatten(1).any(1)
    if isinstance(edit, LogitEdit) and edit.heads is not None:
        heads = edit.heads.flatten(1).any(1)
        acts = acts & heads if len(heads) == len(acts) else acts.any() & heads
    return acts


def _tensors(edit: Edit) -> dict[str, Tensor]:
    """The per-row tensors of an edit by name, the strength first."""
    found = {name: getattr(edit, name) for name in _PER_ROW.get(type(edit), ("weight",))}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _tensor(edit: Edit) -> Tensor:
    return next(iter(_tensors(edit).values()))


def _with_tensors(edit: Edit, tensors: Mapping[str, Tensor]) -> Edit:
    return replace(edit, **tensors)  # type: ignore[arg-type]


def _key(edit: Edit) -> tuple[object, ...]:
    """Edits with equal keys differ in their tensors alone, so they can share one lowering."""
    if isinstance(edit, Mix):
        return (Mix, edit.target, edit.tokens, edit.path)
    if isinstance(edit, (KeyBias, LogitEdit, Redistribute)):
        shapes = tuple((name, tuple(tensor.shape[1:])) for name, tensor in _tensors(edit).items())
        return (type(edit), getattr(edit, "form", None) or getattr(edit, "queries", None), *shapes)
    if isinstance(edit, Replace):
        return (Replace, id(edit.query))
    return (ClassMask, edit.classes) if isinstance(edit, ClassMask) else (Scale,)


def stack_rows(rows: Sequence[Sequence[Edit]]) -> tuple[Edit, ...]:
    """Merge the edits of single rows (tensors ``(1, ...)``) into edits of the whole batch (tensors ``(R, ...)``).

    A row that does not ask for an edit gets its neutral value there: weight 0 (``Mix``), 1 (``Scale``), bias 0. Rows
    may ask for different edits; two edits of one row with the same key stay two, and the order within a row is kept.
    Equal rows collapse to one.

    Raises:
        SteeringError: an edit that reads other rows; the position of a row in the batch is known in ``react`` alone.
    """
    if any(sources(edit) is not None for edits in rows for edit in edits):
        raise SteeringError("Edits that read other rows of the batch name them by position: give them in react().")
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
        blank = {name: neutral(tensor) for name, tensor in _tensors(sample).items()}
        parts = [_tensors(members[r]) if r in members else blank for r in range(len(rows))]
        if all(torch.equal(part[name], parts[0][name]) for part in parts[1:] for name in blank):
            parts = parts[:1]
        stacked.append(_with_tensors(sample, {name: torch.cat([part[name] for part in parts]) for name in blank}))
    return tuple(sorted(stacked, key=lambda edit: ORDER.index(type(edit))))


def restrict(edit: Edit, mask: Tensor, lanes: int = 1) -> Edit:
    """The edit where ``mask`` holds, its neutral value elsewhere.

    Args:
        mask: bool ``(R or 1, H)``, rows and heads of one lane. Fewer rows than the lane has stand for contiguous
            repetition.
        lanes: how often the rows of the mask repeat as blocks, one after the other.
    """
    if mask.shape[0] > 1:
        rows = max(_tensor(edit).shape[0], lanes * mask.shape[0])
        edit = map_tensors(edit, lambda tensor: expand_rows(tensor, rows))
        mask = torch.cat([expand_rows(mask, rows // lanes)] * lanes)
    if isinstance(edit, LogitEdit):  # one weight for all heads stays one: it costs one kernel call, many cost several
        chosen = torch.ones_like(mask) if edit.heads is None else edit.heads
        return replace(edit, heads=chosen & (mask[..., None] if chosen.dim() == 3 else mask))
    name, tensor = next(iter(_tensors(edit).items()))
    neutral = torch.ones_like(tensor) if isinstance(edit, Scale) else torch.zeros_like(tensor)
    mask = mask.reshape(*mask.shape, *[1] * (tensor.dim() - 2))
    return _with_tensors(edit, {name: torch.where(mask, tensor, neutral)})


def tile_rows(edit: Edit, batch: int, lanes: int) -> Edit:
    """An edit of ``batch`` rows for a batch that holds these rows ``lanes`` times, one block after the other."""

    def tile(tensor: Tensor) -> Tensor:
        return tensor if tensor.shape[0] == 1 else torch.cat([expand_rows(tensor, batch)] * lanes)

    return map_tensors(edit, tile)
