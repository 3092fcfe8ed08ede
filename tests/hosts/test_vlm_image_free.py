"""The prompt without its image: what it holds, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import AttentionCall, Processor, SteeringError, Where
from attnsteer.edits import Edit, Scale
from attnsteer.processors.vhd import VHD
from attnsteer.processors.vhr import VHR
from tests.hosts.common import GREEDY, Look, ScaleAll, factors_of
from tests.tiny import vlms


# ---- the image-free prompt -------------------------------------------------------------------------------------------
def _lanes(model: Any, inputs: dict[str, Any], removal: str = "delete", processor: Any = None) -> dict[str, Any]:
    """What the reference pass hands to the model."""
    seen: dict[str, Any] = {}
    with attnsteer.steer(model, VHD(removal=removal), processor=processor) as steering:
        handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
        steering.measure(inputs)
        handle.remove()
    return seen


def test_the_image_free_prompt_by_hand() -> None:
    """Image tokens and their wrappers go, padding moves to the left; a row without an image keeps its wrappers."""
    model, make = vlms.build("qwen25")
    image = [vlms.IMAGE] * 15
    rows = [
        [vlms.BOS, 9, vlms.VISION_START, *image, vlms.VISION_END, 10, 11],
        [vlms.PAD] * 15 + [vlms.BOS, vlms.VISION_START, 12, 13, 14, 15],
    ]
    ids = torch.tensor(rows)
    inputs = make(1) | {
        "input_ids": ids,
        "attention_mask": (ids != vlms.PAD).long(),
        "mm_token_type_ids": (ids == vlms.IMAGE).int(),
    }
    seen = _lanes(model, inputs)
    assert seen["input_ids"][:2].tolist() == rows
    assert seen["input_ids"][2:].tolist() == [[vlms.PAD] * 17 + [vlms.BOS, 9, 10, 11], rows[1]]
    assert seen["attention_mask"].sum(1).tolist() == [21, 6, 4, 6]
    assert seen["mm_token_type_ids"].sum(1).tolist() == [15, 0, 0, 0]
    masked = _lanes(model, inputs, "mask")
    gone = torch.tensor([[0, 0] + [1] * 17 + [0, 0]]).bool()
    assert torch.equal(masked["attention_mask"][2:3].bool(), ~gone)
    assert torch.equal(masked["input_ids"][2:3][~gone], ids[:1][~gone])
    assert torch.equal(masked["position_ids"][:, :2], masked["position_ids"][:, 2:])


def test_markers_that_only_the_processor_knows_go_with_the_image() -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"<img>": 20, "</img>": 21, "<row_1_col_2>": 22, "dog": 23}

    class Processor:
        tokenizer = Tokenizer()
        start_image_token, end_image_token = "<img>", "</img>"

    model, make = vlms.build("internvl")
    inputs = make(1)
    image = [vlms.IMAGE] * 9
    inputs["input_ids"] = torch.tensor([[vlms.BOS, 20, 22, *image, 21, 23]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    kept = lambda seen: seen["input_ids"][1][seen["attention_mask"][1].bool()].tolist()  # noqa: E731
    assert kept(_lanes(model, inputs)) == [vlms.BOS, 20, 22, 21, 23]
    assert kept(_lanes(model, inputs, processor=Processor())) == [vlms.BOS, 23]


def test_a_prompt_of_nothing_but_an_image_keeps_a_place_to_predict_from() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    inputs["input_ids"] = torch.full((1, 25), vlms.IMAGE)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    seen = _lanes(model, inputs)
    assert seen["attention_mask"][1].sum() == 1
    assert seen["input_ids"][1].tolist() == [vlms.PAD] * 25
    with attnsteer.steer(model, VHR()):
        assert torch.isfinite(model(**inputs).logits).all()


def test_videos_are_taken_out_like_images() -> None:
    model, make = vlms.build("qwen25")
    inputs = make(1)
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    inputs["video_grid_thw"] = inputs.pop("image_grid_thw")
    inputs["input_ids"] = inputs["input_ids"].where(inputs["input_ids"] != vlms.IMAGE, vlms.VIDEO)
    inputs["mm_token_type_ids"] = 2 * inputs["mm_token_type_ids"]
    seen = _lanes(model, inputs)
    assert (seen["input_ids"] == vlms.VIDEO).sum(1).tolist() == [15, 0]
    with attnsteer.steer(model, VHR()) as steering:
        model.generate(**inputs, **GREEDY)
        assert all((factor == 2).sum() == vlms.HEADS // 2 for factor in factors_of(steering).values())


@pytest.mark.parametrize("name", vlms.NAMES)
def test_lanes_equal_separate_passes(name: str) -> None:
    """In float64, head outputs of both lanes at the last position against two passes of single prompts. What remains
    (measured: 2e-6 relative) is the libraries' rotary angles, which are float32 and differ with the padding."""
    model, make = vlms.build(name)
    model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in make(2, left_padding=True).items()}
    lanes: dict[str, Tensor] = {}
    alone: dict[str, Tensor] = {}

    def see(call: AttentionCall) -> None:
        into = lanes if call.lanes else alone
        into[call.site.name] = call.output[:, :, -1]

    with attnsteer.steer(model, VHD(), Look(see=see)):
        model(**inputs)
    with attnsteer.steer(model, Look(see=see)):
        for row in range(2):
            one = vlms.row(inputs, row)
            bare = {"input_ids": one["input_ids"][one["input_ids"] != vlms.IMAGE][None]}
            if "token_type_ids" in inputs:
                bare["token_type_ids"] = torch.zeros_like(bare["input_ids"])
            for lane, given in ((0, one), (2, bare)):
                alone.clear()
                model(**given)
                for site, output in alone.items():
                    torch.testing.assert_close(lanes[site][lane + row], output[0], rtol=1e-5, atol=1e-6)


def test_cross_attention_to_the_image_is_refused_with_a_reason() -> None:
    from attnsteer.hosts.vlm_families import why_no_image_free_lane

    model, _ = vlms.build("llava")
    assert why_no_image_free_lane(model.config) == []
    model.config.text_config.cross_attention_layers = [1]
    with pytest.raises(SteeringError, match="cross-attention"):
        attnsteer.attach(model, VHR())
    with attnsteer.steer(model, ScaleAll()):
        pass


@dataclass(frozen=True)
class DoubleAll(Processor):
    """Asks for one row of weights, whatever the batch."""

    kinds = ("causal",)
    token_agnostic = True

    def react(self, call: AttentionCall) -> Edit:
        return Scale(torch.full((1, call.q.shape[1]), 2.0))


def test_a_reacting_edit_of_one_variant_stays_in_its_rows_of_both_lanes() -> None:
    model, make = vlms.build("llava")
    inputs = make(2)
    choice = VHR(Where(layers=[-1]))
    with attnsteer.steer(model, variants=[[choice], [choice, DoubleAll()]]) as steering:
        model(**inputs)
        (together,) = (state["vhd"] for state in steering.states(choice).values())
    for row, variant in enumerate([[choice], [choice, DoubleAll()]]):
        with attnsteer.steer(model, *variant) as steering:
            model(**vlms.row(inputs, row))
            (alone,) = (state["vhd"] for state in steering.states(choice).values())
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)
