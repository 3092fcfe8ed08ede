"""Scenes: one to four objects on a coloured background, with exact ground truth.

    scene = sample(7)
    scene.image()                        # PIL picture, 64 x 64
    [(o.name, o.box) for o in scene.objects]

Boxes never overlap, so every object is wholly visible and masks are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from attnsteer.world.catalog import BACKGROUNDS, BY_NAME, CORE, find
from attnsteer.world.sprites import sprite

SIZE = 64  # pixels, both sides
COUNT_WEIGHTS = (0.4, 0.3, 0.15, 0.15)  # how often a scene has 1, 2, 3, 4 objects
REPEAT = 0.12  # how often an object repeats the category before it ("two dogs")


@dataclass(frozen=True)
class Object:
    """One object: category name, box (left, top, right, bottom; the last two exclusive), mirrored or not."""

    name: str
    box: tuple[int, int, int, int]
    flip: bool = False

    @property
    def pixels(self) -> np.ndarray:
        """RGBA, uint8 [height, width, 4], of the size of the box."""
        left, top, right, bottom = self.box
        return sprite(self.name, max(right - left, bottom - top), self.flip)


@dataclass(frozen=True)
class Scene:
    """A picture and all that is true of it. Objects are in reading order: top row first, left to right."""

    background: str
    objects: tuple[Object, ...]
    size: int = SIZE

    @property
    def categories(self) -> tuple[str, ...]:
        """The different categories, in reading order."""
        return tuple(dict.fromkeys(thing.name for thing in self.objects))

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each category, in reading order."""
        return dict(Counter(thing.name for thing in self.objects))

    def array(self) -> np.ndarray:
        """The picture as uint8 [size, size, 3]."""
        canvas = np.empty((self.size, self.size, 3), np.uint8)
        canvas[:] = BACKGROUNDS[self.background]
        for thing in self.objects:
            left, top, right, bottom = thing.box
            pixels = thing.pixels
            alpha = pixels[..., 3:].astype(np.uint16)
            under = canvas[top:bottom, left:right]
            canvas[top:bottom, left:right] = (pixels[..., :3] * alpha + under * (255 - alpha) + 127) // 255
        return canvas

    def image(self) -> Image.Image:
        """The picture as RGB."""
        return Image.fromarray(self.array())

    def masks(self) -> np.ndarray:
        """Which pixels each object covers at least half: bool [objects, size, size]."""
        masks = np.zeros((len(self.objects), self.size, self.size), bool)
        for mask, thing in zip(masks, self.objects, strict=True):
            left, top, right, bottom = thing.box
            mask[top:bottom, left:right] = thing.pixels[..., 3] >= 128
        return masks


def sample(
    seed: int | Sequence[int],
    *,
    count: int | None = None,
    categories: Sequence[str] = CORE,
    background: str | None = None,
    prior: float = 0.0,
    repeat: float = REPEAT,
) -> Scene:
    """A random scene; the same arguments always give the same scene.

    Args:
        seed: an integer or a sequence of them.
        count: number of objects, 1 to 4 (default: random by `COUNT_WEIGHTS`).
        categories: names to choose from (default: the core categories).
        background: a key of `catalog.BACKGROUNDS` (default: random).
        prior: probability, 0 to 1, that an object is the usual partner of the one before it (co-occurrence).
        repeat: probability that an object has the category of the one before it.
    """
    rng = np.random.default_rng(seed)
    if count is not None and not 1 <= count <= 4:
        raise ValueError(f"count is {count}; a scene has 1 to 4 objects.")
    if background is not None and background not in BACKGROUNDS:
        raise ValueError(f"background is {background!r}; the world has {', '.join(BACKGROUNDS)}.")
    number = count or 1 + int(rng.choice(4, p=COUNT_WEIGHTS))
    colour = background or list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    names = _names(rng, number, [find(name).name for name in categories], prior, repeat)
    return Scene(colour, layout(rng, names))


def compose(names: Sequence[str], background: str = "white", seed: int = 0) -> Scene:
    """A scene of exactly these categories, one object each; `seed` decides where they are."""
    if not 1 <= len(names) <= 4 or background not in BACKGROUNDS:
        raise ValueError(f"A scene has 1 to 4 objects, not {len(names)}, on one of {', '.join(BACKGROUNDS)}.")
    return Scene(background, layout(np.random.default_rng(seed), [find(name).name for name in names]))


def layout(rng: np.random.Generator, names: Sequence[str]) -> tuple[Object, ...]:
    """Places objects in the cells of a grid that suits their number: 1 x 1, 1 x 2, 2 x 1 or 2 x 2."""
    half, full = SIZE // 2, SIZE
    if len(names) == 1:
        cells, sizes = [(0, 0, full, full)], (38, 58)
    elif len(names) == 2 and rng.random() < 0.7:
        cells, sizes = [(0, 0, half, full), (half, 0, half, full)], (24, 32)
    elif len(names) == 2:
        cells, sizes = [(0, 0, full, half), (0, half, full, half)], (24, 32)
    else:
        corners = [(0, 0, half, half), (half, 0, half, half), (0, half, half, half), (half, half, half, half)]
        cells, sizes = [corners[i] for i in sorted(rng.permutation(4)[: len(names)])], (21, 31)
    return tuple(_place(rng, name, cell, sizes) for name, cell in zip(names, cells, strict=True))


def _place(rng: np.random.Generator, name: str, cell: tuple[int, int, int, int], sizes: tuple[int, int]) -> Object:
    flip = bool(rng.random() < 0.5)
    height, width = sprite(name, int(rng.integers(sizes[0], sizes[1] + 1)), flip).shape[:2]
    left = cell[0] + int(rng.integers(cell[2] - width + 1))
    top = cell[1] + int(rng.integers(cell[3] - height + 1))
    return Object(name, (left, top, left + width, top + height), flip)


def _names(rng: np.random.Generator, number: int, pool: Sequence[str], prior: float, repeat: float) -> list[str]:
    names: list[str] = []
    while len(names) < number:
        last = names[-1] if names else ""
        draw = rng.random()
        if last and draw < repeat:
            names.append(last)
        elif last and draw < repeat + (1 - repeat) * prior and BY_NAME[last].partner not in ("", *names):
            names.append(BY_NAME[last].partner)
        else:
            left = [name for name in pool if name not in names] or list(pool)
            names.append(left[int(rng.integers(len(left)))])
    return names
