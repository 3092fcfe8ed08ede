"""PAG against diffusers' own processors and pipelines, which replace whole layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import pytest
import torch
from diffusers import StableDiffusion3PAGPipeline, StableDiffusionPAGPipeline
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
)

import attnsteer
from attnsteer.binding import ATTRIBUTE, Binding
from attnsteer.edits import Edit, Mix
from attnsteer.errors import SteeringError
from attnsteer.hosts import diffusers_seam
from attnsteer.processors import PAG, SoftPAG
from attnsteer.site import Site, Spans
from attnsteer.where import Where
from tests.engine.common import to_double
from tests.tiny import pipelines


@contextmanager
def bound(module: Attention, site: Site, edit: Edit, spans: Spans | None = None) -> Iterator[None]:
    """The module steered by one edit."""
    diffusers_seam.arm([module])
    setattr(module, ATTRIBUTE, Binding(site, edits=(edit,), spans=spans))
    try:
        yield
    finally:
        delattr(module, ATTRIBUTE)
        diffusers_seam.disarm()


def rows(edit: Edit, pattern: list[int]) -> Mix:
    """The edit of one row on some rows of a batch."""
    assert isinstance(edit, Mix)
    return Mix(edit.target, edit.weight * torch.tensor(pattern)[:, None], edit.tokens)


@pytest.mark.parametrize("method", [PAG(), SoftPAG(strength=1.0), PAG(variant="image_logit")], ids=repr)
@pytest.mark.parametrize("cfg", [False, True])
@torch.no_grad()
def test_unet_self_attention_equals_the_processor_of_diffusers(method, cfg):
    module = Attention(query_dim=20, heads=5, dim_head=4).double().eval()
    x = torch.randn(6, 13, 20).double()
    module.set_processor(PAGCFGIdentitySelfAttnProcessor2_0() if cfg else PAGIdentitySelfAttnProcessor2_0())
    expected = module(x)
    module.set_processor(AttnProcessor2_0())
    site = Site("attn1", "self", 0, 0, 5, 5, 4)
    perturbed = [0, 0, 0, 0, 1, 1] if cfg else [0, 0, 0, 1, 1, 1]
    with bound(module, site, rows(method.plan(site, tuple(range(5))), perturbed)):
        torch.testing.assert_close(module(x), expected, atol=1e-13, rtol=0)


@torch.no_grad()
def test_joint_attention_with_text_logits_equals_the_processor_of_diffusers():
    module = Attention(
        query_dim=20, added_kv_proj_dim=20, heads=5, dim_head=4, context_pre_only=False, bias=True, out_dim=20
    )
    module = module.double().eval()
    x, text = torch.randn(6, 11, 20).double(), torch.randn(6, 3, 20).double()
    module.set_processor(PAGJointAttnProcessor2_0())
    expected = module(x, encoder_hidden_states=text)
    module.set_processor(JointAttnProcessor2_0())
    site = Site("attn", "joint", 0, 0, 5, 5, 4, ("image", "text"))
    edit = rows(PAG(variant="image_logit").plan(site, tuple(range(5))), [0, 0, 0, 1, 1, 1])
    with bound(module, site, edit, Spans(slice(0, 11), slice(11, 14))):
        for got, wanted in zip(module(x, encoder_hidden_states=text), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-13, rtol=0)


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize(
    ("family", "upstream", "layers", "where", "variant"),
    [
        ("sd15", StableDiffusionPAGPipeline, "mid", "mid_block*attn1", "full"),
        ("sd3", StableDiffusion3PAGPipeline, r"blocks.1", "transformer_blocks.1.attn", "image_logit"),
    ],
)
def test_whole_pipelines_equal_those_of_diffusers(family, upstream, layers, where, variant, cfg):
    pipe = to_double(pipelines.build(family))
    kwargs = pipelines.call_kwargs(family, batch=1, cfg=cfg, steps=3) | {"output_type": "latent"}
    taken = signature(upstream).parameters
    parts = {part: value for part, value in pipe.components.items() if part in taken}
    theirs = upstream(**parts, pag_applied_layers=[layers])
    names = (
        "prompt",
        "negative_prompt",
        "height",
        "width",
        "guidance_scale",
        "num_inference_steps",
        "max_sequence_length",
    )
    given = {name: kwargs[name] for name in names if name in kwargs}
    for adaptive, tolerance in ((0.0, 1e-10), (0.001, 1e-6)):  # they compute the adaptive scale in float32
        seeded = {"generator": torch.Generator().manual_seed(3), "output_type": "latent"}
        expected = theirs(**given, **seeded, pag_scale=2.0, pag_adaptive_scale=adaptive).images
        seeded["generator"] = torch.Generator().manual_seed(3)
        with attnsteer.steer(pipe, PAG(Where(layers=where), scale=2.0, adaptive_scale=adaptive, variant=variant)):
            steered = pipe(**given, **seeded).images
        plain = pipe(**given, **seeded | {"generator": torch.Generator().manual_seed(3)}).images
        torch.testing.assert_close(steered, expected, atol=tolerance, rtol=0)
        assert (steered - plain).abs().max() > 1e-3


def test_the_adaptive_scale_falls_with_the_timestep_and_stops_at_zero():
    method = PAG(scale=3.0, adaptive_scale=0.01)
    assert [method.guidance(t) for t in (1000, 900, 700, 600)] == [3.0, 2.0, 0.0, 0.0]
    assert PAG(scale=3.0).guidance(1) == 3.0


def test_pag_is_softpag_at_full_strength():
    site = Site("attn", "joint", 0, 0, 5, 5, 4)
    for variant in ("full", "image_logit", "image_only", "image_renorm"):
        one, other = (m.plan(site, (0, 2)) for m in (PAG(variant=variant), SoftPAG(strength=1.0, variant=variant)))
        assert isinstance(one, Mix)
        assert isinstance(other, Mix)
        assert (one.target, one.tokens, one.path) == (other.target, other.tokens, other.path)
        assert torch.equal(one.weight, other.weight)


def test_bad_parameters_are_named():
    for bad in ({"scale": -1.0}, {"adaptive_scale": float("nan")}, {"variant": "half"}):
        with pytest.raises(SteeringError, match=next(iter(bad))):
            PAG(**bad)
    assert PAG(scale=0.0).inert
    assert PAG().token_agnostic
    assert not PAG(variant="image_only").token_agnostic
