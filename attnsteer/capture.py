"""Reading attention: chosen rows and columns of the map in float32, and sums over it that need no map at all.

| function | gives | how |
|---|---|---|
| ``probabilities`` | ``A[rows, columns]`` | ``exp(s - L)`` from q, k and a fused log-sum-exp |
| ``column_mass`` | mass of every query on sets of keys | the fused kernel with indicators as values |
| ``token_columns`` | ``A[image, text keys]``, keys chosen per batch row | explicit softmax, or ``column_mass`` |
| ``row_mass`` | mass that every key gets from a set of queries | the fused kernel with queries and keys exchanged |
| ``Capture`` | a processor that records ``probabilities`` | attach it like any other |

All know grouped-query attention, masks and causal order; the first three have exact gradients. They read the map of the
model, before the edits of the same call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import SteeringError
from .kernels import attend_with_lse, choose
from .logits import additive, compute_dtype, log_sum_exp, per_query, per_query_head, plain_logits
from .processor import Processor, check_choice
from .site import AttentionCall, Kind, Site
from .where import Where

Rows = Literal["all", "last"] | tuple[int, ...]
Columns = Literal["all", "image", "text"] | tuple[int, ...]


def probabilities(call: AttentionCall, rows: slice | Sequence[int], columns: slice | Sequence[int] | Tensor) -> Tensor:
    """``A[rows, columns]``, ``(B, H, n, m)`` float32 (float64 for float64 calls).

    Args:
        rows: query rows, as a slice or as indices (negative ones count from the end).
        columns: keys, likewise; or a bool tensor ``(B, Nk)`` where they differ per batch row, which gives all Nk
            columns with zeros elsewhere.

    Temporary: ``B * H * n * m * 4`` bytes; single rows of a causal call take ``n * Nk`` more.
    """
    row = _index(rows, call.q.shape[2], call.q.device)
    column = slice(None) if isinstance(columns, Tensor) else _index(columns, call.k.shape[2], call.k.device)
    lse = _row_lse(call, row)
    logits = plain_logits(call.q[:, :, row], call.k[:, :, column], call.softmax_scale)
    mask = _mask_rows(call.mask, row)
    if mask is not None:
        mask = mask if mask.shape[-1] == 1 else mask[..., column]
        logits = logits + additive(mask, logits.dtype)
    visible = (lse != -math.inf)[..., None]
    if call.is_causal:
        visible = visible & _order(call, row, column)
    if isinstance(columns, Tensor):
        visible = visible & columns[:, None, None]
    hidden = torch.where(visible, logits - lse[..., None], -math.inf)
    return torch.exp(hidden)


def _index(wanted: slice | Sequence[int], total: int, device: torch.device) -> slice | Tensor:
    """Positions as a slice with plain bounds or as a tensor of indices."""
    if isinstance(wanted, slice):
        start, stop, _ = wanted.indices(total)
        return slice(start, max(start, stop))
    wrong = [i for i in wanted if not -total <= i < total]
    if wrong:
        raise SteeringError(f"Token {wrong[0]} does not exist: there are {total}, 0 to {total - 1}.")
    return torch.tensor([i % total for i in wanted], device=device)


def _mask_rows(mask: Tensor | None, row: slice | Tensor) -> Tensor | None:
    return mask if mask is None or not per_query(mask) else mask[..., row, :]


def _order(call: AttentionCall, row: slice | Tensor, column: slice | Tensor) -> Tensor:
    """Which of the chosen keys the causal order shows to the chosen queries, bool ``(n, m)``."""
    queries = torch.arange(call.q.shape[2], device=call.q.device)[row] + (call.k.shape[2] - call.q.shape[2])
    return torch.arange(call.k.shape[2], device=call.q.device)[column] <= queries[:, None]


def _row_lse(call: AttentionCall, row: slice | Tensor) -> Tensor:
    """The log-sum-exp of the chosen rows over all their visible keys, ``(B, H, n)``."""
    if isinstance(row, slice):
        return log_sum_exp(call, row)
    mask = _mask_rows(call.mask, row)
    if call.is_causal:
        order = _order(call, row, slice(None))
        if mask is None:
            mask = order
        else:
            mask = mask & order if mask.dtype == torch.bool else torch.where(order, mask, -math.inf)
    return attend_with_lse(call.q[:, :, row], call.k, call.v, mask=mask, scale=call.softmax_scale)[1]


def column_mass(call: AttentionCall, indicator: Tensor) -> Tensor:
    """Attention mass of every query on sets of keys: ``sum_j A_ij c_j``.

    The indicators ride as values through the fused kernel, in chunks of the head width. Exact gradients, no map.

    Args:
        indicator: bool or float, ``(Nk,)``, ``(B or 1, Nk)``, or ``(B or 1, Nk, m)`` for m sets.

    Returns:
        ``(B, H, Nq)``, or ``(B, H, Nq, m)`` where m is given; float32 (float64 for float64 calls).
    """
    dtype = compute_dtype(call.q)
    q, k = call.q.to(dtype), call.k.to(dtype)
    sets = indicator[None] if indicator.dim() == 1 else indicator
    sets = sets[..., None] if indicator.dim() < 3 else sets
    values = sets.to(dtype)[:, None].expand(q.shape[0], k.shape[1], -1, -1)  # (B, Hkv, Nk, m)
    parts = []
    for part in values.split(q.shape[-1], dim=-1):
        value = F.pad(part, (0, q.shape[-1] - part.shape[-1]))
        backend = choose(q, k, value, call.mask, call.is_causal)
        mass = backend.attend(q, k, value, mask=call.mask, scale=call.softmax_scale, is_causal=call.is_causal)[0]
        parts.append(mass[..., : part.shape[-1]])
    total = torch.cat(parts, dim=-1)
    return total if indicator.dim() == 3 else total[..., 0]


def token_columns(call: AttentionCall, columns: Tensor) -> Tensor:
    """The columns of chosen text keys, image queries alone, with exact gradients.

    Cross-attention has few keys, so its softmax is explicit; a joint map is never built (``column_mass``).

    Args:
        columns: int ``(B, m)``, positions among the text keys; they may differ per batch row.

    Returns:
        ``(B, H, image queries, m)`` float32 (float64 for float64 calls).
    """
    if call.spans is None or not isinstance(call.spans.text, slice) or not isinstance(call.spans.image, slice):
        raise SteeringError(f"The token layout of {call.site.name!r} is unknown: its text columns cannot be read.")
    if call.site.kind == "cross":
        logits = plain_logits(call.q, call.k, call.softmax_scale)
        weights = torch.softmax(logits if call.mask is None else logits + additive(call.mask, logits.dtype), dim=-1)
        return weights.gather(-1, columns[:, None, None].expand(*weights.shape[:3], -1))
    image = slice(*call.spans.image.indices(call.k.shape[2]))
    start = call.spans.text.indices(call.k.shape[2])[0]
    indicator = torch.zeros(columns.shape[0], call.k.shape[2], columns.shape[1], device=columns.device)
    indicator = indicator.scatter(1, columns[:, None] + start, 1.0)
    return column_mass(replace(call, q=call.q[:, :, image], visible=call.mask_rows(image)), indicator)


def row_mass(call: AttentionCall, weight: Tensor) -> Tensor:
    """Attention mass that every key receives: ``sum_i w_i A_ij``.

    ``A_ij = exp(s_ij - L_i)``: the exponential of a log-sum-exp over *queries* with the bias ``log w_i - L_i``, that is
    a fused call with queries and keys exchanged. No map, no gradient.

    Args:
        weight: bool or float >= 0, ``(Nq,)`` or ``(B or 1, Nq)``: the queries that count.

    Returns:
        ``(B, H, Nk)`` float32 (float64 for float64 calls).

    Raises:
        SteeringError: masks that differ per query, or causal order: sum ``probabilities`` of the rows instead.
    """
    if per_query(call.mask) or call.is_causal:
        raise SteeringError(
            f"row_mass cannot exchange queries and keys under a mask per query or causal order at {call.site.name!r}: "
            "sum probabilities(call, rows, columns) over a few rows instead."
        )
    with torch.no_grad():
        dtype = compute_dtype(call.q)
        q, k = call.q.to(dtype), per_query_head(call.k.to(dtype), call.group)
        lse = log_sum_exp(replace(call, q=q, k=call.k.to(dtype), v=call.v.to(dtype)), slice(0, q.shape[2]))
        weight = (weight[None] if weight.dim() == 1 else weight).to(dtype)
        bias = torch.where(lse == -math.inf, -math.inf, weight.log()[:, None] - lse)
        mass = attend_with_lse(k, q, q, mask=bias[:, :, None], scale=call.softmax_scale)[1]
        return mass.exp() if call.mask is None else (mass + additive(call.mask[..., 0, :], dtype)).exp()


@dataclass(frozen=True)
class Capture(Processor):
    """Records chosen rows and columns of the attention map and changes nothing.

    Args:
        where: layers, heads and steps; head mappings take layers counted from 0.
        rows: "all" queries, the "last" one, or a tuple of indices.
        columns: "text" or "image" keys, "all", or a tuple of indices.
        reduce: "none" keeps the heads, "heads" averages them.
        calls: "each" keeps every kernel call (a step, or a token of a generation) apart, "mean" averages them as they
            come.
        byte_budget: the most bytes that the map of one call may take before reduction. Needed where rows and columns
            both grow with the sequence (an N x N map); checked wherever it is given.
        gradient: keep the autograd graph of the maps.

    The maps live in the state that the engine hands back, one dict per site; ``collect`` makes tensors of it.
    """

    rows: Rows = "all"
    columns: Columns = "text"
    reduce: Literal["none", "heads"] = "none"
    calls: Literal["each", "mean"] = "each"
    byte_budget: int | None = None
    gradient: bool = False

    kinds: ClassVar[tuple[Kind, ...]] = ("cross", "joint", "causal", "self")
    reads_only: ClassVar = True

    def __post_init__(self) -> None:
        for name, words in (("rows", ("all", "last")), ("columns", ("all", "image", "text"))):
            value = getattr(self, name)
            if not (isinstance(value, tuple) and value and all(type(i) is int for i in value)) and value not in words:
                allowed = ", ".join(map(repr, words))
                raise SteeringError(
                    f"Capture({name}={value!r}) is not known: allowed are {allowed} or a tuple of indices."
                )
        check_choice(self, "reduce", ("none", "heads"))
        check_choice(self, "calls", ("each", "mean"))
        heads = self.where.heads
        if isinstance(heads, Mapping) and any(isinstance(layer, int) and layer < 0 for layer in heads):
            raise SteeringError("Capture reads its heads at the site alone: count the layers of where.heads from 0.")

    @property
    def token_agnostic(self) -> bool:
        return self.columns not in ("image", "text")

    def refusals(self, site: Site) -> list[str]:
        reasons = []
        if (site.kind, self.columns) in (("self", "text"), ("cross", "image")):
            reasons.append(f"Capture(columns={self.columns!r}): {site.name!r} ({site.kind}) has no such keys.")
        whole = self.columns in ("all", "image") or (site.kind == "causal" and self.columns == "text")
        if self.rows == "all" and whole and site.kind != "cross" and self.byte_budget is None:
            reasons.append(
                f"Capture(rows='all', columns={self.columns!r}) is a whole map at {site.name!r}: give byte_budget=, or "
                "fewer rows or columns."
            )
        return reasons

    def react(self, call: AttentionCall) -> None:
        reasons = self.refusals(call.site)
        chosen = Where(layers=call.site.name, heads=self.where.heads).select([call.site], (call.site.kind,))
        call = chosen_heads(call, chosen[call.site])
        columns = self._columns(call)
        size = self._bytes(call, columns)
        if self.byte_budget is not None and size > self.byte_budget:
            reasons.append(f"The map at {call.site.name!r} takes {size} bytes; byte_budget is {self.byte_budget}.")
        if reasons:
            raise SteeringError(reasons)
        rows = slice(0, None) if self.rows == "all" else slice(-1, None) if self.rows == "last" else self.rows
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
            found = probabilities(call, rows, columns)
            found = found.mean(dim=1, keepdim=True) if self.reduce == "heads" else found
            self._store(call.state, found)

    def _columns(self, call: AttentionCall) -> slice | tuple[int, ...] | Tensor:
        if isinstance(self.columns, tuple):
            return self.columns
        if self.columns == "all" or call.site.kind in ("self", "cross"):
            return slice(0, call.k.shape[2])
        if call.spans is None:
            raise SteeringError(f"The token layout of {call.site.name!r} is unknown: give columns as indices or 'all'.")
        return call.spans.image if self.columns == "image" else call.spans.text

    def _bytes(self, call: AttentionCall, columns: slice | tuple[int, ...] | Tensor) -> int:
        n = len(self.rows) if isinstance(self.rows, tuple) else call.q.shape[2] if self.rows == "all" else 1
        if isinstance(columns, slice):
            m = len(range(*columns.indices(call.k.shape[2])))
        else:
            m = columns.shape[-1] if isinstance(columns, Tensor) else len(columns)
        return call.q.shape[0] * call.q.shape[1] * n * m * compute_dtype(call.q).itemsize

    def _store(self, state: dict[str, Any], found: Tensor) -> None:
        if self.calls == "each":
            state.setdefault("maps", []).append(found)
            return
        count = state.get("count", 0)
        if count and state["maps"][0].shape != found.shape:
            raise SteeringError(f"Capture(calls='mean') met maps of {tuple(found.shape)}: use calls='each'.")
        state["maps"] = [found if count == 0 else state["maps"][0] + (found - state["maps"][0]) / (count + 1)]
        state["count"] = count + 1

    @staticmethod
    def collect(states: Mapping[Site, Mapping[str, Any]]) -> dict[str, Tensor]:
        """What was recorded, by site name: ``(calls, B, H or 1, n, m)`` float32.

        Keys that appeared during a generation have zero columns in earlier calls.

        Raises:
            SteeringError: the calls of a site differ in their rows.
        """
        return {site.name: _stack(site.name, state["maps"]) for site, state in states.items() if state.get("maps")}


def chosen_heads(call: AttentionCall, heads: tuple[int, ...]) -> AttentionCall:
    """The call with the chosen heads alone, key heads repeated to match."""
    if heads == tuple(range(call.q.shape[1])):
        return call
    own = torch.tensor(heads, device=call.q.device)
    keys = own // call.group
    mask = call.mask
    if mask is not None and mask.dim() >= 3 and mask.shape[-3] != 1:
        mask = mask.index_select(mask.dim() - 3, own)
    return replace(call, q=call.q[:, own], k=call.k[:, keys], v=call.v[:, keys], visible=mask)


def _stack(name: str, maps: Sequence[Tensor]) -> Tensor:
    if len({m.shape[:-1] for m in maps}) > 1:
        shapes = sorted({tuple(m.shape) for m in maps})
        raise SteeringError(f"The maps of {name!r} differ in shape, {shapes}: capture rows='last', or one phase only.")
    width = max(m.shape[-1] for m in maps)
    return torch.stack([F.pad(m, (0, width - m.shape[-1])) for m in maps])
