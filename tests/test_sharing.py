"""Edits that read other rows: fused against explicit maps and loops; what they and class masks promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from attnsteer.attend import attend
from attnsteer.classes import TokenClasses
from attnsteer.edits import (
    ClassMask,
    Edit,
    KeyBias,
    MeanQuery,
    MeanValue,
    Mix,
    OwnValue,
    RowKeys,
    Scale,
    Segments,
    restrict,
    stack_rows,
)
from attnsteer.errors import SteeringError
from attnsteer.kernels import reference
from attnsteer.logits import additive
from attnsteer.site import AttentionCall, Spans

from .calls import LargestTensor, call_of, classes_of, explicit_map, make_call, repeated, rows_of, untouched
from .test_attend import refused

EXACT = {"atol": 1e-12, "rtol": 0}
SOURCE = ((1, 2), (-1, -1), (0, 3), (3, -1))
"""Rows of two sources, of one (its own keys again), and of none."""
KEY_MASKS = ("none", "keys_bool", "keys_float")


def share(call: AttentionCall, picked: bool = True) -> Segments:
    """Segments with everything: two sources, weights with a zero, hidden and repeated keys, gated queries."""
    weight = torch.rand(4, 6) + 0.5
    weight[0, 0] = 0
    if not picked:
        return Segments(SOURCE, weight)
    bias = torch.randn(4, 2, 5)
    bias[0, 0, 2] = -torch.inf
    return Segments(
        SOURCE, weight, bias, torch.randint(0, call.k.shape[2], (4, 2, 5)), torch.rand(4, 2, call.q.shape[2]) > 0.4
    )


def explicit(call: AttentionCall, edit: Segments, mask: Tensor | None = None) -> Tensor:
    return reference.segments(
        call.q,
        call.k,
        call.v,
        edit.source,
        edit.weight,
        bias=edit.bias,
        keys=edit.keys,
        queries=edit.queries,
        mask=call.mask if mask is None else mask,
        lent_mask=call.mask,
        scale=call.scale,
    )


# ---- Segments --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", KEY_MASKS)
@pytest.mark.parametrize("picked", [True, False], ids=["picked", "whole"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3)])
def test_segments_equal_one_softmax_over_all_keys(mask, picked, heads, kv_heads):
    call = make_call(batch=4, heads=heads, kv_heads=kv_heads, mask=mask, dim=5, dim_v=7, scale=0.4)
    edit = share(call, picked)
    edit = Segments(edit.source, edit.weight[:, :heads], edit.bias, edit.keys, edit.queries)
    out = attend(call, [edit])
    torch.testing.assert_close(out, explicit(call, edit), **EXACT)
    assert torch.equal(out[1], call.output[1])
    assert torch.equal(out[0, 0], call.output[0, 0])


def test_segments_by_hand():
    """One query, one own key with logit 0; a reference key with logit 0 copied 3 times: weights 0.25 and 0.75."""
    q, k = torch.zeros(2, 1, 1, 4).double(), torch.randn(2, 1, 1, 4).double()
    call = call_of(q, k, torch.tensor([1.0, 5.0]).double().view(2, 1, 1, 1), kind="self")
    expected = torch.tensor(0.25 * 1 + 0.75 * 5).double()
    copies = Segments(((1,), (-1,)), torch.ones(1, 1), keys=torch.zeros(2, 1, 3, dtype=torch.long))
    biased = Segments(((1,), (-1,)), torch.ones(1, 1), bias=torch.full((2, 1, 1), math.log(3), dtype=torch.float64))
    weighed = Segments(((1,), (-1,)), torch.full((1, 1), 3.0))
    for edit in (copies, biased, weighed):
        out = attend(call, [edit])
        torch.testing.assert_close(out[0, 0, 0, 0], expected, **EXACT)
        assert torch.equal(out[1], call.output[1])


def test_queries_outside_a_segment_keep_their_bits():
    call = make_call(batch=4, dtype=torch.float32)
    edit = share(call)
    out = attend(call, [edit])
    for b in range(4):
        live = torch.stack([edit.queries[b, s] for s in range(2) if SOURCE[b][s] >= 0] or [torch.zeros(13).bool()])
        for i in range(13):
            same = torch.equal(out[b, 1:, i], call.output[b, 1:, i])
            assert same != bool(live[:, i].any())


@pytest.mark.parametrize("mask", KEY_MASKS)
def test_segments_come_after_masks_and_biases_and_before_mixes(mask):
    call = make_call(batch=4, mask=mask)
    edit, classes, bias = share(call), classes_of(4, 13), torch.randn(4, 6, 13).double()
    own = torch.where(
        reference.class_mask(classes.table, classes.q_class, classes.k_class), bias[:, :, None], -math.inf
    )
    own = own if call.mask is None else own + additive(call.mask, torch.float64)
    expected = 2 * torch.lerp(explicit(call, edit, own), repeated(call.v, call), 0.25)
    edits: list[Edit] = [
        Scale(torch.full((1, 6), 2.0)),
        Mix(OwnValue(), torch.full((1, 6), 0.25)),
        edit,
        KeyBias(bias),
        ClassMask(classes, torch.ones(1, 6)),
    ]
    for order in (edits, edits[::-1]):
        torch.testing.assert_close(attend(call, order), expected, **EXACT)


def test_several_segments_share_one_softmax():
    call = make_call(batch=4)
    one, two = torch.full((4, 6), 0.7), torch.full((4, 6), 0.7)
    both = attend(call, [Segments(SOURCE, one)])
    first = tuple((entry[0],) for entry in SOURCE)
    second = tuple((entry[1],) for entry in SOURCE)
    torch.testing.assert_close(attend(call, [Segments(first, one), Segments(second, two)]), both, **EXACT)


def test_all_rows_as_one_sequence():
    """Every row reads all others: one sequence of F * N tokens."""
    call = make_call(batch=3, heads=3, kv_heads=3)
    edit = Segments(((1, 2), (0, 2), (0, 1)), torch.ones(1, 3))
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (call.q, call.k, call.v))
    joint = call_of(q, k, v).output[0].unflatten(1, (3, 13)).transpose(0, 1)
    torch.testing.assert_close(attend(call, [edit]), joint, **EXACT)


def test_moved_keys_equal_keys_that_were_rotated_there():
    n, dim = 13, 8
    angle = (torch.arange(n)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])).repeat_interleave(2, dim=1).double()
    rotary = (angle.cos(), angle.sin())

    def rotate(x: Tensor, places: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for c in range(0, dim, 2):
            cos, sin = angle[places, c].cos(), angle[places, c].sin()
            out[..., c] = x[..., c] * cos - x[..., c + 1] * sin
            out[..., c + 1] = x[..., c + 1] * cos + x[..., c] * sin
        return out

    raw = make_call(batch=2, heads=3, kv_heads=3, n_q=n, dim=dim)
    every = torch.arange(n)
    keys, places = torch.tensor([3, 3, 7, 12]), torch.tensor([0, 5, 6, 11])
    call = call_of(
        rotate(raw.q, every), rotate(raw.k, every), raw.v, spans=Spans(slice(0, 8), slice(8, 13), None, rotary)
    )
    edit = Segments(((1,), (-1,)), torch.ones(1, 3), keys=keys.view(1, 1, 4), positions=places.view(1, 1, 4))
    k = torch.cat([call.k[0], rotate(raw.k[1][:, keys], places)], dim=1)
    v = torch.cat([call.v[0], call.v[1][:, keys]], dim=1)
    expected = torch.softmax(call.q[0] @ k.mT * dim**-0.5, -1) @ v
    torch.testing.assert_close(attend(call, [edit])[0], expected, **EXACT)
    assert "rotary positions" in refused(raw, edit)


# ---- RowKeys ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", KEY_MASKS)
def test_row_keys_blend_the_attentions_to_other_rows(mask):
    call = make_call(batch=4, n_q=13, n_k=7, kind="cross", mask=mask)
    weight, amount = torch.rand(4, 6), torch.rand(4, 2, 13) * (torch.rand(4, 2, 13) > 0.4)
    out = attend(call, [Mix(RowKeys(SOURCE, amount), weight)])
    values = repeated(call.v, call)
    expected = explicit_map(call) @ values
    for b in range(4):
        for h in range(6):
            for i in range(13):
                total = sum(amount[b, s, i].double() for s in range(2) if SOURCE[b][s] >= 0)
                if total == 0:
                    assert torch.equal(out[b, h, i], call.output[b, h, i])
                    continue
                blend = torch.zeros(8).double()
                for s, j in enumerate(SOURCE[b]):
                    if j >= 0:
                        logits = call.softmax_scale * call.k[j, h // 3] @ call.q[b, h, i]
                        logits = logits if call.mask is None else logits + additive(call.mask[j, 0, 0], logits.dtype)
                        blend += amount[b, s, i] / total * (torch.softmax(logits, -1) @ values[j, h])
                u = weight[b, h].double()
                expected[b, h, i] = (1 - u) * expected[b, h, i] + u * blend
    torch.testing.assert_close(out, expected, **EXACT)


def test_what_rows_lend_is_not_biased():
    call = make_call(batch=4, n_k=7, kind="cross")
    mix, bias = Mix(RowKeys(SOURCE, torch.ones(1, 2, 13)), torch.full((1, 6), 0.5)), KeyBias(torch.randn(1, 6, 7))
    target = 2 * attend(call, [mix]) - call.output
    biased = attend(call, [bias])
    expected = torch.lerp(biased, target, 0.5)
    expected[1] = biased[1]
    torch.testing.assert_close(attend(call, [bias, mix]), expected, **EXACT)


def test_masks_of_different_rows_go_together_and_of_one_row_do_not():
    call, one, two = make_call(batch=4), classes_of(4, 13), classes_of(4, 13)
    first = torch.tensor([1.0, 1, 0, 0])[:, None].expand(-1, 6)
    out = attend(call, [ClassMask(one, first), ClassMask(two, 1 - first), edit := share(call)])
    alone = [attend(call, [ClassMask(c, torch.ones(1, 6)), edit]) for c in (one, two)]
    torch.testing.assert_close(out[:2], alone[0][:2], **EXACT)
    torch.testing.assert_close(out[2:], alone[1][2:], **EXACT)
    assert "Two ClassMasks" in refused(call, ClassMask(one, first), ClassMask(two, first))


# ---- promises --------------------------------------------------------------------------------------------------------
def all_edits(call: AttentionCall) -> list[Edit]:
    return [
        share(call),
        share(call, picked=False),
        Mix(RowKeys(SOURCE, torch.rand(4, 2, 13)), torch.rand(4, 6)),
        ClassMask(classes_of(4, 13), torch.ones(4, 6)),
    ]


NAMES = ["picked", "whole", "row-keys", "class-mask"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", range(4), ids=NAMES)
def test_weight_zero_and_unselected_heads_keep_every_bit(which, dtype):
    call = make_call(batch=4, dtype=dtype)
    call.v[0, 0, 0] = -0.0
    edit = all_edits(call)[which]
    nothing = attend(call, [restrict(edit, torch.zeros(4, 6, dtype=torch.bool))])
    assert torch.equal(nothing.view(torch.int8), call.output.view(torch.int8))
    chosen = torch.zeros(4, 6, dtype=torch.bool)
    chosen[0, 1:] = chosen[2] = True
    out = attend(call, [restrict(edit, chosen)])
    assert out.dtype == dtype
    for b, h in ((0, 0), (1, 0), (3, 5)):
        assert torch.equal(out[b, h].view(torch.int8), call.output[b, h].view(torch.int8))
    assert not torch.equal(out[2], call.output[2])


def test_no_source_is_the_output_itself():
    call = make_call(batch=2)
    assert attend(call, [Segments(((-1,), (-1,)), torch.ones(1, 6))]) is call.output
    assert attend(call, [Segments(((), ()), torch.ones(1, 6))]) is call.output


def test_a_group_of_rows_equals_its_solo_run():
    """Rows 0-1 and 2-3 are two stories."""
    call = make_call(batch=4, dtype=torch.float32, mask="keys_float")
    source, weight = ((1,), (0,), (3,), (2,)), torch.rand(4, 6) + 0.1
    classes, amount = classes_of(4, 13), torch.rand(4, 1, 13)
    together = attend(
        call, [Segments(source, weight), ClassMask(classes, weight), Mix(RowKeys(source, amount), weight / 2)]
    )
    for rows in (slice(0, 2), slice(2, 4)):
        own = TokenClasses(classes.table, classes.q_class[rows], classes.k_class[rows])
        alone = attend(
            rows_of(call, rows),
            [
                Segments(((1,), (0,)), weight[rows]),
                ClassMask(own, weight[rows]),
                Mix(RowKeys(((1,), (0,)), amount[rows]), weight[rows] / 2),
            ],
        )
        torch.testing.assert_close(together[rows], alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("which", range(3), ids=NAMES[:3])
def test_rows_permute(which):
    call, order = make_call(batch=4), [2, 0, 3, 1]
    edit = all_edits(call)[which]
    source = tuple(tuple(-1 if j < 0 else order.index(j) for j in SOURCE[b]) for b in order)
    moved = call_of(call.q[order], call.k[order], call.v[order])
    if isinstance(edit, Segments):
        parts = [None if x is None else x[order] for x in (edit.bias, edit.keys, edit.queries)]
        shuffled: Edit = Segments(source, edit.weight[order], *parts)
    else:
        shuffled = Mix(RowKeys(source, edit.target.share[order]), edit.weight[order])
    torch.testing.assert_close(attend(moved, [shuffled]), attend(call, [edit])[order], **EXACT)


@pytest.mark.parametrize("which", range(4), ids=NAMES)
def test_nothing_is_written_into_tensors_of_others(which):
    call = make_call(batch=4, mask="keys_bool")
    with untouched([call.q, call.k, call.v, call.mask, call.output]):
        attend(call, [all_edits(call)[which]])


@pytest.mark.parametrize("which", range(4), ids=NAMES)
def test_no_map_is_allocated(which):
    n = 311
    call = make_call(batch=2, heads=2, kv_heads=1, n_q=n, dim=16, dtype=torch.float32)
    source, one = ((1, 1), (0, 0)), torch.ones(1, 2)
    edits: list[Edit] = [
        Segments(source, one, torch.zeros(2, 2, n)),
        Segments(source, one),
        Mix(RowKeys(source, torch.ones(1, 2, n)), one / 2),
        ClassMask(classes_of(2, n), one),
    ]
    with LargestTensor() as largest:
        attend(call, [edits[which]])
    assert largest.numel <= 2 * 2 * 2 * n * 16  # the outputs of two parts stacked
    assert largest.numel < 2 * 2 * n * n / 2


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_refusals_say_why():
    call, one = make_call(batch=4), torch.ones(1, 6)
    assert "has 2 rows" in refused(call, Segments(((1,), (0,)), one))
    assert "lengths [1, 2]" in refused(call, Segments(((1,), (0,), (0,), (0, 1)), one))
    assert "reads row 4" in refused(call, Segments(((4,), (0,), (0,), (0,)), one))
    assert "Segments.bias has shape (4, 2, 5)" in refused(call, Segments(SOURCE, one, torch.zeros(4, 2, 5)))
    assert "Segments.queries has shape" in refused(call, Segments(SOURCE, one, queries=torch.ones(4, 2, 5) > 0))
    assert "per query or causal" in refused(make_call(batch=4, mask="full_bool"), Segments(SOURCE, one))
    assert "per query or causal" in refused(make_call(batch=4, mask="causal"), Segments(SOURCE, one))
    assert "RowKeys.share has shape" in refused(call, Mix(RowKeys(SOURCE, torch.ones(4, 3, 13)), one))
    assert "RowKeys.source has 2 rows" in refused(call, Mix(RowKeys(((1,), (0,)), torch.ones(1, 1, 13)), one))
    assert "is causal" in refused(make_call(batch=4, mask="causal"), ClassMask(classes_of(4, 13), one))
    assert "ClassMask has classes" in refused(call, ClassMask(classes_of(4, 12), one))
    assert "do not compose" in refused(call, ClassMask(classes_of(4, 13), one), Mix(MeanQuery(), one))
    assert "do not compose" in refused(call, ClassMask(classes_of(4, 13), one), Mix(MeanValue(), one))
    assert "do not compose" in refused(call, Segments(SOURCE, one), Mix(OwnValue(), one, path="chord"))
    assert "do not compose" in refused(call, Segments(SOURCE, one), KeyBias(torch.ones(1, 1, 13), "last"))
    with pytest.raises(SteeringError, match="react"):
        stack_rows([[Segments(SOURCE, one)]])


# ---- compile ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("which", range(4), ids=NAMES)
def test_one_graph_without_breaks_serves_all_weights(which):
    call = make_call(batch=4, dtype=torch.float32)
    edit, graphs = all_edits(call)[which], CompileCounter()

    def run(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        if isinstance(edit, Segments):
            made: Edit = Segments(edit.source, weight, edit.bias, edit.keys, edit.queries)
        else:
            made = ClassMask(edit.classes, weight) if isinstance(edit, ClassMask) else Mix(edit.target, weight)
        return attend(call_of(q, k, v), [made])

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for factor in (1.0, 0.5, 0.0):
            weight = factor * edit.weight
            torch.testing.assert_close(
                compiled(call.q, call.k, call.v, weight), run(call.q, call.k, call.v, weight), atol=2e-6, rtol=0
            )
    assert graphs.frame_count == 1
