"""How much memory guidance keeps, from the configuration of the model: stage outputs for the fork, keys and values that
rows lend."""

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
    latent = _latent(model, scale, shape)
    if latent is None:
        return None
    rows = 2 * shape.get("batch", 1)  # the conditional forward of a guided batch holds both branches
    item = next(model.parameters()).element_size()
    if family.chain:
        tokens = _image_tokens(model, family, latent) + (shape.get("text", TEXT_TOKENS) if family.order else 0)
        return rows * tokens * first.heads * first.head_dim * item
    return rows * item * sum(_unet_stage(model, name, latent) for name, _ in stages)


def loan_bytes(
    model: Any, family: Family, sites: Sequence[Site], scale: int | None, shape: Mapping[str, int]
) -> int | None:
    """About how many bytes the keys and values take that rows of these sites lend until the scheduler steps.

    ``2 B Hkv Nk D`` numbers a site; None where the picture's size cannot be told, and for videos. Arguments as above.
    """
    latent = _latent(model, scale, shape)
    if latent is None or not isinstance(model.config.get("patch_size") or 1, int):
        return None
    text, numbers = shape.get("text", TEXT_TOKENS), 0
    for site in sites:
        tokens = text if site.kind in ("cross", "joint") else 0
        if site.kind != "cross" and family.chain:
            tokens += _image_tokens(model, family, latent)
        elif site.kind != "cross":
            tokens += _area(latent, site.level or 0)
        numbers += 2 * tokens * site.kv_heads * site.head_dim
    return 2 * shape.get("batch", 1) * numbers * next(model.parameters()).element_size()


def _latent(model: Any, scale: int | None, shape: Mapping[str, int]) -> tuple[int, int] | None:
    """Height and width of the latent, where they can be told."""
    size = model.config.get("sample_size")
    default = (size, size) if isinstance(size, int) else size
    if scale and {"height", "width"} <= set(shape):
        return shape["height"] // scale, shape["width"] // scale
    return (default[0], default[1]) if default else None


def _image_tokens(model: Any, family: Family, latent: tuple[int, int]) -> int:
    patch = PACKED.get(family.name) or model.config.get("patch_size") or 1
    patch = patch if isinstance(patch, int) else patch[-1]
    return (latent[0] // patch) * (latent[1] // patch)


def _area(latent: tuple[int, int], level: int) -> int:
    """Tokens of a UNet after so many halvings."""
    return -(-latent[0] // 2**level) * -(-latent[1] // 2**level)


def _unet_stage(model: Any, name: str, latent: tuple[int, int]) -> int:
    """Numbers per row that a UNet stage hands on, its skip connections included."""
    level, last = unet_level(model, name), len(model.down_blocks) - 1
    channels, layers = model.config.block_out_channels[level], model.config.layers_per_block
    if name.startswith("down_blocks"):  # every layer, and the next level's input where there is one
        count = layers if isinstance(layers, int) else layers[level]
        return channels * (count * _area(latent, level) + (_area(latent, level + 1) if level < last else 0))
    return channels * _area(latent, max(level - 1, 0) if name.startswith("up_blocks") else level)
