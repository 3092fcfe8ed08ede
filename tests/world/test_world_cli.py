"""`attnsteer world`: data sets and measurements from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from attnsteer.cli import main
from attnsteer.world import assets, sampling
from attnsteer.world.catalog import CATEGORIES, CORE
from attnsteer.world.evaluate import pictures
from attnsteer.world.judge import Judge, Network, Settings
from tests.tiny import pipelines


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An assets folder with a judge that sees nothing, and no other model."""
    place = tmp_path / "assets"
    (place / "models").mkdir(parents=True)
    (place / "world").symlink_to(assets.path("world"))
    settings = Settings(width=8)
    network = Network(settings)
    torch.nn.init.constant_(network.head.bias[:1], 99.0)  # "none" in every cell
    Judge(network, settings).save(place / "models" / "world-judge")
    monkeypatch.setenv(assets.VARIABLE, str(place))
    return place


@pytest.mark.parametrize("action", ["export", "evaluate"])
def test_both_actions_explain_themselves_with_an_example(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("world", action, "--help") == 0
    text = capsys.readouterr().out
    for expected in (f"attnsteer world {action}", "examples:", "--seed", "--device", "--dtype", "--json"):
        assert expected in text


def test_export_writes_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--split", "validation", "--count", 6, "--style", "varied", "--categories", "all", "--seed", 3]
    assert run("world", "export", tmp_path / "a", *options) == 0
    assert re.match(r"6 images, \d+ annotations, \d+ captions, \d+ questions\n", capsys.readouterr().out)
    assert run("world", "export", tmp_path / "b", *options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 6 and len(report["files"]) == 3
    every = [category.name for category in CATEGORIES]
    drawn = sampling.stream("validation", 6, 3, categories=every, style=sampling.VARIED)
    for folder in (tmp_path / "a", tmp_path / "b"):  # the same twice
        images = sorted((folder / "images").iterdir())
        assert [Image.open(file).tobytes() for file in images] == [s.image().tobytes() for s in sampling.stream(
            "validation", 6, 3, categories=every, style=sampling.VARIED)]  # fmt: skip
    content = json.loads((tmp_path / "a/annotations/instances_validation.json").read_text())
    assert len(content["annotations"]) == sum(len(scene.objects) for scene in drawn)
    for name in ("instances_validation.json", "captions_validation.json", "questions_validation.jsonl"):
        assert (tmp_path / "a/annotations" / name).read_bytes() == (tmp_path / "b/annotations" / name).read_bytes()


def test_prior_and_core_categories_reach_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def names(prior: float) -> list[str]:
        assert run("world", "export", tmp_path, "--count", 8, "--prior", prior) == 0
        content = json.loads((tmp_path / "annotations/instances_test.json").read_text())
        kinds = {category["id"]: category["name"] for category in content["categories"]}
        return [kinds[annotation["category_id"]] for annotation in content["annotations"]]

    assert set(names(0.0)) <= set(CORE)
    assert capsys.readouterr().err == ""  # no bar where there is no terminal


def test_judge_is_measured(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = pictures.wishes
    monkeypatch.setattr("attnsteer.world.evaluate.readings.wishes", lambda kind: wishes(kind, 1)[:2])
    assert run("world", "evaluate", "world-judge", "--count", 5, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["world-judge"]
    assert scores["scenes"] == 5 + len(CATEGORIES)
    assert {"worst_category", "mean_core_category", "counts", "frames", "backgrounds", "true_two"} <= set(scores)


@pytest.mark.parametrize(("name", "family"), [("sd", "sd15"), ("sd3", "sd3"), ("flux", "flux")])
def test_picture_models_of_all_classes_are_measured(
    name: str, family: str, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock tiny pipelines with random weights: what they paint is wrong, but all is asked and counted."""
    folder = home / "models" / f"world-{name}"
    pipelines.build(family).save_pretrained(folder)
    monkeypatch.setattr(pictures, "wishes", lambda kind, n: [pictures._wish(kind, i, CORE[i]) for i in range(2)])
    options = ["--num-steps", 1, "--per-category", 1, "--guidance-scale", 2, "--sheet", home / "new" / "sheet.png"]
    assert run("world", "evaluate", name, *options, "--json", "--write") == 0
    printed = capsys.readouterr().out
    scores = json.loads(printed[printed.index("{") :])[f"world-{name}"]
    assert scores["pictures"] == 2 * len(pictures.RIGHT) and scores["steps"] == 1 and scores["guidance"] == 2
    assert all(0 <= scores[key] <= 1 for key in (*pictures.RIGHT, "two_exact", "background"))
    assert Image.open(home / "new" / "sheet.png").width > 1000
    assert f"| world-{name} | 2 |" in (home / "models" / "README.md").read_text()


def test_all_measures_what_is_there(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnsteer.world.evaluate.readings.wishes", lambda kind: [])
    monkeypatch.setattr("attnsteer.world.evaluate.readings.shares", lambda asked, seen: {})
    assert run("world", "evaluate", "all", "--count", 3) == 0
    captured = capsys.readouterr()
    assert "world-judge" in captured.out and "mean category" in captured.out
    assert [f"world-{name} is not there" in captured.err for name in ("sd", "sd3", "flux", "llava", "judge")] == [
        True, True, True, True, False,
    ]  # fmt: skip


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no action": (["world"], 2, "required: .*export"),
    "no such split": (["world", "export", "{}/x", "--split", "dev"], 2, "invalid choice: 'dev'"),
    "no pictures": (["world", "export", "{}/x", "--count", "0"], 2, "allowed is 1 or more"),
    "prior is no share": (["world", "export", "{}/x", "--prior", "1.5"], 2, "allowed is 0 to 1"),
    "a file in the way": (["world", "export", "{}/file"], 1, "file"),
    "no such model": (["world", "evaluate", "gan"], 2, "allowed are sd, sd3, flux, llava, judge and all"),
    "not there": (["world", "evaluate", "sd", "--folder", "{}/nope"], 2, "no folder .*nope"),
    "one folder for all": (["world", "evaluate", "all", "--folder", "{}"], 2, "name its kind instead of all"),
    "row for another": (["world", "evaluate", "sd", "--folder", "{}", "--write"], 2, "leave out --folder"),
    "sheet of another kind": (["world", "evaluate", "sd3", "--sheet", "x.txt"], 2, "let it end in .png"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(
    case: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (home / "models" / "world-sd3").mkdir()
    arguments, code, sentence = WRONG[case]
    assert run(*(argument.format(tmp_path) for argument in arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert re.search(sentence, captured.err.strip().splitlines()[-1])
