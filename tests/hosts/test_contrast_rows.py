"""Contrasts of several variants in one batch: each row as alone, and second forwards of the rows that ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnsteer
from attnsteer.processors import ICD, M3ID, VCD, VHR, ImageContrast
from tests.hosts.common import GREEDY, without_a_picture
from tests.hosts.contrasting import (
    IMAGE,
    IMAGE_ORACLE,
    NOISE,
    NOISE_ORACLE,
    answers,
    beams,
    greedy,
    rows_of,
    with_noise,
    without_image,
)
from tests.tiny import vlms


@pytest.mark.parametrize("name", ["llava", "qwen25", "smolvlm"])
def test_several_contrasts_in_one_batch_equal_solo_runs(name: str) -> None:
    model, make = vlms.build(name)
    inputs = make(4, left_padding=True)
    variants = [[IMAGE], [], [NOISE], [M3ID(decay=0.5), VHR()]]
    with attnsteer.attach(model, variants=variants):
        together, logits = answers(model, inputs), model(**inputs).logits
    plain = model(**inputs).logits
    assert torch.equal(logits[1], plain[1])
    for row, processors in enumerate(variants):
        alone = vlms.row(inputs, row)
        with attnsteer.attach(model, variants=[processors]):
            assert answers(model, alone) == [together[row]]


def test_rows_may_change_places() -> None:
    model, make = vlms.build("llava")
    inputs, order = make(3), [2, 0, 1]
    moved = {name: value[order] for name, value in inputs.items()}
    for processor in (IMAGE, NOISE):
        with attnsteer.steer(model, processor):
            found = answers(model, inputs)
            assert answers(model, moved) == [found[row] for row in order]


@pytest.mark.parametrize("name", ["llava", "qwen25", "gemma3"])
def test_beams_of_several_variants_keep_to_their_rows(name: str) -> None:
    model, make = vlms.build(name)
    inputs = make(4, left_padding=True)
    variants = [[], [NOISE], [], [IMAGE]]
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4}
    plain = answers(model, inputs, 4, **options)
    noisy, bare = rows_of(inputs, with_noise)[1], rows_of(inputs, without_image)[3]
    expected = [plain[0], beams(model, noisy, NOISE_ORACLE, 3, 4), plain[2], beams(model, bare, IMAGE_ORACLE, 3, 4)]
    with attnsteer.attach(model, variants=variants):
        assert answers(model, inputs, 4, **options) == expected


@pytest.mark.parametrize("name", vlms.NAMES)
def test_a_second_forward_sees_only_the_rows_that_ask_for_it(name: str) -> None:
    model, make = vlms.build(name)
    inputs, passes = make(6, left_padding=True), list[int]()
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[0]))
    with attnsteer.attach(model, variants=[[], [IMAGE], [NOISE], [], [IMAGE], [ImageContrast(gamma=1.5)]]):
        together = answers(model, inputs)
        assert passes == 5 * [6, 3, 1]  # the user's, without images, noised
        passes.clear()
        answers(model, inputs, num_beams=2)
        assert passes == [12, 3, 1, *4 * [12, 6, 2]]
    handle.remove()
    images, noisy = rows_of(inputs, without_image), rows_of(inputs, with_noise)
    assert [together[1], together[4]] == [greedy(model, images[row], IMAGE_ORACLE) for row in (1, 4)]
    assert together[2] == greedy(model, noisy[2], NOISE_ORACLE)


@pytest.mark.parametrize(
    ("pictures", "rows"), [((0, 1, 1), [3, 1]), ((0, 2, 1), [3, 3])], ids=["one each", "two in one"]
)
def test_pictures_go_with_their_rows(pictures: tuple[int, ...], rows: list[int]) -> None:
    """Rows without a picture have none in the list; where a row has two, whose they are cannot be told."""
    model, make = vlms.build("llava")
    one = make(1)["input_ids"][0]
    image, text = one[3:28], torch.cat([one[:3], one[28:]])
    assert (image == vlms.IMAGE).all() and not (text == vlms.IMAGE).any()
    prompts = [torch.cat([text[:3], *[image] * count, text[3:] + row]) for row, count in enumerate(pictures)]
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0), value=vlms.PAD) for p in prompts])
    inputs = {"input_ids": ids, "attention_mask": (ids != vlms.PAD).long()}
    inputs["pixel_values"] = make(sum(pictures))["pixel_values"]
    last = {"input_ids": prompts[2][None], "pixel_values": inputs["pixel_values"][-1:]}
    last["attention_mask"] = torch.ones_like(last["input_ids"])
    plain, passes = answers(model, inputs), list[int]()
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[0]))
    with attnsteer.attach(model, variants=[[NOISE], [], [NOISE]]):
        found = answers(model, inputs)
    handle.remove()
    assert passes == 5 * rows
    assert found == [*plain[:2], greedy(model, (last, with_noise(last)), NOISE_ORACLE)]


@pytest.mark.parametrize("processor", [VCD(alpha=0), ImageContrast(gamma=1), M3ID(decay=0), ICD(alpha=0)])
def test_strength_zero_is_the_plain_model_bit_for_bit(processor: Any) -> None:
    model, make = vlms.build("llava")
    inputs = make(2, left_padding=True)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    plain, before = model.generate(**inputs, **options), model(**inputs).logits
    for variants in ([[processor]], [[processor], [NOISE]]):
        with attnsteer.attach(model, variants=variants):
            found, logits = model.generate(**inputs, **options), model(**inputs).logits
        assert torch.equal(logits[0], before[0])
        assert all(torch.equal(a[0], b[0]) for a, b in zip(found.logits, plain.logits, strict=True))


@pytest.mark.parametrize("name", ["llava", "qwen25", "gemma3"])
def test_rows_without_a_picture_are_left_alone(name: str) -> None:
    model, make = vlms.build(name)
    inputs = without_a_picture(make(2), make(1))
    plain = model(**inputs).logits
    for processor in (IMAGE, NOISE):
        with attnsteer.steer(model, processor):
            logits = model(**inputs).logits
        assert torch.equal(logits[1], plain[1])
        assert not torch.equal(logits[0], plain[0])


def test_a_batch_without_pictures_runs_no_second_forward() -> None:
    model, _ = vlms.build("llava")
    ids = torch.randint(10, 60, (2, 7))
    plain, passes = model.generate(input_ids=ids, **GREEDY), []
    handle = model.lm_head.register_forward_pre_hook(lambda *_: passes.append(1))
    with attnsteer.steer(model, NOISE):
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), plain)
    handle.remove()
    assert len(passes) == 5
