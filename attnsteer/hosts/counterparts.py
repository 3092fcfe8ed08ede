"""Prompts that a contrast is made with: without the image, with noise on the picture, with an instruction written in.

``of_rows`` takes the rows that ask for a counterpart; the other functions take the inputs of a whole prompt and give
those of its counterpart, with the same rows. All are padded on the left, as is the prompt, so that both end where the
next token is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contrast import Counterpart, ImageFree, Instructed, Noised
from ..draws import normal
from ..errors import SteeringError
from .some_rows import TOKENS, rows_of, tokens_of
from .vlm_families import PACKED, PIXELS, VisionTokens, lockstep_inputs


def counterpart_inputs(
    inputs: Mapping[str, Any], what: Counterpart, tokens: VisionTokens, pad: int, tokenizer: Any = None
) -> dict[str, Any]:
    """The inputs of a counterpart.

    Args:
        inputs: of the prompt: ``input_ids`` and ``attention_mask`` ``(B, N)``, pixels, whatever the family takes.
        what: which counterpart.
        tokens, pad: what the image is made of, and an id for padding.
        tokenizer: for ``Instructed``.

    Raises:
        SteeringError: a prompt of which this counterpart cannot be made.
    """
    if isinstance(what, ImageFree):
        return image_free(inputs, tokens, pad)
    if not any(isinstance(inputs.get(name), Tensor) for name in PIXELS):
        raise SteeringError("This contrast needs the pixels of the picture: give them, not what a tower made of them.")
    if isinstance(what, Noised):
        return {**inputs, **noised(inputs, what)}
    ids, bos = instruction_ids(tokenizer, what), getattr(tokenizer, "bos_token_id", None)
    return instructed(inputs, ids, what, tokens, bos)


# ---- the rows that ask -----------------------------------------------------------------------------------------------
def of_rows(
    inputs: Mapping[str, Any], rows: Tensor, has_image: Tensor, what: Counterpart
) -> tuple[Tensor, dict[str, Any]]:
    """Rows of a prompt with what their counterpart needs of the pictures.

    Where whose the pictures are cannot be known (``some_rows``), a counterpart that looks at them runs on all rows.

    Args:
        inputs: of the prompt, ``B`` rows.
        rows: int ``(r,)``, those that ask, in order; each has a picture.
        has_image: bool ``(B,)``.

    Returns:
        The rows taken, int, and their inputs.
    """
    if isinstance(what, ImageFree):
        return rows, {**inputs, **tokens_of(inputs, rows)}
    taken = rows_of(inputs, rows, has_image)
    if taken is None:
        return torch.arange(len(has_image), device=rows.device), dict(inputs)
    return rows, taken


# ---- without the image -----------------------------------------------------------------------------------------------
def image_free(inputs: Mapping[str, Any], tokens: VisionTokens, pad: int) -> dict[str, Any]:
    """Image tokens and their wrappers deleted, and the padding that all rows then have in common."""
    both, _, text = lockstep_inputs(inputs, tokens, pad, "delete")
    batch = len(text) // 2
    longest = int(text[batch:].sum(1).max())
    return {name: both[name][batch:, -longest:] for name in TOKENS if name in both}


# ---- noise on the picture --------------------------------------------------------------------------------------------
def noised(inputs: Mapping[str, Any], what: Noised) -> dict[str, Tensor]:
    """``signal x + noise eps`` for every pixel input, whatever its name and shape.

    ``eps`` follows from the seed and the place inside the picture (channel, row and column, tile, or patch), so a
    picture gets the same noise alone, in a batch, with other padding and on other devices. Pictures get equal noise.
    """
    changed = {}
    for name in PIXELS:
        x = inputs.get(name)
        if x is None:
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise SteeringError(f"{name} is no float tensor of preprocessed pixels, so no noise can be added.")
        eps = _noise(x, what.seed, inputs.get(PACKED.get(name, "")))
        mixed = (what.signal * x.float() + what.noise * eps).to(x.dtype)
        if x.dim() > 4:  # tiles that only fill up a batch are all zero, and some families tell them by that
            mixed = torch.where(x.flatten(-3).any(-1)[..., None, None, None], mixed, x)
        changed[name] = mixed
    return changed


def _noise(x: Tensor, seed: int, grid: Tensor | None) -> Tensor:
    """Standard normal, broadcastable to ``x``: the first axis counts pictures, or the patches of all of them."""
    axes = [
        torch.arange(size, device=x.device).view(size, *[1] * (x.dim() - 1 - axis))
        for axis, size in enumerate(x.shape)
        if axis > 0
    ]
    if x.dim() == 2 and grid is not None:
        patches = torch.cat([torch.arange(int(n), device=x.device) for n in grid.prod(-1)])
        axes = [patches[:, None], *axes]
    return normal(seed, *axes, device=x.device)


# ---- an instruction --------------------------------------------------------------------------------------------------
def instruction_ids(tokenizer: Any, what: Instructed) -> list[int]:
    """The tokens of an instruction, without start and end."""
    ids = list(tokenizer(what.text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise SteeringError(f"The instruction {what.text!r} has no token.")
    return ids


def instructed(
    inputs: Mapping[str, Any], ids: list[int], what: Instructed, tokens: VisionTokens, bos: int | None
) -> dict[str, Any]:
    """The instruction written into every row; other inputs of the tokens say "text" there (0), the mask says 1."""
    mask: Tensor = inputs["attention_mask"]
    places = [_place(row, real, what.place, tokens, bos) for row, real in zip(inputs["input_ids"], mask, strict=True)]
    changed = dict(inputs)
    for name in TOKENS:
        value = inputs.get(name)
        if isinstance(value, Tensor):
            fill = {"input_ids": ids, "attention_mask": [1] * len(ids)}.get(name, [0] * len(ids))
            new = value.new_tensor(fill)
            changed[name] = torch.stack(
                [torch.cat([row[:at], new, row[at:]]) for row, at in zip(value, places, strict=True)]
            )
    return changed


def _place(ids: Tensor, mask: Tensor, place: str, tokens: VisionTokens, bos: int | None) -> int:
    """Where the instruction goes in one row ``(N,)``."""
    real = mask.bool()
    start = int(real.int().argmax())
    if place == "question":
        image = tokens.image_mask(ids) & real
        behind = int(image.nonzero().max()) + 1 if bool(image.any()) else start
        wrappers = tokens.wrapper_mask(ids)
        while behind < len(ids) - 1 and bool(wrappers[behind]):
            behind += 1
        return behind
    begins = ((ids == bos) & real).nonzero() if bos is not None else ids.new_empty(0)
    return int(begins[0]) + 1 if len(begins) else start
