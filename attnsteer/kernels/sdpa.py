"""PyTorch's own fused kernels, called through the operators that give their log-sum-exp back.

``F.scaled_dot_product_attention`` drops the log-sum-exp, the operators beneath it do not:

* CPU: ``_scaled_dot_product_flash_attention_for_cpu``: float16 to float64, grouped-query, additive masks, causal flag.
  It reads wrong memory where the last axis is strided, dies on empty tensors and says 0 for the log-sum-exp of a row
  without keys; the first and the last are mended here, empty tensors are refused.
* CUDA: the flash operator for half precision without a mask, the memory-efficient one for masks and float32. Neither
  knows float64.

A bool mask becomes a float of the *mask's own* shape (never expanded over heads).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_HALF = (torch.float16, torch.bfloat16)


def reasons(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> list[str]:
    """Why these tensors cannot be taken; empty where they can."""
    found = []
    if q.device.type not in ("cpu", "cuda"):
        found.append(
            f"no operator that returns the log-sum-exp on device {q.device.type!r}: move the model to cpu or cuda."
        )
    if not q.dtype == k.dtype == v.dtype:
        found.append(f"q, k and v have the dtypes {q.dtype}, {k.dtype}, {v.dtype}: use one.")
    if q.shape[1] % k.shape[1]:
        found.append(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads.")
    if min(*q.shape, *k.shape, *v.shape) == 0:
        found.append(f"empty tensors: q {tuple(q.shape)}, k {tuple(k.shape)}.")
    if is_causal and mask is not None and mask.dim() > 1 and mask.shape[-2] != 1:
        found.append("a mask per query together with the causal flag: fold the causal order into the mask.")
    if q.device.type == "cuda":
        if q.dtype not in (*_HALF, torch.float32):
            found.append(f"no fused CUDA kernel for {q.dtype}: use float32, float16 or bfloat16.")
        if mask is not None and is_causal:
            found.append("a key mask together with the causal flag on cuda: fold the causal order into the mask.")
    return found


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, Nq, Dv)`` and log-sum-exp ``(B, H, Nq)``; see the package for the contract."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n_q, n_k = q.shape[2], k.shape[2]
    if is_causal and n_q == 1:
        is_causal = False  # the last query sees every key
    if is_causal and n_q != n_k:
        return _causal_rectangle(q, k, v, mask, scale)
    operator = _cpu if q.device.type == "cpu" else _cuda
    mask = None if mask is None else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    width = v.shape[-1]
    q, k, v = _same_width(q, k, v)
    output, lse = operator(q, k, v, mask, scale, is_causal)
    if mask is not None:  # rows without a visible key
        visible = _visible_rows(mask, is_causal, n_k)
        lse = torch.where(visible, lse, -math.inf)
        output = torch.where(visible[..., None], output, 0.0)
    return output[..., :width], lse


def _visible_rows(mask: Tensor, is_causal: bool, n_k: int) -> Tensor:
    """Which rows see a key at all, broadcastable to ``(B, H, Nq)``."""
    if not is_causal:
        return mask.any(dim=-1) if mask.dtype == torch.bool else mask.amax(dim=-1) > -math.inf
    keys = mask[..., 0, :] if mask.dtype == torch.bool else mask[..., 0, :] > -math.inf
    return keys.expand(*keys.shape[:-1], n_k).cumsum(dim=-1) > 0  # row i of the causal square sees the keys 0..i


def _causal_rectangle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Causal order with ``Nk != Nq``, whose operators disagree about the alignment: the keys before the first query are
    open to all rows and are merged with the causal square; queries before the first key see nothing."""
    from . import merge

    n_q, n_k = q.shape[2], k.shape[2]
    ahead = n_k - n_q
    if ahead < 0:
        output, lse = attend(q[:, :, -ahead:], k, v, mask=mask, scale=scale, is_causal=True)
        return F.pad(output, (0, 0, -ahead, 0)), F.pad(lse, (-ahead, 0), value=-math.inf)
    parts = []
    for keys, causal in ((slice(0, ahead), False), (slice(ahead, n_k), True)):
        part = mask if mask is None or mask.shape[-1] == 1 else mask[..., keys]
        parts.append(attend(q, k[:, :, keys], v[:, :, keys], mask=part, scale=scale, is_causal=causal))
    return merge([output for output, _ in parts], [lse for _, lse in parts])


def _same_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero channels up to one width (a multiple of 8 on CUDA), which change nothing; the scale is explicit."""
    width = max(q.shape[-1], v.shape[-1])
    if q.device.type == "cuda":
        width = -(-width // 8) * 8

    def pad(x: Tensor) -> Tensor:
        x = x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
        return x if x.stride(-1) == 1 else x.contiguous()

    return pad(q), pad(k), pad(v)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a float of the dtype of q, in its own shape."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
    return mask.to(dtype).contiguous() if mask.stride(-1) > 1 else mask.to(dtype)


def _cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    if dtype in _HALF:  # its own exponential of half types is coarse on some CPUs: log-sum-exp off by 4e-5
        q, k, v = q.float(), k.float(), v.float()
    bias = None if mask is None else _additive(mask, q.dtype)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale
    )
    return output.to(dtype), lse


def _cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    n_q, n_k, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if mask is None and q.dtype in _HALF and q.shape[-1] <= 256:
        flash = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
        return flash[0], flash[1]
    if group > 1:  # this operator wants equal heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    bias = None
    if mask is not None:  # rows of keys must start on 16 bytes: pad, then expand without copying
        bias = _additive(mask, q.dtype)
        bias = bias.expand(-1, -1, -1, n_k)
        bias = F.pad(bias, (0, -n_k % 8))[..., :n_k].expand(q.shape[0], q.shape[1], n_q, n_k)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal, scale=scale)
    return efficient[0], efficient[1][:, :, :n_q]
