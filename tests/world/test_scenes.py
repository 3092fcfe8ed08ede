"""The world says the truth about its scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attnsteer.world import assets, sampling, scenes, sprites, text
from attnsteer.world.catalog import BACKGROUNDS, BY_NAME, CATEGORIES, CORE
from attnsteer.world.evaluate.answers import description_scores, lonely, named


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


@pytest.mark.parametrize("seed", range(60))
def test_texts_mention_exactly_the_objects_of_the_scene(seed: int) -> None:
    scene = sampling.sample(seed, categories=[category.name for category in CATEGORIES])
    assert named(text.caption(scene, np.random.default_rng(seed))) == set(scene.categories)
    assert named(text.describe(scene)) == set(scene.categories) and scene.background in text.describe(scene)
    for name in CORE:
        question, answer = text.exists(scene, name)
        assert named(question) == {name} and answer.startswith("Yes" if name in scene.counts else "No")


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
