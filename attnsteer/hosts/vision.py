"""Pictures that stand in a batch several times, seen by the vision tower once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .base import intercept


@contextmanager
def seen_once(model: Any, blocks: int) -> Iterator[None]:
    """Inside, where the inputs of the vision tower are ``blocks`` equal blocks, it sees the first alone.

    All families put the pictures of a batch behind each other along the first axis (pictures, tiles or patches), in
    inputs and outputs, so that outputs are repeated as whole blocks. Other inputs (noisy pictures beside clean ones)
    pass as they are.

    Args:
        model: a vision-language model.
        blocks: how often the batch repeats its pictures.
    """
    tower = model.get_encoder(modality="image")
    if blocks == 1 or tower is model or not isinstance(tower, torch.nn.Module):
        yield
        return

    def around(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if torch.compiler.is_compiling() or not given or not all(_repeats(value, blocks) for value in given):
            return call(*args, **kwargs)

        def first(value: Any) -> Any:
            return value[: value.shape[0] // blocks] if isinstance(value, Tensor) else value

        out = call(*map(first, args), **{name: first(value) for name, value in kwargs.items()})
        return _again(out, blocks)

    restore = intercept(tower, around)
    try:
        yield
    finally:
        restore()


def _repeats(value: Tensor, blocks: int) -> bool:
    """Whether a tensor is equal blocks behind each other."""
    if value.dim() == 0 or value.shape[0] % blocks:
        return False
    parts = value.unflatten(0, (blocks, -1))
    return bool((parts == parts[:1]).all())


def _again(out: Any, blocks: int) -> Any:
    """Every tensor of an output, repeated along its first axis."""
    if isinstance(out, Tensor):
        return torch.cat([out] * blocks)
    if isinstance(out, Mapping):
        return type(out)(**{name: _again(value, blocks) for name, value in out.items()})
    if isinstance(out, (list, tuple)):
        return type(out)(_again(value, blocks) for value in out)
    return out
