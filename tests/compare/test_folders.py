"""Real pictures: a folder with annotations in COCO's format, and POPE's question files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnsteer.compare import folders
from attnsteer.errors import SteeringError
from attnsteer.world import coco, sampling


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("coco")
    scenes = list(sampling.stream("test", 10, 3, repeat=0.0, count=3))
    coco.export(folder, scenes, "test")
    return folder, scenes


def questions(file: Path, lines: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps({"question_id": n, **line}) + "\n" for n, line in enumerate(lines, start=1)))
    return file


def test_truth_is_what_is_annotated_and_what_people_say(exported: tuple[Path, list[Any]]) -> None:
    folder, scenes = exported
    notes = folder / "annotations"
    task = folders.describe(folder / "images", notes / "instances_test.json", notes / "captions_test.json")
    assert [sample.id for sample in task.samples] == [str(number) for number in range(1, 11)]
    for sample, scene in zip(task.samples, scenes, strict=True):
        assert set(sample.truth) == set(scene.categories)
        assert sample.picture.open().size == (64, 64)
        assert sample.stratum == "3 categories"
    assert task.max_new_tokens == 512


def test_captions_alone_add_what_they_name(exported: tuple[Path, list[Any]], tmp_path: Path) -> None:
    folder, _ = exported
    said = {"images": [], "annotations": [{"image_id": 2, "caption": "Two puppies and a pizza."}]}
    (tmp_path / "captions.json").write_text(json.dumps(said))
    task = folders.describe(folder / "images", None, tmp_path / "captions.json")
    assert [(sample.id, sample.truth) for sample in task.samples] == [("2", ("dog", "pizza"))]


def test_question_files_are_one_split_each_and_shared_questions_are_asked_once(
    exported: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    folder, _ = exported
    picture = "test_000000000001.png"
    yes = {"image": picture, "text": "Is there a dog in the image?", "label": "yes"}
    no = [{"image": picture, "text": f"Is there a {name} in the image?", "label": "no"} for name in ("cat", "car")]
    files = [
        questions(tmp_path / "coco_pope_random.json", [yes, no[0]]),
        questions(tmp_path / "coco_pope_adversarial.json", [yes, no[1]]),
    ]
    task = folders.exists(folder / "images", files, None)
    assert [(s.id, s.image, s.truth, s.groups) for s in task.samples] == [
        ("1-1", "1", ("yes",), ("random", "adversarial")),
        ("1-2", "1", ("no",), ("random",)),
        ("1-3", "1", ("no",), ("adversarial",)),
    ]


def test_questions_are_made_where_there_are_none(exported: tuple[Path, list[Any]]) -> None:
    folder, scenes = exported
    task = folders.exists(folder / "images", [], folder / "annotations" / "instances_test.json")
    groups = {split: [s for s in task.samples if split in s.groups] for split in ("random", "popular", "adversarial")}
    for asked in groups.values():
        assert len(asked) == 6 * len(scenes)
        assert sum(sample.truth == ("yes",) for sample in asked) == 3 * len(scenes)
    for sample in task.samples:
        there = scenes[int(sample.image) - 1].categories
        name = sample.prompt.removeprefix("Is there ").removesuffix(" in the image?").split(" ", 1)[1]
        assert (name in there) == (sample.truth == ("yes",))


def test_what_does_not_fit_is_one_sentence(exported: tuple[Path, list[Any]], tmp_path: Path) -> None:
    folder, _ = exported
    images, instances = folder / "images", folder / "annotations" / "instances_test.json"
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.json").write_text('{"a"')
    line = {"image": "test_000000000099.png", "text": "?", "label": "yes"}
    wrong: list[tuple[Any, str]] = [
        (lambda: folders.describe(tmp_path / "none", instances, None), "There is no folder"),
        (lambda: folders.describe(tmp_path / "empty", instances, None), "None of the 0 pictures"),
        (lambda: folders.describe(images, None, None), "no ground truth"),
        (lambda: folders.describe(images, tmp_path / "torn.json", None), "is no JSON"),
        (lambda: folders.exists(images, [questions(tmp_path / "q.json", [line])], None), "e.g. 99"),
        (lambda: folders.exists(images, [questions(tmp_path / "r.json", [])], None), "holds no questions"),
        (
            lambda: folders.exists(images, [questions(tmp_path / "s.json", [{**line, "label": "maybe"}])], None),
            "line 1: the label is 'maybe'",
        ),
        (
            lambda: folders.exists(images, [questions(tmp_path / "t.json", [{"image": "a"}])], None),
            "line 1: wanted is an object",
        ),
        (lambda: folders.exists(images, [questions(tmp_path / "u.json", [line])] * 2, None), "are of one split"),
    ]
    for call, message in wrong:
        with pytest.raises(SteeringError, match=message):
            call()
