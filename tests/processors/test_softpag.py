"""SoftPAG: what it asks for, its formula in loops, and its refusals."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from attnsteer.attend import attend
from attnsteer.config import processor_from_dict
from attnsteer.edits import ArgmaxValue, MeanQuery, MeanValue, Mix, OwnValue
from attnsteer.errors import SteeringError
from attnsteer.processors import PAG, SEG, SoftPAG
from attnsteer.site import Site, Spans
from attnsteer.where import Where
from tests.calls import explicit_map, make_call, repeated

SITE = Site("blocks.3.attn", "joint", 3, 3, 6, 2, 8)
SPANS = Spans(slice(0, 8), slice(8, 13), grid=(1, 2, 4))


def loop(method: SoftPAG, heads: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The fused output, and ``((1 - u) A + u A*) V`` of the chosen heads with A* by the paper's definitions."""
    call = make_call(spans=SPANS)
    edit = method.plan(SITE, heads)
    plain, v, image = explicit_map(call), repeated(call.v, call), 8
    out = (plain @ v).clone()
    u = float(torch.tensor(method.strength))
    for b in range(3):
        for h in heads:
            a = plain[b, h]
            target = torch.zeros(13, 13).double()
            query = {"all": slice(None), "image": slice(0, 8), "text": slice(8, 13)}[method.region]
            for i in range(13):
                if method.target == "uniform":
                    target[i] = 1 / 13
                elif method.target == "mean_query":
                    mean = call.q[b, h, query].mean(0)
                    target[i] = torch.softmax(mean @ call.k[b, h // 3].T / 8**0.5, -1)
                elif method.target == "argmax":
                    target[i, a[i].argmax()] = 1
                elif i >= image and method.variant != "full":
                    target[i] = a[i]
                elif method.variant == "image_logit":
                    kept = torch.tensor([j == i or j >= image for j in range(13)])
                    target[i] = a[i] * kept / (a[i] * kept).sum()
                elif method.variant == "image_renorm":
                    target[i, image:] = a[i, image:]
                    target[i, i] = a[i, :image].sum()
                else:
                    target[i, i] = 1
            out[b, h] = ((1 - u) * a + u * target) @ v[b, h]
    return attend(call, [edit]), out


@pytest.mark.parametrize(
    "method",
    [
        SoftPAG(strength=0.3),
        SoftPAG(strength=1.0),
        SoftPAG(variant="image_logit"),
        SoftPAG(variant="image_only"),
        SoftPAG(variant="image_renorm", strength=0.7),
        SoftPAG(target="uniform"),
        SoftPAG(target="mean_query"),
        SoftPAG(target="mean_query", region="image"),
        SoftPAG(target="mean_query", region="text"),
        SoftPAG(target="argmax"),
    ],
    ids=repr,
)
def test_the_formula_of_the_paper(method):
    fused, expected = loop(method, (0, 4, 5))
    torch.testing.assert_close(fused, expected, atol=1e-12, rtol=0)


def test_the_plan_has_the_strength_on_the_chosen_heads_alone():
    edit = SoftPAG(strength=0.25).plan(SITE, (1, 5))
    assert isinstance(edit, Mix)
    assert edit.weight.tolist() == [[0, 0.25, 0, 0, 0, 0.25]]
    assert edit.weight.dtype == torch.float32
    assert (edit.target, edit.tokens, edit.path) == (OwnValue(), "all", "linear")


@pytest.mark.parametrize(
    ("method", "target", "tokens"),
    [
        (SoftPAG(variant="image_only"), OwnValue(), "image"),
        (SoftPAG(variant="image_logit"), OwnValue("logit"), "image"),
        (SoftPAG(variant="image_renorm"), OwnValue("renorm"), "image"),
        (SoftPAG(target="uniform"), MeanValue(), "all"),
        (SoftPAG(target="uniform", variant="image_only"), MeanValue(), "image"),
        (SoftPAG(target="mean_query", region="text"), MeanQuery("text"), "all"),
        (SoftPAG(target="argmax"), ArgmaxValue(), "all"),
    ],
    ids=repr,
)
def test_parameters_become_words_of_the_vocabulary(method, target, tokens):
    edit = method.plan(SITE, (0,))
    assert (edit.target, edit.tokens) == (target, tokens)


@pytest.mark.parametrize("path", ["chord", "slerp", "log_linear"])
def test_paths_meet_the_linear_one_at_both_ends(path):
    call = make_call()
    heads = tuple(range(6))
    nearly = attend(call, [SoftPAG(strength=1e-6, path=path).plan(SITE, heads)])
    torch.testing.assert_close(nearly, call.output, atol=1e-2 if path == "chord" else 1e-4, rtol=0)
    full = attend(call, [SoftPAG(strength=1.0, path=path).plan(SITE, heads)])
    torch.testing.assert_close(full, repeated(call.v, call), atol=1e-4 if path == "log_linear" else 1e-12, rtol=0)


def test_strength_or_scale_zero_is_inert():
    assert SoftPAG(strength=0.0).inert
    assert SoftPAG(scale=0.0).inert
    assert not SoftPAG().inert
    call = make_call(dtype=torch.float32)
    edit = SoftPAG(strength=0.0).plan(SITE, (0, 1))
    assert torch.equal(attend(call, [edit]), call.output)


def test_which_parameters_need_to_know_the_tokens():
    assert SoftPAG().token_agnostic
    assert SoftPAG(target="uniform").token_agnostic
    assert SoftPAG(target="mean_query").token_agnostic
    assert not SoftPAG(target="mean_query", region="image").token_agnostic
    assert not any(SoftPAG(variant=v).token_agnostic for v in ("image_logit", "image_only", "image_renorm"))


def test_on_image_only_sites_all_variants_are_one():
    call = make_call(kind="self")
    plain = attend(call, [SoftPAG().plan(SITE, (0, 3))])
    for variant in ("image_logit", "image_only", "image_renorm"):
        out = attend(call, [SoftPAG(variant=variant).plan(SITE, (0, 3))])
        torch.testing.assert_close(out, plain, atol=1e-15, rtol=0)


def test_it_guides_with_a_constant_scale_in_a_perturbed_lane():
    assert SoftPAG(scale=2.5).guidance(900.0) == 2.5
    assert SoftPAG.lanes == PAG.lanes == SEG.lanes == ("perturbed",)
    assert SoftPAG.kinds[0] == "joint"  # SD 3.5 has layers with a joint and an image-only site


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"strength": 1.5}, "strength=1.5"),
        ({"strength": True}, "strength=True"),
        ({"scale": -1}, "scale=-1"),
        ({"variant": "text_only"}, "'image_logit', 'image_only'"),
        ({"target": "zero"}, "'uniform', 'mean_query', 'argmax'"),
        ({"path": "straight"}, "'chord', 'slerp'"),
        ({"target": "uniform", "variant": "image_logit"}, "target='identity' only"),
        ({"target": "uniform", "path": "chord"}, "path='chord' is defined for"),
        ({"variant": "image_renorm", "path": "slerp"}, "path='slerp' is defined for"),
        ({"region": "text"}, "region='text' is defined for"),
    ],
    ids=str,
)
def test_bad_parameters_are_named(bad, message):
    with pytest.raises(SteeringError, match=message):
        SoftPAG(**bad)


def test_every_reason_is_given_at_once():
    with pytest.raises(SteeringError) as caught:
        SoftPAG(target="uniform", variant="image_logit", path="chord", region="text")
    assert len(caught.value.reasons) == 3


@pytest.mark.parametrize(
    "method", [SoftPAG(Where(layers=[1, 2], heads={1: [0]}), target="argmax"), PAG(), SEG()], ids=repr
)
def test_configurations_survive_json(method):
    assert processor_from_dict(json.loads(json.dumps(method.to_dict()))) == method
