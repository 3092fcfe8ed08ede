"""Consistent and shared self-attention: their definitions in loops, what they draw, and whole models."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.attend import attend
from attnsteer.config import processor_from_dict
from attnsteer.draws import kept, uniform
from attnsteer.edits import KeyBias
from attnsteer.kernels import reference
from attnsteer.processors import AttendAndExcite, ConsistentSelfAttention, SharedSelfAttention
from attnsteer.site import AttentionCall
from attnsteer.stories import box_masks, to_grid
from tests.calls import call_of, repeated, rows_of, story_call
from tests.engine.common import each_story, latents, predict, to_double
from tests.tiny import denoisers, pipelines

EXACT = {"atol": 1e-12, "rtol": 0}
GRID = (1, 3, 5)
EVERY = Where(layers="all")
LAYERS = {"sd15": "up_blocks*.attn1", "sdxl": "up_blocks*.attn1", "sd3": slice(1, None), "flux": slice(1, None)}


def self_call(frames: int = 3, stories: int = 2, step: int = 4, **options: Any) -> AttentionCall:
    return story_call(frames * stories, GRID, step=step, **options)


def joint_call(frames: int = 3, stories: int = 2, text_first: bool = False, **options: Any) -> AttentionCall:
    return story_call(frames * stories, GRID, 7, text_first=text_first, step=4, **options)


def steered(call: AttentionCall, method: Any) -> Tensor:
    return attend(call, [method.react(call)])


def loop(call: AttentionCall, frames: int, key_sets: list[list[Tensor]], weight: Tensor) -> Tensor:
    """Picture i of each story attends to its own keys and to the tokens ``key_sets[i][j]`` of picture j.

    Args:
        weight: ``(frames,)``, the factor on foreign keys; 0 is plain.
    """
    out, values = call.output.clone(), repeated(call.v, call)
    span = slice(0, 15) if call.site.kind == "self" else call.spans.image
    image = torch.arange(call.q.shape[2])[span]
    for b in range(call.q.shape[0]):
        story, i = b - b % frames, b % frames
        if weight[i] == 0 or not any(len(s) for s in key_sets[i]):
            continue
        for h in range(3):
            for t in image.tolist():
                logits, vectors = [call.k[b, h] @ call.q[b, h, t] * call.softmax_scale], [values[b, h]]
                for j, tokens in enumerate(key_sets[i]):
                    places = image[tokens]
                    part = call.k[story + j, h, places] @ call.q[b, h, t] * call.softmax_scale
                    logits.append(part + weight[i].double().log())
                    vectors.append(values[story + j, h, places])
                out[b, h, t] = torch.softmax(torch.cat(logits), -1) @ torch.cat(vectors)
    return out


# ---- StoryDiffusion --------------------------------------------------------------------------------------------------
def csa_keys(method: ConsistentSelfAttention, step: int) -> tuple[list[list[Tensor]], Tensor]:
    """Drawn one by one, for 15 tokens and the site of the tests."""
    writers = method.writers or method.frames
    lent = [
        torch.tensor([t for t in range(15) if uniform(method.seed, step, 15, j, t) < method.rate], dtype=torch.long)
        for j in range(method.frames)
    ]
    none = torch.zeros(0, dtype=torch.long)
    sets = [[lent[j] if j != i and j < writers else none for j in range(method.frames)] for i in range(method.frames)]
    skip = method.skip[1] if step >= method.change else method.skip[0]
    coins = [uniform(method.seed, step, 0, max(0, i - writers + 1), 16) >= skip for i in range(method.frames)]
    return sets, torch.tensor([method.strength if coin else 0.0 for coin in coins])


CSA = [
    ConsistentSelfAttention(frames=3, skip=(0, 0)),
    ConsistentSelfAttention(frames=3, writers=1, skip=(0, 0), rate=0.3),
    ConsistentSelfAttention(frames=3, writers=2, skip=(0, 0), strength=0.5, seed=9),
    ConsistentSelfAttention(frames=2, skip=(0.6, 0.6), seed=2),
    ConsistentSelfAttention(frames=6, writers=2, skip=(0.5, 0.1), seed=3),
]


@pytest.mark.parametrize("make", [self_call, joint_call, lambda *a, **k: joint_call(*a, text_first=True, **k)])
@pytest.mark.parametrize("method", CSA, ids=str)
def test_the_definition_of_consistent_self_attention(method, make):
    call = make(method.frames, 6 // method.frames)
    sets, weight = csa_keys(method, 4)
    torch.testing.assert_close(steered(call, method), loop(call, method.frames, sets, weight), **EXACT)


def test_all_tokens_lent_and_no_coin_is_one_long_sequence():
    call = self_call(3, 1)
    out = steered(call, ConsistentSelfAttention(frames=3, rate=1.0, skip=(0, 0)))
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (call.q, call.k, call.v))
    torch.testing.assert_close(out, call_of(q, k, v).output[0].unflatten(1, (3, 15)).transpose(0, 1), **EXACT)


def test_equal_pictures_weigh_their_image_keys_once_for_each():
    """F equal rows of joint attention: image queries see every image key F times, text queries see one picture."""
    call = joint_call(1, 1)
    call = call_of(*(x.expand(3, -1, -1, -1).contiguous() for x in (call.q, call.k, call.v)), spans=call.spans)
    bias = torch.zeros(1, 1, 22).double()
    bias[..., :15] = torch.tensor(3.0).double().log()
    expected = attend(call, [KeyBias(bias)])
    expected[:, :, 15:] = call.output[:, :, 15:]
    out = steered(call, ConsistentSelfAttention(frames=3, rate=1.0, skip=(0, 0)))
    torch.testing.assert_close(out, expected, **EXACT)
    assert torch.equal(out[:, :, 15:], call.output[:, :, 15:])


def test_nothing_lent_is_the_baseline_bit_for_bit():
    call = self_call(3, dtype=torch.float32)
    for method in (
        ConsistentSelfAttention(frames=3, rate=0.0, skip=(0, 0)),
        ConsistentSelfAttention(frames=3, strength=0.0, skip=(0, 0)),
        ConsistentSelfAttention(frames=1, skip=(0, 0)),
        ConsistentSelfAttention(frames=3, skip=(1, 1)),
        SharedSelfAttention(frames=3, dropout=1.0),
        SharedSelfAttention(frames=3, strength=0.0),
        SharedSelfAttention(frames=1),
    ):
        assert method.inert
        assert torch.equal(steered(call, method), call.output)


def test_draws_are_of_the_step_and_the_resolution_and_coins_of_the_layer():
    method = ConsistentSelfAttention(frames=2, skip=(0.5, 0.5))
    edits = [method.react(self_call(2, step=s)) for s in range(40)]
    assert len({tuple(e.bias[0, 0].tolist()) for e in edits}) > 30
    assert {bool(e.weight.any()) for e in edits} == {True, False}
    other = self_call(2)
    other.site = replace(other.site, index=5)
    one, two = method.react(self_call(2)), method.react(other)
    assert torch.equal(one.bias, two.bias)  # one draw of tokens for all layers of a resolution
    coins = []
    for index in range(40):
        other.site = replace(other.site, index=index)
        coins.append(bool(method.react(other).weight.any()))
    assert 8 < sum(coins) < 32


def test_coins_change_with_the_step():
    shares = []
    for step in (19, 20):
        on = [ConsistentSelfAttention(frames=2, seed=s).react(self_call(2, step=step)).weight.any() for s in range(300)]
        shares.append(torch.stack(on).float().mean().item())
    assert abs(shares[0] - 0.7) < 0.08
    assert abs(shares[1] - 0.9) < 0.06


def test_draws_are_uniform_and_differ_by_key():
    u = uniform(0, torch.tensor(3), torch.arange(8)[:, None], torch.arange(4096))
    assert abs(u.mean().item() - 0.5) < 0.01
    assert abs(12 * u.var().item() - 1) < 0.02
    assert torch.corrcoef(u).fill_diagonal_(0).abs().max() < 0.06
    assert torch.equal(u[:, 7], uniform(0, 3, torch.arange(8), 7))
    assert kept(1.0, 0, torch.arange(99)).all()
    assert not kept(0.0, 0, torch.arange(99)).any()


# ---- ConsiStory ------------------------------------------------------------------------------------------------------
MASKS = box_masks([(0.0, 0.0, 0.6, 0.7), (0.4, 0.3, 1.0, 1.0)], (30, 50))


def sdsa_keys(method: SharedSelfAttention, step: int) -> list[list[Tensor]]:
    """Drawn one by one; the masks are those of the boxes, counted by hand."""
    by_hand = [[0, 1, 2, 5, 6, 7], [7, 8, 9, 12, 13, 14]]  # 3 x 5 tokens: rows 0-1, columns 0-2; rows 1-2, columns 2-4
    subjects = by_hand if method.masks is not None else [list(range(15))] * method.lenders
    remains = [
        torch.tensor([t for t in s if uniform(method.seed, step, 15, j, t) < 1 - method.dropout], dtype=torch.long)
        for j, s in enumerate(subjects)
    ]
    none = torch.zeros(0, dtype=torch.long)
    return [
        [remains[j] if j < method.lenders and j != i else none for j in range(method.frames)]
        for i in range(method.frames)
    ]


SDSA = [
    SharedSelfAttention(frames=3),
    SharedSelfAttention(frames=3, masks=MASKS, dropout=0.0),
    SharedSelfAttention(frames=3, masks=MASKS, seed=4),
    SharedSelfAttention(frames=3, anchors=None, strength=2.0),
    SharedSelfAttention(frames=2, masks=MASKS, strength=0.5),
]


@pytest.mark.parametrize("make", [self_call, joint_call])
@pytest.mark.parametrize("method", SDSA, ids=lambda m: f"{m.frames}-{m.anchors}-{m.dropout}-{m.masks is None}")
def test_the_definition_of_shared_self_attention(method, make):
    call = make(method.frames, 6 // method.frames)
    weight = torch.full((method.frames,), method.strength)
    expected = loop(call, method.frames, sdsa_keys(method, 4), weight)
    torch.testing.assert_close(steered(call, method), expected, **EXACT)


def test_the_number_of_keys_of_each_picture():
    """N + the remaining tokens of every other anchor."""
    method = SharedSelfAttention(frames=3, masks=MASKS, seed=4)
    call = self_call(3, 1)
    edit = method.react(call)
    sets = sdsa_keys(method, 4)
    for i in range(3):
        seen = sum(int((edit.bias[i, s] == 0).sum()) for s, j in enumerate(edit.source[i]) if j >= 0)
        assert seen == sum(map(len, sets[i]))
        assert i not in edit.source[i]


def test_rows_of_the_joint_softmax_sum_to_one():
    for method in (*CSA, *SDSA):
        call = self_call(method.frames, 6 // method.frames)
        ones = replace(call, v=torch.ones_like(call.v))
        torch.testing.assert_close(steered(ones, method), torch.ones_like(call.q), **EXACT)


# ---- promises --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [CSA[2], SDSA[2]], ids=lambda m: type(m).__name__)
def test_a_story_in_a_batch_equals_the_story_alone_and_stories_permute(method):
    call = self_call(3, 3, mask="keys_bool")
    together = steered(call, method)
    for story in range(3):
        alone = rows_of(call, slice(3 * story, 3 * story + 3))
        torch.testing.assert_close(together[3 * story : 3 * story + 3], steered(alone, method), **EXACT)
    order = [6, 7, 8, 0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(steered(rows_of(call, order), method), together[order], **EXACT)


@pytest.mark.parametrize("name", ["unet_sd15", "unet_sdxl", "sd3", "flux"])
@pytest.mark.parametrize("cls", [ConsistentSelfAttention, SharedSelfAttention])
def test_models_with_two_stories_equal_each_story_alone(name, cls):
    model, inputs = denoisers.build(name)
    method = cls(EVERY, frames=3, **({"skip": (0, 0)} if cls is ConsistentSelfAttention else {"masks": MASKS}))
    given = inputs(6)
    plain = predict(model, given)
    with attnsteer.steer(model, method):
        together = predict(model, given)
        torch.testing.assert_close(each_story(model, given, 3), together, atol=2e-5, rtol=2e-5)
    assert (together - plain).abs().max() > 1e-4
    assert torch.equal(predict(model, given), plain)
    with attnsteer.steer(model, replace(method, strength=0.0)):
        assert torch.equal(predict(model, given), plain)


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("cls", [ConsistentSelfAttention, SharedSelfAttention])
def test_pipelines_share_from_the_second_step_on_in_both_branches_of_guidance(name, cfg, cls):
    pipe = to_double(pipelines.build(name))
    method = cls(Where(LAYERS[name], steps=slice(1, None)), frames=2)
    plain = latents(pipe, name, batch=2, cfg=cfg)
    with attnsteer.steer(pipe, method):
        found = latents(pipe, name, batch=2, cfg=cfg)
        again = latents(pipe, name, batch=2, cfg=cfg)
    assert torch.equal(found, again)
    assert (found - plain).abs().max() > 1e-6
    assert torch.equal(latents(pipe, name, batch=2, cfg=cfg), plain)
    with attnsteer.steer(pipe, replace(method, where=Where(LAYERS[name], steps=[0]))):
        first = latents(pipe, name, batch=2, cfg=cfg)
    assert (first - found).abs().max() > 1e-9


def test_variants_of_one_batch_are_stories_with_one_processor_each():
    pipe = to_double(pipelines.build("sd15"))
    one, two = SharedSelfAttention(frames=2), ConsistentSelfAttention(frames=2, skip=(0, 0))
    with attnsteer.attach(pipe, variants=[one, one, two, two, None, None]):
        together = latents(pipe, "sd15", batch=6)
    plain = latents(pipe, "sd15", batch=6)
    assert torch.equal(together[4:], plain[4:])
    for rows, method in ((slice(0, 2), one), (slice(2, 4), two)):
        chosen = [method if rows.start <= i < rows.stop else None for i in range(6)]
        with attnsteer.attach(pipe, variants=chosen):
            alone = latents(pipe, "sd15", batch=6)
        torch.testing.assert_close(together[rows], alone[rows], atol=1e-9, rtol=1e-9)
        assert (alone[rows] - plain[rows]).abs().max() > 1e-6
    with attnsteer.attach(pipe, variants=[None, one, one, None]), pytest.raises(SteeringError, match="same processor"):
        latents(pipe, "sd15", batch=4)


def test_heads_are_chosen_like_everywhere():
    model, inputs = denoisers.build("unet_sd15")
    site = [s for s in attnsteer.sites(model) if s.kind == "self"][-1]
    seen: dict[str, Tensor] = {}
    hook = model.get_submodule(site.name).to_out[0].register_forward_pre_hook(lambda m, a: seen.update(x=a[0].clone()))
    predict(model, inputs(2))
    plain = seen["x"].unflatten(-1, (3, -1))
    with attnsteer.steer(model, SharedSelfAttention(Where(site.name, heads=[1]), frames=2)):
        predict(model, inputs(2))
    out = seen["x"].unflatten(-1, (3, -1))
    hook.remove()
    assert torch.equal(out[:, :, [0, 2]], plain[:, :, [0, 2]])
    assert not torch.equal(out[:, :, 1], plain[:, :, 1])


# ---- masks -----------------------------------------------------------------------------------------------------------
def test_masks_of_boxes_and_constant_masks_on_the_grid():
    found = to_grid(MASKS, GRID).nonzero()
    assert [found[found[:, 0] == j, 1].tolist() for j in range(2)] == [[0, 1, 2, 5, 6, 7], [7, 8, 9, 12, 13, 14]]
    constant = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    assert to_grid(constant, (2, 3, 5)).sum(1).tolist() == [0, 30]
    with pytest.raises(SteeringError, match="is no box"):
        box_masks([(0.5, 0, 0.4, 1)], (4, 4))


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cls", "bad", "message"),
    [
        (ConsistentSelfAttention, {"frames": 0}, "frames=0"),
        (ConsistentSelfAttention, {"frames": 2.0}, "frames=2.0"),
        (ConsistentSelfAttention, {"writers": 5}, "an int from 1 to 4"),
        (ConsistentSelfAttention, {"rate": 1.5}, "rate=1.5"),
        (ConsistentSelfAttention, {"skip": (0.1, 2)}, "two probabilities"),
        (ConsistentSelfAttention, {"strength": -1}, "strength=-1"),
        (ConsistentSelfAttention, {"seed": -1}, "seed=-1"),
        (SharedSelfAttention, {"anchors": 5}, "an int from 1 to 4"),
        (SharedSelfAttention, {"dropout": 2}, "dropout=2"),
        (SharedSelfAttention, {"masks": torch.ones(3, 4, 4)}, "a tensor of 2 masks"),
        (SharedSelfAttention, {"masks": torch.full((2, 4, 4), torch.nan)}, "not finite"),
    ],
    ids=str,
)
def test_bad_parameters_are_named(cls, bad, message):
    with pytest.raises(SteeringError, match=message):
        cls(**bad)


def test_what_cannot_share_is_refused():
    model, inputs = denoisers.build("unet_sd15")
    with (
        attnsteer.steer(model, SharedSelfAttention(EVERY, frames=2)),
        pytest.raises(SteeringError, match="no whole stories"),
    ):
        predict(model, inputs(3))
    pipe = pipelines.build("sd15")
    with pytest.raises(SteeringError, match="AttendAndExcite runs some rows alone"):
        attnsteer.attach(pipe, SharedSelfAttention(frames=2), AttendAndExcite(subjects=("dog", "car"), level=1))
    with pytest.raises(SteeringError, match="no site has that name"):
        attnsteer.attach(pipelines.build("sd3"), SharedSelfAttention(frames=2))
    with pytest.raises(SteeringError, match="no descriptor"):
        attnsteer.attach(denoisers.build("cogview4")[0], SharedSelfAttention(EVERY, frames=2))


def test_configurations_survive_json():
    for method in (ConsistentSelfAttention(frames=3, writers=2), SharedSelfAttention(frames=3)):
        assert processor_from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_masks_survive_saving(tmp_path):
    SharedSelfAttention(frames=2, masks=MASKS).save_pretrained(str(tmp_path))
    found = SharedSelfAttention.from_pretrained(str(tmp_path))
    assert torch.equal(found.masks, MASKS)
    assert found.frames == 2


def test_the_oracle_of_segments_agrees_with_the_loop():
    call = self_call(2, 1)
    edit = SharedSelfAttention(frames=2, masks=MASKS).react(call)
    expected = reference.segments(
        call.q, call.k, call.v, edit.source, edit.weight.expand(2, -1), bias=edit.bias, keys=edit.keys
    )
    torch.testing.assert_close(attend(call, [edit]), expected, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [ConsistentSelfAttention, SharedSelfAttention])
def test_one_graph_of_a_compiled_model_serves_all_steps(cls):
    pipe = pipelines.build("sd15")
    method = cls(EVERY, frames=2)
    with attnsteer.steer(pipe, method):
        expected = latents(pipe, "sd15", batch=2)
    graphs = CompileCounter()
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend=graphs)
    with attnsteer.steer(pipe, method):
        found = latents(pipe, "sd15", batch=2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("name", ["sd15", "flux"])
@pytest.mark.parametrize("method", [ConsistentSelfAttention, SharedSelfAttention])
def test_several_pictures_of_several_prompts_are_no_stories(method: Any, name: str) -> None:
    """Pipelines order them by prompt, [p1, p1, p2, p2], so blocks of rows would mix two stories."""
    pipe = pipelines.build(name)

    def pair(*prompts: str) -> Tensor:
        noise = {"generator": torch.Generator().manual_seed(0), "num_images_per_prompt": 2}
        return latents(pipe, name, batch=len(prompts), prompt=list(prompts), **noise)

    plain = pair("a dog")
    with attnsteer.steer(pipe, method(where=Where(layers=LAYERS[name]), frames=2)):
        with pytest.raises(SteeringError, match=f"stories of {method.__name__} are blocks of different prompts"):
            pair("a dog", "a car")
        one = pair("a dog")  # any two pictures of one prompt are a story
    assert (one != plain).flatten(1).any(1).all()
    assert not {"check_inputs", "encode_prompt"} & set(vars(pipe))
