"""Strength 0, leaving and failing: everything is as it was, bit for bit, and nothing is kept alive."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attnsteer
from attnsteer import AttentionCall, Processor, Where
from attnsteer.processors import PAG, SoftPAG
from tests.tiny import denoisers, pipelines

from .common import Nudge, denoiser_of, difference, latents, predict, state_of


class StopError(Exception):
    """Raised on purpose."""


@dataclass(frozen=True)
class Failing(Processor):
    kinds = ("self", "joint")

    def react(self, call: AttentionCall) -> None:
        raise StopError


def whole_state(pipe: Any) -> dict[str, Any]:
    return state_of(denoiser_of(pipe), pipe.vae, pipe.text_encoder, scheduler=pipe.scheduler)


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", pipelines.NAMES)
def test_strength_zero_steering_and_leaving_are_bitwise_the_plain_pipeline(name: str, cfg: bool) -> None:
    pipe = pipelines.build(name)
    plain = latents(pipe, name, batch=2, cfg=cfg)
    before = whole_state(pipe)
    for inert in (SoftPAG(Where(layers=0), strength=0.0), SoftPAG(Where(layers=0), scale=0.0), Nudge(strength=0.0)):
        with attnsteer.steer(pipe, inert) as steering:
            assert torch.equal(latents(pipe, name, batch=2, cfg=cfg), plain)
            assert steering.session.extra_rows == 0
    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1)), Nudge(Where(layers=-1, heads=0))):
        assert not torch.equal(latents(pipe, name, batch=2, cfg=cfg), plain)
    assert torch.equal(latents(pipe, name, batch=2, cfg=cfg), plain)
    assert difference(before, whole_state(pipe)) == []


@pytest.mark.parametrize("name", ["unet_sd15", "sd35", "flux", "wan"])
def test_a_bare_denoiser_is_restored(name: str) -> None:
    model, inputs = denoisers.build(name)
    before = state_of(model)
    with torch.no_grad():
        plain = predict(model, inputs(2))
        with attnsteer.steer(model, Nudge()):
            assert not torch.equal(predict(model, inputs(2)), plain)
        assert torch.equal(predict(model, inputs(2)), plain)
    assert difference(before, state_of(model)) == []


@pytest.mark.parametrize("where", ["react", "callback", "scheduler", "denoiser", "perturbed"])
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "qwen"])
def test_an_exception_in_the_middle_leaves_nothing_behind(name: str, where: str, monkeypatch: Any) -> None:
    pipe = pipelines.build(name)
    plain = latents(pipe, name)
    before = whole_state(pipe)
    options: dict[str, Any] = {}
    processors: list[Processor] = [SoftPAG(Where(layers=-1)), Nudge(Where(layers=0))]

    def stop(*_: Any, **__: Any) -> Any:
        raise StopError

    with monkeypatch.context() as patch:
        if where == "react":
            processors.append(Failing(Where(layers=-1)))
        elif where == "callback":
            options["callback_on_step_end"] = stop
        elif where == "scheduler":
            patch.setattr(pipe.scheduler, "step", stop, raising=False)
        elif where == "denoiser":
            patch.setattr(denoiser_of(pipe), "forward", stop)
        with attnsteer.steer(pipe, *processors) as steering:
            if where == "perturbed":
                patch.setattr(steering.session, "_perturbed", stop)
            with pytest.raises(StopError):
                latents(pipe, name, **options)
    assert difference(before, whole_state(pipe)) == []
    assert torch.equal(latents(pipe, name), plain)


def test_after_an_exception_the_same_steering_runs_as_if_nothing_had_happened() -> None:
    pipe = pipelines.build("sd15")

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise StopError
        return kwargs

    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1, steps=[0, 2]))):
        expected = latents(pipe, "sd15")
        with pytest.raises(StopError):
            latents(pipe, "sd15", callback_on_step_end=stop)
        assert torch.equal(latents(pipe, "sd15"), expected)


def test_global_random_state_is_not_touched_by_attaching_or_steering() -> None:
    pipe = pipelines.build("sd15")
    torch.manual_seed(5)
    latents(pipe, "sd15")
    after_plain = torch.get_rng_state()
    torch.manual_seed(5)
    with attnsteer.steer(pipe, PAG(Where(layers=-1))):
        latents(pipe, "sd15")
    assert torch.equal(torch.get_rng_state(), after_plain)


@pytest.mark.parametrize("ran", [True, False])
def test_a_steering_that_is_never_detached_does_not_keep_a_deleted_pipeline_alive(ran: bool) -> None:
    pipe = pipelines.build("sd15")
    attnsteer.attach(pipe, SoftPAG(Where(layers=-1)))
    if ran:
        latents(pipe, "sd15", steps=1)
    gone = weakref.ref(pipe), weakref.ref(pipe.unet), weakref.ref(pipe.scheduler)
    del pipe
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]


def test_a_pipeline_is_freed_after_detaching_and_its_handle_alone_is_harmless() -> None:
    pipe = pipelines.build("sd15")
    steering = attnsteer.attach(pipe, SoftPAG(Where(layers=-1)))
    latents(pipe, "sd15", steps=1)
    steering.detach()
    state = steering.session.__dict__
    assert state["_forward"] is None
    assert not state["_intercepted"]
    assert not state["_bindings"]._made


def test_two_models_are_steered_independently_and_the_last_detach_removes_the_wrappers() -> None:
    first, inputs = denoisers.build("flux")
    second, _ = denoisers.build("flux", seed=1)
    before = state_of(first, second)
    with torch.no_grad():
        plain = predict(first, inputs(1)), predict(second, inputs(1))
        one = attnsteer.attach(first, Nudge())
        two = attnsteer.attach(second, Nudge(strength=0.25))
        steered = predict(second, inputs(1))
        one.detach()
        assert torch.equal(predict(first, inputs(1)), plain[0])
        assert torch.equal(predict(second, inputs(1)), steered)
        two.detach()
        assert torch.equal(predict(second, inputs(1)), plain[1])
    assert not torch.equal(steered, plain[1])
    assert difference(before, state_of(first, second)) == []


def test_detaching_inside_a_generation_takes_effect_at_once() -> None:
    pipe = pipelines.build("sd15")
    before = whole_state(pipe)
    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1, steps=[0]))):
        expected = latents(pipe, "sd15")
    steering = attnsteer.attach(pipe, SoftPAG(Where(layers=-1)))

    def leave(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            steering.detach()
        return kwargs

    assert torch.equal(latents(pipe, "sd15", callback_on_step_end=leave), expected)
    assert {k for k in difference(before, whole_state(pipe)) if k != "rng"} == set()


def test_a_deep_copy_of_a_steered_pipeline_is_a_plain_pipeline() -> None:
    pipe = pipelines.build("sd3")
    plain = latents(pipe, "sd3")
    steering = attnsteer.attach(pipe, SoftPAG(Where(layers=-1)))
    assert not torch.equal(latents(pipe, "sd3"), plain)
    twin = copy.deepcopy(pipe.transformer)
    scheduler = copy.deepcopy(pipe.scheduler)
    steering.detach()
    pipe.transformer, pipe.scheduler = twin, scheduler
    assert torch.equal(latents(pipe, "sd3"), plain)


def test_the_state_dict_of_a_steered_model_has_no_new_entries() -> None:
    model, _ = denoisers.build("sd3")
    before = list(model.state_dict())
    with attnsteer.steer(model, Nudge()):
        assert list(model.state_dict()) == before


def test_methods_that_somebody_else_put_on_the_scheduler_survive() -> None:
    """Ours below, theirs above: leaving must not take theirs away, and theirs must not keep ours."""
    pipe = pipelines.build("sd15")
    plain = latents(pipe, "sd15")
    seen: list[float] = []
    steering = attnsteer.attach(pipe, SoftPAG(Where(layers=-1)))
    ours = pipe.scheduler.step

    def theirs(model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(float(timestep))
        return ours(model_output, timestep, *args, **kwargs)

    pipe.scheduler.step = theirs
    assert not torch.equal(latents(pipe, "sd15"), plain)
    steering.detach()
    assert pipe.scheduler.step is theirs
    assert torch.equal(latents(pipe, "sd15"), plain)
    assert len(seen) == 6
