"""The transformers seam: inert unless a module is steered, truthful about masks, and gone without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import AttentionCall, NotReachedError, SteeringError, Where
from attnsteer.hosts import transformers_seam
from attnsteer.processors.vhr import VHR
from tests.hosts.common import Look, ScaleAll
from tests.tiny import vlms

IMPLEMENTATIONS = ("sdpa", "eager")


def _explicit(call: AttentionCall) -> Tensor:
    """Attention from what the call says alone: q, k, v, mask, scale and causal flag."""
    k, v = (x.repeat_interleave(call.group, 1) for x in (call.k, call.v))
    logits = call.q @ k.mT * call.softmax_scale
    if call.mask is not None:
        logits = logits.masked_fill(~call.mask, -torch.inf) if call.mask.dtype == torch.bool else logits + call.mask
    if call.is_causal:
        n_q, n_k = logits.shape[-2:]
        order = torch.arange(n_k) <= torch.arange(n_q)[:, None] + n_k - n_q
        logits = logits.masked_fill(~order, -torch.inf)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("name", vlms.NAMES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_alpha_one_looking_and_detached_are_bit_identical(name: str, implementation: str) -> None:
    model, make = vlms.build(name)
    model.set_attn_implementation(implementation)
    inputs = make(2, left_padding=True)

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        sequences = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=True)
        return model(**inputs).logits, sequences

    plain = run()
    seen: list[str] = []
    for processor in (VHR(alpha=1.0), Look(see=lambda call: seen.append(call.site.name))):
        with attnsteer.steer(model, processor):
            steered = run()
        assert all(torch.equal(a, b) for a, b in zip(steered, plain, strict=True))
    assert set(seen) == {site.name for site in attnsteer.sites(model)}
    assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))


@pytest.mark.parametrize("name", vlms.NAMES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_call_says_everything_about_itself(name: str, implementation: str, padded: bool) -> None:
    """Padding, causal order, GQA, image blocks, sliding windows: explicit attention from the call gives its output."""
    model, make = vlms.build(name)
    model.set_attn_implementation(implementation)
    phases = set()

    def check(call: AttentionCall) -> None:
        phases.add(call.phase)
        expected, real = _explicit(call), torch.isfinite(_explicit(call))
        torch.testing.assert_close(call.output[real], expected[real], rtol=1e-4, atol=1e-5)
        # a mask override reaches the kernel
        last = call.kernel(call.q[:, :, -1:], call.k, call.v, mask=call.mask_rows(slice(-1, None)))
        torch.testing.assert_close(last, call.output[:, :, -1:], rtol=1e-4, atol=1e-5)

    inputs = make(2, left_padding=padded)
    if not padded:
        inputs.pop("attention_mask")
    with attnsteer.steer(model, Look(see=check)):
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert phases == {"prefill", "decode"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_static_cache_without_mask_hides_the_empty_slots(implementation: str) -> None:
    from transformers import StaticCache

    model, make = vlms.build("llava")
    model.set_attn_implementation(implementation)
    inputs = make(2)
    inputs.pop("attention_mask")
    shapes = []

    def check(call: AttentionCall) -> None:
        shapes.append((call.q.shape[2], call.k.shape[2]))
        torch.testing.assert_close(call.output, _explicit(call), rtol=1e-4, atol=1e-5)

    plain = model(**inputs).logits
    with attnsteer.steer(model, Look(see=check)):
        cache = StaticCache(config=model.config, max_cache_len=64)
        logits = model(**inputs, past_key_values=cache).logits
        model(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache)
    assert set(shapes) == {(inputs["input_ids"].shape[1], 64), (1, 64)}
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_flex_attention_shows_its_block_mask_as_a_dense_one() -> None:
    model, make = vlms.build("llava")
    inputs = make(2, left_padding=True)
    plain = model(**inputs).logits
    model.set_attn_implementation("flex_attention")
    masks = []
    with attnsteer.steer(model, Look(Where(layers=[1]), see=lambda call: masks.append(call.mask))):
        logits = model(**inputs).logits
    n = inputs["input_ids"].shape[1]
    expected = torch.ones(n, n, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None, None]
    assert torch.equal(masks[0] & inputs["attention_mask"].bool()[:, None, :, None], expected & masks[0])
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], plain[real], rtol=1e-3, atol=1e-3)


def test_a_mask_is_made_only_where_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, make = vlms.build("llava")
    inputs, made = make(2, left_padding=True), []
    visible = transformers_seam._visible
    monkeypatch.setattr(transformers_seam, "_visible", lambda *args: made.append(1) or visible(*args))
    for processor, times in ((VHR(), 0), (Look(see=lambda call: (call.mask, call.mask)), vlms.LAYERS)):
        made.clear()
        with attnsteer.steer(model, processor):
            model(**inputs)
        assert len(made) == times


def test_weights_are_returned_only_where_nothing_was_edited() -> None:
    model, make = vlms.build("llava")
    model.set_attn_implementation("eager")
    inputs = make(1)
    plain = model(**inputs, output_attentions=True).attentions
    with attnsteer.steer(model, ScaleAll(Where(layers=[0]))):
        attentions = model(**inputs, output_attentions=True).attentions
    assert len(attentions) == len(plain) - 1  # transformers leaves layers without weights out
    with attnsteer.steer(model, Look(see=lambda call: None)):
        looked = model(**inputs, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(looked, plain, strict=True))


def test_the_table_of_transformers_is_restored_exactly() -> None:
    from transformers.modeling_utils import AttentionInterface

    transformers_seam.disarm()
    table, lookup = dict(AttentionInterface._global_mapping), AttentionInterface.get_interface
    model, _ = vlms.build("llava")
    with attnsteer.steer(model, VHR()):
        armed = dict(AttentionInterface._global_mapping)
        assert armed["sdpa"] is not table["sdpa"]
        assert armed["paged|eager"] is table["paged|eager"]
        transformers_seam.arm()
        assert dict(AttentionInterface._global_mapping) == armed  # once
    transformers_seam.disarm()
    assert list(AttentionInterface._global_mapping.items()) == list(table.items())
    assert AttentionInterface.get_interface is lookup


def test_an_implementation_registered_by_the_user_is_reached_and_kept() -> None:
    from transformers import AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    def mine(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)

    model, make = vlms.build("llava")
    inputs = make(1)
    with attnsteer.steer(model, ScaleAll()):
        expected = model(**inputs).logits
    AttentionInterface.register("mine", mine)
    AttentionMaskInterface.register("mine", sdpa_mask)
    try:
        model.set_attn_implementation("mine")
        with attnsteer.steer(model, ScaleAll()):
            torch.testing.assert_close(model(**inputs).logits, expected)
        transformers_seam.disarm()
        assert AttentionInterface._global_mapping["mine"] is mine
    finally:
        AttentionInterface._global_mapping.pop("mine")
        AttentionMaskInterface._global_mapping.pop("mine")


def test_attention_outside_the_interface_is_an_error_not_a_silent_miss() -> None:
    model, make = vlms.build("llava")
    attention = model.model.language_model.layers[2].self_attn
    own = lambda hidden_states, **_: (hidden_states, None)  # noqa: E731
    attention.forward = own
    with attnsteer.steer(model, ScaleAll()), pytest.raises(NotReachedError, match="layers.2.self_attn"):
        model(**make(1))


def test_paged_caches_are_refused() -> None:
    model, make = vlms.build("llava")
    with attnsteer.steer(model, ScaleAll()), pytest.raises(SteeringError, match="Continuous batching"):
        model(input_ids=make(1)["input_ids"], cache=object())
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(SteeringError, match="paged"):
        attnsteer.attach(model, ScaleAll())


def test_towers_are_refused_with_a_reason() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tower = CLIPVisionModel(CLIPVisionConfig(**vlms.TOWER, image_size=8))
    with pytest.raises(SteeringError, match="no attention that attnsteer can reach"):
        attnsteer.attach(tower, ScaleAll())


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    from transformers.modeling_utils import AttentionInterface

    before = dict(AttentionInterface._global_mapping)
    yield
    transformers_seam.disarm()
    assert dict(AttentionInterface._global_mapping) == before
