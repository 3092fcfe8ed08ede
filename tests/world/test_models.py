"""The shipped models load with stock classes, offline, and do something sensible."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from attnsteer.world import assets


def folder(name: str) -> Path:
    try:
        return assets.path(f"models/{name}")
    except FileNotFoundError as error:
        pytest.skip(f"model not trained here: {error}")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_picture_model_paints_finite_pictures_by_default_call() -> None:
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder("world-sd3"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == pipe.text_encoder_2.dtype == torch.float32
    images = [
        pipe("a dog on a blue background", num_inference_steps=2, generator=torch.Generator().manual_seed(0), **more)
        for more in ({"output_type": "np"}, {"output_type": "np", "max_sequence_length": 1})
    ]
    for image in images:
        assert image.images.shape == (1, 64, 64, 3) and np.isfinite(image.images).all()


def test_models_are_small() -> None:
    files = [file for name in ("world-sd3", "world-llava") for file in folder(name).rglob("*")]
    total = sum(file.stat().st_size for file in files if file.is_file())
    assert total < 30_000_000
