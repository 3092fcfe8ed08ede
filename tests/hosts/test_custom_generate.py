"""Decoding loops of the user's own (``custom_generate=``) on a steered model; the loop here is DoLa's."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import Where
from attnsteer.processors import GIFT, M3ID, PAI, VHR
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


def look_first(model, input_ids, attention_mask, pixel_values, answer=5, **kwargs):  # type: ignore[no-untyped-def]
    """Code of a repository that generates once, of another prompt, before a loop of its own."""
    prompt = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
    other = torch.cat([input_ids, input_ids[:, -1:]], 1)
    model.generate(
        **{**prompt, "input_ids": other, "attention_mask": torch.ones_like(other)}, max_new_tokens=2, do_sample=False
    )
    out, found = model(**prompt, use_cache=True), []
    for _ in range(answer):
        found.append(out.logits[:, -1])
        step = {"input_ids": found[-1].argmax(-1, keepdim=True), "past_key_values": out.past_key_values}
        out = model(**step)
    return torch.stack(found)


def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> dict[str, Any]:
    """A repository whose code this is, as options of ``generate``."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "recipe" / "custom_generate").mkdir(parents=True)
    (tmp_path / "recipe" / "custom_generate" / "generate.py").write_text(source)
    return {"custom_generate": str(tmp_path / "recipe"), "trust_remote_code": True}


@pytest.fixture(params=["function", "folder around the class", "folder around the model"])
def given(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """``custom_generate`` in each of the forms that transformers takes."""
    if request.param == "function":
        return {"custom_generate": dola_loop}
    call = "GenerationMixin.generate(model, " if request.param.endswith("class") else "model.generate("
    source = "import torch\nfrom transformers import GenerationMixin\n\n\n"
    source += inspect.getsource(dola_scores) + "\n\n" + inspect.getsource(dola_loop)
    source += f"\n\ndef generate(model, **kwargs):\n    return {call}custom_generate=dola_loop, **kwargs)\n"
    return folder(tmp_path, monkeypatch, source)


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


@pytest.mark.parametrize(
    "processors",
    [(PAI(Where(layers="all"), alpha=0.9),), (VHR(),), (GIFT(token_selector="all"),), (IMAGE,), (IMAGE, PAI())],
    ids=["last row", "image-free lane", "survey", "contrast", "contrast and attention"],
)
def test_a_loop_behind_a_generation_is_steered_as_one_outside(
    processors: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, make = vlms.build("llava")
    inputs = make(2)
    source = "import torch\n\n\n" + inspect.getsource(look_first).replace("def look_first", "def generate")
    given = folder(tmp_path, monkeypatch, source)
    plain = model.generate(**inputs, **given)
    before = state_of(model)
    with attnsteer.steer(model, *processors):
        found = [model.generate(**inputs, **given) for _ in range(2)]
        with torch.no_grad():
            expected = look_first(model, **inputs)
    assert state_of(model) == before
    assert torch.equal(found[0], expected)
    assert torch.equal(*found)
    assert not torch.equal(found[0], plain)


@pytest.mark.parametrize("call", ["GenerationMixin.generate(model, ", "model.generate("])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}], ids=lambda o: next(iter(o))
)
@pytest.mark.parametrize(
    "processors", [(PAI(),), (VHR(),), (M3ID(decay=0.5),), (NOISE, PAI())], ids=["PAI", "VHR", "M3ID", "2"]
)
def test_what_a_repository_generates_is_what_generate_does(
    processors: tuple[Any, ...], options: dict[str, Any], call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a pass of its own, twice, and where the class is asked past the model."""
    model, make = vlms.build("llava")
    model = model.double()
    one = "prompt_lookup_num_tokens" in options
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in make(1 if one else 2).items()}
    source = "from transformers import GenerationMixin\n\n\ndef generate(model, **kw):\n    names = 'input_ids', "
    source += "'attention_mask', 'pixel_values'\n    model(**{name: kw[name] for name in names})\n"
    source += f"    {call}**kw)\n    return {call}**kw)\n"
    given = folder(tmp_path, monkeypatch, source)
    with attnsteer.steer(model, *processors):
        found = model.generate(**inputs, **GREEDY, **options, **given)
        assert "_reorder_cache" not in model.__dict__
        assert torch.equal(found, model.generate(**inputs, **GREEDY, **options))
    assert not torch.equal(found, model.generate(**inputs, **GREEDY, **options))
