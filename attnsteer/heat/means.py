"""Running means of attention maps: what is averaged is never stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SteeringError

Axis = Literal["step", "layer", "head"]
Per: TypeAlias = Literal["average", "step", "layer", "head"] | Sequence[str]
AXES: tuple[Axis, ...] = ("step", "layer", "head")
Key: TypeAlias = tuple[int | None, int | None]


def kept_axes(per: Per, allowed: Sequence[Axis] = AXES) -> tuple[Axis, ...]:
    """What is kept apart. A head means nothing without its layer, so ``"head"`` keeps both.

    Raises:
        SteeringError: a word that is no axis.
    """
    wanted = {per} if isinstance(per, str) else set(per)
    unknown = sorted(wanted - {"average", *allowed})
    if unknown or not wanted or ("average" in wanted and len(wanted) > 1):
        words = ", ".join(map(repr, ("average", *allowed)))
        raise SteeringError(f"per={per!r} is not known: allowed are {words}, or several axes in a tuple.")
    return tuple(a for a in allowed if a in wanted or (a == "layer" and "head" in wanted))


class Means:
    """Means over steps, layers and heads as they come, apart by the axes that are kept.

    Every head of a layer counts the same, then every layer of a step, then every step. Maps of different sizes (a UNet
    has several) are brought to the largest one, bilinearly: that is linear, so the sums are kept by size.

    Args:
        axes: of ``"step"``, ``"layer"`` and ``"head"`` those that are kept.

    Memory: one map for each combination of the kept axes and each size.
    """

    def __init__(self, axes: Iterable[Axis]):
        self.axes = frozenset(axes)
        self._sums: dict[Key, dict[tuple[int, int], tuple[Tensor, int]]] = {}

    def add(self, maps: Tensor, step: int, layer: int) -> None:
        """Maps ``(..., H, h, w)`` of the chosen heads of a layer in a step."""
        key = (step if "step" in self.axes else None, layer if "layer" in self.axes else None)
        maps = maps if "head" in self.axes else maps.mean(-3, keepdim=True)
        sums = self._sums.setdefault(key, {})
        total, count = sums.get((maps.shape[-2], maps.shape[-1]), (None, 0))
        sums[maps.shape[-2], maps.shape[-1]] = (
            maps if total is None else total + maps.to(total.device),  # layers may be on several devices
            count + 1,
        )

    def result(self, heads: Mapping[int, Sequence[int]]) -> tuple[Tensor, dict[str, tuple[int, ...]]]:
        """The means ``(..., steps, layers, heads, h, w)`` on the CPU, with 1 for an axis that is not kept, and which
        steps, layers and heads these are.

        Args:
            heads: the chosen heads by layer; where layers differ in them, maps of other heads are nan.
        """
        if not self._sums:
            raise SteeringError("Nothing was read: no selected step of this run called a selected layer.")
        steps, layers = (sorted({key[i] for key in self._sums}, key=lambda n: n or 0) for i in (0, 1))
        numbers = tuple(sorted({h for layer in layers if layer is not None for h in heads[layer]}))
        size = max((size for sums in self._sums.values() for size in sums), key=lambda s: s[0] * s[1])
        cells = []
        for step, layer in product(steps, layers):
            cell = self._mean((step, layer), size)
            if "head" in self.axes and layer is not None:
                cell = _placed(cell, heads[layer], numbers)
            cells.append(cell)
        stacked = torch.stack(cells, -4).unflatten(-4, (len(steps), len(layers)))
        kept = {"step": tuple(steps), "layer": tuple(layers), "head": numbers}
        return stacked, {name: kept[name] for name in AXES if name in self.axes}  # type: ignore[misc]

    def _mean(self, key: Key, size: tuple[int, int]) -> Tensor:
        sums = self._sums[key].values()
        total = torch.stack([resized(total.cpu(), size) for total, _ in sums]).sum(0)
        return total / sum(count for _, count in sums)


def _placed(maps: Tensor, own: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """Maps ``(..., H, h, w)`` of some heads among all that are shown; nan where there is none."""
    if tuple(own) == tuple(numbers):
        return maps
    wide = maps.new_full((*maps.shape[:-3], len(numbers), *maps.shape[-2:]), torch.nan)
    index = torch.tensor([list(numbers).index(h) for h in own])
    return wide.index_copy(-3, index, maps)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``(..., h, w)`` of another size, bilinear between the centres of tokens."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)
