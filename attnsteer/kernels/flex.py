"""FlexAttention: masks and biases as functions of indices, and block-sparse maps.

Uncompiled, ``flex_attention`` builds the whole map, so this backend counts as able only while the caller is being
compiled (``torch.compile`` of the model); ``attend(..., compiled=True)`` asks for it by name. A block mask must define
its mask by ``mask_mod`` alone, because the uncompiled form ignores the block lists; ``block_mask`` and
``class_block_mask`` build such masks from a table of blocks and from classes of tokens, without ever evaluating the
``Nq x Nk`` grid.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def reasons(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> list[str]:
    """Why these tensors cannot be taken; empty where they can."""
    found = []
    if not torch.compiler.is_compiling():
        found.append(
            "builds the whole map unless compiled: torch.compile the model, or call flex.attend(compiled=True)."
        )
    if q.device.type == "cpu":
        found.append("its compiled cpu kernel returns no log-sum-exp: use flex.output() where none is needed.")
    if q.dtype == torch.float64:
        found.append("no compiled kernel for float64.")
    if q.shape[1] % k.shape[1]:
        found.append(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads.")
    return found


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    blocks: BlockMask | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; see the package for the contract.

    Args:
        blocks: a block-sparse mask on top of ``mask``, from ``block_mask``.
        compiled: run the compiled kernel although the caller is not being compiled (CUDA only).
    """
    from torch.nn.attention.flex_attention import AuxRequest

    arguments = _arguments(q, k, mask, scale, is_causal, blocks)
    output, aux = _kernel(compiled)(q, k, v, **arguments, return_aux=AuxRequest(lse=True))
    return output, aux.lse


def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    blocks: BlockMask | None = None,
    compiled: bool = False,
) -> Tensor:
    """The output alone, which the compiled kernel gives on CPU too (there without gradient)."""
    return _kernel(compiled)(q, k, v, **_arguments(q, k, mask, scale, is_causal, blocks))


def _arguments(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool, blocks: BlockMask | None
) -> dict[str, Any]:
    score_mod = _score_mod(mask, is_causal, k.shape[2] - q.shape[2])
    return {"score_mod": score_mod, "block_mask": blocks, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}


def _kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return _compiled() if compiled else flex_attention


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)  # at the limit of graphs an error, never the uncompiled map


def _score_mod(mask: Tensor | None, is_causal: bool, offset: int) -> ScoreMod | None:
    """A mask tensor and the causal order as one change of a logit."""
    if mask is None and not is_causal:
        return None
    table = None if mask is None else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if table is not None:
            at = [x if size > 1 else torch.zeros_like(x) for x, size in zip((b, h, i, j), table.shape, strict=True)]
            value = table[at[0], at[1], at[2], at[3]]
            score = torch.where(value, score, -float("inf")) if table.dtype == torch.bool else score + value
        return torch.where(j <= i + offset, score, -float("inf")) if is_causal else score

    return score_mod


def block_mask(table: Tensor, n_q: int, n_k: int) -> BlockMask:
    """A block-sparse mask from its table.

    Args:
        table: bool ``(B or 1, H or 1, ceil(Nq / 128), ceil(Nk / 128))``: True where a block of queries sees a block of
            keys. Every row must keep at least one block.
        n_q, n_k: queries and keys.

    Returns:
        A ``BlockMask`` that means the same compiled and uncompiled. Memory: a few tables of the size of ``table``.
    """

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = b if table.shape[0] > 1 else torch.zeros_like(b)
        head = h if table.shape[1] > 1 else torch.zeros_like(h)
        return table[row, head, i // BLOCK, j // BLOCK] & (j < n_k)

    return _assembled(table, table, mask_mod, n_q, n_k)


def class_block_mask(table: Tensor, q_class: Tensor, k_class: Tensor) -> BlockMask:
    """A block-sparse mask from classes of tokens. Only tokens that are sorted by class make it sparse.

    Args:
        table: bool ``(B, C, C)``: entry ``[a, b]`` says whether queries of class a see keys of class b.
        q_class, k_class: ``(B, Nq)`` and ``(B, Nk)`` ints below C. Every query must see a key.

    Returns:
        A ``BlockMask`` that means the same compiled and uncompiled. Memory: a few tables of
        ``B * ceil(Nq / 128) * ceil(Nk / 128)`` ints beside copies of the classes.
    """
    n_q, n_k = q_class.shape[1], k_class.shape[1]
    seen, hidden = (class_blocks(allowed, q_class, k_class)[:, None] for allowed in (table, ~table))
    q_class, k_class = (F.pad(x, (0, -x.shape[1] % BLOCK)) for x in (q_class, k_class))  # the kernel reads whole blocks

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[b, q_class[b, i], k_class[b, j]] & (j < n_k)

    return _assembled(seen, seen & ~hidden, mask_mod, n_q, n_k)


def class_blocks(table: Tensor, q_class: Tensor, k_class: Tensor) -> Tensor:
    """Bool ``(B, ceil(Nq / 128), ceil(Nk / 128))``: whether some query of a block sees some key of a block."""

    def there(token: Tensor) -> Tensor:  # which classes a block holds, (B, blocks, C)
        rows, n = token.shape
        row, block = torch.arange(rows, device=token.device)[:, None], torch.arange(n, device=token.device) // BLOCK
        empty = torch.zeros(rows, -(-n // BLOCK), table.shape[-1], device=token.device)
        return empty.index_put((row, block[None], token), empty.new_ones(()))

    return there(q_class) @ table.float() @ there(k_class).mT > 0


def _assembled(seen: Tensor, full: Tensor, mask_mod: Callable[..., Tensor], n_q: int, n_k: int) -> BlockMask:
    """The block mask of two tables ``(B or 1, H or 1, ...)``: blocks with a visible key, and those without a hidden
    one, whose mask_mod the kernel skips. The last key block is not of the latter where Nk is no multiple of 128."""
    from torch.nn.attention.flex_attention import BlockMask

    full = full & (torch.arange(seen.shape[-1], device=seen.device) < n_k // BLOCK)
    return BlockMask.from_kv_blocks(
        *_block_list(seen & ~full),
        *_block_list(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(n_q, n_k),
    )


def _block_list(table: Tensor) -> tuple[Tensor, Tensor]:
    """Number of kept key blocks of every query block, and their indices (kept ones first)."""
    return table.sum(-1).int(), torch.argsort(table.int(), dim=-1, descending=True, stable=True).int()
