"""Which step of a schedule a denoiser's timestep stands for."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from attnsteer.hosts.latents import position
from tests.tiny import denoisers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("begin", [0, 37])
@pytest.mark.parametrize(("name", "clock"), [("flux", 1000), ("sd3", None)])
def test_every_step_of_a_long_flow_is_told_in_every_precision(name, clock, dtype, begin):
    model, scheduler = denoisers.build(name)[0], FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(200)
    if begin:
        scheduler.set_begin_index(begin)
    assert len(set(scheduler.timesteps.bfloat16().tolist())) < 200  # half precision alone does not tell them apart
    sample, found = torch.zeros(1, 1), []
    for t in scheduler.timesteps[begin:]:
        given = t.expand(2).to(dtype)  # as the pipelines do
        found.append(position(model, scheduler, given / clock if clock else given))
        assert found[-1] == position(model, scheduler, given / clock if clock else given)
        sample = scheduler.step(torch.ones(1, 1), t, sample).prev_sample
    assert found == list(range(begin, 200))


@pytest.mark.parametrize("make", [DDIMScheduler, EulerDiscreteScheduler])
def test_steps_of_unets_are_told_by_the_timestep(make):
    model, scheduler = denoisers.build("unet_sd15")[0], make()
    scheduler.set_timesteps(200)
    assert [position(model, scheduler, t) for t in scheduler.timesteps] == list(range(200))
