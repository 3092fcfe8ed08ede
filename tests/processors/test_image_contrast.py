"""The image contrast of PAI: the formula by hand and by loops, and on the embedded model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.config import processor_from_dict
from attnsteer.contrast import extrapolated
from attnsteer.processors import ICD, PAI, VCD, ImageContrast
from tests.hosts.contrasting import pai
from tests.tiny import vlms

L = torch.tensor([2.0, 1.0, 0.0, -3.0])
OTHER = torch.tensor([2.5, 0.0, 0.0, -3.0])


def test_hand_example() -> None:
    with_image = L.log_softmax(-1)
    torch.testing.assert_close(with_image, torch.tensor([-0.4121, -1.4121, -2.4121, -5.4121]), rtol=0, atol=5e-5)
    found = ImageContrast(gamma=1.1, cutoff=0.1).combine(L[None, None], OTHER[None, None], torch.zeros(1))[0, 0]
    assert found[3] == -math.inf
    torch.testing.assert_close(found[:3], torch.tensor([-0.4377, -1.2877, -2.3877]), rtol=0, atol=5e-5)
    uncut = extrapolated(L, OTHER, 1.1, 0.0)
    torch.testing.assert_close(uncut, torch.tensor([-0.4377, -1.2877, -2.3877, -5.3877]), rtol=0, atol=5e-5)
    assert math.log(0.1) + float(with_image.max()) == pytest.approx(-2.7147, abs=5e-5)


def test_gamma_one_is_the_log_softmax_without_a_cut() -> None:
    assert torch.equal(extrapolated(L, OTHER, 1.0, 0.9), L.log_softmax(-1))
    assert ImageContrast(gamma=1).inert and not ImageContrast().inert


def test_rows_of_different_strength_equal_a_loop() -> None:
    logits, other = torch.randn(2, 4, 3, 11, dtype=torch.float64)
    gammas = [1.0, 1.1, 2.0, 7.0]
    found = extrapolated(logits, other, torch.tensor(gammas, dtype=torch.float64)[:, None, None], 0.25)
    for row, gamma in enumerate(gammas):
        for position in range(3):
            how = pai(gamma, 0.25 if gamma != 1 else 1e-300)
            expected = how(logits[row, position].tolist(), other[row, position].tolist(), 0)
            torch.testing.assert_close(
                found[row, position], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
            )


def test_a_forbidden_token_stays_forbidden() -> None:
    a, b = (torch.tensor([1.0, 0.0, -math.inf]) for _ in range(2))
    assert extrapolated(a, b, 1.5, 0.0)[:2].isfinite().all()
    assert extrapolated(a, b, 1.5, 0.1)[2] == -math.inf


@pytest.mark.parametrize("wrong", [{"gamma": 0.5}, {"gamma": math.inf}, {"cutoff": 2}, {"cutoff": True}])
def test_a_wrong_parameter_names_itself_and_what_is_allowed(wrong: dict[str, Any]) -> None:
    with pytest.raises(SteeringError, match=next(iter(wrong))):
        ImageContrast(**wrong)


def test_parameters_survive_the_way_through_json() -> None:
    for processor in (ImageContrast(), ImageContrast(gamma=2, cutoff=0.3)):
        assert processor_from_dict(processor.to_dict()) == processor


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from attnsteer.world import assets

    try:
        folder = assets.path("models/world-llava")
    except FileNotFoundError as error:
        pytest.skip(f"model not trained here: {error}")
    return LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_the_embedded_model_answers_under_every_contrast(embedded: tuple[Any, Any]) -> None:
    """Plain, and three contrasts as rows of one batch; a contrast moves the logits and leaves an answer in words."""
    from attnsteer.world import text
    from attnsteer.world.evaluate.answers import lonely

    model, processor = embedded
    questions = [f"USER: <image>\n{text.DESCRIBE} ASSISTANT:"] * 4
    inputs = processor(text=questions, images=[lonely(3).image()] * 4, padding=True, return_tensors="pt")
    width = inputs.input_ids.shape[1]
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    variants = [[], [ImageContrast(gamma=2)], [VCD(noise_step=900)], [ICD(alpha=2)]]
    with attnsteer.attach(model, variants=variants, processor=processor):
        logits = model(**inputs).logits[:, -1]
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    said = [answer.strip() for answer in processor.batch_decode(tokens[:, width:], skip_special_tokens=True)]
    assert said[0] == processor.decode(plain[0, width:], skip_special_tokens=True).strip()
    assert all(answer.startswith("The image shows") for answer in said)
    assert len({tuple(row.tolist()) for row in logits}) == 4


def test_beside_its_attention_it_is_the_published_pai() -> None:
    """Attention is steered in the rows with the picture and plain in those without."""
    model, make = vlms.build("llava")
    inputs, gamma = make(1), 1.5
    with attnsteer.steer(model, PAI(Where(layers="all"))):
        steered = model(**inputs).logits[:, -1]
    text = inputs["input_ids"][inputs["input_ids"] != vlms.IMAGE][None]
    without = model(input_ids=text).logits[:, -1]
    with attnsteer.steer(model, PAI(Where(layers="all")), ImageContrast(gamma=gamma)):
        found = model(**inputs).logits[:, -1]
    expected = extrapolated(steered, without, gamma, 0.1)
    assert torch.equal(found == -math.inf, expected == -math.inf)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered, model(**inputs).logits[:, -1], atol=1e-3)
