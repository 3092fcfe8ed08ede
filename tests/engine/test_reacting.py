"""Processors that look at the data: which rows and heads they change, and what the perturbed lane makes of them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import AttentionCall, Capture, Processor, Scale, Where
from attnsteer.edits import Edit
from attnsteer.processors import SoftPAG
from tests.tiny import denoisers, pipelines

from .common import EXACT, latents, to_double

LAST = Where(layers=-1)


@dataclass(frozen=True)
class Halve(Processor):
    """Halves every head that it may change; asked in each call."""

    kinds = ("self", "joint")

    @property
    def token_agnostic(self) -> bool:
        return True

    def react(self, call: AttentionCall) -> Edit:
        return Scale(torch.full((call.q.shape[0], call.q.shape[1]), 0.5, device=call.q.device))


@dataclass(frozen=True)
class HalvePlanned(Halve):
    """The same edit without looking: the oracle."""

    react = Processor.react

    def plan(self, site: Any, heads: tuple[int, ...]) -> Edit:
        weight = torch.ones(1, site.heads)
        weight[:, list(heads)] = 0.5
        return Scale(weight)


def _steered(name: str, *processors: Processor, **options: Any) -> Tensor:
    pipe = to_double(pipelines.build(name))
    with attnsteer.steer(pipe, *processors, **options):
        return latents(pipe, name, batch=2)


@pytest.mark.parametrize("name", ["sd15", "flux"])
@pytest.mark.parametrize("heads", ["all", [1]])
def test_a_reaction_changes_its_heads_only(name: str, heads: Any) -> None:
    where = Where(layers=-1, heads=heads)
    torch.testing.assert_close(_steered(name, Halve(where)), _steered(name, HalvePlanned(where)), **EXACT)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_row_beside_a_reacting_row_is_left_alone(name: str) -> None:
    plain = latents(to_double(pipelines.build(name)), name, batch=2)
    mixed = _steered(name, variants=[[], [Halve(LAST)]])
    torch.testing.assert_close(mixed[0], plain[0], **EXACT)
    torch.testing.assert_close(mixed[1], _steered(name, Halve(LAST))[1], **EXACT)


@pytest.mark.parametrize("layers", [0, -1])
def test_the_perturbed_lane_carries_the_reaction_before_and_behind_its_fork(layers: int) -> None:
    guide = SoftPAG(Where(layers=2), scale=2.0)
    where = Where(layers=layers)
    torch.testing.assert_close(
        _steered("sd15", Halve(where), guide), _steered("sd15", HalvePlanned(where), guide), **EXACT
    )


def test_reading_beside_guidance_keeps_one_map_for_each_step() -> None:
    pipe = pipelines.build("sd15")
    look = Capture(LAST, rows=(0,), columns="text")
    with attnsteer.steer(pipe, look, SoftPAG(LAST)) as steering:
        latents(pipe, "sd15", steps=3)
        assert [len(state["maps"]) for state in steering.states(look).values()] == [3]


def test_the_backward_pass_of_checkpointing_records_nothing_again() -> None:
    model, make = denoisers.build("unet_sd15")
    model.train()
    model.enable_gradient_checkpointing()
    look = Capture(Where(layers=1), rows=(0,), columns="text")
    with attnsteer.steer(model, look) as steering:
        inputs = make(1)
        inputs["sample"].requires_grad_()
        model(**inputs, return_dict=False)[0].sum().backward()
        assert [len(state["maps"]) for state in steering.states(look).values()] == [1]


# ---- calls that are not of the run -----------------------------------------------------------------------------------
def test_a_probe_of_the_denoiser_before_a_step_is_not_taken_for_its_conditional_forward() -> None:
    def run(probe: bool) -> Tensor:
        pipe = to_double(pipelines.build("sd15"))
        plain = pipe.scheduler.scale_model_input
        other = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

        def scale(sample: Tensor, timestep: Any) -> Tensor:
            if probe:
                pipe.unet(other[:, :, : sample.shape[2], : sample.shape[3]], timestep, torch.zeros(2, 16, 20).double())
            return plain(sample, timestep)

        pipe.scheduler.scale_model_input = scale
        with attnsteer.steer(pipe, SoftPAG(LAST)):
            return latents(pipe, "sd15")

    torch.testing.assert_close(run(probe=True), run(probe=False), **EXACT)


def test_a_steered_scheduler_is_pickled_as_a_plain_one() -> None:
    pipe = pipelines.build("sd15")
    with attnsteer.steer(pipe, SoftPAG(LAST)) as steering:
        copy = pickle.loads(pickle.dumps(pipe.scheduler))
        copy.set_timesteps(4)
        assert len(copy.timesteps) == 4
        assert not steering.session._clock.running


def test_a_variance_that_reaches_the_scheduler_is_not_extrapolated() -> None:
    """The scheduler of a learned variance gets twice the channels: only the mean is guided."""
    from diffusers import UNet2DConditionModel

    model, make = denoisers.build("unet_sd15")
    wide = UNet2DConditionModel.from_config({**model.config, "out_channels": 8}).eval()
    scheduler = _Recorder()
    inputs = make(2)
    with attnsteer.steer(wide, SoftPAG(LAST), scheduler=scheduler), torch.no_grad():
        scheduler.set_timesteps(1)
        output = wide(**inputs, return_dict=False)[0]
        scheduler.step(output, 5, inputs["sample"])
    assert torch.equal(scheduler.seen[:, 4:], output[:, 4:])
    assert not torch.allclose(scheduler.seen[:, :4], output[:, :4])


class _Recorder:
    """A scheduler that only notes what it is given."""

    timesteps = torch.tensor([5])

    def set_timesteps(self, steps: int) -> None:
        pass

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        self.seen = model_output
        return sample
