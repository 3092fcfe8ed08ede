"""Which samples a limited comparison takes, and what makes a sample another one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from attnsteer.compare import FilePicture, Sample, limited, world

PICTURE = FilePicture(Path("nowhere.png"))
SAMPLES = [
    Sample(f"{image}-{question}", f"{image}", PICTURE, "?", ("yes",), (), "many" if image < 30 else "few")
    for image in range(40)
    for question in range(2)
]


@pytest.mark.parametrize("limit", [1, 7, 8, 20, 39])
def test_strata_keep_their_share_and_pictures_all_their_questions(limit: int) -> None:
    taken = limited(SAMPLES, limit, 0)
    images = Counter(sample.image for sample in taken)
    assert len(images) == limit
    assert set(images.values()) == {2}
    few = sum(int(image) >= 30 for image in images)
    assert abs(few - limit / 4) < 1
    assert [sample for sample in SAMPLES if sample in taken] == taken, "the order stays"


def test_the_seed_decides_and_nothing_else() -> None:
    assert limited(SAMPLES, 8, 3) == limited(SAMPLES, 8, 3) != limited(SAMPLES, 8, 4)
    assert limited(SAMPLES[::-1], 8, 3) == limited(SAMPLES, 8, 3)[::-1]
    assert limited(SAMPLES, None, 0) == limited(SAMPLES, 40, 0) == limited(SAMPLES, 99, 0) == SAMPLES


def test_both_tasks_of_the_world_take_the_same_pictures() -> None:
    described = {sample.image for sample in limited(world.describe(12).samples, 5, 0)}
    asked = limited(world.exists(0, 12).samples, 5, 0)
    assert {sample.image for sample in asked} == described
    assert len(asked) == 4 * 5


def test_questions_of_the_world_are_true_and_in_balance() -> None:
    scenes = world.scenes(12)
    for sample in world.exists(0, 12).samples:
        name = sample.prompt.removeprefix("Is there ").removesuffix(" in the image?")
        there = {category for category in scenes[sample.image].categories if name.endswith(category)}
        assert (sample.truth == ("yes",)) == bool(there)
        assert sample.groups == (("random", "popular", "adversarial") if there else (sample.id.split("-")[-1],))


def test_another_picture_question_or_truth_is_another_sample(tmp_path: Path) -> None:
    def sample(colour: str) -> Sample:
        Image.new("RGB", (4, 4), colour).save(tmp_path / "a.png")
        return Sample("1", "1", FilePicture(tmp_path / "a.png"), "?", ("dog",))

    one = sample("red")
    first = one.digest
    assert sample("red").digest == first
    assert sample("blue").digest != first
    assert replace(sample("red"), prompt="??").digest != first
    assert replace(sample("red"), truth=("dog", "cat")).digest != first
