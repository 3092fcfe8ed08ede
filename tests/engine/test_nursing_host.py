"""Latent updates and what surrounds them: checkpointing, compilation, errors, own loops, refusals, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnsteer
from attnsteer import NotReachedError, SteeringError, Where
from attnsteer.nursing import LevelMaps, Moment, Slope, TokenMaps
from attnsteer.processors import AStar, Focus, SynGen
from tests.engine.common import denoiser_of, difference, quiet, state_of
from tests.nursed import WORDS, astar, generate
from tests.tiny import denoisers, pipelines


class Shapes(TorchDispatchMode):
    """The last two axes of every tensor with heads that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.dim() == 4:
                self.seen.add((x.shape[-2], x.shape[-1]))
        return out


@pytest.mark.parametrize(("name", "text"), [("sd3", 32), ("flux", 16)])
def test_no_map_of_joint_attention_is_made(name: str, text: int) -> None:
    pipe, method = pipelines.build(name), astar(name)
    with attnsteer.attach(pipe, method), Shapes() as shapes:
        generate(pipe, name, steps=1)
    image, joint = 15, 15 + text
    assert (joint, 8 if name == "sd3" else 16) in shapes.seen, "the mode saw the queries"
    assert not {(joint, joint), (image, joint), (image, image)} & shapes.seen


def test_only_the_layers_that_are_read_make_text_maps() -> None:
    pipe = pipelines.build("sd15")
    small = Where(layers=[0])
    with attnsteer.attach(pipe, astar("sd15", where=small)), Shapes() as shapes:
        generate(pipe, "sd15", steps=1)
    assert (60, 16) in shapes.seen
    with Shapes() as plain:
        generate(pipe, "sd15", steps=1)
    assert not {(60, 60), (60, 16)} & plain.seen
    assert (60, 60) not in shapes.seen


def test_the_dry_run_tells_the_gradient_pass() -> None:
    pipe = pipelines.build("sd3")
    told = attnsteer.explain(pipe, astar("sd3", where=Where(layers=[1])))
    assert "with gradient, up to transformer_blocks.1.attn" in told.extra
    assert attnsteer.explain(pipe, astar("sd3", scale_factor=0.0)).extra == "none"


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_gradient_checkpointing_inference_mode_and_compiled_blocks_give_the_same(name: str) -> None:
    pipe = pipelines.build(name)
    with attnsteer.attach(pipe, astar(name)):
        expected = generate(pipe, name)
        with torch.inference_mode():
            torch.testing.assert_close(generate(pipe, name), expected, rtol=1e-4, atol=1e-4)
        denoiser_of(pipe).enable_gradient_checkpointing()
        torch.testing.assert_close(generate(pipe, name), expected, rtol=1e-4, atol=1e-4)
        denoiser_of(pipe).disable_gradient_checkpointing()
    compiled = pipelines.build(name)
    denoiser_of(compiled).compile(backend="eager")
    with attnsteer.attach(compiled, astar(name)), quiet():
        torch.testing.assert_close(generate(compiled, name), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    pipe = pipelines.build(name)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)
    plain = generate(pipe, name, steps=1)
    with attnsteer.attach(pipe, astar(name)):
        steered = generate(pipe, name, steps=1)
    assert steered.dtype == plain.dtype
    assert torch.isfinite(steered).all()
    assert not torch.equal(steered, plain)


def test_offloaded_weights_come_and_go() -> None:
    from accelerate import cpu_offload

    pipe = pipelines.build("sd3")
    with attnsteer.attach(pipe, astar("sd3")):
        expected = generate(pipe, "sd3")
        cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
        assert torch.equal(generate(pipe, "sd3"), expected)
    assert {p.device.type for p in pipe.transformer.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["PNDM", "EulerAncestralDiscrete", "DPMSolverMultistep", "LCM", "DDPM"])
def test_schedulers_that_keep_the_sample_they_are_given(name: str) -> None:
    import diffusers

    pipe = pipelines.build("sd15")
    config = {**pipe.scheduler.config, "skip_prk_steps": True}
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
    plain = generate(pipe, "sd15", steps=3)
    with attnsteer.attach(pipe, astar("sd15")) as steering:
        steered = generate(pipe, "sd15", steps=3)
        assert steering.session._nurse.passes == len(pipe.scheduler.timesteps)
    assert torch.isfinite(steered).all()
    assert (steered - plain).abs().max() > 1e-3


def test_an_error_in_the_gradient_pass_leaves_the_model_as_it_was() -> None:
    pipe = pipelines.build("sd15")
    plain, before = generate(pipe, "sd15"), state_of(pipe.unet, scheduler=pipe.scheduler)

    @dataclass(frozen=True)
    class Broken(AStar):
        def loss(self, views: Any, memory: Any, moment: Any) -> Slope:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), attnsteer.attach(pipe, Broken(subjects=("dog",), level=0)):
        generate(pipe, "sd15")
    assert difference(before, state_of(pipe.unet, scheduler=pipe.scheduler)) == []
    assert torch.equal(generate(pipe, "sd15"), plain)


def test_an_own_loop_gives_positions_and_its_scheduler() -> None:
    model, inputs = denoisers.build("unet_sd15")
    scheduler = pipelines.build("sd15").scheduler
    scheduler.set_timesteps(2)
    given = inputs(1)

    def loop() -> Tensor:
        x = given["sample"]
        for t in scheduler.timesteps:
            with torch.no_grad():
                text = given["encoder_hidden_states"]
                out = model(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([text, text])).sample
            x = scheduler.step(out[1:], t, x).prev_sample
        return x

    plain = loop()
    with attnsteer.attach(model, AStar(tokens=((2,), (4, 5)), level=0), scheduler=scheduler):
        steered = loop()
    assert (steered - plain).abs().max() > 1e-3
    with pytest.raises(SteeringError, match="cannot find words without a pipeline's prompt"):
        attnsteer.attach(model, astar("sd15"), scheduler=scheduler)
    with pytest.raises(SteeringError, match="the latent that a scheduler steps"):
        attnsteer.attach(model, AStar(tokens=((2,), (4,)), level=0))


def test_another_scheduler_than_the_attached_one_is_noticed() -> None:
    model, inputs = denoisers.build("unet_sd15")
    attached = pipelines.build("sd15").scheduler
    attached.set_timesteps(5)
    other = [inputs(1, seed=seed) for seed in range(4)]
    with attnsteer.attach(model, AStar(tokens=((2,), (4,)), level=0), scheduler=attached), torch.no_grad():
        for given in other[:3]:
            model(**given)
        with pytest.raises(NotReachedError, match="attached scheduler made no step"):
            model(**other[3])


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_what_cannot_work_is_refused_with_every_reason() -> None:
    from diffusers import UniPCMultistepScheduler

    pipe = pipelines.build("sd15")
    with pytest.raises(SteeringError, match="AStar and SynGen both update the latent"):
        attnsteer.attach(pipe, astar("sd15"), SynGen(subjects=WORDS, level=0))
    with pytest.raises(SteeringError, match="level=2: this UNet has no cross-attention .* its levels are 0"):
        attnsteer.attach(pipe, AStar(subjects=("dog",)))
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(SteeringError, match="UniPCMultistepScheduler would lose the updates of AStar"):
        attnsteer.attach(pipe, astar("sd15"))
    with pytest.raises(SteeringError, match="where the words are in QwenImage|words are in QwenImage"):
        attnsteer.attach(pipelines.build("qwen"), AStar(subjects=("dog",)))
    with pytest.raises(SteeringError, match="no joint"):
        attnsteer.attach(pipelines.build("sd15"), Focus(subjects=WORDS))


def test_group_offloading_is_refused() -> None:
    pipe = pipelines.build("sd3")
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with pytest.raises(SteeringError, match="Group offloading"):
        attnsteer.attach(pipe, astar("sd3"))


def test_layers_of_different_sizes_are_refused_by_methods_that_want_one() -> None:
    maps = {0: LevelMaps(torch.rand(3, 4, 4), 1), 1: LevelMaps(torch.rand(3, 2, 2), 1)}
    with pytest.raises(SteeringError, match="2 x 2, 4 x 4"):
        AStar(tokens=((0,), (1,))).loss([TokenMaps(maps, (((0,),), ((1,),)))], None, Moment(0, 1))


def test_a_skipped_site_is_an_error() -> None:
    pipe = pipelines.build("sd3")
    block = pipe.transformer.transformer_blocks[1]
    block.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    with (
        pytest.raises(NotReachedError, match="1 selected sites were never reached"),
        attnsteer.attach(pipe, astar("sd3", where=Where(layers=[1]))),
    ):
        generate(pipe, "sd3")
