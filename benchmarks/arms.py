"""What benchmarks/effects.py compares: the cases, arms, controls and scores of each of its tables.

All arms of a table paint the same cases from the same noise. A control disturbs as strongly as the method that it
belongs to, without the method's idea: latent updates in a random direction, random heads, all heads of the same layers,
objects at the wrong place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

import attnsteer
from attnsteer import Processor, Where
from attnsteer.controls import Astray, all_heads, random_heads
from attnsteer.processors import PAG, AStar, AttendAndExcite, IRDiffusion, SharedSelfAttention, SoftPAG, SynGen
from attnsteer.search import WorldJudge
from attnsteer.stories import box_masks
from attnsteer.world import assets
from attnsteer.world.catalog import BACKGROUNDS
from attnsteer.world.evaluate.pictures import RIGHT, Wish, wishes
from attnsteer.world.judge import Judge
from attnsteer.world.scenes import Scene
from attnsteer.world.text import phrase

DRAWS = 80
"""Prompts drawn for each category, so many that nearly every pair and background is among them; the first are used."""
Scores = dict[str, list[float]]
"""Name -> one number for each seed, or one for all of them."""
Pictures = Sequence[Mapping[int, Any]]
"""For each seed the pictures by number of their prompt."""


@dataclass(frozen=True)
class Case:
    """What is painted at once and scored as one: prompts, and the scene of the last of them."""

    prompts: tuple[str, ...]
    scene: Scene

    @property
    def names(self) -> tuple[str, ...]:
        """The two objects of the scene."""
        return tuple(self.scene.categories)


Make = Callable[[Any, Case, int], Processor]
"""``(pipeline, case, its number) -> processor``."""


@dataclass(frozen=True)
class Arm:
    """One way to paint.

    Attributes:
        make: the processor; None is the plain model.
        guidance: classifier-free guidance, where it is not the table's.
        control: the arm whose control this is.
        rows: numbers of the prompts that are painted; None: all.
    """

    make: Make | None = None
    guidance: float | None = None
    control: str = ""
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Table:
    """One comparison.

    Attributes:
        title: what it is about; model: an embedded pipeline; guidance, steps: how it is called.
        arms: by name; the first is the baseline.
        score: the pictures of one case, one for each seed -> scores.
        columns: scores that the table shows, and their headings.
        split: of the pairs of objects; methods are tuned on "validation".
        story: before the prompt of both objects come those of each alone.
        parameters: of the arms, as far as they are not in their names.
    """

    title: str
    model: str
    guidance: float
    steps: int
    arms: Mapping[str, Arm]
    score: Callable[[Case, Pictures], Scores]
    columns: Mapping[str, str]
    split: str = "test"
    story: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def cases(self, count: int) -> list[Case]:
        """`count` different prompts of two objects, pairs that no training scene has."""
        found: dict[str, Wish] = {}
        for wish in wishes("two", DRAWS, self.split):
            found.setdefault(wish.prompt, wish)
        if len(found) < count:
            raise SystemExit(f"There are only {len(found)} different prompts of the split {self.split!r}.")
        return [Case((*self.references(wish), wish.prompt), wish.scene) for wish in list(found.values())[:count]]

    def references(self, wish: Wish) -> list[str]:
        """Prompts of each object alone, for the tables of stories."""
        return [f"{phrase(name)} on a white background" for name in wish.scene.categories] if self.story else []


@cache
def judge() -> Judge:
    return Judge.load()


@cache
def world_judge() -> WorldJudge:
    return WorldJudge()


# ---- words: latent updates -------------------------------------------------------------------------------------------
LEVEL = 0
"""Where maps are read in world-sd: 16 x 16, as the papers do."""


def excite(size: float, case: Case) -> AttendAndExcite:
    """The published schedule for ten steps: updates in the first half, refinement at 0, 10 and 20 of 50."""
    return AttendAndExcite(
        subjects=case.names,
        level=LEVEL,
        scale_factor=size,
        max_iter_to_alter=5,
        thresholds={0: 0.05, 2: 0.5, 4: 0.8},
    )


def star(seg: float, ret: float, size: float, case: Case) -> AStar:
    return AStar(subjects=case.names, level=LEVEL, scale_factor=size, seg_weight=seg, ret_weight=ret)


def syngen(size: float, case: Case) -> SynGen:
    """Nouns without modifiers: each is kept from the rest of the prompt."""
    subjects = tuple((name,) for name in case.names)
    return SynGen(subjects=subjects, level=LEVEL, scale_factor=size, max_iter_to_alter=5, include_entities=True)


UPDATES: dict[str, Callable[[float, Case], Processor]] = {
    "Attend-and-Excite": excite,
    "A-STAR, segregation alone": partial(star, 1.0, 0.0),
    "A-STAR, retention alone": partial(star, 0.0, 1.0),
    "A-STAR, both": partial(star, 1.0, 1.0),
    "SynGen": syngen,
}
SIZES = dict.fromkeys(UPDATES, 10.0) | {"SynGen": 2.5}
"""Lengths of steps, best of the table `lengths` (8 prompts, 2 seeds); 20 is that of the papers."""


def last(pictures: Mapping[int, Any]) -> Any:
    """The picture of the prompt with both objects."""
    return pictures[max(pictures)]


def presence(case: Case, pictures: Pictures) -> Scores:
    """both: the two objects are there; exact: each once and nothing else."""
    seen = judge()([last(each) for each in pictures])
    return {
        "both": [float(RIGHT["two"](case.scene, scene)) for scene in seen],
        "exact": [float(case.scene.counts == scene.counts) for scene in seen],
    }


def lengths() -> Table:
    """Which length of steps suits each latent update: on other pairs of objects than those of the comparison."""
    arms = {"none": Arm()}
    for name, method in UPDATES.items():
        for size in (1.0, 2.5, 5.0, 10.0, 20.0):
            own = partial(method, size)
            arms[f"{name}, {size:g}"] = Arm(lambda pipe, case, number, own=own: own(case))
    columns = {"both": "both objects", "exact": "each once, nothing else"}
    return Table("Lengths of steps", "world-sd", 1.0, 10, arms, presence, columns, split="validation")


def words() -> Table:
    arms = {"none": Arm()}
    for name, method in UPDATES.items():
        own = partial(method, SIZES[name])
        arms[name] = Arm(lambda pipe, case, number, own=own: own(case))
        astray = lambda pipe, case, number, own=own: Astray(method=own(case), seed=number)  # noqa: E731
        arms[f"{name}: random direction"] = Arm(astray, control=name)
    columns = {"both": "both objects", "exact": "each once, nothing else"}
    return Table(
        "Latent updates", "world-sd", 1.0, 10, arms, presence, columns, parameters={"lengths": SIZES, "level": LEVEL}
    )


# ---- heads: guidance by perturbation ---------------------------------------------------------------------------------
TOP, STRENGTH, SCALE = 9, 0.5, 3.0


def searched() -> SoftPAG:
    file = assets.root() / "selections/world-sd3-judge.json"
    if not file.exists():
        made = "attnsteer search world-sd3 --num-pairs 16 --rounds 5 --batch 16 --out outputs/heads"
        raise SystemExit(f"The table of heads needs {file}: the heads.json that `{made}` writes.")
    return SoftPAG.from_search(file, top=TOP, strength=STRENGTH, scale=SCALE)


def quality(case: Case, pictures: Pictures) -> Scores:
    """The judge's score of the search, exact as above, and how much pictures differ by seed (RMS of pixels, 0 to 1)."""
    shown = [last(each) for each in pictures]
    pixels = [np.asarray(picture.convert("RGB"), dtype=float) / 255 for picture in shown]
    apart = [float(np.sqrt(np.mean((a - b) ** 2))) for a, b in combinations(pixels, 2)]
    scores = list(world_judge().measure(shown, [case.prompts[-1]] * len(shown)))
    return {"judge": scores, "exact": presence(case, pictures)["exact"], "diversity": [fmean(apart)]}


def heads() -> Table:
    own = searched()

    def chosen(where: Callable[[Any, int], Where]) -> Make:
        return lambda pipe, case, number: replace(own, where=where(attnsteer.sites(pipe), number))

    middle = Where(layers=[3])
    pag, name = "PAG, middle layer", f"SoftPAG, {TOP} searched heads"
    arms = {
        "none": Arm(),
        "CFG": Arm(guidance=assets.call("StableDiffusion3Pipeline")["guidance_scale"]),
        pag: Arm(lambda pipe, case, number: PAG(middle, scale=SCALE)),
        "PAG, as many random heads": Arm(
            lambda pipe, case, number: PAG(random_heads(middle, attnsteer.sites(pipe), number), scale=SCALE),
            control=pag,
        ),
        name: Arm(lambda pipe, case, number: own),
        f"SoftPAG, {TOP} random heads": Arm(chosen(lambda sites, n: random_heads(own.where, sites, n)), control=name),
        "SoftPAG, all heads of these layers": Arm(chosen(lambda sites, n: all_heads(own.where, sites)), control=name),
    }
    columns = {"judge": "judge's score", "exact": "each once, nothing else", "diversity": "diversity"}
    return Table("Guidance by perturbed heads", "world-sd3", 1.0, 20, arms, quality, columns, parameters=own.to_dict())


# ---- subjects: pictures that share attention -------------------------------------------------------------------------
REFERENCE = (0.1, 0.1, 0.9, 0.9)
PLACES = ((0.0, 0.1, 0.5, 0.9), (0.5, 0.1, 1.0, 0.9))
ASIDE = (0.0, 0.0, 0.2, 1.0)
"""Boxes, as fractions: an object in its own picture, the two objects in theirs, and where no object is."""
SIZE = (64, 64)
SAME = 24
"""Pixels of a crop's sides when two are compared."""


def look(picture: Any, scene: Scene, name: str, background: str) -> Any:
    """An object as it was painted, on grey, 24 x 24; None where the judge does not see it."""
    boxes = [thing.box for thing in scene.objects if thing.name == name]
    if not boxes:
        return None
    colour = np.asarray(BACKGROUNDS[background], dtype=float)
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    empty = np.abs(pixels - colour).max(-1) < 32
    painted = Image.fromarray(np.where(empty[..., None], 128, pixels).astype("uint8"))
    return np.asarray(painted.crop(boxes[0]).resize((SAME, SAME)), dtype=float) / 255


def likeness(case: Case, pictures: Pictures) -> Scores:
    """both as above; placed: each object where its box is; first, second: 1 - RMS between an object and the picture of
    its reference, 0 where one of them is missing."""
    scores: Scores = {"both": presence(case, pictures)["both"], "placed": []}
    for each in pictures:
        seen = dict(zip(each, judge()(list(each.values())), strict=True))
        whole = seen[max(each)]
        middles = [[thing.centre[0] / SIZE[0] for thing in whole.objects if thing.name == name] for name in case.names]
        right = [any(box[0] <= x < box[2] for x in xs) for xs, box in zip(middles, PLACES, strict=True)]
        scores["placed"].append(float(all(right)))
        for number, name in enumerate(case.names):
            if number in each:
                ours = look(last(each), whole, name, case.scene.background)
                alike = similarity(ours, look(each[number], seen[number], name, "white"))
                scores.setdefault(("first", "second")[number], []).append(alike)
    return scores


def similarity(one: Any, other: Any) -> float:
    """1 - RMS of two crops; 0 without one of them."""
    return 0.0 if one is None or other is None else 1 - float(np.sqrt(np.mean((one - other) ** 2)))


def shared(masks: Sequence[tuple[float, float, float, float]]) -> SharedSelfAttention:
    return SharedSelfAttention(frames=3, anchors=2, masks=box_masks(masks, SIZE))


def isolated(references: int, places: Sequence[tuple[float, float, float, float]]) -> IRDiffusion:
    lent = box_masks([REFERENCE] * references, SIZE)
    return IRDiffusion(references=lent, scene=box_masks(places, SIZE), start_layer=3)


def subjects() -> Table:
    own, one, two = "shared self-attention", "IR-Diffusion, first object", "IR-Diffusion, both objects"
    arms = {
        "none": Arm(),
        own: Arm(lambda pipe, case, number: shared([REFERENCE, REFERENCE])),
        f"{own}: keys beside the objects": Arm(lambda pipe, case, number: shared([ASIDE, ASIDE]), control=own),
        one: Arm(lambda pipe, case, number: isolated(1, PLACES[:1]), rows=(0, 2)),
        f"{one}: at the other's place": Arm(
            lambda pipe, case, number: isolated(1, PLACES[1:]), control=one, rows=(0, 2)
        ),
        two: Arm(lambda pipe, case, number: isolated(2, PLACES)),
        f"{two}: exchanged": Arm(lambda pipe, case, number: isolated(2, PLACES[::-1]), control=two),
    }
    columns = {"both": "both objects", "placed": "each in its place"}
    columns |= {"first": "first like its reference", "second": "second like its reference"}
    return Table("Pictures that share attention", "world-sd", 1.0, 10, arms, likeness, columns, story=True)


def mutual() -> Table:
    """How far IR-Diffusion may go toward its references: on other pairs of objects than those of the comparison."""
    arms = {"none": Arm()}
    for share in (0.9, 0.5, 0.2):
        own = replace(isolated(2, PLACES), mutual=share)
        arms[f"IR-Diffusion, both objects, mutual {share:g}"] = Arm(lambda pipe, case, number, own=own: own)
    return replace(subjects(), title="IR-Diffusion's mutual", arms=arms, split="validation")


TABLES: dict[str, Callable[[], Table]] = {
    "lengths": lengths,
    "mutual": mutual,
    "words": words,
    "heads": heads,
    "subjects": subjects,
}
