"""Several pictures from one command: variants, seeds and stories, each in a file of its own and all on one sheet."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import SteeringError
from . import models
from .options import configuration, described, is_written, parameter, processors, selection

if TYPE_CHECKING:
    from ..processor import Processor
    from ..variants import Variant

SIDES = (176, 256)
"""Pictures on a sheet are neither smaller nor larger."""
COLUMNS = 6
"""Pictures side by side where every variant has only one."""


class Shot(NamedTuple):
    """One picture: which variant, what tells it from the others of that variant, and the picture or its frames."""

    variant: Variant
    title: str
    image: Any


# ---- what to try -----------------------------------------------------------------------------------------------------
def variants(given: argparse.Namespace) -> list[Variant]:
    """The plain model, then everything that ``--variants`` or else the options ask for.

    Raises:
        SteeringError: variants that cannot be read, or contradict other options.
    """
    from ..variants import Variant

    plain, texts = Variant((), "plain"), given.variants
    if not texts:
        wanted = tuple(processors(given))
        name = " + ".join(type(each).__name__ for each in wanted)
        return [plain, Variant(wanted, name)] if wanted else [plain]
    files = [text for text in texts if "=" not in text]
    if not files:
        return [plain, *_product(given, texts)]
    if len(texts) > 1:
        raise SteeringError(f"--variants {files[0]} is a file with all variants: give it alone, or NAME=V1,V2 alone.")
    idle = [n for n in ("method", "config", "subjects", "param", "layers", "heads", "steps") if getattr(given, n)]
    if idle:
        raise SteeringError(f"--variants {files[0]} brings its own processors: leave out --{idle[0]}.")
    return [plain, *_listed(Path(files[0]))]


def label(wanted: Sequence[Processor]) -> str:
    """The processors with the parameters that are not their defaults: ``SoftPAG layers=[2, 3] strength=0.25``."""
    found = []
    for each in wanted:
        usual, given = _defaults(type(each)), dict(described(each)["parameters"])
        changed = {name: value for name, value in given.items() if value != usual.get(name)}
        shown = (changed.pop("where", None) or {}) | changed
        found.append(" ".join([type(each).__name__, *(f"{name}={_short(value)}" for name, value in shown.items())]))
    return " + ".join(found)


def _product(given: argparse.Namespace, texts: Sequence[str]) -> list[Variant]:
    """Every combination of ``NAME=V1,V2,...``; layers, heads and steps are written as the options of that name."""
    from ..config import processor_from_dict
    from ..variants import Variant

    if not given.method:
        raise SteeringError(f"--variants {texts[0]} varies a method: name one with --method.")
    if given.config:
        raise SteeringError("--config brings its own processors: leave out --method.")
    if is_written(given.method):
        raise SteeringError("--variants varies one method: give --method its name alone, and --param what stays.")
    names = [text.partition("=")[0] for text in texts]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SteeringError(f"--variants names {twice[0]!r} twice: write all its values in one, {twice[0]}=V1,V2.")
    lists = [[f"{name}={value}" for value in _values(text)] for name, text in zip(names, texts, strict=True)]
    base, found = configuration(given), []
    for chosen in product(*lists):
        parameters = dict(base["parameters"])
        for text in chosen:
            name, value = text.split("=", 1)
            if name in ("layers", "heads", "steps"):
                parameters["where"] = (parameters.get("where") or {}) | _where(name, value)
            else:
                parameters |= [parameter(text, "--variants")]
        found.append(Variant((processor_from_dict(base | {"parameters": parameters}),), ", ".join(chosen)))
    return found


def _values(text: str) -> list[str]:
    """The values behind ``NAME=``; commas inside brackets do not count."""
    found, depth = [""], 0
    for letter in text.partition("=")[2]:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    if not all(value.strip() for value in found):
        raise SteeringError(f"--variants {text!r} has an empty value: write NAME=V1,V2.")
    return [value.strip() for value in found]


def _where(name: str, value: str) -> dict[str, Any]:
    return selection(**{"layers": None, "heads": None, "steps": None, name: value})


def _listed(file: Path) -> list[Variant]:
    """A JSON list of configurations as ``Processor.to_dict`` writes them; one entry may be a list of several."""
    from ..config import processor_from_dict
    from ..variants import Variant

    if not file.is_file():
        raise SteeringError(f"--variants {str(file)!r} is neither a file nor NAME=V1,V2.")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SteeringError(f"{file}: not JSON: {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise SteeringError(f"{file}: wanted is a list of configurations as Processor.to_dict writes them.")
    found = []
    for number, entry in enumerate(entries, start=1):
        try:
            wanted = tuple(processor_from_dict(each) for each in (entry if isinstance(entry, list) else [entry]))
        except SteeringError as error:
            raise SteeringError(f"{file}, entry {number}: {error}") from error
        found.append(Variant(wanted, label(wanted)))
    return found


def _defaults(cls: type) -> dict[str, Any]:
    """The defaults of a processor's parameters as JSON has them."""
    from ..plain import encode

    values = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
    values |= {field.name: field.default_factory() for field in fields(cls) if field.default_factory is not MISSING}
    return {name: encode(value, name) for name, value in values.items()}


def _short(value: Any) -> str:
    text = json.dumps(value).replace('"', "")
    return text if len(text) <= 40 else f"{text[:37]}..."


# ---- pictures --------------------------------------------------------------------------------------------------------
def shots(given: argparse.Namespace, pipe: Any, tried: Sequence[Variant], call: dict[str, Any]) -> Iterator[Shot]:
    """Every variant with every seed, or of a story with every prompt; as soon as they are done."""
    if len(given.prompt) > 1:
        yield from _stories(given, pipe, tried, call)
        return
    from ..variants import run_variants

    bar = not given.json and sys.stderr.isatty()
    seeds = range(given.seed, given.seed + given.num_seeds)
    pipe.set_progress_bar_config(disable=not bar or len(seeds) > 1)
    progress, size = bar and len(seeds) > 1, given.batch
    with models.running(pipe):
        for variant, seed, image in run_variants(
            pipe, given.prompt[0], variants=tried, seeds=seeds, batch_size=size, progress=progress, **call
        ):
            yield Shot(variant, f"seed {seed}", image)


def _stories(given: argparse.Namespace, pipe: Any, tried: Sequence[Variant], call: dict[str, Any]) -> Iterator[Shot]:
    """All prompts in one batch, for each variant from the same noise."""
    import torch

    from ..attach import steer

    count = len(given.prompt)
    if isinstance(call.get("negative_prompt"), str):
        call = call | {"negative_prompt": [call["negative_prompt"]] * count}
    for variant in tried:
        call = call | {"generator": [torch.Generator().manual_seed(given.seed + n) for n in range(count)]}
        with models.running(pipe), steer(pipe, *variant.processors) if variant.processors else nullcontext():
            output = pipe(prompt=list(given.prompt), **call)
        images = output.images if hasattr(output, "images") else output.frames
        for number, (prompt, image) in enumerate(zip(given.prompt, images, strict=True), start=1):
            yield Shot(variant, title(number, prompt), image)


def title(number: int, prompt: str) -> str:
    """What tells a picture of a story from the others; the first is 1."""
    return f"{number}. {prompt}"


# ---- files -----------------------------------------------------------------------------------------------------------
def save(image: Any, out: Path) -> Path:
    """Write a picture, or the frames of a video as a GIF; gives the file."""
    from PIL import Image

    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, Image.Image):
        image.save(out)
        return out
    out, frames = out.with_suffix(".gif"), _frames(image)
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=80, loop=0)
    return out


def write(taken: Iterator[Shot], tried: Sequence[Variant], out: Path) -> dict[str, Any]:
    """Every picture beside ``out``, which gets the sheet: a row for each variant, the first frame of videos."""
    from PIL import Image

    from .sheet import captioned_sheet

    rows: dict[int, list[tuple[Any, str]]] = {id(variant): [] for variant in tried}
    pictures = []
    for shot in taken:
        row = rows[id(shot.variant)]
        name = f"{out.stem}-{list(rows).index(id(shot.variant))}-{slug(shot.variant.name)}-{slug(shot.title)}"
        file = save(shot.image, out.with_name(name + out.suffix))
        row.append((shot.image if isinstance(shot.image, Image.Image) else _frames(shot.image)[0], shot.title))
        wanted = [described(processor) for processor in shot.variant.processors]
        pictures.append({"file": str(file), "variant": shot.variant.name, "of": shot.title, "processors": wanted})
    width = len(rows[id(tried[0])])
    captioned = [(image, f"{v.name}, {title}" if width > 1 else v.name) for v in tried for image, title in rows[id(v)]]
    side = min(SIDES[1], max(SIDES[0], captioned[0][0].width))
    captioned_sheet(captioned, width if width > 1 else min(COLUMNS, len(tried)), side).save(out)
    return {"files": [picture["file"] for picture in pictures], "sheet": str(out), "pictures": pictures}


def slug(text: str) -> str:
    """What names a variant or a title in the name of a file."""
    return re.sub(r"[^a-z0-9.]+|\.(?!\d)", "-", text.lower()).strip("-.")[:48]


def _frames(frames: Any) -> list[Any]:
    from PIL import Image

    return [f if isinstance(f, Image.Image) else Image.fromarray((f * 255).round().astype("uint8")) for f in frames]
