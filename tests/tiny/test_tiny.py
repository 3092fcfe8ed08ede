"""The tiny models themselves: they build, run, repeat, and depend on what their attention reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny import denoisers, pipelines, tokenizers, vlms


@pytest.mark.parametrize("name", denoisers.NAMES)
def test_denoiser_runs_and_repeats(name: str) -> None:
    model, inputs = denoisers.build(name)
    again, _ = denoisers.build(name)
    with torch.no_grad():
        first = model(**inputs(3, seed=1), return_dict=False)[0]
        second = again(**inputs(3, seed=1), return_dict=False)[0]
    assert first.shape[0] == 3
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert first.std() > 1e-3


@pytest.mark.parametrize("name", denoisers.NAMES)
def test_denoiser_depends_on_its_text(name: str) -> None:
    model, inputs = denoisers.build(name)
    given = inputs(2)
    other = {**given, "encoder_hidden_states": given["encoder_hidden_states"] + 1.0}
    with torch.no_grad():
        difference = model(**given, return_dict=False)[0] - model(**other, return_dict=False)[0]
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", pipelines.NAMES)
def test_pipeline_runs_and_repeats(name: str, cfg: bool) -> None:
    pipe = pipelines.build(name)
    first, second = (pipe(**pipelines.call_kwargs(name, 2, cfg), return_dict=False)[0] for _ in range(2))
    assert first.shape == ((2, 3) if name == "wan" else (2,)) + (pipelines.HEIGHT, pipelines.WIDTH, 3)
    assert np.isfinite(first).all()
    assert np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])


def test_tokenizers_know_words_and_spell_the_rest() -> None:
    for tokenizer in (tokenizers.clip(), tokenizers.t5(), tokenizers.qwen2()):
        known = len(tokenizer("a dog").input_ids)
        assert len(tokenizer("a dog dog").input_ids) == known + 1
        assert len(tokenizer("a dog zebra").input_ids) > known + 1


@pytest.mark.parametrize("name", vlms.NAMES)
def test_vlm_sees_its_picture(name: str) -> None:
    model, inputs = vlms.build(name)
    given = inputs(2)
    other = {**given, "pixel_values": given["pixel_values"].flip(-1)}
    with torch.no_grad():
        first, second = model(**given).logits[:, -1], model(**other).logits[:, -1]
    assert torch.isfinite(first).all()
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("name", vlms.NAMES)
def test_vlm_answers_a_left_padded_batch_as_it_answers_rows(name: str) -> None:
    model, inputs = vlms.build(name)
    given = inputs(2, left_padding=True)
    assert (given["attention_mask"][1] == 0).sum() == vlms.SHORTER
    answers = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answers.shape == (2, given["input_ids"].shape[1] + 4)
    with torch.no_grad():
        batched = model(**given).logits[:, -1]
        alone = [model(**vlms.row(given, r)).logits[0, -1] for r in range(2)]
    # Measured: up to 5e-6 in float32, since other shapes are summed in another order.
    torch.testing.assert_close(batched, torch.stack(alone), rtol=0, atol=3e-5)
