"""Pictures as references: rows of a batch that show given pictures instead of being generated.

    with noised_references(pipe, [picture_of_dog, picture_of_cat, None]), attnsteer.steer(pipe, IRDiffusion(...)):
        pipe([dog_prompt, cat_prompt, scene_prompt])

In each call of the denoiser the latents of a reference row are the encoded picture with noise of that step's level:
``sqrt(a_t) x + sqrt(1 - a_t) n``, or whatever the scheduler's own ``add_noise`` (``scale_noise``) says. What the
denoiser predicts for these rows is not used again, and what the pipeline returns for them is not the picture. Pictures
are noised, not inverted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .errors import SteeringError
from .hosts.worlds import is_pipeline, models_of


@contextmanager
def noised_references(pipe: Any, pictures: Sequence[Any], seed: int = 0) -> Iterator[None]:
    """For the length of a block, given pictures stand in rows of the pipeline's batch.

    Args:
        pipe: a Diffusers pipeline whose denoiser takes latents as pictures (UNets, SD3, PixArt).
        pictures: one entry for each prompt of the calls to come: a picture (PIL, array), its latents as a tensor
            ``(C, h, w)``, or None for a row that is generated.
        seed: of the noise; every row has its own.

    Raises:
        SteeringError: a pipeline or pictures that do not fit; says why.
    """
    if not is_pipeline(pipe):
        raise SteeringError(f"noised_references needs a Diffusers pipeline, not {type(pipe).__name__}.")
    if all(picture is None for picture in pictures):
        raise SteeringError("No reference is a picture: give one at least, and None for the rows to generate.")
    hook = models_of(pipe)[0].register_forward_pre_hook(_Rows(pipe, pictures, seed), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class _Rows:
    """A hook before the denoiser that puts the pictures into the rows of its sample."""

    def __init__(self, pipe: Any, pictures: Sequence[Any], seed: int):
        self.pipe, self.pictures, self.seed = pipe, pictures, seed
        self.latents: dict[int, Tensor] = {}

    def __call__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        from .hosts import denoisers
        from .hosts.base import named_inputs

        inputs, rows = named_inputs(model, args, kwargs), len(self.pictures)
        sample = denoisers.sample_of(denoisers.family_of(model), inputs)
        if sample.dim() != 4 or sample.shape[0] not in (rows, 2 * rows):
            raise SteeringError(
                f"The denoiser got latents of shape {tuple(sample.shape)}; with {rows} entries wanted are (rows, "
                "channels, height, width), that many rows, or twice as many with guidance."
            )
        noised = sample.clone()
        for row, picture in enumerate(self.pictures):
            if picture is not None:
                if row not in self.latents:
                    self.latents[row] = _latents(self.pipe, picture, sample)
                clean = self.latents[row]
                generator = torch.Generator().manual_seed(self.seed * rows + row)
                noise = torch.randn(clean.shape, generator=generator).to(clean.device)
                noised[row::rows] = _noised(self.pipe.scheduler, clean, noise, inputs["timestep"]).to(sample)
        if args and args[0] is sample:
            return (noised, *args[1:]), kwargs
        return args, {name: noised if value is sample else value for name, value in kwargs.items()}


def _latents(pipe: Any, picture: Any, sample: Tensor) -> Tensor:
    """The latents of a picture, ``(1, C, h, w)`` float32 at the size of the run's own."""
    wanted = tuple(sample.shape[1:])
    if isinstance(picture, Tensor):
        if tuple(picture.shape) != wanted:
            raise SteeringError(f"Reference latents have shape {tuple(picture.shape)}; this run's have {wanted}.")
        return picture[None].to(sample.device, torch.float32)
    vae, scale = pipe.vae, pipe.vae_scale_factor
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        raise SteeringError("This autoencoder overflows in float16: load it in float32, or give latents as tensors.")
    pixels = pipe.image_processor.preprocess(picture, height=wanted[1] * scale, width=wanted[2] * scale)
    with torch.no_grad():
        encoded = vae.encode(pixels.to(sample.device, vae.dtype))
    found = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (found.float() - shift) * vae.config.scaling_factor


def _noised(scheduler: Any, clean: Tensor, noise: Tensor, timestep: Any) -> Tensor:
    """The latents at the noise level of a step, scaled as the scheduler scales the denoiser's input."""
    moment = torch.as_tensor(timestep, device=clean.device).flatten()[:1]
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, moment, noise)
    return scheduler.scale_model_input(scheduler.add_noise(clean, noise, moment), moment[0])
