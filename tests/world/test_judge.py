"""The judge reads scenes right, is trained repeatably, and its measures are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from attnsteer.world import assets, judge, sampling, scenes
from attnsteer.world.catalog import BACKGROUNDS, CATEGORIES, CORE
from attnsteer.world.evaluate import pictures, readings, report
from attnsteer.world.judge import CELL, GRID, UNIT, Judge, Network, Settings, background
from attnsteer.world.scenes import Object, Scene
from attnsteer.world.train import judge as training

EVERY = [category.name for category in CATEGORIES]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shipped() -> Judge:
    try:
        return Judge.load()
    except FileNotFoundError as error:
        pytest.skip(f"judge not trained here: {error}")


# ---- the shipped judge -----------------------------------------------------------------------------------------------
def test_unseen_scenes_of_all_categories_are_read_right(shipped: Judge) -> None:
    drawn = list(sampling.stream("test", 150, seed=5, categories=EVERY, style=sampling.VARIED))
    seen = shipped([scene.image() for scene in drawn])
    scores = readings.compare(drawn, seen)
    assert scores["categories"] >= 0.95 and scores["counts"] >= 0.93
    assert scores["frames"] >= 0.97 and scores["backgrounds"] >= 0.97


def test_every_category_alone_is_read_right(shipped: Judge) -> None:
    drawn = [sampling.compose([name], "blue", seed) for name in EVERY for seed in range(3)]
    seen = shipped([scene.image() for scene in drawn])
    right = [a.counts == b.counts for a, b in zip(drawn, seen, strict=True)]
    assert np.mean(right) >= 0.98
    assert all(any(right[3 * i : 3 * i + 3]) for i in range(len(EVERY)))


def test_boxes_and_places_are_read_right(shipped: Judge) -> None:
    drawn = list(sampling.stream("test", 40, count=2, repeat=0.0))
    seen = shipped([scene.image() for scene in drawn])
    pairs = [(a, b) for a, b in zip(drawn, seen, strict=True) if sorted(a.counts) == sorted(b.counts)]
    assert len(pairs) >= 38
    for a, b in pairs:
        for thing in a.objects:
            box = next(other.box for other in b.objects if other.name == thing.name)
            assert np.abs(np.subtract(thing.box, box)).max() <= 6
    same = [pictures._places(a) == pictures._places(b) for a, b in pairs]
    assert np.mean(same) >= 0.8  # centres that are just 8 pixels apart may fall on either side


def test_nothing_is_seen_where_nothing_is(shipped: Judge) -> None:
    plain = [Scene(colour, ()) for colour in BACKGROUNDS] + [Scene("blue", (), gradient="white")]
    seen = shipped([scene.image() for scene in plain])
    assert [(s.background, s.gradient, s.objects) for s in seen] == [(s.background, s.gradient, ()) for s in plain]


def test_batches_and_sizes_do_not_matter(shipped: Judge) -> None:
    images = [sampling.sample(seed).image() for seed in range(5)]
    together = shipped(images)
    assert together == [shipped([image])[0] for image in images] == shipped(images, batch=2)
    assert shipped([images[0].resize((128, 128), Image.Resampling.NEAREST)])[0].categories == together[0].categories
    assert shipped([]) == []


def test_true_pictures_of_prompts_are_found_right(shipped: Judge) -> None:
    asked = [wish for kind in pictures.RIGHT for wish in pictures.wishes(kind, 1)]
    scores = pictures.shares(asked, shipped([wish.scene.image() for wish in asked]))
    assert set(scores) == {*pictures.RIGHT, "two_exact", "background"}
    assert min(scores.values()) >= 0.9


def test_shipped_folder_is_small_and_complete() -> None:
    folder = assets.root() / "models/world-judge"
    if not folder.is_dir():
        pytest.skip("judge not trained here")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    stored = json.loads((folder / "config.json").read_text())
    assert stored["categories"] == EVERY
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16}


# ---- its parts -------------------------------------------------------------------------------------------------------
def perfect(scene: Scene) -> tuple[np.ndarray, ...]:
    """The cells that an infallible network would give for a scene."""
    category, frame, sides = training.labels([scene], Settings())
    x, y = (np.arange(GRID) * CELL + CELL / 2)[None, :], (np.arange(GRID) * CELL + CELL / 2)[:, None]
    left, top, right, bottom = UNIT * sides[0].numpy()
    boxes = np.stack([x - left, y - top, x + right, y + bottom], -1)
    kinds = np.eye(len(EVERY) + 1)[category[0].clamp(min=0).numpy()]
    return scene.array(), kinds, np.eye(6)[frame[0].clamp(min=0).numpy()], boxes


@pytest.mark.parametrize("seed", range(12))
def test_right_cells_become_the_right_scene(seed: int) -> None:
    style = sampling.Style(frame=0.5, gradient=0.5)
    scene = sampling.sample(seed, categories=EVERY, style=style, repeat=0.4)
    seen = Judge(Network(Settings()), Settings(cells=1)).scene(*perfect(scene))
    key = [(thing.name, thing.frame, thing.box) for thing in scene.objects]
    assert sorted((thing.name, thing.frame, thing.box) for thing in seen.objects) == sorted(key)
    assert (seen.background, seen.gradient) == (scene.background, scene.gradient)


def test_cells_are_labelled_by_naive_loops() -> None:
    scene = next(s for s in map(sampling.sample, range(99)) if len(s.objects) == 3)
    category, frame, sides = training.labels([scene], Settings())
    masks = scene.masks()
    for i in range(GRID):
        for j in range(GRID):
            counts = [int(mask[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum()) for mask in masks]
            most = max(range(3), key=counts.__getitem__)
            thing = scene.objects[most]
            if max(counts) < 4:
                assert category[0, i, j] == (0 if max(counts) == 0 else training.IGNORE)
                assert frame[0, i, j] == training.IGNORE
                continue
            assert category[0, i, j] == 1 + EVERY.index(thing.name)
            left, top, right, bottom = thing.box
            x, y = 4 * j + 2, 4 * i + 2
            assert sides[0, :, i, j].tolist() == [(x - left) / 16, (y - top) / 16, (right - x) / 16, (bottom - y) / 16]


@pytest.mark.parametrize(("first", "last"), [("red", "red"), ("blue", "white"), ("white", "blue"), ("gray", "black")])
def test_background_is_read_from_pixels(first: str, last: str) -> None:
    scene = Scene(first, (), gradient=last if last != first else "")
    free = np.ones((GRID, GRID), bool)
    free[:, 3:] = False
    assert background(scene.array(), free, 24) == (first, last)
    assert background(np.roll(scene.array(), 1, axis=2), free, 1) == ("", "") or first in ("gray",)
    assert background(scene.array(), ~np.ones((GRID, GRID), bool), 24) == ("", "")


def test_weights_survive_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = Judge(Network(Settings(width=8)), replace(Settings(width=8), cells=3, score=0.25))
    made.save(tmp_path)
    again = Judge.load(tmp_path)
    assert again.settings == made.settings
    images = [sampling.sample(0).image()]
    for a, b in zip(made.cells(images), again.cells(images), strict=True):
        assert np.allclose(a, b, atol=0.05)


def test_softened_pictures_stay_pictures_and_repeat() -> None:
    plain = judge.tensor([sampling.sample(seed).image() for seed in range(6)])
    soft = [training.soften(plain, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*soft) and soft[0].shape == plain.shape and soft[0].abs().max() <= 1
    assert 0.001 < (soft[0] - plain).abs().mean() < 0.2


def test_spoiled_objects_are_labelled_as_none_and_the_rest_stays() -> None:
    drawn = [sampling.sample(seed, categories=EVERY) for seed in range(80)]
    before, (kinds, _, _) = judge.tensor([s.image() for s in drawn]), training.labels(drawn, Settings())
    after, spoiled = before.clone(), kinds.clone()
    training.spoil(after, spoiled, drawn, torch.Generator().manual_seed(0))
    changed = [n for n in range(80) if not torch.equal(before[n], after[n])]
    assert 4 <= len(changed) <= 24
    for n, scene in enumerate(drawn):
        where = (before[n] != after[n]).any(0)
        hit = [
            thing for thing in scene.objects if where[thing.box[1] : thing.box[3], thing.box[0] : thing.box[2]].any()
        ]
        assert len(hit) == (n in changed)
        if not hit:
            assert torch.equal(kinds[n], spoiled[n])
            continue
        left, top, right, bottom = hit[0].box
        where[top:bottom, left:right] = False
        assert not where.any()
        inside = torch.zeros(GRID, GRID, dtype=torch.bool)
        inside[top // CELL : -(-bottom // CELL), left // CELL : -(-right // CELL)] = True
        assert (spoiled[n][inside] <= 0).all() and torch.equal(spoiled[n][~inside], kinds[n][~inside])


def test_spoiled_objects_are_not_seen(shipped: Judge) -> None:
    """Most of them; the judge may still know a thing by its colours."""
    drawn = list(sampling.stream("test", 200, seed=8, count=1, categories=EVERY))
    images = judge.tensor([s.image() for s in drawn])
    kinds, spoiled = training.labels(drawn, Settings())[0], images.clone()
    training.spoil(spoiled, kinds, drawn, torch.Generator().manual_seed(1))
    hit = [n for n in range(200) if not torch.equal(images[n], spoiled[n])]
    raw = ((spoiled[hit] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.mean([len(scene.objects) for scene in shipped([Image.fromarray(picture) for picture in raw])]) <= 0.2


def test_what_makes_an_object_is_chosen_on_validation_scenes(shipped: Judge) -> None:
    chosen = training.choose(Judge(shipped.network, shipped.settings), 12)
    changed = replace(chosen, cells=0, score=0, radius=0)
    assert changed == replace(shipped.settings, cells=0, score=0, radius=0)
    assert chosen.cells in (3, 4, 5, 6) and 0.5 <= chosen.score <= 0.7 and 0.4 <= chosen.radius <= 0.7


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "choose", lambda judge, count: judge.settings)

    def run(folder: str, steps: int, *more: str) -> dict[str, torch.Tensor]:
        places = ["--out", str(tmp_path / folder / "model"), "--run", str(tmp_path / folder / "run")]
        small = ["--width", "8", "--batch", "3", "--validation", "2", "--float32", "--threads", "1"]
        # the schedule must not depend on where the run stopped: no decay, no warm-up
        training.main([*places, *small, "--steps", str(steps), "--decay", "0", "--warmup", "1", *more])
        return load_file(tmp_path / folder / "model" / "model.safetensors")

    whole = run("whole", 3)
    run("parts", 2)
    parts = run("parts", 3, "--resume")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert Judge.load(tmp_path / "whole" / "model").settings.width == 8


# ---- measures --------------------------------------------------------------------------------------------------------
def scene(*names: str, colour: str = "red", frames: tuple[str, ...] = ()) -> Scene:
    framed = frames or ("",) * len(names)
    boxes = [(20 * i, 0, 20 * i + 19, 19) for i in range(len(names))]
    things = [Object(n, box, frame=f) for n, box, f in zip(names, boxes, framed, strict=True)]
    return Scene(colour, tuple(things))


def test_balanced_accuracy_by_hand() -> None:
    alone = [scene(name) for name in EVERY]
    assert set(readings.balanced(alone, alone).values()) == {1.0}
    blind = [Scene("red", ())] * len(EVERY)
    assert set(readings.balanced(alone, blind).values()) == {0.5}
    dogs = [scene("dog")] * len(EVERY)  # finds the dog, and one wherever there is none
    assert readings.balanced(alone, dogs)["dog"] == 0.5 and readings.balanced(alone, dogs)["cat"] == 0.5
    half = readings.balanced([*alone, scene("dog")], [*alone, scene("cat")])
    assert half["dog"] == pytest.approx((1 / 2 + 1) / 2) and half["cat"] == pytest.approx((1 + 66 / 67) / 2)


def test_scores_of_pictures_by_hand() -> None:
    right = pictures.RIGHT
    assert right["one"](scene("dog"), scene("dog", "dog")) and not right["one"](scene("dog"), scene("dog", "cat"))
    assert right["two"](scene("dog", "cat"), scene("cat", "bus", "dog"))
    assert not right["two"](scene("dog", "cat"), scene("cat"))
    assert not right["count"](scene("dog", "dog"), scene("dog")) and right["count"](scene("dog"), scene("dog"))
    asked = scene("dog", "cat", frames=("red", ""))
    assert right["frame"](asked, asked)
    assert not right["frame"](asked, scene("dog", "cat", frames=("", "red")))
    assert not right["frame"](asked, scene("dog", "cat", frames=("red", "red")))
    assert right["place"](scene("dog", "cat"), scene("dog", "cat"))
    assert not right["place"](scene("dog", "cat"), scene("cat", "dog"))
    wishes = [pictures.Wish("two", "", scene("dog", "cat")), pictures.Wish("one", "", scene("bus"))]
    scores = pictures.shares(wishes, [scene("dog", "cat", "cat"), scene("bus", colour="blue")])
    assert scores == {"one": 1.0, "two": 1.0, "two_exact": 0.0, "background": 0.5}


@pytest.mark.parametrize("kind", pictures.RIGHT)
def test_prompts_are_unseen_combinations_and_true_of_their_scenes(kind: str) -> None:
    wishes = pictures.wishes(kind, 2)
    assert wishes == pictures.wishes(kind, 2) and len(wishes) == 2 * len(CORE)
    for wish in wishes:
        assert wish.kind == kind and wish.scene.background in wish.prompt
        assert pictures.RIGHT[kind](wish.scene, wish.scene)
        if len(wish.scene.categories) > 1:
            assert sampling.split_of_scene(wish.scene) == "test"
        if kind == "frame":
            assert sorted(bool(thing.frame) for thing in wish.scene.objects) == [False, True]
            assert "-framed" in wish.prompt
        if kind == "place":
            ((first, relation, second),) = wish.scene.relations
            assert (first, second) == (0, 1) and relation.split()[0] in wish.prompt


def test_scores_are_kept_and_shown(tmp_path: Path) -> None:
    judged = {**dict.fromkeys(report.WORDS, 0.5), "scenes": 7, **{f"true_{key}": 1.0 for key in report.PICTURES}}
    shown = {"guidance": 2.0, "pictures": 1008, "seconds_per_picture": 0.31}
    report.write("world-sd3", {"one": 0.875, **shown}, tmp_path)
    report.write("world-judge", judged, tmp_path)
    report.write("world-sd3", {"one": 0.75, **shown}, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| world-sd3 | 2 | 1008 | 75.0 |" in page and "87.5" not in page
    assert "| true scenes |  |  | 100.0 |" in page and "world-flux" not in page, "no scores, no row"
    kept = json.loads((tmp_path / "scores.json").read_text())
    assert kept["world-sd3"]["scores"]["one"] == 0.75 and kept["world-judge"]["command"].endswith("judge --write")


def test_size_of_the_world_is_that_of_the_grid() -> None:
    assert scenes.SIZE == GRID * CELL
