"""Fused attention that also returns the log-sum-exp of its logits.

Every backend is a module with two functions of one signature:

* ``reasons(q, k, v, mask, is_causal) -> list[str]``: why it cannot take these tensors; empty means it can;
* ``attend(q, k, v, *, mask=None, scale=None, is_causal=False) -> (output, lse)``.

Shapes: q ``(B, H, Nq, D)``; k ``(B, Hkv, Nk, D)`` and v ``(B, Hkv, Nk, Dv)`` un-repeated (query head h reads key head
``h // (H / Hkv)``); mask bool (True = keep) or additive float, broadcastable to ``(B, H, Nq, Nk)``; a causal flag
means that query i sees the keys up to ``i + Nk - Nq``. The output is ``(B, H, Nq, Dv)`` in the dtype of q; lse is
``(B, H, Nq)``, natural log, float32 (float64 for float64 input). A row without a visible key has output 0 and lse -inf.

``with kernels.use("xformers"):`` forces a backend; ``benchmarks/speed/kernels.py`` measures which is fastest where.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from ..errors import SteeringError
from . import flex, sdpa, xformers

BACKENDS = {"sdpa": sdpa, "xformers": xformers, "flex": flex}
"""In order of preference. ``reference`` is no backend: it builds the map."""
_allowed: tuple[ModuleType, ...] = tuple(BACKENDS.values())


@contextmanager
def use(name: str) -> Iterator[None]:
    """Inside, only this backend computes what needs a log-sum-exp; where it cannot, that is an error.

    The model's own attention calls keep the kernel that the user chose for them.

    Args:
        name: of ``BACKENDS``.

    Raises:
        SteeringError: there is no such backend.
    """
    global _allowed
    if name not in BACKENDS:
        raise SteeringError(f"There is no kernel backend {name!r}; there are {', '.join(BACKENDS)}.")
    before, _allowed = _allowed, (BACKENDS[name],)
    try:
        yield
    finally:
        _allowed = before


def choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> ModuleType:
    """The first backend that is allowed and can take these tensors.

    Raises:
        SteeringError: none can; one reason per backend and obstacle.
    """
    obstacles = []
    for backend in _allowed:
        found = backend.reasons(q, k, v, mask, is_causal)
        if not found:
            return backend
        obstacles += [f"{backend.__name__.rpartition('.')[2]}: {reason}" for reason in found]
    raise SteeringError(obstacles)


def attend_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp by the first backend that can.

    Gradients flow through both results (through the log-sum-exp to q and k; not to a mask).

    Raises:
        SteeringError: no backend can.
    """
    backend = choose(q, k, v, mask, is_causal)
    output, lse = backend.attend(q, k, v, mask=mask, scale=scale, is_causal=is_causal)
    return output, _with_gradient(backend, q, k, lse, mask, scale, is_causal)


def _with_gradient(
    backend: ModuleType, q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool
) -> Tensor:
    """Give the log-sum-exp its gradient where one is asked for and the backend has none.

    ``dL_i/dq_i = scale * sum_j p_ij k_j`` and ``dL_i/dk_j = scale * p_ij q_i``: both are gradients of
    ``scale * q_i . m_i`` with ``m = attention(q, k, values=k)`` and its weights held fixed. One more fused call.
    """
    if not torch.is_grad_enabled() or lse.requires_grad or not (q.requires_grad or k.requires_grad):
        return lse
    fixed_q, fixed_k = q.detach(), k.detach()
    mean_key = backend.attend(fixed_q, fixed_k, k, mask=mask, scale=scale, is_causal=is_causal)[0]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    fixed_mean = mean_key.detach()
    change = (q - fixed_q) * fixed_mean + fixed_q * (mean_key - fixed_mean)  # zero, with the wanted gradient
    return lse + factor * change.to(lse.dtype).sum(-1)


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets from the attention over each: ``sum_p exp(L_p - L) O_p``.

    Args:
        outputs: ``(B, H, Nq, Dv)`` each. A part without keys for a row has lse -inf there and is ignored.
        lses: ``(B, H, Nq)`` each, natural log.

    Returns:
        The merged output, in the dtype of the first, and its log-sum-exp. Arithmetic in float32 (float64 for float64).
    """
    if not outputs or len(outputs) != len(lses):
        raise SteeringError(
            f"merge needs as many outputs as log-sum-exps, at least one; got {len(outputs)} and {len(lses)}."
        )
    dtype = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    total = torch.stack([lse.to(dtype) for lse in lses]).logsumexp(dim=0)
    anchor = torch.where(total == -torch.inf, torch.zeros_like(total), total)  # no key anywhere: weights 0, not nan
    merged = torch.zeros_like(outputs[0], dtype=dtype)
    for output, lse in zip(outputs, lses, strict=True):
        weight = torch.exp(lse.to(dtype) - anchor)[..., None]
        merged = merged + torch.where(weight == 0, torch.zeros_like(merged), weight * output.to(dtype))
    return merged.to(outputs[0].dtype), total
