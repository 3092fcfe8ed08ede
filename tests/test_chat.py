"""Questions as prompts: by chat template and by hand, one and several pictures, alone and in a batch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from attnsteer import SteeringError
from attnsteer.chat import question_inputs
from attnsteer.hosts.asking import words
from attnsteer.world import assets, sampling

TYPED = "USER: <image>\n{question} ASSISTANT:"


@functools.cache
def processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(assets.path("models/world-llava"))


@functools.cache
def scene(number: int = 3) -> Any:
    return sampling.sample(number).image()


def test_prompts_by_template_and_by_hand_are_the_same_for_the_embedded_model() -> None:
    typed = question_inputs(processor(), [scene()], ["What is it?"], TYPED)
    named = question_inputs(processor(), [scene()], ["What is it?"], TYPED.replace("<image>", "{image}"))
    chatted = question_inputs(processor(), [scene()], ["What is it?"])
    assert set(chatted) == set(typed) == set(named)
    for name in chatted:
        assert torch.equal(typed[name], chatted[name])
        assert torch.equal(typed[name], named[name])
    assert words(processor(), typed["input_ids"][0]).endswith("What is it? ASSISTANT:")


@pytest.mark.parametrize("template", [None, TYPED])
def test_rows_of_a_batch_are_those_of_each_question_alone_behind_padding(template: str | None) -> None:
    pictures, asked = [(scene(3), scene(4)), scene(5)], ["What is it?", "Is there a dog or a cat in the image?"]
    tokenizer = processor().tokenizer
    before = tokenizer.padding_side
    tokenizer.padding_side = "right"
    try:
        together = question_inputs(processor(), pictures, asked, template)
        assert tokenizer.padding_side == "right"
    finally:
        tokenizer.padding_side = before
    alone = [question_inputs(processor(), [p], [q], template) for p, q in zip(pictures, asked, strict=True)]
    image = processor().image_token_id
    assert [int((one["input_ids"] == image).sum()) for one in alone] == [128, 64]
    for ids, mask, one in zip(together["input_ids"], together["attention_mask"], alone, strict=True):
        count = one["input_ids"].shape[1]
        assert torch.equal(ids[-count:], one["input_ids"][0])
        assert mask.tolist() == [0] * (len(ids) - count) + [1] * count
    assert not together["attention_mask"].all()
    assert torch.equal(together["pixel_values"], torch.cat([one["pixel_values"] for one in alone]))


def test_one_question_needs_no_padding_token() -> None:
    unpadded = processor.__wrapped__()
    unpadded.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="padding token"):
        question_inputs(unpadded, [scene(), scene()], ["What is it?", "Why?"])
    found, expected = (question_inputs(each, [scene()], ["What is it?"]) for each in (unpadded, processor()))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("template", ["{question}", "<image>", "<image> <image> {question}"])
def test_a_template_that_lacks_something_is_refused(template: str) -> None:
    with pytest.raises(SteeringError, match="needs {question} and, once, the image token '<image>'"):
        question_inputs(processor(), [scene()], ["What is it?"], template)
