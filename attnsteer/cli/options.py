"""What the commands have in common: shared options, and processors from the command line."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..errors import SteeringError

if TYPE_CHECKING:
    from ..processor import Processor

Run = Callable[[argparse.Namespace], int]
DTYPES = ("auto", "float32", "float16", "bfloat16")
EMBEDDED: dict[str, dict[str, Any]] = {
    "world-sd": {"level": 0, "start_layer": 3, "mutual": 0.5},
    "world-sd3": {"start_layer": 3, "mutual": 0.0},
    "world-flux": {"start_layer": 3, "mutual": 0.0},
    "world-llava": {"final_images": "refined", "suffix": ""},
}
"""The embedded models, and the parameters that fit them where a method's default is meant for larger ones."""


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
    add_methods(group)
    add_selection(group)


def add_methods(group: Any) -> None:
    """Which methods act; their own layers, heads and steps apart."""
    named = (
        "a method of `attnsteer list`, e.g. attend-and-excite, SoftPAG or vhr, or several with their parameters, "
        "pai:alpha=.2,layers=2:8+image-contrast:gamma=1.1; without one: no steering"
    )
    group.add_argument("--method", "--processor", metavar="NAME", help=named)
    group.add_argument(
        "--subjects", metavar="WORDS", help='words of the prompt: dog,car or, for methods that bind, "red car,dog"'
    )
    group.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="a parameter, e.g. strength=.5 (repeatable)"
    )
    group.add_argument("--config", metavar="PATH", help="processors from a folder, file or hub id instead")


def add_selection(group: Any) -> None:
    """Layers, heads and steps; ``selection`` below reads them."""
    group.add_argument("--layers", metavar="LAYERS", help="all, 2,3 or 0:8 (a slice) or names and globs")
    group.add_argument("--heads", metavar="HEADS", help="all, 0,5 or by layer 2:0,5;3:all")
    group.add_argument(
        "--steps", metavar="STEPS", help="all, 0.0:0.8 (fractions), 0:10 or 1,2, sigma:0.5:14, prefill or decode"
    )


def processors(given: argparse.Namespace) -> list[Processor]:
    """The processors that the options describe; empty where there are none.

    Raises:
        SteeringError: options that contradict each other, or a value that is not allowed.
    """
    from ..config import load_processors

    details = [name for name in ("subjects", "param", "layers", "heads", "steps") if getattr(given, name)]
    if given.config and (given.method or details):
        raise SteeringError(f"--config brings its own processors: leave out --{(details or ['method'])[0]}.")
    if given.config:
        return load_processors(given.config)
    if not given.method:
        if details:
            raise SteeringError(f"--{details[0]} belongs to a method: name one with --method.")
        return []
    if is_written(given.method):
        if details:
            raise SteeringError(
                f"--{details[0]} goes with one method alone: write --method NAME:param=value,layers=2:4+NAME."
            )
        return written(given.method, given.model, prompts=len(getattr(given, "prompt", ())))
    return [_made(configuration(given))]


def _made(wanted: dict[str, Any]) -> Processor:
    """The processor of a configuration."""
    from ..config import processor_from_dict

    try:
        return processor_from_dict(wanted)
    except SteeringError as error:
        tensors = [name for name, kind in parameters_of(wanted["processor"]).items() if "Tensor" in kind]
        if not any(f"{name}=" in str(error) for name in tensors):
            raise
        hint = (
            f"{' and '.join(tensors)} cannot be written here: save_pretrained writes them, --config FOLDER takes them."
        )
        raise SteeringError([*error.reasons, hint]) from error


def is_written(text: str) -> bool:
    """Whether a method comes with its parameters, or with another method: then ``written`` reads it."""
    return ":" in text or "+" in text


def written(text: str, model: str, defaults: Mapping[str, Any] | None = None, prompts: int = 0) -> list[Processor]:
    """``pai:alpha=0.5,layers=2:8+image-contrast:gamma=1.1`` as processors, with what fits an embedded model.

    ``defaults``: parameters of those processors that have them, where neither the text nor the model says otherwise.
    ``prompts``: how many there are, for methods whose pictures are a story.

    Raises:
        SteeringError: an unknown processor or parameter, or a value that is not allowed.
    """
    fitting = {**(defaults or {}), **EMBEDDED.get(model, {})}
    return [_made(_written(part, fitting, prompts)) for part in _parts(text)]


def _parts(text: str) -> list[str]:
    """The methods of ``pai:alpha=.2+vcd``; a plus that no method follows belongs to the value before it."""
    from ..processors import available

    names, parts = {_bare(name) for name in available()}, [""]
    for piece in re.split(r"\+(?=[A-Za-z])", text):
        inside = ":" in parts[-1] and _bare(piece.partition(":")[0]) not in names
        parts[-1:] = [f"{parts[-1]}+{piece}"] if inside else [parts[-1], piece]
    return parts[1:]


def _written(text: str, defaults: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    """``vhr:alpha=2,layers=4:8``; a comma that begins no parameter belongs to the value before it."""
    title, _, rest = text.partition(":")
    name = method(title.strip())
    known = parameters_of(name)  # CARVE has steps of its own
    where: dict[str, str | None] = dict.fromkeys(("layers", "heads", "steps"))
    texts = []
    for part in re.split(r",(?=\s*[A-Za-z_]\w*=)", rest) if rest else []:
        key, equals, value = part.strip().partition("=")
        if not equals or key in known or key not in where:
            texts.append(part.strip())
        elif where[key] or not value.strip():
            raise SteeringError(f"--method {text!r} must say {key} once: {key}=VALUE.")
        else:
            where[key] = value
    return _settled(name, texts, where, defaults, prompts, "--method")


def configuration(given: argparse.Namespace) -> dict[str, Any]:
    """The method of the options as the plain values of ``Processor.to_dict``; what is not given is left out."""
    texts = list(given.param)
    if given.subjects:
        if any(text.startswith("subjects=") for text in texts):
            raise SteeringError("--param subjects=... and --subjects say the same thing: give one.")
        texts.append(f"subjects={given.subjects}")
    where = {"layers": given.layers, "heads": given.heads, "steps": given.steps}
    prompts = len(getattr(given, "prompt", ()))
    return _settled(method(given.method), texts, where, EMBEDDED.get(given.model, {}), prompts, "--param")


def _settled(
    name: str,
    texts: Sequence[str],
    where: Mapping[str, str | None],
    defaults: Mapping[str, Any],
    prompts: int,
    option: str,
) -> dict[str, Any]:
    """A method with parameters ``NAME=VALUE``, layers, heads and steps as written, and the defaults that it has."""
    kinds, found = parameters_of(name), {}
    for key, value in (parameter(text, option) for text in texts):
        if key in found:
            raise SteeringError(f"{option} gives {key} twice.")
        found[key] = subjects(value, name) if key == "subjects" and isinstance(value, str) else value
    chosen = selection(**where)
    if chosen and "where" in found:
        raise SteeringError("where=... and layers, heads, steps say the same thing: give one.")
    if chosen:
        found["where"] = chosen
    if "frames" in kinds and prompts > 1:
        found.setdefault("frames", prompts)
    return {"processor": name, "parameters": {k: v for k, v in defaults.items() if k in kinds} | found}


def method(text: str) -> str:
    """The processor of that name; case, hyphens and underscores do not count: ``a-star`` is ``AStar``.

    Raises:
        SteeringError: none is called so; says which there are, and which was perhaps meant.
    """
    from ..processors import available

    names = {_bare(name): name for name in available()}
    if _bare(text) in names:
        return names[_bare(text)]
    close = difflib.get_close_matches(_bare(text), names, n=1)
    perhaps = f"did you mean {names[close[0]]}? There are" if close else "there are"
    raise SteeringError(f"There is no method {text!r}; {perhaps}: {', '.join(available())}.")


def _bare(name: str) -> str:
    return re.sub(r"[-_\s]", "", name).lower()


def described(processor: Processor) -> dict[str, Any]:
    """``Processor.to_dict`` for reports: a tensor is only mentioned."""
    from ..plain import encode

    shown = {
        field.name: encode(getattr(processor, field.name), field.name, {}, field.name) for field in fields(processor)
    }
    return {"processor": type(processor).__name__, "parameters": shown}


def parameters_of(name: str) -> dict[str, str]:
    """The parameters of a processor and, as text, their types."""
    from ..processors import get

    return {field.name: str(field.type) for field in fields(get(name))}


def subjects(text: str, name: str) -> list[str]:
    """``dog,red car`` -> ``["dog", "red car"]``, for a method that has subjects.

    Raises:
        SteeringError: the method has none (says which have), or one of the words is empty.
    """
    from ..processors import available

    if "subjects" not in parameters_of(name):
        having = ", ".join(other for other in available() if "subjects" in parameters_of(other))
        raise SteeringError(f"{name} takes no subjects; these methods do: {having}.")
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise SteeringError(f"--subjects {text!r} has an empty word: write dog,car.")
    return words


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
