"""The tiny models themselves: they build, run, repeat, and depend on what their attention reads."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import denoisers


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
