"""Masks by classes of tokens, in two exact forms; neither makes anything of ``Nq x Nk``.

* By class: all queries of a class share one row of the mask, ``(B, 1, 1, Nk)``, so the user's kernel computes the
  queries of each masked class once more, one call a class. It works everywhere and skips no key.
* By blocks: masked queries and all keys, sorted by class, go through one FlexAttention call with a block mask, which
  skips the keys that whole blocks of queries do not see. That buys something where classes see few keys, as regions
  do that are apart; isolated subjects on a shared background still visit about nine blocks in ten.

``block_reasons`` chooses. Classes that see everything are not touched by either, so their bits stay.
Limit: the form by blocks was checked uncompiled and compiled on CPU; on CUDA, the only place where it is chosen, no
test has run it yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .errors import SteeringError
from .kernels import attend_with_lse, flex
from .site import AttentionCall, expand_rows

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .edits import ClassMask

SPARSE = 0.5
"""Largest fraction of the blocks of masked queries and keys that may remain for the form by blocks to be worth it."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Masked queries and all keys in the order of their classes.

    Attributes:
        queries: ``(B, n)``: which queries; rows that have fewer are filled up with some that see every key.
        place: ``(B, n)``: where their outputs belong, Nq for those that only fill up.
        keys: ``(B, Nk)``: which keys.
        mask: who sees whom in this order.
    """

    queries: Tensor
    place: Tensor
    keys: Tensor
    mask: BlockMask


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """Classes of queries and keys, and which class may look at which.

    Args:
        table: bool ``(R or 1, C, C)``: entry ``[a, b]`` says whether queries of class a see keys of class b.
        q_class: ``(R, Nq)`` ints below C.
        k_class: ``(R, Nk)`` ints below C.

    ``parts`` holds, for each class that lacks a key: its number, the rows that have such queries, and where these are,
    ``(rows, n)``; rows with fewer are filled up with Nq. Made once, on the CPU.

    Raises:
        SteeringError: shapes that do not fit, classes beyond the table, or queries that would see no key at all.
    """

    table: Tensor
    q_class: Tensor
    k_class: Tensor
    parts: tuple[tuple[int, tuple[int, ...], Tensor], ...] = field(init=False, repr=False)
    _chosen: dict[tuple[tuple[int, ...], int], TokenClasses] = field(init=False, repr=False, default_factory=dict)
    _blocks: dict[tuple[int, torch.device], Blocks] = field(init=False, repr=False, default_factory=dict)

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
            having = member.any(1).nonzero().flatten()
            if len(having):
                member = member[having]
                order = torch.argsort((~member).int(), dim=1, stable=True)[:, : int(member.sum(1).max())]
                index = torch.where(member.gather(1, order), order, q_class.shape[1])
                parts.append((c, tuple(having.tolist()), index.to(self.q_class.device)))
        object.__setattr__(self, "parts", tuple(parts))

    @torch.compiler.disable
    def of_rows(self, rows: tuple[int, ...], batch: int) -> TokenClasses:
        """The classes of some rows of a batch; made once for each choice."""
        if (rows, batch) not in self._chosen:
            index = torch.tensor(rows)

            def pick(x: Tensor) -> Tensor:
                return x if x.shape[0] == 1 else expand_rows(x, batch)[index.to(x.device)]

            if self.q_class.shape[0] == 1:
                found = self
            else:
                found = TokenClasses(pick(self.table), pick(self.q_class), pick(self.k_class))
            self._chosen[rows, batch] = found
        return self._chosen[rows, batch]

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``queries``, ``place`` and ``keys`` of ``Blocks`` for the rows as given, and the classes of these queries and
        keys, on the CPU."""
        q_class, k_class = self.q_class.cpu().long(), self.k_class.cpu().long()
        masked = torch.zeros(q_class.shape[0], q_class.shape[1] + 1, dtype=torch.bool)
        for _, having, index in self.parts:
            masked[torch.tensor(having)[:, None], index.cpu()] = True
        masked = masked[:, :-1]  # without what fills up short rows
        order = torch.where(masked, q_class, self.table.shape[-1]).argsort(dim=1, stable=True)
        order = order[:, : int(masked.sum(1).max())]
        place = torch.where(masked.gather(1, order), order, q_class.shape[1])
        keys = k_class.argsort(dim=1, stable=True)
        return order, place, keys, q_class.gather(1, order), k_class.gather(1, keys)

    @cached_property
    def remaining(self) -> float:
        """The fraction of the blocks of 128 masked queries and 128 keys that the form by blocks computes."""
        *_, q_class, k_class = self._sorted
        table = self.table.cpu().expand(len(q_class), -1, -1)
        return float(flex.class_blocks(table, q_class, k_class).float().mean()) if self.parts else 0.0

    def blocks(self, batch: int, device: torch.device) -> Blocks:
        """The masked queries, keys and their block mask for a batch; made once for each size and device."""
        if (batch, device) not in self._blocks:

            def spread(x: Tensor) -> Tensor:
                return expand_rows(x, batch).expand(batch, *x.shape[1:]).contiguous().to(device)

            queries, place, keys, q_class, k_class = map(spread, self._sorted)
            mask = flex.class_block_mask(spread(self.table.cpu()), q_class, k_class)
            self._blocks[batch, device] = Blocks(queries, place, keys, mask)
        return self._blocks[batch, device]

    def visible(self, c: int) -> Tensor:
        """The keys that class c sees, bool ``(R, Nk)``."""
        allowed = self.table[:, c].expand(self.k_class.shape[0], -1)
        return allowed.gather(1, self.k_class.long())


def mask_classes(call: AttentionCall, edit: ClassMask) -> tuple[AttentionCall, Tensor]:
    """The call whose kernel masks by class, and a bool ``(1 or B, H, 1, 1)``: the rows and heads that are masked.

    Cost beside the plain call: every masked query once more, over all keys or, by blocks, about those that it sees.
    """
    touched = (expand_rows(edit.weight, call.q.shape[0]).to(call.q.device) != 0)[:, :, None, None]

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:  # a mask that is given stands for all masks
            return call.kernel(q, k, v, mask=mask)
        plain = call.output if q is call.q and k is call.k else call.kernel(q, k, v)

        def part(chosen: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
            return call.kernel(chosen, k[rows], v[rows], mask=mask).to(plain.dtype)

        def sparse(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
            return flex.output(q, k, v, scale=call.scale, blocks=blocks, compiled=True).to(plain.dtype)

        return torch.where(touched, _masked(call, edit.classes, (q, k, v), plain, part, sparse), plain)

    return replace(call, kernel=kernel, classes=(*call.classes, edit)), touched


ByClass: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(queries (b, H, n, D), their rows (b,), mask) -> (b, H, n, ...)``."""
ByBlocks: TypeAlias = "Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]"
"""``(queries (B, H, n, D), keys, values, block mask) -> (B, H, n, ...)``."""


def _masked(
    call: AttentionCall,
    classes: TokenClasses,
    tensors: tuple[Tensor, Tensor, Tensor],
    plain: Tensor,
    part: ByClass,
    sparse: ByBlocks,
) -> Tensor:
    """``plain`` ``(B, H, Nq, ...)`` with the queries of masked classes computed again, in the form that fits."""
    if block_reasons(classes, tensors[0], call.mask):
        return by_class(call, classes, tensors[0], plain, part)
    return by_blocks(classes, tensors, plain, sparse)


def block_reasons(classes: TokenClasses, q: Tensor, mask: Tensor | None) -> list[str]:
    """Why masked queries go class by class through the user's kernel; empty where one block-sparse call takes them."""
    if torch.compiler.is_compiling():
        return ["the caller is being compiled, and a block mask is no constant of its graph."]
    found = []
    if q.device.type != "cuda":
        found.append(f"compiled FlexAttention gives no log-sum-exp on {q.device.type}; uncompiled, it builds the map.")
    elif find_spec("triton") is None:
        found.append("compiled FlexAttention needs Triton, which is not installed.")
    if q.dtype == torch.float64 or q.shape[-1] < 16:
        found.append(f"there is no compiled FlexAttention for {q.dtype} and heads {q.shape[-1]} wide.")
    if torch.is_grad_enabled() and q.requires_grad:
        found.append("gradients are wanted, which take the user's kernel.")
    if mask is not None:
        found.append("the call has a mask of its own.")
    if classes.remaining > SPARSE:
        found.append(f"{100 * classes.remaining:.0f} % of the blocks remain, more than {100 * SPARSE:.0f} %.")
    return found


def by_blocks(classes: TokenClasses, tensors: tuple[Tensor, Tensor, Tensor], plain: Tensor, sparse: ByBlocks) -> Tensor:
    """``plain`` with the queries of masked classes computed again, all in one call."""
    if not classes.parts:
        return plain
    q, k, v = tensors
    blocks = classes.blocks(q.shape[0], q.device)

    def pick(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))

    found = sparse(pick(q, blocks.queries), pick(k, blocks.keys), pick(v, blocks.keys), blocks.mask)
    place = blocks.place.reshape(len(q), 1, -1, *[1] * (plain.dim() - 3)).expand(found.shape)
    longer = torch.cat([plain, plain[:, :, :1]], dim=2)  # one more place, where what fills up a short row may go
    return longer.scatter(2, place, found)[:, :, : plain.shape[2]]


def by_class(call: AttentionCall, classes: TokenClasses, q: Tensor, plain: Tensor, part: ByClass) -> Tensor:
    """``plain`` with the queries of masked classes computed again, class by class."""
    batch, n_q = q.shape[0], q.shape[2]
    times = batch // classes.q_class.shape[0]
    for c, having, index in classes.parts:
        rows = torch.tensor([r * times + i for r in having for i in range(times)]).to(q.device, non_blocking=True)
        index = index.repeat_interleave(times, dim=0).to(q.device)
        visible = expand_rows(classes.visible(c), batch).expand(batch, -1).to(q.device)[rows]
        spread = index[:, None].expand(-1, q.shape[1], -1)  # (b, H, n)
        chosen = q[rows].gather(2, spread.clamp(max=n_q - 1)[..., None].expand(-1, -1, -1, q.shape[-1]))
        place = spread.reshape(spread.shape + (1,) * (plain.dim() - 3)).expand(*spread.shape, *plain.shape[3:])
        mine = plain[rows]
        mine = torch.cat([mine, mine[:, :, :1]], dim=2)  # one more place, where what fills up a short row may go
        mine = mine.scatter(2, place, part(chosen, rows, _joined(call.mask, visible, index, rows)))
        plain = plain.index_copy(0, rows, mine[:, :, :n_q])
    return plain


def _joined(mask: Tensor | None, visible: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """The keys that a class sees ``(b, Nk)`` together with the mask of the call for its queries ``(b, n)``."""
    keep = visible[:, None, None]
    if mask is None:
        return keep
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    mask = mask[rows] if mask.shape[0] > 1 else mask
    if mask.shape[-2] > 1:  # a row per query: those of the class
        mask = mask.expand(len(rows), -1, -1, -1)
        picked = index.clamp(max=mask.shape[-2] - 1)[:, None, :, None]
        mask = mask.gather(2, picked.expand(-1, mask.shape[1], -1, mask.shape[-1]))
    return mask & keep if mask.dtype == torch.bool else torch.where(keep, mask, -torch.inf)


def log_sum_exp_rows(call: AttentionCall, rows: Tensor | None) -> Tensor:
    """``L_i`` of every query of chosen rows (None: all) over its own keys under all masks and biases so far,
    ``(b, H, Nq)``."""
    q, k, v, mask, scale = call.q, call.k, call.v, call.mask, call.softmax_scale
    own = q, k, v
    if rows is not None:
        own = q[rows], k[rows], v[rows]
        mask = mask[rows] if mask is not None and mask.dim() == 4 and mask.shape[0] > 1 else mask
    lse = attend_with_lse(*own, mask=mask, scale=scale, is_causal=call.is_causal)[1]
    if not call.classes:
        return lse
    whole = lse if rows is None else lse.new_zeros(len(q), *lse.shape[1:]).index_copy(0, rows, lse)

    def part(chosen: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        return attend_with_lse(chosen, k[rows], v[rows], mask=mask, scale=scale)[1]

    def sparse(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
        return flex.attend(q, k, v, scale=scale, blocks=blocks, compiled=True)[1]

    for edit in call.classes:
        touched = (expand_rows(edit.weight, len(q)).to(lse.device) != 0)[..., None]
        whole = torch.where(touched, _masked(call, edit.classes, (q, k, v), whole, part, sparse), whole)
    return whole if rows is None else whole[rows]
