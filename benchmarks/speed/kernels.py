"""Which kernel gives attention with its log-sum-exp fastest: every backend that can, at the shapes of known models.

    python benchmarks/speed/kernels.py --log
    python benchmarks/speed/kernels.py --device cuda --dtype bfloat16 --log

Beside the backends of ``attnsteer.kernels`` stand the library's own call, which returns no log-sum-exp (what knowing it
costs), and the explicit map (what reference implementations do). The order of ``kernels.BACKENDS`` should be that of
this table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import measure
import torch
from measure import Ratio
from torch import Tensor
from torch.nn import functional as F

from attnsteer import kernels

SHAPES = {
    "cpu": {
        "world-sd3": (4, 6, 6, 272, 272, 32),
        "world-llava": (8, 8, 8, 90, 90, 32),
        "SD1.5 32x32": (2, 8, 8, 1024, 1024, 40),
    },
    "cuda": {
        "SD1.5 64x64": (8, 8, 8, 4096, 4096, 40),
        "SD3 1024 px": (4, 24, 24, 4429, 4429, 64),
        "FLUX 1024 px": (1, 24, 24, 4608, 4608, 128),
        "LLaVA-1.5-7B prefill": (8, 32, 32, 640, 640, 128),
        "Qwen2.5-VL-7B prefill": (4, 28, 4, 2048, 2048, 128),
    },
}
"""Name -> rows, query heads, key heads, queries, keys, width of a head."""


def tensors(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, kv_heads, queries, keys, width = shape
    source = torch.Generator().manual_seed(0)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (torch.randn(rows, *size, width, generator=source).to(device, dtype) for size in sizes)
    return q, k, v


def forced(name: str, q: Tensor, k: Tensor, v: Tensor) -> Any:
    with kernels.use(name):
        return kernels.attend_with_lse(q, k, v)


def explicit(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by its map, as eager implementations compute it."""
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
    weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v, weights


def cases(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    q, k, v = tensors(shape, device, dtype)
    able = [name for name, backend in kernels.BACKENDS.items() if not backend.reasons(q, k, v, None, False)]
    made = {"no log-sum-exp": partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=q.shape[1] != k.shape[1])}
    made |= {name: partial(forced, name, q, k, v) for name in able}
    if device == "cuda":
        made["flex, compiled"] = partial(kernels.flex.attend, q, k, v, compiled=True)
    return {**made, "explicit map": partial(explicit, q, k, v)}


def main() -> None:
    options = measure.parser(__doc__, repeats=15).parse_args()
    for name, shape in SHAPES[options.device].items():
        print(name)
        made = cases(shape, options.device, getattr(torch, options.dtype))
        ratios = [Ratio(case, "no log-sum-exp") for case in made if case != "no log-sum-exp"]
        job = f"kernels-{name.replace(' ', '-')}"
        measure.report(job, options, made, ratios, {"shape (B, H, Hkv, Nq, Nk, D)": list(shape)})


if __name__ == "__main__":
    main()
