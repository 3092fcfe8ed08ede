"""``attnsteer score pictures``: agreement with the prompts, consistency, diversity, and distance to another run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SteeringError
from . import tables
from .score_geneval import EMBEDDED, add_judge, load_judge

if TYPE_CHECKING:
    from ..metrics.pictures.measures import Changed, Measure, Metric, Shown
    from .folders import Folder, Found

NEEDED = {
    "clip": ("clip_cosine", "clip_score", "full_prompt", "minimum_object", "clip_i", "clip_diversity"),
    "blip": ("text_text",),
    "dino": ("dino", "dino_diversity"),
    "lpips": ("lpips_diversity",),
    "pickscore": ("pickscore",),
    "hps": ("hps",),
    "aesthetic": ("aesthetic",),
    "judge": ("objects", "all_objects", "only_objects"),
}
"""Options without which metrics are skipped. Nothing takes the place of a model that was not named."""


def add(commands: Any) -> None:
    parser = tables.benchmark(
        commands,
        "pictures",
        run,
        "Metrics of generated pictures: agreement with the prompts, consistency, diversity, distance to another run.",
        [
            "score pictures --prompts prompts.txt --images outputs/generate --judge",
            "score pictures --prompts prompts.txt --images outputs/generate --variant strength=0.5 "
            "--baseline outputs/generate --baseline-variant plain --clip openai/clip-vit-base-patch16",
            "score pictures --images outputs/geneval --clip openai/clip-vit-base-patch16 "
            "--blip Salesforce/blip-image-captioning-base --dino facebook/dino-vits16 --json",
        ],
    )
    add = parser.add_argument
    lines = 'a prompt a line, or JSON lines {"prompt": ..., "set": ...} where pictures of a set show one subject'
    add("--prompts", metavar="FILE", help=f"{lines}; GenEval's folders bring their own")
    layouts = "pictures as `attnsteer generate` names them, in one folder a prompt (its name), or in GenEval's folders"
    add("--images", required=True, metavar="DIR", help=layouts)
    add("--variant", metavar="NAME", help="which of the variants that `attnsteer generate` wrote")
    add("--baseline", metavar="DIR", help="the other run, for paired differences, win rates and the size of the change")
    add("--baseline-variant", metavar="NAME", help="which of its variants")
    add("--masks", metavar="DIR", help="where the subjects are: pictures of the same names, white on the subject")
    add("--baseline-masks", metavar="DIR", help="the same for the pictures of --baseline")
    add("--noise-seed", type=int, default=0, help="of the background that subjects get (default: 0)")
    _add_models(parser)


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models: folders or hub ids; what needs one that is not named is skipped")
    add = group.add_argument
    add("--clip", metavar="MODEL", help="agreement, CLIP-I and diversity by a CLIP model; its name is in the report")
    add("--blip", metavar="MODEL", help="a BLIP captioner, for the text-text similarity; needs --clip")
    add("--dino", metavar="MODEL", help="consistency and diversity by a DINO, DINOv2 or DINOv3 model")
    add("--lpips", choices=("alex", "vgg", "squeeze"), help="diversity and change by LPIPS (package lpips)")
    add("--pickscore", metavar="MODEL", help="PickScore v1, e.g. yuvalkirstain/PickScore_v1")
    add("--hps", metavar="MODEL", help="HPS v2 or v2.1 in the format of transformers' CLIP")
    add("--aesthetic", nargs=2, metavar=("CLIP", "HEAD"), help="LAION's aesthetic predictor on CLIP ViT-L/14")
    literal = "templates and parts of prompts to the letter as Attend-and-Excite's code makes them"
    add("--literal", action="store_true", help=f"{literal} (differs for words such as apple and zebra)")
    add_judge(parser)


def run(given: argparse.Namespace) -> int:
    from . import folders

    _check(given)
    asked = folders.prompts(given.prompts) if given.prompts else None
    ours = folders.read(Path(given.images), asked, given.variant)
    theirs = folders.read(Path(given.baseline), asked, given.baseline_variant) if given.baseline else None
    problems = [*ours.problems, *(theirs.problems if theirs else ())]
    lpips = _lpips(given)
    measures = _measures(given, lpips)
    found = _looked(ours, given.images, given.masks, measures, problems)
    notes = [note for measure in measures for note in measure.notes]
    others: dict[str, Metric] = {}
    if theirs:
        others = _looked(theirs, given.baseline, given.baseline_masks, _measures(given, lpips), problems)
        found |= _changes(ours, theirs, lpips, problems)
    skipped = {name: f"needs --{option}" for option, names in NEEDED.items() if not getattr(given, option)
               for name in names}  # fmt: skip
    skipped |= {name: _why(name) for measure in measures for name in measure.without}
    return _report(given, found, others, skipped, notes, problems)


def _check(given: argparse.Namespace) -> None:
    if given.blip and not given.clip:
        raise SteeringError("--blip only makes captions; --clip compares them with the prompts: give both.")
    idle = [name for name in ("variant", "masks") if getattr(given, f"baseline_{name}") and not given.baseline]
    if idle:
        raise SteeringError(f"--baseline-{idle[0]} is about the pictures of --baseline: give that too.")
    if given.dtype not in ("auto", "float32"):
        raise SteeringError(f"--dtype {given.dtype}: scores are made in float32.")


def _why(name: str) -> str:
    """Why a metric has no value although its model is there."""
    if name.endswith("_subject"):
        return "needs --masks, and sets of two pictures"
    if name.endswith("_diversity"):
        return "needs two pictures of a prompt"
    return "no prompt is of that kind" if name in ("minimum_object", *NEEDED["judge"]) else "needs sets of two pictures"


# ---- measuring -------------------------------------------------------------------------------------------------------
def _lpips(given: argparse.Namespace) -> Any:
    from ..metrics.pictures.extractors import Lpips
    from .models import placement

    return Lpips(given.lpips, placement(given.device, given.dtype)[0]) if given.lpips else None


def _measures(given: argparse.Namespace, lpips: Any) -> list[Measure]:
    from ..digests import weights_of
    from ..metrics.pictures import pixels
    from ..metrics.pictures.encoders import Encoders
    from ..metrics.pictures.extractors import Captioner, Dino
    from ..metrics.pictures.measures import Alike, Clip, Distances, Present
    from .models import placement

    place, _ = placement(given.device, given.dtype)
    found: list[Measure] = [Distances(pixels.rms, "rms_diversity", "RMS distance (pixels in 0..1)", {})]
    if given.clip:
        captions = Captioner(given.blip, place) if given.blip else None
        found.append(Clip(Encoders(given.clip, given.clip, place), captions, given.literal, given.noise_seed))
    if given.dino:
        encoder = Dino(given.dino, place)
        found.append(Alike(encoder, encoder.name, f"{encoder.name}_diversity", given.noise_seed))
    if lpips is not None:
        found.append(Distances(lpips, "lpips_diversity", "LPIPS", lpips.described))
    found += _scores(given, place)
    if given.judge:
        judge = load_judge(given)
        name = "world-judge" if given.judge == EMBEDDED else given.judge
        found.append(Present(judge, {"checkpoint": name, "weights": weights_of(judge.network), "dtype": "float32"}))
    return found


def _scores(given: argparse.Namespace, place: Any) -> list[Measure]:
    from ..metrics.pictures.measures import Each
    from ..search import HPS, Aesthetic, PickScore

    named: list[tuple[Any, str]] = []
    if given.pickscore:
        named.append((PickScore(given.pickscore, device=place), "exp(logit scale) cosine"))
    if given.hps:
        named.append((HPS(given.hps, device=place), "cosine"))
    if given.aesthetic:
        clip, head = given.aesthetic
        named.append((Aesthetic(clip, head, place), "linear head on the embedding"))
    return [Each(score, score.name, scale, {**score.settings, **score.encoders.described}) for score, scale in named]


def _looked(
    folder: Folder, root: str, masks: str | None, measures: Sequence[Measure], problems: list[str]
) -> dict[str, Metric]:
    """All metrics of a folder by name; each is made from the pictures of one prompt after the other."""
    from .generate import load_picture

    for pictures in folder.pictures.values():
        shown = [_masked(each, root, masks, problems) for each in pictures]
        opened = [load_picture(str(each.file)) for each in pictures]
        for measure in measures:
            try:
                measure.look(shown, opened)
            except SteeringError:
                raise
            except ValueError as error:
                raise SteeringError(f"The pictures of {shown[0].prompt!r} cannot be measured: {error}") from error
    return {metric.name: metric for measure in measures for metric in measure.metrics()}


def _masked(found: Found, root: str, masks: str | None, problems: list[str]) -> Shown:
    """What a picture shows, with its mask where there is one."""
    import numpy as np

    from .generate import load_picture

    if not masks:
        return found.shown
    file = (Path(masks) / found.file.relative_to(root)).with_suffix(".png")
    if not file.exists():
        problems.append(f"{found.file}: there is no mask {file}")
        return found.shown
    return replace(found.shown, mask=np.asarray(load_picture(str(file)).convert("L")) >= 128)


def _changes(ours: Folder, theirs: Folder, lpips: Any, problems: list[str]) -> dict[str, Metric]:
    """The distances to the pictures of the other run."""
    from ..metrics.pictures.measures import Changed
    from .generate import load_picture

    changed: Changed = Changed(lpips)
    single = 0
    for mine, other in _pairs(ours, theirs):
        if mine is None or other is None:
            single += 1
            continue
        try:
            changed.look([mine.shown], [load_picture(str(mine.file))], [load_picture(str(other.file))])
        except ValueError as error:
            raise SteeringError(f"{mine.file} and {other.file}: {error}") from error
    if single:
        problems.append(f"{single} pictures are in one of the two runs only, and not compared")
    found = {metric.name: metric for metric in changed.metrics()}
    if not found:
        raise SteeringError("The two runs have no prompt and seed in common: compare pictures of the same ones.")
    return found


def _pairs(ours: Folder, theirs: Folder) -> Iterator[tuple[Found | None, Found | None]]:
    mine, other = (
        {(each.shown.prompt, each.shown.seed): each for pictures in folder.pictures.values() for each in pictures}
        for folder in (ours, theirs)
    )
    return ((mine.get(key), other.get(key)) for key in dict.fromkeys([*mine, *other]))


# ---- report ----------------------------------------------------------------------------------------------------------
def _report(
    given: argparse.Namespace,
    found: Mapping[str, Metric],
    others: Mapping[str, Metric],
    skipped: Mapping[str, str],
    notes: Sequence[str],
    problems: Sequence[str],
) -> int:
    from ..metrics.pictures import summary

    drawn = {"draws": given.draws, "level": given.level, "seed": given.seed}
    rows = {name: summary.summarised(metric, **drawn) for name, metric in found.items()}
    for name, metric in others.items():
        effect = summary.difference(found[name], metric, **drawn) if name in found else None
        if effect is not None:
            rows[name]["difference"] = effect
    names = ("images", "variant", "masks", "baseline", "baseline_variant", "baseline_masks")
    settings = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    settings |= {"noise_seed": given.noise_seed, "literal": given.literal}
    bad = list(dict.fromkeys(problems))
    if given.records:
        lines = [json.dumps(row) + "\n" for row in summary.records(found)]
        Path(given.records).write_text("".join(lines), encoding="utf-8")
    if given.json:
        whole = {"benchmark": given.benchmark, "settings": settings, "bootstrap": drawn, "metrics": rows}
        whole |= {"skipped": dict(skipped), "notes": list(notes), "bad_lines": len(bad), "problems": bad}
        print(json.dumps(whole, indent=2))
    else:
        print(f"{given.benchmark}: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
        print(_table(rows, given.level))
        for why in dict.fromkeys(skipped.values()):
            print(f"skipped, {why}: {', '.join(name for name in skipped if skipped[name] == why)}")
        for note in notes:
            print(note)
    return tables.complain(given, bad)


def _table(rows: Mapping[str, Mapping[str, Any]], level: float) -> str:
    from ..compare.tables import text

    headings = ["metric", "value", f"{100 * level:g} %", "images", "prompts"]
    compared = any("difference" in row for row in rows.values())
    headings += ["difference", "p", "wins"] if compared else []
    lines = []
    for name, row in rows.items():
        line = [name, f"{row['value']:.4f}", _interval(row, ".4f"), str(row["images"]), str(row["prompts"])]
        effect = row.get("difference")
        if compared:
            line += _effect(effect) if effect else ["", "", ""]
        lines.append([*line, row["backbone"].get("checkpoint", "no model"), row["scale"]])
    return text([*headings, "backbone", "scale"], lines)


def _effect(effect: Mapping[str, Any]) -> list[str]:
    change = f"{effect['delta']:+.4f} {_interval(effect, '+.4f')}"
    return [change, f"{effect['p']:.4f}", f"{100 * effect['win_rate']:.1f} %"]


def _interval(row: Mapping[str, Any], form: str) -> str:
    return f"[{row['low']:{form}}, {row['high']:{form}}]"
