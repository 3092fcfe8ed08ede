"""Drawing scenes: at random, or with chosen objects; training, validation and test scenes by combination.

    sampling.sample(7)                                   # a scene; the same arguments always give the same scene
    sampling.compose(["dog", "car"], "blue")             # just these objects
    for scene in sampling.stream("test", 100): ...       # combinations that no training scene has

Every pair of categories belongs to one of the three splits (`split_of`), usual partners to the training split. No
training scene has two categories of a validation or test pair; every test scene with two categories or more has a test
pair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from attnsteer.world.catalog import BACKGROUNDS, BY_NAME, CORE, FRAMES, find
from attnsteer.world.scenes import SIZE, Box, Object, Scene, painted

SPLITS = ("train", "validation", "test")
COUNT_WEIGHTS = (0.4, 0.3, 0.15, 0.15)  # how often a scene has 1, 2, 3, 4 objects
REPEAT = 0.12  # how often an object repeats the category before it ("two dogs")
ANGLES = (-15, -10, -5, 5, 10, 15)  # degrees
VISIBLE = 0.6  # share of an object's pixels that others leave to be seen


@dataclass(frozen=True)
class Style:
    """What makes scenes harder: how often (0 to 1) an object is turned, partly hidden or framed, a background graded.

    rotate: an object is turned by 5 to 15 degrees; occlude: one object of a scene hides part of another; frame: an
    object has a coloured frame; gradient: the background turns into another colour; flip: an object is mirrored.
    """

    rotate: float = 0.0
    occlude: float = 0.0
    frame: float = 0.0
    gradient: float = 0.0
    flip: float = 0.5


PLAIN = Style()
VARIED = Style(rotate=0.3, occlude=0.15, frame=0.15, gradient=0.15)


@cache
def split_of(one: str, other: str) -> str:
    """The split of a pair of categories, in any order: 80 % train, 5 % validation, 15 % test; partners train."""
    if one == other or find(one).partner == other or find(other).partner == one:
        return "train"
    draw = int.from_bytes(hashlib.blake2b("|".join(sorted((one, other))).encode(), digest_size=4).digest(), "big") % 20
    return "test" if draw < 3 else "validation" if draw == 3 else "train"


def split_of_scene(scene: Scene) -> str:
    """The split of its categories: the last of train, validation, test that any of its pairs belongs to."""
    return SPLITS[max((SPLITS.index(split_of(a, b)) for a, b in combinations(scene.categories, 2)), default=0)]


def stream(split: str, count: int, /, seed: int = 0, **options: Any) -> Iterator[Scene]:
    """`count` scenes of a split; `options` go to `sample`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose {', '.join(SPLITS)}.")
    for number in range(count):
        yield sample((2_000_000_011, SPLITS.index(split), seed, number), split=split, **options)


def sample(
    seed: int | Sequence[int],
    *,
    count: int | None = None,
    categories: Sequence[str] = CORE,
    background: str | None = None,
    prior: float = 0.0,
    repeat: float = REPEAT,
    split: str | None = None,
    style: Style = PLAIN,
) -> Scene:
    """A random scene; the same arguments always give the same scene.

    Args:
        seed: an integer or a sequence of them.
        count: number of objects, 1 to 4 (default: random by `COUNT_WEIGHTS`).
        categories: names to choose from (default: the core categories).
        background: a key of `catalog.BACKGROUNDS` (default: random).
        prior: probability, 0 to 1, that an object is the usual partner of the one before it (co-occurrence).
        repeat: probability that an object has the category of the one before it.
        split: only combinations of this split (default: any).
        style: turned, hidden, framed objects and graded backgrounds.
    """
    rng = np.random.default_rng(seed)
    if count is not None and not 1 <= count <= 4:
        raise ValueError(f"count is {count}; a scene has 1 to 4 objects.")
    if background is not None and background not in BACKGROUNDS:
        raise ValueError(f"background is {background!r}; the world has {', '.join(BACKGROUNDS)}.")
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose {', '.join(SPLITS)}.")
    number = count or 1 + int(rng.choice(4, p=COUNT_WEIGHTS))
    colour = background or list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    names = _names(rng, number, [find(name).name for name in categories], prior, repeat, split)
    looks = rng.spawn(1)[0]  # apart, so that a scene keeps its objects and places whatever the style
    scene = Scene(colour, layout(rng, names, style, looks))
    if looks.random() < style.occlude:
        scene = _overlap(scene, looks)
    if looks.random() < style.gradient:
        others = [name for name in BACKGROUNDS if name != colour]
        scene = replace(scene, gradient=others[int(looks.integers(len(others)))])
    return scene


def compose(names: Sequence[str], background: str = "white", seed: int = 0, style: Style = PLAIN) -> Scene:
    """A scene of exactly these categories, one object each; `seed` decides where they are."""
    if not 1 <= len(names) <= 4 or background not in BACKGROUNDS:
        raise ValueError(f"A scene has 1 to 4 objects, not {len(names)}, on one of {', '.join(BACKGROUNDS)}.")
    return Scene(background, layout(np.random.default_rng(seed), [find(name).name for name in names], style))


def layout(
    rng: np.random.Generator, names: Sequence[str], style: Style = PLAIN, looks: np.random.Generator | None = None
) -> tuple[Object, ...]:
    """Places objects in the cells of a grid that suits their number: 1 x 1, 1 x 2, 2 x 1 or 2 x 2.

    Places are drawn from `rng`, turns and frames from `looks` (default: a child of `rng`).
    """
    half, full = SIZE // 2, SIZE
    looks = looks or rng.spawn(1)[0]
    if len(names) == 1:
        cells, sizes = [(0, 0, full, full)], (38, 58)
    elif len(names) == 2 and rng.random() < 0.7:
        cells, sizes = [(0, 0, half, full), (half, 0, half, full)], (24, 32)
    elif len(names) == 2:
        cells, sizes = [(0, 0, full, half), (0, half, full, half)], (24, 32)
    else:
        corners = [(0, 0, half, half), (half, 0, half, half), (0, half, half, half), (half, half, half, half)]
        cells, sizes = [corners[i] for i in sorted(rng.permutation(4)[: len(names)])], (21, 31)
    return tuple(_place(rng, looks, name, cell, sizes, style) for name, cell in zip(names, cells, strict=True))


def _place(
    rng: np.random.Generator, looks: np.random.Generator, name: str, cell: Box, sizes: tuple[int, int], style: Style
) -> Object:
    flip = bool(rng.random() < style.flip)
    angle = ANGLES[int(looks.integers(len(ANGLES)))] if looks.random() < style.rotate else 0
    frame = list(FRAMES)[int(looks.integers(len(FRAMES)))] if looks.random() < style.frame else ""
    height, width = painted(name, int(rng.integers(sizes[0], sizes[1] + 1)), flip, angle, frame).shape[:2]
    left = cell[0] + int(rng.integers(cell[2] - width + 1))
    top = cell[1] + int(rng.integers(cell[3] - height + 1))
    return Object(name, (left, top, left + width, top + height), flip, angle, frame)


def _overlap(scene: Scene, rng: np.random.Generator, tries: int = 4) -> Scene:
    """One object moved onto a neighbour, as far as both still show `VISIBLE` of their pixels."""
    if len(scene.objects) < 2:
        return scene
    whole = scene.masks().sum((1, 2))
    for _ in range(tries):
        moved, onto = rng.permutation(len(scene.objects))[:2]
        thing, other = scene.objects[moved], scene.objects[onto]
        share = 0.3 + 0.4 * rng.random()
        left, top, right, bottom = thing.box
        across, down = (round(share * (b - a)) for a, b in zip(thing.centre, other.centre, strict=True))
        across, down = max(-left, min(SIZE - right, across)), max(-top, min(SIZE - bottom, down))
        box = (left + across, top + down, right + across, bottom + down)
        objects = tuple(replace(o, box=box) if i == moved else o for i, o in enumerate(scene.objects))
        crowded = replace(scene, objects=objects)
        seen = crowded.masks().sum((1, 2)) / whole
        if VISIBLE <= seen.min() < 1:
            return crowded
    return scene


def _names(
    rng: np.random.Generator, number: int, pool: Sequence[str], prior: float, repeat: float, split: str | None
) -> list[str]:
    if number > 1 and split in SPLITS[1:]:
        pool = [name for name in pool if any(split_of(name, other) == split for other in pool)] or pool
    names: list[str] = []
    while len(names) < number:
        last = names[-1] if names else ""
        draw = rng.random()
        if last and draw < repeat and (len(set(names)) > 1 or split in (None, "train")):
            names.append(last)
        elif last and draw < repeat + (1 - repeat) * prior and _fits(BY_NAME[last].partner, names, split):
            names.append(BY_NAME[last].partner)
        else:
            left = [name for name in pool if _fits(name, names, split)] or names or list(pool)
            names.append(left[int(rng.integers(len(left)))])
    return names


def _fits(name: str, names: Sequence[str], split: str | None) -> bool:
    """Whether a scene with `names` stays, or becomes, one of the split when `name` joins."""
    if name in ("", *names):
        return False
    found = [SPLITS.index(split_of(name, other)) for other in set(names)]
    if split is None or not found:
        return True
    allowed = max(found) <= SPLITS.index(split)
    return allowed and (len(found) > 1 or max(found) == SPLITS.index(split))
