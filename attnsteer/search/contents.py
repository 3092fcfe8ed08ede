"""What somebody's function depends on: a hash of its code and of everything that is bound to it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, EllipsisType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from ..metrics.pictures.weights import weights_of

PLAIN = (type(None), EllipsisType, bool, int, float, complex, str, bytes, range, PurePath)
NAMED = (type, ModuleType, BuiltinFunctionType)
BOUND = (CodeType, FunctionType, MethodType, functools.partial)


class Unknown(Exception):  # noqa: N818 - no error: what is to be done about it is another's business
    """Something whose content cannot be told."""


def code_of(function: Any) -> str:
    """A hash of the code of a callable alone, the same in every process.

    Raises:
        Unknown: there is none in Python.
    """
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return _hash(_described(code, ())) if code else _unknown(function)


def content_of(function: Any) -> str:
    """A hash of code, default values, closure, bound arguments and (of a callable object) attributes, the same in every
    process. Of global names only the name counts.

    Raises:
        Unknown: one of these cannot be hashed, e.g. an open file.
    """
    if isinstance(function, (*NAMED, *BOUND)):
        return _hash(_described(function, ()))
    return _hash(f"{_described(type(function).__call__, ())} {_held(function, ())}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _described(value: Any, inside: tuple[int, ...]) -> str:
    """A value as text; ``inside``: the ids of what holds it."""
    if isinstance(value, PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, NAMED):
        return f"{getattr(value, '__module__', '')} {getattr(value, '__qualname__', value.__name__)}"
    if id(value) in inside:
        return f"the same {inside.index(id(value))}"
    inside = (*inside, id(value))
    if isinstance(value, (tuple, list)):
        return _listed(value, (_described(v, inside) for v in value))
    if isinstance(value, (set, frozenset)):  # their order depends on the process
        return _listed(value, sorted(_described(v, inside) for v in value))
    if isinstance(value, Mapping):
        pairs = (f"{_described(k, inside)}: {_described(v, inside)}" for k, v in value.items())
        return _listed(value, sorted(pairs))
    if isinstance(value, BOUND):
        return _listed(value, _parts(value, inside))
    if isinstance(value, torch.nn.Module):
        return weights_of(value)
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _array(value)
    return _held(value, inside) if isinstance(getattr(value, "settings", None), Mapping) else _unknown(value)


def _listed(value: Any, parts: Iterable[str]) -> str:
    return f"{type(value).__name__} [{', '.join(parts)}]"


def _parts(value: Any, inside: tuple[int, ...]) -> list[str]:
    """What a function is made of, besides its name."""
    parts: tuple[Any, ...]
    if isinstance(value, MethodType):
        return [_described(value.__func__, inside), _held(value.__self__, inside)]
    if isinstance(value, CodeType):
        parts = value.co_code, value.co_names, value.co_consts
    elif isinstance(value, FunctionType):
        filled = {}
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # empty yet
                filled[name] = cell.cell_contents
        parts = value.__code__, value.__defaults__, value.__kwdefaults__, filled
    else:
        parts = value.func, value.args, value.keywords
    return [_described(part, inside) for part in parts]


def _held(owner: Any, inside: tuple[int, ...]) -> str:
    """What a method's object brings along: its ``settings``, or else all its attributes."""
    if isinstance(owner, (*NAMED, torch.nn.Module)):
        return _described(owner, inside)
    if id(owner) in inside[:-1]:
        return f"the same {inside.index(id(owner))}"
    held = getattr(owner, "settings", None)
    if held is None:
        held = vars(owner) if hasattr(owner, "__dict__") else _unknown(owner)
    return f"{type(owner).__module__}.{type(owner).__qualname__} {_described(held, (*inside, id(owner)))}"


def _array(value: Any) -> str:
    from ..compare.methods import tensor_digest

    try:
        return tensor_digest(torch.as_tensor(value))
    except (TypeError, RuntimeError):  # no numbers, or none yet
        return _unknown(value)


def _unknown(value: Any) -> Any:
    raise Unknown(f"{type(value).__module__}.{type(value).__qualname__}")
