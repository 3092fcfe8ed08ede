"""The tiny models themselves: they build, run, repeat, and depend on what their attention reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny import denoisers, pipelines, tokenizers


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
