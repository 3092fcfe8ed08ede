"""Methods that edit logits and attention, on every family: kernels, rows, and every way to generate."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import AttentionCall, KeyBias, Processor, SteeringError, Where
from attnsteer.binding import ATTRIBUTE
from attnsteer.edits import LogitEdit
from attnsteer.processors.gift import GIFT
from attnsteer.processors.icd import ICD
from attnsteer.processors.m3id import M3ID
from attnsteer.processors.pai import PAI
from attnsteer.processors.paint import PAINT
from attnsteer.processors.softpag import SoftPAG
from attnsteer.processors.vaf import VAF
from attnsteer.processors.var import VAR
from attnsteer.processors.vcd import VCD
from attnsteer.processors.vhd import VHD
from attnsteer.processors.vhr import VHR
from tests.engine.common import double
from tests.hosts.common import GREEDY, Look, state_of
from tests.tiny import vlms

ALL = Where(layers="all")
METHODS: dict[str, Processor] = {
    "VAR": VAR(ALL, tau=1.2, rho=0.1, floor=0.05, channels=(3, 11)),
    "VAF": VAF(ALL, alpha=0.6, beta=0.3),
    "VAF of some heads": VAF(ALL, alpha=0.9, head_fraction=0.4),
    "PAI": PAI(ALL),
    "PAINT": PAINT(ALL),
}
OFF: dict[str, dict[str, float]] = {
    "VAR": {"fraction": 0.0},
    "VAF": {"alpha": 0.0, "beta": 0.0},
    "VAF of some heads": {"alpha": 0.0, "beta": 0.0},
    "PAI": {"alpha": 0.0},
    "PAINT": {"alpha": 0.0, "beta": 0.0},
}
FEW = {"PAINT": ("llava",), "VAF of some heads": ("llava", "gemma3")}
PAIRS = [(n, m) for n in vlms.NAMES for m in METHODS if n in FEW.get(m, vlms.NAMES)]


SPECIAL = list(range(vlms.VIDEO + 1))
"""Tokens that a random model must not write: images without pixels."""
LONG = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "suppress_tokens": SPECIAL}


def only_rows(logits: Tensor, mask: Tensor) -> Tensor:
    return logits[mask.bool()]


KERNELS = [("sdpa", "eager"), pytest.param(("sdpa", "flex_attention"), marks=pytest.mark.slow)]


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels[1])
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_kernels_agree_rows_are_independent_and_off_is_plain(name: str, method: str, kernels: tuple[str, ...]) -> None:
    """All kernels give one result; a row of a padded batch is its solo run; strength 0 is the plain model."""
    if "flex_attention" in kernels:
        if name.startswith("qwen"):
            pytest.skip("transformers has no flex attention for Qwen-VL")
        torch._dynamo.reset()  # torch 2.13 cannot compile it for sizes that vary
    # torch 2.13 writes C++ that does not compile for a mask of image tokens that see each other, in the plain model too
    stance = "force_eager" if "flex_attention" in kernels and name == "gemma3" else "default"
    model, make = vlms.build(name)
    inputs, found = make(2, left_padding=True), {}
    for implementation in kernels:
        model.set_attn_implementation({"text_config": implementation})
        with warnings.catch_warnings(), torch.compiler.set_stance(stance):
            warnings.simplefilter("ignore", UserWarning)  # flex without compilation
            plain, before = model(**inputs).logits, state_of(model)
            with attnsteer.steer(model, METHODS[method]):
                found[implementation] = model(**inputs).logits
            assert state_of(model) == before
            assert torch.equal(model(**inputs).logits, plain)
            with attnsteer.steer(model, replace(METHODS[method], **OFF[method])):  # type: ignore[type-var]
                assert torch.equal(model(**inputs).logits, plain)
        real = inputs["attention_mask"]
        assert not torch.allclose(only_rows(found[implementation], real), only_rows(plain, real), atol=1e-3)
        torch.testing.assert_close(
            only_rows(found[implementation], real), only_rows(found["sdpa"], real), rtol=1e-3, atol=1e-3
        )
    model.set_attn_implementation({"text_config": "sdpa"})
    with attnsteer.steer(model, METHODS[method]):
        for row in range(2):
            alone = vlms.row(inputs, row)
            width = alone["input_ids"].shape[1]
            torch.testing.assert_close(found["sdpa"][row, -width:], model(**alone).logits[0], rtol=1e-3, atol=1e-3)


# ---- the same tokens, however they are generated ---------------------------------------------------------------------
WAYS: dict[str, dict[str, Any]] = {
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 7},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
}


def scores(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    settings = {**GREEDY, "suppress_tokens": SPECIAL, "output_logits": True, "return_dict_in_generate": True, **options}
    return torch.stack(model.generate(**inputs, **settings).logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "qwen25", "gemma3", "paligemma"])
def test_every_way_to_generate_gives_the_same(name: str, method: str) -> None:
    """Logits of every step: caches of any kind, no cache, and prompts in chunks, with padding and lost keys."""
    if method == "PAINT" and name != "llava":
        pytest.skip("needs a tower with a class token")
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    with attnsteer.steer(model, METHODS[method]):
        expected = scores(model, inputs)
        for way in ("static cache", "no cache"):
            torch.testing.assert_close(scores(model, inputs, **WAYS[way]), expected, rtol=1e-3, atol=1e-3)
        if name == "qwen25":  # transformers cannot split raw pixels of the others
            torch.testing.assert_close(scores(model, inputs, **WAYS["chunked prefill"]), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(scores(model, inputs), expected, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_beams_equal_beams_of_one_prompt(method: str) -> None:
    model, make = vlms.build("llava")
    inputs = make(2, left_padding=True)
    with attnsteer.steer(model, METHODS[method]):
        together = model.generate(**inputs, **GREEDY, num_beams=2)[:, -5:]
        for row in range(2):
            alone = model.generate(**vlms.row(inputs, row), **GREEDY, num_beams=2)
            assert torch.equal(alone[0, -5:], together[row])


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from attnsteer.world import assets

    try:
        folder = assets.path("models/world-llava")
    except FileNotFoundError as error:
        pytest.skip(f"model not trained here: {error}")
    return LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


OTHERS = {"VHR": VHR(ALL), "GIFT": GIFT(alpha=3.0), "VCD": VCD(), "ICD": ICD(), "M3ID": M3ID(decay=0.3)}


@pytest.mark.parametrize("method", ["VAR", "VAF", "PAI", "PAINT", *OTHERS])
def test_the_embedded_model_answers_a_batch_as_it_answers_one_by_one(shipped: tuple[Any, Any], method: str) -> None:
    from attnsteer.world import sampling

    model, processor = shipped
    questions = ["Please describe this image in detail.", "Is there a dog in the image?"]
    texts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
    pictures = [sampling.sample(number).image() for number in (7, 8)]
    options = {"max_new_tokens": 12, "do_sample": False}
    both = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    steered = {**METHODS, **OTHERS}[method]
    with attnsteer.steer(model, steered, processor=processor):
        together = model.generate(**both, **options)[:, both["input_ids"].shape[1] :]
        for row in range(2):
            one = processor(images=pictures[row], text=texts[row], return_tensors="pt")
            alone = model.generate(**one, **options)[0, one["input_ids"].shape[1] :]
            assert torch.equal(alone, together[row, : len(alone)])


def echo(make: Any) -> dict[str, Any]:
    """A prompt whose question repeats itself, so that prompt lookup guesses from the first step on."""
    inputs = make(1)
    inputs["input_ids"][0, -5:] = torch.tensor([11, 12, 13, 11, 12])
    return inputs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_guessed_tokens_are_steered_as_decoded_ones(name: str, method: str) -> None:
    """Prompt lookup checks several tokens in one step; each is a row that predicts."""
    if method == "PAINT" and name != "llava":
        pytest.skip("needs a tower with a class token")
    model, make = vlms.build(name)
    inputs, seen = echo(make), set()
    look = Look(ALL, see=lambda call: seen.add((call.phase, call.predicts, call.q.shape[2])))
    with attnsteer.steer(model, METHODS[method], look):
        expected = model.generate(**inputs, **LONG)
        plain_calls, _ = set(seen), seen.clear()
        assert torch.equal(model.generate(**inputs, **LONG, prompt_lookup_num_tokens=3), expected)
    width = inputs["input_ids"].shape[1]
    assert plain_calls == {("prefill", 1, width), ("decode", 1, 1)}
    assert all(predicts == n for phase, predicts, n in seen if phase == "decode")
    assert any(predicts == 1 + n - width > 1 for phase, predicts, n in seen if phase == "prefill")


def test_rows_that_predict_in_chunks_and_without_a_cache() -> None:
    model, make = vlms.build("qwen25")
    inputs, seen = make(1), []
    width = inputs["input_ids"].shape[1]
    with attnsteer.steer(
        model, Look(Where(layers=[0]), see=lambda call: seen.append((call.predicts, call.q.shape[2])))
    ):
        model.generate(**inputs, **{**GREEDY, "max_new_tokens": 2, "min_new_tokens": 2}, prefill_chunk_size=10)
        chunks = [(0, 10)] * ((width - 1) // 10) + [(1, (width - 1) % 10 + 1)]
        assert seen == [*chunks, (1, 1)]
        seen.clear()
        model.generate(**inputs, **{**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}, use_cache=False)
        assert seen == [(1, width), (2, width + 1), (3, width + 2)]
        seen.clear()
        model(**inputs)
        assert seen == [(1, width)]


@dataclass(frozen=True)
class BoostLast(Processor):
    """The logits of image keys plus 1 in the rows that predict."""

    kinds = ("causal",)

    def react(self, call: AttentionCall) -> KeyBias:
        assert call.spans is not None
        return KeyBias(call.spans.image[:, None].float(), "last")  # type: ignore[index]


def test_a_bias_on_the_last_row_holds_for_guessed_tokens() -> None:
    model, make = vlms.build("llava")
    inputs = echo(make)
    plain = model.generate(**inputs, **LONG)
    with attnsteer.steer(model, BoostLast()):
        expected = model.generate(**inputs, **LONG)
        assert torch.equal(model.generate(**inputs, **LONG, prompt_lookup_num_tokens=3), expected)
    assert not torch.equal(expected, plain)


# ---- together with others --------------------------------------------------------------------------------------------
def test_with_vhr_the_reference_pass_is_edited_too_and_nothing_leaks() -> None:
    """Heads are chosen in a pass of twice the rows, where the image-free half has nothing to edit."""
    model, make = vlms.build("llava")
    inputs = make(2, left_padding=True)
    for method in METHODS.values():
        with attnsteer.steer(model, method, VHR(ALL)):
            together = model.generate(**inputs, **GREEDY)[:, -5:]
            for row in range(2):
                assert torch.equal(model.generate(**vlms.row(inputs, row), **GREEDY)[0, -5:], together[row])


def test_vhd_measures_what_an_edit_of_the_answer_leaves() -> None:
    """Every token of a measured answer was predicted by an edited row."""
    model, make = vlms.build("llava")
    inputs = make(1)
    answer, vhd, seen = torch.tensor([[9, 10, 11]]), VHD(positions=4), []
    look = Look(ALL, see=lambda call: seen.append(call.predicts))
    with attnsteer.steer(model, PAI(ALL), vhd, look) as steering:
        steering.measure(inputs, answer)
        states = steering.states(vhd)
    assert set(seen) == {4}
    assert all(state["vhd"].shape == (1, 6, 4) for state in states.values())


def test_variants_of_a_batch_equal_solo_runs() -> None:
    model, make = vlms.build("llava")
    inputs = make(4, left_padding=True)
    variants = [[METHODS["VAR"]], [], [METHODS["PAI"]], [VAF(Where(layers=[1, 2], heads=[0, 4]), alpha=0.8)]]
    same_as_solo(model, inputs, variants)


def test_two_methods_may_ask_the_vision_tower() -> None:
    model, make = vlms.build("llava")
    same_as_solo(model, make(3, left_padding=True), [[PAINT(ALL, alpha=0.3)], [], [PAINT(ALL)]])
    for module in model.modules():
        assert ATTRIBUTE not in module.__dict__


def same_as_solo(model: Any, inputs: dict[str, Any], variants: list[list[Processor]]) -> None:
    """Row 1 is plain, the others are not, and each is what it is alone."""
    plain = model(**inputs).logits
    with attnsteer.attach(model, variants=variants):
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, **GREEDY)[:, -5:]
    assert torch.equal(logits[1], plain[1])
    for row, processors in enumerate(variants):
        alone = vlms.row(inputs, row)
        with attnsteer.attach(model, variants=[processors]):
            assert torch.equal(model.generate(**alone, **GREEDY)[0, -5:], tokens[row])
        assert torch.equal(logits[row], plain[row]) == (row == 1)


@pytest.mark.parametrize(
    "method", [*METHODS.values(), PAI(Where(steps="decode")), PAI(Where(steps="prefill"))], ids=repr
)
def test_a_model_that_drafts_for_itself_says_the_same(method: Processor) -> None:
    model, make = vlms.build("llava")
    inputs = double(make(1))
    model = model.double()
    with attnsteer.steer(model, method):
        expected = model.generate(**inputs, **LONG)
        assert torch.equal(model.generate(**inputs, **LONG, assistant_model=model), expected)


def test_a_contrast_shows_the_tower_to_nobody_else() -> None:
    """The noised picture of VCD is not what PAINT chooses patches by, although that is asked for later."""
    model, make = vlms.build("llava")
    inputs, method = make(1), PAINT(Where(steps="decode"))
    with attnsteer.steer(model, method):
        expected = scores(model, inputs)
    with attnsteer.steer(model, method, VCD(alpha=1e-9, beta=0.0)):
        torch.testing.assert_close(scores(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_phases_need_a_cache() -> None:
    model, make = vlms.build("llava")
    with (
        attnsteer.steer(model, PAI(Where(steps="decode"))),
        pytest.raises(SteeringError, match="Without a cache every pass is a prefill"),
    ):
        model.generate(**make(1), **GREEDY, use_cache=False)


def test_what_does_not_compose_is_refused_at_attach() -> None:
    model, _ = vlms.build("llava")
    with pytest.raises(SteeringError, match=r"Redistribute and KeyBias do not compose"):
        attnsteer.attach(model, METHODS["VAR"], GIFT(ALL, token_selector="all"))
    with pytest.raises(SteeringError, match="Redistribute and LogitEdit do not compose"):
        attnsteer.attach(model, METHODS["VAR"], METHODS["PAI"])
    with pytest.raises(SteeringError, match="Two signed LogitEdit edits"):
        attnsteer.attach(model, METHODS["VAF"], replace(VAF(ALL), alpha=0.1))
    with attnsteer.steer(model, METHODS["VAR"], PAI(ALL, alpha=0.0)):  # off
        pass
    here, there = Where(layers=[0, 1]), Where(layers=[2, 3])
    with attnsteer.steer(model, replace(VAR(channels=(3,), tau=2.0), where=here), PAI(there), VAF(there)):
        pass


def test_a_diffusion_model_has_nothing_for_them() -> None:
    from tests.tiny import denoisers

    model = denoisers.build(denoisers.NAMES[0])[0]
    with pytest.raises(SteeringError, match="no causal"):
        attnsteer.attach(model, PAI())
    assert SoftPAG.facts.fget(SoftPAG()) == {}  # type: ignore[attr-defined]


# ---- compiled decoding -----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_decoding_equals_eager(method: str) -> None:
    """One full graph for decode steps with a static cache, as generate() makes on a GPU."""
    torch._dynamo.reset()
    model, make = vlms.build("llava")
    inputs, graphs = make(2, left_padding=True), []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(1)
        return graph.forward

    compiled: list[Any] = []

    def get_compiled_call(config: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(model.__call__, backend=backend, fullgraph=True))
        return compiled[0]

    with attnsteer.steer(model, METHODS[method]):
        expected = scores(model, inputs, **WAYS["static cache"])
    model._valid_auto_compile_criteria = lambda *_: True
    model.get_compiled_call = get_compiled_call
    with attnsteer.steer(model, METHODS[method]):
        torch.testing.assert_close(scores(model, inputs, **WAYS["static cache"]), expected, rtol=1e-4, atol=1e-4)
        before = len(graphs)
        scores(model, inputs, **WAYS["static cache"])
    assert len(graphs) == before > 0
    torch._dynamo.reset()


def test_the_form_of_an_edit_is_not_changed_by_limits() -> None:
    """One weight for all heads stays one, so a choice of heads costs no further kernel call."""
    calls = []
    model, make = vlms.build("llava")

    @dataclass(frozen=True)
    class Count(VAF):
        def react(self, call: AttentionCall) -> Any:
            kernel = call.kernel
            call.kernel = lambda *a, **k: calls.append(1) or kernel(*a, **k)
            edit = super().react(call)
            assert isinstance(edit, LogitEdit)
            assert edit.weight.shape[1] == 1
            return edit

    with attnsteer.steer(model, Count(Where(layers=[1], heads=[0, 3]))):
        model(**make(1))
    assert len(calls) == 2
