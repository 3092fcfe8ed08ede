"""Subjects of a reference picture laid onto their place in another picture: which tokens go where, and how often."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def nearest(source: int, target: int) -> Tensor:
    """The source position that nearest resizing takes for each target position, by torch's own rule (float32), which
    integer arithmetic misses for some sizes. Shape ``(target,)``."""
    places = torch.arange(source, dtype=torch.float32)[None, None]
    return F.interpolate(places, size=target, mode="nearest")[0, 0].long()


def bounding_box(mask: Tensor) -> tuple[int, int, int, int]:
    """First and last row and column of a non-empty mask ``(h, w)``, ends exclusive: ``(top, bottom, left, right)``."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def reposition(reference: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The foreground of a subject, its box resized (nearest) onto the box of its place in another picture.

    Args:
        reference, target: bool ``(h, w)``, the subject in each picture.

    Returns:
        Token indices ``(m,)``: those of the reference picture, and for each the place that it takes. A token may be
        taken several times or not at all. Empty where the reference is; without a target everything stays in place.
    """
    width = reference.shape[1]
    if not reference.any():
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    if not target.any():
        stay = reference.flatten().nonzero().flatten()
        return stay, stay
    top, bottom, left, right = bounding_box(reference)
    a_top, a_bottom, a_left, a_right = bounding_box(target)
    rows = top + nearest(bottom - top, a_bottom - a_top)
    columns = left + nearest(right - left, a_right - a_left)
    taken = reference[rows][:, columns]  # (target rows, target columns)
    source = (rows[:, None] * width + columns)[taken]
    places = torch.arange(a_top, a_bottom)[:, None] * width + torch.arange(a_left, a_right)
    return source, places[taken]


def disjoint(masks: Tensor) -> Tensor:
    """Masks ``(S, n)`` of which no two share a token: the smallest subject keeps what several have."""
    out, taken = masks.clone(), torch.zeros_like(masks[0])
    for i in sorted(range(len(masks)), key=lambda i: int(masks[i].sum())):
        out[i] = masks[i] & ~taken
        taken = taken | masks[i]
    return out


def pad(lists: list[Tensor], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Index lists of several lengths as one ``(S, M)`` tensor, M at least 1, and a bool of what is real."""
    longest = max(1, max(map(len, lists)))
    index = torch.stack([F.pad(x, (0, longest - len(x)), value=fill) for x in lists])
    return index, torch.arange(longest) < torch.tensor([len(x) for x in lists])[:, None]


def isolation_table(subjects: int) -> Tensor:
    """Bool ``(S + 1, S + 1)``: the background 0 sees and is seen by all, a subject sees itself."""
    allowed = torch.eye(subjects + 1, dtype=torch.bool)
    allowed[0] = allowed[:, 0] = True
    return allowed


def packed(laid: list[tuple[Tensor, Tensor]], turned: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys ``(1, S, M)``, their bias in float64, and where they are pasted.

    Where positions turn keys (``turned``) each copy stays; elsewhere equal keys become one with the bias ``log m``.
    """
    if turned:
        keys, real = pad([source for source, _ in laid])
        places, _ = pad([place for _, place in laid])
        bias = torch.zeros(real.shape, dtype=torch.float64).masked_fill(~real, -torch.inf)
        return keys[None], bias[None], places[None]
    counted = [source.unique(return_counts=True) for source, _ in laid]
    keys, real = pad([source for source, _ in counted])
    times, _ = pad([number for _, number in counted], fill=1)
    bias = times.double().log().masked_fill(~real, -torch.inf)
    return keys[None], bias[None], None
