"""`attnsteer search`: what it writes and prints, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attnsteer.cli import main
from attnsteer.processors import SoftPAG
from attnsteer.search import Selection
from tests.tiny import pipelines

SMALL = ["--num-pairs", 2, "--num-steps", 1, "--rounds", 2, "--per-round", 1, "--layers", "2,3", "--heads", "0,1"]


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def test_a_search_on_the_embedded_model_writes_everything_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", "world-sd3", *SMALL, "--batch", 6, "--sheet", 2, "--out", tmp_path / "new"]
    assert run(*command, "--curve", "--curve-pairs", 2, "--curve-strengths", "1,0.5", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [len(heads) for heads in report["rounds"]] == [1, 1]
    assert report["scores_found"] == 0
    assert [point["heads"] for point in report["curve"]] == [0, 1, 2, 0, 1, 2]
    assert set(report["files"]) == {"selection", "heat map", "sheet", "curve", "curve plot"}
    for name, file in report["files"].items():
        assert Path(file).is_file(), name
        if file.endswith(".png"):
            Image.open(file).verify()
    found = Selection.load(tmp_path / "new" / "heads.json")
    assert [[list(head) for head in heads] for heads in found.rounds] == report["rounds"]
    assert found.settings["call"] == {"guidance_scale": 1.0, "max_sequence_length": 1}
    saw = {tuple(pair) for pair in found.settings["pairs"]}
    held = json.loads((tmp_path / "new" / "curve.json").read_text())["pairs"]
    assert not {prompt for prompt, _ in saw} & {prompt for prompt, _ in held}
    assert not {seed for _, seed in saw} & {seed for _, seed in held}
    assert SoftPAG.from_search(tmp_path / "new" / "heads.json", top=1).strength == 0.5
    assert run(*command) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("round 1: L")
    assert str(tmp_path / "new" / "sheet.png") in printed.out
    assert "round 2 of 2: 14 of 14 pictures" in printed.err
    assert len((tmp_path / "new" / "scores-0.jsonl").read_text().splitlines()) == 2 + 14 + 2 * 5


def test_prompts_come_from_files_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipelines.build("sd3").save_pretrained(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text("a dog\t7\n\na cat\n", encoding="utf-8")
    size = ["--call", "height=48", "--call", "width=80", "--call", "max_sequence_length=16"]
    options = ["--prompts", tmp_path / "prompts.txt", "--prompt", "a car", "--num-seeds", 2, "--seed", 40]
    small = ["--num-steps", 1, "--rounds", 1, "--per-round", 1, "--layers", "1", "--heads", "0", "--sheet", 0]
    assert run("search", tmp_path / "sd3", *options, *small, *size, "--out", tmp_path / "out", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["files"]) == {"selection", "heat map"}
    pairs = Selection.load(tmp_path / "out" / "heads.json").settings["pairs"]
    assert pairs == [["a dog", 7], ["a cat", 42], ["a cat", 43], ["a car", 44], ["a car", 45]]


WRONG: dict[str, tuple[list[Any], str]] = {
    "no prompts": (["stabilityai/nothing"], "brings no prompts: give some with --prompts"),
    "an answering model": (["world-llava"], "answers questions: a search needs a model that makes pictures"),
    "no such file": (["world-sd3", "--prompts", "nowhere.txt"], "No such file"),
    "an empty file": (["world-sd3", "--prompts", "{}/empty.txt"], "holds no prompts"),
    "no seed": (["world-sd3", "--prompts", "{}/seed.txt"], "'x' behind the tab is no seed"),
    "hps without weights": (["world-sd3", "--objective", "hps"], "give --checkpoint hps=PATH"),
    "a threshold without number": (["world-sd3", "--at-least", "judge=x"], "--at-least takes NAME=NUMBER"),
    "a threshold without name": (["world-sd3", "--at-least", "0.5"], "is not NAME=VALUE"),
    "an unused checkpoint": (["world-sd3", "--checkpoint", "clip=x"], "is for an objective that is not used"),
    "an unknown part": (
        ["world-sd3", "--objective", "clip", "--checkpoint", "clip.head=x"],
        "clip takes checkpoint",
    ),
    "an objective twice": (["world-sd3", "--objective", "judge", "--objective", "judge"], "names one objective twice"),
    "a missing checkpoint": (
        ["world-sd3", *SMALL, "--objective", "clip", "--checkpoint", "clip={}/nowhere", "--out", "{}/out"],
        "cannot be loaded to score pictures",
    ),
    "strengths without curve": (["world-sd3", "--curve-strengths", "1"], "belongs to --curve"),
    "strengths that are none": (["world-sd3", "--curve", "--curve-strengths", "a,b"], "are no numbers"),
    "a prompt the search saw": (
        ["world-sd3", "--prompts", "{}/dog.txt", "--curve", "--curve-prompts", "{}/dog.txt"],
        "The search saw the prompt 'a dog'",
    ),
    "too many heads": (["world-sd3", *SMALL, "--per-round", "9", "--out", "{}/out"], "but there are only 4"),
    "no such layer": (["world-sd3", "--layers", "77", "--out", "{}/out"], "Layer 77 does not exist"),
    "no such argument": (["world-sd3", "--call", "hight=3", "--out", "{}/out"], "is no argument of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_searched_is_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("empty", "\n"), ("seed", "a dog\tx\n"), ("dog", "a dog\n")):
        (tmp_path / f"{name}.txt").write_text(content)
    arguments, message = WRONG[case]
    assert run("search", *(str(a).format(tmp_path) for a in arguments)) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1
