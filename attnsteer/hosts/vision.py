"""Pictures that stand in a batch several times, seen by the vision tower once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..binding import ATTRIBUTE
from .base import intercept

BLOCKS: ContextVar[int] = ContextVar("blocks", default=1)
"""How many equal blocks of the batch the pictures that the tower sees now stand for."""


@contextmanager
def seen_once(model: Any, blocks: int) -> Iterator[None]:
    """Inside, the vision tower sees the pictures of a batch once, also where they stand in it several times.

    All families put the pictures of a batch behind each other along the first axis (pictures, tiles or patches), in
    inputs and outputs, so that outputs are repeated as whole blocks. What the first call showed is kept, and later
    calls with the same pictures, in one block or in several, get it again, unless somebody reads the tower's attention
    in them. Other inputs (noisy pictures beside clean ones) pass as they are.

    Args:
        model: a vision-language model.
        blocks: how often a batch repeats its pictures, at most.
    """
    tower = model.get_encoder(modality="image")
    if tower is model or not isinstance(tower, torch.nn.Module):
        yield
        return
    seen: list[tuple[list[Tensor], Any]] = []  # the pictures of the first call, and what the tower made of them

    def around(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if torch.compiler.is_compiling() or not given or not all(value.dim() for value in given):
            return call(*args, **kwargs)
        read = any(ATTRIBUTE in module.__dict__ for module in tower.modules())
        if seen and not read and (times := _times(given, seen[0][0])):
            return _again(seen[0][1], times)
        count = blocks if all(_repeats(value, blocks) for value in given) else 1

        def first(value: Any) -> Any:
            return value[: value.shape[0] // count] if isinstance(value, Tensor) else value

        token = BLOCKS.set(count)
        try:
            out = call(*map(first, args), **{name: first(value) for name, value in kwargs.items()})
        finally:
            BLOCKS.reset(token)
        if not seen:
            seen.append(([first(value) for value in given], out))
        return _again(out, count)

    restore = intercept(tower, around)
    try:
        yield
    finally:
        restore()


def _repeats(value: Tensor, blocks: int) -> bool:
    """Whether a tensor is equal blocks behind each other."""
    return value.shape[0] % blocks == 0 and _times([value], [value[: value.shape[0] // blocks]]) == blocks


def _times(given: Sequence[Tensor], known: Sequence[Tensor]) -> int:
    """How often tensors are the known ones behind each other; 0 where they are others."""
    times = given[0].shape[0] // max(1, known[0].shape[0])
    if len(given) != len(known) or times == 0:
        return 0
    same = all(torch.equal(value, torch.cat([block] * times)) for value, block in zip(given, known, strict=True))
    return times if same else 0


def _again(out: Any, blocks: int) -> Any:
    """Every tensor of an output, repeated along its first axis."""
    if isinstance(out, Tensor):
        return torch.cat([out] * blocks) if blocks > 1 else out
    if isinstance(out, Mapping):
        return type(out)(**{name: _again(value, blocks) for name, value in out.items()})
    if isinstance(out, (list, tuple)):
        return type(out)(_again(value, blocks) for value in out)
    return out
