"""What cannot be done is refused in one clear sentence that says what exists or what to do, and nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch

import attnsteer
from attnsteer import NotReachedError, Processor, SteeringError, Where, WhereError
from attnsteer.attach import attached_to
from attnsteer.processors import PAG, SoftPAG
from tests.tiny import denoisers, pipelines

from .common import Nudge, difference, latents, predict, state_of

BAD = [
    (Where(layers=9), r"Layer 9 does not exist: layers are 0 to 3\. There are: 0: transformer_blocks\.0\.attn"),
    (Where(layers=-5), "Layer -5 does not exist"),
    (Where(layers="mid_block*"), "Layer 'mid_block\\*' cannot be selected: no site has that name"),
    (Where(layers=slice(7, 9)), r"selects no .* attention"),
    (Where(layers=0, heads=3), r"Head 3 does not exist in 'transformer_blocks\.0\.attn': its heads are 0 to 2\."),
    (Where(heads={0: [0, 7]}), "Head 7 does not exist"),
    (Where(layers=[0], heads={1: "all"}), "selects no head"),
]


@pytest.mark.parametrize(("where", "message"), BAD)
def test_a_selection_that_matches_nothing_says_what_exists(where: Where, message: str) -> None:
    model, _ = denoisers.build("sd3")
    before = state_of(model)
    with pytest.raises(WhereError, match=message):
        attnsteer.attach(model, Nudge(where))
    assert difference(before, state_of(model)) == []


@pytest.mark.parametrize(
    "given",
    [
        {"layers": []},
        {"heads": []},
        {"heads": {}},
        {"heads": -1},
        {"steps": (0.5, 0.2)},
        {"steps": "later"},
        {"steps": []},
    ],
)
def test_an_empty_or_meaningless_selection_is_refused_when_it_is_made(given: dict[str, Any]) -> None:
    with pytest.raises(WhereError):
        Where(**given)


def test_attaching_twice_is_refused_through_the_pipeline_and_through_its_denoiser() -> None:
    pipe = pipelines.build("sd15")
    with attnsteer.steer(pipe, PAG(Where(layers=-1))):
        for target in (pipe, pipe.unet):
            with pytest.raises(SteeringError, match="is steered already: detach it first"):
                attnsteer.attach(target, Nudge())
    with attnsteer.steer(pipe.unet, Nudge()), pytest.raises(SteeringError, match="is steered already"):
        attnsteer.attach(pipe, Nudge())
    attnsteer.attach(pipe, Nudge()).detach()


def test_detaching_what_was_never_attached_or_twice_is_refused() -> None:
    pipe = pipelines.build("sd15")
    with pytest.raises(SteeringError, match="Nothing is attached to this StableDiffusionPipeline"):
        attnsteer.detach(pipe)
    steering = attnsteer.attach(pipe, Nudge())
    attnsteer.detach(pipe)
    with pytest.raises(SteeringError, match="not attached any more"):
        steering.detach()
    with attnsteer.steer(pipe, Nudge()) as steering:
        steering.detach()  # leaving the block afterwards is no error


def test_a_model_without_attention_and_things_that_are_no_models_are_refused() -> None:
    with pytest.raises(SteeringError, match="AutoencoderTiny has no attention that attnsteer can reach"):
        attnsteer.sites(diffusers.AutoencoderTiny())
    with pytest.raises(SteeringError, match="no attention"):
        attnsteer.attach(diffusers.AutoencoderTiny(), Nudge())
    for thing in (torch.nn.Linear(2, 2), "runwayml/sd", None):
        with pytest.raises(SteeringError, match=r"cannot be steered: give a Diffusers pipeline"):
            attnsteer.attach(thing, Nudge())
    model, _ = denoisers.build("sd3")
    with pytest.raises(SteeringError, match="Nothing to attach"):
        attnsteer.attach(model)
    with pytest.raises(SteeringError, match="is not an attnsteer processor"):
        attnsteer.attach(model, diffusers.models.attention_processor.AttnProcessor2_0())


def test_guidance_on_a_bare_denoiser_needs_a_scheduler() -> None:
    model, inputs = denoisers.build("sd3")
    before = state_of(model)
    with pytest.raises(SteeringError, match=r"SoftPAG guides where the scheduler steps.*pass scheduler="):
        attnsteer.attach(model, SoftPAG(Where(layers=0)))
    assert difference(before, state_of(model)) == []
    with torch.no_grad():
        predict(model, inputs(1))


@pytest.mark.parametrize("method", [SoftPAG(Where(layers=-1)), Nudge(Where(layers=-1))])
def test_a_cache_that_skips_attention_is_refused_at_attach_and_when_it_comes_later(method: Any) -> None:
    pipe = pipelines.build("flux")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(SteeringError, match=r"FluxTransformer2DModel has a cache.*disable_cache\(\)"):
        attnsteer.attach(pipe, method)
    pipe.transformer.disable_cache()
    plain = latents(pipe, "flux")
    with attnsteer.steer(pipe, method):
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(SteeringError, match="disable_cache"):
            latents(pipe, "flux")
        pipe.transformer.disable_cache()
        assert not torch.equal(latents(pipe, "flux"), plain)
    assert torch.equal(latents(pipe, "flux"), plain)


def test_steps_that_never_come_are_refused() -> None:
    pipe = pipelines.build("sd15")
    with pytest.raises(SteeringError, match="is a phase of language models"):
        attnsteer.attach(pipe, SoftPAG(Where(steps="prefill")))
    for steps in ([100], slice(50, 60), (0.34, 0.5)):
        with (
            attnsteer.steer(pipe, SoftPAG(Where(steps=steps))),
            pytest.raises(WhereError, match="positions are 0 to 2"),
        ):
            latents(pipe, "sd15", steps=3)


def test_arguments_that_would_be_ignored_are_refused() -> None:
    pipe = pipelines.build("sd15")
    method = SoftPAG(Where(layers=-1))
    with pytest.raises(SteeringError, match="a pipeline brings its own"):
        attnsteer.attach(pipe, method, scheduler=pipe.scheduler)
    with pytest.raises(SteeringError, match="processor= is for language models"):
        attnsteer.attach(pipe, method, processor=object())
    with pytest.raises(SteeringError, match="SoftPAG object is given twice"):
        attnsteer.attach(pipe, method, method)


def test_edits_that_do_not_compose_are_refused_at_attach() -> None:
    @dataclass(frozen=True)
    class Last(Processor):
        def plan(self, site: Any, heads: Any) -> attnsteer.KeyBias:
            return attnsteer.KeyBias(torch.ones(1, 1, 3), queries="last")

    pipe = pipelines.build("sd15")
    with pytest.raises(SteeringError, match="do not compose at one site"):
        attnsteer.attach(pipe, Last(Where(layers=-1)), SoftPAG(Where(layers=-1), target="mean_query"))


def test_a_family_without_descriptor_is_guided_only_where_the_order_of_its_batch_is_told() -> None:
    model, _ = denoisers.build("cogview4")
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(SteeringError, match="pass cfg="):
        attnsteer.attach(model, SoftPAG(), scheduler=scheduler)
    attnsteer.attach(model, SoftPAG(), scheduler=scheduler, cfg=("uncond", "cond")).detach()


def test_two_pipelines_do_not_share_one_scheduler_while_steered() -> None:
    first, second = pipelines.build("sd15"), pipelines.build("sd15", seed=1)
    second.scheduler = first.scheduler
    before = state_of(scheduler=first.scheduler)
    taken = pytest.raises(SteeringError, match="This DDIMScheduler is steered already")
    with attnsteer.steer(first, SoftPAG(Where(layers=-1))), taken:
        attnsteer.attach(second, SoftPAG(Where(layers=-1)))
    assert not difference(before, state_of(scheduler=first.scheduler))


def test_a_pipeline_that_shares_a_steered_denoiser_says_so() -> None:
    """Guidance happens where the first one's scheduler steps; the second one's would be lost without a word."""
    first = pipelines.build("sd15")
    second = type(first)(**first.components, requires_safety_checker=False)
    second.scheduler = diffusers.DDIMScheduler.from_config(first.scheduler.config)
    with attnsteer.steer(first, SoftPAG(Where(layers=-1))):
        with pytest.raises(NotReachedError, match="the attached scheduler made no step"):
            latents(second, "sd15", steps=4)
        assert attached_to(second) is not None
    latents(second, "sd15")


def test_all_reasons_are_given_at_once() -> None:
    model, _ = denoisers.build("flux")
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(SteeringError) as error:
        attnsteer.attach(model, SoftPAG(Where(layers=-1)))
    assert len(error.value.reasons) == 2
    assert "disable_cache" in str(error.value)
    assert "scheduler=" in str(error.value)


def test_a_replaced_denoiser_of_the_same_architecture_is_steered_and_the_old_one_is_clean() -> None:
    pipe = pipelines.build("sd15")
    old, new = pipe.unet, denoisers.build("unet_sd15", seed=1)[0]
    before = state_of(old, new)
    pipe.unet = new
    with attnsteer.steer(pipe, PAG(Where(layers=-1))):
        expected = latents(pipe, "sd15")
    pipe.unet = old
    with attnsteer.steer(pipe, PAG(Where(layers=-1))):
        first = latents(pipe, "sd15")
        pipe.unet = new
        assert torch.equal(latents(pipe, "sd15"), expected)
        pipe.unet = old
        assert torch.equal(latents(pipe, "sd15"), first)
        pipe.unet = new
    assert difference(before, state_of(old, new)) == []


def test_a_replaced_denoiser_of_another_architecture_is_refused() -> None:
    pipe = pipelines.build("sd15")
    old, new = pipe.unet, denoisers.build("unet_sdxl")[0]
    before = state_of(old, new, scheduler=pipe.scheduler)
    with attnsteer.steer(pipe, PAG(Where(layers="down_blocks.0*attn1"))):
        pipe.unet = new
        with pytest.raises(SteeringError, match="The denoiser was replaced after attaching"):
            latents(pipe, "sd15")
    pipe.unet = old
    assert {k for k in difference(before, state_of(old, new, scheduler=pipe.scheduler)) if k != "rng"} == set()


def test_a_step_without_a_call_of_the_denoiser_is_an_error() -> None:
    pipe = pipelines.build("sd15")
    x = torch.zeros(1, 4, 6, 10)
    with attnsteer.steer(pipe, PAG(Where(layers=-1))):
        pipe.scheduler.set_timesteps(2)
        with pytest.raises(NotReachedError, match="the denoiser was not called through attnsteer in this step"):
            pipe.scheduler.step(x, pipe.scheduler.timesteps[0], x)


def test_a_pipeline_that_reshapes_the_prediction_is_refused() -> None:
    pipe = pipelines.build("sd3")
    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1))), torch.no_grad():
        given = denoisers.build("sd3")[1](1)
        pipe.scheduler.set_timesteps(2)
        prediction = predict(pipe.transformer, given)
        with pytest.raises(SteeringError, match="a pipeline that reshapes in between"):
            pipe.scheduler.step(prediction.flatten(2), pipe.scheduler.timesteps[0], torch.zeros(1, 4, 60))


def test_own_value_at_cross_attention_is_refused_with_the_numbers() -> None:
    class Wrong(Nudge):
        kinds = ("cross",)

    model, inputs = denoisers.build("unet_sd15")
    with (
        attnsteer.steer(model, Wrong(Where(layers="down_blocks.0*attn2"))),
        torch.no_grad(),
        pytest.raises(SteeringError, match="60 queries and 7 keys"),
    ):
        model(**inputs(1))
    assert not any("_steer" in m.__dict__ for m in model.modules())
