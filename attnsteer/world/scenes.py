"""Scenes: one to four objects on a coloured background, with exact ground truth.

    scene = sampling.sample(7)
    scene.image()                        # PIL picture, 64 x 64
    [(o.name, o.box) for o in scene.objects]

Objects are painted in order; where two overlap, the later one hides part of the earlier one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from attnsteer.world.catalog import BACKGROUNDS, FRAMES
from attnsteer.world.sprites import sprite

SIZE = 64  # pixels, both sides
APART = SIZE // 8  # pixels between two centres for one to be left of, or above, the other
Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two exclusive


@lru_cache(maxsize=16384)
def painted(name: str, side: int, flip: bool = False, angle: int = 0, frame: str = "") -> np.ndarray:
    """The pixels of one object, its frame included, with the longer side `side` pixels long.

    Returns:
        read-only uint8 array [height, width, 4], RGBA, not premultiplied.
    """
    if not frame:
        return sprite(name, side, flip, angle)
    width = 2 if side < 34 else 3
    inner = sprite(name, side - 2 * width - 2, flip, angle)
    pixels = np.zeros((inner.shape[0] + 2 * width + 2, inner.shape[1] + 2 * width + 2, 4), np.uint8)
    pixels[:] = (*FRAMES[frame], 255)
    pixels[width:-width, width:-width] = 0
    pixels[width + 1 : -width - 1, width + 1 : -width - 1] = inner
    pixels.setflags(write=False)
    return pixels


@dataclass(frozen=True)
class Object:
    """One object: category name, its box, mirrored or not, degrees turned to the left, colour of its frame or ""."""

    name: str
    box: Box
    flip: bool = False
    angle: int = 0
    frame: str = ""

    @property
    def pixels(self) -> np.ndarray:
        """RGBA, uint8 [height, width, 4], of the size of the box."""
        left, top, right, bottom = self.box
        return painted(self.name, max(right - left, bottom - top), self.flip, self.angle, self.frame)

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, x and y."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A picture and all that is true of it. Objects are in reading order: top row first, left to right.

    background: a key of `catalog.BACKGROUNDS`; gradient: another, which it turns into from top to bottom, or "".
    """

    background: str
    objects: tuple[Object, ...]
    size: int = SIZE
    gradient: str = ""

    @property
    def categories(self) -> tuple[str, ...]:
        """The different categories, in reading order."""
        return tuple(dict.fromkeys(thing.name for thing in self.objects))

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each category, in reading order."""
        return dict(Counter(thing.name for thing in self.objects))

    @property
    def relations(self) -> tuple[tuple[int, str, int], ...]:
        """(i, "left of" or "above", j): all that hold between the objects' centres, by index."""
        found = []
        for i, one in enumerate(self.objects):
            for j, other in enumerate(self.objects):
                across, down = (b - a for a, b in zip(one.centre, other.centre, strict=True))
                found += [(i, "left of", j)] if across >= APART else []
                found += [(i, "above", j)] if down >= APART else []
        return tuple(found)

    def array(self) -> np.ndarray:
        """The picture as uint8 [size, size, 3]."""
        canvas = np.empty((self.size, self.size, 3), np.uint8)
        canvas[:] = BACKGROUNDS[self.background]
        if self.gradient:
            share = np.linspace(0, 1, self.size)[:, None, None]
            first, last = (np.array(BACKGROUNDS[name], float) for name in (self.background, self.gradient))
            canvas[:] = np.rint((1 - share) * first + share * last)
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
        """Which pixels each object covers at least half and no later object hides: bool [objects, size, size]."""
        masks = np.zeros((len(self.objects), self.size, self.size), bool)
        for number, thing in enumerate(self.objects):
            left, top, right, bottom = thing.box
            covered = thing.pixels[..., 3] >= 128
            masks[:number, top:bottom, left:right] &= ~covered
            masks[number, top:bottom, left:right] = covered
        return masks
