"""What a vision-language model looks at while it answers: the last query row over the grid of its picture.

Every pass that predicts a token has one query that matters, the last position. Its probabilities on the image tokens
are read at chosen layers, averaged over heads, in float32; nothing is changed and no map of all queries exists.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .attach import steer
from .capture import Capture
from .digests import picture_digest
from .errors import SteeringError
from .hosts.asking import Batch, Encodings, batch, greedy
from .hosts.vlm_grids import image_grids
from .where import Where


@dataclass(frozen=True, eq=False)
class Look:
    """One generation.

    Attributes:
        maps: ``(T, L, rows, columns)`` float32 on the CPU: predicted tokens, layers, grid of the picture. Probabilities
            over all keys (system, image, text), not renormalised over the image.
        tokens: the T predicted tokens, the one that ends the answer included.
    """

    maps: Tensor
    tokens: list[int]


@dataclass(frozen=True, eq=False)
class Magnified:
    """An answer from a picture and the part of it that the question is about.

    Attributes:
        answer: the final answer; tokens: its ids, the one that ends it included.
        refined: the part, as it was shown to the model.
        box: where it is in the picture, (left, top, right, bottom) in pixels.
        heat: ``(H, W)`` float64, the importance of every pixel.
        mask: ``(H, W)`` bool, what was kept; the box where the method has no mask.
        attention: ``(rows, columns)`` float64, the map on the grid of image tokens.
    """

    answer: str
    tokens: list[int]
    refined: Image.Image
    box: tuple[int, int, int, int]
    heat: NDArray[Any]
    mask: NDArray[Any]
    attention: Tensor


class GeneralLooks:
    """What general prompts looked at, kept for further questions about the same pictures.

    It belongs to the user, who shares it between calls; models are held weakly, pictures by their content.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[torch.nn.Module, dict[Hashable, Look]] = weakref.WeakKeyDictionary()

    def of(self, model: torch.nn.Module) -> dict[Hashable, Look]:
        return self._kept.setdefault(model, {})

    def __len__(self) -> int:
        return sum(len(kept) for kept in self._kept.values())


def look(model: torch.nn.Module, hf_processor: Any, rows: Batch, where: Where, max_new_tokens: int) -> list[Look]:
    """What every row looks at in each pass of its greedy answer, the pass that predicts the end included.

    Args:
        rows: prompts with one picture each.
        where: layers and heads to read, in any order; the maps come in execution order.

    Raises:
        SteeringError: what ``attach`` and ``image_grids`` refuse; rows with several pictures.
    """
    grids = [
        _grid(model, hf_processor, row, seen, rows.length) for row, seen in zip(rows.rows, rows.pictures, strict=True)
    ]
    reader = Capture(where, rows="last", columns="image", reduce="heads")
    with steer(model, reader) as steering:
        tokens = greedy(model, rows, max_new_tokens)
        states = [state["maps"] for state in steering.states(reader).values()]
    found = []
    for number, (grid, said) in enumerate(zip(grids, tokens, strict=True)):
        passes = [
            torch.stack([_on_grid(maps[step][number, 0, 0], grid, rows.length + step) for maps in states])
            for step in range(len(said))
        ]
        found.append(Look(torch.stack(passes).cpu(), said))
    return found


def _grid(model: torch.nn.Module, hf_processor: Any, row: dict[str, Any], seen: Sequence[Any], length: int) -> Tensor:
    """The grid of a row's only picture, in the padded batch."""
    (grids,) = image_grids(model, row, hf_processor, seen)
    if len(grids) != 1:
        raise SteeringError(f"A prompt that is looked at needs one picture; this one has {len(grids)}.")
    return grids[0] + (length - int(row["input_ids"].shape[1]))


def _on_grid(keys: Tensor, grid: Tensor, total: int) -> Tensor:
    """The columns of the grid among the keys ``(Nk,)``; a sliding window has lost the first of ``total`` tokens."""
    places = grid.to(keys.device) - max(0, total - keys.shape[0])
    return torch.where(places >= 0, keys[places.clamp_min(0)], 0.0)


def look_with_general(
    model: torch.nn.Module,
    hf_processor: Any,
    pictures: Sequence[Image.Image],
    questions: Sequence[str],
    general: str,
    where: Where,
    max_new_tokens: int,
    template: str | None = None,
    memory: GeneralLooks | None = None,
    encodings: Encodings | None = None,
) -> tuple[list[Look], list[Look]]:
    """For each question about a picture what it and a general prompt look at, as rows of one batch.

    Pictures of the same content are encoded once and need one general row; ``memory`` keeps those for other calls, and
    ``encodings`` what the vision tower made of the pictures.
    """
    kept = {} if memory is None else memory.of(model)
    setting = (general, where, max_new_tokens, template)
    keys = [(picture_digest(picture), *map(repr, setting)) for picture in pictures]
    first = dict(zip(keys, pictures, strict=True))
    missing = [key for key in dict.fromkeys(keys) if key not in kept]
    seen = [(first[key],) for key in (*keys, *missing)]
    asked = batch(model, hf_processor, seen, [*questions, *[general] * len(missing)], template, encodings)
    found = look(model, hf_processor, asked, where, max_new_tokens)
    kept.update(zip(missing, found[len(keys) :], strict=True))
    return found[: len(keys)], [kept[key] for key in keys]
