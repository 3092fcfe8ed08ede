"""Maps of answers against the library's own eager attention over the finished sequence."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.hosts.vlm_grids import image_grids
from attnsteer.hosts.vlm_inputs import with_answer
from attnsteer.processors import VHR
from attnsteer.world import assets, sampling
from tests.hosts.common import GREEDY, state_of
from tests.tiny import vlms

LENGTH = {"max_new_tokens": 5, "min_new_tokens": 5}


class Tokens:
    """A tokenizer in which token 17 is the word ``t17``; 31 marks the first tile of a row of tiles."""

    all_special_ids = ()

    def get_vocab(self) -> dict[str, int]:
        return {f"▁t{i}": i for i in range(vlms.VOCABULARY)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"▁t{i}" for i in ids]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join("<row_1_col_1>" if int(i) == 31 else f"t{int(i)}" for i in ids)


def built(name: str) -> tuple[Any, dict[str, Any]]:
    model, make = vlms.build(name)
    inputs = make(1)
    if name == "smolvlm":  # one tile and the overview
        body = [vlms.BOS, 8, 31, *[vlms.IMAGE] * 9, 9, *[vlms.IMAGE] * 9, 10, 11, 12]
        ids = torch.tensor([body])
        inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, inputs


def eager_rows(model: Any, inputs: dict[str, Any], ids: Tensor) -> Tensor:
    """Attention of the rows from the last image token on, ``(layers, H, rows, N)``, of prompt and answer at once."""
    longer = with_answer(inputs, ids[None], model.config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(**longer, output_attentions=True, use_cache=False).attentions)[:, 0]
    model.set_attn_implementation("sdpa")
    return maps


@pytest.mark.parametrize("name", vlms.NAMES)
def test_maps_are_the_predicting_rows_of_eager_attention(name: str) -> None:
    model, inputs = built(name)
    plain, before = model.generate(**inputs, **GREEDY), state_of(model)
    heat = attnsteer.answer_maps(model, Tokens(), inputs=inputs, per="head", where=Where(), **LENGTH)
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(heat.ids, plain[0, prompt:])
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert state_of(model) == before
    ((grid,),) = image_grids(model, inputs, Tokens())
    maps = eager_rows(model, inputs, heat.ids)
    assert heat.maps.shape == (5, vlms.LAYERS, vlms.HEADS, *grid.shape)
    for token in range(5):
        wanted = maps[:, :, prompt - 1 + token][..., grid]
        torch.testing.assert_close(heat.maps[token], wanted, atol=2e-5, rtol=0)


def test_averages_selections_and_words_are_means_of_the_heads() -> None:
    model, inputs = built("llava")
    ask = functools.partial(attnsteer.answer_maps, model, Tokens(), inputs=inputs, **LENGTH)
    heads, every = ask(per="head", where=Where()), {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(ask(where=Where()).maps, heads.maps.mean((1, 2)), **every)
    torch.testing.assert_close(ask(per="layer", where=Where()).maps, heads.maps.mean(2), **every)
    torch.testing.assert_close(ask().maps, heads.maps[:, 2:].mean((1, 2)), **every)  # the second half of the layers
    some = ask(per="layer", where=Where(layers=[1, 3], heads=[0, 5]))
    torch.testing.assert_close(some.maps, heads.maps[:, [1, 3]][:, :, [0, 5]].mean(2), **every)
    torch.testing.assert_close(heads.average().maps, heads.maps.mean((1, 2)), **every)
    word = heads.tokens[1].strip()
    places = [i for i, token in enumerate(heads.tokens) if token.strip() == word]
    torch.testing.assert_close(heads.of(word).maps, heads.maps[places].mean(0, keepdim=True), **every)
    with pytest.raises(SteeringError, match="does not have the word 'horse'; its tokens are 0 ' t"):
        heads.of("horse")


def test_a_static_cache_gives_the_same_maps() -> None:
    for name in ("llava", "gemma3"):
        model, inputs = built(name)
        plain = attnsteer.answer_maps(model, Tokens(), inputs=inputs, per="head", where=Where(), **LENGTH)
        static = attnsteer.answer_maps(
            model, Tokens(), inputs=inputs, per="head", where=Where(), cache_implementation="static", **LENGTH
        )
        assert torch.equal(static.ids, plain.ids)
        torch.testing.assert_close(static.maps, plain.maps, atol=1e-5, rtol=0)


def test_sinks_are_the_outliers_of_most_rows() -> None:
    model, inputs = built("paligemma")
    ask = functools.partial(attnsteer.answer_maps, model, Tokens(), inputs=inputs, where=Where(), **LENGTH)
    kept = ask(sinks="keep")
    assert kept.sinks is None
    maps, prompt = eager_rows(model, inputs, kept.ids), inputs["input_ids"].shape[1]
    ((grid,),) = image_grids(model, inputs, Tokens())
    last = int((inputs["input_ids"][0] == vlms.IMAGE).nonzero()[-1])
    factor = 1.0  # a random model has no real sinks
    counts, rows = torch.zeros(grid.shape), 0
    for layer in maps.mean(1):
        for row in range(last + 1, prompt - 1 + 5):
            one = layer[row][grid]
            counts += one > factor * one.mean()
            rows += 1
    wanted = counts > rows / 2
    assert 0 < int(wanted.sum()) < wanted.numel()
    marked, dropped = ask(sinks="mark", sink_factor=factor), ask(sinks="drop", sink_factor=factor)
    assert torch.equal(marked.sinks, wanted) and torch.equal(marked.maps, kept.maps)
    assert torch.equal(dropped.maps, torch.where(wanted, 0.0, kept.maps))


@functools.cache
def reader() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = assets.path("models/world-llava")
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_named_objects_are_looked_at_where_they_are() -> None:
    scene = sampling.compose(["dog", "car"], "blue")
    heat = attnsteer.answer_maps(*reader(), scene.image(), "Please describe this image in detail.")
    assert "a dog" in heat.answer and "a car" in heat.answer
    found = heat.of("dog", "car")
    for (x, y), thing in zip(found.peaks, sorted(scene.objects, key=lambda o: o.name != "dog"), strict=True):
        left, top, right, bottom = thing.box
        assert left <= 64 * x < right and top <= 64 * y < bottom
    assert "% on picture" in heat.note(heat.maps[0])


def test_maps_against_a_general_prompt_are_ratios() -> None:
    model, processor = reader()
    picture, general = sampling.sample(7).image(), "Describe the image."
    options = {"per": "layer", "max_new_tokens": 3}
    plain = attnsteer.answer_maps(model, processor, picture, "Is there a book in the image?", **options)
    other = attnsteer.answer_maps(model, processor, picture, general, **options)
    ratio = attnsteer.answer_maps(
        model, processor, picture, "Is there a book in the image?", against=general, **options
    )
    torch.testing.assert_close(ratio.maps * other.maps[:1], plain.maps, atol=1e-6, rtol=1e-5)
    assert ratio.note(ratio.maps[0, 0]).endswith(" x")


def test_the_picture_is_cut_to_what_the_tokens_see() -> None:
    model, processor = reader()
    wide = Image.new("RGB", (96, 64), "white")
    wide.paste(sampling.compose(["dog"], "white").image(), (16, 0))
    heat = attnsteer.answer_maps(model, processor, wide, "Describe the image.", max_new_tokens=2)
    assert heat.picture.size == (64, 64)
    assert heat.picture.tobytes() == wide.crop((16, 0, 80, 64)).tobytes()


def test_a_steered_answer_can_be_looked_at() -> None:
    model, inputs = built("qwen25")
    method = VHR(alpha=3.0)
    with attnsteer.steer(model, method):
        steered = model.generate(**inputs, **GREEDY)
    heat = attnsteer.answer_maps(model, Tokens(), inputs=inputs, processors=[method], **LENGTH)
    assert torch.equal(heat.ids, steered[0, inputs["input_ids"].shape[1] :])


def test_what_cannot_be_read_is_refused() -> None:
    model, inputs = built("llava")
    ask = functools.partial(attnsteer.answer_maps, model, Tokens(), inputs=inputs)
    with pytest.raises(SteeringError, match="one answer"):
        ask(num_beams=2)
    with pytest.raises(SteeringError, match="'keep', 'mark', 'drop'"):
        ask(sinks="away")
    with pytest.raises(SteeringError, match="allowed are 'average', 'layer', 'head'"):
        ask(per="step")
    with pytest.raises(SteeringError, match="give image and question"):
        ask(against="Describe.")
    with pytest.raises(SteeringError, match="2 prompts"):
        attnsteer.answer_maps(model, Tokens(), inputs=vlms.build("llava")[1](2))
    with pytest.raises(SteeringError, match="question about an image, or inputs="):
        attnsteer.answer_maps(model, Tokens())
    with pytest.raises(SteeringError, match="needs the image"):
        attnsteer.answer_maps(model, Tokens(), question="What?")
    with pytest.raises(SteeringError, match="vision-language model"):
        attnsteer.answer_maps(torch.nn.Linear(1, 1), Tokens(), inputs=inputs)
    nobody = attnsteer.answer_maps(model, None, inputs=inputs, **LENGTH)
    assert nobody.tokens[0] == f"<{int(nobody.ids[0])}>"
    with pytest.raises(SteeringError, match="give the model's Hugging Face processor"):
        nobody.of("dog")
