"""Variants: many configurations of processors as rows of one batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .attach import _processors_of, attach, attached_to
from .errors import SteeringError
from .hosts.worlds import is_pipeline
from .processor import Processor


@dataclass(frozen=True)
class Variant:
    """One configuration: the processors of a row and a name for it. Without processors it is the plain model."""

    processors: tuple[Processor, ...] = ()
    name: str = ""


class Result(NamedTuple):
    """One picture of ``run_variants``."""

    variant: Variant
    seed: int
    image: Any


def run_variants(
    pipe: Any,
    prompt: str,
    *,
    variants: Sequence[Variant | Processor | Sequence[Processor] | None],
    seeds: Sequence[int] = (0,),
    batch_size: int | None = None,
    progress: bool = False,
    **call: Any,
) -> Iterator[Result]:
    """Generate one prompt with every variant and every seed, many rows at a time.

    All variants of a seed start from the same noise. A batch mixes strengths, heads, layers, methods and plain rows;
    the rows do not influence each other (up to what another batch size changes in the plain model, about 1e-6 in
    float32).

    Args:
        pipe: a Diffusers pipeline to which nothing is attached.
        prompt: what to show.
        variants: processors, lists of processors, ``Variant`` objects, or None for the plain model.
        seeds: seeds of the initial noise (one CPU generator per row).
        batch_size: rows per call of the pipeline; None takes all variants of one seed at once.
        progress: show a progress bar over the pictures.
        **call: further arguments of the pipeline call; ``negative_prompt`` may be one string.

    Yields:
        ``(variant, seed, image)``, seed by seed in the order of ``variants``, as soon as their batch is done.

    Raises:
        SteeringError: nothing to run, or a variant that cannot be attached (before anything is generated).
    """
    chosen = [_as_variant(v) for v in variants]
    jobs = [(variant, seed) for seed in seeds for variant in chosen]
    size = len(chosen) if batch_size is None else batch_size
    _check(pipe, jobs, size, call)
    attach(pipe, variants=chosen).detach()  # refuse now rather than in the middle
    return _generate(pipe, prompt, jobs, size, progress, call)


def _check(pipe: Any, jobs: Sequence[tuple[Variant, int]], size: int, call: Mapping[str, Any]) -> None:
    """Refuse what cannot be run before anything is attached."""
    if not is_pipeline(pipe):
        raise SteeringError(f"run_variants needs a Diffusers pipeline, not {type(pipe).__name__}.")
    if not jobs:
        raise SteeringError("Nothing to run: give at least one variant and one seed.")
    if size < 1:
        raise SteeringError(f"batch_size={size!r} is out of range: allowed are ints from 1.")
    if attached_to(pipe) is not None:
        raise SteeringError(
            "Something is attached to this pipeline: detach it first; variants bring their own processors."
        )
    accepted = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted(set(call) - set(accepted)) + [n for n in ("num_images_per_prompt", "generator") if n in call]
    if unknown:
        raise SteeringError(f"{unknown[0]!r} is not for run_variants: each row is one picture with its own seed.")


def _generate(
    pipe: Any, prompt: str, jobs: Sequence[tuple[Variant, int]], size: int, progress: bool, call: Mapping[str, Any]
) -> Iterator[Result]:
    from tqdm.auto import tqdm

    with tqdm(total=len(jobs), unit="picture", disable=not progress) as bar:
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            arguments = dict(call)
            if isinstance(arguments.get("negative_prompt"), str):
                arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(batch)
            generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
            with attach(pipe, variants=[variant for variant, _ in batch]):
                output = pipe(prompt=[prompt] * len(batch), generator=generators, **arguments)
            images = output.images if hasattr(output, "images") else output.frames
            for (variant, seed), image in zip(batch, images, strict=True):
                bar.update()
                yield Result(variant, seed, image)


def _as_variant(given: Variant | Processor | Sequence[Processor] | None) -> Variant:
    if isinstance(given, Variant):
        return given
    processors = tuple(_processors_of(given))
    return Variant(processors, " + ".join(type(p).__name__ for p in processors) or "plain")
