"""Captured rows, columns and sums against the explicit map."""

from __future__ import annotations

import pytest
import torch

import attnsteer
from attnsteer.capture import Capture, column_mass, probabilities, row_mass
from attnsteer.errors import SteeringError
from attnsteer.site import Spans
from attnsteer.where import Where
from tests.tiny import pipelines

from .calls import MASKS, LargestTensor, call_of, explicit_map, make_call, rows_of

SPANS = Spans(slice(0, 8), slice(8, 13), grid=(1, 2, 4))
ROWS = [slice(None), slice(-1, None), slice(2, 9), (3,), (12, 0, -2)]
COLUMNS = [slice(None), slice(8, 13), (5,), (0, 7, -1)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("columns", COLUMNS, ids=str)
def test_probabilities_are_the_chosen_part_of_the_map(mask, rows, columns):
    call = make_call(mask=mask)
    found = probabilities(call, rows, columns)
    i, j = (list(range(13)[x]) if isinstance(x, slice) else list(x) for x in (rows, columns))
    torch.testing.assert_close(found, explicit_map(call)[:, :, i][..., j], atol=1e-12, rtol=0)


@pytest.mark.parametrize("mask", ["none", "keys_bool", "keys_float"])
def test_causal_order_is_aligned_to_the_last_key(mask):
    base = make_call(n_q=5, n_k=12, mask=mask, kind="causal")
    call = call_of(base.q, base.k, base.v, base.mask, causal=True, kind="causal")
    for rows, kept in ((slice(None), range(5)), (slice(1, 3), (1, 2)), ((4, 0), (4, 0))):
        if mask == "none" or isinstance(rows, slice):
            expected = explicit_map(call)[:, :, list(kept)].nan_to_num(0.0)[..., 2:7]
            torch.testing.assert_close(probabilities(call, rows, slice(2, 7)), expected, atol=1e-12, rtol=0)


def test_columns_that_differ_per_row_are_zero_elsewhere():
    call = make_call(mask="causal")
    columns = torch.rand(3, 13) > 0.5
    found = probabilities(call, (-1,), columns)
    torch.testing.assert_close(found, explicit_map(call)[:, :, -1:] * columns[:, None, None], atol=1e-12, rtol=0)


def test_rows_that_see_nothing_have_no_probabilities():
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 1, :] = False
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 5, 8)
    found = probabilities(call_of(q, k, k, mask), slice(None), slice(None))
    torch.testing.assert_close(found.sum(-1), torch.tensor([1.0, 0.0, 1.0]).expand(1, 2, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maps_are_float32_in_every_lower_precision(dtype):
    call = make_call(dtype=dtype)
    found = probabilities(call, slice(None), slice(0, 5))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, explicit_map(call)[..., :5].float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mask", ["none", "keys_bool", "full_bool", "causal"])
@pytest.mark.parametrize("rows", [slice(None), (1, 6)], ids=str)
def test_gradients_of_probabilities_are_exact(mask, rows):
    call, weight = make_call(batch=2, n_q=7, mask=mask), torch.randn(2)
    grads = []
    for form in ("fused", "map"):
        q, k = call.q.clone().requires_grad_(), call.k.clone().requires_grad_()
        inner = call_of(q, k, call.v, call.mask, call.is_causal)
        index = list(range(7)) if isinstance(rows, slice) else list(rows)
        found = probabilities(inner, rows, (2, 5)) if form == "fused" else explicit_map(inner)[:, :, index][..., [2, 5]]
        (found * weight).pow(2).sum().backward()
        grads.append((q.grad, k.grad))
    for fused, expected in zip(*grads, strict=True):
        torch.testing.assert_close(fused, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mask", MASKS)
def test_column_mass_sums_the_chosen_columns(mask):
    call = make_call(mask=mask)
    plain = explicit_map(call)
    one, rows, sets = torch.rand(13) > 0.5, torch.rand(3, 13) > 0.5, torch.rand(1, 13, 11).double()  # more than D sets
    torch.testing.assert_close(column_mass(call, one), plain @ one.double(), atol=1e-12, rtol=0)
    expected = (plain * rows[:, None, None]).sum(-1)
    torch.testing.assert_close(column_mass(call, rows), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(column_mass(call, sets), plain @ sets[:, None], atol=1e-12, rtol=0)


def test_gradients_of_column_mass_are_exact():
    call, chosen = make_call(batch=1), torch.arange(13) > 8

    def run(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return column_mass(call_of(q, k, call.v), chosen)

    assert torch.autograd.gradcheck(run, [x.clone().requires_grad_() for x in (call.q, call.k)], fast_mode=True)


@pytest.mark.parametrize("mask", ["none", "keys_bool", "keys_float"])
def test_row_mass_is_what_every_key_receives(mask):
    call = make_call(n_q=13, n_k=9, mask=mask, kind="cross")
    chosen, weight = torch.rand(13) > 0.5, torch.rand(3, 13)
    plain = explicit_map(call)
    torch.testing.assert_close(row_mass(call, chosen), plain[:, :, chosen].sum(2), atol=1e-12, rtol=0)
    expected = (plain * weight[:, None, :, None].double()).sum(2)
    torch.testing.assert_close(row_mass(call, weight), expected, atol=1e-12, rtol=0)
    with pytest.raises(SteeringError, match="row_mass cannot exchange"):
        row_mass(make_call(mask="causal"), chosen)


def test_no_map_is_allocated():
    n, heads = 257, 2
    call = make_call(batch=1, heads=heads, kv_heads=1, n_q=n, dtype=torch.float32)
    with LargestTensor() as largest:
        probabilities(call, slice(None), (1, 2, 3))
        probabilities(call, (5, -1), slice(None))
        column_mass(call, torch.ones(n))
        row_mass(call, torch.ones(n))
    assert largest.numel < n * n / 8


# ---- the processor ---------------------------------------------------------------------------------------------------
def test_recording_changes_nothing_and_keeps_calls_apart():
    capture, call = Capture(columns="text"), make_call(spans=SPANS)
    assert capture.react(call) is None
    capture.react(call)
    found = Capture.collect({call.site: call.state})["block.attn"]
    expected = explicit_map(call)[..., 8:]
    assert found.shape == (2, 3, 6, 13, 5)
    torch.testing.assert_close(found[1], expected, atol=1e-12, rtol=0)


def test_heads_are_chosen_and_reduced():
    where = Where(heads={0: [1, 4]})
    call = make_call(spans=SPANS, mask="heads_float")
    expected = explicit_map(call)[:, [1, 4], -1:, :8]
    for reduce, wanted in (("none", expected), ("heads", expected.mean(1, keepdim=True))):
        capture = Capture(where, rows="last", columns="image", reduce=reduce)
        call.state.clear()
        capture.react(call)
        torch.testing.assert_close(call.state["maps"][0], wanted, atol=1e-12, rtol=0)


def test_calls_can_be_averaged_on_the_fly():
    capture, calls = Capture(calls="mean"), [make_call(spans=SPANS) for _ in range(3)]
    state: dict[str, object] = {}
    for call in calls:
        call.state = state
        capture.react(call)
    (found,) = Capture.collect({calls[0].site: state}).values()
    expected = torch.stack([explicit_map(call)[..., 8:] for call in calls]).mean(0)
    torch.testing.assert_close(found[0], expected, atol=1e-12, rtol=0)


def test_keys_that_appear_later_have_zero_columns_before():
    capture, state = Capture(rows="last", columns="all"), {}
    for n in (5, 6):
        call = make_call(n_q=1, n_k=n, kind="causal")
        call.state = state
        capture.react(call)
    (found,) = Capture.collect({call.site: state}).values()
    assert found.shape == (2, 3, 6, 1, 6)
    assert (found[0, ..., 5] == 0).all()


def test_rows_that_differ_between_calls_are_refused_at_the_end():
    capture, state = Capture(columns=(0, 1)), {}
    for n in (5, 1):
        call = make_call(n_q=n, n_k=5, kind="causal")
        call.state = state
        capture.react(call)
    with pytest.raises(SteeringError, match="differ in shape"):
        Capture.collect({call.site: state})


def test_a_row_is_recorded_alone_as_in_its_batch():
    call, capture = make_call(dtype=torch.float32, spans=SPANS), Capture()
    capture.react(call)
    solo = rows_of(call, slice(1, 2))
    capture.react(solo)
    torch.testing.assert_close(call.state["maps"][0][1:2], solo.state["maps"][0], atol=1e-6, rtol=0)


def test_whole_maps_need_a_budget():
    call = make_call(spans=SPANS)
    for columns in ("all", "image"):
        with pytest.raises(SteeringError, match="whole map"):
            Capture(columns=columns).react(call)
    size = 3 * 6 * 13 * 13 * 8
    with pytest.raises(SteeringError, match=f"takes {size} bytes; byte_budget is {size - 1}"):
        Capture(columns="all", byte_budget=size - 1).react(call)
    Capture(columns="all", byte_budget=size).react(call)
    torch.testing.assert_close(call.state["maps"][0], explicit_map(call), atol=1e-12, rtol=0)
    cross = make_call(n_k=5, kind="cross")
    Capture(columns="all").react(cross)  # image queries x text keys


def test_gradients_are_kept_on_demand_only():
    for gradient in (False, True):
        call = make_call(spans=SPANS)
        call.q.requires_grad_()
        Capture(gradient=gradient).react(call)
        assert call.state["maps"][0].requires_grad is gradient


def test_bad_parameters_say_what_is_allowed():
    for bad in ({"rows": "first"}, {"columns": ()}, {"columns": [1]}, {"reduce": "mean"}, {"calls": "sum"}):
        with pytest.raises(SteeringError, match="allowed are"):
            Capture(**bad)
    with pytest.raises(SteeringError, match="from 0"):
        Capture(Where(heads={-1: [0]}))
    with pytest.raises(SteeringError, match="no such keys"):
        Capture(columns="text").react(make_call(kind="self"))
    with pytest.raises(SteeringError, match="token layout"):
        Capture(columns="text").react(make_call())
    with pytest.raises(SteeringError, match="Token 13 does not exist"):
        Capture(columns=(13,)).react(make_call())
    assert Capture(columns=(0,)).token_agnostic
    assert not Capture().token_agnostic


# ---- in models -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_pipelines_run_as_before_while_recorded(family):
    pipe = pipelines.build(family)

    def picture() -> torch.Tensor:
        return pipe(**pipelines.call_kwargs(family, batch=2, cfg=True, steps=2) | {"output_type": "latent"}).images

    plain, capture = picture(), Capture(Where(layers=-1, heads=[0]), columns="text")
    steering = attnsteer.attach(pipe, capture)
    assert torch.equal(picture(), plain)
    ((site, found),) = Capture.collect(steering.states(capture)).items()
    steering.detach()
    assert site in dict((pipe.unet if family == "sd15" else pipe.transformer).named_modules())
    mass = found.sum(-1)
    assert found.shape[2] == 1  # the chosen head
    assert (mass > 0).all()
    assert (mass < 1 + 1e-5).all()
    if family == "sd15":  # cross attention: every key is text
        torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-5, rtol=0)
