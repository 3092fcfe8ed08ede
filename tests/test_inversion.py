"""Inversion: linear fields with known solutions, the sampler's own inverse, and pictures of the small world."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.inversion import Inverted, invert
from attnsteer.processors import IRDiffusion, SharedSelfAttention
from attnsteer.references import noised_references
from attnsteer.stories import box_masks
from tests.engine.common import denoiser_of, latents, to_double
from tests.tiny import pipelines

FIELD = 0.3
"""The prediction of the linear fields is this times the latent."""
PROMPTS = ["a dog", "a red car"]


def given(number: int = 1) -> list[Tensor]:
    noise = torch.Generator().manual_seed(5)
    return [torch.randn(4, 6, 10, generator=noise, dtype=torch.float64) for _ in range(number)]


def arguments(name: str, steps: int, number: int = 1) -> dict[str, Any]:
    call = pipelines.call_kwargs(name, number, cfg=False, steps=steps)
    for key in ("prompt", "generator", "output_type"):
        call.pop(key)
    return call


# ---- fields whose solution is known ----------------------------------------------------------------------------------
def linear(pipe: Any, monkeypatch: Any) -> None:
    def forward(sample: Tensor | None = None, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (FIELD * (kwargs["hidden_states"] if sample is None else sample),)

    monkeypatch.setattr(denoiser_of(pipe), "forward", forward)


def exact(kind: str, pipe: Any) -> float:
    """The factor from the picture to the noise along the differential equation of the schedule."""
    scheduler = pipe.scheduler
    if kind == "flow":  # dx / ds = v = l x, from s = 0 to s_0
        return math.exp(FIELD * float(scheduler.sigmas[0]))
    first, last = float(scheduler.alphas_cumprod[scheduler.timesteps[0]]), float(scheduler.final_alpha_cumprod)
    if kind == "v":  # x = cos(p) x0 + sin(p) noise: dx / dp = v = l x
        return math.exp(FIELD * (math.acos(math.sqrt(first)) - math.acos(math.sqrt(last))))
    # y = x / a, r = s / a: dy / dr = noise = l x = l y / sqrt(1 + r^2)
    ratios = [math.sqrt((1 - a) / a) for a in (first, last)]
    return math.sqrt(first / last) * math.exp(FIELD * (math.asinh(ratios[0]) - math.asinh(ratios[1])))


@pytest.mark.parametrize("corrections", [0, 30])
@pytest.mark.parametrize("kind", ["noise", "v", "flow"])
def test_linear_fields_are_solved_to_first_order(kind, corrections, monkeypatch):
    from diffusers import DDIMScheduler

    name = "sd3" if kind == "flow" else "sd15"
    pipe = to_double(pipelines.build(name))
    if kind != "flow":  # steps that divide 1000 - 8: the same first noise for all of them
        prediction = "epsilon" if kind == "noise" else "v_prediction"
        pipe.scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction, timestep_spacing="trailing")
    linear(pipe, monkeypatch)
    picture, errors = given()[0], []
    for steps in (50, 100, 200):
        found = invert(pipe, [picture], ["a dog"], corrections=corrections, **arguments(name, steps))[0]
        latents(pipe, name, steps=steps, cfg=False)  # sets the schedule of the pipeline's own scheduler
        ratio = found.noise[0] / picture
        assert ratio.std() < 1e-9
        errors.append(abs(float(ratio.mean()) / exact(kind, pipe) - 1))
    assert 1e-5 < errors[0] < 0.2
    assert 1.7 < errors[0] / errors[1] < 2.4
    assert 1.8 < errors[1] / errors[2] < 2.2


def test_every_step_of_a_linear_flow_by_hand(monkeypatch):
    """x_i = x_{i+1} + (s_i - s_{i+1}) l x_{i+1}, from the last step to the first."""
    pipe = to_double(pipelines.build("sd3"))
    linear(pipe, monkeypatch)
    picture = given()[0]
    found = invert(pipe, [picture], ["a dog"], **arguments("sd3", 4))[0]
    latents(pipe, "sd3", steps=4, cfg=False)
    sigmas, x, path = pipe.scheduler.sigmas.double(), picture, []
    for i in (3, 2, 1, 0):
        x = x + (sigmas[i] - sigmas[i + 1]) * FIELD * x
        path.insert(0, x)
    torch.testing.assert_close(found.latents, torch.stack(path), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.noise[0], x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.timesteps, pipe.scheduler.timesteps)


# ---- the sampler's own inverse ---------------------------------------------------------------------------------------
QUICK = ("sd15", "sd3", "flux")
SAMPLERS = [
    pytest.param(which, marks=[] if which in QUICK else [pytest.mark.slow])
    for which in ("sd15", "sd15-v", "sdxl", "sdxl-trailing", "sd3", "flux")
]


def sampler(which: str) -> tuple[Any, str]:
    """A tiny pipeline whose predictions change slowly, as those of trained models do."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    name, _, kind = which.partition("-")
    pipe = to_double(pipelines.build(name))
    if kind == "v":
        pipe.scheduler = DDIMScheduler(
            clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
        )
    if kind == "trailing":
        pipe.scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    return pipe, name


@pytest.mark.parametrize("which", SAMPLERS)
def test_corrected_inversion_is_the_inverse_of_the_sampler(which):
    """The denoiser gets on the way back what it got on the way there, row for row, and the picture comes out."""
    pipe, name = sampler(which)
    model = denoiser_of(pipe)
    with torch.no_grad():  # small predictions: a contraction
        for parameter in (model.proj_out if hasattr(model, "proj_out") else model.conv_out).parameters():
            parameter.mul_(0.2 if name in ("sd3", "flux") else 0.03)
    pictures = given(2)
    call = arguments(name, 6, 2)
    rough = invert(pipe, pictures, PROMPTS, **call)
    found = invert(pipe, pictures, PROMPTS, corrections=40, **call)
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    results = [
        pipe(prompt=PROMPTS, latents=torch.cat([f.noise for f in way]), output_type="latent", **call)[0]
        for way in (found, rough)
    ]
    hook.remove()
    wanted = torch.stack(pictures)
    if name == "flux":
        wanted = torch.stack([pipe._pack_latents(p[None], 1, 4, 6, 10)[0] for p in pictures])
    # flow-matching schedulers step in float32
    tolerance = 1e-4 if name in ("sd3", "flux") else 1e-6
    torch.testing.assert_close(results[0], wanted, rtol=0, atol=tolerance)
    assert (results[1] - wanted).abs().max() > 10 * tolerance
    for row in range(2):
        assert isinstance(found[row], Inverted)
        torch.testing.assert_close(
            torch.stack([s[row] for s in seen[:6]]), found[row].latents.to(seen[0]), rtol=0, atol=10 * tolerance
        )


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("EulerAncestralDiscreteScheduler", {}),
        ("LCMScheduler", {}),
        ("EDMEulerScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ],
)
def test_samplers_that_take_other_steps_are_refused(scheduler, options):
    name = "sd3" if "Flow" in scheduler else "sd15"
    pipe = pipelines.build(name)
    pipe.scheduler = getattr(diffusers, scheduler)(**options)
    own, drawn = pipe.scheduler, torch.get_rng_state()
    with pytest.raises(SteeringError, match=f"{scheduler} adds noise or takes other steps"):
        invert(pipe, [given()[0].float()], ["a dog"], **arguments(name, 3))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert pipe.scheduler is own


def test_samplers_of_higher_order_are_taken_for_their_first_order():
    pipe = pipelines.build("sd15")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
    (found,) = invert(pipe, [given()[0].float()], ["a dog"], **arguments("sd15", 3))
    assert found.latents.shape == (3, 4, 6, 10)


@pytest.mark.parametrize("pictures", [object(), []])
def test_pictures_without_a_list_are_refused(pictures):
    with pytest.raises(SteeringError, match="Give"):
        invert(pipelines.build("sd3"), pictures, [])


# ---- as references ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_inverted_references_stand_in_their_rows_in_every_step(name, cfg):
    pipe = pipelines.build(name)
    picture = given()[0].float()
    way = invert(pipe, [picture], ["a dog"], **arguments(name, 3))[0]
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    plain = latents(pipe, name, batch=2, cfg=cfg)
    masks = box_masks([(0.0, 0.0, 0.5, 1.0)], (6, 10))
    how: Any = SharedSelfAttention(Where(layers="all"), frames=2, anchors=1, masks=masks)
    if name == "sd15":
        how = IRDiffusion(references=masks, scene=masks, start_layer=0)
    with noised_references(pipe, [way, None]):
        hook = denoiser_of(pipe).register_forward_pre_hook(note, with_kwargs=True)
        latents(pipe, name, batch=2, cfg=cfg)
        with attnsteer.steer(pipe, how):
            found = latents(pipe, name, batch=2, cfg=cfg)
    hook.remove()
    each = len(seen) // 6
    for call, sample in enumerate(seen[: len(seen) // 2]):
        for row in sample[::2]:
            assert torch.equal(row, way.latents[call // each])
    assert not torch.equal(found[1], plain[1])
    assert torch.equal(latents(pipe, name, batch=2, cfg=cfg), plain)
    with noised_references(pipe, [way, None]), pytest.raises(SteeringError, match="inverted in 3 steps"):
        latents(pipe, name, batch=2, cfg=cfg, steps=4)


# ---- a trained model -------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_pictures_of_the_small_world_come_back(monkeypatch):
    """world-sd, guidance 1: root mean square error against what the autoencoder makes of the picture."""
    from diffusers import StableDiffusionPipeline

    from attnsteer.world import assets, sampling, text

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        folder = assets.path("models/world-sd")
    except FileNotFoundError as error:
        pytest.skip(f"model not trained here: {error}")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    scenes = [sampling.sample(seed) for seed in (3, 8)]
    pictures = [scene.array().astype("float32") / 255 for scene in scenes]
    prompts = [text.caption(scene) for scene in scenes]
    call = {"num_inference_steps": 20}
    target = torch.stack([torch.as_tensor(p) for p in pictures]).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        lost = pipe.vae.decode(pipe.vae.encode(target).latents).sample
    lost = (lost / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    errors = {}
    for corrections in (0, 4, None):
        noise = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
        if corrections is not None:
            noise = torch.cat([f.noise for f in invert(pipe, pictures, prompts, corrections=corrections, **call)])
        again = pipe(prompts, latents=noise, guidance_scale=1.0, output_type="np", **call).images
        errors[corrections] = float(np.sqrt(((again - lost) ** 2).mean()))
    assert errors[0] < 0.15  # measured: 0.124
    assert errors[4] < 0.09  # measured: 0.071
    assert errors[None] > 1.5 * errors[4]  # other noise makes another picture of the prompt; measured: 0.134
