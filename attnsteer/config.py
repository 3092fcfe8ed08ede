"""Configurations are data: processors as JSON, with a safetensors file beside it where a parameter is a tensor.

``attnsteer_config.json``::

    {"format": 1,
     "processors": [{"processor": "SoftPAG", "parameters": {"where": {"layers": [7, 8]}, "strength": 0.5}}]}

Reading checks every name, type and value, and runs no code from the file: a class is found by its name among
``attnsteer.processors`` (and the entry points of installed packages) or not at all. A slice is ``{"slice": [start,
stop, step]}``, infinity the string ``"inf"``, a mapping with int keys has them as strings, a missing parameter its
default.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from .errors import SteeringError
from .plain import decode, encode, short
from .processor import Processor

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
CONFIG_NAME = "attnsteer_config.json"
TENSORS_NAME = "attnsteer_tensors.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def processor_to_dict(processor: Processor) -> dict[str, Any]:
    """A processor as plain JSON values: ``{"processor": name, "parameters": {...}}``.

    Raises:
        SteeringError: a parameter that JSON cannot hold (tensors need ``save_processors``).
    """
    return _to_dict(processor, None, "")


def processor_from_dict(data: Mapping[str, Any]) -> Processor:
    """The processor that ``processor_to_dict`` described.

    Raises:
        SteeringError: an unknown processor or parameter, or a value that is not allowed; says which and what is.
    """
    return _from_dict(data, {})


def save_processors(processors: Sequence[Processor], directory: str | os.PathLike[str]) -> None:
    """Write processors into a folder (made if it is missing), to be read by ``load_processors``.

    Raises:
        SteeringError: a processor that could not be found again by its name, or a value that cannot be written.
    """
    from .processors import get

    tensors: dict[str, Tensor] = {}
    entries = []
    for number, processor in enumerate(processors):
        name = type(processor).__name__
        if get(name) is not type(processor):
            raise SteeringError(f"{name} is not the processor that attnsteer knows by this name: register it first.")
        entries.append(_to_dict(processor, tensors, f"{number}."))
    text = json.dumps({"format": FORMAT, "processors": entries}, indent=2, allow_nan=False)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if tensors:
        from safetensors.torch import save_file

        save_file(tensors, folder / TENSORS_NAME)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def load_processors(source: str | os.PathLike[str]) -> list[Processor]:
    """Read processors from a folder, a JSON file or a hub id (``"owner/name"``).

    Raises:
        SteeringError: no configuration there, or anything in it that is not as described above.
    """
    file, tensors_file = _files(os.fspath(source))
    try:
        data = _parse(file.read_text(encoding="utf-8"))
        entries = _entries(data)
        tensors = _Tensors(tensors_file)
        return [_from_dict(entry, tensors) for entry in entries]
    except (SteeringError, UnicodeDecodeError) as error:
        raise SteeringError(f"{file}: {error}") from error
    except RecursionError as error:
        raise SteeringError(f"{file}: nested too deeply for a configuration.") from error


class _Tensors(dict[str, Any]):
    """The tensors of a configuration, read when the first is wanted."""

    def __init__(self, file: Path | None):
        super().__init__()
        self.file = file

    def __missing__(self, key: str) -> Any:
        if self.file is None or not self.file.is_file():
            raise SteeringError(f"tensor {key!r} is wanted, but there is no {TENSORS_NAME}.")
        if not self:
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                self.update(load_file(self.file))
            except SafetensorError as error:
                raise SteeringError(f"{self.file.name} is no safetensors file: {error}.") from error
        if key not in self:
            there = ", ".join(sorted(self)) or "none"
            raise SteeringError(f"tensor {key!r} is wanted; {self.file.name} holds {there}.")
        return self[key]


# ---- one processor ---------------------------------------------------------------------------------------------------
def _to_dict(processor: Processor, tensors: dict[str, Tensor] | None, prefix: str) -> dict[str, Any]:
    name = type(processor).__name__
    values = {}
    for field in _parameters(type(processor)):
        value = getattr(processor, field.name)
        values[field.name] = encode(value, f"{name}({field.name}=...)", tensors, prefix + field.name)
    return {"processor": name, "parameters": values}


def _from_dict(data: Any, tensors: Mapping[str, Tensor]) -> Processor:
    from .processors import get

    if not isinstance(data, Mapping) or not {"processor"} <= set(data) <= {"processor", "parameters"}:
        raise SteeringError(f"{short(data)} is no processor: wanted is {{'processor': name, 'parameters': {{...}}}}.")
    if not isinstance(data["processor"], str):
        raise SteeringError(f"processor={short(data['processor'])} is no name: give one in quotes.")
    cls = get(data["processor"])
    given = data.get("parameters", {})
    if not isinstance(given, Mapping):
        raise SteeringError(f"parameters={short(given)} of {cls.__name__} are no mapping of names to values.")
    known = {field.name: field for field in _parameters(cls)}
    for key in given:
        if key not in known:
            raise SteeringError(f"{cls.__name__} has no parameter {key!r}; it has: {', '.join(known)}.")
    missing = [n for n, f in known.items() if n not in given and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise SteeringError(f"{cls.__name__} needs the parameter {missing[0]!r}.")
    try:
        hints = get_type_hints(cls)
    except NameError as error:
        raise SteeringError(f"The parameter types of {cls.__name__} cannot be read: {error}.") from error
    values = {key: decode(value, hints[key], f"{cls.__name__}({key}=...)", tensors) for key, value in given.items()}
    try:
        return cls(**values)
    except SteeringError:
        raise
    except (TypeError, ValueError) as error:
        raise SteeringError(f"{cls.__name__} refuses its parameters: {error}.") from error


def _parameters(cls: type[Processor]) -> list[Field[Any]]:
    return [field for field in fields(cls) if field.init]


# ---- the file --------------------------------------------------------------------------------------------------------
def _files(source: str) -> tuple[Path, Path | None]:
    path = Path(source).expanduser()
    if path.is_file():
        return path, path.parent / TENSORS_NAME
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file():
            raise SteeringError(f"The folder {source!r} holds no {CONFIG_NAME}.")
        return path / CONFIG_NAME, path / TENSORS_NAME
    if not _HUB_ID.fullmatch(source):
        raise SteeringError(f"{source!r} is neither a folder, nor a file, nor a hub id (owner/name).")
    return _download(source)


def _download(repository: str) -> tuple[Path, Path | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        file = Path(hf_hub_download(repository, CONFIG_NAME))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SteeringError(f"No folder {repository!r}, and no {CONFIG_NAME} from the hub: {reason}") from error
    try:
        return file, Path(hf_hub_download(repository, TENSORS_NAME))
    except (EntryNotFoundError, OSError):
        return file, None


def _entries(data: Any) -> list[Any]:
    if not isinstance(data, dict) or set(data) != {"format", "processors"}:
        raise SteeringError("the keys must be 'format' and 'processors'.")
    if data["format"] != FORMAT or isinstance(data["format"], bool):
        raise SteeringError(f"format={short(data['format'])} is not known: this version reads format {FORMAT}.")
    if not isinstance(data["processors"], list):
        raise SteeringError(f"processors={short(data['processors'])} is no list.")
    return data["processors"]


def _parse(text: str) -> Any:
    """Strict JSON: no NaN, no numbers beyond floats, no key twice."""

    def number(literal: str) -> float:
        if not math.isfinite(float(literal)):
            raise SteeringError(f'{literal} is not a number that JSON knows; infinity is the string "inf".')
        return float(literal)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise SteeringError(f"the key {key!r} occurs twice.")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=number, parse_float=number, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise SteeringError(f"not JSON: {error}.") from error
