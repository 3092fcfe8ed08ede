"""Pictures of candidate sets: many sets as rows of one batch, each prompt encoded once, no classifier-free guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..attach import attach, attached_to
from ..digests import plain_config, tensor_digest, weights_of
from ..errors import SteeringError
from ..hosts.base import Call, intercept
from ..hosts.twins import first_forward_once
from ..hosts.worlds import is_pipeline
from ..plain import encode
from ..processor import Processor
from .hunter import Heads
from .selection import where_of

OWNED = ("prompt", "generator", "num_images_per_prompt", "num_inference_steps", "latents", "output_type", "return_dict")
"""Arguments of the pipeline that a search sets itself."""


class Job(NamedTuple):
    """One picture: the heads to perturb, the prompt, and the seed of the initial noise."""

    heads: Heads
    prompt: str
    seed: int


class Painter:
    """Calls a pipeline with another candidate set in each row.

    Args:
        pipe: a Diffusers pipeline to which nothing is attached.
        processor: perturbs the candidates; its selection gives the steps only.
        steps: denoising steps.
        call: further arguments of the pipeline; over what turns classifier-free guidance off.
    """

    def __init__(self, pipe: Any, processor: Processor, steps: int, call: Mapping[str, Any] | None = None):
        _check(pipe, steps, call or {})
        self.pipe, self.processor, self.steps = pipe, processor, steps
        self.call = {**_unguided(pipe), **(call or {})}

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a picture depends on besides its job, as plain values."""
        parameters = self.processor.to_dict()
        where = encode(replace(self.processor.where, layers="all", heads="all"), "where")
        scheduler = getattr(self.pipe, "scheduler", None)
        parts = {n: m for n, m in sorted(self.pipe.components.items()) if isinstance(m, torch.nn.Module)}
        return {
            "pipeline": type(self.pipe).__name__,
            "weights": {n: weights_of(m) for n, m in parts.items()},
            "scheduler": [type(scheduler).__name__, plain_config(getattr(scheduler, "config", {}))],
            "processor": {**parameters, "parameters": {**parameters["parameters"], "where": where}},
            "steps": self.steps,
            "call": {name: encode(value, f"call[{name!r}]") for name, value in sorted(self.call.items())},
        }

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Around many calls: texts are encoded once, and the pipeline shows no progress of its own."""
        encoders = [m for n, m in self.pipe.components.items() if n.startswith("text_encoder") and m is not None]
        shown = getattr(self.pipe, "_progress_bar_config", None)
        with ExitStack() as undo:
            undo.callback(setattr, self.pipe, "_progress_bar_config", shown or {})
            self.pipe.set_progress_bar_config(**{**(shown or {}), "disable": True})
            for encoder in encoders:
                undo.callback(intercept(encoder, once_per_row()))
            yield

    def __call__(self, jobs: Sequence[Job]) -> list[Any]:
        """8-bit PIL pictures of the jobs, made in one batch."""
        perturbing = {job.heads: self._variant(job.heads) for job in jobs}
        kinds = [(job.prompt, job.seed) if "perturbed" in self.processor.lanes else n for n, job in enumerate(jobs)]
        with first_forward_once(self.pipe, kinds), attach(self.pipe, variants=[perturbing[job.heads] for job in jobs]):
            output = self.pipe(
                prompt=[job.prompt for job in jobs],
                generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
                num_inference_steps=self.steps,
                **self.call,
            )
        if not hasattr(output, "images"):
            raise SteeringError(f"{type(self.pipe).__name__} makes no pictures: objectives need pictures.")
        return list(output.images)

    def _variant(self, heads: Heads) -> list[Processor]:
        return [replace(self.processor, where=where_of(heads, self.processor.where.steps))] if heads else []


def _check(pipe: Any, steps: int, call: Mapping[str, Any]) -> None:
    if not is_pipeline(pipe):
        raise SteeringError(f"A search needs a Diffusers pipeline, not {type(pipe).__name__}.")
    if attached_to(pipe) is not None:
        raise SteeringError("Something is attached to this pipeline: detach it first; a search attaches candidates.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise SteeringError(f"steps={steps!r} is out of range: allowed are ints from 1.")
    accepted = inspect.signature(type(pipe).__call__).parameters
    missing = [name for name in ("prompt", "generator", "num_inference_steps") if name not in accepted]
    if missing:
        raise SteeringError(f"{type(pipe).__name__} takes no {missing[0]}: a search needs a pipeline that does.")
    for name in call:
        if name in OWNED or name not in accepted:
            why = "is set by the search" if name in OWNED else f"is no argument of {type(pipe).__name__}"
            raise SteeringError(f"call={{{name!r}: ...}} {why}.")


def _unguided(pipe: Any) -> dict[str, float]:
    """What turns classifier-free guidance off; a distilled guidance scale beside it stays the pipeline's own."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    return next(({name: 1.0} for name in ("true_cfg_scale", "guidance_scale") if name in accepted), {})


# ---- texts -----------------------------------------------------------------------------------------------------------
def once_per_row() -> Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]:
    """For ``intercept``: a text encoder runs once for each different row of its inputs, alone."""
    known: dict[Any, Any] = {}

    def around(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        rows = given[0].shape[0] if given and given[0].dim() else 0
        if not rows or any(v.dim() < 1 or v.shape[0] != rows for v in given):
            return call(*args, **kwargs)

        def row(value: Any, index: int) -> Any:
            return value[index : index + 1] if isinstance(value, torch.Tensor) else value

        outputs = []
        for index in range(rows):
            own_args = tuple(row(v, index) for v in args)
            own_kwargs = {name: row(v, index) for name, v in kwargs.items()}
            key = (tuple(map(_content, own_args)), tuple((n, _content(v)) for n, v in sorted(own_kwargs.items())))
            if key not in known:
                known[key] = call(*own_args, **own_kwargs)
            outputs.append(known[key])
        return _joined(outputs)

    return around


def _content(value: Any) -> Any:
    return (str(value.device), tensor_digest(value)) if isinstance(value, torch.Tensor) else repr(value)


def _joined(rows: Sequence[Any]) -> Any:
    """Outputs of single rows as the output of a batch."""
    first = rows[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(rows))
    if isinstance(first, Mapping):
        return type(first)(**{name: _joined([row[name] for row in rows]) for name in first})
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(part) for part in zip(*rows, strict=True))
    return first
