"""Attention calls out of nothing, and the explicit map as the oracle of what is done to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnsteer.classes import TokenClasses
from attnsteer.kernels import reference
from attnsteer.site import AttentionCall, Kind, Site, Spans

MASKS = ("none", "keys_bool", "keys_float", "full_bool", "full_float", "heads_float", "two_axes", "causal")


def make_mask(kind: str, batch: int, heads: int, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor | None:
    """A mask in each of the shapes that models use; query i always sees key i."""
    own = torch.eye(n_q, n_k, dtype=torch.bool)
    full = (torch.rand(batch, 1, n_q, n_k) > 0.4) | own
    keys = torch.rand(batch, 1, 1, n_k) > 0.3
    keys[..., 0] = True
    table: dict[str, Callable[[], Tensor | None]] = {
        "none": lambda: None,
        "causal": lambda: None,
        "keys_bool": lambda: keys,
        "keys_float": lambda: torch.where(keys, torch.randn(batch, 1, 1, n_k), -torch.inf).to(dtype),
        "full_bool": lambda: full,
        "full_float": lambda: torch.where(full, torch.randn(batch, 1, n_q, n_k), -torch.inf).to(dtype),
        "heads_float": lambda: torch.randn(batch, heads, n_q, n_k, dtype=dtype),
        "two_axes": lambda: full[0, 0],
    }
    return table[kind]()


def make_call(
    *,
    batch: int = 3,
    heads: int = 6,
    kv_heads: int = 2,
    n_q: int = 13,
    n_k: int | None = None,
    dim: int = 8,
    dim_v: int | None = None,
    mask: str = "none",
    kind: Kind = "joint",
    spans: Spans | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> AttentionCall:
    """A call of random tensors whose kernel is PyTorch's SDPA, as a model would make it."""
    n_k = n_q if n_k is None else n_k
    q = torch.randn(batch, heads, n_q, dim, dtype=dtype)
    k = torch.randn(batch, kv_heads, n_k, dim, dtype=dtype)
    v = torch.randn(batch, kv_heads, n_k, dim_v or dim, dtype=dtype)
    return call_of(q, k, v, make_mask(mask, batch, heads, n_q, n_k, dtype), mask == "causal", kind, spans, scale)


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    kind: Kind = "joint",
    spans: Spans | None = None,
    scale: float | None = None,
) -> AttentionCall:
    """A call of given tensors."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = mask) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=gqa)

    site = Site("block.attn", kind, 0, 0, q.shape[1], k.shape[1], q.shape[-1])
    return AttentionCall(site, kernel, q, k, v, mask, scale, causal, spans)


def story_call(
    batch: int, grid: tuple[int, int, int], text: int = 0, *, text_first: bool = False, step: int, **options: Any
) -> AttentionCall:
    """Self-attention of pictures at one step of the schedule, joint with ``text`` tokens if there are any."""
    n = math.prod(grid)
    spans = Spans(slice(text, n + text), slice(0, text), grid)
    if not text_first:
        spans = Spans(slice(0, n), slice(n, n + text), grid)
    kind: Kind = "joint" if text else "self"
    call = make_call(batch=batch, heads=3, kv_heads=3, n_q=n + text, kind=kind, spans=spans, **options)
    call.step = torch.tensor(step)
    return call


def rows_of(call: AttentionCall, rows: slice | list[int]) -> AttentionCall:
    """The call with some of its batch rows alone, or in another order."""
    mask = call.mask if call.mask is None or call.mask.dim() < 4 or call.mask.shape[0] == 1 else call.mask[rows]
    spans, scale = call.spans, call.scale
    found = call_of(call.q[rows], call.k[rows], call.v[rows], mask, call.is_causal, call.site.kind, spans, scale)
    found.step = call.step
    return found


def classes_of(rows: int, n_q: int, n_k: int | None = None) -> TokenClasses:
    """Background 0 that sees and is seen by all, and two classes that do not see each other."""
    table = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1]]).bool()[None]
    q_class, k_class = torch.randint(0, 3, (rows, n_q)), torch.randint(0, 3, (rows, n_k or n_q))
    q_class[:, :3] = k_class[:, :3] = torch.arange(3)
    return TokenClasses(table, q_class, q_class if n_k is None else k_class)


def explicit_map(call: AttentionCall, bias: Tensor | None = None) -> Tensor:
    """The attention map ``(B, H, Nq, Nk)`` in float64, with a bias ``(R, H or 1, Nq or 1, Nk)`` on the logits."""
    logits = reference.logits(call.q, call.k, mask=call.mask, scale=call.scale, is_causal=call.is_causal)
    return torch.softmax(logits if bias is None else logits + bias.double(), dim=-1)


def repeated(x: Tensor, call: AttentionCall) -> Tensor:
    """k or v with one head per query head, float64."""
    return torch.stack([x[:, h // call.group] for h in range(call.q.shape[1])], dim=1).double()


@contextmanager
def untouched(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, nobody may write into these tensors."""
    before = [(t, t._version, t.clone()) for t in tensors]
    yield
    assert all(t._version == version and torch.equal(t, copy) for t, version, copy in before)


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor made inside the block had, kernels' own scratch space excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out
