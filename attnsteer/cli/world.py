"""``attnsteer world``: scenes of the small world as a data set, and how good the embedded models are."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import SteeringError
from . import models
from .options import command, finite, positive

MODELS = ("sd", "sd3", "flux", "llava", "judge")
SPLITS = ("train", "validation", "test")


def add(subparsers: Any) -> None:
    examples = ("world export outputs/world --split test --count 200", "world evaluate sd3 --sheet sd3.png")
    about = "The small world: write its scenes as a COCO data set, or measure the embedded models."
    parser = subparsers.add_parser(
        "world",
        help=about,
        description=about,
        epilog="examples:\n" + "".join(f"  attnsteer {example}\n" for example in examples)
        + "both take --seed, --device, --dtype and --json: see attnsteer world export --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="action", required=True, metavar="{export,evaluate}")
    _add_export(commands)
    _add_evaluate(commands)


# ---- export ----------------------------------------------------------------------------------------------------------
def _add_export(commands: Any) -> None:
    parser = command(
        commands,
        "export",
        export,
        "Write scenes with annotations in the format of COCO: boxes, masks, captions, questions.",
        ["world export outputs/world --split test --count 200", "world export outputs/hard --style varied --prior 0.5"],
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="gets images/ and annotations/")
    add("--split", choices=SPLITS, default="test", help="combinations of this split (default: test)")
    add("--count", type=positive, default=100, help="pictures (default: 100)")
    add("--prior", type=_share, default=0.0, help="how often an object brings its usual partner, 0 to 1 (default: 0)")
    add("--style", choices=("plain", "varied"), default="plain", help="varied: turned, hidden, framed objects, ...")
    add("--categories", choices=("core", "all"), default="core", help="28 that the models know, or 67 (default: core)")


def _share(text: str) -> float:
    number = finite(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: allowed is 0 to 1")
    return number


def export(given: argparse.Namespace) -> int:
    from ..world import coco, sampling
    from ..world.catalog import CATEGORIES, CORE

    scenes = sampling.stream(
        given.split,
        given.count,
        given.seed,
        categories=CORE if given.categories == "core" else [category.name for category in CATEGORIES],
        prior=given.prior,
        style=sampling.PLAIN if given.style == "plain" else sampling.VARIED,
    )
    shown = progress(given, "pictures", total=given.count)(scenes)
    written = {"folder": given.folder, **coco.export(given.folder, shown, given.split, given.seed)}
    if given.json:
        print(json.dumps(written, indent=2))
    else:
        print(", ".join(f"{written[unit]} {unit}" for unit in ("images", "annotations", "captions", "questions")))
        print("\n".join(written["files"]))
    return 0


# ---- evaluate --------------------------------------------------------------------------------------------------------
def _add_evaluate(commands: Any) -> None:
    parser = command(
        commands,
        "evaluate",
        evaluate,
        "Measure the embedded models on scenes and combinations that their training never had.",
        ["world evaluate sd3 --guidance-scale 2 --sheet sd3.png", "world evaluate all --write"],
    )
    add = parser.add_argument
    names = "{" + ",".join((*MODELS, "all")) + "}"
    add("model", type=_name, metavar=names, help="which (world-sd3 or, for short, sd3); all: those that are there")
    add("--folder", metavar="PATH", help="a model of that kind instead of the embedded one")
    add("--count", type=positive, help="scenes for llava (default: 200) and judge (default: 2000)")
    each = "prompts of each kind and category, of one object four times as many (default: 4)"
    add("--per-category", type=positive, default=4, help=each)
    add("--num-steps", type=positive, default=20, help="denoising steps (default: 20)")
    add("--guidance-scale", type=finite, help="classifier-free guidance (default: what suits the model)")
    add("--sheet", metavar="FILE", help="PNG of some pictures; with all: a folder of them")
    add("--write", action="store_true", help="also set the model's row in assets/models/README.md")


def _name(text: str) -> str:
    name = text.removeprefix("world-")
    if name not in (*MODELS, "all"):
        raise argparse.ArgumentTypeError(f"{text!r} is no embedded model: allowed are {', '.join(MODELS)} and all")
    return name


def evaluate(given: argparse.Namespace) -> int:
    from ..world import assets
    from ..world.evaluate import report

    if given.model == "all" and given.folder:
        raise SteeringError("--folder is one model: name its kind instead of all.")
    if given.write and given.folder:
        raise SteeringError("--write is for the embedded models: leave out --folder.")
    names, found = MODELS if given.model == "all" else (given.model,), {}
    for name in names:
        folder = Path(given.folder) if given.folder else assets.root() / f"models/world-{name}"
        if given.model == "all" and not folder.is_dir():
            print(f"attnsteer: world-{name} is not there: left out", file=sys.stderr)
            continue
        found[f"world-{name}"] = scores = measure(given, name, folder)
        if not given.json:
            print(report.text(f"world-{name}", scores), flush=True)
        if given.write:
            report.write(f"world-{name}", scores, assets.path("models"))
    if given.json:
        print(json.dumps(found, indent=2))
    return 0


def measure(given: argparse.Namespace, name: str, folder: Path) -> dict[str, float]:
    """The scores of one model, rounded."""
    from ..world.evaluate.answers import evaluate_llava
    from ..world.evaluate.pictures import evaluate_pictures
    from ..world.evaluate.readings import evaluate_judge
    from ..world.judge import Judge

    if not folder.is_dir():
        raise SteeringError(f"There is no folder {str(folder)!r} with a model.")
    place, kind = models.placement(given.device, given.dtype)
    bar = progress(given, f"world-{name}")
    if name == "llava":
        scores = evaluate_llava(folder, given.count or 200, str(place))
    elif name == "judge":
        scores = evaluate_judge(Judge.load(folder, place), given.count or 2000, given.seed, progress=bar)
    else:
        scores = evaluate_pictures(
            folder,
            Judge.load(device=place),
            given.per_category,
            given.num_steps,
            given.guidance_scale,
            seed=given.seed,
            device=place,
            dtype=kind,
            sheet=_sheet(given, name),
            progress=bar,
        )
    return {key: round(value, 4) for key, value in scores.items()}


def _sheet(given: argparse.Namespace, name: str) -> Path | None:
    if not given.sheet:
        return None
    file = Path(given.sheet) / f"world-{name}.png" if given.model == "all" else Path(given.sheet)
    if file.suffix.lower() != ".png":
        raise SteeringError(f"--sheet {given.sheet!r} is no PNG file: let it end in .png.")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def progress(given: argparse.Namespace, what: str, total: int | None = None) -> Any:
    """A function from an iterable to the same with a bar on a terminal, and with nothing otherwise."""
    from tqdm import tqdm

    return partial(tqdm, desc=what, total=total, disable=given.json or not sys.stderr.isatty(), leave=False)
