"""Given pictures in rows of a batch: what the denoiser gets, by the formulas of the schedules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import SteeringError
from attnsteer.processors import IRDiffusion
from attnsteer.references import noised_references
from attnsteer.stories import box_masks
from tests.engine.common import denoiser_of, latents
from tests.tiny import pipelines

PROMPTS = ["a dog", "a red car", "a dog and a red car"]


def clean() -> list[Tensor]:
    noise = torch.Generator().manual_seed(5)
    return [torch.randn(4, 6, 10, generator=noise) for _ in range(2)]


def seen_by(pipe: Any, name: str, cfg: bool) -> list[tuple[Tensor, float]]:
    """The latents and the timestep of every call of the denoiser."""
    calls: list[tuple[Tensor, float]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        sample = args[0] if args else kwargs["hidden_states"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        calls.append((sample.clone(), float(torch.as_tensor(timestep).flatten()[0])))

    hook = denoiser_of(pipe).register_forward_pre_hook(note, with_kwargs=True)
    latents(pipe, name, batch=3, cfg=cfg, prompt=PROMPTS)
    hook.remove()
    return calls


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_rows_are_the_pictures_at_the_noise_of_each_step(name, cfg):
    pipe = pipelines.build(name)
    plain = seen_by(pipe, name, cfg)
    rows = clean()
    with noised_references(pipe, [rows[0], None, rows[1]], seed=7):
        calls = seen_by(pipe, name, cfg)
    assert len(calls) == len(plain) == 3
    for step, (sample, timestep) in enumerate(calls):
        assert sample.shape[0] == (6 if cfg else 3)
        for row, x in ((0, rows[0]), (2, rows[1])):
            n = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(7 * 3 + row))[0]
            if name == "sd15":
                a = pipe.scheduler.alphas_cumprod[int(timestep)]
                expected = a.sqrt() * x + (1 - a).sqrt() * n
            else:
                sigma = pipe.scheduler.sigmas[step]
                expected = (x + sigma * n) / (sigma**2 + 1).sqrt() if name == "sdxl" else (1 - sigma) * x + sigma * n
            for found in sample[row::3]:
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(sample[1::3], plain[step][0][1::3])  # the generated row takes no notice without sharing


def test_pictures_are_encoded_as_the_pipeline_does():
    pipe = pipelines.build("sd15")
    picture = np.random.default_rng(0).random((48, 80, 3)).astype("float32")
    pixels = pipe.image_processor.preprocess(picture, 48, 80)
    encoded = pipe.vae.encode(pixels).latent_dist.mode()[0] * pipe.vae.config.scaling_factor
    found = []
    for given in (picture, encoded):
        with noised_references(pipe, [given, None, None]):
            found.append(seen_by(pipe, "sd15", cfg=False)[1][0][0])
    torch.testing.assert_close(found[0], found[1])


def test_the_scene_takes_from_the_pictures_and_nothing_stays_behind():
    pipe = pipelines.build("sd15")
    before = latents(pipe, "sd15", batch=3, prompt=PROMPTS)
    masks = box_masks([(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)], (6, 10))
    how = IRDiffusion(references=masks, scene=masks, start_layer=0)
    results = []
    for pictures in (clean(), clean()[::-1]):
        with noised_references(pipe, [*pictures, None]), attnsteer.steer(pipe, how):
            results.append(latents(pipe, "sd15", batch=3, prompt=PROMPTS)[2])
    assert not torch.equal(results[0], results[1])
    assert torch.equal(latents(pipe, "sd15", batch=3, prompt=PROMPTS), before)
    assert not denoiser_of(pipe)._forward_pre_hooks


def test_what_does_not_fit_is_refused():
    pipe = pipelines.build("sd15")
    with pytest.raises(SteeringError, match="Diffusers pipeline"), noised_references(pipe.unet, clean()):
        pass
    with pytest.raises(SteeringError, match="Give a list"), noised_references(pipe, object()):
        pass
    with pytest.raises(SteeringError, match="one at least"), noised_references(pipe, [None, None]):
        pass
    with pytest.raises(SteeringError, match="this run's have"), noised_references(pipe, [torch.ones(4, 3, 3), None]):
        latents(pipe, "sd15", batch=2)
    with pytest.raises(SteeringError, match="with 2 entries wanted"), noised_references(pipe, [clean()[0], None]):
        latents(pipe, "sd15", batch=3)
    assert not pipe.unet._forward_pre_hooks
