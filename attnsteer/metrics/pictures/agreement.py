"""How well pictures agree with their prompts, from embeddings of a CLIP model. Every scale has its own name.

Embeddings are ``(n, width)``, of any length: they are normalised here. Results are float64 ``(n,)``.

| function | scale |
|---|---|
| ``cosine`` | ``<i, t>``, about 0.15 to 0.4 |
| ``clip_score`` | ``2.5 max(<i, t>, 0)``, with ``PREFIX`` before the caption (Hessel et al., 2021, arXiv:2104.08718) |
| ``cosine`` with ``averaged`` | the full-prompt similarity of Attend-and-Excite (arXiv 2301.13826), a cosine |
| ``minimum_object`` | the same for the part of the prompt that fits worst, a cosine |
| ``cosine`` of texts | the text-text similarity: a caption of the picture, without templates, with ``averaged`` |
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

PREFIX = "A photo depicts "
"""What CLIPScore puts before a caption."""
WEIGHT = 2.5
"""What CLIPScore multiplies by."""


def unit(embeddings: ArrayLike) -> Floats:
    """Rows of length 1, ``(..., width)``.

    Raises:
        ValueError: a row that is not finite, or has no direction.
    """
    given = np.asarray(embeddings, dtype=np.float64)
    length = np.linalg.norm(given, axis=-1, keepdims=True)
    if not (np.isfinite(length).all() and (length > 0).all()):
        raise ValueError("An embedding is zero or not finite: it has no direction.")
    return given / length


def cosine(images: ArrayLike, texts: ArrayLike) -> Floats:
    """``<i, t>`` row by row: ``(..., width)`` and ``(..., width)``, which broadcast, -> ``(...)``, -1 to 1."""
    return (unit(images) * unit(texts)).sum(-1)


def clip_score(images: ArrayLike, texts: ArrayLike) -> Floats:
    """``2.5 max(<i, t>, 0)``, 0 to 2.5; the texts are ``PREFIX`` and a caption."""
    return WEIGHT * np.maximum(cosine(images, texts), 0.0)


def averaged(texts: ArrayLike) -> Floats:
    """One embedding of a phrase in many templates, ``(templates, width)`` -> ``(width,)``: the mean direction."""
    return unit(unit(texts).mean(0))


def minimum_object(images: ArrayLike, objects: ArrayLike) -> Floats:
    """The smallest cosine with the parts of the prompt, ``(n, width)`` and ``(parts, width)`` -> ``(n,)``."""
    return (unit(images) @ unit(objects).T).min(-1)
