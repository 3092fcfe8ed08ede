"""One prefill for many generations: equal to generations of their own, one after the other and as rows of one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import attnsteer
from attnsteer import Processor, SteeringError, Variant, Where
from attnsteer.processors.gift import GIFT
from attnsteer.processors.image_contrast import ImageContrast
from attnsteer.processors.pai import PAI
from attnsteer.processors.paint import PAINT
from attnsteer.processors.vhr import VHR
from tests.hosts.common import GREEDY, ScaleAll, state_of
from tests.tiny import vlms

CAUSAL = [name for name in vlms.NAMES if name != "paligemma"]


# ---- one after the other ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CAUSAL)
def test_replaying_the_last_token_equals_two_passes(name: str) -> None:
    """Three strengths and the plain model from one prefill, also after another prompt went through the model."""
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    ready = attnsteer.prefill(model, GIFT(token_selector="all"), **inputs)
    model.generate(**make(1, seed=3), max_new_tokens=2)
    once = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for processors in [(GIFT(token_selector="all", alpha=a),) for a in (0.5, 5.0)] + [()]:
        with attnsteer.attach(model, variants=[list(processors)]):
            logits = model.generate(**inputs, **once).logits[0]
            tokens = model.generate(**inputs, **GREEDY)
        torch.testing.assert_close(ready.logits(*processors), logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(ready.generate(*processors, **GREEDY), tokens)
        assert torch.equal(ready.generate(*processors, **GREEDY), tokens)  # the cache is as it was


def test_a_prefill_runs_the_image_once() -> None:
    model, make = vlms.build("qwen25")
    inputs = make(1)
    passes: list[int] = []
    model.model.visual.register_forward_hook(lambda *_: passes.append(1))
    before = state_of(model)
    ready = attnsteer.prefill(model, GIFT(token_selector="all"), **inputs)
    answers = [ready.generate(GIFT(token_selector="all", alpha=a), **GREEDY) for a in (1.0, 3.0)]
    assert len(passes) == 1
    other = GIFT(token_selector="all", saliency=0)
    for _ in range(2):  # another survey is read when it is first wanted
        answers.append(ready.generate(other, **GREEDY))
        assert len(passes) == 2
    beams = ready.generate(other, **GREEDY, num_beams=2)
    assert state_of(model) == before
    with attnsteer.steer(model, other):
        assert torch.equal(model.generate(**inputs, **GREEDY), answers[-1])
        assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=2), beams)


def test_what_cannot_share_a_prefill_is_refused() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    ready = attnsteer.prefill(model, **inputs)
    for processor in (ScaleAll(), VHR()):
        with pytest.raises(SteeringError, match=f"{type(processor).__name__} changes more than the last row"):
            ready.generate(processor)
    with pytest.raises(SteeringError, match="ImageContrast predicts every token once more from a prompt of its own"):
        ready.generate(ImageContrast())
    with pytest.raises(SteeringError, match="input_ids= was given to prefill already"):
        ready.generate(input_ids=inputs["input_ids"])
    assert torch.equal(ready.generate(VHR(alpha=1.0), **GREEDY), model.generate(**inputs, **GREEDY))
    with pytest.raises(SteeringError, match="leave past_key_values out"):
        attnsteer.prefill(model, **inputs, past_key_values=model(**inputs).past_key_values)
    with pytest.raises(SteeringError, match="language model that generates, not Linear"):
        attnsteer.prefill(torch.nn.Linear(1, 1), **inputs)
    model, make = vlms.build("paligemma")
    before = state_of(model)
    with pytest.raises(SteeringError, match="Rows of this prompt see its last token"):
        attnsteer.prefill(model, **make(1))
    assert state_of(model) == before


@pytest.mark.parametrize("place", ["options", "config of the call", "config of the model"])
@pytest.mark.parametrize(("name", "value"), [("prompt_lookup_num_tokens", 2), ("assistant_early_exit", 2)])
def test_assisted_decoding_is_refused_wherever_it_is_asked_for(name: str, value: int, place: str) -> None:
    """It takes the cache for one of the whole prompt, and its tokens would be wrong."""
    model, make = vlms.build("llava")
    ready = attnsteer.prefill(model, **make(1))
    expected = ready.generate(**GREEDY)
    options: dict[str, Any] = {name: value} if place == "options" else {}
    if place == "config of the call":
        options["generation_config"] = GenerationConfig(**{name: value})
    if place == "config of the model":
        setattr(model.generation_config, name, value)
    for processors in ((), (GIFT(token_selector="all"),)):
        with pytest.raises(SteeringError, match=rf"Assisted decoding \({name}\) counts on a cache of the whole prompt"):
            ready.generate(*processors, **GREEDY, **options)
    assert torch.equal(ready.generate(**GREEDY, **{**options, name: None}), expected)
    assert ready.logits().argmax() == expected[0, -5]
    with pytest.raises(SteeringError, match=r"Assisted decoding \(assistant_model\)"):
        ready.generate(**GREEDY, **{name: None}, assistant_model=model)


# ---- as rows of one batch --------------------------------------------------------------------------------------------
VARIANTS: list[Any] = [
    GIFT(token_selector="all", alpha=1.0),
    None,
    [GIFT(token_selector="all", alpha=6.0), PAI(Where(layers=[0, 1]), alpha=0.8)],
    Variant((PAI(Where(layers=[2, 3]), alpha=0.5),), "PAI"),
    VHR(alpha=1.0),
]
"""Different strengths and methods, two at once, the plain model twice: as nothing, and as a method without strength."""
ALONE: list[list[Processor]] = [[VARIANTS[0]], [], VARIANTS[2], [*VARIANTS[3].processors], []]


def doubles(name: str, batch: int = 2) -> tuple[Any, dict[str, Any]]:
    """A model and left-padded prompts in double precision."""
    model, make = vlms.build(name)
    inputs = make(batch, left_padding=True)
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def _equal_alone(
    model: Any, inputs: dict[str, Any], variants: list[list[Processor]], logits: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Two rows of each variant are what the model gives with this variant attached."""
    once = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for number, processors in enumerate(variants):
        rows = slice(2 * number, 2 * number + 2)
        with attnsteer.attach(model, variants=[processors]):
            torch.testing.assert_close(logits[rows], model.generate(**inputs, **once).logits[0], rtol=1e-5, atol=1e-5)
            assert torch.equal(tokens[rows], model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("name", CAUSAL)
def test_variants_of_one_prefill_equal_a_generation_each(name: str) -> None:
    model, inputs = doubles(name)
    ready = attnsteer.prefill(model, **inputs)
    model.generate(**doubles(name, 1)[1], max_new_tokens=2)  # another prompt in between
    before = state_of(model)
    logits, tokens = ready.logits(variants=VARIANTS), ready.generate(variants=VARIANTS, **GREEDY)
    assert state_of(model) == before
    _equal_alone(model, inputs, ALONE, logits, tokens)
    for number, processors in enumerate(ALONE):
        expected = ready.logits(*processors)
        torch.testing.assert_close(logits[2 * number : 2 * number + 2], expected, rtol=1e-5, atol=1e-5)
    assert len({tuple(row) for row in logits[::2].tolist()}) == 4  # five variants, of which two are plain


@pytest.mark.parametrize("name", ["llava", "qwen25", "gemma3"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_beams_of_variants_equal_a_beam_search_each(name: str, options: dict[str, Any]) -> None:
    model, inputs = doubles(name)
    ready = attnsteer.prefill(model, VARIANTS[0], **inputs)
    found = ready.generate(variants=VARIANTS, **GREEDY, **options)
    alone = []
    for processors in ALONE:
        with attnsteer.attach(model, variants=[processors]):
            alone.append(model.generate(**inputs, **GREEDY, **options))
    assert torch.equal(found, torch.cat(alone))


def test_beams_that_the_generation_config_asks_for_are_counted() -> None:
    model, inputs = doubles("llava")
    with attnsteer.steer(model, VARIANTS[0]):
        expected = model.generate(**inputs, **GREEDY, num_beams=2)
    model.generation_config.num_beams = 2
    ready = attnsteer.prefill(model, **inputs)
    assert torch.equal(ready.generate(VARIANTS[0], **GREEDY), expected)
    assert torch.equal(ready.generate(variants=VARIANTS[:1], **GREEDY), expected)


@pytest.mark.parametrize(
    ("of_model", "given"), [(None, {"num_beams": 2}), (2, {"max_new_tokens": 5}), (3, {"num_beams": 2}), (2, None)]
)
def test_beams_are_those_of_the_effective_config(of_model: int | None, given: dict[str, Any] | None) -> None:
    """A config of the call goes before that of the model, which stands where the first says nothing."""
    model, inputs = doubles("llava")
    with attnsteer.steer(model, VARIANTS[0]):
        expected = model.generate(**inputs, **GREEDY, num_beams=2)
    model.generation_config.num_beams = of_model
    ready = attnsteer.prefill(model, **inputs)
    config = {} if given is None else {"generation_config": GenerationConfig(**given)}
    assert torch.equal(ready.generate(VARIANTS[0], **config, **GREEDY), expected)


# ---- what the vision tower saw ---------------------------------------------------------------------------------------
PAINTS = [PAINT(Where(layers="all"), alpha=a, local_ratio=0.5) for a in (0.5, 0.2)]


@pytest.mark.parametrize("named", [True, False])
def test_what_the_class_token_looked_at_stays_with_the_prefill(named: bool) -> None:
    """PAINT changes the last row alone: strengths, PAI beside it and beams share one prefill, the tower runs once."""
    model, inputs = doubles("llava")
    passes: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    ready = attnsteer.prefill(model, *PAINTS[:1] if named else (), **inputs)
    variants: list[Any] = [PAINTS[0], None, [PAINTS[1], PAI(Where(layers=[1]))], GIFT(token_selector="all")]
    alone: list[list[Processor]] = [[PAINTS[0]], [], variants[2], [variants[3]]]
    tokens, beams = ready.generate(variants=variants, **GREEDY), ready.generate(PAINTS[0], **GREEDY, num_beams=2)
    logits = ready.logits(variants=variants)
    assert len(passes) == 2  # the prompt, and once more for what nobody had named
    _equal_alone(model, inputs, alone, logits, tokens)
    with attnsteer.steer(model, PAINTS[0]):
        assert torch.equal(beams, model.generate(**inputs, **GREEDY, num_beams=2))
    assert not torch.equal(logits[:2], logits[2:4])


def test_variants_run_the_prompt_once_and_the_last_token_once() -> None:
    model, make = vlms.build("qwen25")
    inputs = make(2)
    towers: list[int] = []
    passes: list[tuple[int, ...]] = []
    model.model.visual.register_forward_hook(lambda *_: towers.append(1))
    layer = model.model.language_model.layers[0]
    layer.register_forward_hook(lambda _, args, out: passes.append(tuple(args[0].shape[:2])))
    ready = attnsteer.prefill(model, VARIANTS[0], **inputs)
    assert (towers, passes) == ([1], [tuple(inputs["input_ids"].shape)])
    passes.clear()
    ready.logits(variants=VARIANTS)
    assert (towers, passes) == ([1], [(10, 1)])


def test_every_survey_of_the_variants_is_read_once() -> None:
    model, make = vlms.build("llava")
    passes: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    ready = attnsteer.prefill(model, **make(2))
    variants = [GIFT(token_selector="all", alpha=a, saliency=s) for a in (1.0, 2.0) for s in (0, 1)]
    together = [ready.logits(variants=variants) for _ in range(2)]
    assert len(passes) == 2  # the prompt, then both surveys in one pass
    assert torch.equal(*together)
    separate = torch.cat([ready.logits(one) for one in variants])
    torch.testing.assert_close(together[0], separate, rtol=1e-4, atol=1e-4)


def test_variants_that_cannot_share_a_prefill_are_refused() -> None:
    model, make = vlms.build("llava")
    ready = attnsteer.prefill(model, **make(1))
    before = state_of(model)
    for call in (ready.generate, ready.logits):
        with pytest.raises(SteeringError, match="processors or variants, not both"):
            call(VARIANTS[0], variants=[PAI()])
        with pytest.raises(SteeringError, match="ScaleAll changes more than the last row"):
            call(variants=[PAI(), [PAI(), ScaleAll()]])
        with pytest.raises(SteeringError, match="Nothing to attach"):
            call(variants=[])
        with pytest.raises(SteeringError, match="3 is not an attnsteer processor"):
            call(variants=[[3]])
    assert state_of(model) == before
