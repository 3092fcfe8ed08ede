"""The fused kernels with log-sum-exp against loops and the explicit map."""

from __future__ import annotations

import math
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnsteer import kernels
from attnsteer.errors import SteeringError
from attnsteer.kernels import attend_with_lse, flex, merge, reference, sdpa, xformers

from .calls import LargestTensor, make_call, make_mask

SHAPES = [(3, 6, 2, 13, 13, 8, 8), (2, 3, 3, 11, 17, 5, 7), (1, 5, 1, 1, 19, 9, 4), (2, 4, 2, 17, 11, 16, 16)]


def test_the_oracle_equals_a_loop_by_hand():
    q, k, v = torch.randn(1, 4, 3, 2).double(), torch.randn(1, 2, 5, 2).double(), torch.randn(1, 2, 5, 2).double()
    output, lse = reference.attend(q, k, v, scale=0.7, is_causal=True)
    for h in range(4):
        for i in range(3):
            seen = [j for j in range(5) if j <= i + 2]  # query i of 3 stands at key i + 2 of 5
            logits = [0.7 * float(q[0, h, i] @ k[0, h // 2, j]) for j in seen]
            total = math.log(sum(math.exp(s) for s in logits))
            expected = sum(math.exp(s - total) * v[0, h // 2, j] for s, j in zip(logits, seen, strict=True))
            assert abs(float(lse[0, h, i]) - total) < 1e-14
            torch.testing.assert_close(output[0, h, i], expected, atol=1e-14, rtol=0)


MASKED = ["none", "keys_bool", "keys_float", "full_bool", "full_float", "heads_float", "two_axes"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("mask", "causal"), [(m, False) for m in MASKED] + [(m, True) for m in MASKED[:3]])
def test_fused_equals_explicit_in_float64(shape, mask, causal):
    batch, heads, kv_heads, n_q, n_k, dim, dim_v = shape
    q, k = torch.randn(batch, heads, n_q, dim).double(), torch.randn(batch, kv_heads, n_k, dim).double()
    v = torch.randn(batch, kv_heads, n_k, dim_v).double()
    tensor = make_mask(mask, batch, heads, n_q, n_k, torch.float64)
    output, lse = attend_with_lse(q, k, v, mask=tensor, scale=0.3, is_causal=causal)
    expected, expected_lse = reference.attend(q, k, v, mask=tensor, scale=0.3, is_causal=causal)
    assert lse.dtype == torch.float64
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_sum_exp_is_float32_in_every_lower_precision(dtype):
    call = make_call(dtype=dtype, mask="keys_bool")
    output, lse = attend_with_lse(call.q, call.k, call.v, mask=call.mask)
    expected, expected_lse = reference.attend(call.q, call.k, call.v, mask=call.mask)
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=0)
    torch.testing.assert_close(output, expected, atol={torch.float32: 1e-6}.get(dtype, 2e-2), rtol=0)


def test_rows_that_see_nothing_give_zero_and_minus_infinity():
    call = make_call()
    mask = torch.ones(3, 1, 13, 13, dtype=torch.bool)
    mask[1, :, 4] = False
    for form in (mask, torch.where(mask, 0.0, -torch.inf).double()):
        output, lse = attend_with_lse(call.q, call.k, call.v, mask=form)
        assert torch.equal(output[1, :, 4], torch.zeros(6, 8).double())
        assert torch.equal(lse[1, :, 4], torch.full((6,), -torch.inf).double())
        assert lse[0].isfinite().all()


def test_strided_tensors_are_read_right():
    call = make_call()
    k = call.k.mT.contiguous().mT  # the operator itself would read wrong numbers here
    torch.testing.assert_close(attend_with_lse(call.q, k, call.v)[0], call.output, atol=1e-12, rtol=0)


def test_a_float_mask_of_another_precision_is_converted():
    call = make_call(dtype=torch.bfloat16)
    mask = make_mask("keys_float", 3, 6, 13, 13, torch.float32)
    expected = reference.attend(call.q, call.k, call.v, mask=mask)[1]
    torch.testing.assert_close(attend_with_lse(call.q, call.k, call.v, mask=mask)[1], expected, atol=2e-2, rtol=0)


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 17), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_merging_any_partition_of_the_keys_gives_the_whole(cuts, seed):
    torch.manual_seed(seed)
    call = make_call(n_q=5, n_k=17, kind="cross")
    edges = [0, *sorted(cuts), 17]
    parts = [attend_with_lse(call.q, call.k[:, :, a:b], call.v[:, :, a:b]) for a, b in pairwise(edges) if a < b]
    output, lse = merge([o for o, _ in parts], [s for _, s in parts])
    expected, expected_lse = reference.attend(call.q, call.k, call.v)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)


def test_merge_ignores_parts_without_keys_and_survives_rows_without_any():
    o, s = torch.ones(1, 1, 2, 3), torch.tensor([[[0.5, -torch.inf]]])
    nothing = torch.full((1, 1, 2, 3), torch.nan)
    output, lse = merge([o, nothing], [s, torch.full((1, 1, 2), -torch.inf)])
    assert torch.equal(output[0, 0, 0], torch.ones(3))
    assert torch.equal(output[0, 0, 1], torch.zeros(3))
    assert lse.tolist() == [[[0.5, -math.inf]]]
    with pytest.raises(SteeringError, match="as many outputs"):
        merge([o], [])


def test_merge_works_in_float32_for_half_precision():
    parts = [torch.full((1, 1, 1, 1), value, dtype=torch.bfloat16) for value in (1.0, 2.0)]
    lses = [torch.zeros(1, 1, 1), torch.full((1, 1, 1), math.log(3.0))]
    output, _ = merge(parts, lses)
    assert output.dtype == torch.bfloat16
    assert output.item() == 1.75


@pytest.mark.parametrize("mask", ["none", "keys_float", "full_bool", "causal"])
def test_gradients_of_output_and_log_sum_exp_equal_those_of_the_map(mask):
    call = make_call(mask=mask, batch=2, n_q=7)
    grads = []
    for fn in (attend_with_lse, reference.attend):
        q, k, v = (x.clone().requires_grad_() for x in (call.q, call.k, call.v))
        output, lse = fn(q, k, v, mask=call.mask, is_causal=call.is_causal)
        (output.sin().sum() + (lse * torch.arange(7)).sum()).backward()
        grads.append([x.grad for x in (q, k, v)])
    for fused, expected in zip(*grads, strict=True):
        torch.testing.assert_close(fused, expected, atol=1e-12, rtol=0)


def test_refusals_name_every_reason_of_every_backend():
    q = torch.randn(1, 3, 4, 8)
    with pytest.raises(SteeringError) as caught:
        attend_with_lse(q, q[:, :2].double(), q[:, :2])
    text = str(caught.value)
    for part in ("sdpa: q, k and v have the dtypes", "sdpa: 3 query heads", "xformers: ", "flex: builds the whole map"):
        assert part in text
    with pytest.raises(SteeringError, match="empty tensors"):
        attend_with_lse(q, q[:, :, :0], q[:, :, :0])
    with pytest.raises(SteeringError, match="fold the causal order"):
        attend_with_lse(q, q, q, mask=torch.ones(4, 4, dtype=torch.bool), is_causal=True)


def test_backends_answer_can_i_without_running():
    q = torch.randn(1, 2, 4, 8)
    assert sdpa.reasons(q, q, q, None, False) == []
    assert any("cuda only" in reason for reason in xformers.reasons(q, q, q, None, False))
    assert any("compile" in reason for reason in flex.reasons(q, q, q, None, False))


def test_a_forced_backend_computes_or_says_why_it_cannot():
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    with kernels.use("sdpa"):
        assert kernels.choose(q, k, v, None, False) is kernels.sdpa
        with pytest.raises(SteeringError, match="builds the whole map") as error, kernels.use("flex"):
            kernels.attend_with_lse(q, k, v)
        assert not any(reason.startswith(("sdpa", "xformers")) for reason in error.value.reasons)
        assert kernels.choose(q, k, v, None, False) is kernels.sdpa
    with pytest.raises(SteeringError, match="sdpa, xformers, flex"), kernels.use("flash"):
        pass


def test_no_map_is_allocated():
    n = 257
    call = make_call(batch=1, heads=2, kv_heads=1, n_q=n, dtype=torch.float32)
    with LargestTensor() as largest:
        for causal, keys in ((False, n), (True, n), (True, n - 30)):
            attend_with_lse(call.q[:, :, : min(n, keys)], call.k, call.v, is_causal=causal)
    assert largest.numel < n * n / 8


# ---- flex ------------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("mask", ["none", "full_bool", "heads_float", "keys_bool", "causal"])
def test_flex_equals_the_oracle_uncompiled(mask):
    call = make_call(dtype=torch.float32, mask=mask, dim=16, n_q=19)
    output, lse = flex.attend(call.q, call.k, call.v, mask=call.mask, is_causal=call.is_causal)
    expected, expected_lse = reference.attend(call.q, call.k, call.v, mask=call.mask, is_causal=call.is_causal)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=0)


def _blocks(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A table of 128-blocks with its diagonal kept, and the same as a dense mask."""
    side = -(-n // 128)
    table = (torch.rand(1, 2, side, side) > 0.5) | torch.eye(side, dtype=torch.bool)
    dense = table.repeat_interleave(128, -1).repeat_interleave(128, -2)[..., :n, :n]
    return table, dense


def test_block_mask_means_its_table_uncompiled():
    n = 300  # a partial last block
    call = make_call(batch=1, heads=2, kv_heads=2, n_q=n, dim=16, dtype=torch.float32)
    table, dense = _blocks(n)
    output, lse = flex.attend(call.q, call.k, call.v, blocks=flex.block_mask(table, n, n))
    expected, expected_lse = reference.attend(call.q, call.k, call.v, mask=dense)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_flex_and_block_masks_mean_the_same_compiled():
    n = 300
    call = make_call(batch=1, heads=2, kv_heads=2, n_q=n, dim=16, dtype=torch.float32)
    table, dense = _blocks(n)
    torch._dynamo.reset()  # torch 2.13 cannot compile flex for sizes that vary on CPU
    with torch.no_grad():
        output = flex.output(call.q, call.k, call.v, blocks=flex.block_mask(table, n, n), compiled=True)
        torch.testing.assert_close(output, reference.attend(call.q, call.k, call.v, mask=dense)[0], atol=1e-5, rtol=0)
        output = flex.output(call.q, call.k, call.v, is_causal=True, compiled=True)
        expected = reference.attend(call.q, call.k, call.v, is_causal=True)[0]
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "keys_bool", "full_float", "causal"])
def test_cuda_operators_equal_the_oracle(dtype, mask):
    call = make_call(dtype=dtype, mask=mask, dim=24, n_q=37)
    q, k, v = (x.cuda() for x in (call.q, call.k, call.v))
    tensor = None if call.mask is None else call.mask.cuda()
    output, lse = attend_with_lse(q, k, v, mask=tensor, is_causal=call.is_causal)
    expected, expected_lse = reference.attend(q, k, v, mask=tensor, is_causal=call.is_causal)
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-2, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("xformers") is None or not torch.cuda.is_available(), reason="needs xformers on CUDA")
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_xformers_equals_the_oracle(mask):
    call = make_call(dtype=torch.float16, mask=mask, dim=32, n_q=37)
    q, k, v = (x.cuda() for x in (call.q, call.k, call.v))
    assert xformers.reasons(q, k, v, None, call.is_causal) == []
    output, lse = xformers.attend(q, k, v, is_causal=call.is_causal)
    expected, expected_lse = reference.attend(q, k, v, is_causal=call.is_causal)
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-2, rtol=0)
