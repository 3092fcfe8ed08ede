"""ICD: where the instruction is written, the formula against two models stepped by hand, parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attnsteer
from attnsteer import SteeringError
from attnsteer.config import processor_from_dict
from attnsteer.hosts.counterparts import counterpart_inputs
from attnsteer.hosts.vlm_families import vision_tokens
from attnsteer.processors import ICD
from attnsteer.processors.icd import DISTURBANCES
from tests.hosts.contrasting import SPECIAL, beams, greedy, rows_of, vcd, with_prefix
from tests.tiny import vlms

INSTRUCTION = [21, 34, 8, 21]


class Tokens:
    """A tokenizer that writes every text as the same tokens."""

    bos_token_id = vlms.BOS

    def __init__(self, ids: list[int] = INSTRUCTION):
        self.ids, self.texts = ids, list[str]()

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        self.texts.append(text)
        return {"input_ids": self.ids}


def behind_the_image(row: dict[str, Any]) -> int:
    return 1 + max(i for i, token in enumerate(row["input_ids"][0].tolist()) if token == vlms.IMAGE)


def text_only(model: Any, inputs: dict[str, Any], count: int = 5, **options: Any) -> list[list[int]]:
    length = {"max_new_tokens": count, "min_new_tokens": count, "suppress_tokens": list(range(SPECIAL))}
    return model.generate(**inputs, **length, do_sample=False, **options)[:, -count:].tolist()


def test_hand_example_is_that_of_vcd() -> None:
    l, other = torch.tensor([[[2.0, 1.0, 0.0, -3.0]]]), torch.tensor([[[2.5, 0.0, 0.0, -3.0]]])  # noqa: E741
    assert ICD().combine(l, other, torch.zeros(1)).tolist() == [[[1.5, 2.0, 0.0, -math.inf]]]


# ---- where it is written ---------------------------------------------------------------------------------------------
def _written(ids: list[list[int]], place: str, name: str = "llava", **more: Any) -> dict[str, Any]:
    model, _ = vlms.build(name)
    tensor = torch.tensor(ids)
    inputs = {
        "input_ids": tensor,
        "attention_mask": (tensor != vlms.PAD).long(),
        "pixel_values": torch.zeros(1, 3, 2, 2),
    }
    return counterpart_inputs(
        inputs | more, ICD(place=place).contrast(), vision_tokens(model.config), 0, Tokens([7, 8])
    )


def test_the_instruction_stands_behind_the_start_of_every_row() -> None:
    B, I = vlms.BOS, vlms.IMAGE  # noqa: E741
    found = _written([[B, 9, I, I, 10], [0, 0, B, I, 11], [0, 9, 9, I, 12], [I, I, B, 13, 14]], "start")
    expected = [[B, 7, 8, 9, I, I, 10], [0, 0, B, 7, 8, I, 11], [0, 7, 8, 9, 9, I, 12], [I, I, B, 7, 8, 13, 14]]
    assert found["input_ids"].tolist() == expected
    assert found["attention_mask"].tolist() == [[int(t != 0) for t in row] for row in expected]


def test_the_instruction_stands_in_front_of_the_question() -> None:
    B, I, start, end = vlms.BOS, vlms.IMAGE, vlms.VISION_START, vlms.VISION_END  # noqa: E741
    rows = [[B, start, I, end, 10, 11], [0, B, start, I, end, 12], [B, I, 9, I, 9, 10], [0, B, 9, 9, 9, 9]]
    types = torch.tensor([[int(t == I) for t in row] for row in rows])
    found = _written(rows, "question", "qwen25", mm_token_type_ids=types)
    expected = [
        [B, start, I, end, 7, 8, 10, 11],
        [0, B, start, I, end, 7, 8, 12],
        [B, I, 9, I, 7, 8, 9, 10],
        [0, 7, 8, B, 9, 9, 9, 9],  # no picture: left alone afterwards
    ]
    assert found["input_ids"].tolist() == expected
    assert found["mm_token_type_ids"].tolist() == [[int(t == I) for t in row] for row in expected]


# ---- equal to two models stepped by hand -----------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["start", "question"])
@pytest.mark.parametrize("name", vlms.NAMES)
def test_every_family_equals_two_models_stepped_by_hand(name: str, place: str) -> None:
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    at = behind_the_image if place == "question" else lambda _: 1
    pairs = rows_of(inputs, lambda row: with_prefix(row, INSTRUCTION, at(row)))
    expected = [greedy(model, pair, vcd(2.0, 0.02)) for pair in pairs]
    plain, tokens = text_only(model, inputs), Tokens()
    with attnsteer.steer(model, ICD(alpha=2.0, beta=0.02, place=place, disturbance="blind"), processor=tokens):
        assert text_only(model, inputs) == expected
    assert set(tokens.texts) == {DISTURBANCES["blind"]}
    assert text_only(model, inputs) == plain


@pytest.mark.parametrize("name", ["llava", "qwen25"])
def test_beams_equal_a_beam_search_with_two_predictions_by_hand(name: str) -> None:
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    pairs = rows_of(inputs, lambda row: with_prefix(row, INSTRUCTION, 1))
    expected = [beams(model, pair, vcd(2.0, 0.02), 2, 4) for pair in pairs]
    with attnsteer.steer(model, ICD(alpha=2.0, beta=0.02), processor=Tokens()):
        assert text_only(model, inputs, 4, num_beams=2) == expected


@pytest.mark.parametrize("name", ["llava", "qwen25"])
def test_several_instructions_in_one_batch_equal_solo_runs(name: str) -> None:
    class Words(Tokens):
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [20 + len(word) for word in text.split()]}

    model, make = vlms.build(name)
    inputs = make(3, left_padding=True)
    variants = [[ICD(alpha=3.0)], [ICD(alpha=3.0, disturbance="Say what is not there. ")], []]
    with attnsteer.attach(model, variants=variants, processor=Words()):
        together = text_only(model, inputs)
    for row, processors in enumerate(variants):
        with attnsteer.attach(model, variants=[processors], processor=Words()):
            assert text_only(model, vlms.row(inputs, row)) == [together[row]]


# ---- parameters ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong", [{"alpha": -1}, {"beta": 2}, {"disturbance": "rudeness"}, {"disturbance": ""}, {"place": "end"}]
)
def test_a_wrong_parameter_names_itself_and_what_is_allowed(wrong: dict[str, Any]) -> None:
    with pytest.raises(SteeringError, match=next(iter(wrong))):
        ICD(**wrong)


def test_an_instruction_without_tokens_is_refused() -> None:
    model, _ = vlms.build("llava")
    with pytest.raises(SteeringError, match="no token"):
        attnsteer.attach(model, ICD(), processor=Tokens([]))


def test_parameters_survive_the_way_through_json() -> None:
    for processor in (ICD(), ICD(alpha=2.0, disturbance="Say nothing that is true.", place="question")):
        assert processor_from_dict(processor.to_dict()) == processor
