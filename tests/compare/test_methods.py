"""What is compared: the grammar of --method, hashes of methods, and controls."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from attnsteer import Where
from attnsteer.cli.compare import parsed
from attnsteer.compare import Method, control, with_controls
from attnsteer.compare.methods import plain
from attnsteer.controls import Elsewhere
from attnsteer.errors import SteeringError
from attnsteer.processor import Processor
from attnsteer.processors import PAG, SEG, VHR, AttendAndExcite


@dataclass(frozen=True)
class Weighted(Processor):
    weights: torch.Tensor | None = None


METHODS = {
    "baseline": Method("baseline"),
    "vhr": Method("vhr", (VHR(),)),
    "vhr:alpha=2,outliers=false": Method("vhr:alpha=2,outliers=false", (VHR(alpha=2.0, outliers=False),)),
    "mine=vhr:alpha=1.5": Method("mine", (VHR(alpha=1.5),)),
    "mine=VHR": Method("mine", (VHR(),)),
    "vhr:layers=2,3,alpha=1e+0": Method("vhr:layers=2,3,alpha=1e+0", (VHR(Where(layers=[2, 3]), alpha=1.0),)),
    "both = vhr:alpha=3+pag:scale=2+seg": Method("both ", (VHR(alpha=3.0), PAG(scale=2.0), SEG())),
    "vhr:layers=2:4,heads=0,2,steps=decode": Method(
        "vhr:layers=2:4,heads=0,2,steps=decode", (VHR(Where(layers=slice(2, 4), heads=[0, 2], steps="decode")),)
    ),
    'vhr:where={"layers": [1, 2]},alpha=3': Method(
        'vhr:where={"layers": [1, 2]},alpha=3', (VHR(Where(layers=[1, 2]), alpha=3.0),)
    ),
}


@pytest.mark.parametrize("text", METHODS)
def test_a_method_is_written_in_one_line(text: str) -> None:
    found = parsed(text)
    assert found.label.strip() == METHODS[text].label.strip()
    assert found.digest == METHODS[text].digest
    assert found.processors == METHODS[text].processors


WRONG = {
    "": "is empty",
    "=vhr": "is empty",
    "mine=": "is empty",
    "nothing": "There is no method 'nothing'",
    "vhr:beta=2": "beta",
    "vhr:alpha": "is not of the form NAME=VALUE",
    "vhr:alpha=99": "out of range",
    'vhr:layers=2,where={"layers": [1]}': "say the same thing",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_method_is_one_sentence(text: str) -> None:
    with pytest.raises(SteeringError, match=WRONG[text]):
        parsed(text)


def test_hashes_follow_what_a_method_does() -> None:
    one = Method("a", (VHR(),))
    assert one.digest == Method("b", (VHR(alpha=2.0),)).digest
    others = [
        Method("a", (VHR(alpha=2.5),)),
        Method("a", (VHR(Where(layers=[1])),)),
        Method("a", (VHR(), VHR())),
        Method("a"),
        control(one, "random-heads"),
        control(one, "random-heads", seed=1),
        control(one, "all-heads"),
        Method("a", (Weighted(weights=torch.ones(2)),)),
        Method("a", (Weighted(weights=torch.zeros(2)),)),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_controls_stand_behind_their_method() -> None:
    found = with_controls([Method("v", (VHR(),)), Method("baseline")], ["random-heads", "rest-heads"], seed=3)
    assert [m.label for m in found] == ["baseline", "v", "v, random-heads", "v, rest-heads"]
    assert [m.control_of for m in found] == ["", "", "v", "v"]
    assert found[2].processors == (Elsewhere(method=VHR(), heads="random", seed=3),)
    assert plain(found[2].processors[0])["parameters"]["method"]["processor"] == "VHR"


def test_methods_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(SteeringError, match="Two methods are called 'v'"):
        with_controls([Method("v", (VHR(),)), Method("v", (VHR(alpha=3.0),))], [])
    with pytest.raises(SteeringError, match="'w' and 'v' are the same method"):
        with_controls([Method("v", (VHR(),)), Method("w", (VHR(alpha=2.0),))], [])
    with pytest.raises(SteeringError, match="None of the methods edits heads"):
        with_controls([Method("a", (AttendAndExcite(subjects=("dog",)),))], ["all-heads"])
    with pytest.raises(SteeringError, match="There is no control 'x'"):
        with_controls([Method("v", (VHR(),))], ["x"])
