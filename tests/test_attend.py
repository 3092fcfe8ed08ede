"""``attend``: every edit in its fused form against loops over the explicit map."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnsteer.attend import attend, bias_keys
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
)
from attnsteer.errors import SteeringError
from attnsteer.kernels import reference
from attnsteer.logits import additive
from attnsteer.site import AttentionCall, Spans
from attnsteer.targets import blur, kernel_size

from .calls import MASKS, LargestTensor, call_of, explicit_map, make_call, repeated, rows_of

IMAGE, TEXT = slice(0, 8), slice(8, 13)
SPANS = Spans(IMAGE, TEXT, grid=(1, 2, 4))
LATE = Spans(slice(5, 13), slice(0, 5), grid=(2, 2, 2))  # text first, two frames
WEIGHT = torch.tensor([[0.0, 1.0, 0.3, 0.0, 0.75, 1.0], [0.5] * 6, [0.0] * 6])


def changed_map(call: AttentionCall, edit: Mix) -> Tensor:
    """The map that a target stands for, row by row, ``(B, H, Nq, Nk)`` float64."""
    plain, logits = explicit_map(call), reference.logits(call.q, call.k, mask=call.mask, is_causal=call.is_causal)
    k, out = repeated(call.k, call), plain.clone()
    text = torch.zeros(call.k.shape[2], dtype=torch.bool)
    if call.site.kind != "self" and call.spans is not None:
        text[call.spans.text] = True
    target = edit.target
    for b in range(plain.shape[0]):
        for h in range(plain.shape[1]):
            masked = logits[b, h] - call.softmax_scale * call.q[b, h].double() @ k[b, h].T
            queries = changed_queries(call, target, b, h)
            for i in range(plain.shape[2]):
                row = torch.zeros(plain.shape[3]).double()
                if isinstance(target, OwnValue) and (target.text == "drop" or not text.any()):
                    row[i] = 1
                elif isinstance(target, OwnValue) and target.text == "logit":
                    chosen = text.clone()
                    chosen[i] = True
                    row = torch.softmax(torch.where(chosen, logits[b, h, i], -torch.inf), -1)
                elif isinstance(target, OwnValue):
                    row = torch.where(text, plain[b, h, i], 0.0)
                    row[i] += plain[b, h, i][~text].sum()
                elif isinstance(target, ArgmaxValue):
                    row[logits[b, h, i].argmax()] = 1
                else:
                    row = torch.softmax(call.softmax_scale * queries[i] @ k[b, h].T + masked[i], -1)
                out[b, h, i] = row
    return out


def changed_queries(call: AttentionCall, target: object, b: int, h: int) -> Tensor:
    """Queries of one head under a target that changes them."""
    q = call.q[b, h].double()
    if isinstance(target, MeanValue):
        return torch.zeros_like(q)
    if isinstance(target, MeanQuery):
        whole = target.tokens == "all" or call.site.kind == "self"  # image queries only, and none of text
        span = slice(None) if whole else call.spans.image if target.tokens == "image" else call.spans.text
        return q[span].mean(0).expand_as(q)
    if isinstance(target, BlurredQuery):
        q = q.clone()
        span = slice(None) if call.site.kind == "self" else call.spans.image
        q[span] = blurred_by_loop(q[span], call.spans.grid, target.sigma)
    return q


def blurred_by_loop(q: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """The 2-D Gaussian of SEG with reflect padding, one token at a time."""
    frames, height, width = grid
    out = torch.zeros_like(q)
    if sigma > 9999:
        return q.unflatten(0, grid).mean((1, 2), keepdim=True).expand(*grid, -1).flatten(0, 2)
    reach = [kernel_size(sigma, side) // 2 for side in (height, width)]

    def mirror(p: int, side: int) -> int:
        return -p if p < 0 else 2 * (side - 1) - p if p >= side else p

    for t in range(frames):
        for y in range(height):
            for x in range(width):
                total = 0.0
                for dy in range(-reach[0], reach[0] + 1):
                    for dx in range(-reach[1], reach[1] + 1):
                        weight = math.exp(-0.5 * (dy * dy + dx * dx) / sigma**2)
                        total += weight
                        source = (t * height + mirror(y + dy, height)) * width + mirror(x + dx, width)
                        out[(t * height + y) * width + x] += weight * q[source]
                out[(t * height + y) * width + x] /= total
    return out


def expected_mix(call: AttentionCall, edit: Mix) -> Tensor:
    """``((1 - u) A + u A*) V`` on the chosen rows."""
    plain = explicit_map(call)
    weight = edit.weight.double().repeat_interleave(call.q.shape[0] // edit.weight.shape[0], 0)[:, :, None, None]
    rows = torch.zeros(call.q.shape[2], 1, dtype=torch.bool)
    if edit.tokens == "all" or call.site.kind == "self":
        rows[:] = edit.tokens != "text"
    else:
        rows[call.spans.image if edit.tokens == "image" else call.spans.text] = True
    mixed = torch.where(rows, (1 - weight) * plain + weight * changed_map(call, edit), plain)
    return mixed @ repeated(call.v, call)


TARGETS: list[Mix] = [
    Mix(OwnValue(), WEIGHT),
    Mix(OwnValue(), WEIGHT, tokens="image"),
    Mix(OwnValue(), WEIGHT, tokens="text"),
    Mix(OwnValue("logit"), WEIGHT, tokens="image"),
    Mix(OwnValue("renorm"), WEIGHT, tokens="image"),
    Mix(MeanValue(), WEIGHT),
    Mix(MeanQuery(), WEIGHT),
    Mix(MeanQuery("image"), WEIGHT, tokens="image"),
    Mix(MeanQuery("text"), WEIGHT),
    Mix(ArgmaxValue(), WEIGHT, tokens="image"),
    Mix(BlurredQuery(0.6), WEIGHT, tokens="image"),
    Mix(BlurredQuery(3.0), WEIGHT),
    Mix(BlurredQuery(math.inf), WEIGHT, tokens="image"),
]


def label(edit: Mix) -> str:
    return f"{edit.target}-{edit.tokens}"


# ---- fused == explicit -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("edit", TARGETS, ids=label)
@pytest.mark.parametrize("spans", [SPANS, LATE], ids=["image-first", "text-first"])
def test_every_target_equals_its_map(edit, mask, spans):
    call = make_call(mask=mask, spans=spans)
    if mask == "causal" and isinstance(edit.target, OwnValue) and edit.target.text != "drop":
        assert "no causal form" in refused(call, edit)
        return
    torch.testing.assert_close(attend(call, [edit]), expected_mix(call, edit), atol=1e-12, rtol=0)


@pytest.mark.parametrize("edit", TARGETS, ids=label)
def test_every_target_equals_its_map_on_image_only_sites(edit):
    call = make_call(kind="self", spans=Spans(slice(0, 12), slice(0, 0), (1, 3, 4)), n_q=12)
    torch.testing.assert_close(attend(call, [edit]), expected_mix(call, edit), atol=1e-12, rtol=0)


def path_map(plain: Tensor, weight: float, path: str) -> Tensor:
    """The authors' elementwise forms of one head's map ``(N, N)``."""
    n, t = plain.shape[0], 1 - weight
    one = torch.eye(n).double()
    if path == "chord":
        out = ((1 - t) * one + t * plain.sqrt()) ** 2
    elif path == "slerp":
        angle = torch.arccos(plain.diagonal().sqrt().clamp(max=1))[:, None]
        straight = angle < 1e-4
        c1 = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
        c2 = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))
        out = (c1 * one + c2 * plain.sqrt()) ** 2
    else:
        p = torch.full((n, n), 1e-6, dtype=torch.float64)
        p[range(n), range(n)] = 1 - 1e-6 * (n - 1) + 1e-6
        out = p ** (1 - t) * plain**t
    return out / out.sum(-1, keepdim=True)


@pytest.mark.parametrize("mask", ["none", "keys_bool", "keys_float", "full_bool", "causal"])
@pytest.mark.parametrize("path", ["chord", "slerp", "log_linear"])
def test_paths_equal_the_elementwise_forms(path, mask):
    call = make_call(mask=mask)
    weight = torch.tensor([[0.0, 0.25, 0.5, 0.999, 1.0, 0.1]])
    out = attend(call, [Mix(OwnValue(), weight, path=path)])
    plain, v = explicit_map(call), repeated(call.v, call)
    for b in range(3):
        for h, u in enumerate(weight[0].double().tolist()):
            if path == "log_linear" and u == 1 and mask != "none":
                continue  # p^1 A^0 counts hidden keys in the elementwise form (0^0 = 1)
            expected = plain[b, h] if u == 0 else path_map(plain[b, h], u, path)
            torch.testing.assert_close(out[b, h], expected @ v[b, h], atol=1e-12, rtol=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("queries", ["all", "last"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_key_bias_equals_biased_logits(mask, heads, queries, scale):
    call = make_call(mask=mask, scale=scale, dim=5)
    bias = torch.randn(3, heads, 13)
    bias[1] = 0
    edit = KeyBias(bias, queries)
    where = torch.zeros(1, 1, 13, 1)
    where[..., slice(None) if queries == "all" else slice(-1, None), :] = 1
    expected = explicit_map(call, bias[:, :, None] * where) @ repeated(call.v, call)
    out = attend(call, [edit])
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    assert torch.equal(out[1], call.output[1])


@pytest.mark.parametrize("n_q", [1, 4])
@pytest.mark.parametrize("queries", ["all", "last"])
def test_key_bias_in_decode_and_with_a_cache(queries, n_q):
    call = make_call(n_q=n_q, n_k=11, dim_v=4, kind="causal")
    bias = torch.randn(1, 6, 11)
    rows = slice(None) if queries == "all" else slice(-1, None)
    expected = call.output.clone()
    expected[:, :, rows] = (explicit_map(call, bias[:, :, None]) @ repeated(call.v, call))[:, :, rows]
    torch.testing.assert_close(attend(call, [KeyBias(bias, queries)]), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_key_bias_keeps_more_than_half_precision(dtype):
    call = make_call(dtype=dtype, dim=24)
    bias = torch.linspace(-7.77, 3.33, 78).view(1, 6, 13)
    steered, touched = bias_keys(call, KeyBias(bias))
    plain = reference.logits(call.q, call.k)
    added = reference.logits(steered.q, steered.k, scale=steered.scale) - plain
    error = (added - bias.double()[:, :, None]).abs().max()
    assert error < 10 * torch.finfo(dtype).eps ** 2  # one channel alone: 10 eps
    assert touched.all()


def test_scale_multiplies_heads():
    call = make_call()
    weight = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, 1.0]])
    out = attend(call, [Scale(weight)])
    for h, w in enumerate(weight[0].tolist()):
        assert torch.equal(out[:, h], w * call.output[:, h] + 0.0) or w == 1
    assert torch.equal(out[:, 1], call.output[:, 1])


def test_scale_zero_silences_an_overflowed_head():
    call = call_of(*(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2, 4), torch.inf)))
    assert torch.equal(attend(call, [Scale(torch.zeros(1, 1))]), torch.zeros(1, 1, 2, 4))


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
    held = [call.q, call.k, call.v, call.mask, call.output, edit.bias if isinstance(edit, KeyBias) else edit.weight]
    before = [(t._version, t.clone()) for t in held]
    attend(call, [edit])
    assert all(t._version == version and torch.equal(t, copy) for t, (version, copy) in zip(held, before, strict=True))


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


# ---- oracles of the methods ------------------------------------------------------------------------------------------
def hand_example() -> AttentionCall:
    q = torch.eye(2)[None, None].double()
    k = torch.tensor([[0.0, 0.0], [math.sqrt(2) * math.log(3), 0.0]])[None, None].double()
    return call_of(q, k, torch.tensor([[1.0, 2.0], [5.0, -2.0]])[None, None].double(), kind="self")


def test_the_hand_example():
    call = hand_example()
    close = {"atol": 1e-7, "rtol": 0}  # the example's keys are float32
    torch.testing.assert_close(call.output[0, 0], torch.tensor([[4.0, -1.0], [3.0, 0.0]]).double(), **close)
    half, one = torch.full((1, 1), 0.5), torch.ones(1, 1)
    expected = torch.tensor([[2.5, 0.5], [4.0, -1.0]]).double()
    torch.testing.assert_close(attend(call, [Mix(OwnValue(), half)])[0, 0], expected, **close)
    assert torch.equal(attend(call, [Mix(OwnValue(), one)]), call.v)
    for path in ("chord", "slerp"):
        row = attend(call, [Mix(OwnValue(), half, path=path)])[0, 0, 0]
        torch.testing.assert_close(row, torch.tensor([2.0, 1.0]).double(), **close)


def test_variant_b_by_hand():
    """s_self = ln 2, one text key with logit 0, v_self = 3, v_text = 0: two thirds of 3 stay."""
    q, k = torch.tensor([[[[1.0], [0.0]]]]).double(), torch.tensor([[[[math.log(2)], [0.0]]]]).double()
    call = call_of(q, k, torch.tensor([[[[3.0], [0.0]]]]).double(), spans=Spans(slice(0, 1), slice(1, 2)))
    one = torch.ones(1, 1)
    logit = attend(call, [Mix(OwnValue("logit"), one, tokens="image")])
    assert abs(logit[0, 0, 0, 0].item() - 2.0) < 1e-7
    assert attend(call, [Mix(OwnValue(), one)])[0, 0, 0, 0].item() == 3.0


@settings(deadline=None, max_examples=20)
@given(u=st.floats(0, 1, width=32), seed=st.integers(0, 99))
def test_the_identity_target_is_affine_in_the_strength(u, seed):
    torch.manual_seed(seed)
    call = make_call(batch=1)
    out = attend(call, [Mix(OwnValue(), torch.full((1, 6), u))])
    expected = u * (repeated(call.v, call) - call.output)
    torch.testing.assert_close(out - call.output, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("path", ["linear", "chord", "slerp", "log_linear"])
def test_one_token_and_equal_values_change_nothing(path):
    for call in (make_call(n_q=1), make_call()):
        if call.q.shape[2] > 1:
            call.v[:] = call.v[:, :, :1].clone()
        out = attend(call, [Mix(OwnValue(), WEIGHT, path=path)])
        torch.testing.assert_close(out, repeated(call.v, call), atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(13)), target=st.sampled_from([OwnValue(), MeanValue(), MeanQuery(), ArgmaxValue()]))
def test_tokens_permute(order, target):
    torch.manual_seed(len(order))
    call = make_call()
    moved = call_of(call.q[:, :, order], call.k[:, :, order], call.v[:, :, order])
    edit = Mix(target, WEIGHT)
    torch.testing.assert_close(attend(moved, [edit]), attend(call, [edit])[:, :, order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("edit", TARGETS, ids=label)
def test_rows_of_the_changed_map_still_sum_to_one(edit):
    call = make_call(spans=SPANS, mask="keys_bool")
    ones = call_of(call.q, call.k, torch.ones_like(call.v), call.mask, spans=SPANS)
    torch.testing.assert_close(attend(ones, [edit]), torch.ones_like(call.q), atol=1e-13, rtol=0)


def test_without_text_all_joint_variants_are_the_own_value():
    spans = Spans(slice(0, 13), slice(13, 13))
    for kind in ("joint", "self"):
        call, one = make_call(kind=kind, spans=spans), torch.ones(1, 6)
        for text in ("drop", "logit", "renorm"):
            out = attend(call, [Mix(OwnValue(text), one, tokens="image")])
            assert torch.equal(out, repeated(call.v, call))


def test_masked_text_counts_as_no_text():
    mask = torch.ones(3, 1, 1, 13, dtype=torch.bool)
    mask[1, ..., TEXT] = False
    call = call_of(*(torch.randn(3, 2, 13, 8).double() for _ in range(3)), mask, spans=SPANS)
    for text in ("logit", "renorm"):
        out = attend(call, [Mix(OwnValue(text), torch.ones(1, 2), tokens="image")])
        assert torch.equal(out[1, :, IMAGE], call.v[1, :, IMAGE])
        assert not torch.allclose(out[0, :, IMAGE], call.v[0, :, IMAGE])


# ---- SEG -------------------------------------------------------------------------------------------------------------
def test_kernel_sizes_of_the_blur():
    assert [kernel_size(s, 64) for s in (1, 2, 10)] == [7, 13, 61]
    assert kernel_size(10, 32) == 33
    assert kernel_size(10, 31) == 31


def test_blur_limits():
    call, one = make_call(kind="self", n_q=12, spans=Spans(slice(0, 12), slice(0, 0), (1, 3, 4))), torch.ones(1, 6)
    out = {s: attend(call, [Mix(BlurredQuery(s), one)]) for s in (0.0, 1e-3, 20000.0)}
    assert torch.equal(out[0.0], call.output)
    torch.testing.assert_close(out[1e-3], call.output, atol=1e-13, rtol=0)
    torch.testing.assert_close(out[20000.0], out[20000.0][:, :, :1].expand_as(out[20000.0]), atol=1e-13, rtol=0)
    torch.testing.assert_close(out[20000.0], attend(call, [Mix(MeanQuery(), one)]), atol=1e-13, rtol=0)


def test_blurring_queries_blurs_logits_along_queries():
    q, k = torch.randn(5, 7, 8).double(), torch.randn(35, 8).double()
    blurred = blur(blur(q, 0, 1.3), 1, 1.3).flatten(0, 1) @ k.T
    logits = (q.flatten(0, 1) @ k.T).unflatten(0, (5, 7))
    torch.testing.assert_close(blurred, blur(blur(logits, 0, 1.3), 1, 1.3).flatten(0, 1), atol=1e-13, rtol=0)


def test_one_axis_of_the_blur_equals_torch_reflect_padding():
    x = torch.randn(2, 3, 9).double()
    reach = kernel_size(1.0, 9) // 2
    weights = torch.exp(-0.5 * torch.arange(-reach, reach + 1).double() ** 2)
    padded = torch.nn.functional.pad(x, (reach, reach), mode="reflect").flatten(0, 1)[:, None]
    expected = torch.nn.functional.conv1d(padded, (weights / weights.sum())[None, None])[:, 0].unflatten(0, (2, 3))
    torch.testing.assert_close(blur(x, 2, 1.0), expected, atol=1e-13, rtol=0)


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
    both = refused(joint, Scale(torch.ones(1, 5)), KeyBias(torch.ones(1, 1, 12)))
    assert both.count("\n- ") == 1  # every reason, not the first


# ---- compile ---------------------------------------------------------------------------------------------------------
def with_weight(edit: Edit, weight: Tensor) -> Edit:
    if isinstance(edit, KeyBias):
        return KeyBias(weight, edit.queries)
    return Scale(weight) if isinstance(edit, Scale) else Mix(edit.target, weight, edit.tokens, edit.path)


def check_compiled(edit: Edit, inner: Callable[..., object]) -> None:
    """One graph without breaks serves every weight, and its results are the eager ones."""
    call = make_call(dtype=torch.float32, spans=SPANS)
    graphs = 0

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return inner(gm, inputs)

    def run(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return attend(call_of(q, k, v, spans=SPANS), [with_weight(edit, weight)])

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    weight = edit.bias if isinstance(edit, KeyBias) else edit.weight
    with torch.no_grad():
        for factor in (1.0, 0.5, 0.0, 0.3):
            got = compiled(call.q, call.k, call.v, factor * weight)
            torch.testing.assert_close(got, run(call.q, call.k, call.v, factor * weight), atol=2e-6, rtol=0)
    assert graphs == 1


COMPILED: list[Edit] = [TARGETS[i] for i in (0, 3, 4, 5, 6, 9, 10)] + ALL_EDITS[-6:]


@pytest.mark.parametrize("edit", COMPILED, ids=name)
def test_one_graph_without_breaks_serves_all_weights(edit):
    check_compiled(edit, lambda gm, inputs: gm.forward)


@pytest.mark.slow
@pytest.mark.parametrize("edit", COMPILED, ids=name)
def test_compiled_code_equals_eager(edit):
    from torch._inductor.compile_fx import compile_fx

    check_compiled(edit, compile_fx)
