"""What methods around a vision-language model use, whatever its family: prompts and greedy answers of a batch, the
place of each image token in the picture, and gradients of the answer's first token. Methods know this and no host."""

from __future__ import annotations

from .hosts.answer_gradient import last_row_gradients, pixel_gradients
from .hosts.asking import Encodings, batch, greedy, row, words
from .hosts.vlm_grids import covered_area, image_grids, patch_side, picture_side

__all__ = [
    "Encodings",
    "batch",
    "covered_area",
    "greedy",
    "image_grids",
    "last_row_gradients",
    "patch_side",
    "picture_side",
    "pixel_gradients",
    "row",
    "words",
]
