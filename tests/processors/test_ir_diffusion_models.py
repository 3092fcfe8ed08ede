"""IR-Diffusion in batches, models and pipelines: what it promises, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.attend import attend
from attnsteer.processors import AttendAndExcite, IRDiffusion, SharedSelfAttention
from attnsteer.site import AttentionCall
from tests.calls import rows_of
from tests.engine.common import each_story, latents, predict, to_double
from tests.tiny import denoisers, pipelines

from .test_ir_diffusion import (
    EXACT,
    REFERENCES,
    SCENE,
    SMALL,
    H,
    W,
    cross_call,
    joint_call,
    method,
    self_call,
    steered,
)


# ---- promises --------------------------------------------------------------------------------------------------------
def test_a_story_in_a_batch_equals_the_story_alone():
    for make in (self_call, joint_call, cross_call):
        call = make(2)
        together = steered(call, method())
        for story in range(2):
            alone = rows_of(call, slice(3 * story, 3 * story + 3))
            torch.testing.assert_close(together[3 * story : 3 * story + 3], steered(alone, method()), **EXACT)


@pytest.mark.parametrize("name", ["unet_sd15", "unet_sdxl", "sd3", "flux"])
def test_models_with_two_stories(name):
    model, inputs = denoisers.build(name)
    mutual = 0.9 if name.startswith("unet") else 0.0
    how = method(references=SMALL[0], scene=SMALL[1], mutual=mutual, start_layer=1)
    given = inputs(6)
    plain = predict(model, given)
    with attnsteer.steer(model, how) as steering:
        kinds = {site.kind for site in steering.selections[0]}
        together = predict(model, given)
        torch.testing.assert_close(each_story(model, given, 3), together, atol=2e-5, rtol=2e-5)
    assert kinds == ({"self", "cross"} if name.startswith("unet") else {"joint"})
    assert torch.equal(together[[0, 1, 3, 4]], plain[[0, 1, 3, 4]])
    assert (together[[2, 5]] - plain[[2, 5]]).abs().max() > 1e-3
    assert torch.equal(predict(model, given), plain)


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_pipelines_change_the_scene_alone(name, cfg):
    pipe = to_double(pipelines.build(name))
    mutual = 0.9 if name.startswith("sd1") or name == "sdxl" else 0.0
    how = method(references=SMALL[0], scene=SMALL[1], mutual=mutual, start_layer=0)
    plain = latents(pipe, name, batch=3, cfg=cfg)
    with attnsteer.steer(pipe, how):
        found = latents(pipe, name, batch=3, cfg=cfg)
    assert torch.equal(found[:2], plain[:2])
    assert (found[2] - plain[2]).abs().max() > 1e-4
    assert torch.equal(latents(pipe, name, batch=3, cfg=cfg), plain)


def test_rotary_positions_of_flux_are_those_of_its_ids():
    """On a 3 x 5 grid a subject that stays where it is has the keys of its reference, bit for bit in place."""
    model, inputs = denoisers.build("flux")
    mask = SMALL[1][:1]
    seen = {}

    class Looks(IRDiffusion):
        def react(self, call: AttentionCall) -> Any:
            edits = super().react(call)
            from attnsteer.segments import _moved, _take_keys

            keys = edits[-1].keys[:, 0]
            plain = _take_keys(call.k[:1], keys)
            seen[call.site.name] = (plain, _moved(call, plain, keys, edits[-1].positions[:, 0]))
            return edits

    how = Looks(references=mask, scene=mask, mutual=0.0, start_layer=0)
    with attnsteer.steer(model, how):
        predict(model, inputs(2))
    assert len(seen) == 5
    for plain, moved in seen.values():
        torch.testing.assert_close(moved, plain, atol=1e-5, rtol=1e-5)


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"references": None}, "references=None"),
        ({"scene": torch.zeros(3, H, W)}, "a tensor of 2 masks"),
        ({"scene": torch.ones(2, H, W)}, "overlap"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"mutual": 1.5}, "mutual=1.5"),
        ({"start_layer": -1}, "start_layer=-1"),
        ({"start_step": None}, "start_step=None"),
        ({"reference_bias": math.inf}, "reference_bias=inf"),
    ],
    ids=str,
)
def test_bad_parameters_are_named(bad, message):
    with pytest.raises(SteeringError, match=message):
        method(**bad)


def test_where_it_cannot_act_it_says_why():
    how = method(references=SMALL[0], scene=SMALL[1])
    with pytest.raises(SteeringError, match="mutual=0"):
        attnsteer.attach(pipelines.build("sd3"), how)
    with pytest.raises(SteeringError, match="rotary positions are unknown"):
        attnsteer.attach(pipelines.build("qwen"), replace(how, mutual=0.0))
    pipe = pipelines.build("sd15")
    with pytest.raises(SteeringError, match="start_layer=36 does not exist"):
        attnsteer.attach(pipe, replace(how, start_layer=36))
    with pytest.raises(SteeringError, match="some rows alone"):
        attnsteer.attach(pipe, how, AttendAndExcite(subjects=("dog", "car"), level=1))
    with attnsteer.steer(pipe, how), pytest.raises(SteeringError, match="no whole stories of 3"):
        latents(pipe, "sd15", batch=2)
    with attnsteer.steer(pipe, how), pytest.raises(SteeringError, match="stories of IRDiffusion are blocks"):
        latents(pipe, "sd15", batch=3, num_images_per_prompt=2)


def test_all_attention_of_the_chosen_layers_takes_part():
    """SD 3.5 has layers with an image-only attention beside the joint one: subjects would meet there."""
    how = method(references=SMALL[0], scene=SMALL[1], mutual=0.0)
    model, inputs = denoisers.build("sd35")
    with attnsteer.steer(model, how) as steering:
        chosen = {site.name for site in steering.selections[0]}
        assert "tensor of shape (2, 9, 15)" in str(steering.explain())
        predict(model, inputs(3))
    assert chosen == {site.name for site in attnsteer.sites(model)}
    some = replace(how, where=Where(layers=[1, 2], heads=[0, 2]), mutual=0.5)
    with attnsteer.steer(denoisers.build("unet_sdxl")[0], some) as steering:
        found = {(site.layer, site.kind): heads for site, heads in steering.selections[0].items()}
    assert found == {(layer, kind): (0, 2) for layer in (1, 2) for kind in ("self", "cross")}


def test_it_goes_together_with_other_sharing_in_one_softmax():
    call = self_call(1)
    how, other = method(), SharedSelfAttention(frames=3, anchors=1, dropout=0.0)
    both = attend(call, (*how.react(call), other.react(call)))
    assert not torch.equal(both[2], steered(call, how)[2])
    ones = replace(call, v=torch.ones_like(call.v))
    out = attend(ones, (*how.react(ones), other.react(ones)))
    torch.testing.assert_close(out, torch.ones_like(out), **EXACT)


def test_masks_survive_saving(tmp_path):
    method(seed=3).save_pretrained(str(tmp_path))
    found = IRDiffusion.from_pretrained(str(tmp_path))
    assert torch.equal(found.references, REFERENCES)
    assert torch.equal(found.scene, SCENE)
    assert found == method(seed=3)
