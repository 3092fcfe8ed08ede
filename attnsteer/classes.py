"""Masks by classes of tokens, lowered without a map: the queries of each masked class go through the kernel together.

Sorting queries by class makes the mask of a class one row over the keys, ``(B, 1, 1, Nk)``. Every masked query is
computed once more, with its own key mask; classes that see everything are not touched, so their bits stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import SteeringError
from .kernels import attend_with_lse
from .site import AttentionCall, expand_rows

if TYPE_CHECKING:
    from .edits import ClassMask


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """Classes of queries and keys, and which class may look at which.

    Args:
        table: bool ``(R or 1, C, C)``: entry ``[a, b]`` says whether queries of class a see keys of class b.
        q_class: ``(R, Nq)`` ints below C.
        k_class: ``(R, Nk)`` ints below C.

    ``parts`` holds, for each class that lacks a key of some row, its number and where its queries are, ``(R, n)``;
    rows with fewer are filled up with Nq. Made once, on the CPU.

    Raises:
        SteeringError: shapes that do not fit, classes beyond the table, or queries that would see no key at all.
    """

    table: Tensor
    q_class: Tensor
    k_class: Tensor
    parts: tuple[tuple[int, Tensor], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table, q_class, k_class = (x.cpu() for x in (self.table, self.q_class, self.k_class))
        rows, count = q_class.shape[0], table.shape[-1]
        if table.dim() != 3 or table.shape[1] != count or table.shape[0] not in (1, rows) or len(k_class) != rows:
            raise SteeringError(
                f"Classes of shapes {tuple(q_class.shape)} (queries) and {tuple(k_class.shape)} (keys) do not go with "
                f"a table of shape {tuple(table.shape)}: give (R, Nq), (R, Nk) and (R or 1, C, C)."
            )
        if min(int(q_class.min()), int(k_class.min())) < 0 or max(int(q_class.max()), int(k_class.max())) >= count:
            raise SteeringError(f"Token classes must be ints from 0 to {count - 1}, the size of the table less 1.")
        there = torch.stack([(k_class == c).any(1) for c in range(count)], dim=1)  # (R, C)
        lacks = (~table & there[:, None]).any(2)
        blind = ~(table & there[:, None]).any(2)
        parts = []
        for c in range(count):
            member = q_class == c
            if bool((member & blind[:, c, None]).any()):
                raise SteeringError(f"Queries of class {c} would see no key: let every class see one that exists.")
            member = member & lacks[:, c, None]
            n = int(member.sum(1).max())
            if n:
                order = torch.argsort((~member).int(), dim=1, stable=True)[:, :n]
                parts.append((c, torch.where(member.gather(1, order), order, q_class.shape[1]).to(self.q_class.device)))
        object.__setattr__(self, "parts", tuple(parts))

    def visible(self, c: int) -> Tensor:
        """The keys that class c sees, bool ``(R, Nk)``."""
        allowed = self.table[:, c].expand(self.k_class.shape[0], -1)
        return allowed.gather(1, self.k_class.long())


def mask_classes(call: AttentionCall, edit: ClassMask) -> tuple[AttentionCall, Tensor]:
    """The call whose kernel masks by class, and a bool ``(1 or B, H, 1, 1)``: the rows and heads that are masked.

    Cost beside the plain call: one more for every masked query.
    """
    touched = (expand_rows(edit.weight, call.q.shape[0]).to(call.q.device) != 0)[:, :, None, None]

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:  # a mask that is given stands for all masks
            return call.kernel(q, k, v, mask=mask)
        plain = call.output if q is call.q and k is call.k else call.kernel(q, k, v)

        def part(q: Tensor, mask: Tensor) -> Tensor:
            return call.kernel(q, k, v, mask=mask).to(plain.dtype)

        return torch.where(touched, by_class(call, edit.classes, q, plain, part), plain)

    return replace(call, kernel=kernel, classes=(*call.classes, edit)), touched


def by_class(
    call: AttentionCall,
    classes: TokenClasses,
    q: Tensor,
    plain: Tensor,
    part: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor | None = None,
) -> Tensor:
    """``plain`` ``(b, H, Nq, ...)`` with the queries of masked classes computed again.

    Args:
        part: ``(queries (b, H, n, D), mask) -> (b, H, n, ...)``.
        rows: the batch rows that q and plain hold; None: all.
    """
    batch, n_q = call.q.shape[0], q.shape[2]
    out = torch.cat([plain, plain[:, :, :1]], dim=2)  # one more place, where what fills up a short row may go
    for c, index in classes.parts:
        index, visible = (expand_rows(x, batch).to(q.device).expand(batch, -1) for x in (index, classes.visible(c)))
        index, visible = (x if rows is None else x[rows] for x in (index, visible))
        mask = _joined(call, visible, index, rows)
        spread = index[:, None].expand(-1, q.shape[1], -1)  # (b, H, n)
        chosen = q.gather(2, spread.clamp(max=n_q - 1)[..., None].expand(-1, -1, -1, q.shape[-1]))
        place = spread.reshape(spread.shape + (1,) * (plain.dim() - 3)).expand(*spread.shape, *plain.shape[3:])
        out = out.scatter(2, place, part(chosen, mask))
    return out[:, :, :n_q]


def _joined(call: AttentionCall, visible: Tensor, index: Tensor, rows: Tensor | None) -> Tensor:
    """The keys that a class sees ``(b, Nk)`` together with the mask of the call for its queries ``(b, n)``."""
    keep = visible[:, None, None]
    mask = call.mask
    if mask is None:
        return keep
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    if rows is not None and mask.shape[0] > 1:
        mask = mask[rows]
    if mask.shape[-2] > 1:  # a row per query: those of the class
        mask = mask.expand(index.shape[0], -1, -1, -1)
        picked = index.clamp(max=mask.shape[-2] - 1)[:, None, :, None]
        mask = mask.gather(2, picked.expand(-1, mask.shape[1], -1, mask.shape[-1]))
    return mask & keep if mask.dtype == torch.bool else torch.where(keep, mask, -torch.inf)


def log_sum_exp_rows(call: AttentionCall, rows: Tensor | None) -> Tensor:
    """``L_i`` of every query of chosen rows over its own keys under all masks and biases so far, ``(b, H, Nq)``."""
    q, k, v = (x if rows is None else x[rows] for x in (call.q, call.k, call.v))
    mask = call.mask
    if mask is not None and rows is not None and mask.dim() == 4 and mask.shape[0] > 1:
        mask = mask[rows]
    scale = call.softmax_scale
    lse = attend_with_lse(q, k, v, mask=mask, scale=scale, is_causal=call.is_causal)[1]

    def part(q: Tensor, mask: Tensor) -> Tensor:
        return attend_with_lse(q, k, v, mask=mask, scale=scale)[1]

    for edit in call.classes:
        weight = expand_rows(edit.weight, call.q.shape[0]).to(lse.device)
        weight = weight if rows is None or weight.shape[0] == 1 else weight[rows]
        lse = torch.where((weight != 0)[..., None], by_class(call, edit.classes, q, lse, part, rows), lse)
    return lse
