"""Extractors on tiny checkpoints saved and loaded again: one picture at a time is the oracle."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attnsteer.errors import SteeringError
from attnsteer.metrics.pictures.encoders import Encoders
from attnsteer.metrics.pictures.extractors import Captioner, Dino, Lpips
from tests.tiny import encoders

PICTURES = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 56, 3), np.uint8)) for n in range(3)]


def test_texts_in_one_batch_are_texts_one_by_one(tmp_path: Path) -> None:
    folder = str(encoders.clip(tmp_path))
    encoder = Encoders(folder, folder)
    texts = ["a dog", "a red car on the grass and a blue bird", "a dog", "the cat"]
    np.testing.assert_allclose(encoder.encode(texts), encoder.texts(texts), rtol=1e-4, atol=1e-5)
    assert np.asarray(encoder.texts(texts) @ encoder.texts(texts).T)[0, 1] < 0.999
    said = encoder.described
    assert said["checkpoint"] == folder and said["dtype"] == "float32" and len(said["weights"]) == 16
    assert said["preprocessing"]["crop_size"] == {"height": 32, "width": 32}
    assert said["preprocessing"]["resample"] == "bicubic"


@pytest.mark.parametrize(("make", "name"), [(encoders.dino, "dino"), (encoders.dinov2, "dinov2")])
def test_the_first_token_stands_for_the_picture(make: Any, name: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel

    encoder = Dino(str(make(tmp_path)))
    assert encoder.name == name
    found = encoder.images(PICTURES)
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoImageProcessor.from_pretrained(tmp_path)
    for picture, row in zip(PICTURES, found, strict=True):
        with torch.no_grad():
            tokens = model(**processor(images=picture, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(row, tokens[0] / tokens[0].norm(), rtol=1e-4, atol=1e-5)
    assert float(found[0] @ found[1]) < 0.9999
    assert encoder.described["preprocessing"]["size"]["height" if name == "dino" else "shortest_edge"] == 32


def test_models_without_such_a_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="of the kind 'clip'; class tokens have vit, dinov2"):
        Dino(str(encoders.clip(tmp_path))).images(PICTURES)
    with pytest.raises(SteeringError, match="cannot be loaded to score pictures"):
        Dino(str(tmp_path / "nowhere")).images(PICTURES)
    with pytest.raises(SteeringError, match="cannot be loaded to score pictures"):
        Captioner(str(tmp_path / "nowhere")).captions(PICTURES)


def test_captions_leave_the_prompt_out(tmp_path: Path) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    folder = str(encoders.blip(tmp_path))
    captioner = Captioner(folder, shortest=6, longest=9)
    said = captioner.captions(PICTURES)
    model, processor = (
        BlipForConditionalGeneration.from_pretrained(folder).eval(),
        BlipProcessor.from_pretrained(folder),
    )
    for picture, text in zip(PICTURES, said, strict=True):
        inputs = processor(images=picture, text="a picture of", return_tensors="pt")
        tokens = model.generate(**inputs, num_beams=3, min_length=6, max_length=9, do_sample=False)[0]
        assert 6 <= len(tokens) <= 9
        whole = processor.decode(tokens, skip_special_tokens=True)
        assert whole == f"a picture of {text}" and text
    assert captioner.described["num_beams"] == 3 and captioner.described["prompt"] == "a picture of"


class Fake(torch.nn.Module):
    """In place of the package's model: the mean absolute difference, which remembers its range."""

    def __init__(self, net: str, verbose: bool):
        super().__init__()
        self.net, self.ends = net, (0.0, 0.0)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        assert one.shape == other.shape == (1, 3, 8, 6)
        self.ends = float(one.min()), float(one.max())
        return (one - other).abs().mean().reshape(1, 1, 1, 1)


def test_lpips_gets_pictures_in_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = types.ModuleType("lpips")
    package.LPIPS = Fake
    monkeypatch.setitem(sys.modules, "lpips", package)
    distance = Lpips("vgg")
    mixed = Image.fromarray(np.array([0, 255] * 72, np.uint8).reshape(8, 6, 3))
    assert distance(mixed, mixed) == 0 and distance._model.ends == (-1.0, 1.0)
    assert distance(Image.new("RGB", (6, 8)), Image.new("RGB", (6, 8), (51, 51, 51))) == pytest.approx(0.4)
    assert distance._model.net == "vgg" and distance.described["checkpoint"] == "lpips vgg"
    assert distance.described["preprocessing"] == {"do_resize": False, "range": "-1..1"}


def test_without_the_package_lpips_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SteeringError, match="pip install lpips torchvision"):
        Lpips()
