"""How much memory the fork keeps: the outputs of the shared stages, from the configuration of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..site import Site
from .denoisers import Family, unet_level
from .latents import PACKED

TEXT_TOKENS = 512
"""Upper bound taken for the text tokens of a joint sequence where nobody tells how many there are."""


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
        shape: ``height``, ``width`` (pixels), ``batch`` and ``text`` (tokens); the model's own sample size, 1 and
            ``TEXT_TOKENS`` where missing.
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
        patch = PACKED.get(family.name) or model.config.get("patch_size") or 1
        patch = patch if isinstance(patch, int) else patch[-1]
        tokens = (latent[0] // patch) * (latent[1] // patch) + (shape.get("text", TEXT_TOKENS) if family.order else 0)
        return rows * tokens * first.heads * first.head_dim * item
    return rows * item * sum(_unet_stage(model, name, latent) for name, _ in stages)


def _unet_stage(model: Any, name: str, latent: tuple[int, int]) -> int:
    """Numbers per row that a UNet stage hands on, its skip connections included."""
    level, last = unet_level(model, name), len(model.down_blocks) - 1
    channels, layers = model.config.block_out_channels[level], model.config.layers_per_block

    def area(level: int) -> int:
        return -(-latent[0] // 2**level) * -(-latent[1] // 2**level)

    if name.startswith("down_blocks"):  # every layer, and the next level's input where there is one
        count = layers if isinstance(layers, int) else layers[level]
        return channels * (count * area(level) + (area(level + 1) if level < last else 0))
    return channels * area(max(level - 1, 0) if name.startswith("up_blocks") else level)
