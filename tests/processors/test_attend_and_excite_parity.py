"""Attend-and-Excite against diffusers' own pipeline, where that one is right: square pictures, tokens by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnsteer
from attnsteer.processors import AttendAndExcite
from attnsteer.processors.attend_and_excite import excitation
from tests.engine.common import to_double
from tests.nursed import prepared, random_maps
from tests.tiny import pipelines

reference = pytest.importorskip(
    "diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite.pipeline_stable_diffusion_attend_and_excite"
)
Pipeline: Any = reference.StableDiffusionAttendAndExcitePipeline
CALL = {"prompt": "a dog and a red car", "height": 48, "width": 48, "output_type": "latent", "guidance_scale": 4.0}


def test_the_loss_of_the_same_maps() -> None:
    maps = random_maps(n=9, h=4, w=4).float()
    peaks = Pipeline._compute_max_attention_per_index(maps.permute(1, 2, 0).clone(), [2, 5])
    ours = [prepared(maps[1:-1].double())[i] for i in (1, 4)]
    for theirs, mine in zip(peaks, ours, strict=True):
        torch.testing.assert_close(theirs, mine.max().float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(Pipeline._compute_loss(peaks), excitation(ours)[0].float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("thresholds", "end"), [({}, 25), ({0: 0.5}, 25), ({0: 0.12}, 25), ({0: 0.9, 1: 0.9}, 1)], ids=str
)
def test_the_latents_of_a_whole_run(thresholds: dict[int, float], end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64; measured: 1e-13 without repetitions, 6e-10 after 40 of them. Their smoothing kernel is rounded to
    float32, which repetitions make a difference of 1e-3: here it is computed in float64."""
    exact = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2))
    exact = exact / exact.sum()

    class Smoothing(reference.GaussianSmoothing):
        def __init__(self) -> None:
            super().__init__()
            self.weight = (exact[:, None] * exact)[None, None]

    monkeypatch.setattr(reference, "GaussianSmoothing", Smoothing)
    torch.set_default_dtype(torch.float64)
    try:
        pipe = to_double(pipelines.build("sd15"))
        parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
        theirs = Pipeline(**parts, requires_safety_checker=False)
        theirs.set_progress_bar_config(disable=True)
        steps = {"num_inference_steps": 3, "max_iter_to_alter": end, "thresholds": thresholds, "attn_res": (6, 6)}
        seed = {"generator": torch.Generator().manual_seed(3)}
        expected = theirs(**CALL, **seed, **steps, token_indices=[2, 6], return_dict=False)[0]
        method = AttendAndExcite(subjects=("dog", "car"), level=0, max_iter_to_alter=end, thresholds=thresholds)
        with attnsteer.attach(pipe, method) as steering:
            seed = {"generator": torch.Generator().manual_seed(3)}
            found = pipe(**CALL, **seed, num_inference_steps=3, return_dict=False)[0]
            passes = steering.session._nurse.passes
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert passes > 3 or not thresholds
