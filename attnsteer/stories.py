"""Stories: groups of rows in one batch that look at each other.

A story is a block of contiguous rows, the same in each lane of classifier-free guidance, so a batch holds lanes times
stories times ``frames`` rows. Positions within a story are all that a method needs, so it does not depend on the batch.
Several pictures of each of several prompts stand in another order; pipelines are refused such calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .edits import Segments, Sources
from .errors import SteeringError
from .maps import otsu
from .site import AttentionCall


def count(call: AttentionCall, frames: int) -> int:
    """The number of stories in the batch of a call, lanes included.

    Raises:
        SteeringError: where the batch is no multiple of ``frames``.
    """
    batch = call.q.shape[0]
    if batch % frames:
        raise SteeringError(
            f"A batch of {batch} rows holds no whole stories of {frames} pictures at {call.site.name!r}: give the "
            f"prompts of a story in one call of the pipeline, in blocks of {frames}."
        )
    return batch // frames


def sources(call: AttentionCall, frames: int, read: Sequence[Sequence[int]]) -> Sources:
    """The rows that each row reads, from the pictures that each picture of a story reads."""
    width = max(map(len, read))
    return tuple(
        tuple(story * frames + j for j in entry) + (-1,) * (width - len(entry))
        for story in range(count(call, frames))
        for entry in read
    )


def picture(call: AttentionCall) -> slice:
    """The image tokens among queries and keys of a self or joint site."""
    n = call.q.shape[2]
    if call.site.kind == "self":
        return slice(0, n)
    if call.spans is None or not isinstance(call.spans.image, slice):
        raise SteeringError(f"Image and text tokens of {call.site.name!r} cannot be told apart by one slice.")
    start, stop, _ = call.spans.image.indices(n)
    return slice(start, stop)


def share(
    call: AttentionCall,
    frames: int,
    read: Sequence[Sequence[int]],
    kept: Tensor,
    weight: Tensor,
    tokens: Tensor | None = None,
) -> Segments:
    """Image queries also see the kept image tokens of the pictures that their own picture reads.

    Text queries and text keys of joint attention take no part: a prompt would leak into the other pictures.

    Args:
        read: for each picture of a story the others that it reads.
        kept: bool ``(pictures, m)``: the tokens of each picture that others see; ``(sets, pictures, m)`` where stories
            differ (story s of a lane has set s).
        weight: ``(1 or frames, H)``: the factor on what they weigh.
        tokens: of the shape of ``kept``: which image tokens these are, so that only they are computed; None: all in
            order.
    """
    stories, width, image = count(call, frames), max(map(len, read)), picture(call)
    device = call.q.device
    filled = [[*entry, *[0] * (width - len(entry))] for entry in read]
    lent = torch.tensor(filled, dtype=torch.long).to(device, non_blocking=True)
    bias = torch.zeros(kept.shape, device=device).masked_fill(~kept, -torch.inf)

    def spread(x: Tensor) -> Tensor:  # for every row of the batch what its sources have, (B, S, m)
        chosen = (x if x.dim() == 3 else x[None])[:, lent].flatten(0, 1)  # (sets * frames, S, m)
        return chosen.repeat(stories * frames // len(chosen), 1, 1)

    joint, place = image != slice(0, call.q.shape[2]), torch.arange(call.q.shape[2], device=device)
    keys = place[image].expand(1, width, -1) if joint else None
    if tokens is not None:
        keys = spread(tokens + image.start)
    queries = ((place >= image.start) & (place < image.stop)).expand(1, width, -1) if joint else None
    weight = weight if weight.shape[0] == 1 else weight.repeat(stories, 1)
    return Segments(sources(call, frames, read), weight, spread(bias), keys, queries)


# ---- masks -----------------------------------------------------------------------------------------------------------
def box_masks(boxes: Sequence[tuple[float, float, float, float]], size: tuple[int, int]) -> Tensor:
    """Masks of boxes ``(left, top, right, bottom)``, fractions of the picture.

    Args:
        size: height and width of the masks; that of the picture loses nothing.

    Returns:
        Bool ``(boxes, height, width)``: pixels whose centre is inside.
    """
    height, width = size
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    wrong = [box for box in boxes if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1)]
    if wrong:
        raise SteeringError(f"{wrong[0]!r} is no box: give (left, top, right, bottom) as fractions, left < right.")
    return torch.stack(
        [((y >= top) & (y < bottom))[:, None] & (x >= left) & (x < right) for left, top, right, bottom in boxes]
    )


def check_masks(name: str, masks: object, number: int) -> list[str]:
    """Why something is no set of ``number`` masks; empty where it is."""
    if not isinstance(masks, Tensor) or masks.dim() != 3 or masks.shape[0] != number:
        shape = tuple(masks.shape) if isinstance(masks, Tensor) else masks
        return [f"{name}={shape!r}: give a tensor of {number} masks, ({number}, height, width)."]
    finite = masks.dtype == torch.bool or bool(masks.isfinite().all())
    return [] if finite else [f"{name} holds values that are not finite."]


@torch.compiler.disable
def to_grid(masks: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Masks ``(S, h, w)`` at the resolution of a site, bool ``(S, T * H * W)``, every frame alike.

    Bilinear resize, stretched to [0, 1], then the brighter class of Otsu's split; a constant mask stays as it is. Never
    part of a compiled graph: methods lay their masks once in a run.
    """
    frames, height, width = grid
    small = F.interpolate(masks[:, None].float(), (height, width), mode="bilinear", align_corners=False)[:, 0]
    found = []
    for mask in small:
        low, high = mask.min(), mask.max()
        found.append(mask > 0.5 if low == high else otsu((mask - low) / (high - low)))
    return torch.stack(found).flatten(1).repeat(1, frames)
