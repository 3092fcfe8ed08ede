"""Lanes: named groups of batch rows with a role, and how classifier-free guidance lays them out."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import SteeringError


@dataclass(frozen=True)
class Lane:
    """A contiguous group of batch rows with one role: ``cond``, ``uncond``, ``perturbed``, ``main``, ``image_free``."""

    name: str
    rows: slice


def cfg_lanes(batch: int, samples: int, parts: tuple[str, ...]) -> dict[str, Lane]:
    """The lanes of one denoiser call.

    Args:
        batch: rows of the denoiser call.
        samples: rows of the latents that the scheduler steps; with several prompts each part is contiguous.
        parts: order of the parts where both branches share one batch, e.g. ``("uncond", "cond")``.

    Returns:
        ``{"cond": ...}`` where the call holds one branch (no guidance, or sequential passes of which the first is the
        conditional one), else a lane for each part.
    """
    if batch == samples:
        return {"cond": Lane("cond", slice(0, samples))}
    if batch != samples * len(parts):
        raise SteeringError(
            f"The denoiser ran {batch} rows for {samples} latents; this pipeline's layout is known for "
            f"{samples} or {samples * len(parts)} rows ({', '.join(parts)}). Pass cfg=(...) to attach for others."
        )
    return {name: Lane(name, slice(i * samples, (i + 1) * samples)) for i, name in enumerate(parts)}
