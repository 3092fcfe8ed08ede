"""Does attention look at the image, and at the right place? Numbers from rows of attention, without whole maps.

A row is what one query gives to all keys (``attnsteer.Capture`` records rows with ``rows="last"``). The row that
produced a word is the one of the token *before* it. Arrays are ``(..., keys)`` or ``(..., patches)``, any leading
shape; NumPy arrays or CPU tensors without gradient; results are float64 of the leading shape. How much heads depend on
the image is ``attnsteer.processors.VHD``; what follows is only where they look, and raw maps peak at sinks: exclude
them, and compare with ``chance``.

| function | gives |
|---|---|
| ``image_attention`` | sum of the row over image keys: 0 to 1 |
| ``image_attention_from_lse`` | the same from two log-sum-exps: exp(LSE of image keys - LSE of all keys) |
| ``relative`` | that over its value for uniform attention: 1 is uniform, comparable between prompts |
| ``summed_over_layers`` | SVAR: mean over heads, summed over layers from a to b |
| ``spread`` | entropy over log(patches), effective patches, largest share, of a row renormalised over the image |
| ``pointing`` | hit: is the largest patch inside; energy: share of mass inside |
| ``shift`` | KL(steered || plain) and the change of image attention, for the same words |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Fit = Literal["pad", "crop", "stretch"]


# ---- how much --------------------------------------------------------------------------------------------------------
def image_attention(rows: ArrayLike, image: ArrayLike, sinks: ArrayLike | None = None) -> Floats:
    """Mass on image keys: ``(..., keys)`` -> ``(...)``.

    Args:
        rows: attention probabilities.
        image: indices of the image keys, or one truth value for each key.
        sinks: keys that do not count, likewise.

    Raises:
        ValueError: a key that the rows do not have.
    """
    weights = np.asarray(rows, dtype=np.float64)
    chosen = _chosen(image, weights.shape[-1])
    if sinks is not None:
        chosen = chosen & ~_chosen(sinks, weights.shape[-1])
    return weights[..., chosen].sum(-1)


def image_attention_from_lse(image_lse: ArrayLike, lse: ArrayLike) -> Floats:
    """The same where a fused kernel gave the log-sum-exp of the logits of image keys, and of all keys."""
    return np.exp(np.asarray(image_lse, dtype=np.float64) - np.asarray(lse, dtype=np.float64))


def relative(mass: ArrayLike, image_keys: int, visible_keys: int) -> Floats:
    """``mass / (image_keys / visible_keys)``: 1 if attention is uniform. Raw masses depend on the prompt."""
    if not 1 <= image_keys <= visible_keys:
        raise ValueError(f"{image_keys} image keys of {visible_keys} visible ones: wanted are 1 or more of them.")
    return np.asarray(mass, dtype=np.float64) * visible_keys / image_keys


def summed_over_layers(mass: ArrayLike, first: int = 5, last: int = 18) -> Floats:
    """SVAR, ``(layers, heads, ...)`` -> ``(...)``: mean over heads, sum over layers ``first`` to ``last`` inclusive.

    Jiang et al., 2024, arXiv:2411.16724; the defaults are theirs for LLaVA-1.5-7B, which has 32 layers from 0.
    """
    layers = np.asarray(mass, dtype=np.float64)
    if not 0 <= first <= last < layers.shape[0]:
        raise ValueError(f"Layers {first} to {last} are not all among the {layers.shape[0]} layers given.")
    return layers[first : last + 1].mean(1).sum(0)


@dataclass(frozen=True, eq=False)
class Spread:
    """How a row divides its mass among the patches of the image; all nan where it gives the image none.

    Attributes:
        entropy: ``-sum p log p / log(patches)``, 0 to 1 (0 for one patch).
        effective: ``exp(-sum p log p)``, 1 to patches: how many patches it looks at.
        largest: the largest share of a patch.
    """

    entropy: Floats
    effective: Floats
    largest: Floats


def spread(patches: ArrayLike) -> Spread:
    """Of the image part of rows, ``(..., patches)``, which need not sum to 1."""
    weights = np.asarray(patches, dtype=np.float64)
    total = weights.sum(-1, keepdims=True)
    shares = np.divide(weights, total, out=np.full_like(weights, np.nan), where=total > 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)  # 0 log 0 is 0
    entropy = np.maximum(-(shares * logs).sum(-1), 0.0)
    highest = math.log(weights.shape[-1])
    return Spread(entropy / highest if highest else entropy, np.exp(entropy), shares.max(-1))


def shift(steered: ArrayLike, plain: ArrayLike, image: ArrayLike) -> tuple[Floats, Floats]:
    """``KL(steered || plain)`` over all keys, and the change of image attention, both ``(...)``.

    Rows of the same words, teacher-forced: else the texts differ and not only the attention. Infinite where the steered
    row looks at a key that the plain one does not see at all.
    """
    p, q = np.asarray(steered, dtype=np.float64), np.asarray(plain, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    return terms.sum(-1), image_attention(p, image) - image_attention(q, image)


# ---- where -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Pointing:
    """hit: whether the largest patch (the first of equals) is inside, bool; energy: share of mass inside, nan without
    mass; chance: share of the patches that are inside, what both are for maps that know nothing."""

    hit: NDArray[np.bool_]
    energy: Floats
    chance: float


def pointing(maps: ArrayLike, inside: ArrayLike, sinks: ArrayLike | None = None) -> Pointing:
    """The pointing game: ``(..., patches)`` against one truth value for each patch.

    Args:
        maps: mass of the patches, rows by rows as the model has them.
        inside: e.g. of ``patches_inside``; any shape with as many patches.
        sinks: patches left out of maps, region and chance: indices or truth values.

    Raises:
        ValueError: maps and region of different size, or no patch left.
    """
    weights, region = np.asarray(maps, dtype=np.float64), np.asarray(inside, dtype=bool).ravel()
    if weights.shape[-1] != region.size:
        raise ValueError(f"Maps of {weights.shape[-1]} patches and a region of {region.size} do not belong together.")
    kept = np.ones(region.size, dtype=bool) if sinks is None else ~_chosen(sinks, region.size)
    if not kept.any():
        raise ValueError("All patches are sinks: none is left to point at.")
    weights, region = weights[..., kept], region[kept]
    total = weights.sum(-1)
    within = weights[..., region].sum(-1)
    energy = np.divide(within, total, out=np.full_like(total, np.nan), where=total > 0)
    return Pointing(region[weights.argmax(-1)], energy, float(region.mean()))


def patches_inside(
    box: Sequence[float], size: tuple[float, float], grid: tuple[int, int], fit: Fit = "stretch"
) -> NDArray[np.bool_]:
    """Which patches have their centre inside a box of the original image: ``(rows, columns)``.

    Args:
        box: left, top, right, bottom in pixels of the original image; left and top included, right and bottom not.
        size: width and height of the original image.
        grid: rows and columns of patches (24, 24 for LLaVA-1.5).
        fit: how the image was made to fit the model: "pad" to a square (LLaVA-1.5 as its authors run it), "crop" to
            the square in its centre (its Transformers processor), or "stretch" to the whole grid (Qwen-VL, tiles).

    Raises:
        ValueError: a box without inside, a grid without patches, or no such fit.
    """
    (left, top, right, bottom), (width, height), (rows, columns) = box, size, grid
    if not (left < right and top < bottom and width > 0 and height > 0 and rows > 0 and columns > 0):
        raise ValueError(f"Box {tuple(box)} in an image of {size} on a grid of {grid}: nothing is inside.")
    if fit not in ("pad", "crop", "stretch"):
        raise ValueError(f"There is no fit {fit!r}; there are pad, crop and stretch.")
    seen_width, seen_height = width, height  # of what the model sees, in pixels of the original
    if fit != "stretch":
        seen_width = seen_height = max(width, height) if fit == "pad" else min(width, height)
    x = (np.arange(columns) + 0.5) / columns * seen_width + (width - seen_width) / 2
    y = (np.arange(rows) + 0.5) / rows * seen_height + (height - seen_height) / 2
    return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]


def _chosen(which: ArrayLike, size: int) -> NDArray[np.bool_]:
    """Indices or truth values as truth values."""
    given = np.asarray(which)
    if given.dtype == bool:
        if given.shape != (size,):
            raise ValueError(f"Truth values of shape {given.shape} for {size} keys.")
        return given
    indices = given.astype(np.int64)
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise ValueError(f"Keys {indices.min()} to {indices.max()} are not all among 0 to {size - 1}.")
    chosen = np.zeros(size, dtype=bool)
    chosen[indices] = True
    return chosen
