"""How alike the pictures of one subject are, and how different those of one prompt.

    C = 2 / (F (F - 1)) sum over i < j of sim(i, j)        F pictures of one subject
    diversity = the same mean of a distance                the seeds of one prompt

Scores of sets are averaged over sets, not over pairs. Copying one picture maximises C, so it is only to be read beside
agreement with the prompts and diversity. Similarity is the cosine of embeddings (CLIP-I, DINO, DINOv2: state the
backbone), distance is 1 - cosine, LPIPS, or a distance of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from .agreement import unit


def consistency(embeddings: ArrayLike) -> float:
    """The mean cosine of all pairs, ``(F, width)`` -> -1 to 1.

    Raises:
        ValueError: fewer than two pictures.
    """
    rows = unit(embeddings)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"Embeddings of shape {rows.shape}: a set has two pictures or more, (pictures, width).")
    above = np.triu_indices(len(rows), 1)
    return float((rows @ rows.T)[above].mean())


def diversity(items: Sequence[Any], distance: Callable[[Any, Any], float]) -> float:
    """The mean distance of all pairs of a sequence; higher is more diverse.

    Raises:
        ValueError: fewer than two items.
    """
    if len(items) < 2:
        raise ValueError(f"{len(items)} pictures have no distance: a prompt needs two seeds or more.")
    return fmean(float(distance(one, other)) for one, other in combinations(items, 2))


def on_noise(picture: Image.Image, mask: ArrayLike, seed: int = 0) -> Image.Image:
    """The subject alone, before noise that is the same for all pictures of one size.

    On a plain background all pictures are alike for an encoder, whatever the subject.

    Args:
        mask: truth values ``(height, width)``, true on the subject.
        seed: of the noise, uniform in 0..255 for every pixel and colour.

    Raises:
        ValueError: the mask has another size than the picture, or holds no subject.
    """
    pixels, kept = np.asarray(picture.convert("RGB")), np.asarray(mask, dtype=bool)
    if kept.shape != pixels.shape[:2]:
        raise ValueError(f"A mask of shape {kept.shape} for a picture of {pixels.shape[:2]} (height, width).")
    if not kept.any():
        raise ValueError("The mask is empty: there is no subject to compare.")
    noise = np.random.default_rng(seed).integers(0, 256, pixels.shape, dtype=np.uint8)
    return Image.fromarray(np.where(kept[..., None], pixels, noise))
