"""The shipped models load with stock classes, offline, and are as good as recorded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnsteer.world import assets
from attnsteer.world.evaluate.pictures import RIGHT, load, paint, wishes
from attnsteer.world.judge import Judge

PAINTERS = ("world-sd", "world-sd3", "world-flux")
RECORDED = {"world-sd": (16, 14), "world-sd3": (16, 11), "world-flux": (16, 9)}
"""Right pictures of 16 prompts of one object and of 16 of two, ten steps, default guidance."""
TOLERANCE = 2
"""Pictures that rounding on another machine may turn."""


def folder(name: str) -> Path:
    try:
        return assets.path(f"models/{name}")
    except FileNotFoundError as error:
        pytest.skip(f"model not trained here: {error}")


@cache
def pipeline(name: str) -> Any:
    return load(folder(name))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", PAINTERS)
def test_loads_as_float32_and_paints_by_the_defaults_of_its_class(name: str) -> None:
    pipe = pipeline(name)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {part.dtype for part in parts} == {torch.float32}
    size = {} if name == "world-sd3" else {"height": 64, "width": 64}
    image = pipe("a dog on a blue background", num_inference_steps=2, output_type="np", **size).images
    assert image.shape == (1, 64, 64, 3)
    assert np.isfinite(image).all()


@pytest.mark.parametrize("name", PAINTERS)
def test_is_as_good_as_recorded(name: str) -> None:
    asked = [wish for kind in ("one", "two") for wish in wishes(kind, 1)[:16]]
    pictures = paint(pipeline(name), [wish.prompt for wish in asked], steps=10, seed=77)
    right = [RIGHT[w.kind](w.scene, seen) for w, seen in zip(asked, Judge.load()(pictures), strict=True)]
    found = (sum(right[:16]), sum(right[16:]))
    assert np.abs(np.subtract(found, RECORDED[name])).max() <= TOLERANCE, found


def test_models_are_small() -> None:
    files = [file for file in folder("").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 45_000_000
