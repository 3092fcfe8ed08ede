"""The command line: what it prints, what it writes, and how it ends when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attnsteer.cli import main, parser
from attnsteer.cli.options import parameter, selection
from attnsteer.errors import SteeringError
from attnsteer.processors import SoftPAG, available
from attnsteer.world import sampling
from tests.tiny import pipelines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline, a picture, and files that are neither."""
    place = tmp_path_factory.mktemp("cli")
    pipelines.build("sd3").save_pretrained(place / "sd3")
    pipelines.build("wan").save_pretrained(place / "wan")
    sampling.sample(5).image().save(place / "scene.png")
    (place / "notes.txt").write_text("not a picture")
    (place / "broken.png").write_bytes((place / "scene.png").read_bytes()[:200])
    (place / "empty").mkdir()
    return place


SMALL = ["--num-steps", "2", "--call", "height=48", "--call", "width=80", "--call", "max_sequence_length=16"]


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def test_every_command_explains_itself_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    commands = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert {"demo", "list", "sites", "generate"} <= set(commands)
    for name in commands:
        assert run(name, "--help") == 0
        text = capsys.readouterr().out
        for expected in (f"attnsteer {name}", "examples:", "--seed", "--device", "--dtype", "--json"):
            assert expected in text
    assert run("--version") == 0


def test_list_shows_all_processors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert tuple(found) == available()
    assert found["SEG"]["parameters"]["sigma"] == "inf"
    assert run("list") == 0
    assert "SoftPAG: " in capsys.readouterr().out


def test_sites_are_a_table_and_need_no_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = folder / "bare"
    for part in ("transformer", "scheduler"):
        (bare / part).mkdir(parents=True)
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        (bare / name).write_text((folder / "sd3" / name).read_text())
    assert run("sites", bare) == 0
    assert "transformer_blocks.3.attn" in capsys.readouterr().out
    assert run("sites", bare, "--processor", "SoftPAG", "--layers", "1:3", "--heads", "0,2", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [site["layer"] for site in report["sites"]] == [0, 1, 2, 3]
    assert list(report["explanation"]["parts"][0]["heads"].values()) == [[0, 2], [0, 2]]
    assert report["explanation"]["refused"] == []
    assert run("sites", bare, "--processor", "SoftPAG", "--layers", "9") == 2
    assert "Layer 9 does not exist" in capsys.readouterr().out


def test_sites_explains_a_saved_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SoftPAG(strength=0.25).save_pretrained(str(folder / "steering"))
    assert run("sites", folder / "sd3", "--explain", folder / "steering") == 0
    assert "strength=0.25" in capsys.readouterr().out


def test_generate_paints_and_repeats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["generate", folder / "sd3", "--prompt", "a dog", *SMALL]
    steered = [*plain, "--processor", "SoftPAG", "--layers", "1,2", "--steps", "0.0:0.8", "--param", "scale=9"]
    assert run(*plain, "--out", folder / "plain.png") == 0
    assert run(*steered, "--out", folder / "new" / "one.png") == 0
    assert run(*steered, "--out", folder / "two.png", "--json") == 0
    printed = capsys.readouterr().out
    report = json.loads(printed[printed.index("{") :])
    assert report["processors"][0]["parameters"]["where"] == {"layers": [1, 2], "steps": [0.0, 0.8]}
    first, second, other = (Image.open(folder / name) for name in ("new/one.png", "two.png", "plain.png"))
    assert first.size == (80, 48)
    assert first.tobytes() == second.tobytes() != other.tobytes()


def test_generate_writes_a_video_as_gif(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "a dog", *SMALL, "--call", "num_frames=3", "--out", folder / "video.png"]
    assert run("generate", folder / "wan", *arguments) == 0
    assert capsys.readouterr().out.strip() == str(folder / "video.gif")
    assert getattr(Image.open(folder / "video.gif"), "n_frames", 1) == 3


def test_generate_answers_about_a_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--prompt", "Describe the image.", "--image", folder / "scene.png", "--max-new-tokens", "8", "--json"]
    assert run("generate", "world-llava", *question, "--processor", "VHR", "--param", "alpha=1.5") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["answer"]
    assert report["processors"][0]["parameters"]["alpha"] == 1.5


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no such model": (["generate", "nope", "--prompt", "x"], 2, "is no folder, no hub id"),
    "no model in the folder": (["sites", "{}/empty"], 2, "holds neither a model_index.json nor a config.json"),
    "a broken model": (["generate", "{}/half", "--prompt", "x", "--image", "{}/scene.png"], 1, "cannot be loaded"),
    "hub out of reach": (["sites", "nobody/nothing"], 2, "the hub cannot be reached"),
    "question without picture": (["generate", "world-llava", "--prompt", "x"], 2, "give one with --image"),
    "picture for a painter": (["generate", "{}/sd3", "--prompt", "x", "--image", "{}/scene.png"], 2, "makes pictures"),
    "no such picture": (["generate", "world-llava", "--prompt", "x", "--image", "{}/no.png"], 1, "No such file"),
    "no picture": (["generate", "world-llava", "--prompt", "x", "--image", "{}/notes.txt"], 2, "no picture that can"),
    "half a picture": (["generate", "world-llava", "--prompt", "x", "--image", "{}/broken.png"], 2, "no picture that"),
    "no such processor": (["sites", "{}/sd3", "--processor", "Nope"], 2, "there are: .*SoftPAG"),
    "no such parameter": (["sites", "{}/sd3", "--processor", "PAG", "--param", "u=1"], 2, "no parameter 'u'"),
    "no parameter at all": (["sites", "{}/sd3", "--processor", "PAG", "--param", "scale"], 2, "NAME=VALUE"),
    "no such layer": (["generate", "{}/sd3", "--prompt", "x", "--processor", "PAG", "--layers", "9"], 2, "Layer 9"),
    "no window": (["sites", "{}/sd3", "--processor", "PAG", "--steps", "0.9:0.1"], 2, "is no window"),
    "layers of nothing": (["sites", "{}/sd3", "--layers", "1"], 2, "belongs to a method"),
    "two sources": (["sites", "{}/sd3", "--processor", "PAG", "--config", "x"], 2, "leave out --method"),
    "no such config": (["sites", "{}/sd3", "--config", "{}/empty"], 2, "holds no attnsteer_config.json"),
    "no such argument": (["generate", "{}/sd3", "--prompt", "x", "--call", "hight=3"], 2, "takes no 'hight'"),
    "odd height": (["generate", "{}/sd3", "--prompt", "x", "--call", "height=50"], 1, "ValueError: .*divisible by"),
    "negative height": (["generate", "{}/sd3", "--prompt", "x", "--call", "height=-16"], 1, "RuntimeError: .*line "),
    "no function": (
        ["generate", "{}/sd3", *SMALL, "--prompt", "x", "--call", "callback_on_step_end=x"],
        1,
        "TypeError",
    ),
    "no latents": (["generate", "{}/sd3", *SMALL, "--prompt", "x", "--call", "latents=3"], 1, "AttributeError"),
    "prompt twice": (["generate", "{}/sd3", "--prompt", "x", "--call", "prompt=foo"], 2, "of its own: --prompt"),
    "steps twice": (["generate", "{}/sd3", "--prompt", "x", "--call", "num_inference_steps=a"], 2, "own: --num-steps"),
    "call of nothing": (["generate", "{}/sd3", "--prompt", "x", "--call", "height"], 2, "--call 'height' is not of"),
    "endless seed": (["generate", "{}/sd3", "--prompt", "x", "--seed", "-" + "9" * 20], 2, "allowed is 0 to 2"),
    "negative seed": (["demo", "--seed", "-1"], 2, "allowed is 0 to 2"),
    "no guidance": (["generate", "{}/sd3", "--prompt", "x", "--guidance-scale", "nan"], 2, "a finite number"),
    "size of an answer": (
        ["generate", "world-llava", "--image", "{}/scene.png", "--prompt", "x", "--call", "height=64"],
        2,
        "--call is for diffusion models",
    ),
    "no picture file": (["generate", "{}/sd3", "--prompt", "x", "--out", "{}/x.txt"], 2, "let it end in"),
    "no such device": (["generate", "{}/sd3", "--prompt", "x", "--device", "warp"], 2, "cannot be used"),
    "no steps": (["generate", "{}/sd3", "--prompt", "x", "--num-steps", "0"], 2, "1 or more"),
    "no command": ([], 2, "required: COMMAND"),
    "wrong kind for the method": (["generate", "{}/sd3", "--prompt", "x", "--processor", "VHR"], 2, "no causal"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "half").mkdir(exist_ok=True)
    (folder / "half" / "config.json").write_text("{")
    arguments, code, sentence = WRONG[case]
    assert run(*(a.format(folder) for a in arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("attnsteer")
    assert re.search(sentence, last)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=.5", 0.5),
        ("a=-3", -3),
        ("a=1e-3", 0.001),
        ("a=true", True),
        ("a=None", None),
        ("a=inf", "inf"),
        ("a=x=y", "x=y"),
        ("a=[1, 2]", [1, 2]),
        ("a=", ""),
    ],
)
def test_parameters_are_read_as_what_they_look_like(text: str, value: Any) -> None:
    assert parameter(text) == ("a", value)
    assert type(parameter(text)[1]) is type(value)


def test_selections_in_their_short_form() -> None:
    assert selection(None, None, None) == {}
    assert selection("2,-1", "all", "all") == {"layers": [2, -1], "heads": "all", "steps": "all"}
    assert selection("0:8", "0,5", "0.0:0.8") == {"layers": {"slice": [0, 8]}, "heads": [0, 5], "steps": [0.0, 0.8]}
    assert selection("mid*attn1", "2:0,5;-1:all", "0:10") == {
        "layers": "mid*attn1",
        "heads": {"2": [0, 5], "-1": "all"},
        "steps": {"slice": [0, 10]},
    }
    assert selection(None, None, "sigma:0.5:14") == {"steps": {"sigma": [0.5, 14.0]}}
    assert selection(None, None, "decode") == {"steps": "decode"}
    for heads, steps in [("2:0;x", None), (None, "sigma:a:b"), (None, "0.1:x")]:
        with pytest.raises(SteeringError):
            selection(None, heads, steps)


def test_demo_writes_both_sheets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--num-seeds", "1", "--num-steps", "2", "--num-scenes", "2"]
    assert run("demo", *counts, "--out", tmp_path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    for part in ("pictures", "answers"):
        assert Image.open(report[part]["file"]).width > 100
        assert report[part]["overhead"] > -1
    assert len(report["answers"]["scenes"]) == 2
    assert Image.open(report["file"]).width > 600
