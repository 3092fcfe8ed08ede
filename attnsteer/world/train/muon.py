"""Muon (K. Jordan and others, 2024): momentum whose matrices are made orthogonal before each step.

Momentum m <- b m + (1 - b) g; Nesterov's look-ahead u = (1 - b) g + b m; five Newton-Schulz steps turn u into (nearly)
U V^T of its singular value decomposition; w <- w - 0.2 sqrt(max(rows, columns)) rate U V^T, so that a rate chosen for
AdamW fits. torch.optim.Muon does the Newton-Schulz steps in bfloat16 always, which is thirty times slower on a CPU
without bfloat16 instructions; here they keep the type of the weights, and matrices of one shape go together. Weights
with more than two dimensions (convolutions) count as matrices [outputs, the rest].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[n, rows, columns] -> the same with all singular values near 1 (0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """params: weights of two or more dimensions; lr: as for AdamW; weight_decay: decoupled; momentum: 0 to 1."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; weights without a gradient stay."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[torch.Tensor]] = {}
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                shapes.setdefault((weight.shape[0], weight[0].numel()), []).append(weight)
            for shape, weights in shapes.items():
                self._step(weights, shape, group)

    def _step(self, weights: list[torch.Tensor], shape: tuple[int, int], group: dict[str, Any]) -> None:
        keep = group["momentum"]
        ahead = []
        for weight in weights:
            state, gradient = self.state[weight], weight.grad
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(gradient, 1 - keep)
            ahead.append(gradient.lerp(state["momentum"], keep).reshape(shape))
        steps = orthogonal(torch.stack(ahead))
        size = 0.2 * max(shape) ** 0.5 * group["lr"]
        for weight, step in zip(weights, steps, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step.reshape(weight.shape), alpha=size)
