"""CARVE: contrast of two prompts, regions in pixels, a second look. Also: how methods that are not attached behave."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attnsteer
import attnsteer.config
from attnsteer import SteeringError, Where
from attnsteer.cli.generate import answer
from attnsteer.hosts.asking import batch, greedy, words
from attnsteer.looking import GeneralLooks, Look, look, look_with_general
from attnsteer.processors import CARVE, ViCrop
from attnsteer.processors.carve import GENERAL, SUFFIX, paper_layers
from attnsteer.site import Site
from attnsteer.world import sampling
from tests.test_looking import picture, tiny, world
from tests.tiny import vlms

QUICK = CARVE(Where(layers=[1, 2]), max_new_tokens=4)


def naive(own: Look, general: Look, size: tuple[int, int], carve: CARVE) -> tuple[np.ndarray, np.ndarray]:
    """Heat and mask by loops: each map to pixels on its own, then weights, percentile, flood fill, ranking."""
    heat = np.zeros((size[1], size[0]))
    a, b = own.maps.double().numpy(), general.maps.double().numpy()
    for t in range(min(len(a), len(b))):
        for layer in range(a.shape[1]):
            ratio = torch.from_numpy(a[t, layer] / (b[t, layer] + carve.lam))
            wide = torch.nn.functional.interpolate(ratio[None, None], (size[1], size[0]), mode="bilinear")[0, 0]
            heat += (t + 1) * wide.numpy()
    above = heat >= np.percentile(heat, 100 * (1 - carve.keep)) - 1e-6 * heat.max()
    parts: list[tuple[float, list[tuple[int, int]]]] = []
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(above), strict=True)}
    while left:
        stack, part = [min(left)], []
        while stack:
            y, x = stack.pop()
            if (y, x) in left:
                left.remove((y, x))
                part.append((y, x))
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        parts.append((sum(heat[p] for p in part), part))
    parts.sort(key=lambda p: -p[0])
    mask = np.zeros(heat.shape, bool)
    for _, part in parts[: max(carve.regions, int(len(parts) * carve.keep))]:
        for place in part:
            mask[place] = True
    return heat, mask


@pytest.mark.parametrize("name", ["llava", "qwen25"])
def test_the_refined_picture_is_that_of_naive_loops(name: str) -> None:
    model, chat = tiny(name)
    scene, carve = picture(), CARVE(Where(layers=[1, 2]), max_new_tokens=4, regions=2, lam=1e-3)
    found = carve.answer(model, chat, scene, "what is this")
    own = look(model, chat, batch(model, chat, [(scene,)], ["what is this" + SUFFIX]), carve.where, 4)[0]
    general = look(model, chat, batch(model, chat, [(scene,)], [GENERAL + SUFFIX]), carve.where, 4)[0]
    heat, mask = naive(own, general, scene.size, carve)
    np.testing.assert_allclose(found.heat, heat, rtol=1e-3)
    assert (found.mask == mask).mean() > 0.99  # pixels at the threshold fall by rounding
    ys, xs = np.nonzero(found.mask)
    left, top, right, bottom = found.box
    assert (left, top, right, bottom) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    scale = max(scene.width / (right - left), scene.height / (bottom - top))
    assert found.refined.size == (round((right - left) * scale), round((bottom - top) * scale))
    black = np.asarray(scene) * found.mask[..., None]
    cut = Image.fromarray(black[top:bottom, left:right]).resize(found.refined.size, Image.Resampling.LANCZOS)
    assert found.refined.tobytes() == cut.tobytes()
    final = batch(model, chat, [(scene, found.refined)], ["what is this" + SUFFIX])
    assert found.answer == words(chat, greedy(model, final, 4)[0])


@pytest.mark.parametrize("name", vlms.NAMES)
@pytest.mark.parametrize("final_images", ["both", "refined"])
def test_every_family_answers(name: str, final_images: str) -> None:
    model, chat = tiny(name)
    carve = CARVE(Where(layers=[1, 2]), max_new_tokens=3, final_images=final_images)
    found = carve.answer(model, chat, picture(), "what is this")
    assert found.answer
    assert found.heat.shape == found.mask.shape == (24, 32)
    assert np.isfinite(found.heat).all()
    assert 0.1 < found.mask.mean() < 0.6


@pytest.mark.parametrize("steps", ["all", "first", "end"])
def test_the_question_against_itself_gives_the_picture_back(steps: str) -> None:
    model, chat = tiny("llava")
    scene = picture()
    carve = CARVE(Where(layers=[1, 2]), lam=0, steps=steps, max_new_tokens=4, general="what is this")
    found = carve.answer(model, chat, scene, "what is this")
    assert found.mask.all()
    assert found.box == (0, 0, 32, 24)
    assert found.refined.tobytes() == scene.tobytes()
    torch.testing.assert_close(found.attention / found.attention.max(), torch.ones(5, 5).double(), atol=1e-5, rtol=0)


def test_one_layer_and_the_first_step_is_rel_att() -> None:
    model, chat = tiny("qwen3")
    carve = CARVE(Where(layers=[2]), lam=0, steps="first").answer(model, chat, picture(), "what is this")
    vicrop = ViCrop(layer=2, side=12).answer(model, chat, picture(), "what is this")
    assert torch.equal(carve.attention, vicrop.attention)


@pytest.mark.parametrize("name", ["llava", "llava_next", "smolvlm"])
def test_several_questions_at_once_are_those_one_by_one(name: str) -> None:
    model, chat = tiny(name)
    scenes, asked = [picture(), picture((20, 33), 1), picture()], ["what is this", "is there a dog on the grass", "why"]
    memory = GeneralLooks()
    together = QUICK.answers(model, chat, scenes, asked, memory=memory)
    assert len(memory) == 2
    for scene, question, found in zip(scenes, asked, together, strict=True):
        alone = QUICK.answer(model, chat, scene, question)
        torch.testing.assert_close(found.attention, alone.attention, rtol=1e-3, atol=1e-3)
        assert found.answer == alone.answer
        again = QUICK.answer(model, chat, scene, question, memory=memory)
        torch.testing.assert_close(again.attention, alone.attention, rtol=1e-3, atol=1e-3)
    assert len(memory) == 2


@pytest.mark.parametrize("name", ["llava", "qwen25"])
def test_a_picture_is_encoded_once_for_all_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three questions on one picture, equal but not one object: the picture and three refined ones."""
    model, _ = tiny(name)
    _, chat = tiny(name)  # it asks a model for the number of image tokens
    plain, seen = model.get_image_features, []

    @functools.wraps(plain)
    def counted(pixel_values: torch.Tensor, **more: Any) -> Any:
        seen.append(len(more.get("image_grid_thw", pixel_values)))
        return plain(pixel_values, **more)

    monkeypatch.setattr(model, "get_image_features", counted)
    found = QUICK.answers(model, chat, [picture() for _ in range(3)], ["what is this", "why", "is there a dog"])
    assert sum(seen) == 1 + len({one.refined.tobytes() for one in found}) > 2


def test_the_model_is_as_before() -> None:
    model, chat = tiny("llava")
    rows = batch(model, chat, [(picture(),)], ["what is this"])
    before = greedy(model, rows, 4)
    QUICK.answer(model, chat, picture(), "what is this")
    assert greedy(model, rows, 4) == before
    assert not any("_steer" in vars(module) for module in model.modules())
    other = attnsteer.Capture(Where(layers=[1]), rows="last", columns="image")
    with attnsteer.steer(model, other), pytest.raises(SteeringError, match="steered already"):
        QUICK.answer(model, chat, picture(), "what is this")


def test_the_command_line_lets_them_ask_by_themselves() -> None:
    model, chat = tiny("llava")
    said = answer(model, chat, picture(), "what is this", [QUICK], 2)
    assert said == replace(QUICK, max_new_tokens=2).answer(model, chat, picture(), "what is this").answer


def test_a_picture_whose_centre_alone_is_seen_is_cut_from_there() -> None:
    """The embedded model's processor crops the centre of a picture that is not square."""
    model, processor = world()
    wide = Image.new("RGB", (128, 64), (255, 255, 255))
    wide.paste(sampling.sample(3).image(), (32, 0))
    found = CARVE(final_images="refined").answer(model, processor, wide, "Is there a dog in the image?")
    assert (found.heat[:, :32] == 0).all()
    assert (found.heat[:, 96:] == 0).all()
    assert found.box[0] >= 32
    assert found.box[2] <= 96


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.6, 0.9])
def test_keep_is_a_share_of_what_the_model_sees(keep: float) -> None:
    """Half of the picture lies outside the centre crop; a hot spot in it stays the refined picture for every share."""
    own = torch.full((1, 1, 8, 8), 0.1) + 0.01 * torch.rand(1, 1, 8, 8)
    own[0, 0, 2:4, 2:4] = 5.0
    looks = Look(own, [1]), Look(torch.ones(1, 1, 8, 8), [1])
    carve = CARVE(keep=keep, steps="first", regions=64)
    _, box, _, mask, _ = carve.refine(picture((64, 32)), *looks, area=(16, 0, 48, 32))
    assert mask[:, 16:48].mean() == pytest.approx(keep, abs=0.01)
    assert not mask[:, :16].any()
    assert not mask[:, 48:].any()
    assert mask[8:16, 24:32].all()
    assert box[0] >= 16
    assert box[2] <= 48


def test_the_embedded_model_answers_about_a_part() -> None:
    model, processor = world()
    scene = sampling.compose(["dog", "car"], "white").image()
    carve = CARVE(final_images="refined", suffix="")
    found = carve.answer(model, processor, scene, "Is there a dog in the image?")
    assert found.answer.lower().startswith(("yes", "no"))
    assert not found.mask.all()
    assert found.attention.shape == (8, 8)
    typed = carve.answer(
        model, processor, scene, "Is there a dog in the image?", "USER: <image>\n{question} ASSISTANT:"
    )
    assert typed.answer == found.answer


# ---- parameters ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layers", "expected"),
    [(28, range(20, 26)), (32, range(20, 26)), (40, range(20, 26)), (8, [5, 6]), (80, range(48, 65)), (1, [0])],
)
def test_the_layers(layers: int, expected: Any) -> None:
    there = [Site(f"layers.{n}", "causal", n, n, 8, 8, 16) for n in range(layers)]
    assert paper_layers(there) == list(expected)


def test_general_maps_are_for_their_own_question() -> None:
    model, chat = tiny("llava")
    own, general = look_with_general(model, chat, [picture()], ["why"], "describe", Where(layers=[1]), 2)
    assert not torch.equal(own[0].maps[0], general[0].maps[0])


def test_wrong_parameters_say_what_is_allowed() -> None:
    for bad in (
        {"lam": -1},
        {"keep": 0},
        {"keep": 1.5},
        {"regions": 0},
        {"regions": 2.5},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
    ):
        with pytest.raises(SteeringError, match="allowed is"):
            CARVE(**bad)
    for bad in ({"steps": "last"}, {"final_images": "crop"}):
        with pytest.raises(SteeringError, match="allowed are"):
            CARVE(**bad)
    with pytest.raises(SteeringError, match="steps="):
        CARVE(Where(steps="decode"))


@pytest.mark.parametrize("method", [CARVE(), ViCrop()], ids=lambda m: type(m).__name__)
def test_they_cannot_be_attached_and_say_how_they_are_called(method: Any) -> None:
    model, _ = vlms.build("llava")
    name = type(method).__name__
    with pytest.raises(SteeringError, match=rf"{name} cannot be attached.*Call {name}\(\.\.\.\)\.answer\(model"):
        attnsteer.attach(model, method)


def test_they_are_data_like_every_method() -> None:
    for method in (CARVE(Where(layers=[3]), keep=0.4, regions=2), ViCrop(map="grad-att", layer=3, side=100)):
        assert attnsteer.config.processor_from_dict(method.to_dict()) == method
