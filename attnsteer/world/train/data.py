"""Scenes as tensors, shared by the training scripts and the judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from attnsteer.world.catalog import CATEGORIES
from attnsteer.world.scenes import SIZE, Scene

PATCH = 8
PATCHES = (SIZE // PATCH) ** 2
NUMBER = {category.name: index + 1 for index, category in enumerate(CATEGORIES)}  # 0 is the background


def pixels(drawn: Sequence[Scene]) -> torch.Tensor:
    """What the image processor makes of these scenes: float [n, 3, 64, 64] in -1..1."""
    return torch.from_numpy(np.stack([scene.array() for scene in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1


def patch_labels(drawn: Sequence[Scene]) -> torch.Tensor:
    """The category that covers most of each patch, if it covers an eighth of it, else 0: long [n, patches]."""
    labels = np.zeros((len(drawn), PATCHES), np.int64)
    for row, scene in zip(labels, drawn, strict=True):
        side = SIZE // PATCH
        share = scene.masks().reshape(-1, side, PATCH, side, PATCH).mean((2, 4)).reshape(-1, PATCHES)
        names = np.array([NUMBER[name.name] for name in scene.objects])
        row[:] = np.where(share.max(0) >= 0.125, names[share.argmax(0)], 0)
    return torch.from_numpy(labels)


def edit_json(file: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes one. Weights are stored as float16 and said to be float32 this way."""
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}, indent=2) + "\n")
