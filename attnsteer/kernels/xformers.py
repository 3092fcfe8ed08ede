"""xformers' memory-efficient attention, where it is installed (CUDA only). Never a requirement.

Written from its documentation: no test runs it without a CUDA device, and the sdpa backend comes first anyway.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def reasons(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> list[str]:
    """Why these tensors cannot be taken; empty where they can."""
    found = []
    if find_spec("xformers") is None:
        found.append("not installed: pip install xformers.")
    if q.device.type != "cuda":
        found.append(f"runs on cuda only, not on {q.device.type}.")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        found.append(f"no kernel for {q.dtype}.")
    if mask is not None:
        found.append("tensor masks are left to the sdpa backend; only the causal flag is lowered here.")
    if is_causal and q.shape[2] > k.shape[2]:
        found.append("causal order with more queries than keys.")
    return found


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, Nq, Dv)`` and log-sum-exp ``(B, H, Nq)``; see the package for the contract."""
    from xformers.ops import fmha

    bias = fmha.attn_bias.LowerTriangularFromBottomRightMask() if is_causal else None
    groups, per_group = k.shape[1], q.shape[1] // k.shape[1]
    # (B, H, N, D) -> (B, N, Hkv, G, D): the library's grouped layout, keys expanded without copying
    queries = q.unflatten(1, (groups, per_group)).permute(0, 3, 1, 2, 4)
    keys, values = (x[:, :, None].expand(-1, -1, per_group, -1, -1).permute(0, 3, 1, 2, 4) for x in (k, v))
    output, lse = fmha.memory_efficient_attention_forward_requires_grad(
        queries, keys, values, attn_bias=bias, scale=scale
    )
    return output.permute(0, 2, 3, 1, 4).flatten(1, 2), lse.flatten(1, 2)[..., : q.shape[2]].float()
