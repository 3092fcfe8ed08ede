"""Every diffusion method on every embedded picture model: it runs and changes the picture, or refuses with a reason."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.processors import (
    PAG,
    SEG,
    AStar,
    AttendAndExcite,
    Conform,
    ConsistentSelfAttention,
    DivideAndBind,
    Focus,
    IRDiffusion,
    SharedSelfAttention,
    SoftPAG,
    SynGen,
)
from attnsteer.stories import box_masks
from attnsteer.world import assets
from attnsteer.world.evaluate.pictures import load

MODELS = ("world-sd", "world-sd3", "world-flux")
PROMPTS = ["a dog on a white background", "a car on a white background", "a dog and a red-framed car"]
WORDS = {"subjects": ("dog", "car"), "level": 0}
PHRASES = {"subjects": (("dog",), ("red-framed", "car")), "level": 0}
BOXES = box_masks([(0.1, 0.1, 0.9, 0.9)] * 2, (64, 64))
HALVES = box_masks([(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)], (64, 64))
ALL = Where(steps=slice(0, None))

METHODS = {
    "SoftPAG": lambda unet: SoftPAG(Where(layers=[2, 3])),
    "PAG": lambda unet: PAG(Where(layers=[2])),
    "SEG": lambda unet: SEG(Where(layers=[2])),
    "AStar": lambda unet: AStar(**WORDS),
    "AttendAndExcite": lambda unet: AttendAndExcite(**WORDS, max_refinement_steps=1),
    "DivideAndBind": lambda unet: DivideAndBind(**WORDS),
    "Conform": lambda unet: Conform(**PHRASES),
    "SynGen": lambda unet: SynGen(**PHRASES),
    "Focus": lambda unet: Focus(subjects=("dog", "car")),
    "ConsistentSelfAttention": lambda unet: ConsistentSelfAttention(ALL, frames=3),
    "SharedSelfAttention": lambda unet: SharedSelfAttention(ALL, frames=3, masks=BOXES),
    "IRDiffusion": lambda unet: IRDiffusion(references=BOXES, scene=HALVES, start_layer=2, mutual=0.5 if unet else 0.0),
}
REFUSED = {("Focus", "world-sd"): "joint"}
"""Where a method is not defined, and a word of the reason."""


@cache
def pipeline(model: str) -> Any:
    try:
        return load(assets.path(f"models/{model}"))
    except FileNotFoundError as error:
        pytest.skip(f"model not trained here: {error}")


def paint(pipe: Any) -> np.ndarray:
    """The three prompts, as one batch, in two steps."""
    call = assets.call(type(pipe).__name__, 2.0) | {"negative_prompt": [""] * 3, "num_inference_steps": 2}
    noise = [torch.Generator().manual_seed(number) for number in range(3)]
    return pipe(PROMPTS, generator=noise, output_type="np", **call).images


@cache
def unsteered(model: str) -> np.ndarray:
    return paint(pipeline(model))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_it_runs_and_acts_or_refuses(name: str, model: str) -> None:
    pipe = pipeline(model)
    method = METHODS[name](model == "world-sd")
    if (name, model) in REFUSED:
        with pytest.raises(SteeringError, match=REFUSED[name, model]):
            attnsteer.attach(pipe, method)
        return
    before = unsteered(model)
    words = method.nursing() is not None  # of the last prompt alone
    with attnsteer.attach(pipe, variants=[[], [], [method]]) if words else attnsteer.attach(pipe, method):
        steered = paint(pipe)
    assert np.isfinite(steered).all()
    assert not np.array_equal(steered[-1], before[-1])
    assert np.array_equal(paint(pipe), before)
