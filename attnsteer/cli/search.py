"""``attnsteer search``: which heads to perturb, found by HeadHunter; with --curve also how good they are on others."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SteeringError
from ..plain import decode_where
from . import models
from .generate import call_defaults
from .options import add_model, command, finite, parameter, positive, selection

if TYPE_CHECKING:
    from ..search import HeadHunter, Objective, Selection
    from ..search.curve import Curve
    from ..search.headhunter import Progress
    from ..search.scorer import Pair

OBJECTIVES = ("judge", "colourfulness", "clip", "pickscore", "aesthetic", "hps")
LATER = 1_000_000
"""What held-out seeds are away from those of the search."""
EVERY = 20.0
"""Seconds between two lines about the progress, where there is no terminal."""


def add(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "search",
        run,
        "Search for the heads whose perturbation improves pictures most (HeadHunter, arXiv 2506.10978).",
        [
            "search world-sd3 --num-pairs 2 --num-steps 6 --rounds 1 --layers 2:5 --out outputs/heads",
            "search stabilityai/stable-diffusion-3-medium-diffusers --prompts style.txt --objective pickscore",
            "search world-sd3 --curve --curve-strengths 1,0.5 --out outputs/heads",
        ],
    )
    parser.description = (
        f"{parser.description} Writes heads.json (for SoftPAG.from_search), heatmap.png and sheet.png. A killed search"
        " goes on where it was when it is started again. `accelerate launch --multi_gpu -m attnsteer search ...` (or"
        " torchrun, also without GPUs) deals it to several processes."
    )
    add_model(parser)
    _add_pairs(parser.add_argument_group("prompts and objective"))
    _add_search(parser.add_argument_group("search"))
    group = parser.add_argument_group("held-out curve")
    add = group.add_argument
    add("--curve", action="store_true", help="score against number of heads, on prompts and seeds not searched on")
    add("--curve-prompts", metavar="FILE", help="its prompts, as --prompts (embedded models bring their own)")
    add("--curve-pairs", type=positive, default=8, help="pairs that embedded models bring (default: 8)")
    add("--curve-strengths", metavar="U,U", help="strengths to measure (default: the one of the search)")


def _add_pairs(group: Any) -> None:
    add = group.add_argument
    add("--prompts", metavar="FILE", help="a prompt a line, or prompt, tab, seed")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt (repeatable)")
    add("--num-seeds", type=positive, default=1, help="seeds for each prompt without its own (default: 1), from --seed")
    add("--num-pairs", type=positive, default=4, help="pairs that embedded models bring without prompts (default: 4)")
    several = f"{', '.join(OBJECTIVES)}; several: their harmonic mean (default: judge)"
    add("--objective", action="append", default=[], choices=OBJECTIVES, metavar="NAME", help=several)
    add("--at-least", action="append", default=[], metavar="NAME=VALUE", help="take only heads whose mean reaches it")
    more = "folder or hub id for pickscore, pickscore.processor, aesthetic.head, ..."
    add("--checkpoint", action="append", default=[], metavar="NAME=PATH", help=more)


def _add_search(group: Any) -> None:
    add = group.add_argument
    add("--per-round", type=positive, default=3, metavar="K", help="heads that each round adds (default: 3)")
    add("--rounds", type=positive, default=5, help="rounds (default: 5)")
    add("--strength", type=finite, default=1.0, help="u of SoftPAG (default: 1)")
    add("--scale", type=finite, default=3.0, help="w of SoftPAG (default: 3)")
    add("--num-steps", type=positive, default=20, help="denoising steps (default: 20)")
    add("--batch", type=positive, default=8, help="pictures at once (default: 8)")
    add("--layers", metavar="LAYERS", help="search only these: 2,3 or 0:8 (a slice) or names and globs")
    add("--heads", metavar="HEADS", help="search only these: 0,5 or by layer 2:0,5;3:all")
    add("--steps", metavar="STEPS", help="perturb only at these: 0.0:0.8 (fractions), 0:10 or 1,2")
    add("--call", action="append", default=[], metavar="NAME=VALUE", help="an argument of the pipeline: height=512")
    add("--sheet", type=int, default=12, metavar="N", help="heads on the contact sheet, 0 for none (default: 12)")
    add("--out", default="outputs/search", metavar="FOLDER", help="for scores and results (default: outputs/search)")


def run(given: argparse.Namespace) -> int:
    from ..search import HeadHunter

    place = _device(given.device)
    goal = objective(given, place)
    searched = pairs(given)
    held = held_out_pairs(given, searched) if given.curve else []
    strengths = _strengths(given)
    where = decode_where(selection(given.layers, given.heads, given.steps))
    if not models.is_pipeline(models.locate(given.model)):
        raise SteeringError(f"{given.model!r} answers questions: a search needs a model that makes pictures.")
    pipe, _ = models.load(given.model, place, given.dtype)
    call = call_defaults(given.model, pipe, guidance=1.0) | dict(parameter(text, "--call") for text in given.call)
    start = time.perf_counter()
    hunter = HeadHunter(
        pipe,
        goal,
        searched,
        k=given.per_round,
        rounds=given.rounds,
        strength=given.strength,
        scale=given.scale,
        steps=given.num_steps,
        batch=given.batch,
        where=where,
        call=call,
        out=given.out,
        progress=_teller(given),
    )
    with models.running(pipe):
        found = hunter.run()
        files = _results(given, hunter, found)
        measured = _curve(given, hunter, found, held, strengths, files)
    if hunter.main:
        _report(given, hunter, found, measured, files, time.perf_counter() - start)
    return 0


# ---- what to search on -----------------------------------------------------------------------------------------------
def pairs(given: argparse.Namespace) -> list[Pair]:
    """Prompts and seeds of the search."""
    found = [*(_file(given.prompts) if given.prompts else []), *((text, None) for text in given.prompt)]
    if found:
        return _seeded(found, given.seed, given.num_seeds)
    return _seeded(_scenes(given.model, "validation", given.num_pairs, given.seed), given.seed, 1)


def held_out_pairs(given: argparse.Namespace, searched: list[Pair]) -> list[Pair]:
    """Prompts and seeds of the curve: none that the search saw."""
    from ..search.curve import held_out

    if given.curve_prompts:
        found = _seeded(_file(given.curve_prompts), given.seed + LATER, given.num_seeds)
    else:
        found = _seeded(_scenes(given.model, "test", given.curve_pairs, given.seed), given.seed + LATER, 1)
    return held_out(searched, found)


def _file(name: str) -> list[tuple[str, int | None]]:
    found: list[tuple[str, int | None]] = []
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SteeringError(f"{name!r} is no text file: {error.reason}.") from error
    for line in filter(str.strip, lines):
        prompt, tab, number = line.partition("\t")
        if tab and not number.strip().isdecimal():
            raise SteeringError(f"{name!r}: {number.strip()!r} behind the tab is no seed.")
        found.append((prompt.strip(), int(number) if tab else None))
    if not found:
        raise SteeringError(f"{name!r} holds no prompts.")
    return found


def _seeded(found: list[tuple[str, int | None]], seed: int, count: int) -> list[Pair]:
    """The prompts with their own seeds, or with ``count`` seeds each, none used twice."""
    chosen: list[Pair] = []
    for place, (prompt, own) in enumerate(found):
        numbers = [own] if own is not None else range(seed + place * count, seed + (place + 1) * count)
        chosen += [(prompt, number) for number in numbers]
    return chosen


def _scenes(model: str, split: str, count: int, seed: int) -> list[tuple[str, int | None]]:
    """Captions of two objects that no training scene has together; validation and test share no pair of objects."""
    if not model.startswith("world-"):
        raise SteeringError(f"{model!r} brings no prompts: give some with --prompts, --prompt or --curve-prompts.")
    from ..world import sampling, text

    scenes = sampling.stream(split, count, seed, count=2, repeat=0.0)
    return [(text.caption(scene), None) for scene in scenes]


# ---- objectives ------------------------------------------------------------------------------------------------------
def objective(given: argparse.Namespace, device: str) -> Objective:
    """The objective that the options describe."""
    from ..search import Harmonic, Thresholded

    bounds = [_named(text, "--at-least") for text in given.at_least]
    known = {name: dict[str, str]() for name in OBJECTIVES}
    for text in given.checkpoint:
        name, value = _named(text, "--checkpoint")
        first, _, part = name.partition(".")
        known[first][part or "checkpoint"] = value
    names = given.objective or ["judge"]
    used = {*names, *(name for name, _ in bounds)}
    idle = [name for name, parts in known.items() if parts and name not in used]
    if idle:
        raise SteeringError(f"--checkpoint {idle[0]}=... is for an objective that is not used.")
    if len(set(names)) < len(names):
        raise SteeringError("--objective names one objective twice.")
    made = {name: _objective(name, known[name], device) for name in used}
    ranked = made[names[0]] if len(names) == 1 else Harmonic([made[name] for name in names])
    if not bounds:
        return ranked
    try:
        return Thresholded(ranked, [(made[name], float(value)) for name, value in bounds])
    except ValueError as error:
        raise SteeringError(f"--at-least takes NAME=NUMBER: {error}.") from error


def _named(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not value or name.partition(".")[0] not in OBJECTIVES:
        raise SteeringError(f"{option} {text!r} is not NAME=VALUE with a name of {', '.join(OBJECTIVES)}.")
    return name, value


def _objective(name: str, parts: dict[str, str], device: str) -> Objective:
    from .. import search

    takes = {
        "judge": ("checkpoint",),
        "colourfulness": (),
        "clip": ("checkpoint",),
        "pickscore": ("checkpoint", "processor"),
        "aesthetic": ("checkpoint", "head"),
        "hps": ("checkpoint", "processor"),
    }
    wrong = sorted(set(parts) - set(takes[name]))
    if wrong:
        raise SteeringError(f"--checkpoint {name}.{wrong[0]}: {name} takes {' and '.join(takes[name]) or 'none'}.")
    if name == "hps" and "checkpoint" not in parts:
        raise SteeringError("hps needs its weights in the format of transformers: give --checkpoint hps=PATH.")
    if name == "judge":
        return search.WorldJudge(parts.get("checkpoint"), device)
    if name == "colourfulness":
        return search.Colourfulness()
    make: dict[str, Callable[..., Objective]] = {
        "clip": search.Clip,
        "pickscore": search.PickScore,
        "aesthetic": search.Aesthetic,
        "hps": search.HPS,
    }
    return make[name](**parts, device=device)


def _device(wanted: str) -> str:
    """One GPU for each process of this machine."""
    from ..search.ranks import Ranks

    local = Ranks.local()
    if wanted != "auto":
        return wanted
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if local is None else f"cuda:{local % torch.cuda.device_count()}"


def _strengths(given: argparse.Namespace) -> list[float] | None:
    if given.curve_strengths is None:
        return None
    if not given.curve:
        raise SteeringError("--curve-strengths belongs to --curve.")
    try:
        return [float(text) for text in given.curve_strengths.split(",")]
    except ValueError:
        raise SteeringError(f"--curve-strengths {given.curve_strengths!r} are no numbers: write 1,0.5.") from None


# ---- results ---------------------------------------------------------------------------------------------------------
def _results(given: argparse.Namespace, hunter: HeadHunter, found: Selection) -> dict[str, str]:
    """Files by what they show; the contact sheet is painted now, by one process."""
    files = {"selection": str(Path(given.out) / "heads.json"), "heat map": str(Path(given.out) / "heatmap.png")}
    if given.sheet > 0 and hunter.main:
        from ..search.report import contact_sheet

        files["sheet"] = str(Path(given.out) / "sheet.png")
        contact_sheet(hunter, found, given.sheet).save(files["sheet"])
    return files


def _curve(
    given: argparse.Namespace,
    hunter: HeadHunter,
    found: Selection,
    held: list[Pair],
    strengths: list[float] | None,
    files: dict[str, str],
) -> Curve | None:
    if not given.curve:
        return None
    from ..search.curve import curve
    from ..search.report import plot

    measured = curve(hunter, found, held, strengths=strengths)
    if hunter.main:
        files |= {"curve": str(Path(given.out) / "curve.json"), "curve plot": str(Path(given.out) / "curve.png")}
        measured.save(files["curve"])
        plot(measured).save(files["curve plot"])
    return measured


def _report(
    given: argparse.Namespace,
    hunter: HeadHunter,
    found: Selection,
    measured: Curve | None,
    files: dict[str, str],
    seconds: float,
) -> None:
    if given.json:
        rounds = [[list(head) for head in heads] for heads in found.rounds]
        told: dict[str, Any] = {"model": given.model, "rounds": rounds, "scores": [list(s) for s in found.scores]}
        told |= {"scores_found": hunter.resumed, "seconds": round(seconds, 3), "files": files}
        if measured is not None:
            told["curve"] = json.loads(Path(files["curve"]).read_text())["points"]
        print(json.dumps(told, indent=2))
        return
    for number, (heads, scores) in enumerate(zip(found.rounds, found.scores, strict=True), start=1):
        listed = ", ".join(f"{head} {score:.4g}" for head, score in zip(heads, scores, strict=True))
        print(f"round {number}: {listed or 'no head passed the thresholds'}")
    for point in measured.points if measured is not None else ():
        deltas = ", ".join(f"{name} {m.delta:+.4g} ± {m.error:.2g}" for name, m in point.metrics.items())
        print(f"held out: {point.heads} heads at strength {point.strength:g}: {deltas}")
    print("\n".join(files.values()))


def _teller(given: argparse.Namespace) -> Callable[[Progress], None] | None:
    """Shows the progress of the first process: a bar on a terminal, else now and then a line."""
    from ..search.ranks import Ranks

    if given.json or (Ranks.local() or 0) > 0:
        return None
    last = 0.0

    def tell(now: Progress) -> None:
        nonlocal last
        left = "" if now.seconds_left is None else f", {_duration(now.seconds_left)} left"
        line = f"{now.what}: {now.done} of {now.total} pictures{left}"
        if sys.stderr.isatty():
            end = "\n" if now.done == now.total else ""
            print(f"\r\033[K{line}", end=end, file=sys.stderr, flush=True)
        elif time.monotonic() - last > EVERY or now.done == now.total:
            last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return tell


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
