"""Parameters as plain JSON values and back: the value codec of ``attnsteer.config``."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from .errors import SteeringError
from .where import Where

_INFINITIES = {"inf": math.inf, "-inf": -math.inf}


# ---- to JSON ---------------------------------------------------------------------------------------------------------
def encode(value: Any, what: str, tensors: dict[str, Any] | None = None, key: str = "") -> Any:
    """A parameter as JSON value.

    Args:
        value: what to write.
        what: how an error calls it.
        tensors: where tensors go, under ``key``; None refuses them.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise SteeringError(f"{what} is not a number (nan) and cannot be written.")
        return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Where):
        parts = {"layers": value.layers, "heads": value.heads, "steps": value.steps}
        return {name: encode(part, f"{what}.{name}") for name, part in parts.items() if part != "all"}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, Mapping):
        if not all(isinstance(k, str) or (isinstance(k, int) and not isinstance(k, bool)) for k in value):
            raise SteeringError(f"{what} has a key that is neither a string nor an int and cannot be written.")
        return {str(k): encode(v, f"{what}[{k!r}]", tensors, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, (list, tuple, range)):
        return [encode(v, f"{what}[{i}]", tensors, f"{key}.{i}") for i, v in enumerate(value)]
    if tensors is not None and type(value).__module__ == "torch" and hasattr(value, "detach"):
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    raise SteeringError(f"{what} is a {type(value).__name__}, which a configuration cannot hold.")


# ---- from JSON -------------------------------------------------------------------------------------------------------
def decode(value: Any, hint: Any, what: str, tensors: Mapping[str, Any]) -> Any:
    """The parameter of type ``hint`` from a JSON value.

    Raises:
        SteeringError: the value does not have that type.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    problems = []
    for option in options:
        try:
            return _decode_one(value, option, what, tensors)
        except SteeringError as error:
            problems.append(error)
    real = [problem for option, problem in zip(options, problems, strict=True) if option is not type(None)]
    if len(problems) == 1:
        raise problems[0]
    if len(real) == 1 and isinstance(value, (Mapping, list)):
        raise real[0]
    wanted = " or ".join(_name(option) for option in options)
    raise SteeringError(f"{what}: {short(value)} is not allowed; wanted is {wanted}.")


def _decode_one(value: Any, hint: Any, what: str, tensors: Mapping[str, Any]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint is Where:
        return decode_where(value, what)
    if hint is float and isinstance(value, str) and value in _INFINITIES:
        return _INFINITIES[value]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (bool, int, float, str, type(None)) and type(value) is hint:
        return value
    if origin is Literal and any(type(value) is type(a) and value == a for a in arguments):
        return value
    if getattr(hint, "__module__", "") == "torch" and isinstance(value, Mapping) and set(value) == {"tensor"}:
        return tensors[str(value["tensor"])]
    if hint is slice and isinstance(value, Mapping) and set(value) == {"slice"}:
        return _slice(value["slice"], what)
    if origin in (list, tuple, Sequence, set, frozenset) and isinstance(value, list):
        return _sequence(value, origin, arguments, what, tensors)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        key_hint, value_hint = arguments
        return {_key(k, key_hint): decode(v, value_hint, f"{what}[{k!r}]", tensors) for k, v in value.items()}
    raise SteeringError(f"{what}: {short(value)} is not allowed; wanted is {_name(hint)}.")


def _sequence(value: list[Any], origin: Any, arguments: tuple[Any, ...], what: str, tensors: Mapping[str, Any]) -> Any:
    if origin is tuple and Ellipsis not in arguments:
        if len(value) != len(arguments):
            raise SteeringError(f"{what}: {short(value)} has {len(value)} entries; wanted are {len(arguments)}.")
        hints: Sequence[Any] = arguments
    else:
        hints = [arguments[0]] * len(value)
    parts = [decode(v, h, f"{what}[{i}]", tensors) for i, (v, h) in enumerate(zip(value, hints, strict=True))]
    return tuple(parts) if origin in (tuple, Sequence) else origin(parts)


def decode_where(value: Any, what: str = "where") -> Where:
    """A selection from its JSON form: a mapping with any of the keys layers, heads and steps."""
    if not isinstance(value, Mapping):
        raise SteeringError(f"{what}: {short(value)} is no selection; wanted is a mapping of layers, heads and steps.")
    for key in value:
        if key not in ("layers", "heads", "steps"):
            raise SteeringError(f"{what} has no part {key!r}; it has: layers, heads, steps.")
    parts = {key: _selection(part, f"{what}.{key}") for key, part in value.items()}
    if isinstance(parts.get("steps"), list) and any(isinstance(s, float) for s in parts["steps"]):
        parts["steps"] = tuple(parts["steps"])
    if isinstance(parts.get("heads"), dict):
        parts["heads"] = {_key(key, int | str): heads for key, heads in parts["heads"].items()}
    return Where(**parts)


def _selection(value: Any, what: str) -> Any:
    """Ints, floats, strings, lists and slices; ``Where`` itself judges what it is given."""
    if isinstance(value, list):
        return [_selection(v, what) for v in value]
    if isinstance(value, Mapping):
        if set(value) == {"slice"}:
            return _slice(value["slice"], what)
        return {str(k): _selection(v, f"{what}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return value
    raise SteeringError(f"{what}: {short(value)} is no part of a selection.")


def _slice(value: Any, what: str) -> slice:
    if not isinstance(value, list) or not 2 <= len(value) <= 3 or not all(v is None or type(v) is int for v in value):
        raise SteeringError(f"{what}: {short(value)} is no slice; wanted is [start, stop, step] of ints or null.")
    if len(value) == 3 and value[2] == 0:
        raise SteeringError(f"{what}: the step of a slice is not 0.")
    return slice(*value)


def _key(key: str, hint: Any) -> Any:
    """Keys are strings in JSON: those that look like ints are ints where ints are allowed."""
    allowed = get_args(hint) or (hint,)
    return int(key) if int in allowed and key.lstrip("-").isdecimal() else key


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    special = {type(None): "null", Where: "a selection"}
    return special[hint] if hint in special else getattr(hint, "__name__", str(hint))


def short(value: Any) -> str:
    """A value as an error shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
