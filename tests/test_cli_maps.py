"""``attnsteer maps``: pictures and arrays of heat maps, and what it says when something does not go together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from attnsteer.cli import main
from attnsteer.world import sampling
from tests.tiny import pipelines

SMALL = ["--num-steps", "2", "--call", "height=48", "--call", "width=80", "--call", "max_sequence_length=16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("maps")
    pipelines.build("sd3").save_pretrained(place / "sd3")
    sampling.compose(["cat"], "white").image().save(place / "scene.png")
    return place


def run(*arguments: Any) -> int:
    return main(["maps", *(str(argument) for argument in arguments)])


def report(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_words_of_a_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "a dog and a red car", *SMALL]
    out = folder / "new" / "maps.png"
    found = report(capsys, folder / "sd3", *prompt, "--words", "dog", "red car", "--per", "layer", "--out", out)
    assert found["files"] == [str(out), str(out.with_suffix(".safetensors"))]
    assert found["words"] == ["dog", "red car"] and found["shape"] == [2, 4, 3, 5]
    assert all(0 < x < 1 and 0 < y < 1 for x, y in found["peaks"])
    maps = load_file(out.with_suffix(".safetensors"))["maps"]
    assert Image.open(out).width > 4 * 100
    arrays = folder / "only.safetensors"
    part = ["--words", "dog,red car", "--layers", "1,3", "--heads", "0", "--steps", "0:1", "--per", "head"]
    found = report(capsys, folder / "sd3", *prompt, *part, "--out", arrays)
    assert found["files"] == [str(arrays)] and found["numbers"] == {"layer": [1, 3], "head": [0]}
    assert not torch.equal(load_file(arrays)["maps"][:, :, 0], maps[:, [1, 3]])  # one step and head of all
    method = ["--method", "softpag", "--param", "scale=9", "--words", "dog", "--out", arrays]
    report(capsys, folder / "sd3", *prompt, *method)
    assert not torch.equal(load_file(arrays)["maps"][0], maps[0].mean(0))  # another picture


def test_tokens_and_words_of_an_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["world-llava", "--image", folder / "scene.png", "--question", "Is there a cat in the image?"]
    found = report(capsys, *asked, "--max-new-tokens", "4", "--out", folder / "answer.png")
    assert found["answer"].startswith("Yes") and found["shape"] == [4, 8, 8]
    assert found["sinks"] == []
    assert run("world-llava", "--words", "dog", "car", "--sinks", "drop", "--out", folder / "words.png") == 0
    said, *files = capsys.readouterr().out.splitlines()
    assert "a dog" in said and "a car" in said
    assert files == [str(folder / "words.png"), str(folder / "words.safetensors")]
    assert run("world-llava", "--words", "zebra", "--out", folder / "words.png") == 2
    assert "does not have the word 'zebra'; its tokens are 0 ' The'" in capsys.readouterr().err


WRONG: dict[str, tuple[list[str], str]] = {
    "no such word": (["{}/sd3", *SMALL, "--prompt", "a dog", "--words", "bird"], "its tokens are 0 .*2 'dog</w>'"),
    "an empty word": (["{}/sd3", *SMALL, "--prompt", "a dog", "--words", "dog,"], "has an empty word"),
    "a picture for a painter": (["{}/sd3", "--image", "{}/scene.png"], "--image is for vision-language models"),
    "steps for a reader": (["world-llava", "--num-steps", "3"], "--num-steps is for diffusion models"),
    "per step of an answer": (["world-llava", "--per", "step"], "allowed are 'average', 'layer', 'head'"),
    "no such layer": (["world-llava", "--layers", "40"], "Layer 40 does not exist"),
    "no file": (["{}/sd3", "--out", "{}/maps.txt"], "let it end in .png"),
    "no such argument": (["{}/sd3", "--call", "hight=3"], "takes no 'hight'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    arguments, sentence = WRONG[case]
    assert run(*(text.replace("{}", str(folder)) for text in arguments)) == 2

    assert re.search(sentence, capsys.readouterr().err)
