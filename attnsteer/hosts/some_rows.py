"""The rows of a batch of variants that a pass beside the generation is for, and the way back to all of them.

The image-free pass and the surveys read a prompt before it is generated from. Variants that have no use for what they
find need not be read: a batch of five methods, of which one asks, costs one pass of a fifth of its rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..scheduler import Plan, Rows, alike
from .vlm_families import PACKED, PER_TOKEN

TOKENS = ("input_ids", "attention_mask", *PER_TOKEN)


@dataclass(frozen=True, eq=False)
class SomeRows:
    """Some rows of a prompt.

    Attributes:
        inputs: of these rows alone.
        rows: int ``(r,)``: where they stand in the whole prompt.
        total: rows of the whole prompt.
    """

    inputs: dict[str, Any]
    rows: Tensor
    total: int

    def whole(self, found: Any) -> Any:
        """What was found of these rows, as rows of the whole prompt: every tensor of a nest whose first axis are these
        rows, with zeros for the rows that were left out."""

        def spread(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim() or len(value) != len(self.rows):
                return value
            return value.new_zeros(self.total, *value.shape[1:]).index_copy(0, self.rows.to(value.device), value)

        return tree_map(spread, found)


def variants_with(rows: Rows, plans: Collection[Plan]) -> tuple[bool, ...]:
    """Which variants have one of these plans, or share a plan with such a variant, or one that is asked together with
    it: what plans keep of a pass must be about all rows that they act on."""
    wanted = tuple(any(p in plans or any(alike(p, other) for other in plans) for p in row) for row in rows)
    more = {plan for row, on in zip(rows, wanted, strict=True) if on for plan in row}
    return wanted if more <= set(plans) else variants_with(rows, more | set(plans))


def some_rows(inputs: Mapping[str, Any], wanted: Sequence[bool], has_image: Tensor) -> SomeRows | None:
    """The rows of the wanted variants.

    Args:
        inputs: of the prompt, ``B`` rows, one block of them for each variant.
        wanted: for each variant.
        has_image: bool ``(B,)``.

    Returns:
        None where all rows are wanted, and where pictures cannot be told apart by row (``pictures_of``).
    """
    if all(wanted):
        return None
    on = torch.tensor(wanted, device=has_image.device).repeat_interleave(len(has_image) // len(wanted))
    rows = on.nonzero()[:, 0]
    taken = rows_of(inputs, rows, has_image)
    return None if taken is None else SomeRows(taken, rows, len(has_image))


def rows_of(inputs: Mapping[str, Any], rows: Tensor, has_image: Tensor) -> dict[str, Any] | None:
    """The inputs of some rows of a prompt, int ``(r,)`` in order; None where whose its pictures are cannot be known.

    Families hand pictures over as one list without saying whose they are. Where that list is as long as there are rows
    with a picture, each of these has one, and those of some rows can be taken; several pictures in a row, tiles in one
    list and videos cannot be.
    """
    seen = _pictures(inputs, rows[has_image[rows]], has_image)
    return None if seen is None else {**inputs, **seen, **tokens_of(inputs, rows)}


def tokens_of(inputs: Mapping[str, Any], rows: Tensor) -> dict[str, Tensor]:
    """The ids, masks and token types of some rows."""
    return {name: inputs[name][rows] for name in TOKENS if isinstance(inputs.get(name), Tensor)}


def _pictures(inputs: Mapping[str, Any], rows: Tensor, has_image: Tensor) -> dict[str, Tensor | None] | None:
    places, total = (has_image.cumsum(0) - 1)[rows], int(has_image.sum())
    found: dict[str, Tensor | None] = {}
    for name, value in inputs.items():
        if name in TOKENS or value is None or isinstance(value, (bool, int, float, str)):
            continue
        if not isinstance(value, Tensor):
            return None
        sizes = inputs.get(PACKED.get(name, ""))
        lengths = [1] * len(value) if sizes is None else sizes.prod(-1).tolist()
        if len(lengths) != total or "video" in name:
            return None
        parts = value.split(lengths)
        found[name] = torch.cat([parts[place] for place in places.tolist()]) if len(places) else None
    return found
