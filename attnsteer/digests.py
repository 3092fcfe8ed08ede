"""Hashes of content: of tensors, of pictures, and of the weights of models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def tensor_digest(tensor: Tensor) -> str:
    """A hash of dtype, shape and content."""
    content = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(content.numpy().data)
    return digest.hexdigest()[:16]


def picture_digest(picture: Image.Image) -> str:
    """A hash of mode, size, colours (palette and transparency, where a mode has them) and content."""
    colours = picture.getpalette(), picture.info.get("transparency")
    digest = hashlib.sha256(f"{picture.mode} {picture.size} {colours} ".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()[:16]


def weights_of(model: torch.nn.Module, samples: int = 16, writes: bool = False) -> str:
    """A hash of class, configuration, and all tensors: names, shapes, types, some values; and of adapters: how strongly
    each acts, which are active, and whether they are off.

    Args:
        samples: values of each tensor.
        writes: also how often each tensor was written to, which tells of values beside the samples, within a process.
    """
    digest = hashlib.sha256(f"{type(model).__name__} {plain_config(getattr(model, 'config', {}))}".encode())
    tensors = {name: each for name, each in sorted(model.state_dict().items()) if isinstance(each, Tensor)}
    there = {name: tensor for name, tensor in tensors.items() if tensor.numel() and not tensor.is_meta}
    values = dict(zip(there, _samples(list(there.values()), samples), strict=True))
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if name in values:
            digest.update(repr(values[name]).encode())
        if writes and not tensor.is_inference():
            digest.update(f"{tensor._version}".encode())
    for name, module in model.named_modules():
        digest.update(_adapters(name, module).encode())
    return digest.hexdigest()[:16]


def _samples(tensors: Sequence[Tensor], samples: int) -> list[list[float]]:
    """Some values of each tensor; a device is waited for once."""
    chosen = [tensor.detach().flatten()[:: max(1, tensor.numel() // samples)].double() for tensor in tensors]
    found: list[list[float]] = [[] for _ in chosen]
    for device in dict.fromkeys(each.device for each in chosen):
        places = [place for place, each in enumerate(chosen) if each.device == device]
        together = torch.cat([chosen[place] for place in places]).cpu()
        for place, part in zip(places, together.split([len(chosen[place]) for place in places]), strict=True):
            found[place] = part.tolist()
    return found


def _adapters(name: str, module: torch.nn.Module) -> str:
    """What is no tensor about the adapters of a layer: how strongly each acts, and whether they do."""
    text, off = "", getattr(module, "disable_adapters", None)
    if isinstance(getattr(module, "scaling", None), dict):
        text = f"{name} {module.scaling} {getattr(module, 'active_adapters', '')}"
    elif isinstance(off, bool):  # models have a method of this name
        text = f"{name} {getattr(module, 'active_adapters', '')}"
    return f"{text} off" if off is True else text


def plain_config(config: Any) -> dict[str, str]:
    """A configuration without where it was loaded from and by which version."""
    values = config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else {}
    skipped = ("transformers_version", "torch_dtype", "dtype")
    return {name: repr(value) for name, value in sorted(values.items()) if name[0] != "_" and name not in skipped}
