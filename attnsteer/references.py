"""Pictures as references: rows of a batch that show given pictures instead of being generated.

    with noised_references(pipe, [picture_of_dog, picture_of_cat, None]), attnsteer.steer(pipe, IRDiffusion(...)):
        pipe([dog_prompt, cat_prompt, scene_prompt])

In each call of the denoiser the latents of a reference row are the encoded picture with noise of that step's level:
``sqrt(a_t) x + sqrt(1 - a_t) n``, or whatever the scheduler's own ``add_noise`` (``scale_noise``) says. What the
denoiser predicts for these rows is not used again, and what the pipeline returns for them is not the picture. A picture
that was inverted (``attnsteer.inversion``) stands there with the latents of its own way instead of with noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .errors import SteeringError
from .hosts.worlds import is_pipeline, models_of
from .inversion import Inverted


@contextmanager
def noised_references(pipe: Any, pictures: Sequence[Any], seed: int = 0) -> Iterator[None]:
    """For the length of a block, given pictures stand in rows of the pipeline's batch.

    Args:
        pipe: a Diffusers pipeline whose denoiser takes latents as pictures (UNets, SD3, PixArt), or FLUX's.
        pictures: one entry for each prompt of the calls to come: a picture (PIL, array), its latents as a tensor
            ``(C, h, w)`` (or packed, for FLUX), what ``invert`` found for it, or None for a row that is generated.
        seed: of the noise; every row has its own.

    Raises:
        SteeringError: a pipeline or pictures that do not fit; says why.
    """
    if not is_pipeline(pipe):
        raise SteeringError(f"noised_references needs a Diffusers pipeline, not {type(pipe).__name__}.")
    if not hasattr(pictures, "__len__"):
        raise SteeringError("Give a list of references: a picture for each prompt, or None for a row to generate.")
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
        from .hosts import denoisers, latents
        from .hosts.base import named_inputs, rows_held

        inputs, rows = named_inputs(model, args, kwargs), len(self.pictures)
        sample = denoisers.sample_of(denoisers.family_of(model), inputs)
        shape = latents.latent_shape(model, inputs)
        held = rows_held()  # a forward of some rows alone: the perturbed ones of guidance
        twice = sample.shape[0] == 2 * rows and torch.equal(sample[:rows], sample[rows:])  # both halves of guidance
        if held is None and sample.shape[0] != rows and not twice:
            raise SteeringError(
                f"The denoiser got latents of shape {tuple(sample.shape)}; with {rows} entries wanted are {rows} rows, "
                "or these twice with guidance, and num_images_per_prompt=1."
            )
        scheduler, noised = self.pipe.scheduler, sample.clone()
        now = latents.position(model, scheduler, inputs["timestep"])
        moment = scheduler.timesteps[now]
        for row, picture in enumerate(self.pictures):
            here = [place for place, each in enumerate(held or range(len(sample))) if each % rows == row]
            if not here:
                continue
            if isinstance(picture, Inverted):
                noised[here] = _on_its_way(picture, scheduler, now, sample)
            elif picture is not None:
                if row not in self.latents:
                    self.latents[row] = self._clean(model, picture, shape, sample)
                clean = self.latents[row]
                generator = torch.Generator().manual_seed(self.seed * rows + row)
                noise = torch.randn(clean.shape, generator=generator).to(clean.device)
                noised[here] = _noised(scheduler, clean, noise, moment).to(sample)
        if args and args[0] is sample:
            return (noised, *args[1:]), kwargs
        return args, {name: noised if value is sample else value for name, value in kwargs.items()}

    def _clean(self, model: torch.nn.Module, picture: Any, shape: tuple[int, int, int], sample: Tensor) -> Tensor:
        """The latents of a picture as the denoiser takes them, ``(1, ...)`` float32."""
        from .hosts import latents

        if not isinstance(picture, Tensor):
            return latents.laid_out(model, latents.encoded(self.pipe, picture, shape, sample.device)).float()
        given = picture.to(sample.device, torch.float32)[None]
        if picture.shape == sample.shape[1:]:
            return given
        if tuple(picture.shape) != shape:
            raise SteeringError(f"Reference latents have shape {tuple(picture.shape)}; this run's have {shape}.")
        return latents.laid_out(model, given)


def _on_its_way(picture: Inverted, scheduler: Any, now: int, sample: Tensor) -> Tensor:
    """The latents of an inverted picture in a step of the schedule that it was inverted for."""
    mine, here = picture.timesteps.cpu(), scheduler.timesteps.cpu()
    if mine.shape != here.shape or not torch.allclose(mine.double(), here.double()):
        raise SteeringError(
            f"A picture was inverted in {len(mine)} steps from {float(mine[0]):g}, this run has {len(here)} from "
            f"{float(here[0]):g}: invert it with the arguments of the run."
        )
    if picture.latents.shape[1:] != sample.shape[1:]:
        wanted, found = tuple(sample.shape[1:]), tuple(picture.latents.shape[1:])
        raise SteeringError(f"An inverted picture has latents of shape {found}; this run's have {wanted}.")
    return picture.latents[now].to(sample)


def _noised(scheduler: Any, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """The latents at the noise level of a step, scaled as the scheduler scales the denoiser's input."""
    moment = timestep.to(clean.device).flatten()[:1]
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, moment, noise)
    return scheduler.scale_model_input(scheduler.add_noise(clean, noise, moment), moment[0])
