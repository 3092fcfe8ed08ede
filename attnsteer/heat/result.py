"""``HeatMaps``: the maps of words over a picture, as arrays, as a picture, and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import SteeringError
from .means import AXES

if TYPE_CHECKING:
    from PIL.Image import Image

    from .pictures import Panel

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SIDES = {24: 160, 96: 112}
"""Up to so many panels, the longer side of each in pixels; 72 beyond."""


@dataclass(frozen=True, eq=False)
class HeatMaps:
    """Heat maps over one picture.

    Attributes:
        maps: ``(words, [steps], [layers], [heads], h, w)`` probabilities on the CPU, with the axes that were kept.
        words: what each map of the first axis is of.
        numbers: for each kept axis (``"step"``, ``"layer"``, ``"head"``) which these are.
        picture: what the maps lie over, where there is one.
        text: the prompt, or the question and its answer.
        sinks: bool ``(h, w)``, the places to mark; None where none were looked for.
    """

    maps: Tensor
    words: tuple[str, ...]
    numbers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    picture: Image | None = None
    text: str = ""
    sinks: Tensor | None = None

    @classmethod
    def of_axes(
        cls,
        maps: Tensor,
        words: Sequence[str],
        numbers: Mapping[str, tuple[int, ...]],
        picture: Image | None = None,
        text: str = "",
    ) -> HeatMaps:
        """From maps ``(words, steps, layers, heads, h, w)`` that have 1 where an axis is not kept."""
        gone = [i for i, name in enumerate(AXES, start=1) if name not in numbers]
        return cls(maps.squeeze(gone), tuple(words), dict(numbers), picture, text)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of ``maps``."""
        return ("word", *self.numbers, "row", "column")

    def __getitem__(self, word: str) -> Tensor:
        """The maps of one word, ``([steps], [layers], [heads], h, w)``.

        Raises:
            SteeringError: it was not asked for; says which were.
        """
        found = [i for i, other in enumerate(self.words) if other.strip().lower() == word.strip().lower()]
        if not found:
            raise SteeringError(f"There is no map of {word!r}; there are: {', '.join(map(repr, self.words))}.")
        return self.maps[found].nanmean(0) if len(found) > 1 else self.maps[found[0]]

    def average(self) -> HeatMaps:
        """The mean over all axes that were kept."""
        places = tuple(range(1, 1 + len(self.numbers)))
        maps = self.maps.nanmean(places) if places else self.maps
        return HeatMaps(maps, self.words, {}, self.picture, self.text, self.sinks)

    @property
    def peaks(self) -> list[tuple[float, float]]:
        """For each word where its averaged map is highest: x and y as shares of width and height, token centres."""
        maps = self.average().maps.nan_to_num()
        height, width = maps.shape[-2:]
        best = maps.flatten(1).argmax(1).tolist()
        return [((at % width + 0.5) / width, (at // width + 0.5) / height) for at in best]

    # ---- pictures ----------------------------------------------------------------------------------------------------
    def overlay(self, columns: int = 10, side: int | None = None) -> Image:
        """A sheet: the picture, then every map over it, each in the colours from 0 to its own maximum, which its second
        line gives. A row for each word and, of several kept axes, for each number of all but the last.

        Args:
            columns: panels side by side.
            side: longer side of a panel in pixels (default: fewer for more panels).
        """
        from .pictures import Panel, sheet

        count = self.maps.shape[:-2].numel()
        side = side or next((pixels for most, pixels in SIDES.items() if count <= most), 72)
        original = [Panel(self._resized(side), "picture", " ")] if self.picture else []
        names = list(self.numbers)
        if not names:
            rows = [[*original, *(self._panel((i,), word.strip(), side) for i, word in enumerate(self.words))]]
            return sheet(rows, self.text, columns)
        rows = []
        for i, *outer in product(*(range(n) for n in self.maps.shape[: len(names)])):
            place = (i, *outer)
            lead = [f"{name} {self.numbers[name][n]}" for name, n in zip(names, outer, strict=False)]
            last = names[-1]
            titles = [" ".join([self.words[i].strip(), *lead, f"{last} {n}"]) for n in self.numbers[last]]
            rows.append([*original, *(self._panel((*place, n), title, side) for n, title in enumerate(titles))])
        return sheet(rows, self.text, columns)

    def _size(self, side: int) -> tuple[int, int]:
        height, width = self.maps.shape[-2:]
        wide, high = self.picture.size if self.picture else (width, height)
        return max(1, round(side * wide / max(wide, high))), max(1, round(side * high / max(wide, high)))

    def _resized(self, side: int) -> Image:
        from PIL import Image as Pillow

        assert self.picture is not None
        return self.picture.convert("RGB").resize(self._size(side), Pillow.Resampling.LANCZOS)

    def _panel(self, place: tuple[int, ...], title: str, side: int) -> Panel:
        from .pictures import Panel, mark, overlay

        heat = self.maps[place].float()
        image = overlay(heat.numpy(), self.picture, self._size(side))
        if self.sinks is not None:
            image = mark(image, self.sinks.numpy())
        return Panel(image, title, "not read" if bool(heat.isnan().all()) else self.note(heat))

    def note(self, heat: Tensor) -> str:
        """What is said about a map ``(h, w)`` on the sheet."""
        return f"max {heat.max().item():.3g}"

    # ---- files -------------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write the sheet (.png, .jpg, .webp) or the arrays (.safetensors): ``maps``, ``picture`` ``(H, W, 3)`` uint8
        and ``sinks``, with ``words``, ``axes``, ``numbers`` and ``text`` as JSON in the metadata.

        Raises:
            SteeringError: another ending.
        """
        path = Path(path)
        if path.suffix.lower() not in (*PICTURES, ".safetensors"):
            raise SteeringError(f"{str(path)!r}: let it end in {', '.join(PICTURES)} or .safetensors.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in PICTURES:
            self.overlay().save(path)
            return path
        from safetensors.torch import save_file

        tensors = {"maps": self.maps.contiguous()}
        if self.picture is not None:
            tensors["picture"] = _pixels(self.picture)
        if self.sinks is not None:
            tensors["sinks"] = self.sinks.contiguous()
        facts = {"words": self.words, "axes": self.axes, "numbers": self.numbers, "text": self.text}
        save_file(tensors, str(path), {name: json.dumps(value) for name, value in facts.items()})
        return path


def _pixels(picture: Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture.convert("RGB")))
