"""IR-Diffusion: its definition in loops on pasted maps, the oracles of its description, and whole models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attnsteer.attend import attend
from attnsteer.draws import uniform
from attnsteer.layouts import disjoint, isolation_table, nearest, packed, reposition
from attnsteer.processors import IRDiffusion
from attnsteer.site import AttentionCall, Spans
from attnsteer.stories import box_masks
from tests.calls import call_of, make_call, repeated, story_call

EXACT = {"atol": 1e-12, "rtol": 0}
H, W = 5, 7
N, TEXT = H * W, 6
SIZE = (H, W)
REFERENCES = box_masks([(0.0, 0.0, 0.45, 0.5), (0.3, 0.2, 1.0, 1.0)], SIZE)  # the first grows, the second shrinks
REFERENCES[0, 0, 0] = REFERENCES[1, 2, 4] = False  # no rectangles
SCENE = box_masks([(0.0, 0.0, 0.6, 1.0), (0.6, 0.0, 1.0, 0.6)], SIZE)
SCENE[1, 2, 5] = False
SMALL = (
    box_masks([(0.0, 0.0, 0.6, 0.7), (0.2, 0.3, 1.0, 1.0)], (9, 15)),
    box_masks([(0.0, 0.0, 0.4, 1.0), (0.6, 0.3, 1.0, 1.0)], (9, 15)),
)
"""References and scene for the tiny models, whose grid is 3 x 5."""


def method(**options: Any) -> IRDiffusion:
    return IRDiffusion(**{"references": REFERENCES, "scene": SCENE, "start_layer": 0, **options})


def self_call(stories: int = 2, step: int = 3, **options: Any) -> AttentionCall:
    return story_call(3 * stories, (1, H, W), step=step, **options)


def joint_call(stories: int = 2, text_first: bool = False, **options: Any) -> AttentionCall:
    return story_call(3 * stories, (1, H, W), TEXT, text_first=text_first, step=3, **options)


def cross_call(stories: int = 2, **options: Any) -> AttentionCall:
    spans = Spans(slice(0, 0), slice(0, None), (1, H, W))
    return make_call(batch=3 * stories, heads=3, kv_heads=3, n_q=N, n_k=TEXT, kind="cross", spans=spans, **options)


def steered(call: AttentionCall, how: IRDiffusion) -> Tensor:
    return attend(call, how.react(call))


# ---- the definition --------------------------------------------------------------------------------------------------
def pasted(keys: Tensor, reference: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Features ``(N, C)`` of the reference, masked, resized from box to box, pasted into zeros; and the mask alike."""
    picture = (keys * reference.flatten()[:, None]).T.unflatten(1, (H, W))  # (C, H, W)

    def box(mask: Tensor) -> tuple[slice, slice]:
        at = mask.nonzero()
        return slice(int(at[:, 0].min()), int(at[:, 0].max()) + 1), slice(int(at[:, 1].min()), int(at[:, 1].max()) + 1)

    source, place = box(reference), box(target)
    size = (place[0].stop - place[0].start, place[1].stop - place[1].start)
    out, mask = torch.zeros_like(picture), torch.zeros(H, W)
    out[:, place[0], place[1]] = F.interpolate(picture[None, :, source[0], source[1]], size, mode="nearest")[0]
    mask[place] = F.interpolate(reference[None, None, source[0], source[1]].float(), size, mode="nearest")[0, 0]
    return out.flatten(1).T, mask.flatten() > 0


def gates(how: IRDiffusion, step: int) -> Tensor:
    """The queries of each subject that take part, drawn one by one."""
    rows = [[uniform(how.seed, step, N, i, t) < 1 - how.dropout for t in range(N)] for i in range(2)]
    gate = SCENE.flatten(1) & torch.tensor(rows)
    return torch.where(gate.any(1, keepdim=True), gate, SCENE.flatten(1))


def loop(call: AttentionCall, how: IRDiffusion, step: int = 3) -> Tensor:
    """Section by section: one explicit softmax over (S + 1) N keys for each query of each scene."""
    out, values = call.output.clone(), repeated(call.v, call)
    image = slice(0, N) if call.site.kind == "self" else call.spans.image
    offset, scale = image.start, call.softmax_scale
    gate, owner = gates(how, step), SCENE.flatten(1)
    for scene in range(2, call.q.shape[0], 3):
        for h in range(3):
            logits = scale * call.q[scene, h] @ call.k[scene, h].T
            if how.isolate:
                for a in range(2):
                    for b in range(2):
                        if a != b:
                            hidden = torch.zeros(logits.shape, dtype=torch.bool)
                            hidden[image, image] = owner[a][:, None] & owner[b]
                            logits[hidden] = -math.inf
            parts, vectors = [], []
            for i in range(2 if how.start_layer is not None else 0):
                key, there = pasted(call.k[scene - 2 + i, h, image], REFERENCES[i], SCENE[i])
                value, _ = pasted(values[scene - 2 + i, h, image], REFERENCES[i], SCENE[i])
                block = scale * call.q[scene, h] @ key.T + how.reference_bias
                visible = torch.zeros(call.q.shape[2], dtype=torch.bool)
                visible[offset : offset + N] = gate[i]
                parts.append(block.masked_fill(~(visible[:, None] & there), -math.inf))
                vectors.append(value)
            joint = torch.softmax(torch.cat([*parts, logits], 1), 1)
            out[scene, h] = joint @ torch.cat([*vectors, values[scene, h]])
    return out


METHODS = [
    method(),
    method(isolate=False),
    method(start_layer=None),
    method(dropout=0.0, reference_bias=-0.7),
    method(dropout=0.9, seed=5, reference_bias=1.3),
    method(dropout=0.99999),
]


@pytest.mark.parametrize("make", [self_call, joint_call, lambda: joint_call(text_first=True)])
@pytest.mark.parametrize("how", METHODS, ids=lambda m: f"{m.isolate}-{m.start_layer}-{m.dropout}-{m.reference_bias}")
def test_isolation_and_reposition_equal_pasted_maps(how, make):
    call = make()
    out = steered(call, how)
    torch.testing.assert_close(out, loop(call, how), **EXACT)
    references = [b for b in range(6) if b % 3 != 2]
    assert torch.equal(out[references], call.output[references])


def test_keys_on_rotary_models_are_turned_to_where_they_are_pasted():
    """Unrotated keys pasted by hand, then rotated at their new places."""
    angle = (torch.arange(N + TEXT)[:, None] * torch.tensor([1.0, 0.6, 0.3, 0.1])).repeat_interleave(2, dim=1).double()
    cos, sin = angle.cos(), angle.sin()

    def rotate(x: Tensor, at: Tensor) -> Tensor:
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos[at] + torch.stack([-imaginary, real], -1).flatten(-2) * sin[at]

    raw, every = joint_call(1, text_first=True), torch.arange(N + TEXT)
    spans = replace(raw.spans, rotary=(cos, sin))
    call = call_of(rotate(raw.q, every), rotate(raw.k, every), raw.v, spans=spans)
    call.site, call.step = replace(call.site, rotary="pairs"), torch.tensor(3)
    how = method(isolate=False, mutual=0.0)
    image, gate = every[TEXT:], gates(how, 3)
    expected = call.output.clone()
    for h in range(3):
        parts, vectors = [call.q[2, h] @ call.k[2, h].T], [call.v[2, h]]
        for i in range(2):
            key, there = pasted(raw.k[i, h, image], REFERENCES[i], SCENE[i])
            value, _ = pasted(raw.v[i, h, image], REFERENCES[i], SCENE[i])
            block = call.q[2, h] @ rotate(key, image).T
            visible = torch.zeros(N + TEXT, dtype=torch.bool)
            visible[TEXT:] = gate[i]
            parts.append(block.masked_fill(~(visible[:, None] & there), -math.inf))
            vectors.append(value)
        expected[2, h] = torch.softmax(call.softmax_scale * torch.cat(parts, 1), 1) @ torch.cat(vectors)
    torch.testing.assert_close(steered(call, how), expected, **EXACT)


@pytest.mark.parametrize("mutual", [0.9, 0.25, 1.0])
def test_mutual_cross_attention_equals_the_blend_after_an_affine_projection(mutual):
    """The authors blend behind ``to_out``; weights that sum to 1 make it the same before it."""
    call, how = cross_call(), method(mutual=mutual)
    out, values = steered(call, how), repeated(call.v, call)
    project, shift = torch.randn(24, 24).double(), torch.randn(24).double()

    def to_out(x: Tensor) -> Tensor:
        return x.transpose(-2, -3).flatten(-2) @ project + shift

    l = float(torch.tensor(mutual))  # noqa: E741 - the paper's letter
    target = SCENE.flatten(1).double()
    for scene in (2, 5):
        plain = to_out(call.output[scene])
        mixed = torch.zeros_like(plain)
        for i in range(2):
            weights = torch.softmax(call.softmax_scale * call.q[scene] @ call.k[scene - 2 + i].mT, -1)
            mixed += target[i][:, None] * to_out(weights @ values[scene - 2 + i])
        mixed = mixed / (target.sum(0)[:, None] + 1e-8)
        expected = torch.where(target.sum(0)[:, None] > 0, (1 - l) * plain + l * mixed, plain)
        torch.testing.assert_close(to_out(out[scene]), expected, atol=1e-6, rtol=0)
        outside = target.sum(0) == 0
        assert torch.equal(out[scene][:, outside], call.output[scene][:, outside])
    assert torch.equal(out[[0, 1, 3, 4]], call.output[[0, 1, 3, 4]])


# ---- oracles of the description --------------------------------------------------------------------------------------
def test_a_scene_without_subjects_is_the_baseline_bit_for_bit():
    empty = method(scene=torch.zeros(2, H, W))
    assert empty.inert
    for call in (self_call(dtype=torch.float32), joint_call(dtype=torch.float32), cross_call(dtype=torch.float32)):
        assert torch.equal(steered(call, empty), call.output)
    gone = method(references=torch.zeros(2, H, W), isolate=False)
    call = self_call(dtype=torch.float32)
    assert torch.equal(steered(call, gone), call.output)


def test_one_subject_isolates_nothing_and_mutual_zero_changes_no_cross_attention():
    call = make_call(batch=4, n_q=N, kind="self", spans=Spans(slice(0, N), slice(0, 0), (1, H, W)), dtype=torch.float32)
    one = method(references=REFERENCES[:1], scene=SCENE[:1], start_layer=None)
    assert one.react(call) == ()
    text = cross_call(dtype=torch.float32)
    assert torch.equal(steered(text, method(mutual=0.0)), text.output)


def test_rows_of_the_joint_softmax_sum_to_one():
    for how in METHODS:
        call = self_call()
        ones = replace(call, v=torch.ones_like(call.v))
        torch.testing.assert_close(steered(ones, how), torch.ones_like(call.q), **EXACT)


def test_the_gather_by_hand():
    assert nearest(4, 7).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert nearest(5, 3).tolist() == [0, 1, 3]
    assert nearest(26, 22)[11] == 12  # in integers it would be 13
    reference, target = torch.zeros(10, 12, dtype=torch.bool), torch.zeros(10, 12, dtype=torch.bool)
    reference[1:5, 2:7] = target[2:9, 4:7] = True
    source, places = reposition(reference, target)
    assert len(source) == len(places) == 21
    assert places[0] == 2 * 12 + 4
    assert source[:3].tolist() == [1 * 12 + 2, 1 * 12 + 3, 1 * 12 + 5]  # two columns are dropped
    keys, bias, where = packed([(source, places)], turned=False)
    assert where is None
    times = {int(k): round(math.exp(b)) for k, b in zip(keys[0, 0], bias[0, 0], strict=True)}
    assert times == {(1 + r) * 12 + 2 + c: m for r, m in enumerate((2, 2, 2, 1)) for c in (0, 1, 3)}


def test_copies_of_a_key_are_a_log_bias():
    """One own key and one reference key with logit 0, pasted 3 times: weights 0.25 and 0.75."""
    keys, bias, _ = packed([(torch.tensor([4, 4, 4]), torch.tensor([0, 1, 2]))], turned=False)
    assert keys.tolist() == [[[4]]]
    weights = torch.softmax(torch.cat([torch.zeros(1), bias.flatten()]), 0)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75]).double())


def test_without_rotary_positions_the_place_of_pasted_keys_does_not_matter():
    call, how = self_call(), method(isolate=False, dropout=0.0)
    plain, edit = steered(call, how), how.react(call)[0]
    laid = [reposition(r, t) for r, t in zip(REFERENCES, SCENE, strict=True)]
    keys, bias, _ = packed(laid, turned=True)
    for order in (torch.arange(keys.shape[-1]), torch.randperm(keys.shape[-1])):
        moved = replace(edit, keys=keys[..., order], bias=bias[..., order])
        torch.testing.assert_close(attend(call, [moved]), plain, **EXACT)


def test_classes_of_isolation():
    token = torch.tensor([1, 1, 2, 0])
    allowed = isolation_table(2)[token][:, token]
    assert allowed[0].tolist() == [True, True, False, True]
    assert allowed[2].tolist() == [False, False, True, True]
    assert allowed[3].all()


def test_the_smallest_subject_keeps_shared_tokens():
    masks = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0]]).bool()
    assert disjoint(masks).int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]


def test_the_dropout_is_of_the_step_and_the_resolution_alone():
    how = method()
    edits = [how.react(self_call(step=s))[1] for s in (0, 0, 1)]
    assert torch.equal(edits[0].queries, edits[1].queries)
    assert not torch.equal(edits[0].queries, edits[2].queries)
    other = self_call(step=0)
    other.site = replace(other.site, layer=9, index=9)
    assert torch.equal(how.react(other)[1].queries, edits[0].queries)
    late = method(start_step=2)
    assert not late.react(self_call(step=1))[1].weight.any()
    assert late.react(self_call(step=2))[1].weight.all()
