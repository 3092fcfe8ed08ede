"""The exported data set, read back by a decoder of its own, says what the scenes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnsteer.world import coco, sampling
from attnsteer.world.catalog import BY_NAME, CATEGORIES
from attnsteer.world.evaluate.answers import named
from attnsteer.world.scenes import Scene

SCENES = list(
    sampling.stream("test", 12, categories=[c.name for c in CATEGORIES], style=sampling.Style(occlude=1.0, frame=0.5))
)


def decode(segmentation: dict[str, Any]) -> np.ndarray:
    """Run lengths down the columns, zeros first, one pixel at a time."""
    height, width = segmentation["size"]
    mask, place = np.zeros((height, width), bool), 0
    for number, length in enumerate(segmentation["counts"]):
        for _ in range(length):
            mask[place % height, place // height] = number % 2 == 1
            place += 1
    assert place == height * width
    return mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("coco")
    counts = coco.export(place, iter(SCENES), "test")
    assert counts["images"] == len(SCENES)
    assert counts["annotations"] == sum(len(scene.objects) for scene in SCENES)
    assert all(Path(file).is_file() for file in counts["files"])
    return place


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "annotations" / f"{name}_test.json").read_text())


def test_run_lengths_by_hand() -> None:
    assert coco.run_lengths(np.array([[0, 1, 1], [0, 1, 0]], bool)) == [2, 3, 1]  # columns 00, 11, 10
    assert coco.run_lengths(np.array([[1, 1], [0, 1]], bool)) == [0, 1, 1, 2]  # starts with no zeros
    assert coco.run_lengths(np.zeros((2, 2), bool)) == [4]


def test_pictures_masks_boxes_and_categories_are_those_of_the_scenes(folder: Path) -> None:
    content = read(folder, "instances")
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert len({annotation["id"] for annotation in content["annotations"]}) == len(content["annotations"])
    for image, scene in zip(content["images"], SCENES, strict=True):
        picture = np.asarray(Image.open(folder / "images" / image["file_name"]))
        assert np.array_equal(picture, scene.array()) and picture.shape[:2] == (image["height"], image["width"])
        mine = [annotation for annotation in content["annotations"] if annotation["image_id"] == image["id"]]
        for annotation, thing, mask in zip(mine, scene.objects, scene.masks(), strict=True):
            decoded = decode(annotation["segmentation"])
            assert np.array_equal(decoded, mask) and annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
            assert names[annotation["category_id"]] == thing.name
            left, top, width, height = (int(side) for side in annotation["bbox"])
            inside = decoded[top : top + height, left : left + width]
            assert inside.sum() == decoded.sum()
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            assert thing.box[0] <= left and thing.box[1] <= top
            assert left + width <= thing.box[2] and top + height <= thing.box[3]


def test_pycocotools_reads_it(folder: Path) -> None:
    tools = pytest.importorskip("pycocotools.coco")
    data = tools.COCO(str(folder / "annotations" / "instances_test.json"))
    for image, scene in zip(data.getImgIds(), SCENES, strict=True):
        found = data.loadAnns(data.getAnnIds(image))
        assert [data.cats[a["category_id"]]["name"] for a in found] == [thing.name for thing in scene.objects]
        for annotation, mask in zip(found, scene.masks(), strict=True):
            assert np.array_equal(data.annToMask(annotation).astype(bool), mask)


def test_captions_and_questions_are_true(folder: Path) -> None:
    content = read(folder, "captions")
    lines = (folder / "annotations" / "questions_test.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in lines]
    for image, scene in zip(content["images"], SCENES, strict=True):
        said = [a["caption"] for a in content["annotations"] if a["image_id"] == image["id"]]
        assert 3 <= len(said) <= coco.CAPTIONS and len(set(said)) == len(said)
        assert all(named(caption) == set(scene.categories) for caption in said)
        about = [q for q in asked if q["image"] == image["file_name"] and "label" in q]
        assert sum(q["label"] == "yes" for q in about) * 2 == len(about) == 2 * len(scene.categories)
        for q in about:
            assert (named(q["text"]) <= set(scene.categories)) == (q["label"] == "yes")
            assert q["answer"].lower().startswith(q["label"])


def test_numbers_and_kinds_are_those_of_coco() -> None:
    known = {"person": 1, "bicycle": 2, "traffic light": 10, "stop sign": 13, "bird": 16, "dog": 18, "giraffe": 25}
    known |= {"backpack": 27, "umbrella": 28, "handbag": 31, "frisbee": 34, "skateboard": 41, "bottle": 44, "cup": 47}
    known |= {"banana": 52, "cake": 61, "chair": 62, "bed": 65, "toilet": 70, "tv": 72, "mouse": 74, "cell phone": 77}
    known |= {"book": 84, "clock": 85, "teddy bear": 88, "toothbrush": 90}
    assert {name: BY_NAME[name].coco for name in known} == known
    numbers = [category.coco for category in CATEGORIES]
    assert numbers == sorted(set(numbers)) and not {12, 26, 29, 30, 45, 66, 68, 69, 71, 83} & set(numbers)
    kinds = {"dog": "animal", "bus": "vehicle", "stop sign": "outdoor", "tie": "accessory", "kite": "sports"}
    kinds |= {
        "wine glass": "kitchen",
        "pizza": "food",
        "couch": "furniture",
        "keyboard": "electronic",
        "vase": "indoor",
    }
    assert {name: BY_NAME[name].kind for name in kinds} == kinds


def test_an_object_that_shows_nothing_has_no_annotation() -> None:
    scene = Scene("white", sampling.compose(["dog"]).objects * 2)  # the second hides the first
    assert len(coco.instances(scene)) == 1
