"""Phases and token spans of a steered language model, under every kind of cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import AttentionCall, Where
from tests.hosts.common import GREEDY, BoostImage, Look, ScaleAll, scaled
from tests.tiny import vlms


# ---- phases and spans ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}], ids=str)
def test_steps_are_honoured(phase: str, options: dict[str, Any]) -> None:
    """A text-only prompt, so that the prefill may come in chunks: chunks are prefill, whatever their length."""
    model, make = vlms.build("llava")
    ids = make(2)["input_ids"].masked_fill(make(2)["input_ids"] == vlms.IMAGE, 9)
    lengths: list[tuple[str, int]] = []
    with attnsteer.steer(
        model, ScaleAll(Where(steps=phase)), Look(see=lambda c: lengths.append((c.phase, c.q.shape[2])))
    ):
        steered = model.generate(ids, **GREEDY, **options)
    whole = {c for p, c in lengths if p == "prefill"}
    assert whole == ({4, ids.shape[1] % 4 or 4} if "prefill_chunk_size" in options else {ids.shape[1]})
    assert {c for p, c in lengths if p == "decode"} == {1}
    factor = torch.full((1, vlms.HEADS), 2.0)
    sequence, cache = ids, None
    for step in range(5):  # by hand
        active = (step == 0) == (phase == "prefill")
        with scaled(model, {s.name: factor for s in attnsteer.sites(model)} if active else {}):
            out = model(input_ids=sequence if cache is None else sequence[:, -1:], past_key_values=cache)
        cache = out.past_key_values
        sequence = torch.cat([sequence, out.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(steered, sequence)


def test_phases_of_bare_calls_follow_the_cache() -> None:
    model, make = vlms.build("llava")
    inputs, seen = make(1), []
    with attnsteer.steer(model, Look(see=lambda call: seen.append((call.phase, call.q.shape[2])))):
        out = model(**inputs)
        model(input_ids=torch.tensor([[8, 9]]), past_key_values=out.past_key_values)
        model(**inputs)
    n = inputs["input_ids"].shape[1]
    assert list(dict.fromkeys(seen)) == [("prefill", n), ("decode", 2)]
    assert seen[-1] == ("prefill", n)


@pytest.mark.parametrize("name", vlms.NAMES)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_spans_follow_the_keys(name: str, options: dict[str, Any]) -> None:
    """In decode a key is recognised by comparing it with the keys of the prefill, whose tokens are known."""
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    ids = inputs["input_ids"]
    site_of: dict[str, Tensor] = {}
    checked = []

    def see(call: AttentionCall) -> None:
        image, text = call.spans.image, call.spans.text
        assert image.shape == text.shape == (call.q.shape[0], call.k.shape[2])
        assert not (image & text).any()
        if call.phase == "prefill" and "num_beams" not in options:
            n = ids.shape[1]
            assert torch.equal(image[:, :n], ids == vlms.IMAGE)
            assert torch.equal(text[:, :n], (ids != vlms.IMAGE) & inputs["attention_mask"].bool())
            assert not image[:, n:].any()
            assert not text[:, n:].any()
            site_of[call.site.name] = call.k[:, 0, :n].clone()
        elif call.site.name in site_of:
            first, keys = site_of[call.site.name], call.k[:, 0]
            for row in range(2):
                same = (keys[row][:, None] == first[row][None]).all(-1)  # (Nk, n)
                place = torch.where(same.any(1), same.int().argmax(1), -1)
                here = (place >= 0) & (text[row] | image[row])
                assert torch.equal(image[row][here], (ids[row] == vlms.IMAGE)[place[here]])
                checked.append(int(here.sum()))
                assert not image[row][place < 0].any()

    with attnsteer.steer(model, Look(see=see)):
        model.generate(**inputs, **GREEDY, **options)
    assert checked or "num_beams" in options


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_bias_on_image_keys_does_not_depend_on_the_cache(name: str, cache: str | None) -> None:
    """Decode with a cache equals a fresh prefill of the longer prompt: keys are named the same in both."""
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    with attnsteer.steer(model, BoostImage(bias=2.0)):
        out = model.generate(
            **inputs, **GREEDY, output_logits=True, return_dict_in_generate=True, cache_implementation=cache
        )
        fresh = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True, use_cache=False)
    if name != "paligemma":
        assert torch.equal(out.sequences, fresh.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(fresh.logits), rtol=1e-4, atol=1e-4)
    else:
        assert out.sequences.shape == fresh.sequences.shape
