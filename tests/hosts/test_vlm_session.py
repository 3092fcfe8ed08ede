"""A steered language model in use: ways to generate, rows, exceptions, copies, adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import AttentionCall, SteeringError, Where
from attnsteer.processors.vhd import VHD
from attnsteer.processors.vhr import VHR
from tests.hosts.common import GREEDY, Look, ScaleAll, factors_of, scaled, state_of, without_a_picture
from tests.tiny import vlms

# ---- the same tokens as the oracle, however the user generates -------------------------------------------------------
WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "sampling": {"do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "contrast of prompts": {"guidance_scale": 1.5},
}


# transformers itself cannot split raw pixels into chunks, nor run Qwen-VL with unbatched classifier-free guidance
UPSTREAM = {("llava", "chunked prefill"), ("gemma3", "chunked prefill"), ("qwen25", "contrast of prompts")}


@pytest.mark.parametrize(
    ("name", "way"), [(n, w) for n in ("llava", "qwen25", "gemma3") for w in WAYS if (n, w) not in UPSTREAM]
)
def test_every_way_to_generate_equals_the_oracle(name: str, way: str) -> None:
    model, make = vlms.build(name)
    inputs = make(1 if way == "prompt lookup" else 2, left_padding=True)
    options = {**GREEDY, **WAYS[way]}

    def run() -> Tensor:
        torch.manual_seed(5)
        return model.generate(**inputs, **options)

    with attnsteer.steer(model, VHR()) as steering:
        steered = run()
        factors = factors_of(steering)
    with scaled(model, factors):
        assert torch.equal(steered, run())


@pytest.mark.parametrize("name", vlms.NAMES)
def test_random_numbers_and_what_the_family_keeps_are_untouched_by_the_reference_pass(name: str) -> None:
    model, make = vlms.build(name)
    inputs = make(1)
    kept = lambda: [m.__dict__["rope_deltas"] for m in model.modules() if "rope_deltas" in m.__dict__]  # noqa: E731
    model(**make(2, seed=1))
    before, random = kept(), torch.get_rng_state()
    with attnsteer.steer(model, VHD()) as steering:
        steering.measure(inputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(a is b for a, b in zip(kept(), before, strict=True))
    assert inputs.keys() == make(1).keys()
    assert all(torch.equal(value, make(1)[key]) for key, value in inputs.items())


# ---- rows ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", vlms.NAMES)
def test_left_padded_rows_equal_solo_runs(name: str) -> None:
    model, make = vlms.build(name)
    inputs = make(3, left_padding=True)
    width = inputs["input_ids"].shape[1]
    with attnsteer.steer(model, VHR()) as steering:
        together = model.generate(**inputs, **GREEDY)[:, width:]
        factors = factors_of(steering)
        for row in range(3):
            alone = vlms.row(inputs, row)
            assert torch.equal(model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :], together[row])
            assert all(torch.equal(f[0], factors[name][row]) for name, f in factors_of(steering).items())


@pytest.mark.parametrize("name", ["llava", "qwen25", "gemma3"])
def test_several_strengths_in_one_batch_equal_solo_runs(name: str) -> None:
    """Rows with alpha 2, nothing, and alpha 3 on other layers, steps and heads."""
    model, make = vlms.build(name)
    inputs = make(3, left_padding=True)
    variants = [[VHR()], [], [VHR(Where(layers=[1, 2], heads=[0, 1, 4], steps="decode"), alpha=3.0)]]
    with attnsteer.attach(model, variants=variants) as _:
        logits = model(**inputs).logits
        together = model.generate(**inputs, **GREEDY)
    for row, processors in enumerate(variants):
        alone = vlms.row(inputs, row)
        width = alone["input_ids"].shape[1]
        with attnsteer.attach(model, variants=[processors]):
            torch.testing.assert_close(logits[row, -width:], model(**alone).logits[0], rtol=1e-4, atol=1e-4)
            assert torch.equal(together[row, -5:], model.generate(**alone, **GREEDY)[0, -5:])
    plain = model(**inputs).logits
    assert torch.equal(logits[1], plain[1])
    assert torch.equal(logits[2], plain[2])  # decode only
    assert not torch.equal(logits[0], plain[0])


def test_variants_are_dealt_to_repeated_prompts() -> None:
    model, make = vlms.build("llava")
    inputs = make(4)
    with attnsteer.attach(model, variants=[[VHR()], []]):
        logits = model(**inputs).logits
        beams = model.generate(**inputs, **GREEDY, num_beams=2)
    plain = model(**inputs).logits
    changed = [not torch.equal(a, b) for a, b in zip(logits, plain, strict=True)]
    assert changed == [True, True, False, False]
    assert torch.equal(beams[2:], model.generate(**inputs, **GREEDY, num_beams=2)[2:])
    with (
        attnsteer.attach(model, variants=[[VHR()], []]),
        pytest.raises(SteeringError, match="2 variants cannot be dealt to 3 prompts"),
    ):
        model(**make(3))


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2", "qwen25", "qwen3", "internvl", "gemma3", "paligemma"])
def test_rows_without_an_image_are_left_alone_in_a_mixed_batch(name: str) -> None:
    model, make = vlms.build(name)
    inputs = without_a_picture(make(2), make(1))
    plain = model(**inputs).logits
    with attnsteer.steer(model, VHR()) as steering:
        logits = model(**inputs).logits
        factors = factors_of(steering)
    assert torch.equal(logits[1], plain[1])
    assert not torch.equal(logits[0], plain[0])
    assert all((factor[1] == 1).all() and (factor[0] == 2).any() for factor in factors.values())


def test_right_padded_prompts_are_measured_at_their_own_last_token() -> None:
    model, make = vlms.build("llava")
    inputs = make(3, left_padding=True)
    rolled = dict(inputs)
    for key in ("input_ids", "attention_mask"):
        rolled[key] = torch.stack(
            [row.roll(-int((mask == 0).sum())) for row, mask in zip(inputs[key], inputs["attention_mask"], strict=True)]
        )
    with attnsteer.steer(model, VHR()) as steering:
        model(**inputs)
        left = factors_of(steering)
        model(**rolled)
        right = factors_of(steering)
    assert all(torch.equal(left[name], right[name]) for name in left)


# ---- composition -----------------------------------------------------------------------------------------------------
def test_static_edits_reach_both_lanes_of_the_reference_pass() -> None:
    model, make = vlms.build("llava")
    inputs = make(2)
    weight = {s.name: torch.full((1, vlms.HEADS), 1.5) for s in attnsteer.sites(model)}
    with attnsteer.steer(model, ScaleAll(factor=1.5), VHD()) as steering:
        model(**inputs)
        both = [state["vhd"] for state in steering.states(steering.processors[1]).values()]
    with scaled(model, weight), attnsteer.steer(model, VHD()) as steering:
        model(**inputs)
        by_hand = [state["vhd"] for state in steering.states(steering.processors[0]).values()]
    for a, b in zip(both, by_hand, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_recomputes_what_was_steered() -> None:
    model, make = vlms.build("llava")
    inputs = make(2)
    model.requires_grad_(True).train()

    def gradient() -> Tensor:
        model.zero_grad()
        with attnsteer.steer(model, VHR()):
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return model.model.language_model.layers[1].self_attn.q_proj.weight.grad.clone()

    plain = gradient()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradient(), plain)
    assert model.training
    assert all(module.training for module in model.modules())


def test_prompts_without_ids_or_pixels_are_refused_with_a_reason() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    with attnsteer.steer(model, VHR()):
        with pytest.raises(SteeringError, match="input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
        with pytest.raises(SteeringError, match="pixels"):
            model(input_ids=inputs["input_ids"])
    assert state_of(model) == ([], [], [None, None], False)


def test_a_plain_edit_works_with_embeddings_only() -> None:
    model, make = vlms.build("llava")
    ids = make(1)["input_ids"].masked_fill(make(1)["input_ids"] == vlms.IMAGE, 9)
    with attnsteer.steer(model, ScaleAll()):
        torch.testing.assert_close(
            model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(input_ids=ids).logits
        )


# ---- nothing stays behind --------------------------------------------------------------------------------------------
def test_an_exception_in_the_middle_of_a_generation_leaves_the_model_clean() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    plain, before = model.generate(**inputs, **GREEDY), state_of(model)
    calls = []

    def stumble(call: AttentionCall) -> None:
        calls.append(call.phase)
        if calls.count("decode") == 6:
            raise RuntimeError("stumbled")

    with pytest.raises(RuntimeError, match="stumbled"), attnsteer.steer(model, VHR(), Look(see=stumble)):
        model.generate(**inputs, **GREEDY)
    assert state_of(model) == before
    assert before[0] == []
    assert before[2] == [None, None]
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)


def test_after_an_exception_the_same_steering_goes_on() -> None:
    model, make = vlms.build("llava")
    inputs, broken = make(1), []
    with attnsteer.steer(model, VHR()):
        expected = model.generate(**inputs, **GREEDY)

    def stumble(call: AttentionCall) -> None:
        if broken and call.phase == "decode":
            raise RuntimeError(broken.pop())

    with attnsteer.steer(model, VHR(), Look(see=stumble)):
        broken.append("stumbled")
        with pytest.raises(RuntimeError, match="stumbled"):
            model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_an_interception_of_the_users_own_survives() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    plain, mine = model.generate, []

    def generate(*args: Any, **kwargs: Any) -> Any:
        mine.append(True)
        return plain(*args, **kwargs)

    model.generate = generate
    with attnsteer.steer(model, VHR()):
        model.generate(**inputs, **GREEDY)
    assert mine == [True]
    assert model.generate is generate


def test_a_session_may_end_inside_a_generation() -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    model, make = vlms.build("llava")

    class Detach(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
            if steering.attached:
                steering.detach()
            return torch.zeros(len(ids), dtype=torch.bool)

    model.generate(**make(1), **GREEDY)
    before = state_of(model)
    steering = attnsteer.attach(model, VHR())
    model.generate(**make(1), **GREEDY, stopping_criteria=StoppingCriteriaList([Detach()]))
    assert state_of(model) == before


# ---- around the model ------------------------------------------------------------------------------------------------
def test_copies_checkpoints_and_state_dicts_are_not_steered(tmp_path: Any) -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    plain, names = model.generate(**inputs, **GREEDY), set(model.state_dict())
    with attnsteer.steer(model, VHR()):
        assert not torch.equal(model.generate(**inputs, **GREEDY), plain)
        assert set(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        twin = copy.deepcopy(model)
        assert torch.equal(twin.generate(**inputs, **GREEDY), plain)
        assert torch.equal(twin(**inputs).logits, type(model).from_pretrained(tmp_path)(**inputs).logits)


@pytest.mark.parametrize("name", ["llava", "qwen25"])
def test_offloaded_models_are_steered_alike(name: str) -> None:
    from accelerate import cpu_offload

    model, make = vlms.build(name)
    inputs = make(2)
    with attnsteer.steer(model, VHR()):
        expected = model.generate(**inputs, **GREEDY)
    offloaded, _ = vlms.build(name)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with attnsteer.steer(offloaded, VHR()):
        assert torch.equal(offloaded.generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("attached_to", ["the model inside", "the adapted model"])
def test_adapters_on_the_model_are_steered_with_it(attached_to: str) -> None:
    peft = pytest.importorskip("peft")
    model, make = vlms.build("llava")
    inputs = make(2)
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    outer = peft.get_peft_model(model, adapter).eval()
    plain = outer(**inputs).logits
    target = outer if attached_to == "the adapted model" else model
    with attnsteer.steer(target, VHR()) as steering:
        steered, sequences = outer(**inputs).logits, outer.generate(**inputs, **GREEDY)
        factors = factors_of(steering)
    with scaled(model, factors):
        torch.testing.assert_close(steered, outer(**inputs).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(sequences, outer.generate(**inputs, **GREEDY))
    assert torch.equal(outer(**inputs).logits, plain)


def test_the_decoder_is_not_run_with_the_heads_of_another_prompt() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    with attnsteer.steer(model, VHR()):
        model(**inputs)
        with pytest.raises(SteeringError, match="past the steered model"):
            model.model(**inputs)
    with attnsteer.steer(model, ScaleAll()):
        model.model(**inputs)  # what needs no prompt may be called anyhow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_choose_half_of_the_heads(dtype: torch.dtype) -> None:
    model, make = vlms.build("llava")
    model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in make(2).items()}
    with attnsteer.steer(model, VHR()) as steering:
        assert model(**inputs).logits.dtype == dtype
        states = steering.states(steering.processors[0])
    assert all(state["heads"].sum(1).tolist() == [vlms.HEADS // 2] * 2 for state in states.values())
    assert all(
        state["vhd"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for state in states.values()
    )


# ---- text-only models ------------------------------------------------------------------------------------------------
def test_text_only_models_have_sites_and_take_edits() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=3, n_head=3, bos_token_id=1, eos_token_id=2))
    for model in (LlamaForCausalLM(LlamaConfig(**vlms.TEXT)), gpt2):
        model.eval()
        sites = attnsteer.sites(model)
        assert [site.layer for site in sites] == list(range(len(sites)))
        ids = torch.randint(7, 61, (2, 9))
        plain = model(ids).logits
        with attnsteer.steer(model, ScaleAll()):
            assert not torch.equal(model(ids).logits, plain)
        with attnsteer.steer(model, VHR()):
            assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids).logits, plain)


def test_sites_name_the_decoder_layers_and_not_the_tower() -> None:
    for name in vlms.NAMES:
        model, _ = vlms.build(name)
        sites = attnsteer.sites(model)
        assert [(s.layer, s.index, s.kind, s.heads, s.kv_heads, s.head_dim) for s in sites] == [
            (i, i, "causal", vlms.HEADS, vlms.KV_HEADS, vlms.HEAD_DIM) for i in range(vlms.LAYERS)
        ]
        assert all(model.get_submodule(s.name).layer_idx == s.layer for s in sites)
