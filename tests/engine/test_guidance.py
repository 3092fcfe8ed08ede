"""``eps_u + s (eps_c - eps_u) + w (eps_c - eps_p)``, against loops written out here and explicit attention maps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import Where
from attnsteer.processors import PAG, SoftPAG
from tests.tiny import denoisers, pipelines

from .common import (
    EXACT,
    Loop,
    Nudge,
    Reference,
    choice,
    double,
    explicit_identity,
    latents,
    predict,
    to_double,
)

GUIDED = 4.0
"""The classifier-free guidance scale of the tiny pipelines' calls."""


# ---- whole pipelines, loops by hand ---------------------------------------------------------------------------------
@pytest.mark.parametrize("cfg", [True, False])
def test_sd15_with_ddim_equals_its_loop_by_hand(cfg: bool) -> None:
    pipe = to_double(pipelines.build("sd15"))
    where, strength = choice(pipe)
    kwargs = pipelines.call_kwargs("sd15", batch=2, cfg=cfg, steps=3)
    with attnsteer.steer(pipe, SoftPAG(where, strength=0.75, scale=2.0)):
        steered = latents(pipe, "sd15", batch=2, cfg=cfg)

    with torch.no_grad():
        text, negative = pipe.encode_prompt(kwargs["prompt"], "cpu", 1, cfg, kwargs.get("negative_prompt"))
        x = torch.cat([torch.randn(1, 4, 6, 10, generator=g, dtype=torch.float64) for g in kwargs["generator"]])
        pipe.scheduler.set_timesteps(3)
        alphas = pipe.scheduler.alphas_cumprod  # float32, as are the roots that the scheduler takes
        for t in pipe.scheduler.timesteps:
            eps_c = pipe.unet(x, t, text).sample
            with explicit_identity(pipe.unet, strength):
                eps_p = pipe.unet(x, t, text).sample
            eps_u = pipe.unet(x, t, negative).sample if cfg else eps_c
            s = GUIDED if cfg else 1.0
            eps = eps_u + s * (eps_c - eps_u) + 2.0 * (eps_c - eps_p)
            now, then = alphas[t], alphas[max(int(t) - 1000 // 3, 0)]
            x = then.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - then).sqrt() * eps
    torch.testing.assert_close(steered, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cfg", [True, False])
def test_sd3_with_euler_equals_its_loop_by_hand(cfg: bool) -> None:
    pipe = to_double(pipelines.build("sd3"))
    where, strength = choice(pipe)
    loop = Loop(pipe)
    with attnsteer.steer(pipe, SoftPAG(where, strength=0.75, scale=2.0)):
        steered = latents(pipe, "sd3", batch=2, cfg=cfg)
    loop.remove()

    kwargs = pipelines.call_kwargs("sd3", batch=2, cfg=cfg)
    with torch.no_grad():
        text, negative, pooled, negative_pooled = pipe.encode_prompt(
            kwargs["prompt"], None, None, "cpu", negative_prompt=kwargs.get("negative_prompt"),
            do_classifier_free_guidance=cfg, max_sequence_length=pipelines.MAX_TEXT,
        )  # fmt: skip
        x = torch.cat([torch.randn(1, 4, 6, 10, generator=g, dtype=torch.float64) for g in kwargs["generator"]])
        pipe.scheduler.set_timesteps(3)
        for i, t in enumerate(pipe.scheduler.timesteps):
            cond = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": t.expand(2)}
            v_c = pipe.transformer(hidden_states=x, **cond).sample
            with explicit_identity(pipe.transformer, strength):
                v_p = pipe.transformer(hidden_states=x, **cond).sample
            v_u = v_c
            if cfg:
                uncond = {"encoder_hidden_states": negative, "pooled_projections": negative_pooled}
                v_u = pipe.transformer(hidden_states=x, **{**cond, **uncond}).sample
            v = v_u + (GUIDED if cfg else 1.0) * (v_c - v_u) + 2.0 * (v_c - v_p)
            torch.testing.assert_close(loop.outputs[i], v, **EXACT)
            sigma, sigma_next = pipe.scheduler.sigmas[i : i + 2]
            # the scheduler steps in float32 and casts back
            x = (x.float() + (sigma_next - sigma) * v).to(torch.float64)
    torch.testing.assert_close(steered, x, **EXACT)


# ---- every family: the engine's perturbed lane against a full forward of everything with explicit maps ---------------
@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", pipelines.NAMES)
def test_every_pipeline_equals_whole_forwards_with_explicit_maps(name: str, cfg: bool) -> None:
    pipe = to_double(pipelines.build(name))
    where, strength = choice(pipe)
    plain = latents(pipe, name, batch=2, cfg=cfg, steps=2)
    reference = Reference(pipe, strength, w=2.0)
    expected = latents(pipe, name, batch=2, cfg=cfg, steps=2)
    reference.remove()
    loop = Loop(pipe)
    with attnsteer.steer(pipe, SoftPAG(where, strength=0.75, scale=2.0)) as steering:
        steered = latents(pipe, name, batch=2, cfg=cfg, steps=2)
    assert steering.session.extra_rows == 4
    # Wan keeps norms and time embedding in float32 whatever it is cast to; other row counts round otherwise there.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "wan" else {"rtol": 1e-10, "atol": 1e-10}
    for given, wanted in zip(loop.outputs, reference.outputs, strict=True):
        torch.testing.assert_close(given.double(), wanted.double(), **tolerance)
    torch.testing.assert_close(steered, expected, **tolerance)
    assert (steered - plain).abs().max() > 1e-3


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_sd15_adds_guidance_behind_its_rescaled_cfg(rescale: float) -> None:
    pipe = to_double(pipelines.build("sd15"))
    where, strength = choice(pipe)
    reference = Reference(pipe, strength, w=2.0)
    expected = latents(pipe, "sd15", guidance_rescale=rescale)
    reference.remove()
    with attnsteer.steer(pipe, SoftPAG(where, strength=0.75, scale=2.0)):
        steered = latents(pipe, "sd15", guidance_rescale=rescale)
    torch.testing.assert_close(steered, expected, rtol=1e-10, atol=1e-10)


def test_qwen_adds_guidance_behind_its_norm_matched_cfg() -> None:
    """The prediction that the scheduler gets without guidance has the norm of the conditional one; d comes on top."""
    pipe = to_double(pipelines.build("qwen"))
    where, strength = choice(pipe)
    kept: list[Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda _m, _a, output: kept.append(output[0]))
    loop = Loop(pipe)
    latents(pipe, "qwen", steps=1)
    handle.remove()
    loop.remove()
    cond = kept[0]
    torch.testing.assert_close(loop.outputs[0].norm(dim=-1), cond.norm(dim=-1), rtol=1e-9, atol=1e-9)
    reference = Reference(pipe, strength, w=2.0)
    latents(pipe, "qwen", steps=1)
    reference.remove()
    steered = Loop(pipe)
    d = reference.outputs[0] - loop.outputs[0]
    assert d.abs().max() > 1e-3
    with attnsteer.steer(pipe, SoftPAG(where, strength=0.75, scale=2.0)):
        latents(pipe, "qwen", steps=1)
    torch.testing.assert_close(steered.outputs[0], loop.outputs[0] + d, **EXACT)


# ---- the formula itself ----------------------------------------------------------------------------------------------
def test_the_worked_example_of_the_combination(monkeypatch: Any) -> None:
    """eps_c = 1, eps_u = 0.5, eps_p = 0.2, s = 3, w = 2: 3.6 with classifier-free guidance, 2.6 without."""
    model, inputs = denoisers.build("unet_sd15")
    scheduler = SimpleNamespace(timesteps=torch.tensor([5]), set_timesteps=lambda n: None)
    scheduler.step = lambda model_output, timestep, sample: model_output
    given = inputs(2)

    site = model.get_submodule("up_blocks.1.attentions.1.transformer_blocks.0.attn1")

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        binding = site.__dict__.get("_steer")
        if binding is not None:
            binding.hit = True
        value = torch.where(encoder_hidden_states.sum(dim=(1, 2)) > 0, 0.2 if binding else 1.0, 0.5)
        return (value.view(-1, 1, 1, 1).expand_as(sample),)

    monkeypatch.setattr(model, "forward", forward)
    text = torch.cat([-torch.ones(1, 7, 20), torch.ones(1, 7, 20)])  # uncond, cond
    where = Where(layers="up_blocks.1.attentions.1*")
    with attnsteer.steer(model, SoftPAG(where, scale=2.0), scheduler=scheduler):
        scheduler.set_timesteps(1)
        u, c = model(given["sample"][:1].repeat(2, 1, 1, 1), 5, text)[0].chunk(2)
        guided = scheduler.step(u + 3.0 * (c - u), 5, None)
        c = model(given["sample"][:1], 5, text[1:])[0]
        alone = scheduler.step(c, 5, None)
    torch.testing.assert_close(guided, torch.full_like(guided, 3.6))
    torch.testing.assert_close(alone, torch.full_like(alone, 2.6))


@pytest.mark.parametrize("cfg", [True, False])
def test_one_at_all_heads_equals_the_pag_pipeline_of_diffusers(cfg: bool) -> None:
    from diffusers import StableDiffusionPAGPipeline

    pipe = to_double(pipelines.build("sd15"))
    with attnsteer.steer(pipe, SoftPAG(Where(layers="up_blocks.1.*attn1"), strength=1.0, scale=3.0)):
        ours = latents(pipe, "sd15", batch=2, cfg=cfg)
    with attnsteer.steer(pipe, PAG(Where(layers="up_blocks.1.*attn1"), scale=3.0)):
        pag = latents(pipe, "sd15", batch=2, cfg=cfg)
    plain = latents(pipe, "sd15", batch=2, cfg=cfg)
    theirs_pipe = StableDiffusionPAGPipeline(
        **pipe.components, requires_safety_checker=False, pag_applied_layers=["up_blocks.1"]
    )
    theirs_pipe.set_progress_bar_config(disable=True)
    theirs = latents(theirs_pipe, "sd15", batch=2, cfg=cfg, pag_scale=3.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pag, theirs, rtol=1e-10, atol=1e-10)
    assert (theirs - plain).abs().max() > 1e-2


def test_one_at_all_heads_equals_the_pag_pipeline_of_diffusers_in_float32() -> None:
    from diffusers import StableDiffusionPAGPipeline

    pipe = pipelines.build("sd15")
    with attnsteer.steer(pipe, SoftPAG(Where(layers="down_blocks.*attn1"), strength=1.0, scale=3.0)):
        ours = latents(pipe, "sd15", steps=2)
    theirs_pipe = StableDiffusionPAGPipeline(
        **pipe.components, requires_safety_checker=False, pag_applied_layers=["down_blocks"]
    )
    theirs_pipe.set_progress_bar_config(disable=True)
    theirs = latents(theirs_pipe, "sd15", steps=2, pag_scale=3.0)
    # Measured 2e-6 of the largest value: three rows in one batch there, two and one here.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_guidance_is_affine_in_its_scale() -> None:
    pipe = to_double(pipelines.build("sd3"))
    outputs = []
    for scale in (0.0, 1.0, 2.0):
        loop = Loop(pipe)
        with attnsteer.steer(pipe, SoftPAG(Where(layers=1), scale=scale)):
            latents(pipe, "sd3", steps=1)
        loop.remove()
        outputs.append(loop.outputs[0])
    torch.testing.assert_close(outputs[2] - outputs[0], 2 * (outputs[1] - outputs[0]), **EXACT)
    assert (outputs[1] - outputs[0]).abs().max() > 1e-3


def test_two_guiding_methods_add_their_terms() -> None:
    pipe = to_double(pipelines.build("sd3"))
    first, second = SoftPAG(Where(layers=1), scale=2.0), PAG(Where(layers=3, heads=[0]), scale=1.0)
    outputs = {}
    for key, processors in {"none": (), "first": (first,), "second": (second,), "both": (first, second)}.items():
        loop = Loop(pipe)
        steering = attnsteer.attach(pipe, *processors) if processors else None
        latents(pipe, "sd3", steps=1, batch=2)
        loop.remove()
        if steering:
            steering.detach()
        outputs[key] = loop.outputs[0]
    expected = outputs["first"] + outputs["second"] - outputs["none"]
    torch.testing.assert_close(outputs["both"], expected, **EXACT)


def test_a_plain_edit_acts_in_the_perturbed_lane_as_well_so_that_only_the_perturbation_is_extrapolated() -> None:
    pipe = to_double(pipelines.build("sd3"))
    model = pipe.transformer
    for nudged in (0, 3):  # before the fork and behind it
        name = f"transformer_blocks.{nudged}.attn"
        seen: list[dict[str, Any]] = []
        handle = model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw), with_kwargs=True)  # noqa: B023
        loop = Loop(pipe)
        with attnsteer.steer(
            pipe, Nudge(Where(layers=nudged), strength=0.5), SoftPAG(Where(layers=2), strength=1.0, scale=2.0)
        ):
            latents(pipe, "sd3", cfg=False, steps=1)
        handle.remove()
        loop.remove()
        given = {k: seen[0][k] for k in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")}
        everywhere = dict.fromkeys(range(3), 0.5)
        with torch.no_grad():
            with explicit_identity(model, {name: everywhere}):
                cond = predict(model, given)
            with explicit_identity(
                model, {name: everywhere, "transformer_blocks.2.attn": dict.fromkeys(range(3), 1.0)}
            ):
                perturbed = predict(model, given)
        torch.testing.assert_close(loop.outputs[0], cond + 2.0 * (cond - perturbed), **EXACT)


def test_a_step_whose_scale_is_zero_is_bitwise_plain_and_costs_nothing() -> None:
    """PAG's adaptive scale reaches 0 in the late steps."""
    pipe = pipelines.build("sd15")
    pipe.scheduler.set_timesteps(3)
    t = [float(x) for x in pipe.scheduler.timesteps]
    method = PAG(Where(layers=-1), scale=3.0, adaptive_scale=3.0 / (1000 - t[1]))
    assert [method.guidance(x) > 0 for x in t] == [True, False, False]
    with attnsteer.steer(pipe, method) as steering:
        adaptive = latents(pipe, "sd15")
        assert steering.session.extra_rows == 1
    with attnsteer.steer(pipe, PAG(Where(layers=-1, steps=0), scale=method.guidance(t[0]))):
        assert torch.equal(latents(pipe, "sd15"), adaptive)


def test_a_pipeline_that_negates_the_prediction_is_guided_in_the_right_direction() -> None:
    """Lumina2's pipelines hand the scheduler the negative of what the denoiser predicts."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, inputs = denoisers.build("lumina2")
    model = model.double()
    scheduler = FlowMatchEulerDiscreteScheduler()
    given = double(inputs(2))
    where = Where(layers="layers.2*", heads=[0])
    with torch.no_grad():
        cond = predict(model, given)
        with explicit_identity(model, {"layers.2.attn": {0: 0.75}}):
            perturbed = predict(model, given)
        kept: list[Tensor] = []
        step = scheduler.step
        scheduler.step = lambda model_output, *args: kept.append(model_output) or step(model_output, *args)
        method = SoftPAG(where, strength=0.75, scale=2.0)
        with attnsteer.steer(model, method, scheduler=scheduler, cfg=("cond", "uncond")):
            scheduler.set_timesteps(2)
            scheduler.step(-predict(model, given), scheduler.timesteps[0], given["hidden_states"])
    torch.testing.assert_close(kept[0], -(cond + 2.0 * (cond - perturbed)), **EXACT)
    assert (cond - perturbed).abs().max() > 1e-4
