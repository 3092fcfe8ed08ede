"""Rows of a batch that are still the same: the first forward of a denoiser computes them once.

Pictures of one prompt and one seed start from the same latents, so that rows that differ in their guidance alone are
equal in the first conditional forward. There every top-level stage runs on one row of each kind, and its output is
repeated for the others; what lies between the stages runs as it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch

from . import denoisers
from .base import Call, intercept, is_compiled, take_rows
from .worlds import models_of


@contextmanager
def first_forward_once(pipe: Any, kinds: Sequence[Hashable]) -> Iterator[None]:
    """Inside, in the first call of a denoiser its stages compute rows of one kind once.

    Exact up to the rounding of another batch size. Nothing is shared where all rows differ, in denoisers without known
    stages or compiled as a whole, and in batches of another size than there are kinds (classifier-free guidance).

    Args:
        pipe: a Diffusers pipeline.
        kinds: of every row; rows of one kind have the same inputs, and nothing that is steered differs between them in
            the first forward.
    """
    places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
    if len(places) == len(kinds):
        yield
        return
    one_each = torch.tensor([list(kinds).index(kind) for kind in places])
    back = torch.tensor([places[kind] for kind in kinds])
    calls = _Calls()
    with ExitStack() as undo:
        for model in models_of(pipe):
            family = denoisers.family_of(model)
            if family is None or is_compiled(model):
                continue
            undo.callback(intercept(model, calls.around))
            for _, stage in denoisers.stages(model, family):
                undo.callback(intercept(stage, _Once(calls, one_each, back)))
        yield


class _Calls:
    """How often the denoisers of a pipeline were called."""

    def __init__(self) -> None:
        self.count = 0

    def around(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.count += 1
        return call(*args, **kwargs)


class _Once:
    """For ``intercept``: a stage that computes one row of each kind in the first call of a denoiser."""

    def __init__(self, calls: _Calls, one_each: torch.Tensor, back: torch.Tensor):
        self._calls, self._one_each, self._back = calls, one_each, back

    def __call__(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = len(self._back)
        if self._calls.count != 1 or not _batched(chain(args, kwargs.values()), batch):
            return call(*args, **kwargs)
        some = call(*take_rows(args, self._one_each, batch), **take_rows(kwargs, self._one_each, batch))
        return take_rows(some, self._back, len(self._one_each))


def _batched(values: Iterator[Any], batch: int) -> bool:
    """Whether the first axis tells rows of the batch from everything else: token tables without rows (rotary
    embeddings) must not have as many tokens as there are rows."""
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.dim() == 3]
    tokens = [value.shape[1] for value in tensors]
    return all(value.shape[0] == batch for value in tensors) and batch not in (*tokens, sum(tokens))
