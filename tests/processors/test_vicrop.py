"""ViCrop: three maps of what an answer is about, a square around the sharpest window, and a second look."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attnsteer
from attnsteer import Capture, SteeringError, Where
from attnsteer.hosts.answer_gradient import last_row_gradients, pixel_gradients
from attnsteer.hosts.asking import batch, greedy, words
from attnsteer.hosts.vlm_grids import image_grids, patch_side, picture_side
from attnsteer.processors import ViCrop
from attnsteer.processors.carve import GENERAL, SUFFIX
from attnsteer.regions import crop_box, edges, tiles
from attnsteer.world import sampling
from tests.test_looking import picture, tiny, world
from tests.tiny import vlms

MAPS = ("rel-att", "grad-att", "pure-grad")
ASKED = "what is this"
REFUSED = {("grad-att", "paligemma"): "both directions"} | {
    ("pure-grad", name): "tiles" for name in ("llava_next", "smolvlm", "internvl")
}
"""Where a map is not defined, and a word of the reason."""


@pytest.mark.parametrize("name", vlms.NAMES)
@pytest.mark.parametrize("kind", MAPS)
def test_every_family_answers_or_refuses_with_a_reason(kind: str, name: str) -> None:
    model, chat = tiny(name)
    method = ViCrop(map=kind, layer=2, side=10, max_new_tokens=3)
    if (kind, name) in REFUSED:
        with pytest.raises(SteeringError, match=REFUSED[kind, name]):
            method.answer(model, chat, picture(), ASKED)
        return
    found = method.answer(model, chat, picture(), ASKED)
    assert torch.isfinite(found.attention).all()
    assert found.refined.tobytes() == picture().crop(found.box).tobytes()
    assert found.box == crop_box(found.attention, (32, 24), 10)
    assert found.mask.sum() == found.refined.width * found.refined.height
    rows = batch(model, chat, [(picture(), found.refined)], [ASKED + SUFFIX])
    assert found.answer == words(chat, greedy(model, rows, 3)[0])


@pytest.mark.parametrize("name", ["llava", "qwen25", "llava_next"])
def test_rel_att_is_the_ratio_of_two_rows(name: str) -> None:
    model, chat = tiny(name)
    rows: list[Any] = []
    for text in (ASKED, GENERAL):
        given = batch(model, chat, [(picture(),)], [text + SUFFIX])
        reader = Capture(Where(layers=[2], heads=[1, 3]), rows="last", columns="all")
        with attnsteer.steer(model, reader) as steering:
            greedy(model, given, 1)
            ((state),) = steering.states(reader).values()
        ((grid,),) = image_grids(model, given.rows[0], chat, [picture()])
        rows.append(state["maps"][0][0, :, 0].mean(0)[grid])
    found = ViCrop(Where(heads=[1, 3]), layer=2).importance(model, chat, picture(), ASKED + SUFFIX)
    torch.testing.assert_close(found, (rows[0] / rows[1]).double(), rtol=1e-4, atol=1e-4)


def test_grad_att_keeps_what_raises_the_answer() -> None:
    model, chat = tiny("qwen3")
    rows = batch(model, chat, [(picture(),)], [ASKED + SUFFIX])
    ((row, slope),) = last_row_gradients(model, rows.rows[0], Where(layers=[2]))
    ((grid,),) = image_grids(model, rows.rows[0], chat, [picture()])
    expected = torch.zeros(grid.shape).double()
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            key = int(grid[i, j])
            for head in (0, 5):
                expected[i, j] += float(row[0, head, key]) * max(0.0, float(slope[0, head, key])) / 2
    found = ViCrop(Where(heads=[0, 5]), map="grad-att", layer=2).importance(model, chat, picture(), ASKED + SUFFIX)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert (expected > 0).any()


@pytest.mark.parametrize("name", ["llava", "qwen2"])
def test_pure_grad_is_a_ratio_on_edges_averaged_over_patches(name: str) -> None:
    model, chat = tiny(name)
    rows = batch(model, chat, [(picture(),)] * 2, [ASKED + SUFFIX, GENERAL + SUFFIX])
    own, general = (pixel_gradients(model, row).double() for row in rows.rows)
    height, width = own.shape
    kept = edges(picture(), (width, height), 3)
    side = patch_side(model)
    expected = torch.zeros(height // side, width // side).double()
    for y in range(height):
        for x in range(width):
            expected[y // side, x // side] += kept[y, x] * own[y, x] / general[y, x] / side**2
    found = ViCrop(map="pure-grad", median=3).importance(model, chat, picture(), ASKED + SUFFIX)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_large_pictures_are_looked_at_in_tiles() -> None:
    model, chat = tiny("llava")
    large = picture((1600, 1100))
    method = ViCrop(layer=2, high_resolution=True, max_new_tokens=1, side=200)
    found = method.answer(model, chat, large, ASKED)
    assert found.attention.shape == (10, 10)  # 2 x 2 tiles of 5 x 5
    corner = method.importance(model, chat, large.crop((800, 550, 1600, 1100)), ASKED + SUFFIX)
    torch.testing.assert_close(found.attention[5:, 5:], corner, rtol=1e-5, atol=1e-5)
    assert found.heat.shape == (1100, 1600)


@pytest.mark.parametrize("size", [(2048, 1100), (700, 2000), (1100, 1500)])
def test_maps_of_tiles_lie_where_the_tiles_were_seen(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model's processor crops the centre of a tile too: a peak in each corner of each map."""
    model, processor = world()
    spot = torch.zeros(8, 8).double()
    spot[0, 0] = spot[7, 7] = 1.0
    monkeypatch.setattr(ViCrop, "importance", lambda *_: spot)
    method = ViCrop(high_resolution=True, final_images="refined", max_new_tokens=1, side=200)
    picture = Image.new("RGB", size)
    found, parts = method.answer(model, processor, picture, ASKED), tiles(picture)
    cell = min(parts[0][0].size) / 8
    top = 0
    for line in parts:
        left = 0
        for tile in line:
            width, height = tile.size
            seen = min(width, height)
            x, y = left + (width - seen) / 2, top + (height - seen) / 2  # the corner of the centre square
            heat = found.heat[top : top + height, left : left + width]
            near = np.argwhere(heat > 0.5 * heat.max()) + 0.5
            corners = np.array([[y, x], [y + seen, x + seen]]) - [top, left] + [[cell / 2] * 2, [-cell / 2] * 2]
            assert all(np.abs(corner - near).max(1).min() < cell / 2 for corner in corners)
            assert all(np.abs(corners - place).max(1).min() < 1.5 * cell for place in near)
            left += width
        top += line[0].height


def test_a_short_question_makes_the_map_alone() -> None:
    model, chat = tiny("llava")
    method = ViCrop(layer=2, side=10, max_new_tokens=3)
    found = method.answer(model, chat, picture(), "what is this or that a or b", short_question=ASKED)
    assert torch.equal(found.attention, method.answer(model, chat, picture(), ASKED).attention)
    rows = batch(model, chat, [(picture(), found.refined)], ["what is this or that a or b" + SUFFIX])
    assert found.answer == words(chat, greedy(model, rows, 3)[0])


@pytest.mark.parametrize("kind", MAPS)
def test_the_embedded_model_looks_at_a_part_of_what_it_sees(kind: str) -> None:
    """Of a wide picture its processor crops the centre: the crop comes from there."""
    model, processor = world()
    wide = Image.new("RGB", (256, 128), (255, 255, 255))
    wide.paste(sampling.compose(["dog", "car"], "white").image().resize((128, 128)), (64, 0))
    method = ViCrop(map=kind, side=64, ratios=(1.0,), final_images="refined", suffix="")
    found = method.answer(model, processor, wide, "Is there a dog in the image?")
    assert found.answer.lower().startswith(("yes", "no"))
    assert found.refined.size == (64, 64)
    assert found.box[0] >= 64
    assert found.box[2] <= 192
    assert np.isfinite(found.heat).all()


def test_sizes_and_layers_of_the_paper() -> None:
    assert picture_side(vlms.build("qwen25")[0]) == 224
    assert picture_side(vlms.build("llava")[0]) == 10
    assert picture_side(vlms.build("internvl")[0]) == 12
    model, chat = tiny("llava")
    by_default = ViCrop().importance(model, chat, picture(), ASKED)
    assert torch.equal(by_default, ViCrop(layer=2).importance(model, chat, picture(), ASKED))


def test_wrong_parameters_say_what_is_allowed() -> None:
    for bad in ({"map": "attention"}, {"final_images": "crop"}):
        with pytest.raises(SteeringError, match="allowed are"):
            ViCrop(**bad)
    for bad in ({"max_new_tokens": 0}, {"median": 0}, {"median": 3.5}, {"side": 0}, {"side": 10.5}):
        with pytest.raises(SteeringError, match="allowed is"):
            ViCrop(**bad)
    with pytest.raises(SteeringError, match="odd"):
        ViCrop(median=4)
    with pytest.raises(SteeringError, match="heads alone"):
        ViCrop(Where(layers=[3]))
