"""SEG: its blur against the authors' recipe, its limits, and the engine's grids."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnsteer
from attnsteer.attend import attend
from attnsteer.edits import BlurredQuery, MeanQuery, Mix
from attnsteer.errors import SteeringError
from attnsteer.processors import SEG
from attnsteer.site import AttentionCall, Site, Spans
from attnsteer.where import Where
from tests.calls import make_call
from tests.tiny import pipelines

SITE = Site("attn1", "self", 0, 0, 6, 2, 8)
HEADS = tuple(range(6))


def recipe(call: AttentionCall, sigma: float) -> Tensor:
    """Square grids only: the 2-D depthwise convolution with reflect padding, then ordinary attention."""
    batch, heads, n, dim = call.q.shape
    side = math.isqrt(n)
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    size = min(size, side - (side % 2 - 1))
    x = torch.linspace(-(size - 1) / 2, (size - 1) / 2, size).double()
    line = torch.exp(-0.5 * (x / sigma) ** 2)
    line = line / line.sum()
    plane = (line[:, None] * line)[None, None].expand(heads * dim, 1, size, size)
    q = call.q.transpose(2, 3).reshape(batch, heads * dim, side, side)
    q = F.conv2d(F.pad(q, (size // 2,) * 4, mode="reflect"), plane, groups=heads * dim)
    return call.kernel(q.reshape(batch, heads, dim, n).transpose(2, 3), call.k, call.v)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("side", [4, 5, 8])
def test_the_blur_of_square_grids_is_the_authors(side, sigma):
    spans = Spans(slice(0, side**2), slice(0, 0), (1, side, side))
    call = make_call(n_q=side**2, kind="self", spans=spans, batch=2)
    out = attend(call, [SEG(sigma=sigma).plan(SITE, HEADS)])
    torch.testing.assert_close(out, recipe(call, sigma), atol=1e-12, rtol=0)


def test_infinite_sigma_gives_every_query_the_same_output():
    call = make_call(kind="self")
    out = attend(call, [SEG().plan(SITE, HEADS)])
    assert torch.equal(out, out[:, :, :1].expand_as(out))
    mean = call.q.mean(2, keepdim=True).expand_as(call.q)
    torch.testing.assert_close(out, call.kernel(mean, call.k, call.v), atol=1e-12, rtol=0)


def test_text_rows_of_joint_attention_stay():
    call = make_call(spans=Spans(slice(1, 13), slice(0, 1), (1, 3, 4)))
    for sigma in (1.0, math.inf):
        out = attend(call, [SEG(sigma=sigma).plan(SITE, HEADS)])
        assert torch.equal(out[:, :, :1], call.output[:, :, :1])
        assert not torch.allclose(out[:, :, 1:], call.output[:, :, 1:])


def test_strength_mixes_with_the_plain_output():
    call = make_call(kind="self")
    whole, half = (attend(call, [SEG(strength=u).plan(SITE, HEADS)]) for u in (1.0, 0.5))
    torch.testing.assert_close(half, (whole + call.output) / 2, atol=1e-12, rtol=0)


def test_the_plan():
    edit = SEG(sigma=2.0, strength=0.5).plan(SITE, (3,))
    assert isinstance(edit, Mix)
    assert (edit.target, edit.tokens) == (BlurredQuery(2.0), "image")
    assert edit.weight.tolist() == [[0, 0, 0, 0.5, 0, 0]]
    assert SEG().plan(SITE, (3,)).target == MeanQuery("image")
    assert SEG(scale=2.0).guidance(500) == 2.0


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_pipelines_know_their_grid(family):
    pipe = pipelines.build(family)

    def latents(*methods: SEG) -> Tensor:
        kwargs = pipelines.call_kwargs(family, batch=1, cfg=False, steps=2) | {"output_type": "latent"}
        if not methods:
            return pipe(**kwargs).images
        with attnsteer.steer(pipe, *methods):
            return pipe(**kwargs).images

    plain, tiny, small, mean = (
        latents(*methods)
        for methods in (
            (),
            (SEG(Where(layers=-1), sigma=1e-4),),
            (SEG(Where(layers=-1), sigma=0.7),),
            (SEG(Where(layers=-1)),),
        )
    )
    torch.testing.assert_close(tiny, plain, atol=1e-4, rtol=0)
    assert (small - plain).abs().max() > 1e-4
    assert (mean - small).abs().max() > 1e-4


def test_bad_parameters_are_named():
    for bad in ({"sigma": -1.0}, {"sigma": math.nan}, {"sigma": "inf"}, {"scale": math.inf}, {"strength": 2}):
        with pytest.raises(SteeringError, match=next(iter(bad))):
            SEG(**bad)
    assert SEG(sigma=0.0).inert
    assert SEG(scale=0.0).inert
    assert SEG(strength=0.0).inert
    assert not SEG().inert
