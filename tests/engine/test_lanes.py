"""Which rows of a batch are conditional: every layout of classifier-free guidance, several prompts and pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.lanes import Lane, cfg_lanes
from attnsteer.processors import SoftPAG
from tests.tiny import denoisers, pipelines

from .common import Reference, choice, latents, to_double


class OwnLoop(diffusers.DiffusionPipeline):
    """A pipeline with its own loop, which puts the parts of a guided batch in the order that it likes."""

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents: Tensor, text: dict[str, Tensor], order: tuple[str, ...], scale: float = 4.0) -> Tensor:
        self.scheduler.set_timesteps(2)
        for t in self.scheduler.timesteps:
            states = torch.cat([text[part] for part in order])
            noise = self.unet(torch.cat([latents] * len(order)), t, states).sample
            parts = dict(zip(order, noise.chunk(len(order)), strict=True))
            guided = parts["cond"]
            if "uncond" in parts:
                guided = parts["uncond"] + scale * (parts["cond"] - parts["uncond"])
            latents = self.scheduler.step(guided, t, latents).prev_sample
        return latents


def own_loop() -> tuple[OwnLoop, dict[str, Any]]:
    model, _ = denoisers.build("unet_sd15")
    noise = denoisers.Noise(1)
    text = {part: noise(2, denoisers.TEXT, 20).double() for part in ("cond", "uncond", "other")}
    return OwnLoop(model.double(), diffusers.DDIMScheduler()), {"latents": noise(2, 4, 6, 10).double(), "text": text}


def test_a_custom_order_gives_what_the_usual_order_gives() -> None:
    pipe, call = own_loop()
    method = SoftPAG(Where(layers=-1, heads=[1]))
    with attnsteer.steer(pipe, method):
        usual = pipe(**call, order=("uncond", "cond"))
        wrong = pipe(**call, order=("cond", "uncond"))  # cannot be told from the usual one by looking
    for order in [("cond", "uncond"), ("other", "cond", "uncond"), ("uncond", "other", "cond")]:
        with attnsteer.steer(pipe, method, cfg=order):
            torch.testing.assert_close(pipe(**call, order=order), usual, rtol=0, atol=1e-10)
    assert (wrong - usual).abs().max() > 1e-6


def test_no_guidance_is_one_conditional_lane_whatever_the_order() -> None:
    pipe, call = own_loop()
    method = SoftPAG(Where(layers=-1))
    results = []
    for cfg in (None, ("cond", "uncond"), ("uncond", "cond")):
        with attnsteer.steer(pipe, method, cfg=cfg):
            results.append(pipe(**call, order=("cond",)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], pipe(**call, order=("cond",)))


def test_a_batch_of_unknown_layout_is_refused_with_the_numbers_and_the_way_out() -> None:
    pipe, call = own_loop()
    plain = pipe(**call, order=("uncond", "other", "cond"))
    with attnsteer.steer(pipe, SoftPAG(Where(layers=-1))):
        with pytest.raises(SteeringError, match=r"6 rows for 2 latents.*2 or 4 rows.*cfg="):
            pipe(**call, order=("uncond", "other", "cond"))
        pipe(**call, order=("uncond", "cond"))
    assert torch.equal(pipe(**call, order=("uncond", "other", "cond")), plain)


@pytest.mark.parametrize("cfg", [("a", "b"), (), ("cond", "cond"), ("uncond", "x", "x", "cond")])
def test_an_order_that_makes_no_sense_is_refused_at_attach(cfg: tuple[str, ...]) -> None:
    pipe, _ = own_loop()
    with pytest.raises(SteeringError, match="is no order of a guided batch"):
        attnsteer.attach(pipe, SoftPAG(Where(layers=-1)), cfg=cfg)
    assert attnsteer.attach(pipe, SoftPAG(Where(layers=-1))).attached


def test_lanes_by_hand() -> None:
    assert cfg_lanes(4, 4, ("uncond", "cond")) == {"cond": Lane("cond", slice(0, 4))}
    assert cfg_lanes(4, 2, ("uncond", "cond")) == {
        "uncond": Lane("uncond", slice(0, 2)),
        "cond": Lane("cond", slice(2, 4)),
    }
    assert cfg_lanes(4, 2, ("cond", "uncond"))["cond"].rows == slice(0, 2)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "qwen", "pixart"])
@pytest.mark.parametrize("cfg", [True, False])
def test_several_prompts_and_several_pictures_of_each(name: str, cfg: bool) -> None:
    pipe = to_double(pipelines.build(name))
    where, strength = choice(pipe)
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(4)]  # noqa: E731
    options = {"batch": 2, "cfg": cfg, "steps": 2, "num_images_per_prompt": 2}
    reference = Reference(pipe, strength, w=2.0)
    expected = latents(pipe, name, **options, generator=generators())
    reference.remove()
    with attnsteer.steer(pipe, SoftPAG(where, strength=0.75, scale=2.0)) as steering:
        found = latents(pipe, name, **options, generator=generators())
        assert steering.session.extra_rows == 2 * 4
    assert expected.shape[0] == 4
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
