"""Every method for vision-language models from the command line, on the embedded model."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from attnsteer import Where
from attnsteer.cli import main, models
from attnsteer.config import save_processors
from attnsteer.processors import PAI, ImageContrast, available, get
from attnsteer.world import sampling

METHODS: dict[str, list[str]] = {
    "VAR": ["--param", "tau=4.5"],
    "VAF": ["--param", "alpha=0.3"],
    "PAI": ["--param", "alpha=0.4", "--layers", "2:6"],
    "PAINT": ["--param", "alpha=0.4"],
    "GIFT": ["--param", "alpha=2.5", "--steps", "decode"],
    "VCD": ["--param", "noise_step=700"],
    "ICD": ["--param", "place=question"],
    "M3ID": ["--param", "decay=0.1"],
    "ImageContrast": ["--param", "gamma=1.5"],
    "VHR": ["--param", "alpha=1.5", "--layers", "3,4"],
    "CARVE": ["--param", "regions=1"],
    "ViCrop": ["--param", "map=grad-att"],
}
READERS = {"VHD", "GazeShift", "Capture"}
"""For vision-language models too, but they change nothing."""


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("vlm") / "scene.png"
    sampling.sample(5).image().save(file)
    return file


@pytest.fixture(autouse=True, scope="module")
def _loaded_once() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", functools.cache(models.load))
        yield


def run(picture: Path, *arguments: Any) -> int:
    asked = ["--image", picture, "--prompt", "Please describe this image in detail.", "--max-new-tokens", "10"]
    return main(["generate", "world-llava", *map(str, [*asked, *arguments])])


def report(capsys: pytest.CaptureFixture[str], picture: Path, *arguments: Any) -> dict[str, Any]:
    assert run(picture, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_list_below_is_complete() -> None:
    """Whatever acts on causal attention, contrasts, or asks by itself."""
    makes = {name: get(name) for name in available()}
    there = {n for n, make in makes.items() if "causal" in make.kinds and not {"joint", "cross"} & {*make.kinds}}
    there |= {name for name, make in makes.items() if make.call}
    assert there - READERS == set(METHODS)


@pytest.mark.filterwarnings("ignore:VAR:UserWarning", "ignore:No channel:UserWarning")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_answers(name: str, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, picture, "--method", name.lower(), *METHODS[name])
    assert found["answer"].startswith("The image shows")
    assert [each["processor"] for each in found["processors"]] == [name]
    parameter, value = METHODS[name][1].split("=")
    assert str(found["processors"][0]["parameters"][parameter]) == value
    assert run(picture, "--method", name, "--param", "strengh=1") == 2
    said = capsys.readouterr().err
    assert f"{name} has no parameter 'strengh'; it has: where, " in said
    assert parameter in said


def test_published_pai_is_two_processors(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = "pai:alpha=0.6,layers=2:8,steps=decode+image-contrast:gamma=2.5,cutoff=.2"
    found = report(capsys, picture, "--method", both)
    attention, contrast = found["processors"]
    assert attention["parameters"] == {"where": {"layers": {"slice": [2, 8, None]}, "steps": "decode"}, "alpha": 0.6}
    assert {name: contrast["parameters"][name] for name in ("gamma", "cutoff")} == {"gamma": 2.5, "cutoff": 0.2}
    saved = picture.parent / "published"
    save_processors(
        [PAI(Where(layers=slice(2, 8), steps="decode"), alpha=0.6), ImageContrast(gamma=2.5, cutoff=0.2)], saved
    )
    assert report(capsys, picture, "--config", saved)["answer"] == found["answer"]


WRONG: dict[str, tuple[list[str], str]] = {
    "a parameter of its own": (
        ["--method", "pai+vcd", "--param", "alpha=1"],
        "--param goes with one method alone",
    ),
    "layers of their own": (["--method", "pai:alpha=1", "--layers", "2"], "NAME:param=value,layers=2:4+NAME"),
    "no such method": (["--method", "pai+image-contrasts"], "did you mean ImageContrast"),
    "no such parameter": (["--method", "pai:gamma=2+vcd"], "PAI has no parameter 'gamma'; it has: where, alpha."),
    "two contrasts": (["--method", "vcd+m3id"], "both choose the logits of a row"),
    "asks by itself": (["--method", "carve+pai"], "CARVE cannot be attached"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_combined_is_said(case: str, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = WRONG[case]
    assert run(picture, *arguments) == 2
    assert message in capsys.readouterr().err
