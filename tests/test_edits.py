"""Every edit in its fused form against loops over the explicit map, and the oracles of the methods' papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnsteer.attend import attend, bias_keys
from attnsteer.edits import ArgmaxValue, BlurredQuery, KeyBias, MeanQuery, MeanValue, Mix, OwnValue, Scale, restrict
from attnsteer.errors import SteeringError
from attnsteer.kernels import reference
from attnsteer.site import AttentionCall, Spans, expand_rows
from attnsteer.targets import blur, kernel_size

from .calls import MASKS, call_of, explicit_map, make_call, repeated

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
        with pytest.raises(SteeringError, match="no causal form"):
            attend(call, [edit])
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


@pytest.mark.parametrize(("lanes", "given"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (2, 8)])
def test_a_restricted_edit_deals_its_rows_to_each_lane(lanes, given):
    """Two prompts of two rows, the first left alone: [1, 1, w, w] in every lane, however many rows the edit has."""
    weight = torch.arange(1, given + 1)[:, None].expand(-1, 3) + 2.0
    edit = restrict(Scale(weight), torch.tensor([[False] * 3, [True, False, True]]), lanes)
    batch = 4 * lanes
    out = expand_rows(edit.weight, batch)
    for row in range(batch):
        w = weight[row * given // batch, 0].item() if row % 4 >= 2 else 1.0
        assert out[row].tolist() == [w, 1.0, w]


def test_scale_zero_silences_an_overflowed_head():
    call = call_of(*(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2, 4), torch.inf)))
    assert torch.equal(attend(call, [Scale(torch.zeros(1, 1))]), torch.zeros(1, 1, 2, 4))


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
