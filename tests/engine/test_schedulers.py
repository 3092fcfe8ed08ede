"""The clock: guidance acts in exactly the selected steps under every scheduler, and a run knows nothing of the last."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.processors import SoftPAG
from tests.tiny import denoisers, pipelines

from .common import Loop, Nudge, Reference, Watch, choice, difference, latents, predict, state_of, to_double

OPTIONS: dict[str, dict[str, Any]] = {
    "PNDMScheduler+prk": {"skip_prk_steps": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverMultistepScheduler+sde": {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    "EulerDiscreteScheduler+trailing": {"timestep_spacing": "trailing"},
}
NAMES = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
    *OPTIONS,
)
SCHEDULERS = tuple(dict.fromkeys(NAMES))
CALLS = {"HeunDiscreteScheduler": 5, "KDPM2DiscreteScheduler": 5, "KDPM2AncestralDiscreteScheduler": 5}
CALLS |= {"PNDMScheduler+prk": 13, "PNDMScheduler": 4, "DPMSolverSDEScheduler": 5}
"""Scheduler steps of a schedule of 3, where they are not 3."""
STEPS = {"PNDMScheduler+prk": 4}
"""The shortest schedules, where they are longer than 3."""


def scheduler(name: str, config: Any) -> Any:
    cls = getattr(diffusers, name.partition("+")[0])
    for package in getattr(cls, "_backends", ()):  # a placeholder where scipy or torchsde is not installed
        pytest.importorskip(package)
    if name in ("IPNDMScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):  # no table of betas
        return cls()
    return cls.from_config(config, **OPTIONS.get(name, {}))


def pipeline(name: str) -> Any:
    pipe = pipelines.build("sd15")
    pipe.scheduler = scheduler(name, pipe.scheduler.config)
    return pipe


def guided_steps(pipe: Any, family: str, steering: Any, **options: Any) -> tuple[list[int], int]:
    """Positions among the scheduler's steps at which a perturbed row was computed, and how many steps there were."""
    return count_steps(pipe, steering, lambda: latents(pipe, family, **options))


def count_steps(pipe: Any, steering: Any, run: Callable[[], Any]) -> tuple[list[int], int]:
    inner = pipe.scheduler.step
    rows: list[int] = []

    @functools.wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        before = steering.session.extra_rows
        result = inner(*args, **kwargs)
        rows.append(steering.session.extra_rows - before)
        return result

    pipe.scheduler.step = step
    try:
        run()
    finally:
        pipe.scheduler.step = inner
    return [i for i, n in enumerate(rows) if n], len(rows)


def sigmas_of(s: Any) -> list[float]:
    """The noise level of each step, by the definitions of the two kinds of schedulers."""
    if hasattr(s, "sigmas"):
        return [float(x) for x in s.sigmas[: len(s.timesteps)]]
    alphas = s.alphas_cumprod.double()
    return [float(((1 - alphas[int(t)]) / alphas[int(t)]) ** 0.5) for t in s.timesteps]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_guided_run_equals_whole_forwards_with_explicit_maps(name: str) -> None:
    pipe = to_double(pipeline(name))
    where, strength = choice(pipe)
    reference = Reference(pipe, strength, w=2.0)
    expected = latents(pipe, "sd15", cfg=False, steps=STEPS.get(name, 3))
    reference.remove()
    loop = Loop(pipe)
    with attnsteer.steer(pipe, SoftPAG(where, strength=0.75, scale=2.0)):
        found = latents(pipe, "sd15", cfg=False, steps=STEPS.get(name, 3))
    assert len(loop.outputs) == CALLS.get(name, 3)
    for given, wanted in zip(loop.outputs, reference.outputs, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_windows_select_positions_in_the_schedule(name: str) -> None:
    pipe = pipeline(name)
    pipe.scheduler.set_timesteps(4)
    n = len(pipe.scheduler.timesteps)
    windows: list[tuple[Any, list[int]]] = [((0.25, 0.75), [i for i in range(n) if 0.25 <= i / n < 0.75])]
    if name != "IPNDMScheduler":
        levels = sigmas_of(pipe.scheduler)
        low, high = levels[2], levels[0]
        windows.append(({"sigma": (low, high)}, [i for i, s in enumerate(levels) if low <= s < high]))
    if name in ("DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        windows += [(1, [1]), (-1, [n - 1]), ([0, 2], [0, 2]), (slice(1, None, 2), list(range(n))[1::2])]
    for steps, expected in windows:
        with attnsteer.steer(pipe, SoftPAG(Where(layers=-1, steps=steps))) as steering:
            assert guided_steps(pipe, "sd15", steering, cfg=False, steps=4) == (expected, n), steps


def test_a_first_step_without_any_signal_is_above_every_noise_level() -> None:
    pipe = pipelines.build("sd15")
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **zero)
    for low, expected in ((0.0, [1, 2]), (1e9, [])):
        method = SoftPAG(Where(layers=-1, steps={"sigma": (low, 1e12)}))
        with attnsteer.steer(pipe, method) as steering:
            assert guided_steps(pipe, "sd15", steering, cfg=False, steps=3) == (expected, 3)


def test_a_sigma_window_under_a_scheduler_without_noise_levels_is_refused() -> None:
    pipe = pipeline("IPNDMScheduler")
    with (
        attnsteer.steer(pipe, SoftPAG(Where(layers=-1, steps={"sigma": (0.0, 1.0)}))),
        pytest.raises(SteeringError, match="IPNDMScheduler has no noise levels"),
    ):
        latents(pipe, "sd15")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_strength_zero_is_bitwise_plain_and_the_scheduler_is_restored(name: str) -> None:
    pipe = pipeline(name)
    plain = latents(pipe, "sd15", steps=STEPS.get(name, 3), cfg=False)
    before = state_of(pipe.unet, scheduler=pipe.scheduler)
    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1), strength=0.0)):
        assert torch.equal(latents(pipe, "sd15", steps=STEPS.get(name, 3), cfg=False), plain)
    assert difference(before, state_of(pipe.unet, scheduler=pipe.scheduler)) == []


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
@pytest.mark.parametrize("cfg", [True, False])
def test_flow_matching_schedulers_of_sd3(name: str, cfg: bool) -> None:
    pipe = to_double(pipelines.build("sd3"))
    pipe.scheduler = getattr(diffusers, name)(shift=3.0)
    where, strength = choice(pipe)
    reference = Reference(pipe, strength, w=2.0)
    expected = latents(pipe, "sd3", cfg=cfg, steps=3)
    reference.remove()
    with attnsteer.steer(pipe, SoftPAG(where, strength=0.75, scale=2.0)) as steering:
        found = latents(pipe, "sd3", cfg=cfg, steps=3)
        calls = 5 if "Heun" in name else 3
        assert steering.session.extra_rows == calls
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1, steps=slice(0, 2)))) as steering:
        assert guided_steps(pipe, "sd3", steering, cfg=cfg, steps=3) == ([0, 1], calls)


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler"],
)
def test_windows_of_image_to_image_start_inside_the_schedule(name: str) -> None:
    """Strength 0.5 of 8 steps runs the last 4; positions are those of the whole schedule."""
    base = pipeline(name)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, pipelines.HEIGHT, pipelines.WIDTH)

    kwargs = pipelines.call_kwargs("sd15", cfg=False, steps=8) | {"image": image, "strength": 0.5}
    del kwargs["height"], kwargs["width"]
    kwargs |= {"output_type": "latent"}
    pipe.scheduler.set_timesteps(8)
    total = len(pipe.scheduler.timesteps)
    first = 4 * pipe.scheduler.order
    runs = total - first
    for steps in ((0.0, 0.5), (0.5, 1.0), (0.0, 0.75), [first, total - 1], [0, 1], {"sigma": (0.0, 1e9)}):
        if isinstance(steps, tuple):
            expected = [i - first for i in range(first, total) if steps[0] <= i / total < steps[1]]
        elif isinstance(steps, dict):
            expected = list(range(runs))
        else:
            expected = [i - first for i in steps if i >= first]
        with attnsteer.steer(pipe, SoftPAG(Where(layers=-1, steps=steps))) as steering:
            assert count_steps(pipe, steering, lambda: pipe(**kwargs)) == (expected, runs), steps


def test_a_scheduler_that_is_changed_after_attaching_is_followed_and_both_are_left_clean() -> None:
    pipe = pipelines.build("sd15")
    old, new = pipe.scheduler, scheduler("EulerDiscreteScheduler", pipe.scheduler.config)
    method = SoftPAG(Where(layers=-1, steps=[0, 2]))
    pipe.scheduler = new
    plain = latents(pipe, "sd15")
    with attnsteer.steer(pipe, method):
        expected = latents(pipe, "sd15")
    pipe.scheduler = old
    with attnsteer.steer(pipe, method) as steering:
        before = latents(pipe, "sd15")
        pipe.scheduler = new
        assert torch.equal(latents(pipe, "sd15"), expected)
        assert guided_steps(pipe, "sd15", steering)[0] == [0, 2]
        pipe.scheduler = old
        assert torch.equal(latents(pipe, "sd15"), before)
        pipe.scheduler = new
    assert {"step", "set_timesteps"}.isdisjoint(vars(old).keys() | vars(new).keys())
    assert torch.equal(latents(pipe, "sd15"), plain)


def test_a_changed_scheduler_begins_a_run_without_the_memories_of_the_last() -> None:
    pipe = pipelines.build("sd15")
    watch = Watch(Where(layers=-1))
    with attnsteer.steer(pipe, watch) as steering:
        latents(pipe, "sd15", steps=3)
        pipe.scheduler = scheduler("EulerDiscreteScheduler", pipe.scheduler.config)
        latents(pipe, "sd15", steps=2)
        assert [state["calls"] for state in steering.states(watch).values()] == [2]


def test_runs_in_a_row_with_other_numbers_of_steps_are_as_if_each_were_alone() -> None:
    pipe = pipelines.build("sd15")
    method = SoftPAG(Where(layers=-1, steps=(0.5, 1.0)))
    alone = []
    for steps in (3, 3, 5, 2):
        with attnsteer.steer(pipe, method):
            alone.append(latents(pipe, "sd15", steps=steps))
    with attnsteer.steer(pipe, method) as steering:
        for steps, expected in zip((3, 3, 5, 2), alone, strict=True):
            assert torch.equal(latents(pipe, "sd15", steps=steps), expected)
        assert guided_steps(pipe, "sd15", steering, steps=4) == ([2, 3], 4)
        assert guided_steps(pipe, "sd15", steering, steps=2) == ([1], 2)


def test_an_interrupted_run_is_followed_by_a_whole_one() -> None:
    pipe = pipelines.build("sd15")

    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return kwargs

    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1, steps=[0, 2]))) as steering:
        expected = latents(pipe, "sd15", steps=4)
        assert steering.session.extra_rows == 2
        latents(pipe, "sd15", steps=4, callback_on_step_end=interrupt)
        assert steering.session.extra_rows == 3
        assert torch.equal(latents(pipe, "sd15", steps=4), expected)
        assert steering.session.extra_rows == 5


def test_custom_timesteps_are_the_schedule() -> None:
    pipe = pipelines.build("sd15")
    pipe.scheduler = scheduler("DDPMScheduler", pipe.scheduler.config)
    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1, steps=(0.0, 0.5)))) as steering:
        assert guided_steps(pipe, "sd15", steering, timesteps=[900, 800, 500, 10]) == ([0, 1], 4)


def test_a_bare_denoiser_follows_a_loop_that_sets_its_timesteps_before_or_after_attaching_or_never_again() -> None:
    model, inputs = denoisers.build("unet_sd15")
    given = inputs(1)
    sampler = diffusers.DDIMScheduler()

    def loop(steering: Any) -> list[int]:
        x, rows = given["sample"], []
        for t in sampler.timesteps:
            before = steering.session.extra_rows
            noise = model(x, t, given["encoder_hidden_states"]).sample
            x = sampler.step(noise, t, x).prev_sample
            rows.append(steering.session.extra_rows - before)
        return rows

    sampler.set_timesteps(4)
    with torch.no_grad(), attnsteer.steer(model, SoftPAG(Where(layers=-1, steps=1)), scheduler=sampler) as steering:
        assert loop(steering) == [0, 1, 0, 0]
        assert loop(steering) == [0, 1, 0, 0]
        sampler.set_timesteps(3)
        assert loop(steering) == [0, 1, 0]
        assert loop(steering) == [0, 1, 0]


def test_windows_hold_for_plain_edits_too() -> None:
    pipe = pipelines.build("sd15")
    loop = Loop(pipe)
    latents(pipe, "sd15", steps=4, cfg=False)
    plain = loop.outputs[:]
    loop.outputs.clear()
    with attnsteer.steer(pipe, Nudge(Where(layers=-1, steps=slice(2, 3)))):
        latents(pipe, "sd15", steps=4, cfg=False)
    changed = [not torch.equal(a, b) for a, b in zip(plain, loop.outputs, strict=True)]
    assert changed == [False, False, True, True]  # the last one starts from other latents


def test_a_bare_denoiser_without_scheduler_is_always_in_its_first_step() -> None:
    model, inputs = denoisers.build("sd3")
    with torch.no_grad():
        plain = predict(model, inputs(1))
        with attnsteer.steer(model, Nudge(Where(layers=0, steps=(0.0, 0.2)))):
            first = predict(model, inputs(1))
            assert torch.equal(predict(model, inputs(1)), first)
    assert not torch.equal(plain, first)
