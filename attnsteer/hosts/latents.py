"""The latents of pictures: encoded by a pipeline's autoencoder, and laid out as its denoiser takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SteeringError
from . import denoisers
from .base import unwrap
from .denoisers import FLUX

PACKED = {FLUX.name: 2}
"""Sides of the squares of latents that make one token, where the pipeline packs them before the denoiser."""
CLOCKS = {FLUX.name: 1000.0}
"""What the pipeline divides the scheduler's timesteps by before the denoiser gets them."""


def latent_shape(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[int, int, int]:
    """``(C, h, w)`` of a picture's latents in a denoiser call, as the autoencoder makes them.

    Raises:
        SteeringError: where the call's latents are no pictures.
    """
    family = denoisers.family_of(model)
    sample = denoisers.sample_of(family, inputs)
    side = PACKED.get(family.name) if family else None
    if family and side and sample.dim() == 3:
        grid = family.grid(unwrap(model), inputs, denoisers.sites(model)[0])
        if grid is not None:
            return (sample.shape[2] // side**2, grid[1] * side, grid[2] * side)
    elif sample.dim() == 4:
        return (sample.shape[1], sample.shape[2], sample.shape[3])
    raise SteeringError(
        f"The denoiser {type(unwrap(model)).__name__} got latents of shape {tuple(sample.shape)}, which are not one "
        "picture for each row: wanted are (rows, channels, height, width), or FLUX's packed ones."
    )


def laid_out(model: torch.nn.Module, latents: Tensor) -> Tensor:
    """Latents ``(R, C, h, w)`` as the denoiser takes them: packed ``(R, h w / 4, 4 C)`` for FLUX."""
    family = denoisers.family_of(model)
    side = PACKED.get(family.name) if family else None
    return latents if not side else F.pixel_unshuffle(latents, side).flatten(2).mT


def encoded(pipe: Any, picture: Any, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """The latents of a picture, ``(1, C, h, w)`` float32 (float64 for autoencoders in it), scaled as the pipeline does.

    Raises:
        SteeringError: an autoencoder that would overflow, or latents of another shape.
    """
    vae, scale = pipe.vae, pipe.vae_scale_factor
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        raise SteeringError("This autoencoder overflows in float16: load it in float32, or give latents as tensors.")
    pixels = pipe.image_processor.preprocess(picture, height=shape[1] * scale, width=shape[2] * scale)
    with torch.no_grad():
        code = vae.encode(pixels.to(device, vae.dtype))
    found = code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latents
    found = found if found.dtype == torch.float64 else found.float()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    found = (found - shift) * vae.config.scaling_factor
    if tuple(found.shape[1:]) != shape:
        raise SteeringError(
            f"The autoencoder makes latents of shape {tuple(found.shape[1:])}; this run's have {shape}."
        )
    return found


def position(model: torch.nn.Module, scheduler: Any, timestep: Any) -> int:
    """The position in the scheduler's timesteps that a denoiser's ``timestep`` stands for.

    The schedule goes the way of the timestep (rounded to the denoiser's precision, then divided), so that the right one
    is met exactly. Half precision rounds neighbours of a long schedule to one number: of those the scheduler's own
    index says which, where it keeps one.
    """
    family = denoisers.family_of(model)
    given = torch.as_tensor(timestep).flatten()[:1].to(scheduler.timesteps.device)
    known = scheduler.timesteps
    known = known.to(given.dtype) if given.is_floating_point() else known
    clock = CLOCKS.get(family.name) if family else None
    off = ((known / clock if clock else known).double() - given.double()).abs()
    nearest: list[int] = (off == off.min()).nonzero().flatten().tolist()
    indices = [getattr(scheduler, name, None) for name in ("step_index", "begin_index")]
    now = [index for index in indices if index in nearest]  # the first is None before the first step
    return int(now[0]) if now else nearest[0]
