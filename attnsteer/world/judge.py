"""The judge: reads a picture of the world back into a scene. It grades the picture models.

    judge = Judge.load()
    seen = judge([picture])[0]           # a Scene: what the judge believes it sees
    seen.counts, seen.relations, seen.objects[0].frame, seen.background

A small fully convolutional network, trained on rendered scenes alone (`attnsteer.world.train.judge`), so that it is
independent of every model that it grades. For every cell of 4 x 4 pixels it says which category covers it, which frame
that object has, and where the four sides of its box are. Cells of one category whose boxes agree are one object. The
background is read from the pixels of the cells that no object covers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from attnsteer.world import assets
from attnsteer.world.catalog import BACKGROUNDS, CATEGORIES, FRAMES
from attnsteer.world.scenes import SIZE, Box, Object, Scene

CELL = 4  # pixels
GRID = SIZE // CELL
UNIT = 16  # pixels: what distances to the sides of a box are counted in


@dataclass(frozen=True)
class Settings:
    """What config.json holds: the network's shape and meaning, and what makes an object.

    width: channels of the first layer; cells, score: an object needs so many cells, and so much mean probability of its
    category in them (0 to 1); radius: how far, in longer sides of its box, the centres that its cells name may lie from
    its own; tolerance: mean distance, in 0..255, between background pixels and the colours named for them.
    """

    width: int = 32
    cells: int = 4
    score: float = 0.6
    radius: float = 0.35
    tolerance: float = 24.0
    categories: tuple[str, ...] = field(default=tuple(category.name for category in CATEGORIES))
    frames: tuple[str, ...] = field(default=("", *FRAMES))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(8, outputs), nn.SiLU())


class Network(nn.Module):
    """Pictures [n, 3, 64, 64] in -1..1 -> logits of category (0: none) and frame, distances to the sides of the box.

    Down to 8 x 8, where one cell sees a whole object, and up again to 16 x 16.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.parts = (1 + len(settings.categories), len(settings.frames), 4)
        self.stem = nn.Sequential(_convolution(3, width, 2), _convolution(width, 2 * width, 2))
        self.fine = _convolution(2 * width, 2 * width)
        self.down = _convolution(2 * width, 4 * width, 2)
        self.coarse = nn.ModuleList([_convolution(4 * width, 4 * width) for _ in range(2)])
        self.up = nn.Conv2d(4 * width, 2 * width, 1)
        self.merge = _convolution(2 * width, 2 * width)
        self.head = nn.Conv2d(2 * width, sum(self.parts), 1)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[n, categories + 1, 16, 16], [n, frames, 16, 16] and [n, 4 (left, top, right, bottom), 16, 16] in units."""
        fine = self.stem(pictures)
        fine = fine + self.fine(fine)
        coarse = self.down(fine)
        for layer in self.coarse:
            coarse = coarse + layer(coarse)
        return self.head(self.merge(fine + F.interpolate(self.up(coarse), scale_factor=2.0))).split(self.parts, 1)


def tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures as float [n, 3, 64, 64] in -1..1, made smaller or larger if they must be."""
    sized = [p.convert("RGB") if p.size == (SIZE, SIZE) else p.convert("RGB").resize((SIZE, SIZE)) for p in pictures]
    return torch.from_numpy(np.stack([np.asarray(p) for p in sized])).permute(0, 3, 1, 2).float() / 127.5 - 1


class Judge:
    """Calling it with pictures gives scenes: categories, boxes (hidden parts included), frames, background.

    `background` is "" where no colour of the catalog fits; `flip` and `angle` of objects are not read.
    """

    def __init__(self, network: Network, settings: Settings, device: str | torch.device = "cpu") -> None:
        self.network, self.settings, self.device = network.eval().to(device), settings, device

    @classmethod
    def load(cls, folder: str | Path | None = None, device: str | torch.device = "cpu") -> Judge:
        """The judge of a folder (default: the shipped one)."""
        from safetensors.torch import load_file

        place = Path(folder) if folder else assets.path("models/world-judge")
        stored: dict[str, Any] = json.loads((place / "config.json").read_text())
        lists = {key: tuple(value) for key, value in stored.items() if isinstance(value, list)}
        settings = Settings(**{**stored, **lists})
        network = Network(settings)
        network.load_state_dict({k: v.float() for k, v in load_file(place / "model.safetensors").items()})
        return cls(network, settings, device)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (float16)."""
        from safetensors.torch import save_file

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(asdict(self.settings), indent=1) + "\n")
        weights = {key: value.half().cpu().contiguous() for key, value in self.network.state_dict().items()}
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})

    def __call__(self, pictures: Sequence[Image.Image], batch: int = 64) -> list[Scene]:
        """What each picture shows; objects in reading order."""
        return [
            self.scene(*values)
            for first in range(0, len(pictures), batch)
            for values in zip(*self.cells(pictures[first : first + batch]), strict=True)
        ]

    @torch.no_grad()
    def cells(self, pictures: Sequence[Image.Image]) -> tuple[np.ndarray, ...]:
        """What the judgement rests on, for n pictures and 16 x 16 cells.

        Returns:
            pixels uint8 [n, 64, 64, 3]; probabilities of category (0: none) [n, 16, 16, categories + 1] and of frame
            (0: none) [n, 16, 16, frames]; boxes in pixels [n, 16, 16, 4].
        """
        pixels = tensor(pictures)
        category, frame, sides = self.network(pixels.to(self.device))
        middle = torch.arange(GRID, device=sides.device) * CELL + CELL / 2
        x, y = middle.expand(GRID, GRID), middle[:, None].expand(GRID, GRID)
        left, top, right, bottom = (UNIT * sides).unbind(1)
        boxes = torch.stack([x - left, y - top, x + right, y + bottom], -1)
        raw = ((pixels + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8)
        read = (category.softmax(1).permute(0, 2, 3, 1), frame.softmax(1).permute(0, 2, 3, 1), boxes)
        return raw.numpy(), *(values.float().cpu().numpy() for values in read)

    def scene(self, pixels: np.ndarray, category: np.ndarray, frame: np.ndarray, boxes: np.ndarray) -> Scene:
        """The scene that the cells of one picture (`cells`) amount to."""
        first, last = background(pixels, category.argmax(-1) == 0, self.settings.tolerance)
        return Scene(first, self.objects(category, frame, boxes), gradient=last if last != first else "")

    def objects(self, category: np.ndarray, frame: np.ndarray, boxes: np.ndarray) -> tuple[Object, ...]:
        """The objects of one picture, in reading order."""
        winner, found = category.argmax(-1), []
        for number in np.unique(winner[winner > 0]):
            mine = winner == number
            for group in self._groups(category[mine][:, number], boxes[mine]):
                colour = self.settings.frames[int(frame[mine][group].sum(0).argmax())]
                box = _box(np.median(boxes[mine][group], axis=0))
                found.append(Object(self.settings.categories[number - 1], box, frame=colour))
        return tuple(sorted(found, key=lambda thing: (thing.centre[1] >= SIZE / 2, thing.centre[0])))

    def _groups(self, score: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
        """Cells [k] of one category, as index arrays: one for each object."""
        centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(1)
        left, groups = np.ones(len(score), bool), []
        while left.any():
            near = left & (np.arange(len(score)) == np.where(left, score, -1).argmax())
            for _ in range(3):  # from the surest cell towards the middle of those that agree with it
                distance = np.abs(centres - np.median(centres[near], axis=0)).max(1)
                closer = left & (distance <= self.settings.radius * np.median(sides[near]))
                near = closer if closer.any() else near
            left &= ~near
            if near.sum() >= self.settings.cells and score[near].mean() >= self.settings.score:
                groups.append(np.flatnonzero(near))
        return groups


def _box(sides: np.ndarray) -> Box:
    left, top, right, bottom = (int(side) for side in np.rint(sides).clip(0, SIZE))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def background(pixels: np.ndarray, free: np.ndarray, tolerance: float) -> tuple[str, str]:
    """The colours of the background at the top and at the bottom, the same where it is plain; ("", "") if none fits.

    Of all ramps between two colours of the catalog, the one nearest to the pixels.

    Args:
        pixels: uint8 [64, 64, 3].
        free: bool [16, 16], cells without objects.
        tolerance: largest mean absolute distance, in 0..255.
    """
    rows, columns = np.nonzero(free.repeat(CELL, 0).repeat(CELL, 1))
    if not len(rows):
        return "", ""
    names = list(BACKGROUNDS)
    colours = np.array([BACKGROUNDS[name] for name in names], float)
    share = np.arange(SIZE)[:, None] / (SIZE - 1)
    # the median of a row is what most of its pixels are, whatever an object's edge adds to some of them
    seen = np.array([np.median(pixels[row, columns[rows == row]], axis=0) for row in np.unique(rows)])
    weight = np.bincount(rows, minlength=SIZE)[np.unique(rows)] / len(rows)
    ramps = (1 - share[np.unique(rows)]) * colours[:, None, None] + share[np.unique(rows)] * colours[None, :, None]
    errors = (np.abs(ramps - seen).mean(-1) * weight).sum(-1)  # [top, bottom]
    top, bottom = np.unravel_index(errors.argmin(), errors.shape)
    return (names[top], names[bottom]) if errors.min() <= tolerance else ("", "")
