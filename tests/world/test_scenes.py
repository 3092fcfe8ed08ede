"""The world says the truth about its scenes."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from attnsteer.world import assets, sampling, scenes, sprites, text
from attnsteer.world.catalog import BACKGROUNDS, BY_NAME, CATEGORIES, CORE, FRAMES, NUMBERS
from attnsteer.world.evaluate.answers import description_scores, lonely, named

EVERY = tuple(category.name for category in CATEGORIES)


def test_same_seed_same_scene_and_other_seed_other_scene() -> None:
    for seed in (0, 7, (3, 4)):
        assert sampling.sample(seed) == sampling.sample(seed)
        assert np.array_equal(sampling.sample(seed).array(), sampling.sample(seed).array())
    assert len({sampling.sample(seed) for seed in range(50)}) == 50


@pytest.mark.parametrize("seed", range(40))
def test_boxes_hold_exactly_the_painted_pixels(seed: int) -> None:
    scene = sampling.sample(seed)
    painted = (scene.array() != np.array(BACKGROUNDS[scene.background], np.uint8)).any(-1)
    boxes = np.zeros_like(painted, dtype=int)
    for thing, mask in zip(scene.objects, scene.masks(), strict=True):
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= scene.size and 0 <= top < bottom <= scene.size
        boxes[top:bottom, left:right] += 1
        assert mask.any() and not mask[boxes == 0].any()
        # the picture reaches all four sides of its box (to one pixel of antialiasing)
        inside = painted[top:bottom, left:right]
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert rows[0] <= 1 and rows[-1] >= bottom - top - 2 and columns[0] <= 1 and columns[-1] >= right - left - 2
    assert boxes.max() == 1, "boxes overlap"
    assert not painted[boxes == 0].any(), "something is painted outside the boxes"


def test_number_background_and_categories_can_be_chosen() -> None:
    scene = sampling.sample(5, count=4, background="pink", categories=("dog", "vase"), repeat=0.0)
    assert len(scene.objects) == 4 and scene.background == "pink" and set(scene.categories) == {"dog", "vase"}
    assert sampling.compose(["cat", "bus"], "blue").categories == ("cat", "bus")


@pytest.mark.parametrize("wrong", [{"count": 5}, {"background": "mauve"}, {"categories": ("unicorn",)}])
def test_bad_arguments_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values()))).strip("(),'")):
        sampling.sample(0, **wrong)


def test_prior_brings_the_usual_partner() -> None:
    def share(prior: float) -> float:
        drawn = [sampling.sample(seed, count=2, prior=prior, repeat=0.0) for seed in range(300)]
        return np.mean([BY_NAME[s.objects[0].name].partner == s.objects[1].name for s in drawn])

    assert share(0.9) > 0.8 and share(0.0) < 0.12


def test_partners_are_mutual_core_categories() -> None:
    assert len(CORE) >= 24
    for name in CORE:
        partner = BY_NAME[BY_NAME[name].partner]
        assert partner.core and partner.partner == name and partner.name != name


def test_atlas_has_every_category() -> None:
    for category in CATEGORIES:
        pixels = sprites.sprite(category.name, 32)
        assert max(pixels.shape[:2]) == 32 and pixels.shape[2] == 4
        assert (pixels[..., 3] >= 128).mean() > 0.1, category.name
        assert np.array_equal(sprites.sprite(category.name, 32, True), pixels[:, ::-1])


def test_atlas_is_what_the_font_draws() -> None:
    if not Path(sprites.FONT).exists():
        pytest.skip("the font is not installed")
    font = ImageFont.truetype(sprites.FONT, sprites.BITMAP_SIZE)
    for category in CATEGORIES[::7]:
        drawn = np.asarray(sprites.draw_glyph(category.emoji, font), int)
        stored = np.asarray(sprites.sprite(category.name, sprites.CELL), int)
        assert drawn.shape == stored.shape, category.name
        assert np.abs(drawn - stored)[drawn[..., 3] > 16].max(initial=0) <= 12, category.name  # resized once more


@pytest.mark.parametrize("seed", range(60))
def test_texts_mention_exactly_the_objects_of_the_scene(seed: int) -> None:
    scene = sampling.sample(seed, categories=[category.name for category in CATEGORIES])
    assert named(text.caption(scene, np.random.default_rng(seed))) == set(scene.categories)
    assert named(text.describe(scene)) == set(scene.categories) and scene.background in text.describe(scene)
    for name in CORE:
        question, answer = text.exists(scene, name)
        assert named(question) == {name} and answer.startswith("Yes" if name in scene.counts else "No")


# ---- splits ----------------------------------------------------------------------------------------------------------
def test_pairs_belong_to_one_split_and_partners_to_training() -> None:
    pairs = list(combinations(EVERY, 2))
    splits = Counter(sampling.split_of(a, b) for a, b in pairs)
    shares = {split: count / len(pairs) for split, count in splits.items()}
    assert abs(shares["train"] - 0.80) < 0.02 and abs(shares["validation"] - 0.05) < 0.01
    assert abs(shares["test"] - 0.15) < 0.02
    assert all(sampling.split_of(a, b) == sampling.split_of(b, a) for a, b in pairs[:200])
    assert all(sampling.split_of(name, BY_NAME[name].partner) == "train" for name in CORE)


@pytest.mark.parametrize("pool", [CORE, EVERY], ids=["core", "all"])
@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_splits_share_no_combination(pool: tuple[str, ...], prior: float) -> None:
    def pairs(split: str) -> list[list[str]]:
        drawn = sampling.stream(split, 250, 1, categories=pool, prior=prior, style=sampling.VARIED)
        return [[sampling.split_of(a, b) for a, b in combinations(scene.categories, 2)] for scene in drawn]

    assert {split for scene in pairs("train") for split in scene} == {"train"}
    for split, allowed in (("validation", {"train", "validation"}), ("test", {"train", "validation", "test"})):
        for scene in pairs(split):
            assert set(scene) <= allowed and (not scene or split in scene)


def test_number_of_objects_can_be_chosen_in_a_stream() -> None:
    assert {len(scene.objects) for scene in sampling.stream("test", 20, count=3)} == {3}
    with pytest.raises(ValueError, match="split is 'dev'; choose train, validation, test"):
        next(sampling.stream("dev", 1))


# ---- varied scenes ---------------------------------------------------------------------------------------------------
HARD = sampling.Style(rotate=0.5, occlude=0.7, frame=0.5, gradient=0.5)


@pytest.mark.parametrize("seed", range(40))
def test_pictures_and_masks_of_varied_scenes_by_naive_painting(seed: int) -> None:
    scene = sampling.sample(seed, categories=EVERY, style=HARD, split="train")
    first, last = (
        np.array(BACKGROUNDS[name], float) for name in (scene.background, scene.gradient or scene.background)
    )
    canvas = np.array([[first + (last - first) * y / 63] * 64 for y in range(64)])
    owner = np.full((64, 64), -1)
    for index, thing in enumerate(scene.objects):
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
        assert thing.pixels.shape == (bottom - top, right - left, 4)
        visible = (
            thing.pixels[..., 3] > 0
        )  # the box is that of the painted pixels, but for a faint border of turned ones
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        assert rows[0] <= 1 and rows[-1] >= bottom - top - 2 and columns[0] <= 1 and columns[-1] >= right - left - 2
        for y in range(top, bottom):
            for x in range(left, right):
                *colour, alpha = (int(value) for value in thing.pixels[y - top, x - left])
                canvas[y, x] = (np.array(colour) * alpha + canvas[y, x] * (255 - alpha)) / 255
                if alpha >= 128:
                    owner[y, x] = index
    assert np.abs(canvas - scene.array()).max() <= 2  # each layer is rounded
    for index, mask in enumerate(scene.masks()):
        assert np.array_equal(mask, owner == index)


def test_hidden_objects_still_show_most_of_themselves() -> None:
    drawn = [sampling.sample(seed, count=2, style=sampling.Style(occlude=1.0)) for seed in range(80)]
    hidden = 0
    for scene in drawn:
        for thing, mask in zip(scene.objects, scene.masks(), strict=True):
            share = mask.sum() / (thing.pixels[..., 3] >= 128).sum()
            assert share >= sampling.VISIBLE
            hidden += share < 1
    assert hidden > 30


def test_styles_change_looks_and_not_objects() -> None:
    for seed in range(30):
        plain, framed = (sampling.sample(seed, style=style) for style in (sampling.PLAIN, sampling.Style(gradient=1.0)))
        assert plain.objects == framed.objects and plain.background == framed.background
        assert not plain.gradient and framed.gradient not in ("", framed.background)
    drawn = [sampling.sample(seed, style=sampling.Style(frame=1.0, rotate=1.0, flip=0.0)) for seed in range(30)]
    assert all(thing.frame in FRAMES and thing.angle and not thing.flip for scene in drawn for thing in scene.objects)


@pytest.mark.parametrize("seed", range(20))
def test_relations_by_naive_loops(seed: int) -> None:
    scene = sampling.sample(seed, style=HARD)
    found = set()
    for i, one in enumerate(scene.objects):
        for j, other in enumerate(scene.objects):
            if (one.box[0] + one.box[2]) / 2 + 8 <= (other.box[0] + other.box[2]) / 2:
                found.add((i, "left of", j))
            if (one.box[1] + one.box[3]) / 2 + 8 <= (other.box[1] + other.box[3]) / 2:
                found.add((i, "above", j))
    assert set(scene.relations) == found and len(scene.relations) == len(found)


# ---- what is said about them -----------------------------------------------------------------------------------------
def parts(caption: str) -> Counter[tuple[str, str]]:
    """Reads "two red-framed dogs, a cat and ..." back: how many of each (category, frame)."""
    words = {category.counted(n).split(" ", 1)[1]: category.name for category in CATEGORIES for n in (1, 2)}
    read: Counter[tuple[str, str]] = Counter()
    for phrase in re.split(r", | and | to the left of | above ", caption):
        first, rest = phrase.split(" ", 1)
        framed = re.match(rf"({'|'.join(FRAMES)})-framed (.*)", rest)
        frame, rest = framed.groups() if framed else ("", rest)
        read[words[rest], frame] += 1 if first in ("a", "an") else NUMBERS.index(first)
    return read


@pytest.mark.parametrize("seed", range(60))
def test_captions_of_varied_scenes_are_true_to_the_word(seed: int) -> None:
    scene = sampling.sample(seed, categories=EVERY, style=HARD)
    truth = Counter((thing.name, thing.frame) for thing in scene.objects)
    backdrop = f"{scene.background} to {scene.gradient}" if scene.gradient else scene.background
    for caption in {text.caption(scene), *(text.caption(scene, np.random.default_rng(i)) for i in range(25))}:
        said = caption.removeprefix("a picture of ")
        if (front := f"a {backdrop} background with ") and said.startswith(front):
            said = said.removeprefix(front)
        elif "background" in said:
            assert said.endswith(f" on a {backdrop} background"), caption
            said = said.removesuffix(f" on a {backdrop} background")
        assert parts(said) == truth, caption
        if relation := re.search(" to the left of | above ", said):
            kind = "left of" if "left" in relation.group() else "above"
            assert (0, kind, 1) in scene.relations
            first, second = (parts(phrase) for phrase in said.split(relation.group()))
            assert next(iter(first))[0] == scene.objects[0].name and next(iter(second))[0] == scene.objects[1].name


def test_relations_are_said_now_and_then() -> None:
    drawn = [sampling.sample(seed, count=2, repeat=0.0) for seed in range(200)]
    said = [text.caption(scene, np.random.default_rng(seed)) for seed, scene in enumerate(drawn)]
    assert any(" to the left of " in caption for caption in said) and any(" above " in caption for caption in said)


@pytest.mark.parametrize("seed", range(40))
def test_answers_about_frames_and_places_are_true(seed: int) -> None:
    scene = sampling.sample(seed, count=3, style=HARD, repeat=0.0)
    place = {thing.name: index for index, thing in enumerate(scene.objects)}
    assert len(place) == 3
    for thing in scene.objects:
        answer = text.frame(scene, thing.name)[1]
        assert answer.endswith(f" is {thing.frame}.") if thing.frame else answer.endswith(" has no frame.")
    for one, other in combinations(place, 2):
        for kind in ("left of", "above"):
            question, answer = text.relation(scene, one, kind, other)
            assert named(question) == named(answer) == {one, other} and kind in question
            assert answer.startswith("Yes") == ((place[one], kind, place[other]) in scene.relations)
            assert (" is not " in answer) == answer.startswith("No")
    assert text.background(scene)[1] == f"The background is {text.backdrop(scene)}."


def test_counts_by_hand() -> None:
    scene = scenes.Scene("red", (scenes.Object("dog", (0, 0, 9, 9)),) * 2 + (scenes.Object("bus", (9, 9, 20, 20)),))
    assert text.caption(scene) == "two dogs and a bus on a red background"
    assert text.how_many(scene, "dog") == ("How many dogs are in the image?", "There are two dogs.")
    assert text.how_many(scene, "bus")[1] == "There is one bus."
    assert text.how_many(scene, "cat")[1] == "There are no cats."
    assert text.how_many(scene)[1] == "There are three objects."
    assert text.exists(scene, "dog")[1] == "Yes, there are two dogs in the image."


def test_scores_by_hand() -> None:
    scene = sampling.compose(["dog", "bus"])
    assert named("A hot dog, two teddy bears.") == {"hot dog", "teddy bear"}
    scores = description_scores(["a dog, a cat", "a dog and a bus"], [scene, scene])
    assert scores == {"chair_i": 1 / 4, "recall": 3 / 4, "exact": 1 / 2}
    assert all(BY_NAME[name].partner not in s.categories for s in map(lonely, range(30)) for name in s.categories)


def test_missing_assets_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such.*holds.*sprites.png"):
        assets.path("world/no-such")
    monkeypatch.setenv(assets.VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"set {assets.VARIABLE}"):
        assets.path("world")
