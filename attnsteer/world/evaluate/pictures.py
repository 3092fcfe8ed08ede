"""How well a picture model paints what is asked, on combinations of categories that training never had, as the judge
sees it.

    report = evaluate_pictures(assets.path("models/world-sd3"), Judge.load())

In the manner of GenEval (Ghosh et al., 2023, arXiv:2310.11513), the share of pictures that are right for each kind of
prompt:

    one         "a dog on a blue background": a dog and no other category
    two, three  "a dog and a car ...": all are there
    two_exact   of the same pictures: each is there once, and nothing else
    count       "two dogs ...": two dogs and nothing else
    frame       "a red-framed dog and a cat ...": the frame is around the dog, and the cat has none
    place       "a dog to the left of a cat ...": so they are
    background  of all pictures: the colour asked for
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from attnsteer.world import assets, sampling, text
from attnsteer.world.catalog import BACKGROUNDS, CORE
from attnsteer.world.judge import Judge
from attnsteer.world.scenes import Scene

SEED = 2_000_000_011  # apart from all that training draws from
SINGLES = 4
"""Times as many prompts of one object as of the other kinds: a share near 1 needs more pictures to be known as well."""
Progress = Callable[[Sequence[Any]], Iterable[Any]]


def _frames(scene: Scene) -> dict[str, str]:
    return {thing.name: thing.frame for thing in scene.objects}


def _places(scene: Scene) -> set[tuple[str, str, str]]:
    names = [thing.name for thing in scene.objects]
    return {(names[i], relation, names[j]) for i, relation, j in scene.relations}


RIGHT: dict[str, Callable[[Scene, Scene], bool]] = {
    "one": lambda asked, seen: set(asked.categories) == set(seen.categories),
    "two": lambda asked, seen: set(asked.categories) <= set(seen.categories),
    "three": lambda asked, seen: set(asked.categories) <= set(seen.categories),
    "count": lambda asked, seen: asked.counts == seen.counts,
    "frame": lambda asked, seen: _frames(asked).items() <= _frames(seen).items(),
    "place": lambda asked, seen: _places(asked) <= _places(seen),
}
"""What makes a picture right, for each kind of prompt: the scene asked for, and the one seen."""


@dataclass(frozen=True)
class Wish:
    """A prompt, its kind (a key of `RIGHT`), and a scene of which it is true and says all."""

    kind: str
    prompt: str
    scene: Scene


def wishes(kind: str, per_category: int = 4, split: str = "test") -> list[Wish]:
    """`per_category` prompts of a kind for each core category; the first two categories are a pair of the split."""
    found = (_wish(kind, number, name, split) for number, name in enumerate(CORE * per_category))
    return [wish for wish in found if wish]


def _wish(kind: str, number: int, name: str, split: str = "test") -> Wish | None:
    rng = np.random.default_rng((SEED, 9, list(RIGHT).index(kind), number))
    unmet = [other for other in CORE if other != name and sampling.split_of(name, other) == split]
    if not unmet:
        return None  # few pairs are of the validation split
    names = [name, unmet[int(rng.integers(len(unmet)))]]
    names.append(str(rng.choice([other for other in CORE if other not in names])))
    names = {"one": names[:1], "three": names, "count": [name, name]}.get(kind, names[:2])
    colour = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    style = sampling.Style(frame=0.5 if kind == "frame" else 0.0)
    framed = [kind == "frame" and place == number % 2 for place in range(len(names))]
    for _ in count():
        scene = Scene(colour, sampling.layout(rng, names, style))
        relation = next((r for i, r, j in scene.relations if (i, j) == (0, 1)), "")
        clear = kind != "place" or (relation and len(scene.relations) == 1)  # not left of it and above it too
        if clear and [bool(thing.frame) for thing in scene.objects] == framed:
            break
    prompt = text.caption(scene)
    if kind == "place":
        words = "to the left of" if relation == "left of" else relation
        prompt = f"{text.phrase(names[0])} {words} {text.phrase(names[1])} on a {colour} background"
    return Wish(kind, prompt, scene)


def shares(asked: Sequence[Wish], seen: Sequence[Scene]) -> dict[str, float]:
    """The share of right pictures of each kind, by the names at the top of this file."""
    report = {}
    for kind, right in RIGHT.items():
        pairs = [(wish.scene, scene) for wish, scene in zip(asked, seen, strict=True) if wish.kind == kind]
        if pairs:
            report[kind] = sum(right(*pair) for pair in pairs) / len(pairs)
        if pairs and kind == "two":
            report["two_exact"] = sum(a.counts == b.counts for a, b in pairs) / len(pairs)
    colours = [(w.scene.background, "") == (s.background, s.gradient) for w, s in zip(asked, seen, strict=True)]
    return {**report, "background": sum(colours) / len(colours)}


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a folder, whatever its class, without progress bars."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(
    pipe: Any,
    prompts: Sequence[str],
    steps: int = 20,
    guidance: float | None = None,
    *,
    seed: int = 0,
    batch: int = 28,
    progress: Progress = iter,
) -> list[Image.Image]:
    """One picture for each prompt; picture i starts from the noise of `seed` + i. `guidance`: see `assets.call`."""
    call = {**assets.call(type(pipe).__name__, guidance), "num_inference_steps": steps}
    pictures: list[Image.Image] = []
    for first in progress(range(0, len(prompts), batch)):
        some = list(prompts[first : first + batch])
        sources = [torch.Generator().manual_seed(seed + first + i) for i in range(len(some))]
        pictures += pipe(some, generator=sources, **call | {"negative_prompt": [""] * len(some)}).images
    return pictures


def evaluate_pictures(
    folder: str | Path,
    judge: Judge,
    per_category: int = 4,
    steps: int = 20,
    guidance: float | None = None,
    *,
    kinds: Sequence[str] = tuple(RIGHT),
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    sheet: str | Path | None = None,
    progress: Progress = iter,
) -> dict[str, float]:
    """All numbers about a picture model.

    Args:
        folder: a pipeline with the classes of one of the shipped models.
        per_category: prompts of each kind for each of the 28 core categories; of one object `SINGLES` times as many.
        guidance: see `assets.call`; kinds: keys of `RIGHT`.
        sheet: where some of the pictures go, with their prompts (a PNG); progress: goes around the list of batches.
    Returns:
        the shares (0 to 1) of `shares`; pictures, steps, guidance and seconds_per_picture.
    """
    pipe = load(folder, device, dtype)
    many = {"one": SINGLES * per_category}
    asked = [wish for kind in kinds for wish in wishes(kind, many.get(kind, per_category))]
    start = time.perf_counter()
    pictures = paint(pipe, [wish.prompt for wish in asked], steps, guidance, seed=seed, progress=progress)
    seconds = (time.perf_counter() - start) / len(pictures)
    seen = judge(pictures)
    if sheet is not None:
        contact_sheet(asked, pictures, seen).save(sheet)
    name = type(pipe).__name__
    used = assets.call(name, guidance)[assets.GUIDED_BY[name]]
    head = {"pictures": len(pictures), "steps": steps, "guidance": used, "seconds_per_picture": seconds}
    return {**head, **shares(asked, seen)}


def contact_sheet(
    asked: Sequence[Wish], pictures: Sequence[Image.Image], seen: Sequence[Scene], columns: int = 8, side: int = 128
) -> Image.Image:
    """Two rows of pictures of each kind, spread over the categories; prompts of wrong ones are red."""
    chosen: list[int] = []
    for kind in dict.fromkeys(wish.kind for wish in asked):
        mine = [n for n, wish in enumerate(asked) if wish.kind == kind]
        chosen += [mine[37 * i % len(mine)] for i in range(2 * columns)]  # 37: of different categories
    gap, height = 8, side + 40
    page = Image.new("RGB", (gap + columns * (side + gap), gap + len(chosen) // columns * (height + gap)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for place, n in enumerate(chosen):
        x, y = gap + place % columns * (side + gap), gap + place // columns * (height + gap)
        page.paste(pictures[n].convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (x, y))
        ink = "black" if RIGHT[asked[n].kind](asked[n].scene, seen[n]) else (196, 30, 40)
        words = "\n".join(textwrap.wrap(asked[n].prompt.replace(" background", ""), 25))
        draw.multiline_text((x, y + side + 1), words, ink, font, spacing=1)
    return page
