"""Decoding loops of the user's own (``custom_generate=``) on a steered model; the loop here is DoLa's."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer.processors import GIFT, VHR
from tests.hosts.common import GREEDY, BoostImage, state_of
from tests.hosts.contrasting import IMAGE, NOISE
from tests.tiny import vlms


def dola_scores(model, out):  # type: ignore[no-untyped-def]
    """``log_softmax(last layer) - log_softmax(layer 2)``, cut at a tenth of the best probability."""
    last = out.logits[:, -1].float().log_softmax(-1)
    early = model.lm_head(model.get_decoder().norm(out.hidden_states[2][:, -1])).float().log_softmax(-1)
    best = last.amax(-1, keepdim=True) + torch.tensor(0.1).log()
    return torch.where(last < best, float("-inf"), last - early)


def dola_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):  # type: ignore[no-untyped-def]
    """A decoding method as transformers calls it."""
    first, done = True, False
    while not done:
        new = None if first else 1
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=new, is_first_iteration=first, **model_kwargs
        )
        out = model(**inputs, output_hidden_states=True, return_dict=True)
        scores = logits_processor(input_ids, dola_scores(model, out))
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], 1)
        model_kwargs = model._update_model_kwargs_for_generation(out, model_kwargs)
        first, done = False, bool(stopping_criteria(input_ids, None).all())
    return input_ids


def stepped(model: Any, inputs: dict[str, Any], processors: tuple[Any, ...]) -> Tensor:
    """DoLa in a loop outside ``generate``: forward passes of the steered model with a cache."""
    mask, answer = inputs["attention_mask"], []
    with attnsteer.steer(model, *processors):
        out = model(**inputs, use_cache=True, output_hidden_states=True)
        for _ in range(5):
            scores = dola_scores(model, out)
            scores[:, vlms.EOS] = -torch.inf  # GREEDY says min_new_tokens
            answer.append(scores.argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(answer[-1])], 1)
            step = {"input_ids": answer[-1], "attention_mask": mask, "past_key_values": out.past_key_values}
            out = model(**step, output_hidden_states=True)
    return torch.cat(answer, 1)


@pytest.fixture(params=["function", "folder around the class", "folder around the model"])
def given(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """``custom_generate`` in each of the forms that transformers takes."""
    if request.param == "function":
        return {"custom_generate": dola_loop}
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    call = "GenerationMixin.generate(model, " if request.param.endswith("class") else "model.generate("
    (tmp_path / "dola" / "custom_generate").mkdir(parents=True)
    (tmp_path / "dola" / "custom_generate" / "generate.py").write_text(
        "import torch\nfrom transformers import GenerationMixin\n\n\n"
        + inspect.getsource(dola_scores)
        + "\n\n"
        + inspect.getsource(dola_loop)
        + f"\n\ndef generate(model, **kwargs):\n    return {call}custom_generate=dola_loop, **kwargs)\n"
    )
    return {"custom_generate": str(tmp_path / "dola"), "trust_remote_code": True}


@pytest.mark.parametrize(
    "processors",
    [(BoostImage(bias=2.0),), (VHR(),), (GIFT(token_selector="all"),), (IMAGE,), (NOISE, BoostImage(bias=1.5))],
    ids=["reacting", "image-free lane", "survey", "contrast", "contrast and attention"],
)
def test_a_loop_of_the_users_own_is_steered_in_every_step(processors: tuple[Any, ...], given: dict[str, Any]) -> None:
    model, make = vlms.build("llava")
    inputs = make(2, left_padding=True)
    plain = model.generate(**inputs, **GREEDY, **given)[:, -5:]
    before = state_of(model)  # transformers has put its hooks on layers whose states are read
    with attnsteer.steer(model, *processors):
        found = [model.generate(**inputs, **GREEDY, **given)[:, -5:] for _ in range(2)]
        ordinary = model.generate(**inputs, **GREEDY)[:, -5:]
    assert state_of(model) == before
    assert torch.equal(found[0], stepped(model, inputs, processors))
    assert torch.equal(*found)
    assert not torch.equal(found[0], plain)
    assert not torch.equal(found[0], ordinary)
    assert torch.equal(model.generate(**inputs, **GREEDY, **given)[:, -5:], plain)
