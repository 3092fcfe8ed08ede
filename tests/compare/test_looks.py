"""Heat maps of the examples: of the right word, kept beside the answers, and left out with a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import attnsteer
from attnsteer.compare import Comparison, Looks, Recorded, looks, results, world
from attnsteer.compare.looks import FILE, shown_place
from attnsteer.compare.report import write
from attnsteer.errors import SteeringError
from tests.test_looking import world as loaded

from .common import METHODS, finished
from .test_around import small_world

SCENES = 2


def tasks() -> list[Any]:
    asked = world.exists(0, SCENES)
    return [world.describe(SCENES), replace(asked, samples=asked.samples[:2])]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return finished(tmp_path_factory.mktemp("looks"), METHODS[:2], by=small_world(), tasks=tasks())


def written(comparison: Any, folder: Path, seen: Looks | None) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    write(comparison, results(comparison, "small world", draws=50), folder, seen)
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith("answers-")}


@pytest.mark.parametrize(
    ("text", "counts", "word"),
    [
        ("A dog, a bus and a cat.", {"made_up": ["bus", "cat"], "places": [[2, 5, "dog"], [9, 12, "bus"]]}, "bus"),
        ("A dog and a puppy.", {"made_up": [], "places": [[2, 5, "dog"], [12, 17, "dog"]]}, "dog"),
        ("Nothing to see.", {"made_up": [], "places": []}, "Nothing"),
        ("Yes, there is.", {"label": True, "said": True}, "Yes"),
        ("...", {"label": True, "said": None}, ""),
    ],
)
def test_the_word_is_the_first_made_up_else_the_first_named(text: str, counts: Any, word: str) -> None:
    place = shown_place({"output": text, "counts": counts})
    assert (text[slice(*place)] if place else "") == word


def test_a_map_is_the_row_that_says_the_word(found: Comparison, tmp_path: Path) -> None:
    model, processor = loaded()
    seen = Looks(tmp_path, small_world())
    for task in found.tasks:
        for sample in task.samples:
            key = found.key(task, sample, METHODS[0])
            entry = found.answers.answers[key]
            look = seen.of(key, sample, entry)
            assert look is not None
            said = attnsteer.answer_maps(model, processor, sample.picture.open(), sample.prompt, sinks="drop")
            assert said.answer == entry["output"]
            spelled = "".join(said.tokens)
            start = spelled.index(look.word)
            starts = np.cumsum([0, *map(len, said.tokens)])
            inside = [
                i for i in range(len(said.tokens)) if starts[i] < start + len(look.word) and starts[i + 1] > start
            ]
            wanted = np.mean([said.maps[i].numpy() for i in inside], axis=0)
            np.testing.assert_allclose(np.array(look.heat) / 255, wanted / wanted.max(), atol=0.003)
            assert look.share == pytest.approx(wanted.sum(), abs=1e-3)
            assert look.area == (0, 0, 64, 64)
            assert look.over(sample.picture.open(), 32).size == (32, 32)


def test_the_occurrence_is_the_one_that_is_meant(found: Comparison) -> None:
    """In "No, there is no chair" both are the word no, and only the first one answers."""
    model, processor = loaded()
    sample = found.tasks[1].samples[1]
    entry = found.answers.answers[found.key(found.tasks[1], sample, METHODS[0])]
    assert entry["output"].startswith("No, there is no ")
    said = attnsteer.answer_maps(model, processor, sample.picture.open(), sample.prompt)
    for start, row in ((0, 0), (13, 4)):
        made = looks._made(small_world(), sample, entry, (start, start + 2))
        assert made.share == pytest.approx(float(said.maps[row].sum()), abs=1e-3)


def test_another_answer_when_asked_alone_has_no_map(found: Comparison) -> None:
    sample = found.tasks[1].samples[1]
    entry = found.answers.answers[found.key(found.tasks[1], sample, METHODS[0])]
    with pytest.raises(SteeringError, match="another answer"):
        looks._made(small_world(), sample, {**entry, "output": "No, there is none."}, (0, 2))


def test_a_wide_picture_shows_the_part_that_is_seen() -> None:
    look = looks.Look("dog", ((0, 255), (0, 0)), (32, 0, 96, 64), 0.5)
    shown = np.asarray(look.over(Image.new("RGB", (128, 64), "white"), 64)).astype(int)
    assert shown.shape == (64, 64, 3)
    assert np.ptp(shown[8, 56]) > np.ptp(shown[56, 8]), "coloured where it is hot"


def test_a_report_that_is_written_again_is_the_same_and_needs_no_model(found: Comparison, tmp_path: Path) -> None:
    first = written(found, tmp_path / "a", Looks(tmp_path / "a", small_world()))
    assert written(found, tmp_path / "b", Looks(tmp_path / "b", small_world())) == first, "the same in another folder"
    recorded = Recorded(found.tasks, found.methods, found.answers, found.runs)
    assert written(recorded, tmp_path / "a", Looks(tmp_path / "a")) == first
    page = first["report.html"].decode()
    assert page.count("<figcaption>") == sum(len(task.samples) for task in found.tasks)
    assert "Heat: where baseline looks" in page
    kept = json.loads(first[FILE])
    assert {line["sample"] for line in kept} == {sample.id for task in found.tasks for sample in task.samples}


def test_without_maps_the_page_says_nothing_about_them(found: Comparison, tmp_path: Path) -> None:
    files = written(found, tmp_path, None)
    assert FILE not in files
    assert b"eat map" not in files["report.html"] and b"<figcaption>" not in files["report.html"]


def test_maps_that_cannot_be_made_are_left_out_with_a_note(
    found: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise SteeringError("This family has no <grid>.")

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(looks, "answer_maps", refused)
    first = written(found, tmp_path / "a", Looks(tmp_path / "a", small_world()))
    page = first["report.html"].decode()
    assert "Heat maps left out: 2; This family has no &lt;grid&gt;." in page
    assert "<figcaption>" not in page
    monkeypatch.undo()
    assert written(found, tmp_path / "a", Looks(tmp_path / "a")) == first
    monkeypatch.setattr(looks, "answer_maps", broken)
    page = written(found, tmp_path / "d", Looks(tmp_path / "d", small_world()))["report.html"].decode()
    assert "Heat maps left out: 2; MemoryError: no room" in page
    monkeypatch.undo()
    assert b"<figcaption>" in written(found, tmp_path / "d", Looks(tmp_path / "d", small_world()))["report.html"]
    without = written(found, tmp_path / "b", Looks(tmp_path / "b"))
    assert b"this report was written without the model" in without["report.html"]
    assert FILE not in without
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / FILE).write_text('[{"run": 1')
    assert FILE in written(found, tmp_path / "c", Looks(tmp_path / "c", small_world())), "a broken file is made anew"
