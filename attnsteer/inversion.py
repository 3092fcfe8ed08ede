"""Inversion: the noise from which a pipeline makes a given picture, and the latents of every step on the way.

    found, = invert(pipe, [picture], ["a dog"], num_inference_steps=50)
    pipe("a dog", latents=found.noise, num_inference_steps=50, guidance_scale=1.0)     # the picture again
    with noised_references(pipe, [found, None]), attnsteer.steer(pipe, IRDiffusion(...)):
        pipe(["a dog", "a dog and a cat"], num_inference_steps=50)                     # ... as a reference

A step of a deterministic first-order sampler is linear in the latent and in the prediction made from it,
``x_next = A x + B m(x, t)``. With ``x = a x0 + s noise`` before and ``a' x0 + s' noise`` after the step:

    noise predicted (DDIM)                        A = a' / a         B = s' - a' s / a
    v = a noise - s x0 predicted (DDIM)           A = a a' + s s'    B = a s' - a' s
    flow, v = noise - x0, a = 1 - s (Euler)       A = 1              B = s' - s

Inversion goes through the steps from the last to the first: ``x = (x_next - B m) / A``, with the prediction of
``x_next`` at t in the place of the unknown one of x: DDIM inversion, and the Euler step of the flow's differential
equation. The error is of first order in the step. ``corrections`` predict again from the x just found, a fixed-point
iteration that converges to the exact inverse of the sampler where steps are small.

Sources: Song et al., "Denoising Diffusion Implicit Models", 2020, arXiv 2010.02502, section 4.3; Mokady et al.,
"Null-text Inversion", 2022, arXiv 2211.09794 (the timestep that the prediction takes); Pan et al., "AIDI", 2023, arXiv
2309.04907 (fixed points). Cost: one plain run, ``1 + corrections`` times. On world-sd in 20 steps two pictures come
back hardly nearer than pictures made from other noise, with 4 corrections clearly nearer (`pytest
tests/test_inversion.py -k small_world`): correct, or take more steps. Limits: guidance other than 1 makes inversion
poor; where predictions change fast or steps are large (noise prediction in few steps), corrections diverge; samplers of
higher order (DPM-Solver++ 2M) take other steps than those inverted here and give the picture back roughly; samplers
whose first step already is another one (stochastic, EDM, LCM) are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .attach import attached_to
from .clock import Method
from .errors import SteeringError
from .hosts.worlds import is_pipeline, models_of
from .logits import compute_dtype


@dataclass(frozen=True, eq=False)
class Inverted:
    """The way of one picture to its noise.

    Attributes:
        latents: ``(steps, ...)`` float32 (float64 for models in it): what the denoiser gets in each step of a run that
            makes the picture, ``(C, h, w)`` each, or packed as FLUX has it. The first is the noisiest.
        timesteps: ``(steps,)``, those of the scheduler.
        noise: ``(1, ...)``: the pipeline's argument ``latents``.
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor


@torch.no_grad()
def invert(
    pipe: Any, pictures: Sequence[Any], prompts: Sequence[str], *, corrections: int = 0, **call: Any
) -> list[Inverted]:
    """Run a pipeline backward, from pictures to their noise.

    Args:
        pipe: a Diffusers pipeline with a first-order scheduler that predicts noise, v or a flow.
        pictures: PIL pictures, arrays ``(height, width, 3)`` in [0, 1], or latents ``(C, h, w)``; all of one size.
        prompts: what each picture shows.
        corrections: further predictions in each step.
        **call: further arguments of the pipeline call, as in the run to come; ``guidance_scale`` is 1 if not given.

    Returns:
        One entry for each picture.

    Raises:
        SteeringError: a pipeline, scheduler or pictures that do not fit; says why.
    """
    reasons = _refusals(pipe, pictures, prompts, corrections)
    if reasons:
        raise SteeringError(reasons)
    clean, size = _encoded(pipe, pictures, call)
    forward = pipe.scheduler
    backward = _Backward(type(forward).from_config(forward.config), corrections)
    vars(pipe)["scheduler"] = backward
    try:
        pipe(prompt=list(prompts), **{"guidance_scale": 1.0, **call, **size, "latents": clean, "output_type": "latent"})
    finally:
        vars(pipe)["scheduler"] = forward
    path = torch.stack(backward.path[::-1])  # (steps, R, ...)
    noise = path[0] * backward.unscaled
    timesteps = backward.inner.timesteps
    return [Inverted(path[:, row], timesteps, noise[row : row + 1].to(clean)) for row in range(len(clean))]


class _Backward:
    """A scheduler that leads a pipeline's loop from the picture to its noise, in the scale that the denoiser sees.

    ``path``: the latents of every step, the last step first. ``unscaled``: the factor from the denoiser's scale to that
    of the pipeline's argument ``latents``.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, inner: Any, corrections: int):
        self.inner, self.tries = inner, 1 + corrections
        self.path: list[Tensor] = []
        self.unscaled = 1.0
        # pipelines ask the signature which arguments it takes
        self.set_timesteps = Method(inner, inner.set_timesteps, self._start)
        self._base: Tensor | None = None
        self._done = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _start(self, *args: Any, **kwargs: Any) -> None:
        self.inner.set_timesteps(*args, **kwargs)
        self._factors, self.unscaled = sampler_steps(self.inner)
        self._check(*args, **kwargs)
        self.timesteps = self.inner.timesteps.flip(0).repeat_interleave(self.tries)

    def _check(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a sampler whose own first step is not ``A x + B m``: only it knows what it does."""
        trial = type(self.inner).from_config(self.inner.config)
        trial.set_timesteps(*args, **kwargs)
        scale = getattr(trial, "scale_model_input", lambda sample, timestep: sample)
        x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
        m = x.square() - 0.5
        first, then = trial.timesteps[0], trial.timesteps[min(1, len(trial.timesteps) - 1)]
        sample = x * self.unscaled * float(getattr(trial, "init_noise_sigma", 1.0))
        with torch.random.fork_rng(devices=[]):  # stochastic ones draw
            x = scale(sample, first)
            taken = scale(trial.step(m, first, sample, return_dict=False)[0], then)
        factor, push = self._factors[0].tolist()
        if not torch.allclose(taken, factor * x + push * m, rtol=0, atol=1e-3):
            raise SteeringError(
                f"{type(trial).__name__} adds noise or takes other steps than those that can be inverted: "
                "choose DDIM or Euler."
            )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any) -> Any:
        wide = compute_dtype(sample)
        if self._base is None:
            self._base = sample.to(wide)
        factor, push = self._factors[len(self._factors) - 1 - self._done // self.tries].tolist()
        found = (self._base - push * model_output.to(wide)) / factor
        self._done += 1
        if self._done % self.tries == 0:
            self._base = found
            self.path.append(found)
        found = found.to(sample.dtype)
        return SimpleNamespace(prev_sample=found) if return_dict else (found,)


def sampler_steps(scheduler: Any) -> tuple[Tensor, float]:
    """The steps of a sampler whose timesteps are set.

    Returns:
        A and B of every step, ``(steps, 2)`` float64, in the scale of the denoiser's input; and the factor from there
        to the latents that a pipeline is given for the first step.
    """
    noise: Tensor | None = getattr(scheduler, "sigmas", None)
    unscaled = 1.0
    if hasattr(scheduler, "scale_noise"):
        s = scheduler.sigmas.double().cpu()
        return torch.stack([torch.ones(len(s) - 1).double(), s[1:] - s[:-1]], dim=1), unscaled
    if noise is not None:  # noise per signal
        ratio = noise.double().cpu()
        a, s = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
        a, s, a_next, s_next = a[:-1], s[:-1], a[1:], s[1:]
        start = float(scheduler.init_noise_sigma)
        unscaled = 1.0 if start == 1 else float((1 + ratio[0] ** 2).sqrt()) / start
    else:
        levels, times = scheduler.alphas_cumprod.double().cpu(), scheduler.timesteps.cpu().long()
        before = times - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        last = torch.as_tensor(scheduler.final_alpha_cumprod).double().cpu()
        after = torch.where(before >= 0, levels[before.clamp(min=0)], last)
        a, s, a_next, s_next = levels[times].sqrt(), (1 - levels[times]).sqrt(), after.sqrt(), (1 - after).sqrt()
    if scheduler.config.prediction_type == "epsilon":
        return torch.stack([a_next / a, s_next - a_next * s / a], dim=1), unscaled
    return torch.stack([a * a_next + s * s_next, a * s_next - a_next * s], dim=1), unscaled


def _encoded(pipe: Any, pictures: Sequence[Any], call: dict[str, Any]) -> tuple[Tensor, dict[str, int]]:
    """The pictures' latents as the pipeline takes them, and the size that it has to make."""
    from .hosts import latents

    model: Any = models_of(pipe)[0]
    scale, first = pipe.vae_scale_factor, pictures[0]
    size = first.shape if not hasattr(first, "height") else (first.height, first.width)
    if isinstance(first, Tensor):
        size = (scale * first.shape[-2], scale * first.shape[-1])
    height, width = call.get("height") or int(size[0]), call.get("width") or int(size[1])
    shape = (pipe.vae.config.latent_channels, height // scale, width // scale)
    device, found = pipe._execution_device, []
    for picture in pictures:
        if isinstance(picture, Tensor):
            if tuple(picture.shape) != shape:
                raise SteeringError(f"Latents of shape {tuple(picture.shape)} do not fit: wanted are {shape}.")
            found.append(picture[None].to(device))
        else:
            found.append(latents.encoded(pipe, picture, shape, device))
    clean = torch.cat(found).to(model.dtype)
    return latents.laid_out(model, clean), {"height": height, "width": width}


def _refusals(pipe: Any, pictures: Sequence[Any], prompts: Sequence[str], corrections: int) -> list[str]:
    """Why these pictures cannot be inverted; empty where they can."""
    if not is_pipeline(pipe) or getattr(pipe, "scheduler", None) is None:
        return [f"invert needs a Diffusers pipeline with a scheduler, not {type(pipe).__name__}."]
    scheduler, reasons = pipe.scheduler, []
    config, name = scheduler.config, type(scheduler).__name__
    if isinstance(prompts, str) or not hasattr(pictures, "__len__"):
        reasons.append("Give lists: of pictures, and of a prompt for each.")
    elif len(pictures) != len(prompts) or not len(pictures):
        reasons.append(f"Give a list of pictures and a prompt for each; got {len(pictures)} and {len(prompts)}.")
    if not isinstance(corrections, int) or isinstance(corrections, bool) or corrections < 0:
        reasons.append(f"corrections={corrections!r} is out of range: allowed is an int from 0 up.")
    if attached_to(pipe) is not None:
        reasons.append("Something is attached to this pipeline: detach it first, inversion runs the plain model.")
    if not hasattr(scheduler, "scale_noise"):
        kind = config.get("prediction_type")
        if kind not in ("epsilon", "v_prediction"):
            reasons.append(f"{name} predicts {kind!r}: choose one for 'epsilon' or 'v_prediction', or flow matching.")
        if getattr(scheduler, "sigmas", None) is None and not hasattr(scheduler, "final_alpha_cumprod"):
            reasons.append(f"The steps of {name} are not known: choose DDIM or Euler.")
        if config.get("clip_sample") or config.get("thresholding"):
            reasons.append(f"{name} clips its samples, which has no inverse: turn off clip_sample and thresholding.")
    if getattr(scheduler, "order", 1) != 1 or name == "PNDMScheduler":
        reasons.append(f"{name} predicts several times in a step: choose DDIM or Euler.")
    return reasons
