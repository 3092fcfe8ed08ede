"""What somebody's function depends on: a hash of its code and of everything that is bound to it.

Classes count by the code of all their methods, those of libraries by their names alone: Python's own, installed
packages, torch and this one.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, EllipsisType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from ..digests import plain_config, tensor_digest

PLAIN = (type(None), EllipsisType, bool, int, float, complex, str, bytes, range, PurePath, torch.dtype, torch.device)
NAMED = (type, ModuleType, BuiltinFunctionType)
BOUND = (CodeType, FunctionType, MethodType, functools.partial)
WRAPPERS: dict[type, tuple[str, ...]] = {
    property: ("fget", "fset", "fdel"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    functools.cached_property: ("func",),
    type(functools.cache(len)): ("__wrapped__",),
}
"""What holds functions in a class, and where."""
MADE = ("__init__", "__new__", "__post_init__")
"""What these did to an object is among its attributes."""
LIBRARIES = ("builtins", "torch", __name__.split(".")[0])
"""Packages that are libraries wherever they lie."""
STANDARD = Path(sysconfig.get_path("stdlib"))


class Unknown(Exception):  # noqa: N818 - no error: what is to be done about it is another's business
    """Something whose content cannot be told."""


def code_of(function: Any) -> str:
    """A hash of the code of a callable alone, the same in every process: of a function, or of all methods of an object
    (of a module, and of all modules inside).

    Raises:
        Unknown: there is none in Python.
    """
    while isinstance(function, functools.partial):
        function = function.func
    own = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    codes = [own] if own else _unknown(function)
    return _hash(" ".join(_described(code, ()) for code in [*codes, *_codes(getattr(function, "__self__", function))]))


def content_of(function: Any) -> str:
    """A hash of code, default values, closure, bound arguments and (of a callable object) attributes and all methods,
    the same in every process. Of global names and of classes that are held only the name counts.

    A module counts with all that is inside, every value of its tensors and its hooks.

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
    if type(value) in WRAPPERS:
        return _listed(value, (_described(part, inside) for part in _wrapped(value)))
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _array(value)
    if hasattr(value, "to_dict") and _of_library(type(value)):  # a configuration
        return f"{type(value).__name__} {plain_config(value)}"
    told = isinstance(getattr(value, "settings", None), Mapping)
    return (
        _held(value, inside) if told or isinstance(value, torch.nn.Module) or is_dataclass(value) else _unknown(value)
    )


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
    """What a method's object brings along: its class, and its ``settings`` or else all its attributes."""
    if isinstance(owner, NAMED):
        return _described(owner, inside)
    if id(owner) in inside[:-1]:
        return f"the same {inside.index(id(owner))}"
    inside = (*inside, id(owner))
    held = None if isinstance(owner, torch.nn.Module) else getattr(owner, "settings", None)
    if held is None:
        held, methods = _attributes(owner), list(_members(type(owner)))
    else:
        methods = [("", code) for code in _codes(owner)]  # what else a class holds is for its settings
    name = f"{type(owner).__module__}.{type(owner).__qualname__}"
    return f"{name} {_described(methods, inside)} {_described(held, inside)}"


def _attributes(owner: Any) -> dict[str, Any]:
    """All attributes of an object; of a module those that matter to its forward, hooks without their numbers."""
    held = dict(vars(owner)) if hasattr(owner, "__dict__") else _unknown(owner)
    if isinstance(owner, torch.nn.Module):
        for name in vars(torch.nn.Module()):
            if "state_dict" in name or "backward" in name:
                held.pop(name, None)
            elif name.startswith("_forward_"):
                held[name] = list(held.get(name, {}).values())
    return held


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Methods and other attributes of a class and its bases outside libraries."""
    for each in kind.__mro__:
        for name, member in [] if _of_library(each) else sorted(vars(each).items()):
            function = isinstance(member, (FunctionType, *WRAPPERS))
            left = (*MADE, "__annotate__", "__annotate_func__") if function else ("_abc_impl",)
            if name not in left and (function or not name.startswith("__") or not name.endswith("__")):
                yield name, member


def _codes(owner: Any) -> list[CodeType]:
    """The code of all methods of an object, and of the modules inside."""
    if isinstance(owner, torch.nn.Module):
        kinds = [type(module) for module in owner.modules()]
    else:
        kinds = [owner if isinstance(owner, type) else type(owner)]
    members = [member for kind in dict.fromkeys(kinds) for _, member in _members(kind)]
    functions = [function for member in members for function in _wrapped(member)]
    found = [(function, inspect.unwrap(function)) for function in functions if isinstance(function, FunctionType)]
    return [one.__code__ for pair in found for one in dict.fromkeys(pair) if hasattr(one, "__code__")]


def _wrapped(member: Any) -> list[Any]:
    """The functions in a member of a class; itself where it holds none."""
    return [getattr(member, name) for name in WRAPPERS[type(member)]] if type(member) in WRAPPERS else [member]


def _of_library(kind: type) -> bool:
    """Whether the name of a class is enough."""
    if kind.__module__.split(".")[0] in LIBRARIES:
        return True
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None:  # written into Python, or somebody's notebook
        return kind.__module__ in sys.builtin_module_names
    place = Path(file)
    return bool({"site-packages", "dist-packages"} & {*place.parts}) or place.is_relative_to(STANDARD)


def _array(value: Any) -> str:
    try:
        return tensor_digest(torch.as_tensor(value))
    except (TypeError, RuntimeError):  # no numbers, or none yet
        return _unknown(value)


def _unknown(value: Any) -> Any:
    raise Unknown(f"{type(value).__module__}.{type(value).__qualname__}")
