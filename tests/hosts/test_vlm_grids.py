"""Every image token is where the grid says: a spot in the picture changes the features at its own cell most."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from attnsteer import SteeringError
from attnsteer.hosts.vlm_grids import covered_area, image_grids
from tests.tiny import vlms
from tests.tiny.chat import Chat, features, image_processor, pixels


def local(model: Any) -> None:
    """Patches of the tower no longer look at each other, so that a spot stays where it is."""
    for name, module in model.named_modules():
        out = name.endswith((".out_proj", ".projection_layer", "attn.proj")) and ("vision" in name or "visual" in name)
        if out and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


@pytest.mark.parametrize("size", [(32, 24), (20, 33)], ids=str)
@pytest.mark.parametrize("name", vlms.NAMES)
def test_a_spot_in_the_picture_is_found_at_its_cell(name: str, size: tuple[int, int]) -> None:
    model, _ = vlms.build(name)
    local(model)
    grey, chat = Image.new("RGB", size, (90, 90, 90)), Chat(name, model)
    before = torch.cat(features(model, pixels(name, [grey])))
    inputs = chat(["a <image> b"], [[grey]], return_tensors="pt")
    places = (inputs["input_ids"][0] == vlms.IMAGE).nonzero()[:, 0]
    assert len(places) == len(before)
    order = {int(place): number for number, place in enumerate(places)}
    for view in ("finest", "overview"):
        ((grid,),) = image_grids(model, inputs, chat, [grey], view)
        rows, columns = grid.shape
        for r, c in {(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3), (rows - 1, columns - 1)}:
            spotted = grey.copy()
            left, top = c * size[0] / columns, r * size[1] / rows
            right, bottom = left + size[0] / columns, top + size[1] / rows
            spot = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
            spotted.paste((250, 10, 10), spot)
            moved = (torch.cat(features(model, pixels(name, [spotted]))) - before).norm(dim=-1)
            by_cell = torch.stack([torch.stack([moved[order[int(p)]] for p in line]) for line in grid])
            assert int(by_cell.argmax()) == r * columns + c, (view, r, c, by_cell)


@pytest.mark.parametrize("name", [n for n in vlms.NAMES if n != "smolvlm"])
def test_rows_and_pictures_keep_their_places(name: str) -> None:
    """Two padded rows: each grid names its own row's image tokens, in order, and nothing else."""
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    grids = image_grids(model, inputs)
    expected = {"llava": (5, 5), "llava_next": (6, 8), "internvl": (3, 3), "gemma3": (3, 3), "paligemma": (6, 6)}
    for row, (grid,) in enumerate(grids):
        assert tuple(grid.shape) == expected.get(name, (3, 5))
        places = (inputs["input_ids"][row] == vlms.IMAGE).nonzero()[:, 0]
        assert grid.flatten().tolist() == sorted(grid.flatten().tolist())
        if name != "llava_next":
            assert grid.flatten().tolist() == places.tolist()
        alone = image_grids(model, vlms.row(inputs, row))[0][0]
        padding = int((inputs["attention_mask"][row] == 0).sum())
        assert torch.equal(alone + padding, grid)


def test_newlines_and_the_overview_of_llava_next_are_told_apart() -> None:
    model, make = vlms.build("llava_next")
    inputs = make(1)
    ((fine,),), ((whole,),) = image_grids(model, inputs), image_grids(model, inputs, view="overview")
    start = int((inputs["input_ids"][0] == vlms.IMAGE).nonzero()[0])
    assert torch.equal(whole, start + torch.arange(16).reshape(4, 4))
    assert torch.equal(fine, start + 16 + torch.arange(6)[:, None] * 9 + torch.arange(8))


def test_several_pictures_in_a_row() -> None:
    model, _ = vlms.build("qwen25")
    body = [vlms.BOS, *[vlms.IMAGE] * 15, 9, *[vlms.IMAGE] * 4]
    sizes = torch.tensor([[1, 6, 10], [1, 4, 4]])
    (found,) = image_grids(model, {"input_ids": torch.tensor([body]), "image_grid_thw": sizes})
    assert torch.equal(found[0], torch.arange(1, 16).reshape(3, 5))
    assert torch.equal(found[1], torch.arange(17, 21).reshape(2, 2))
    text, _ = vlms.build("llava")
    assert image_grids(text, {"input_ids": torch.tensor([[vlms.BOS, 9]])}) == [[]]


def test_what_cannot_be_known_is_refused_with_what_would_help() -> None:
    model, make = vlms.build("smolvlm")
    with pytest.raises(SteeringError, match="without markers"):
        image_grids(model, make(1), Chat("smolvlm", model))
    tiled = {
        "input_ids": torch.tensor([[31, *[vlms.IMAGE] * 9, 9, *[vlms.IMAGE] * 9]]),
        "pixel_values": torch.ones(1, 2, 3, 12, 12),
    }
    with pytest.raises(SteeringError, match="hf_processor="):
        image_grids(model, tiled)
    assert image_grids(model, tiled, Chat("smolvlm", model))[0][0].flatten().tolist() == list(range(1, 10))

    model, make = vlms.build("internvl")
    several = {"input_ids": torch.full((1, 27), vlms.IMAGE), "pixel_values": torch.ones(3, 3, 12, 12)}
    with pytest.raises(SteeringError, match="3 InternVL tiles"):
        image_grids(model, several)
    with pytest.raises(SteeringError, match="for a picture of"):
        image_grids(model, several, image_processor("internvl"), [Image.new("RGB", (12, 36))])
    with pytest.raises(SteeringError, match="given in pictures="):
        image_grids(model, make(2), None, [Image.new("RGB", (12, 12))])
    assert image_grids(model, several, view="overview")[0][0].flatten().tolist() == list(range(18, 27))

    model, make = vlms.build("qwen2")
    with pytest.raises(SteeringError, match="image_grid_thw"):
        image_grids(model, {"input_ids": make(1)["input_ids"]})
    with pytest.raises(SteeringError, match="does not fit"):
        image_grids(model, {**make(1), "image_grid_thw": torch.tensor([[1, 8, 10]])})
    with pytest.raises(SteeringError, match="video"):
        image_grids(model, {"input_ids": torch.full((1, 4), vlms.VIDEO)})
    with pytest.raises(SteeringError, match="allowed are"):
        image_grids(model, make(1), view="coarse")  # type: ignore[arg-type]
    model, make = vlms.build("llava")
    with pytest.raises(SteeringError, match="not a multiple of 5 x 5"):
        image_grids(model, {**make(1), "input_ids": torch.full((1, 26), vlms.IMAGE)})
    with pytest.raises(SteeringError, match="input_ids"):
        image_grids(model, {"inputs_embeds": torch.ones(1, 2, 3)})


def test_a_class_token_in_front_is_no_place_of_the_picture() -> None:
    model, make = vlms.build("llava")
    model.config.vision_feature_select_strategy = "full"
    ids = torch.tensor([[vlms.BOS, *[vlms.IMAGE] * 26, 9, *[vlms.IMAGE] * 26]])
    (first, second), *_ = image_grids(model, {**make(1), "input_ids": ids})
    assert torch.equal(first, torch.arange(2, 27).reshape(5, 5))
    assert torch.equal(second, torch.arange(29, 54).reshape(5, 5))


def test_a_text_model_has_no_grid() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**vlms.TEXT))
    with pytest.raises(SteeringError, match="known are: gemma3"):
        image_grids(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})


def test_the_area_that_is_seen() -> None:
    from transformers import CLIPImageProcessor, LlavaImageProcessor

    assert covered_area(None, (40, 30)) == (0, 0, 40, 30)
    cropped = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    assert covered_area(cropped, (40, 30)) == (5, 0, 35, 30)
    assert covered_area(cropped, (30, 40)) == (0, 5, 30, 35)
    assert covered_area(LlavaImageProcessor(do_pad=True), (40, 30)) == (0, -5, 40, 35)
    for name in ("llava_next", "qwen2", "internvl", "smolvlm"):
        assert covered_area(image_processor(name), (40, 30)) == (0, 0, 40, 30)
