"""Objectives: the formulas on tiny checkpoints, the small world's judge, and combinations of means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attnsteer.errors import SteeringError
from attnsteer.search import HPS, Aesthetic, Clip, Colourfulness, Harmonic, PickScore, Thresholded, WorldJudge
from attnsteer.search.objectives import objective_of
from attnsteer.world import sampling, text
from tests.tiny import encoders

PICTURES = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 56, 3), np.uint8)) for n in range(3)]
PROMPTS = ["a dog", "a red car on the grass", "a dog"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP model with tokenizer and picture preprocessing, and a head for it."""
    from safetensors.torch import save_file

    place = encoders.clip(tmp_path_factory.mktemp("clip"))
    layers = {"layers.0": (5, 12), "layers.2": (3, 5), "layers.10": (1, 3)}
    state = {f"{name}.weight": torch.randn(shape) for name, shape in layers.items()}
    state |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in layers.items()}
    (place / "head").mkdir()
    save_file({**state, "vision_model.whatever": torch.zeros(2)}, place / "head" / "model.safetensors")
    torch.save(state, place / "head.pth")
    return place


def embeddings(folder: Path, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Pictures and texts one by one through the whole model."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    images, texts = [], []
    with torch.no_grad():
        for picture, prompt in zip(PICTURES, prompts, strict=True):
            inputs = processor(text=[prompt], images=[picture], return_tensors="pt", truncation=True, max_length=16)
            output = model(**inputs)
            images.append(output.image_embeds[0] / output.image_embeds[0].norm())
            texts.append(output.text_embeds[0] / output.text_embeds[0].norm())
    return torch.stack(images), torch.stack(texts), float(model.logit_scale.detach().exp())


def test_clip_pickscore_and_hps_are_scaled_cosines(clip: Path) -> None:
    images, texts, scale = embeddings(clip, PROMPTS)
    cosine = (images * texts).sum(-1)
    assert cosine.std() > 0.01
    folder = str(clip)
    pick, hps = PickScore(folder)(PICTURES, PROMPTS), HPS(folder)(PICTURES, PROMPTS)
    np.testing.assert_allclose(pick["pickscore"], scale * cosine, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hps["hps"], cosine, rtol=1e-4, atol=1e-5)
    _, prefixed, _ = embeddings(clip, [f"A photo that depicts {prompt}" for prompt in PROMPTS])
    expected = 100 * (images * prefixed).sum(-1)
    np.testing.assert_allclose(Clip(folder)(PICTURES, PROMPTS)["clip"], expected, rtol=1e-4, atol=1e-3)
    assert abs(expected - 100 * cosine).max() > 0.1


@pytest.mark.parametrize("head", ["head", "head/model.safetensors", "head.pth"])
def test_the_aesthetic_score_is_the_head_applied_layer_by_layer(clip: Path, head: str) -> None:
    images, _, _ = embeddings(clip, PROMPTS)
    state = torch.load(clip / "head.pth", weights_only=True)
    for name in ("layers.0", "layers.2", "layers.10"):
        images = images @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    found = Aesthetic(str(clip), str(clip / head))(PICTURES, ["whatever"] * 3)["aesthetic"]
    np.testing.assert_allclose(found, images[:, 0], rtol=1e-4, atol=1e-4)


def test_scores_do_not_depend_on_the_company(clip: Path) -> None:
    together = PickScore(str(clip))(PICTURES, PROMPTS)["pickscore"]
    alone = [PickScore(str(clip))([i], [p])["pickscore"][0] for i, p in zip(PICTURES, PROMPTS, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_settings_know_the_weights(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip)
    model.logit_scale.data.fill_(2.0)
    model.save_pretrained(tmp_path)
    one, two = PickScore(str(clip)), PickScore(str(tmp_path), processor=str(clip))
    assert one.settings["weights"] != two.settings["weights"]
    assert Aesthetic(str(clip), str(clip / "head")).settings["values"]
    assert WorldJudge().settings == WorldJudge().settings


@pytest.mark.parametrize("make", [Clip, PickScore, HPS, Aesthetic])
def test_a_checkpoint_that_is_not_there_is_one_sentence(make: Any, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="cannot be loaded to score pictures") as caught:
        make(str(tmp_path / "nowhere"))(PICTURES, PROMPTS)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_head_is_refused(clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    save_file({"layers.0.weight": torch.zeros(2, 12), "layers.0.bias": torch.zeros(2)}, tmp_path / "b.safetensors")
    (tmp_path / "c.pth").write_bytes(b"nonsense")
    for name, message in (("a.safetensors", "no aesthetic predictor"), ("b.safetensors", "predicts 2 numbers")):
        with pytest.raises(SteeringError, match=message):
            Aesthetic(str(clip), str(tmp_path / name))(PICTURES, PROMPTS)
    with pytest.raises(SteeringError, match="cannot be loaded"):
        Aesthetic(str(clip), str(tmp_path / "c.pth"))(PICTURES, PROMPTS)


# ---- the small world -------------------------------------------------------------------------------------------------
def test_the_judge_prefers_true_captions_to_missing_and_to_additional_objects() -> None:
    judge = WorldJudge()
    scenes = [sampling.compose(names, "blue", seed=3) for names in (("dog", "car"), ("cat", "pizza"), ("bus", "clock"))]
    pictures, said = [scene.image() for scene in scenes], [text.caption(scene) for scene in scenes]
    true = judge(pictures, said)["judge"]
    assert min(true) > 0.8
    missing = judge(pictures, ["a dog and a bird", "a cat and a boat", "a bus and a cup"])["judge"]
    more = judge(pictures, ["a dog", "a cat", "a bus"])["judge"]
    absent = judge(pictures, ["a boat"] * 3)["judge"]
    for a, b, c, d in zip(true, missing, more, absent, strict=True):
        assert a > max(b, c)
        assert min(b, c) > d
    assert all(-1 <= value <= 1 for value in (*true, *missing, *more, *absent))


def test_the_judge_refuses_prompts_that_name_nothing_it_knows() -> None:
    with pytest.raises(SteeringError, match="knows nothing that is named in the prompt 'sunset'"):
        WorldJudge()(PICTURES[:1], ["sunset"])


# ---- combinations ----------------------------------------------------------------------------------------------------
def fixed(name: str) -> Any:
    def score(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        return [1.0] * len(images)

    score.name = name  # type: ignore[attr-defined]
    return score


def test_the_harmonic_mean_ranks_means() -> None:
    both = Harmonic([fixed("pick"), fixed("clip")])
    assert both(PICTURES, PROMPTS) == {"pick": [1.0] * 3, "clip": [1.0] * 3}
    assert both.rank({"pick": 20.0, "clip": 30.0}) == pytest.approx(2 * 20 * 30 / 50)
    assert both.rank({"pick": 0.0, "clip": 30.0}) == 0.0
    assert both.rank({"pick": -1.0, "clip": 30.0}) == -1.0
    three = Harmonic([fixed("a"), fixed("b"), fixed("c")])
    assert three.rank({"a": 1.0, "b": 2.0, "c": 4.0}) == pytest.approx(3 / 1.75)


def test_thresholds_keep_candidates_whose_means_reach_them() -> None:
    chosen = Thresholded(fixed("clip"), [(fixed("pick"), 20), (fixed("aes"), 6.0)])
    assert chosen.rank({"clip": 0.3, "pick": 20.0, "aes": 6.0}) == 0.3
    assert chosen.rank({"clip": 0.3, "pick": 19.999, "aes": 7.0}) is None
    assert chosen.rank({"clip": 0.3, "pick": 21.0, "aes": 5.9}) is None
    nested = Thresholded(Harmonic([fixed("a"), fixed("b")]), [(fixed("c"), 0.5)])
    assert nested.rank({"a": 1.0, "b": 1.0, "c": 0.5}) == 1.0
    assert Harmonic([chosen, fixed("x")]).rank({"clip": 1.0, "pick": 1.0, "aes": 1.0, "x": 1.0}) is None


def test_a_score_may_be_ranked_and_bounded_at_once() -> None:
    shared = objective_of(fixed("pick"))
    chosen = Thresholded(shared, [(shared, 2.0)])
    assert chosen(PICTURES, PROMPTS) == {"pick": [1.0] * 3}
    assert chosen.rank({"pick": 1.0}) is None
    within = Thresholded(Harmonic([shared, fixed("clip")]), [(shared, 0.5)])
    assert within(PICTURES, PROMPTS) == {"pick": [1.0] * 3, "clip": [1.0] * 3}
    assert within.rank({"pick": 1.0, "clip": 3.0}) == 1.5


def test_combinations_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SteeringError, match="two objectives or more"):
        Harmonic([fixed("a")])
    with pytest.raises(SteeringError, match="no finite number"):
        Thresholded(fixed("a"), [(fixed("b"), float("nan"))])
    with pytest.raises(SteeringError, match="Two parts of the objective are called 'a'"):
        Harmonic([fixed("a"), fixed("a")])(PICTURES, PROMPTS)


def test_colourfulness_pixel_by_pixel() -> None:
    grey = Image.new("RGB", (8, 8), (70, 70, 70))
    red = Image.new("RGB", (8, 8), (200, 0, 0))  # a = 200, b = 100 everywhere
    found = Colourfulness()([grey, red, PICTURES[0]], ["", "", ""])["colourfulness"]
    assert found[:2] == pytest.approx([0.0, 0.3 * np.sqrt(200**2 + 100**2)])
    pixels = [PICTURES[0].getpixel((x, y)) for x in range(56) for y in range(40)]
    a = [red - green for red, green, _ in pixels]
    b = [(red + green) / 2 - blue for red, green, blue in pixels]
    means = [sum(values) / len(values) for values in (a, b)]
    spread = sum((v - m) ** 2 for values, m in zip((a, b), means, strict=True) for v in values) / len(pixels)
    assert found[2] == pytest.approx(np.sqrt(spread) + 0.3 * np.sqrt(means[0] ** 2 + means[1] ** 2))
