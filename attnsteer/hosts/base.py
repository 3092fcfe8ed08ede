"""What every host needs: the interception of a module's call, and the interface between hosts and ``attach``."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import SteeringError

Call = Callable[..., Any]
Around = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
"""``around(call, args, kwargs)``: does what it likes and returns what the module's caller shall get."""

_SLOT = "_compiled_call_impl"


def intercept(module: torch.nn.Module, around: Around) -> Callable[[], None]:
    """Let ``around`` see every call of a module, until the returned function is called.

    ``torch.nn.Module.__call__`` prefers ``_compiled_call_impl`` (where ``module.compile()`` puts its result) over the
    plain call. Using the same slot puts us outside the compiled region, outside all hooks (offloading, accelerate) and
    works alike for plain modules, modules compiled in place and ``torch.compile(module)`` objects.
    """
    previous = module.__dict__.get(_SLOT)
    inner: Call = previous if previous is not None else module._call_impl

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(inner, args, kwargs)

    module.__dict__[_SLOT] = wrapper

    def restore() -> None:
        if module.__dict__.get(_SLOT) is wrapper:
            if previous is None:
                module.__dict__.pop(_SLOT)
            else:
                module.__dict__[_SLOT] = previous

    restore.wrapper = wrapper  # type: ignore[attr-defined]
    wrapper.inner_compiled = previous is not None  # type: ignore[attr-defined]
    return restore


def intercepted(module: torch.nn.Module, restore: Callable[[], None]) -> bool:
    """Whether an interception still stands (``module.compile()`` after attaching replaces it)."""
    return module.__dict__.get(_SLOT) is restore.wrapper  # type: ignore[attr-defined]


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether the module as a whole runs compiled, so that its submodules are not called one by one."""
    slot = module.__dict__.get(_SLOT)
    return hasattr(module, "_orig_mod") or (slot is not None and getattr(slot, "inner_compiled", True))


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module behind ``torch.compile(module)``."""
    return getattr(module, "_orig_mod", module)


@contextmanager
def room_for_graphs() -> Iterator[None]:
    """Inside, torch.compile may make four times as many graphs of one function before it gives up (by default 8).

    Each graph of the plain model gets up to three companions: blocks that are steered, blocks that are not while others
    are, and both for a single row where the perturbed lane has one. That number is bounded, so nothing runs away.
    """
    config = sys.modules.get("torch._dynamo.config")
    if config is None:  # nothing was ever compiled
        yield
        return
    with config.patch(recompile_limit=4 * config.recompile_limit):
        yield


@contextmanager
def checkpoints(model: torch.nn.Module, carry: Callable[[Call], Call]) -> Iterator[None]:
    """Inside, whatever diffusers recomputes in the backward pass (gradient checkpointing) is ``carry(block)``.

    The recomputation happens long after the forward pass, so what steers it has to travel with the block.
    """
    attribute = "_gradient_checkpointing_func"
    found = []
    if torch.is_grad_enabled():
        found = [m for m in unwrap(model).modules() if getattr(m, "gradient_checkpointing", False)]
    originals = [vars(module)[attribute] for module in found]
    for module, original in zip(found, originals, strict=True):
        vars(module)[attribute] = lambda block, *args, original=original: original(carry(block), *args)
    try:
        yield
    finally:
        for module, original in zip(found, originals, strict=True):
            vars(module)[attribute] = original


class Method:
    """A method of one model, replaced. A deep copy of the model gets the plain method, bound to the copy."""

    def __init__(self, model: Any, name: str, handler: Callable[..., Any]):
        self._model, self._name, self._handler = model, name, handler
        self._previous, self.plain = model.__dict__.get(name), getattr(model, name)
        functools.update_wrapper(self, self.plain)
        model.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handler(self.plain, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(id(self._model))
        return self.plain if copy is None else types.MethodType(getattr(type(copy), self._name), copy)

    def restore(self) -> None:
        """Put back what was there, unless somebody has replaced it since."""
        if self._model.__dict__.get(self._name) is self:
            del self._model.__dict__[self._name]
            if self._previous is not None:
                self._model.__dict__[self._name] = self._previous


def take_rows(value: Any, rows: torch.Tensor, batch: int) -> Any:
    """Choose rows of everything in a nest of tuples, lists and dicts whose first axis is the batch."""
    if isinstance(value, torch.Tensor):
        return value.index_select(0, rows.to(value.device)) if value.dim() and value.shape[0] == batch else value
    if isinstance(value, (tuple, list)):
        return type(value)(take_rows(v, rows, batch) for v in value)
    if isinstance(value, Mapping):
        return {k: take_rows(v, rows, batch) for k, v in value.items()}
    return value


def copy_nest(value: Any) -> Any:
    """The same tensors in new lists and dicts: models pop from the lists that they are given."""
    if isinstance(value, (tuple, list)):
        return type(value)(copy_nest(v) for v in value)
    if isinstance(value, dict):
        return {k: copy_nest(v) for k, v in value.items()}
    return value


def named_inputs(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All inputs of a denoiser call by name."""
    return {**dict(zip(_names(type(unwrap(model)).forward), args, strict=False)), **kwargs}


@functools.lru_cache(maxsize=64)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters of a forward behind ``self``; read once, since it happens in every step."""
    return tuple(inspect.signature(forward).parameters)[1:]


_held: list[tuple[int, ...]] = []
"""Of the process, like the frame of the kernel seam: hooks that stand on a denoiser (``attnsteer.references``) see its
inputs alone, and which rows of the pipeline's batch these are cannot travel with them."""


@contextmanager
def holding(rows: tuple[int, ...]) -> Iterator[None]:
    """Inside, a denoiser runs on these rows of the pipeline's batch alone."""
    _held.append(rows)
    try:
        yield
    finally:
        _held.pop()


def rows_held() -> tuple[int, ...] | None:
    """The rows of the pipeline's batch that the forward in progress holds; None for all of them."""
    return _held[-1] if _held else None


def prediction(output: Any) -> torch.Tensor:
    """The prediction in a denoiser's output, whether tuple or output class."""
    found = output[0] if isinstance(output, tuple) else output.sample
    if not isinstance(found, torch.Tensor):
        raise SteeringError("The denoiser returned a list of predictions: guidance is not available for this family.")
    return found
