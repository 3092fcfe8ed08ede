"""Masks by class of token: both forms against the dense mask, which of them is taken, and what is refused."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from attnsteer.attend import attend
from attnsteer.classes import TokenClasses, block_reasons, by_blocks, by_class
from attnsteer.edits import ClassMask
from attnsteer.errors import SteeringError
from attnsteer.kernels import attend_with_lse, flex, reference
from attnsteer.layouts import isolation_table
from attnsteer.logits import additive
from attnsteer.site import AttentionCall

from .calls import LargestTensor, call_of, classes_of, make_call

EXACT = {"atol": 1e-12, "rtol": 0}
UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without")


# ---- the definition --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mask", ["none", "keys_bool", "keys_float", "full_bool", "full_float", "heads_float", "two_axes"]
)
@pytest.mark.parametrize("rows", [1, 4])
def test_class_masks_equal_the_dense_mask(mask, rows):
    call, classes = make_call(batch=4, mask="none" if mask == "keys_bool" else mask), classes_of(rows, 13)
    if mask == "keys_bool":  # class 0 stays visible
        keep = (classes.k_class == 0) | (torch.rand(rows, 13) > 0.3)
        call = call_of(call.q, call.k, call.v, keep.expand(4, -1)[:, None, None])
    dense = reference.class_mask(classes.table, classes.q_class, classes.k_class)
    own = torch.where(dense, 0.0 if call.mask is None else additive(call.mask, torch.float64), -math.inf)
    out = attend(call, [ClassMask(classes, torch.ones(1, 6))])
    expected = reference.attend(call.q, call.k, call.v, mask=own)[0]
    seen = torch.softmax(reference.logits(call.q, call.k, mask=own), -1).isnan().any(-1, keepdim=True)
    torch.testing.assert_close(torch.where(seen, 0.0, out.nan_to_num()), torch.where(seen, 0.0, expected), **EXACT)


def test_class_masks_by_hand():
    """Classes [1, 1, 2, 0]: token 0 sees {0, 1, 3}, token 3 all, token 2 {2, 3}."""
    token = torch.tensor([[1, 1, 2, 0]])
    table = torch.tensor([[[1, 1, 1], [1, 1, 0], [1, 0, 1]]]).bool()
    dense = reference.class_mask(table, token, token)[0, 0].int().tolist()
    assert dense == [[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    call = call_of(torch.zeros(1, 1, 4, 4), torch.randn(1, 1, 4, 4), torch.eye(4)[None, None])
    out = attend(call, [ClassMask(TokenClasses(table, token, token), torch.ones(1, 1))])[0, 0]
    expected = torch.tensor(dense) / torch.tensor(dense).sum(1, keepdim=True)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    assert torch.equal(out[3], call.output[0, 0, 3])  # sees everything: not computed again


def test_masks_of_cross_attention_have_their_own_key_classes():
    call, classes = make_call(n_q=11, n_k=7, kind="cross"), classes_of(3, 11, 7)
    dense = reference.class_mask(classes.table, classes.q_class, classes.k_class)
    out = attend(call, [ClassMask(classes, torch.ones(3, 6))])
    torch.testing.assert_close(out, reference.attend(call.q, call.k, call.v, mask=dense)[0], **EXACT)


def test_one_subject_masks_nothing():
    token = torch.randint(0, 2, (3, 13))
    classes = TokenClasses(torch.ones(1, 2, 2, dtype=torch.bool), token, token)
    call = make_call(dtype=torch.float32)
    assert classes.parts == ()
    assert torch.equal(attend(call, [ClassMask(classes, torch.ones(1, 6))]), call.output)


# ---- the form by blocks ----------------------------------------------------------------------------------------------
def dense(classes: TokenClasses) -> Tensor:
    return reference.class_mask(classes.table, classes.q_class, classes.k_class)


def regions(count: int, size: int, shuffled: bool = True) -> Tensor:
    """``count`` classes of ``size`` tokens each, ``(1, N)``, in random order."""
    token = torch.arange(count).repeat_interleave(size)
    return (token[torch.randperm(len(token))] if shuffled else token)[None]


@UNCOMPILED
@pytest.mark.parametrize(("n_q", "n_k"), [(300, 300), (128, 256), (70, 130)])
def test_block_masks_of_classes_mean_the_dense_mask_block_by_block(n_q, n_k):
    classes = classes_of(2, n_q, n_k)
    table = classes.table.expand(2, -1, -1)
    mask, explicit = flex.class_block_mask(table, classes.q_class, classes.k_class), dense(classes)
    seen = flex.class_blocks(table, classes.q_class, classes.k_class)
    for b in range(2):
        for i in range(seen.shape[1]):
            partial_keys = mask.kv_indices[b, 0, i, : mask.kv_num_blocks[b, 0, i]].tolist()
            full_keys = mask.full_kv_indices[b, 0, i, : mask.full_kv_num_blocks[b, 0, i]].tolist()
            for j in range(seen.shape[2]):
                block = explicit[b, 0, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
                assert bool(seen[b, i, j]) == bool(block.any())
                assert (j in full_keys) == (bool(block.all()) and block.shape[1] == 128)
                assert (j in partial_keys) == (bool(block.any()) and j not in full_keys)
    call = make_call(batch=2, n_q=n_q, n_k=n_k, kind="cross", dim=16)
    output, lse = flex.attend(call.q, call.k, call.v, blocks=mask)
    expected, expected_lse = reference.attend(call.q, call.k, call.v, mask=explicit)
    torch.testing.assert_close(output, expected, **EXACT)
    torch.testing.assert_close(lse, expected_lse, **EXACT)


def both_forms(call: AttentionCall, classes: TokenClasses, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """The output by class and by blocks."""

    def part(chosen: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        return call.kernel(chosen, call.k[rows], call.v[rows], mask=mask)

    def sparse(q: Tensor, k: Tensor, v: Tensor, blocks: object) -> Tensor:
        return flex.output(q, k, v, scale=call.scale, blocks=blocks, compiled=compiled)

    tensors = call.q, call.k, call.v
    return by_class(call, classes, call.q, call.output, part), by_blocks(classes, tensors, call.output, sparse)


@UNCOMPILED
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3)])
def test_both_forms_equal_the_dense_mask(rows, heads, kv_heads):
    classes = classes_of(rows, 157)
    if rows > 1:  # a row of background alone is nowhere masked, and rows differ in how many tokens are
        token = classes.q_class.clone()
        token[0] = 0
        classes = TokenClasses(classes.table, token, token)
    call = make_call(batch=4, heads=heads, kv_heads=kv_heads, n_q=157, dim=6, dim_v=5, scale=0.3)
    by_number, sparse = both_forms(call, classes)
    mask = dense(classes).repeat_interleave(4 // rows, 0)
    expected = reference.attend(call.q, call.k, call.v, mask=mask, scale=0.3)[0]
    torch.testing.assert_close(sparse, expected, **EXACT)
    torch.testing.assert_close(sparse, by_number, **EXACT)
    background = (classes.q_class == 0).repeat_interleave(4 // rows, 0)[:, None].expand(-1, heads, -1)
    assert torch.equal(sparse[background], call.output[background])


@UNCOMPILED
def test_both_forms_give_the_log_sum_exp_of_the_dense_mask():
    call, classes = make_call(batch=2, n_q=40, n_k=31, kind="cross"), classes_of(2, 40, 31)
    plain = attend_with_lse(call.q, call.k, call.v)[1]
    found = by_blocks(
        classes, (call.q, call.k, call.v), plain, lambda q, k, v, blocks: flex.attend(q, k, v, blocks=blocks)[1]
    )
    torch.testing.assert_close(found, reference.attend(call.q, call.k, call.v, mask=dense(classes))[1], **EXACT)


@pytest.mark.slow
def test_both_forms_are_equal_compiled():
    token = regions(4, 100)
    call = make_call(batch=2, heads=2, kv_heads=2, n_q=400, dim=16, dtype=torch.float32)
    with torch.no_grad():
        for table in (torch.eye(4, dtype=torch.bool), isolation_table(3)):
            torch._dynamo.reset()  # torch 2.13 cannot compile flex for sizes that vary on CPU
            by_number, sparse = both_forms(call, TokenClasses(table[None], token, token), compiled=True)
            torch.testing.assert_close(sparse, by_number, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regions_that_are_apart_go_by_blocks_on_cuda(dtype):
    token = regions(6, 150)
    classes = TokenClasses(torch.eye(6, dtype=torch.bool)[None], token, token)
    cpu = make_call(batch=2, heads=2, kv_heads=2, n_q=900, dim=64, dtype=dtype)
    call = call_of(cpu.q.cuda(), cpu.k.cuda(), cpu.v.cuda())
    assert block_reasons(classes, call.q, None) == []
    found = attend(call, [ClassMask(classes, torch.ones(1, 2))]).cpu()
    expected = reference.attend(cpu.q, cpu.k, cpu.v, mask=dense(classes))[0]
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)


def test_sorting_is_what_makes_blocks_few():
    """Four regions of two blocks each that see themselves alone: a quarter remains. On a background, most does."""
    token = regions(4, 256)
    apart = TokenClasses(torch.eye(4, dtype=torch.bool)[None], token, token)
    assert apart.remaining == 0.25
    assert flex.class_blocks(apart.table, token, token).float().mean() == 1.0
    shared = TokenClasses(isolation_table(3)[None], token, token)
    assert shared.remaining == 0.5  # of each subject's keys and the background's
    mostly = torch.where(token < 2, 0, token - 1)
    assert TokenClasses(isolation_table(2)[None], mostly, mostly).remaining == 0.75
    assert TokenClasses(torch.ones(1, 4, 4, dtype=torch.bool), token, token).remaining == 0.0  # nothing is masked


def test_why_masked_queries_go_class_by_class():
    token = regions(4, 256)
    apart = TokenClasses(torch.eye(4, dtype=torch.bool)[None], token, token)
    mostly = torch.where(token < 2, 0, token - 1)
    shared = TokenClasses(isolation_table(2)[None], mostly, mostly)
    meta = partial(torch.empty, 1, 2, 1024, device="meta")
    q = torch.empty(1, 2, 1024, 8, dtype=torch.float64, requires_grad=True)
    reasons = "\n".join(block_reasons(shared, q, torch.ones(1, 1, 1, 1024)))
    for part in ("on cpu", "float64 and heads 8 wide", "gradients", "a mask of its own", "75 % of the blocks"):
        assert part in reasons
    assert len(block_reasons(apart, meta(64), None)) == 1  # the device alone stands in the way


def test_block_masks_are_made_without_a_map():
    n = 4099
    token = regions(4, 1025)[:, :n]
    with LargestTensor() as largest:
        classes = TokenClasses(torch.eye(4, dtype=torch.bool)[None], token, token)
        classes.blocks(2, torch.device("cpu"))
        assert classes.remaining < 0.3
    assert largest.numel <= 4 * n


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("table", "q_class", "k_class", "message"),
    [
        (torch.ones(1, 2, 2), torch.zeros(2, 3), torch.zeros(1, 3), "do not go with"),
        (torch.ones(2, 2), torch.zeros(1, 3), torch.zeros(1, 3), "do not go with"),
        (torch.ones(1, 2, 2), torch.full((1, 3), 2), torch.zeros(1, 3), "from 0 to 1"),
        (torch.zeros(1, 2, 2), torch.zeros(1, 3), torch.zeros(1, 3), "class 0 would see no key"),
    ],
)
def test_classes_that_do_not_fit_are_refused(table, q_class, k_class, message):
    with pytest.raises(SteeringError, match=message):
        TokenClasses(table.bool(), q_class.long(), k_class.long())
