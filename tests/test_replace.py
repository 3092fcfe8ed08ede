"""Other queries in one call: what the edit means, with others, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from attnsteer.attend import attend
from attnsteer.edits import ClassMask, Edit, KeyBias, Mix, OwnValue, Replace, Scale, Segments, restrict, stack_rows

from .calls import MASKS, call_of, classes_of, make_call
from .test_attend import refused


def blended(call, query, weight):
    """The call with queries that were changed before it, row by row."""
    q = call.q.clone()
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            w = weight[b % len(weight), h].double()
            q[b, h] = (1 - w) * call.q[b, h] + w * query[b, h]
    return call_of(q, call.k, call.v, call.mask, call.is_causal, call.site.kind, call.spans, call.scale)


@pytest.mark.parametrize("mask", MASKS)
def test_other_queries_are_a_call_with_other_queries(mask):
    call = make_call(batch=4, mask=mask)
    query, weight = torch.randn_like(call.q), torch.rand(4, 6)
    out = attend(call, [Replace(query, weight)])
    torch.testing.assert_close(out, blended(call, query, weight).output, atol=1e-12, rtol=0)


def test_every_other_edit_sees_the_new_queries():
    call = make_call(batch=4)
    query, weight = torch.randn_like(call.q), torch.rand(1, 6)
    one = torch.ones(1, 6)
    others: list[Edit] = [
        Scale(2 * one),
        Mix(OwnValue(), 0.5 * one),
        Segments(((1,), (0,), (-1,), (2,)), one),
        ClassMask(classes_of(4, 13), one),
        KeyBias(torch.randn(4, 6, 13)),
    ]
    expected = attend(blended(call, query, weight), others)
    for edits in ([Replace(query, weight), *others], [*others, Replace(query, weight)]):
        torch.testing.assert_close(attend(call, edits), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_zero_keeps_every_bit(dtype):
    call = make_call(batch=4, dtype=dtype)
    query = torch.full_like(call.q, torch.inf)
    chosen = torch.zeros(4, 6, dtype=torch.bool)
    assert torch.equal(attend(call, [restrict(Replace(query, torch.ones(1, 6)), chosen)]), call.output)
    chosen[1, 2:] = True
    out = attend(call, [restrict(Replace(torch.randn_like(call.q), torch.ones(1, 6)), chosen)])
    assert torch.equal(out[[0, 2, 3]], call.output[[0, 2, 3]])
    assert torch.equal(out[1, :2], call.output[1, :2])
    assert not torch.equal(out[1, 2:], call.output[1, 2:])


def test_rows_with_other_queries_stack_and_wrong_shapes_are_refused():
    call, query = make_call(batch=2), torch.randn(2, 6, 13, 8).double()
    edit = Replace(query, torch.full((1, 6), 0.5))
    (stacked,) = stack_rows([[edit], []])
    assert stacked.weight.tolist() == [[0.5] * 6, [0.0] * 6]
    assert torch.equal(attend(call, [stacked])[1], call.output[1])
    assert "Replace.query has shape (1, 6, 13, 8)" in refused(call, Replace(query[:1], torch.ones(1, 6)))
    assert "Replace.weight" in refused(call, Replace(query, torch.ones(1, 5)))
