"""What a model looks at while it answers: rows equal eager attention, logits stay, rows do not depend on each other."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
from PIL import Image

import attnsteer
from attnsteer import Capture, SteeringError, Where
from attnsteer.hosts.asking import batch, greedy
from attnsteer.hosts.vlm_grids import image_grids
from attnsteer.hosts.vlm_inputs import with_answer
from attnsteer.looking import GeneralLooks, look, look_with_general
from attnsteer.world import assets, sampling
from tests.tiny import vlms
from tests.tiny.chat import Chat, pixels

WHERE = Where(layers=[1, 2])
ASKED = ["what is this", "is there a dog or a cat on the grass", "why"]


def picture(size: tuple[int, int] = (32, 24), seed: int = 0) -> Image.Image:
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def tiny(name: str) -> tuple[Any, Chat]:
    model, _ = vlms.build(name)
    return model, Chat(name, model)


def world() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = assets.path("models/world-llava")
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def eager_rows(model: Any, inputs: dict[str, Any], tokens: list[int], layers: list[int]) -> torch.Tensor:
    """The last row of every pass by the library's own eager attention without a cache: ``(T, L, N)``, padded."""
    model.set_attn_implementation("eager")
    rows = []
    for step in range(len(tokens)):
        given = with_answer(inputs, torch.tensor([tokens[:step]]), model.config) if step else inputs
        with torch.no_grad():
            maps = model(**given, use_cache=False, output_attentions=True).attentions
        rows.append(torch.stack([maps[layer][0, :, -1].mean(0)[: inputs["input_ids"].shape[1]] for layer in layers]))
    model.set_attn_implementation("sdpa")
    return torch.stack(rows)


@pytest.mark.parametrize("name", vlms.NAMES)
def test_rows_are_those_of_eager_attention_with_and_without_a_cache(name: str) -> None:
    model, chat = tiny(name)
    rows = batch(model, chat, [(picture(),)], ASKED[:1])
    (found,) = look(model, chat, rows, WHERE, 4)
    ((grid,),) = image_grids(model, rows.rows[0], chat, [picture()])
    expected = eager_rows(model, rows.rows[0], found.tokens, [1, 2])
    assert found.maps.shape == (len(found.tokens), 2, *grid.shape)
    torch.testing.assert_close(found.maps, expected[:, :, grid], atol=1e-6, rtol=0)
    assert (found.maps.sum((-2, -1)) <= 1 + 1e-6).all()


@pytest.mark.parametrize("setting", [{"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}])
def test_the_models_generation_config_does_not_change_which_pass_is_which(setting: dict[str, int]) -> None:
    model, chat = tiny("qwen25")
    rows = batch(model, chat, [(picture(),)], ["what is this thing here is this thing"])
    (plain,) = look(model, chat, rows, WHERE, 4)
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    (found,) = look(model, chat, rows, WHERE, 4)
    assert found.tokens == plain.tokens
    torch.testing.assert_close(found.maps, plain.maps, atol=1e-6, rtol=0)


def test_rows_of_a_model_without_grouped_queries() -> None:
    model, processor = world()
    scene = sampling.sample(3).image()
    rows = batch(model, processor, [(scene,)], ["Is there a dog in the image?"])
    (found,) = look(model, processor, rows, Where(layers=[4, 7]), 12)
    assert len(found.tokens) > 4
    assert found.tokens[-1] == model.generation_config.eos_token_id  # the pass that predicts the end was read
    ((grid,),) = image_grids(model, rows.rows[0], processor)
    expected = eager_rows(model, rows.rows[0], found.tokens, [4, 7])
    torch.testing.assert_close(found.maps, expected[:, :, grid], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen25", "gemma3"])
def test_heads_may_be_chosen_and_all_keys_sum_to_one(name: str) -> None:
    model, chat = tiny(name)
    rows = batch(model, chat, [(picture(),)], ASKED[:1])
    every = Capture(WHERE, rows="last", columns="all")
    with attnsteer.steer(model, every) as steering:
        greedy(model, rows, 1)
        states = [state["maps"][0] for state in steering.states(every).values()]
    for maps in states:
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps.sum(-1)), atol=1e-5, rtol=0)
    (some,) = look(model, chat, rows, Where(layers=[1, 2], heads=[0, 4]), 1)
    ((grid,),) = image_grids(model, rows.rows[0], chat, [picture()])
    expected = torch.stack([maps[0, [0, 4], 0].mean(0)[grid] for maps in states])
    torch.testing.assert_close(some.maps[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", vlms.NAMES)
def test_reading_leaves_the_logits_alone(name: str) -> None:
    model, chat = tiny(name)
    rows = batch(model, chat, [(picture(),)] * 2, ASKED[:2])

    def logits() -> torch.Tensor:
        inputs = {**rows.inputs, "mm_encoder_outputs": dict(rows.inputs["mm_encoder_outputs"])}
        with torch.no_grad():
            return model(**inputs).logits

    plain = logits()
    with attnsteer.steer(model, Capture(WHERE, rows="last", columns="image")):
        assert torch.equal(logits(), plain)
    assert torch.equal(logits(), plain)


@pytest.mark.parametrize("name", vlms.NAMES)
def test_rows_are_alone_in_their_batch(name: str) -> None:
    """Questions of other lengths, two pictures of other shapes, in any order."""
    model, chat = tiny(name)
    pictures = [picture(), picture((20, 33), 1), picture()]
    shared = [pictures[0], pictures[1], pictures[0]]
    together = look(model, chat, batch(model, chat, [(p,) for p in shared], ASKED), WHERE, 3)
    for order in ([0], [1], [2], [2, 0, 1]):
        seen, asked = [(pictures[i],) for i in order], [ASKED[i] for i in order]
        for i, alone in zip(order, look(model, chat, batch(model, chat, seen, asked), WHERE, 3), strict=True):
            torch.testing.assert_close(alone.maps, together[i].maps, atol=2e-6, rtol=0)
            assert alone.tokens == together[i].tokens


@pytest.mark.parametrize("name", vlms.NAMES)
def test_a_shared_encoding_is_what_pixels_give(name: str) -> None:
    model, chat = tiny(name)
    pictures = [(picture(),), (picture((20, 33), 1),)]
    rows = batch(model, chat, [pictures[0], pictures[1], pictures[0]], ASKED)
    said = greedy(model, rows, 4)
    for row, tokens in zip(rows.rows, said, strict=True):
        with torch.no_grad():
            plain = model.generate(**row, max_new_tokens=4, do_sample=False)[0, row["input_ids"].shape[1] :].tolist()
        assert tokens == plain[: len(tokens)]


def test_a_picture_is_encoded_once_whatever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = tiny("llava")
    count: list[int] = []
    plain = model.get_image_features

    @functools.wraps(plain)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        return plain(*args, **kwargs)

    chat.model = vlms.build("llava")[0]
    monkeypatch.setattr(model, "get_image_features", counted)
    memory = GeneralLooks()
    same = [picture(), picture(), picture()]  # equal pictures, not one object
    first = look_with_general(model, chat, same, ASKED, "describe", WHERE, 2, memory=memory)
    assert len(count) == 1
    assert len(memory) == 1
    assert first[1][0] is first[1][2]
    again = look_with_general(model, chat, same[:1], ASKED[:1], "describe", WHERE, 2, memory=memory)
    assert again[1][0] is first[1][0]  # remembered
    torch.testing.assert_close(again[0][0].maps, first[0][0].maps, atol=2e-6, rtol=0)
    look_with_general(model, chat, same[:1], ASKED[:1], "describe", Where(layers=[3]), 2, memory=memory)
    assert len(memory) == 2  # another layer is another map
    look_with_general(tiny("llava")[0], chat, same[:1], ASKED[:1], "describe", WHERE, 2, memory=memory)
    gc.collect()
    assert len(memory) == 2  # the map of a model goes with it


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_what_cannot_be_looked_at_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model, chat = tiny("llava")
    two = batch(model, chat, [(picture(), picture())], ASKED[:1])
    with pytest.raises(SteeringError, match="this one has 2"):
        look(model, chat, two, WHERE, 1)
    with pytest.raises(SteeringError, match="Layer 9 does not exist"):
        look(model, chat, batch(model, chat, [(picture(),)], ASKED[:1]), Where(layers=[9]), 1)
    with pytest.raises(SteeringError, match="takes no picture"):
        batch(LlamaForCausalLM(LlamaConfig(**vlms.TEXT)), chat, [(picture(),)], ASKED[:1])
    assert pixels("llava", [picture()])["pixel_values"].shape == (1, 3, 10, 10)
