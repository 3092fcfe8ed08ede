"""What the commands have in common: shared options, and processors from the command line."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import SteeringError

if TYPE_CHECKING:
    from ..processor import Processor

Run = Callable[[argparse.Namespace], int]
DTYPES = ("auto", "float32", "float16", "bfloat16")
EMBEDDED = ("world-sd", "world-sd3", "world-llava")


def command(subparsers: Any, name: str, run: Run, help: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """A subcommand with the options that every command has."""
    epilog = "examples:\n" + "\n".join(f"  attnsteer {example}" for example in examples)
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    shared = parser.add_argument_group("shared options")
    shared.add_argument("--seed", type=seed, default=0, help="seed of all randomness (default: 0)")
    shared.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: auto)")
    shared.add_argument("--dtype", choices=DTYPES, default="auto", help="auto is float32 on the CPU, else bfloat16")
    shared.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def positive(text: str) -> int:
    """A count from 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is out of range: allowed is 1 or more")
    return number


def seed(text: str) -> int:
    """A seed that torch and numpy take, for argparse."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{number} is out of range: allowed is 0 to 2**63 - 1")
    return number


def finite(text: str) -> float:
    """A number that is neither nan nor infinite, for argparse."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: give a finite number")
    return number


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"folder, hub id, or an embedded model ({', '.join(EMBEDDED)})")


def add_processors(parser: argparse.ArgumentParser) -> None:
    """Options that describe processors; ``processors`` below reads them."""
    group = parser.add_argument_group("steering")
    group.add_argument("--processor", metavar="NAME", help="a processor of `attnsteer list`; without one: no steering")
    group.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="a parameter, e.g. strength=.5 (repeatable)"
    )
    group.add_argument("--layers", metavar="LAYERS", help="all, 2,3 or 0:8 (a slice) or names and globs")
    group.add_argument("--heads", metavar="HEADS", help="all, 0,5 or by layer 2:0,5;3:all")
    group.add_argument(
        "--steps", metavar="STEPS", help="all, 0.0:0.8 (fractions), 0:10 or 1,2, sigma:0.5:14, prefill or decode"
    )
    group.add_argument("--config", metavar="PATH", help="processors from a folder, file or hub id instead")


def processors(given: argparse.Namespace) -> list[Processor]:
    """The processors that the options describe; empty where there are none.

    Raises:
        SteeringError: options that contradict each other, or a value that is not allowed.
    """
    from ..config import load_processors, processor_from_dict

    details = [name for name in ("param", "layers", "heads", "steps") if getattr(given, name)]
    if given.config and (given.processor or details):
        raise SteeringError(f"--config brings its own processors: leave out --{(details or ['processor'])[0]}.")
    if given.config:
        return load_processors(given.config)
    if not given.processor:
        if details:
            raise SteeringError(f"--{details[0]} belongs to a processor: name one with --processor.")
        return []
    parameters = dict(parameter(text) for text in given.param)
    where = selection(given.layers, given.heads, given.steps)
    if where:
        if "where" in parameters:
            raise SteeringError("--param where=... and --layers, --heads, --steps say the same thing: give one.")
        parameters["where"] = where
    return [processor_from_dict({"processor": given.processor, "parameters": parameters})]


def parameter(text: str, option: str = "--param") -> tuple[str, Any]:
    """``strength=.5`` -> ``("strength", 0.5)``; values are numbers, true, false, null, JSON or plain words."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise SteeringError(f"{option} {text!r} is not of the form NAME=VALUE.")
    return name, _value(value)


def _value(text: str) -> Any:
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)
    if text in ("true", "false", "null") or text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise SteeringError(f"{text!r} is not JSON: {error}.") from error
    return {"True": True, "False": False, "None": None}.get(text, text)


def selection(layers: str | None, heads: str | None, steps: str | None) -> dict[str, Any]:
    """The three options as the JSON form of ``Where``; what is not given is left out."""
    parts = {"layers": layers, "heads": heads, "steps": steps}
    readers: Mapping[str, Callable[[str], Any]] = {"layers": _listed, "heads": _heads, "steps": _steps}
    return {name: readers[name](text) for name, text in parts.items() if text}


def _listed(text: str) -> Any:
    found = [_slice_or_word(part) for part in text.split(",")]
    return found[0] if len(found) == 1 else found


def _slice_or_word(text: str) -> Any:
    text = text.strip()
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"(-?\d*)(:-?\d*){1,2}", text):
        ends = [int(end) if end else None for end in text.split(":")]
        return {"slice": ends}
    return text


def _heads(text: str) -> Any:
    if ":" not in text:
        return _listed(text)
    by_layer = {}
    for part in filter(None, text.split(";")):
        layer, colon, heads = part.rpartition(":")
        if not colon:
            raise SteeringError(f"--heads {text!r}: {part!r} names no layer; write LAYER:HEADS;LAYER:HEADS.")
        by_layer[layer.strip()] = _listed(heads)
    return by_layer


def _steps(text: str) -> Any:
    if text in ("all", "prefill", "decode"):
        return text
    try:
        if text.startswith("sigma:"):
            return {"sigma": [float(end) for end in text[6:].split(":")]}
        if ":" in text and "." in text:
            return [float(end) for end in text.split(":")]
    except ValueError:
        raise SteeringError(f"--steps {text!r} has an end that is no number.") from None
    return _listed(text)
