"""Contrasts inside the user's own calls: every way to generate, rows, families, and nothing left behind."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.hosts.counterparts import noised
from attnsteer.processors import ICD, VCD, VHR
from tests.hosts.common import GREEDY, BoostImage, ScaleAll, state_of
from tests.hosts.contrasting import (
    IMAGE,
    IMAGE_ORACLE,
    NOISE,
    NOISE_ORACLE,
    answers,
    beams,
    greedy,
    logits_after,
    pixels_of,
    rows_of,
    sampled,
    with_noise,
    without_image,
)
from tests.tiny import vlms


# ---- equal to two models stepped by hand -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", vlms.NAMES)
def test_every_family_without_its_image_equals_two_models_stepped_by_hand(name: str) -> None:
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    expected = [greedy(model, pair, IMAGE_ORACLE) for pair in rows_of(inputs, without_image)]
    plain = answers(model, inputs)
    with attnsteer.steer(model, IMAGE):
        assert answers(model, inputs) == expected
    assert answers(model, inputs) == plain
    assert expected != plain


@pytest.mark.parametrize("name", vlms.NAMES)
def test_every_family_with_a_noised_picture_equals_two_models_stepped_by_hand(name: str) -> None:
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    expected = [greedy(model, pair, NOISE_ORACLE) for pair in rows_of(inputs, with_noise)]
    with attnsteer.steer(model, NOISE):
        assert answers(model, inputs) == expected


WAYS: dict[str, dict[str, Any]] = {
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "quiet sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "chunked prefill": {"prefill_chunk_size": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
UPSTREAM = {("llava", "chunked prefill"), ("gemma3", "chunked prefill")}  # transformers cannot split raw pixels


@pytest.mark.parametrize(
    ("name", "way"), [(n, w) for n in ("llava", "qwen25", "gemma3") for w in WAYS if (n, w) not in UPSTREAM]
)
@pytest.mark.parametrize("processor", [IMAGE, NOISE], ids=["image-free", "noised"])
def test_every_way_to_generate_equals_the_oracle(name: str, way: str, processor: Any) -> None:
    model, make = vlms.build(name)
    inputs = make(1 if way == "prompt lookup" else 2, left_padding=True)
    change, how = (without_image, IMAGE_ORACLE) if processor is IMAGE else (with_noise, NOISE_ORACLE)
    expected = [greedy(model, pair, how, 8) for pair in rows_of(inputs, change)]
    expected = [row for row in expected for _ in range(WAYS[way].get("num_return_sequences", 1))]
    with attnsteer.steer(model, processor):
        options = {**WAYS[way], "max_new_tokens": 8, "min_new_tokens": 8}
        assert answers(model, inputs, 8, **options) == expected


def test_candidates_that_are_taken_back_leave_the_counterpart() -> None:
    """A prompt that repeats itself: lookup proposes, and the contrast refuses some proposals and takes others."""
    model, make = vlms.build("gemma3")
    inputs = make(1)
    with attnsteer.steer(model, IMAGE):
        tokens = torch.tensor(answers(model, inputs, 3, max_new_tokens=3, min_new_tokens=3))
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([ids[:, :3], tokens, tokens, tokens.flip(1), ids[:, 3:], tokens[:, :1]], 1)
    extra = inputs["input_ids"].shape[1] - ids.shape[1]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["token_type_ids"] = (inputs["input_ids"] == vlms.IMAGE).long()
    assert extra == 10
    [pair] = rows_of(inputs, without_image)
    expected = greedy(model, pair, IMAGE_ORACLE, 12)
    passes = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    with attnsteer.steer(model, IMAGE):
        found = answers(model, inputs, 12, max_new_tokens=12, min_new_tokens=12, prompt_lookup_num_tokens=4)
    handle.remove()
    assert found == [expected]
    assert max(passes) > 1  # something was proposed


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen25", "gemma3"])
def test_beams_equal_a_beam_search_with_two_predictions_by_hand(name: str, use_cache: bool) -> None:
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "use_cache": use_cache}
    for processor, change, how in ((IMAGE, without_image, IMAGE_ORACLE), (NOISE, with_noise, NOISE_ORACLE)):
        expected = [beams(model, pair, how, 3, 4) for pair in rows_of(inputs, change)]
        with attnsteer.steer(model, processor):
            assert answers(model, inputs, 4, **options) == expected


def test_sampling_draws_the_tokens_of_the_oracle() -> None:
    model, make = vlms.build("llava")
    inputs = make(3, left_padding=True)
    torch.manual_seed(7)
    expected = sampled(model, rows_of(inputs, with_noise), NOISE_ORACLE, 5)
    torch.manual_seed(7)
    with attnsteer.steer(model, NOISE):
        found = answers(model, inputs, do_sample=True, top_k=0)
    assert found == expected


def test_rows_may_end_early() -> None:
    model, make = vlms.build("llava_next")
    inputs = make(2, left_padding=True)
    full = [greedy(model, pair, IMAGE_ORACLE) for pair in rows_of(inputs, without_image)]
    at = next(i for i in range(1, 4) if full[0][i] not in full[0][:i] + full[1])
    with attnsteer.steer(model, IMAGE):
        found = answers(model, inputs, 5, min_new_tokens=0, eos_token_id=full[0][at])
    assert found == [[*full[0][: at + 1], *[vlms.PAD] * (4 - at)], full[1]]


def test_the_plain_forward_combines_at_the_last_position() -> None:
    model, make = vlms.build("llava")
    inputs = make(2, left_padding=True)
    plain = model(**inputs)
    pairs = rows_of(inputs, without_image)
    with attnsteer.steer(model, IMAGE):
        steered, as_tuple = model(**inputs), model(**inputs, return_dict=False)
        with_loss = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    for row, (full, bare) in enumerate(pairs):
        a, b = (model(**x).logits[0, -1].tolist() for x in (full, bare))
        torch.testing.assert_close(steered.logits[row, -1], torch.tensor(IMAGE_ORACLE(a, b, 0)), rtol=1e-4, atol=1e-4)
    assert torch.equal(steered.logits[:, :-1], plain.logits[:, :-1])
    assert type(steered) is type(plain)
    assert torch.equal(as_tuple[0], steered.logits)
    assert torch.equal(with_loss[1], steered.logits)


def test_a_loop_of_the_users_own_is_contrasted_token_by_token() -> None:
    model, make = vlms.build("llava")
    inputs = make(2, left_padding=True)
    with attnsteer.steer(model, IMAGE):
        expected = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
        out, mask = model(**inputs, use_cache=True), inputs["attention_mask"]
        for step in range(5):
            torch.testing.assert_close(out.logits[:, -1], expected.logits[step], rtol=1e-4, atol=1e-4)
            token = expected.sequences[:, step - 5, None]
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)


# ---- composition -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [ScaleAll(factor=1.7), BoostImage(bias=2.0), VHR()])
def test_attention_is_edited_in_the_users_rows_alone(method: Any) -> None:
    """The logits of the contrast are those of the steered model against those of the plain one."""
    model, make = vlms.build("llava")
    inputs = make(2, left_padding=True)
    with attnsteer.steer(model, method):
        steered = model(**inputs).logits[:, -1]
    with attnsteer.steer(model, method, IMAGE):
        found = model(**inputs).logits[:, -1]
    for row, (_, bare) in enumerate(rows_of(inputs, without_image)):
        expected = IMAGE_ORACLE(steered[row].tolist(), model(**bare).logits[0, -1].tolist(), 0)
        torch.testing.assert_close(found[row], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_methods_that_react_go_on_beside_a_contrast_through_decode() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    with attnsteer.steer(model, BoostImage(bias=2.0), IMAGE):
        found = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    tokens = found.sequences[:, -5:]
    with attnsteer.steer(model, BoostImage(bias=2.0)):
        out, steered = model(**inputs, use_cache=True), []
        for step in range(5):
            steered.append(out.logits[0, -1].tolist())
            out = model(input_ids=tokens[:, step : step + 1], past_key_values=out.past_key_values)
    [(_, bare)] = rows_of(inputs, without_image)
    for step, logits in enumerate(steered):
        expected = IMAGE_ORACLE(logits, logits_after(model, bare, tokens[0, :step].tolist()), step)
        torch.testing.assert_close(found.logits[step][0], torch.tensor(expected), rtol=1e-4, atol=1e-4)


# ---- the picture's noise ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", vlms.NAMES)
def test_a_picture_gets_the_same_noise_alone_and_in_a_batch(name: str) -> None:
    _, make = vlms.build(name)
    inputs = make(3)
    together = {**inputs, **with_noise(inputs)}
    assert not torch.equal(pixels_of(together), pixels_of(inputs))
    for row in range(3):
        alone = vlms.row(inputs, row)
        assert torch.equal(pixels_of(with_noise(alone)), pixels_of(vlms.row(together, row)))


def test_noise_has_the_levels_of_its_step_and_follows_the_seed() -> None:
    x = torch.full((2, 3, 60, 70), 0.5)
    one, again, other = (
        noised({"pixel_values": x}, VCD(noise_step=500, seed=seed).contrast())["pixel_values"] for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    eps = [(y[0] - 0.8630 * 0.5) / 0.5052 for y in (one, other)]
    assert all(abs(float(e.mean())) < 0.03 and abs(float(e.std()) - 1) < 0.03 for e in eps)
    assert abs(float(torch.corrcoef(torch.stack([e.flatten() for e in eps]))[0, 1])) < 0.03
    for a, b in ((eps[0][0], eps[0][1]), (eps[0][:, 1:], eps[0][:, :-1]), (eps[0][..., 1:], eps[0][..., :-1])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.05


def test_tiles_that_only_fill_up_a_batch_stay_empty() -> None:
    x = torch.ones(1, 2, 3, 4, 4)
    x[0, 1] = 0
    found = noised({"pixel_values": x}, NOISE.contrast())["pixel_values"]
    assert not found[0, 1].any()
    assert (found[0, 0] != 1).all()


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_what_a_contrast_cannot_follow_is_refused_with_a_reason() -> None:
    model, make = vlms.build("llava")
    inputs = make(2, left_padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    stranger = model(**inputs, use_cache=True).past_key_values
    before = state_of(model)
    with attnsteer.steer(model, NOISE):
        with pytest.raises(SteeringError, match="input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        with pytest.raises(SteeringError, match="pixels"):
            model(input_ids=ids, attention_mask=mask)
        with pytest.raises(SteeringError, match="left"):
            model(**{**inputs, "attention_mask": mask.flip(1)})
        with pytest.raises(SteeringError, match="guidance_scale"):
            model.generate(**inputs, **GREEDY, guidance_scale=1.5)
        with pytest.raises(SteeringError, match="has not seen"):
            model(input_ids=ids[:, -1:], past_key_values=stranger)
        begun = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(SteeringError, match="no further picture"):
            model(input_ids=ids, past_key_values=begun, pixel_values=inputs["pixel_values"])
        with pytest.raises(SteeringError, match="whole prompt"):
            model.generate(input_ids=ids[:, -1:], past_key_values=stranger, max_new_tokens=1)
    assert state_of(model) == before


def test_contrasts_that_cannot_be_attached_say_why() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model, _ = vlms.build("llava")
    text = LlamaForCausalLM(LlamaConfig(**vlms.TEXT))
    with pytest.raises(SteeringError, match="both choose the logits"):
        attnsteer.attach(model, IMAGE, NOISE)
    with pytest.raises(SteeringError, match="leave where= out"):
        attnsteer.attach(model, VCD(Where(layers=[1])))
    with pytest.raises(SteeringError, match="processor="):
        attnsteer.attach(model, ICD())
    with pytest.raises(SteeringError, match="no image token"):
        attnsteer.attach(text, NOISE)
    assert "second forward" in attnsteer.explain(model, NOISE).extra


# ---- nothing stays behind --------------------------------------------------------------------------------------------
def test_nothing_stays_behind() -> None:
    model, make = vlms.build("qwen25")
    inputs = make(2)
    copies = {name: value.clone() for name, value in inputs.items()}
    model.generate(**inputs, **GREEDY)
    before, plain = state_of(model), model(**inputs).logits
    for processor in (IMAGE, NOISE):
        with attnsteer.steer(model, processor) as steering:
            for options in ({}, {"num_beams": 2}):
                model.generate(**inputs, **GREEDY, **options)
                assert not steering.session._contrasts._states
                assert "_reorder_cache" not in model.__dict__
            out = model(**inputs)
            assert len(steering.session._contrasts._states) == 1
            del out
            gc.collect()
            assert not steering.session._contrasts._states
        assert state_of(model) == before
    assert all(torch.equal(value, copies[name]) for name, value in inputs.items())
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("name", vlms.NAMES)
def test_random_numbers_and_what_the_family_keeps_are_untouched(name: str) -> None:
    model, make = vlms.build(name)
    inputs = make(2)

    def kept() -> list[Any]:
        return [m.__dict__["rope_deltas"] for m in model.modules() if "rope_deltas" in m.__dict__]

    model.generate(**inputs, **GREEDY)
    expected, random = kept(), torch.get_rng_state()
    for processor in (IMAGE, NOISE):
        with attnsteer.steer(model, processor):
            model.generate(**inputs, **GREEDY)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(a, b) for a, b in zip(kept(), expected, strict=True))


def test_an_exception_in_the_middle_of_a_generation_leaves_the_model_clean() -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    model, make = vlms.build("llava")
    inputs = make(1)
    plain = answers(model, inputs)
    before = state_of(model)

    class Stumble(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
            raise RuntimeError("stumbled")

    with attnsteer.steer(model, NOISE):
        expected = answers(model, inputs)
        for options in ({}, {"num_beams": 2}):
            with pytest.raises(RuntimeError, match="stumbled"):
                model.generate(**inputs, **GREEDY, **options, stopping_criteria=StoppingCriteriaList([Stumble()]))
            assert "_reorder_cache" not in model.__dict__
        assert answers(model, inputs) == expected
    assert state_of(model) == before
    assert answers(model, inputs) == plain


def test_a_session_may_end_inside_a_generation() -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    model, make = vlms.build("llava")
    plain = answers(model, make(1))
    before = state_of(model)

    class Detach(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
            if steering.attached:
                steering.detach()
            return torch.zeros(len(ids), dtype=torch.bool)

    for options in ({}, {"num_beams": 2}):
        steering = attnsteer.attach(model, NOISE)
        model.generate(**make(1), **GREEDY, **options, stopping_criteria=StoppingCriteriaList([Detach()]))
        assert state_of(model) == before
        assert "_reorder_cache" not in model.__dict__
    assert answers(model, make(1)) == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_keep_their_dtype(dtype: torch.dtype) -> None:
    model, make = vlms.build("llava")
    model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in make(2).items()}
    for processor in (IMAGE, NOISE):
        with attnsteer.steer(model, processor):
            logits = model(**inputs).logits
        assert logits.dtype == dtype
        assert torch.isfinite(logits[:, -1].amax(-1)).all()
