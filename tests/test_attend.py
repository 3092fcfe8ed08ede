"""``attend`` as a whole: composition, the promises that hold for every edit, refusals, compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from attnsteer.attend import attend
from attnsteer.edits import (
    ArgmaxValue,
    BlurredQuery,
    Edit,
    KeyBias,
    MeanQuery,
    MeanValue,
    Mix,
    OwnValue,
    Scale,
    restrict,
    stack_rows,
)
from attnsteer.errors import SteeringError
from attnsteer.logits import additive
from attnsteer.site import AttentionCall, Spans

from .calls import LargestTensor, call_of, explicit_map, make_call, repeated, rows_of, untouched
from .test_edits import SPANS, TARGETS, WEIGHT, label


# ---- composition -----------------------------------------------------------------------------------------------------
def test_edits_compose_in_the_order_of_the_table_whatever_the_order_given():
    call = make_call(mask="keys_bool", spans=SPANS)
    bias, last, weight = torch.randn(1, 6, 13).double(), torch.randn(1, 1, 13).double(), torch.rand(1, 6)
    edits: list[Edit] = [Scale(torch.full((1, 6), 2.0)), Mix(OwnValue(), weight), KeyBias(last, "last"), KeyBias(bias)]
    rows = bias[:, :, None].repeat(1, 1, 13, 1)
    rows[:, :, -1] += last
    biased = explicit_map(call, rows) @ repeated(call.v, call)
    expected = 2 * torch.lerp(biased, repeated(call.v, call), weight.double()[:, :, None, None])
    for order in (edits, edits[::-1]):
        torch.testing.assert_close(attend(call, order), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("edit", [TARGETS[i] for i in (3, 4, 6, 9, 10)], ids=label)
def test_targets_see_the_bias_of_all_queries(edit):
    call = make_call(mask="full_bool", spans=SPANS)
    bias = torch.randn(1, 6, 13)
    biased = call_of(
        call.q, call.k, call.v, additive(call.mask, torch.float64) + bias[:, :, None].double(), spans=SPANS
    )
    expected = attend(biased, [edit])
    torch.testing.assert_close(attend(call, [edit, KeyBias(bias)]), expected, atol=1e-12, rtol=0)


def test_two_biases_add_up():
    call = make_call()
    one, two = torch.randn(1, 6, 13).double(), torch.randn(3, 1, 13).double()
    out = attend(call, [KeyBias(one), KeyBias(two)])
    torch.testing.assert_close(out, attend(call, [KeyBias(one + two)]), atol=1e-12, rtol=0)


# ---- promises --------------------------------------------------------------------------------------------------------
ALL_EDITS: list[Edit] = [
    *TARGETS,
    *(Mix(OwnValue(), WEIGHT, path=p) for p in ("chord", "slerp", "log_linear")),
    KeyBias(WEIGHT[:, :, None] * torch.linspace(-2, 2, 13)),
    KeyBias(WEIGHT[:, :, None] * torch.linspace(-2, 2, 13), "last"),
    Scale(1 + WEIGHT),
]


def neutral(edit: Edit) -> Edit:
    if isinstance(edit, KeyBias):
        return KeyBias(torch.zeros_like(edit.bias), edit.queries)
    if isinstance(edit, Scale):
        return Scale(torch.ones_like(edit.weight))
    return Mix(edit.target, torch.zeros_like(edit.weight), edit.tokens, edit.path)


def name(edit: Edit) -> str:
    if isinstance(edit, Mix):
        return f"{label(edit)}-{edit.path}"
    return f"{type(edit).__name__}-{getattr(edit, 'queries', '')}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edit", ALL_EDITS, ids=name)
def test_strength_zero_and_unselected_heads_keep_every_bit(edit, dtype):
    call = make_call(dtype=dtype, spans=SPANS)
    call.v[0, 0, 0] = -0.0
    call.v[2, 1, 3] = torch.inf  # in row 2, which nobody edits
    untouched = attend(call, [neutral(edit)])
    assert torch.equal(untouched.view(torch.int8), call.output.view(torch.int8))
    out = attend(call, [edit])
    assert out.dtype == dtype
    for b, h in ((0, 0), (0, 3), *((2, h) for h in range(6))):
        assert torch.equal(out[b, h].view(torch.int8), call.output[b, h].view(torch.int8))
    assert not torch.equal(out[1], call.output[1])


def test_without_edits_the_kernel_output_comes_back_itself():
    call = make_call()
    assert attend(call, ()) is call.output


@pytest.mark.parametrize("edit", ALL_EDITS, ids=name)
def test_nothing_is_written_into_tensors_of_others(edit):
    call = make_call(spans=SPANS, mask="keys_bool")
    given = edit.bias if isinstance(edit, KeyBias) else edit.weight
    with untouched([call.q, call.k, call.v, call.mask, call.output, given]):
        attend(call, [edit])


@pytest.mark.parametrize("mask", ["none", "keys_bool", "full_float"])
@pytest.mark.parametrize("edit", ALL_EDITS, ids=name)
def test_a_row_of_a_batch_equals_its_solo_run(edit, mask):
    if mask == "full_float" and isinstance(edit, Mix) and edit.path == "log_linear":
        mask = "full_bool"
    call = make_call(dtype=torch.float32, spans=SPANS, mask=mask)
    batched = attend(call, [edit])
    for b in range(3):
        weight = edit.bias if isinstance(edit, KeyBias) else edit.weight
        solo = with_weight(edit, weight[b : b + 1])
        alone = attend(rows_of(call, slice(b, b + 1)), [solo])
        torch.testing.assert_close(batched[b : b + 1], alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("edit", TARGETS, ids=label)
def test_rows_permute(edit):
    call, order = make_call(spans=SPANS), torch.tensor([2, 0, 1])
    shuffled = call_of(call.q[order], call.k[order], call.v[order], spans=SPANS)
    permuted = Mix(edit.target, edit.weight[order], edit.tokens)
    torch.testing.assert_close(attend(shuffled, [permuted]), attend(call, [edit])[order], atol=1e-13, rtol=0)


def test_weights_of_prompts_repeat_over_folded_frames():
    call = make_call(batch=6)
    weight = torch.rand(2, 6)
    expected = attend(call, [Mix(OwnValue(), weight.repeat_interleave(3, 0))])
    assert torch.equal(attend(call, [Mix(OwnValue(), weight)]), expected)


@pytest.mark.parametrize("edit", [e for e in ALL_EDITS if "heads" not in name(e)], ids=name)
def test_no_map_is_allocated(edit):
    n, heads = 151, 2
    spans = Spans(slice(0, 140), slice(140, n), (1, 10, 14))
    call = make_call(batch=1, heads=heads, kv_heads=1, n_q=n, dim=16, dtype=torch.float32, spans=spans)
    if isinstance(edit, KeyBias):
        edit = KeyBias(torch.ones(1, heads, n), edit.queries)
    elif isinstance(edit, Mix):
        edit = Mix(edit.target, torch.full((1, heads), 0.5), edit.tokens, edit.path)
    else:
        edit = Scale(torch.full((1, heads), 0.5))
    with LargestTensor() as largest:
        attend(call, [edit])
    chunk = heads * 64 * n if isinstance(edit, Mix) and isinstance(edit.target, ArgmaxValue) else 0
    assert largest.numel <= max(heads * n * (16 + 8), chunk)  # what q with its extra channels takes
    assert largest.numel < heads * n * n / 2


def test_gradients_flow_through_the_joint_variants():
    call = make_call(batch=1, heads=2, kv_heads=2, spans=SPANS)
    for edit in (
        Mix(OwnValue("logit"), WEIGHT[1:2, :2], tokens="image"),
        Mix(OwnValue("renorm"), WEIGHT[1:2, :2], "image"),
    ):
        tensors = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]

        def run(q: Tensor, k: Tensor, v: Tensor, edit: Edit = edit) -> Tensor:
            return attend(call_of(q, k, v, spans=SPANS), [edit])

        assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


# ---- refusals --------------------------------------------------------------------------------------------------------
def refused(call: AttentionCall, *edits: Edit) -> str:
    with pytest.raises(SteeringError) as caught:
        attend(call, edits)
    return str(caught.value)


def test_refusals_say_why():
    one = torch.ones(1, 6)
    call = make_call(n_q=13, n_k=7, kind="cross")
    assert "13 queries and 7 keys" in refused(call, Mix(OwnValue(), one))
    joint = make_call()
    assert "token layout" in refused(joint, Mix(OwnValue(), one, tokens="image"))
    assert "image grid" in refused(joint, Mix(BlurredQuery(1.0), one))
    assert "path='chord' is defined for OwnValue()" in refused(joint, Mix(MeanValue(), one, path="chord"))
    assert "image queries only" in refused(make_call(spans=SPANS), Mix(OwnValue("logit"), one))
    ragged = Spans(torch.zeros(3, 13, dtype=torch.bool), torch.ones(3, 13, dtype=torch.bool))
    assert "differ per row" in refused(make_call(spans=ragged), Mix(OwnValue(), one, tokens="image"))
    decode = make_call(n_q=1, n_k=13, kind="causal", spans=SPANS)
    assert "not its keys" in refused(decode, Mix(MeanValue(), one, tokens="image"))
    assert "additive (3, 1, 13, 13)" in refused(make_call(mask="full_float"), Mix(OwnValue(), one, path="log_linear"))
    assert "(2, 6)" in refused(joint, Scale(torch.ones(2, 6)))
    assert "covers 12 keys" in refused(joint, KeyBias(torch.ones(1, 1, 12)))
    assert "do not compose" in refused(joint, KeyBias(torch.ones(1, 1, 13), "last"), Mix(MeanQuery(), one))
    keys = call_of(joint.q, joint.k, joint.v, torch.ones(3, 13, dtype=torch.bool))  # (B, Nk): whose axis is the first?
    keys._output = joint.output
    assert "(3, 13) mask" in refused(keys, KeyBias(torch.ones(1, 1, 13)))
    assert attend(keys, [Mix(OwnValue(), one)]).shape == joint.q.shape
    both = refused(joint, Scale(torch.ones(1, 5)), KeyBias(torch.ones(1, 1, 12)))
    assert both.count("\n- ") == 1  # every reason, not the first


# ---- compile ---------------------------------------------------------------------------------------------------------
def with_weight(edit: Edit, weight: Tensor) -> Edit:
    if isinstance(edit, KeyBias):
        return KeyBias(weight, edit.queries)
    return Scale(weight) if isinstance(edit, Scale) else Mix(edit.target, weight, edit.tokens, edit.path)


def check_compiled(edit: Edit, graphs: CompileCounter | CompileCounterWithBackend) -> None:
    """One graph without breaks serves every weight, and its results are the eager ones."""
    call = make_call(dtype=torch.float32, spans=SPANS)

    def run(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return attend(call_of(q, k, v, spans=SPANS), [with_weight(edit, weight)])

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=graphs, fullgraph=True)
    weight = edit.bias if isinstance(edit, KeyBias) else edit.weight
    with torch.no_grad():
        for factor in (1.0, 0.5, 0.0, 0.3):
            got = compiled(call.q, call.k, call.v, factor * weight)
            torch.testing.assert_close(got, run(call.q, call.k, call.v, factor * weight), atol=2e-6, rtol=0)
    assert graphs.frame_count == 1


COMPILED: list[Edit] = [TARGETS[i] for i in (0, 3, 4, 5, 6, 9, 10)] + ALL_EDITS[-6:]


@pytest.mark.parametrize("edit", COMPILED, ids=name)
def test_one_graph_without_breaks_serves_all_weights(edit):
    check_compiled(edit, CompileCounter())


@pytest.mark.slow
@pytest.mark.parametrize("edit", COMPILED, ids=name)
def test_compiled_code_equals_eager(edit):
    check_compiled(edit, CompileCounterWithBackend("inductor"))


# ---- rows of different variants --------------------------------------------------------------------------------------
def test_stacked_edits_of_different_variants_equal_their_solo_runs():
    call = make_call(dtype=torch.float32, spans=SPANS)
    one, half = torch.ones(1, 6), torch.full((1, 6), 0.5)
    variants: list[list[Edit]] = [
        [Mix(OwnValue(), half), Scale(2 * one)],
        [Mix(MeanQuery(), half), Mix(OwnValue(), one * torch.tensor([0, 1, 0, 0, 0, 0]))],
        [KeyBias(torch.randn(1, 1, 13))],
    ]
    together = attend(call, stack_rows(variants))
    for b, edits in enumerate(variants):
        alone = attend(rows_of(call, slice(b, b + 1)), edits)
        torch.testing.assert_close(together[b : b + 1], alone, atol=2e-6, rtol=0)


def test_equal_variants_collapse_to_one_row():
    (edit,) = stack_rows([[Mix(OwnValue(), torch.full((1, 6), 0.5))]] * 3)
    assert isinstance(edit, Mix)
    assert edit.weight.shape == (1, 6)


@pytest.mark.parametrize("edit", ALL_EDITS, ids=name)
def test_restricted_edits_leave_the_other_rows_and_heads_alone(edit):
    call = make_call(dtype=torch.float32, spans=SPANS)
    mask = torch.tensor([[False] * 6, [False, True, True, False, True, False], [True] * 6])
    out, whole = attend(call, [restrict(edit, mask)]), attend(call, [edit])
    for b in range(3):
        for h in range(6):
            expected = whole if mask[b, h] else call.output
            torch.testing.assert_close(out[b, h], expected[b, h], atol=0 if not mask[b, h] else 1e-6, rtol=0)
