"""How much memory the fork keeps: the outputs of the shared stages, from the configuration of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..site import Site
from .denoisers import Family

TEXT_TOKENS = 512
"""Upper bound taken for the text tokens of a joint sequence."""


def tape_bytes(
    model: Any,
    family: Family,
    stages: Sequence[tuple[str, Any]],
    first: Site,
    scale: int | None,
    shape: Mapping[str, int],
) -> int | None:
    """About how many bytes the recorded stage outputs take; None where the picture's size cannot be told.

    Args:
        stages: the stages before the fork.
        first: the first perturbed site (its width is that of the hidden states).
        scale: pixels per latent, where the pipeline tells.
        shape: ``height``, ``width`` (pixels) and ``batch``; the model's own sample size and 1 where missing.
    """
    size = model.config.get("sample_size")
    default = (size, size) if isinstance(size, int) else size
    if scale and {"height", "width"} <= set(shape):
        latent: tuple[int, int] = (shape["height"] // scale, shape["width"] // scale)
    elif default:
        latent = (default[0], default[1])
    else:
        return None
    rows = 2 * shape.get("batch", 1)  # the conditional forward of a guided batch holds both branches
    item = next(model.parameters()).element_size()
    if family.chain:
        patch = model.config.get("patch_size") or 1
        patch = patch if isinstance(patch, int) else patch[-1]
        tokens = (latent[0] // patch) * (latent[1] // patch) + (TEXT_TOKENS if first.order else 0)
        return rows * tokens * first.heads * first.head_dim * item
    return rows * item * sum(_unet_stage(model, name, latent) for name, _ in stages)


def _unet_stage(model: Any, name: str, latent: tuple[int, int]) -> int:
    """Numbers per row that a UNet stage hands on, its skip connections included."""
    stage, _, number = name.partition(".")
    channels = model.config.block_out_channels
    levels = len(channels)
    level = {"down_blocks": lambda: int(number), "up_blocks": lambda: levels - 1 - int(number)}.get(
        stage, lambda: levels - 1
    )()
    area = -(-latent[0] // 2**level) * -(-latent[1] // 2**level)
    layers = model.config.layers_per_block
    outputs = (layers if isinstance(layers, int) else layers[level]) + 1 if stage == "down_blocks" else 1
    return outputs * channels[level] * area
