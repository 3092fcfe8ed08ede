"""Gradients of the first word: the short way through one token equals the graph of the whole prompt."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.hosts.answer_gradient import last_row_gradients, pixel_gradients
from tests.calls import make_call
from tests.tiny import vlms

LAYERS = [1, 2]
ONE_ROW = [name for name in vlms.NAMES if name != "paligemma"]
TILES = ("llava_next", "smolvlm")


def doubled(name: str) -> tuple[Any, dict[str, Any]]:
    model, make = vlms.build(name)
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in make(1).items()}


def whole_graph(model: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Oracle: every map of the prompt explicit and in the graph; the last row and its gradient."""
    modules = {model.get_submodule(site.name): site.layer for site in attnsteer.sites(model)}
    maps: dict[int, Tensor] = {}

    def eager(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, scaling: float = 1.0, **_: Any):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        logits = q @ k.transpose(2, 3) * scaling
        weights = (logits if attention_mask is None else logits + attention_mask.clamp_min(-1e30)).softmax(-1)
        if module in modules:
            weights = weights if weights.requires_grad else weights.requires_grad_()
            maps[modules[module]] = weights
        return (weights @ v).transpose(1, 2).contiguous(), None

    monkeypatch.setattr(sys.modules[type(next(iter(modules))).__module__], "eager_attention_forward", eager)
    model.set_attn_implementation("eager")
    answer = model(**inputs).logits[:, -1].log_softmax(-1).max()
    slopes = torch.autograd.grad(answer, [maps[layer] for layer in LAYERS])
    model.set_attn_implementation("sdpa")
    monkeypatch.undo()
    return [(maps[layer][:, :, -1].detach(), slope[:, :, -1]) for layer, slope in zip(LAYERS, slopes, strict=True)]


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_token_gives_the_gradient_of_the_whole_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 1e-6: these models compute their norms in float32 whatever their dtype; Qwen's agree to 1e-12."""
    model, inputs = doubled(name)
    expected = whole_graph(model, inputs, monkeypatch)
    found = last_row_gradients(model, inputs, Where(layers=LAYERS))
    tolerance = 1e-12 if name.startswith("qwen") else 1e-6
    for (row, slope), (wanted, wanted_slope) in zip(found, expected, strict=True):
        assert row.dtype == slope.dtype == torch.float64
        torch.testing.assert_close(row, wanted, atol=tolerance, rtol=0)
        seen = wanted > 0  # keys out of a sliding window are gone
        torch.testing.assert_close(slope[seen], wanted_slope[seen], atol=tolerance, rtol=0)
        assert wanted_slope[seen].abs().max() > 1e-3


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_the_gradient_of_a_row_is_that_of_its_output_times_the_values(kv_heads: int) -> None:
    call = make_call(batch=2, heads=6, kv_heads=kv_heads, n_q=1, n_k=7, kind="causal")
    row = torch.rand(2, 6, 1, 7, dtype=call.v.dtype).requires_grad_()
    output = row @ call.v.repeat_interleave(6 // kv_heads, 1)
    weight = torch.randn_like(output)
    (expected,) = torch.autograd.grad((output.sin() * weight).sum(), row)
    slope = output.cos() * weight
    for b in range(2):
        for h in range(6):
            for j in range(7):
                by_hand = sum(
                    slope[b, h, 0, d] * call.v[b, h // (6 // kv_heads), j, d] for d in range(call.v.shape[-1])
                )
                torch.testing.assert_close(by_hand, expected[b, h, 0, j], atol=1e-12, rtol=0)


def test_nothing_is_left_behind() -> None:
    model, make = vlms.build("qwen25")
    inputs = make(1)
    with torch.no_grad():
        plain = model(**inputs).logits
        offsets = model.model.rope_deltas.clone()
        other = make(1, seed=3)
        last_row_gradients(model, other, Where(layers=[1]))
        pixel_gradients(model, other)
        assert torch.equal(model.model.rope_deltas, offsets)
        assert torch.equal(model(**inputs).logits, plain)
    assert inputs["pixel_values"].requires_grad is False
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_weights_that_train_get_no_gradient() -> None:
    model, make = vlms.build("llava")
    frozen = last_row_gradients(model, make(1), Where(layers=[1]))
    model.requires_grad_()
    training = last_row_gradients(model, make(1), Where(layers=[1]))
    pixel_gradients(model, make(1))
    for a, b in zip(frozen[0], training[0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_prompts_that_have_no_short_way_are_refused() -> None:
    model, make = vlms.build("paligemma")
    with pytest.raises(SteeringError, match="both directions"):
        last_row_gradients(model, make(1), Where(layers=[1]))
    model, make = vlms.build("llava")
    with pytest.raises(SteeringError, match="without padding"):
        last_row_gradients(model, make(2, left_padding=True), Where(layers=[1]))


# ---- pixels ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", vlms.NAMES)
def test_pixel_gradients_are_finite_differences(name: str) -> None:
    model, inputs = doubled(name)
    if name in TILES:
        with pytest.raises(SteeringError, match="tiles"):
            pixel_gradients(model, inputs)
        return
    found = pixel_gradients(model, inputs)
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        token = model(**inputs).logits[0, -1].argmax()

        def log_p(x: Tensor) -> Tensor:
            return model(**{**inputs, "pixel_values": x}).logits[0, -1].log_softmax(-1)[token]

        height, width = found.shape
        for y, x in ((0, 0), (height - 1, 3), (5, width - 2)):
            slopes = []
            for colour in range(3):
                step = torch.zeros_like(pixels)
                for index in places(name, colour, y, x, width):
                    step[index] = 1e-2
                slopes.append((log_p(pixels + step) - log_p(pixels - step)) / 2e-2)  # norms in float32: 1e-7 of noise
            torch.testing.assert_close(torch.stack(slopes).norm(), found[y, x], rtol=2e-2, atol=1e-5)


def places(name: str, colour: int, y: int, x: int, width: int) -> list[tuple[int, ...]]:
    """Where a pixel is among the inputs; Qwen has it once in each of two equal frames of a patch of 2 x 2."""
    if not name.startswith("qwen"):
        return [(0, colour, y, x)]
    row, column = y // 2, x // 2  # of patches, which come in blocks of 2 x 2
    patch = ((row // 2) * (width // 4) + column // 2) * 4 + (row % 2) * 2 + column % 2
    return [(patch, ((colour * 2 + frame) * 2 + y % 2) * 2 + x % 2) for frame in range(2)]
