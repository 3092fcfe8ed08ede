"""Which weights: a fingerprint of a model, so that scores of another one are not taken for its own.

It reads about 16 values of each tensor and not all: fast for large models, and models that were trained differently
differ in it; but weights that were changed in other places alone keep theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


def weights_of(model: torch.nn.Module, samples: int = 16) -> str:
    """A hash of class, configuration, and all tensors: names, shapes, types, some values; and of adapters' scales.

    Args:
        samples: about so many values of each tensor, evenly spaced.
    """
    digest = hashlib.sha256(f"{type(model).__name__} {plain_config(getattr(model, 'config', {}))}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() and not tensor.is_meta:
            chosen = tensor.detach().flatten()[:: max(1, tensor.numel() // samples)]
            digest.update(repr(chosen.double().cpu().tolist()).encode())
    for name, module in model.named_modules():
        if isinstance(getattr(module, "scaling", None), dict):  # how strongly each adapter acts is no tensor
            digest.update(f"{name} {module.scaling} {getattr(module, 'active_adapters', '')}".encode())
    return digest.hexdigest()[:16]


def plain_config(config: Any) -> dict[str, str]:
    """A configuration without where it was loaded from and by which version."""
    values = config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else {}
    skipped = ("transformers_version", "torch_dtype", "dtype")
    return {name: repr(value) for name, value in sorted(values.items()) if name[0] != "_" and name not in skipped}
