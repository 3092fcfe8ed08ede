"""GIFT and GazeShift: the formulas against hand examples and loops, and the method against a manual oracle on tiny
models."""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import AttentionCall, SteeringError, Where, attend
from attnsteer.config import processor_from_dict
from attnsteer.processors.gaze_shift import (
    GazeShift,
    chosen_tokens,
    counting_words,
    mean_over_heads,
    normalised,
    positive_shift,
    saliency_layer,
)
from attnsteer.processors.gift import GIFT, log_factors
from attnsteer.site import Site, Spans, Word
from attnsteer.world import assets, sampling
from tests.calls import make_call, repeated
from tests.engine.common import explicit_attention, replaced_attention
from tests.hosts.common import GREEDY
from tests.tiny import vlms

ALL = GIFT(token_selector="all")
Rows = list[list[float]]


# ---- the paper by loops ----------------------------------------------------------------------------------------------
def loop_saliency(maps: list[Any], image: list[int], asked: list[int], fraction: float = 0.5) -> list[float]:
    """``s`` of one row; ``maps[layer][head][query][key]``."""
    total = [0.0] * len(image)
    kept_heads = 0
    for weights in maps:
        shift = [[[max(a[i][j] - a[i - 1][j], 0.0) for j in image] for i in asked] for a in weights]
        order = sorted(range(len(weights)), key=lambda h: -sum(map(sum, shift[h])))
        for head in order[: int(len(weights) * fraction)]:
            kept_heads += 1
            for step in shift[head]:
                total = [t + d for t, d in zip(total, step, strict=True)]
    m = [t / (kept_heads * len(asked)) for t in total]
    middle, reach = statistics.mean(m), 3 * statistics.stdev(m)
    m = [min(max(x, middle - reach), middle + reach) for x in m]
    low, high = min(m), max(m)
    return [(x - low) / (high - low) if high > low else 0.0 for x in m]


def loop_row(weights: Rows, image: list[int], asked: list[int], f: list[float], beta: float = 1.0) -> Rows:
    """The edited last row of every head; ``weights[head][key]``."""
    heads, half = range(len(weights)), len(weights) // 2
    seen = [sum(weights[h][j] for j in image) for h in heads]
    heard = [sum(weights[h][j] for j in asked) for h in heads]
    looking = sorted(heads, key=lambda h: -seen[h])[:half]
    listening = sorted(heads, key=lambda h: -heard[h])[:half]
    mass = sum(seen[h] for h in looking)
    boosted = sum(weights[h][j] * x for h in looking for j, x in zip(image, f, strict=True))
    ratio = boosted / mass if mass > 0 else 1.0
    out = [list(row) for row in weights]
    for h in looking:
        for j, x in zip(image, f, strict=True):
            out[h][j] *= x
    for h in listening:
        for j in asked:
            out[h][j] *= beta * ratio
    return [[x / sum(row) for x in row] for row in out]


def mask_of(length: int, *places: int) -> Tensor:
    return torch.tensor([[i in places for i in range(length)]])


# ---- hand examples ---------------------------------------------------------------------------------------------------
def test_hand_example_of_the_shift() -> None:
    weights = torch.tensor([[0.1, 0.2, 0.3], [0.2, 0.1, 0.3], [0.2, 0.4, 0.1]])[None, None]
    everything = torch.ones(1, 3, dtype=torch.bool)
    shift = positive_shift(weights, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(shift, torch.tensor([[[0.1, 0.3, 0.0]]]))
    mean = mean_over_heads(shift, torch.tensor([2]), 1)
    torch.testing.assert_close(mean, torch.tensor([[0.05, 0.15, 0.0]]))
    saliency = normalised(mean, everything, 3.0)
    torch.testing.assert_close(saliency, torch.tensor([[1 / 3, 1.0, 0.0]]))
    torch.testing.assert_close((5 * saliency).exp(), torch.tensor([[5.2945, 148.413, 1.0]]), rtol=1e-4, atol=1e-4)


def test_hand_example_of_the_boost() -> None:
    weights = torch.tensor([[0.2, 0.3, 0.1, 0.2, 0.2], [0.4, 0.1, 0.1, 0.3, 0.1]])[None, :, None]
    log_f = torch.tensor([[0.0, math.log(3), 0.0, 0.0, 0.0]])
    bias = log_factors(weights, log_f, mask_of(5, 1, 2), mask_of(5, 3), 1.0, 1)
    assert bias[0, 0, 0].count_nonzero() == 1  # HV = {0}: v1 alone, f of v2 is 1
    torch.testing.assert_close(bias[0, 1, 0], torch.tensor([0.0, 0, 0, math.log(2.5), 0]))  # HQ = {1}
    boosted = weights * bias.exp()
    rows = (boosted / boosted.sum(-1, keepdim=True))[0, :, 0]
    expected = torch.tensor([[0.125, 0.5625, 0.0625, 0.125, 0.125], [0.27586, 0.06897, 0.06897, 0.51724, 0.06897]])
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_what_only_falls_and_what_stays_are_not_salient() -> None:
    """Key 0 is a sink, key 1 loses attention while the question is read, key 2 gains it."""
    weights = torch.tensor([[0.5, 0.4, 0.1], [0.5, 0.3, 0.2], [0.5, 0.1, 0.4]])[None, None]
    shift = positive_shift(weights, torch.ones(1, 2, dtype=torch.bool))
    saliency = normalised(mean_over_heads(shift, torch.tensor([2]), 1), torch.ones(1, 3, dtype=torch.bool), 3.0)
    assert saliency.tolist() == [[0, 0, 1]]


def test_flat_maps_single_tokens_and_missing_images_give_a_factor_of_one() -> None:
    image = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    values = torch.tensor([[0.25, 0.25, 9.0], [3.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    for clamp in (3.0, None):
        assert normalised(values, image, clamp).count_nonzero() == 0


def test_outliers_are_clamped_before_the_range_is_stretched() -> None:
    values = torch.cat([torch.zeros(19), torch.tensor([0.5, 10.0])])[None]
    image = torch.ones_like(values, dtype=torch.bool)
    limit = statistics.mean(values[0].tolist()) + 3 * statistics.stdev(values[0].tolist())
    assert limit < 10
    assert normalised(values, image, 3.0)[0, -2].item() == pytest.approx(0.5 / limit)
    assert normalised(values, image, None)[0, -2].item() == pytest.approx(0.05)


def test_without_image_mass_the_ratio_is_one() -> None:
    weights = torch.tensor([[0.0, 0.6, 0.4], [0.0, 0.3, 0.7]])[None, :, None]
    bias = log_factors(weights, torch.tensor([[5.0, 0, 0]]), mask_of(3, 0), mask_of(3, 1), 2.0, 1)
    torch.testing.assert_close(bias[0, :, 0, 1], torch.tensor([math.log(2.0), 0.0]))
    assert torch.isfinite(bias).all()


# ---- which words -----------------------------------------------------------------------------------------------------
def words(text: str) -> tuple[Word, ...]:
    return tuple(Word(word, i, i + 1) for i, word in enumerate(text.split()))


def test_function_words_are_left_out_and_a_repeated_word_counts_where_it_stands_last() -> None:
    question = words("Is there a red dog near the 2 dog houses")
    assert [w[:2] for w in counting_words(question, "content")] == [("red", 3), ("dog", 8), ("2", 7), ("houses", 9)]
    longest = counting_words(question, lambda texts: [len(t) > 3 for t in texts])
    assert [w.text for w in longest] == ["there", "near", "houses"]
    with pytest.raises(SteeringError, match="gave 1 answers for 10 words"):
        counting_words(question, lambda texts: [True])


def test_a_question_without_content_words_counts_whole() -> None:
    question = torch.tensor([[False, True, True, True], [True, True, True, False]])
    spans = Spans(question, question, question=question, words=(words("x is it this")[1:], words("is dog it")))
    assert chosen_tokens(spans, "content").tolist() == [[False, True, True, True], [False, True, False, False]]
    assert torch.equal(chosen_tokens(spans, "all"), question)


# ---- parameters ------------------------------------------------------------------------------------------------------
def sites_of(layers: int, heads: int = 8, kv_heads: int = 8) -> list[Site]:
    return [Site(f"layers.{i}", "causal", i, i, heads, kv_heads, 8) for i in range(layers)]


@pytest.mark.parametrize(
    ("shape", "saliency", "layers", "alpha"),
    [
        ((32, 32, 32), 11, range(12, 23), 5),
        ((40, 40, 40), 10, range(14, 21), 5),
        ((28, 28, 4), 14, range(5, 19), 4),
        ((8, 8, 8), 2, range(3, 6), 5),
    ],
)
def test_defaults_follow_the_shape_of_the_model(
    shape: tuple[int, int, int], saliency: int, layers: range, alpha: float
) -> None:
    there = sites_of(*shape)
    assert GIFT().where_for(there).layers == list(layers)
    assert GIFT().survey(there).where.layers == [saliency]
    assert GIFT()._alpha(there[0]) == alpha
    assert GIFT(saliency=(1, 2)).survey(there).where.layers == [1, 2]


def test_surveys_of_different_strengths_are_equal() -> None:
    there = sites_of(8)
    assert GIFT(alpha=1).survey(there) == GIFT(alpha=5, beta=2, enhanced_heads=1).survey(there)
    assert GIFT().survey(there) != GIFT(saliency=5).survey(there)


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": -1}, {"beta": 0}, {"saliency_heads": 2}, {"enhanced_heads": -1}, {"clamp": -3}, {"token_selector": "x"}],
)
def test_a_wrong_parameter_names_itself_and_what_is_allowed(wrong: dict[str, Any]) -> None:
    with pytest.raises(SteeringError, match=next(iter(wrong))):
        GIFT(**wrong)


def test_parameters_survive_the_way_through_json() -> None:
    for processor in (GIFT(), GIFT(Where(layers=[1]), 3.0, 2.0, saliency=(1, 2), token_selector="all", clamp=None)):
        assert processor_from_dict(processor.to_dict()) == processor
    with pytest.raises(SteeringError, match=r"GIFT\(token_selector=...\) is a function"):
        GIFT(token_selector=lambda texts: [True for _ in texts]).to_dict()


def test_heads_to_choose_from_are_needed() -> None:
    assert "has one" in GIFT().refusals(sites_of(1, 1, 1)[0])[0]
    assert "less than one head" in GIFT(enhanced_heads=0.1).refusals(sites_of(1)[0])[0]
    assert GIFT().refusals(sites_of(1)[0]) == GazeShift().refusals(sites_of(1)[0]) == []


# ---- one call --------------------------------------------------------------------------------------------------------
def gift_call(batch: int = 3, n_q: int = 5, n_k: int = 17, mask: str = "full_bool") -> AttentionCall:
    """A call of random tensors with grouped keys; image and question stand elsewhere in every row."""
    torch.manual_seed(0)
    call = make_call(batch=batch, n_q=n_q, n_k=n_k, mask=mask, kind="causal")
    places = torch.arange(n_k)
    starts = torch.arange(batch)[:, None]
    image, question = (places >= 1 + starts) & (places < 6 + starts), (places >= 9 + starts) & (places < 12)
    call.spans = Spans(image, ~image, question=question, places=places)
    saliency = torch.rand(batch, n_k, dtype=torch.float64) * image
    call.shared = {"saliency": saliency, "image": torch.ones(batch, dtype=torch.bool)}
    return call


@pytest.mark.parametrize("mask", ["none", "causal", "full_bool", "full_float", "keys_bool"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_fused_equals_multiply_and_renormalise_in_float64(mask: str, beta: float) -> None:
    call = gift_call(n_q=17 if mask == "causal" else 5, mask=mask)
    edit = GIFT(alpha=5.0, beta=beta).react(call)
    assert edit is not None
    out = attend(call, [edit])
    weights, values = explicit_attention(call.q[:, :, -1:], call.k, call.v, call.mask_rows(slice(-1, None)), None)
    for row in range(3):
        image, asked = (s[row].nonzero().flatten().tolist() for s in (call.spans.image, call.spans.question))  # type: ignore
        f = [math.exp(5 * call.shared["saliency"][row, j]) for j in image]
        edited = torch.tensor(loop_row(weights[row, :, 0].tolist(), image, asked, f, beta), dtype=torch.float64)
        expected = torch.einsum("hk,hkd->hd", edited, repeated(call.v, call)[row])
        torch.testing.assert_close(out[row, :, -1], expected, rtol=0, atol=1e-12)
    assert torch.equal(out[:, :, :-1], call.output[:, :, :-1])
    assert values.shape[1] == 6


def test_rows_are_independent_and_rows_without_an_image_keep_their_bits() -> None:
    call = gift_call()
    call.shared["image"] = torch.tensor([True, False, True])
    edit = GIFT(alpha=5.0, beta=3.0).react(call)
    assert edit is not None
    out = attend(call, [edit])
    assert torch.equal(out[1], call.output[1])
    assert not torch.equal(out[0], call.output[0])
    alone = gift_call()
    alone.shared["saliency"] = call.shared["saliency"].flip(0)
    image, text, question = (x.flip(0) for x in (call.spans.image, call.spans.text, call.spans.question))  # type: ignore
    alone.spans = Spans(image, text, question=question, places=call.spans.places)  # type: ignore[union-attr]
    alone.q, alone.k, alone.v = call.q.flip(0), call.k.flip(0), call.v.flip(0)
    alone.visible = call.mask.flip(0)  # type: ignore[union-attr]
    alone.shared["image"] = call.shared["image"].flip(0)
    flipped = GIFT(alpha=5.0, beta=3.0).react(alone)
    assert flipped is not None
    torch.testing.assert_close(flipped.bias.flip(0), edit.bias, rtol=0, atol=1e-12)


def test_a_call_without_a_survey_is_an_error() -> None:
    call = gift_call()
    call.shared = {}
    with pytest.raises(SteeringError, match="has not seen this prompt"):
        GIFT().react(call)


# ---- tiny models: the paper by hand ----------------------------------------------------------------------------------
def _masked(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    n_q, n_k = query.shape[2], key.shape[2]
    if mask is not None or not is_causal:
        return mask
    return torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)


@contextlib.contextmanager
def plain_maps(model: Any, names: list[str], seen: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the whole maps of the named modules are kept."""

    def explicit(name: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **more: Any) -> Tensor:
        mask = _masked(q, k, attn_mask, more.get("is_causal", False))
        weights, values = explicit_attention(q, k, v, mask, more.get("scale"))
        seen[name] = weights.nan_to_num()  # rows of padding see nothing
        return seen[name] @ values

    with replaced_attention(model, names, explicit):
        yield


@contextlib.contextmanager
def by_hand(model: Any, inputs: dict[str, Any], alpha: float = 5.0, saliency: int = 1) -> Iterator[None]:
    """Inside, layers 1 and 2 are steered by explicit maps. Keys of the prompt stand where they stand in the prompt; a
    sliding layer in decode has lost the first of them, so keys are counted from the end there."""
    names = [site.name for site in attnsteer.sites(model)]
    maps: dict[str, Tensor] = {}
    with plain_maps(model, [names[saliency]], maps):
        model(**inputs)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    places = [
        (
            (ids[row] == vlms.IMAGE).nonzero().flatten().tolist(),
            list(range(1 + int((ids[row] == vlms.IMAGE).nonzero().max()), ids.shape[1])),
        )
        for row in range(len(ids))
    ]
    assert real[:, -1].all()
    factors = []
    for row, (image, asked) in enumerate(places):
        s = loop_saliency([maps[names[saliency]][row].tolist()], image, asked)
        factors.append([math.exp(alpha * x) for x in s])
    total = [0]

    def explicit(name: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **more: Any) -> Tensor:
        shape = q.shape
        q = q.reshape(len(q), vlms.HEADS, -1, q.shape[-1])  # in decode the library may put groups of heads into rows
        mask = _masked(q, k, attn_mask, more.get("is_causal", False))
        weights, values = explicit_attention(q, k, v, mask, more.get("scale"))
        if name == names[1]:  # a full layer in every family: it has all keys
            total[0] = k.shape[2]
        gone = total[0] - k.shape[2]
        weights = weights.nan_to_num()
        for row, (image, asked) in enumerate(places):
            here = [(j - gone, x) for j, x in zip(image, factors[row], strict=True) if j >= gone]
            edited = loop_row(
                weights[row, :, -1].tolist(),
                [j for j, _ in here],
                [j - gone for j in asked if j >= gone],
                [x for _, x in here],
            )
            weights[row, :, -1] = torch.tensor(edited, dtype=weights.dtype)
        return (weights @ values).reshape(shape)

    with replaced_attention(model, names[1:3], explicit):
        yield


@pytest.mark.parametrize("name", vlms.NAMES)
def test_every_family_equals_the_manual_oracle(name: str) -> None:
    """Greedy tokens and logits in float64, grouped keys and left padding."""
    model, make = vlms.build(name)
    model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in make(2, left_padding=True).items()}
    options = {**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with attnsteer.steer(model, GIFT(token_selector="all", alpha=5.0)):
        steered = model.generate(**inputs, **options)
    with by_hand(model, inputs):
        expected = model.generate(**inputs, **options)
    plain = model.generate(**inputs, **options)
    assert torch.equal(steered.sequences, expected.sequences)
    # generate hands logits out in float32
    torch.testing.assert_close(torch.stack(steered.logits), torch.stack(expected.logits), rtol=1e-6, atol=1e-6)
    assert (torch.stack(steered.logits)[0] - torch.stack(plain.logits)[0]).abs().max() > 0.1


def test_strength_zero_and_other_rows_keep_their_bits() -> None:
    model, make = vlms.build("llava")
    inputs = make(2)
    plain = model(**inputs).logits
    with attnsteer.steer(model, GIFT(alpha=0.0, token_selector="all")):
        assert torch.equal(model(**inputs).logits, plain)
    with attnsteer.attach(model, variants=[[ALL], []]):
        logits = model(**inputs).logits
    assert torch.equal(logits[1], plain[1])
    assert torch.equal(logits[0, :-1], plain[0, :-1])
    assert not torch.equal(logits[0, -1], plain[0, -1])


@pytest.mark.parametrize("name", ["llava", "qwen25", "gemma3"])
def test_a_mixed_batch_equals_solo_runs(name: str) -> None:
    """Rows of different lengths and strengths, and each of them alone without padding."""
    model, make = vlms.build(name)
    inputs = make(3, left_padding=True)
    variants = [[ALL], [GIFT(token_selector="all", alpha=2.0, beta=1.5)], [GIFT(Where(layers=[2]), 3.0, saliency=0, token_selector="all")]]  # fmt: skip  # noqa: E501
    with attnsteer.attach(model, variants=variants):
        together = model.generate(**inputs, **GREEDY)[:, -5:]
    for row, variant in enumerate(variants):
        with attnsteer.attach(model, variants=[variant]):
            assert torch.equal(model.generate(**vlms.row(inputs, row), **GREEDY)[0, -5:], together[row])


def test_a_row_without_a_picture_is_left_alone() -> None:
    model, make = vlms.build("llava")
    inputs = make(2)
    inputs["input_ids"][1] = torch.where(inputs["input_ids"][1] == vlms.IMAGE, 9, inputs["input_ids"][1])
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    plain = model(**inputs).logits
    with attnsteer.steer(model, GIFT(token_selector="all", beta=2.0)):
        steered = model(**inputs).logits
    assert torch.equal(steered[1], plain[1])
    assert not torch.equal(steered[0, -1], plain[0, -1])


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_other_ways_to_generate_give_the_same_tokens_as_the_manual_oracle(more: dict[str, Any]) -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    with attnsteer.steer(model, ALL):
        first = model.generate(**inputs, **GREEDY)
        steered = model.generate(**inputs, **GREEDY, **more)
    if "num_beams" not in more:
        assert torch.equal(steered, first)
        return
    twice = {k: v.repeat_interleave(2, 0) for k, v in inputs.items()}
    with by_hand(model, twice):
        assert torch.equal(steered, model.generate(**inputs, **GREEDY, **more))


def test_the_layer_that_shifts_most() -> None:
    model, make = vlms.build("llava")
    prompts = [make(1, seed=seed) for seed in range(2)]
    layer, shifts = saliency_layer(model, prompts, token_selector="all")
    maps: dict[str, Tensor] = {}
    names = [site.name for site in attnsteer.sites(model)]
    expected = [0.0] * vlms.LAYERS
    for inputs in prompts:
        with plain_maps(model, names, maps):
            model(**inputs)
        for i, name in enumerate(names):
            image = inputs["input_ids"][0] == vlms.IMAGE
            rows = maps[name][0][:, -vlms.QUESTION - 1 :, image]
            expected[i] += (rows[:, 1:] - rows[:, :-1]).clamp_min(0).sum().item() / 2
    assert [shifts[i] for i in range(vlms.LAYERS)] == pytest.approx(expected, rel=1e-4)
    assert layer == expected.index(max(expected))
    with pytest.raises(SteeringError, match="needs prompts"):
        saliency_layer(model, [], token_selector="all")


@pytest.mark.parametrize("way", ["layers", "static decoding"])
def test_compiled_equals_eager_and_later_prompts_make_no_graphs(way: str) -> None:
    model, make = vlms.build("llava")
    prompts = [make(2, seed=seed, left_padding=True) for seed in (0, 1, 2)]
    static = {"cache_implementation": "static", "output_logits": True, "return_dict_in_generate": True}

    def run(given: dict[str, Any]) -> Tensor:
        if way == "layers":
            return model(**given, use_cache=False).logits[:, -1]
        return torch.stack(model.generate(**given, **GREEDY, **static).logits)

    with attnsteer.steer(model, ALL):
        expected = [run(given) for given in prompts]
    graphs: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    if way == "layers":
        for layer in model.model.language_model.layers:
            layer.compile(backend=backend, fullgraph=True)
    else:  # what generate does by itself on a GPU
        compiled = torch.compile(model.__call__, backend=backend, fullgraph=True)
        model._valid_auto_compile_criteria = lambda *_: True
        model.get_compiled_call = lambda config: compiled
    counts = []
    with attnsteer.steer(model, ALL):
        for given, logits in zip(prompts, expected, strict=True):
            torch.testing.assert_close(run(given), logits, rtol=1e-4, atol=1e-4)
            counts.append(len(graphs))
    torch._dynamo.reset()
    assert 0 < counts[0] == counts[-1]


# ---- a trained model -------------------------------------------------------------------------------------------------
def test_world_llava_answers_under_gift() -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    try:
        folder = assets.path("models/world-llava")
    except FileNotFoundError as error:
        pytest.skip(f"model not trained here: {error}")
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    questions = ["Is there a dog in the image?", "Please describe this image in detail."]
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
    pictures = [sampling.sample(7).image()] * 2
    inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    with attnsteer.steer(model, GIFT(), processor=processor) as steering:
        answers = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        saliency = steering.plans[0].shared["saliency"]
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert answers.shape == plain.shape
    assert ((saliency > 0) <= (inputs.input_ids == model.config.image_token_index)).all()
    assert saliency.amax(-1).tolist() == [1, 1]
    with pytest.raises(SteeringError, match="give processor="):
        attnsteer.attach(model, GIFT())


@pytest.mark.parametrize(
    "prompt", ["USER: Is there a dog in the image? <image> ASSISTANT:", "USER: <image> ASSISTANT:"]
)
def test_a_map_that_nothing_was_read_for_warns(prompt: str) -> None:
    """A question before the image cannot see it: f = 1, and the user hears of it."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = assets.path("models/world-llava")
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    picture = sampling.sample(7).image()
    usual = processor(text=["USER: <image> Is there a dog? ASSISTANT:"], images=[picture], return_tensors="pt")
    odd = processor(text=[prompt], images=[picture], return_tensors="pt")
    plain = model(**odd).logits
    with attnsteer.steer(model, GIFT(), processor=processor), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**usual)
        with pytest.warns(UserWarning, match=r"rows \[0\] of the batch"):
            assert torch.equal(model(**odd).logits, plain)
