"""VHR and VHD: the formulas against hand examples and loops, and the method against a manual oracle on tiny models."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.config import processor_from_dict
from attnsteer.processors.vhd import VHD, measure, t_vhd
from attnsteer.processors.vhr import (
    VHR,
    negative_sensitivity,
    paper_layers,
    select_heads,
    text_activation,
    vhd,
)
from attnsteer.site import AttentionCall, Site, Spans
from tests.hosts.common import factors_of, scaled
from tests.tiny import vlms

ALL_LAYERS = Where(layers="all")


# ---- formulas: hand examples -----------------------------------------------------------------------------------------
WITH = torch.tensor([[3.0, 4], [1, 0], [0, 2], [0, 0]])
WITHOUT = torch.tensor([[0.0, 0], [1, 0], [0, 0], [5, 0]])


def test_hand_example_of_four_heads() -> None:
    distance, activation = vhd(WITH, WITHOUT), text_activation(WITHOUT)
    assert distance.tolist() == [5, 0, 2, 5]
    assert activation.tolist() == [0, 1, 0, 25]
    assert not negative_sensitivity(distance, activation).any()  # 5 < 3 + 2.449, although 25 > 6.5 + 12.342
    assert select_heads(distance, activation).tolist() == [True, False, False, True]


def test_hand_example_with_a_zeroed_head() -> None:
    assert select_heads(torch.tensor([5.0, 0, 2, 0]), torch.zeros(4)).tolist() == [True, False, True, False]


def test_hand_example_where_the_outlier_filter_acts() -> None:
    distance = torch.tensor([1.0, 1, 1, 1, 1, 1, 2, 9])
    activation = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 9])
    assert distance.mean() + distance.std() == pytest.approx(4.925, abs=1e-3)
    assert activation.mean() + activation.std() == pytest.approx(4.828, abs=1e-3)
    assert negative_sensitivity(distance, activation).nonzero().flatten().tolist() == [7]
    assert select_heads(distance, activation).nonzero().flatten().tolist() == [6]
    assert select_heads(distance, activation, outliers=False).nonzero().flatten().tolist() == [6, 7]


def test_a_head_needs_both_signs_to_be_an_outlier() -> None:
    high, flat = torch.tensor([1.0, 1, 1, 1, 1, 1, 2, 9]), torch.ones(8)
    assert not negative_sensitivity(high, flat).any()
    assert not negative_sensitivity(flat, high).any()


def test_ties_and_single_heads_select_fewer_than_half() -> None:
    assert not select_heads(torch.ones(6), torch.ones(6)).any()
    assert not select_heads(torch.tensor([3.0]), torch.tensor([1.0])).any()
    assert select_heads(torch.tensor([1.0, 3.0]), torch.ones(2)).tolist() == [False, True]


@pytest.mark.parametrize("heads", [5, 6, 7, 32])
def test_selection_equals_a_loop(heads: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    with_image, without = (torch.randn(3, heads, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    without[:, 0] *= 20
    chosen = select_heads(vhd(with_image, without), text_activation(without))
    for row in range(3):
        distance = [(with_image[row, i] - without[row, i]).square().sum().sqrt().item() for i in range(heads)]
        surge = [without[row, i].square().sum().item() for i in range(heads)]
        limits = [statistics.mean(x) + statistics.stdev(x) for x in (distance, surge)]
        kept = [0.0 if d > limits[0] and s > limits[1] else d for d, s in zip(distance, surge, strict=True)]
        expected = [d > sorted(kept)[(heads - 1) // 2] for d in kept]
        assert chosen[row].tolist() == expected
        assert sum(expected) == heads // 2


def test_t_vhd_sums_the_largest_heads_of_each_layer() -> None:
    distance = torch.tensor([[1.0, 5, 3], [2, 2, 7]])
    assert t_vhd(distance, k=2) == 5 + 3 + 7 + 2
    assert t_vhd(distance, k=8) == distance.sum()


def test_more_alpha_turns_the_residual_further_towards_the_head() -> None:
    generator = torch.Generator().manual_seed(0)
    residual, head = torch.randn(2, 16, generator=generator)
    angles = [torch.cosine_similarity(residual + alpha * head, head, dim=0).item() for alpha in (0.5, 1, 2, 3)]
    assert angles == sorted(angles)


# ---- parameters ------------------------------------------------------------------------------------------------------
def _sites(layers: int) -> list[Site]:
    return [Site(f"layers.{i}", "causal", i, i, 4, 4, 8) for i in range(layers)]


def test_default_layers_are_the_second_and_the_last_fourteen() -> None:
    assert paper_layers(_sites(32)) == [1, *range(18, 32)]
    assert paper_layers(_sites(32), second_layer=False) == [*range(18, 32)]
    assert paper_layers(_sites(28)) == [1, *range(14, 28)]
    assert paper_layers(_sites(8)) == [1, 4, 5, 6, 7]
    assert paper_layers(_sites(4)) == [1, 2, 3]
    assert VHR().where_for(_sites(32)).layers == [1, *range(18, 32)]
    assert VHR(Where(layers=[3])).where_for(_sites(32)).layers == [3]


@pytest.mark.parametrize(
    "wrong", [{"alpha": -1}, {"alpha": 11}, {"alpha": float("nan")}, {"reference": "none"}, {"removal": "blur"}]
)
def test_a_wrong_parameter_names_itself_and_what_is_allowed(wrong: dict[str, Any]) -> None:
    with pytest.raises(SteeringError, match=next(iter(wrong))):
        VHR(**wrong)


def test_positions_of_vhd_are_counted() -> None:
    with pytest.raises(SteeringError, match=r"positions=1.5.*an int from 1 up"):
        VHD(positions=1.5)  # type: ignore[arg-type]


def test_parameters_survive_the_way_through_json() -> None:
    for processor in (VHR(), VHR(Where(layers=[1, 2]), alpha=3.0, reference="plain", second_layer=False)):
        assert processor_from_dict(processor.to_dict()) == processor


# ---- one call --------------------------------------------------------------------------------------------------------
def _call(output: Tensor, image: Tensor, **more: Any) -> AttentionCall:
    """A kernel call whose output is given; two lanes of one row each."""
    kernel = lambda q, k, v, mask=None: output  # noqa: E731
    lanes = {"main": slice(0, 1), "image_free": slice(1, 2)}
    spans = Spans(image, ~image)
    return AttentionCall(_sites(1)[0], kernel, output, output, output, spans=spans, lanes=lanes, **more)


def _lanes_of(with_image: Tensor, without: Tensor) -> Tensor:
    """``(2, H, 3, D)`` whose last position holds the given head outputs."""
    out = torch.randn(2, with_image.shape[0], 3, with_image.shape[1], generator=torch.Generator().manual_seed(0))
    out[0, :, -1], out[1, :, -1] = with_image, without
    return out


def test_react_measures_the_last_position_and_scales_both_lanes() -> None:
    image = torch.tensor([[True, False, False], [False, False, False]])
    call = _call(_lanes_of(WITH, WITHOUT), image)
    edit = VHR(ALL_LAYERS, alpha=3.0).react(call)
    assert edit.weight.tolist() == [[3, 1, 1, 3], [3, 1, 1, 3]]
    assert call.state["vhd"].tolist() == [[5, 0, 2, 5]]
    plain = VHR(ALL_LAYERS, alpha=3.0, reference="plain").react(_call(_lanes_of(WITH, WITHOUT), image))
    assert plain.weight.tolist() == [[3, 1, 1, 3], [1, 1, 1, 1]]


def test_rows_without_an_image_select_nothing_whatever_rounding_says() -> None:
    noise = WITH * (1 + 1e-7)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    something = torch.tensor([[True, False, False], [False, False, False]])
    for image, without in ((nothing, WITHOUT), (something, noise)):
        assert VHR(ALL_LAYERS).react(_call(_lanes_of(WITH, without), image)).weight.tolist() == [[1.0] * 4] * 2


def test_later_calls_need_the_choice_of_the_first() -> None:
    call = _call(_lanes_of(WITH, WITHOUT), torch.zeros(2, 3, dtype=torch.bool))
    call.lanes = {}
    with pytest.raises(SteeringError, match="without its image"):
        VHR(ALL_LAYERS).react(call)


# ---- tiny models -----------------------------------------------------------------------------------------------------
def _head_outputs(model: Any, names: list[str], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """``(B, H, D)`` at the last position, read in front of the output projections."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).o_proj.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0][:, -1].unflatten(-1, (vlms.HEADS, -1)).clone())
        )
        for name in names
    ]
    model(**given)
    for handle in handles:
        handle.remove()
    return seen


def _without_image(model: Any, inputs: dict[str, Any], row: int) -> dict[str, Tensor]:
    """One row as a prompt of its own, without image tokens and pixels, by hand."""
    ids = inputs["input_ids"][row]
    kept = ids[(ids != vlms.IMAGE) & (ids != vlms.PAD)][None]
    types = {"token_type_ids": torch.zeros_like(kept)} if "token_type_ids" in inputs else {}
    return {"input_ids": kept, **types}


@pytest.mark.parametrize("name", vlms.NAMES)
def test_choice_layer_by_layer_equals_separate_passes(name: str) -> None:
    """The paper's loop by hand: two separate passes per layer, each with all earlier layers already reinforced."""
    model, make = vlms.build(name)
    inputs = make(1)
    with attnsteer.steer(model, VHR(ALL_LAYERS)) as steering:
        model(**inputs)
        states = steering.states(steering.processors[0])
    factors: dict[str, Tensor] = {}
    for site in attnsteer.sites(model):
        with scaled(model, factors):
            with_image = _head_outputs(model, [site.name], inputs)[site.name]
            without = _head_outputs(model, [site.name], _without_image(model, inputs, 0))[site.name]
        distance = (with_image - without).norm(dim=-1)
        torch.testing.assert_close(states[site]["vhd"], distance, rtol=1e-4, atol=1e-6)
        surge = without.square().sum(-1)
        outlier = (distance > distance.mean() + distance.std()) & (surge > surge.mean() + surge.std())
        kept = torch.where(outlier, 0.0, distance)
        factors[site.name] = torch.where(kept > statistics.median_low(kept[0].tolist()), 2.0, 1.0)
        assert torch.equal(states[site]["factor"], factors[site.name])


def test_the_plain_reference_is_not_reinforced() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    with attnsteer.steer(model, VHR(ALL_LAYERS, reference="plain")) as steering:
        model(**inputs)
        states = steering.states(steering.processors[0])
    names = [site.name for site in states]
    without = _head_outputs(model, names, _without_image(model, inputs, 0))  # one plain pass for all layers
    factors: dict[str, Tensor] = {}
    for site, state in states.items():
        with scaled(model, factors):
            with_image = _head_outputs(model, [site.name], inputs)[site.name]
        distance = (with_image - without[site.name]).norm(dim=-1)
        torch.testing.assert_close(state["vhd"], distance, rtol=1e-4, atol=1e-6)
        factors[site.name] = state["factor"]


def test_a_window_that_does_not_reach_the_image_selects_nothing() -> None:
    """Gemma 3's first layer sees 8 tokens; the second sees all; the third sees 8 tokens that have seen the image."""
    model, make = vlms.build("gemma3")
    inputs = make(1)
    more = torch.randint(7, vlms.VOCABULARY, (1, 8))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["token_type_ids"] = (inputs["input_ids"] == vlms.IMAGE).long()
    with attnsteer.steer(model, VHR(ALL_LAYERS)) as steering:
        model(**inputs)
        states = list(steering.states(steering.processors[0]).values())
    assert states[0]["vhd"].max() < 1e-5
    assert [int(state["heads"].sum()) for state in states] == [0, 3, 3, 3]


@pytest.mark.parametrize("name", vlms.NAMES)
def test_generation_equals_the_manual_oracle(name: str) -> None:
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with attnsteer.steer(model, VHR()) as steering:
        steered = model.generate(**inputs, **options)
        factors = factors_of(steering)
    assert all(factor.max() == 2 and factor.min() == 1 for factor in factors.values())
    with scaled(model, factors):
        expected = model.generate(**inputs, **options)
    assert torch.equal(steered.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(steered.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)


def test_head_outputs_are_scaled_exactly() -> None:
    """With o_proj = identity the layer's output shows the heads: chosen ones are exactly alpha times the plain ones."""
    model, make = vlms.build("llava")
    last = attnsteer.sites(model)[-1]
    attention = model.get_submodule(last.name)
    with torch.no_grad():
        attention.o_proj.weight.copy_(torch.eye(vlms.HIDDEN))
    seen: list[Tensor] = []
    attention.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    inputs = make(2)
    model(**inputs)
    plain = seen[-1].unflatten(-1, (vlms.HEADS, -1))
    with attnsteer.steer(model, VHR(Where(layers=[-1]), alpha=3.0)) as steering:
        model(**inputs)
        chosen = steering.states(steering.processors[0])[last]["heads"]
    steered = seen[-1].unflatten(-1, (vlms.HEADS, -1))
    assert 0 < chosen.sum() < chosen.numel()
    assert torch.equal(steered, torch.where(chosen[:, None, :, None], 3 * plain, plain))


def test_a_text_only_prompt_is_left_alone() -> None:
    for name in ("llava", "qwen25", "gemma3"):
        model, make = vlms.build(name)
        given = _without_image(model, make(1), 0)
        plain = model(**given).logits
        with attnsteer.steer(model, VHR()) as steering:
            assert torch.equal(model(**given).logits, plain)
            assert not any(state["heads"].any() for state in steering.states(steering.processors[0]).values())


def test_what_is_generated_does_not_change_the_choice() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    with attnsteer.steer(model, VHR()) as steering:
        chosen = []
        for token in (10, 20):
            out = model(**inputs)
            first = factors_of(steering)
            ids = torch.full((1, 1), token)
            for _ in range(3):
                out = model(input_ids=ids, past_key_values=out.past_key_values)
                ids = out.logits[:, -1:].argmax(-1)
            chosen.append((first, factors_of(steering)))
    for first, last in chosen:
        assert all(torch.equal(first[name], last[name]) for name in first)
        assert all(torch.equal(first[name], chosen[0][0][name]) for name in first)


@pytest.mark.parametrize("name", ["llava", "qwen2", "qwen25", "qwen3", "gemma3"])
def test_masked_reference_hides_the_image_and_keeps_the_places(name: str) -> None:
    """Against a pass by hand in which a 2-d mask hides the image tokens of the same prompt."""
    model, make = vlms.build(name)
    inputs = make(1)
    first = attnsteer.sites(model)[0]
    with attnsteer.steer(model, VHD(removal="mask")) as steering:
        model(**inputs)
        measured = steering.states(steering.processors[0])[first]["vhd"][..., 0]
    with_image = _head_outputs(model, [first.name], inputs)[first.name]
    text_only = dict(inputs)
    text_only["attention_mask"] = (inputs["input_ids"] != vlms.IMAGE).long()
    if hasattr(model.model, "get_rope_index"):  # places as with the image
        text_only["position_ids"] = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
        )[0]
    if name == "gemma3":  # its image tokens would still see each other
        text_only["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    without = _head_outputs(model, [first.name], text_only)[first.name]
    torch.testing.assert_close(measured, (with_image - without).norm(dim=-1), rtol=1e-4, atol=1e-5)


# ---- measuring -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", vlms.NAMES)
def test_measure_equals_token_by_token(name: str) -> None:
    """Each generated token measured on its own, from the prompt up to it."""
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    width = inputs["input_ids"].shape[1]
    answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)[:, width:]
    report = measure(model, inputs, answer)
    assert report.vhd.shape == (2, 3, vlms.LAYERS, vlms.HEADS)
    assert report.t_vhd().shape == (2, 3)
    torch.testing.assert_close(report.t_vhd(2), report.vhd.topk(2, dim=-1).values.sum((-1, -2)))
    names = [site.name for site in report.sites]
    cache = cache_free = None
    for row in range(2):
        for t in range(3):
            one = _until(model, vlms.row(inputs, row), answer[row, :t])
            bare = _until(model, _without_image(model, inputs, row), answer[row, :t])
            cache, cache_free = (_head_outputs(model, names, given) for given in (one, bare))
            expected = torch.stack([(cache[n][0] - cache_free[n][0]).norm(dim=-1) for n in names])
            torch.testing.assert_close(report.vhd[row, t], expected, rtol=1e-4, atol=1e-5)


def _until(model: Any, inputs: dict[str, Any], answer: Tensor) -> dict[str, Any]:
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer[None]], 1)}
    longer.pop("attention_mask", None)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            generated = 1 if model.config.model_type == "paligemma" else 0
            fill = inputs[name].new_full((1, len(answer)), generated)
            longer[name] = torch.cat([inputs[name], fill], 1)
    return longer


def test_vhd_changes_nothing() -> None:
    model, make = vlms.build("llava")
    inputs = make(2)
    plain = model(**inputs).logits
    with attnsteer.steer(model, VHD()) as steering:
        assert torch.equal(model(**inputs).logits, plain)
        assert steering.states(steering.processors[0])[attnsteer.sites(model)[0]]["vhd"].shape == (2, vlms.HEADS, 1)


def test_no_method_knows_a_host() -> None:
    folder = Path(str(attnsteer.processors.__file__)).parent
    assert [path.name for path in folder.glob("*.py") if "attnsteer.hosts" in path.read_text()] == []
