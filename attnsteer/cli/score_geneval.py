"""``attnsteer score geneval``: GenEval over detections from a file, or of the small world's judge."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SteeringError
from . import tables
from .options import finite

if TYPE_CHECKING:
    from ..metrics.files import Rows
    from ..metrics.pictures.geneval import Rules
    from ..metrics.pictures.geneval_files import Table
    from ..world.judge import Judge

EMBEDDED = "the embedded one"
"""Instead of a judge's folder."""


def add(commands: Any) -> None:
    parser = tables.benchmark(
        commands,
        "geneval",
        run,
        "GenEval: share of pictures with the objects, numbers, colours and places of their prompts, from detections.",
        [
            "score geneval --detections detections.jsonl --metadata evaluation_metadata.jsonl",
            "score geneval --detections steered.jsonl --against plain.jsonl --json",
            "score geneval --images outputs/geneval --judge",
        ],
    )
    add = parser.add_argument
    line = '{"image": "00000/samples/0000.png", "detections": [{"class": "dog", "box": [0, 0, 9, 9], "score": 0.9}]}'
    add("--detections", metavar="FILE", help=f"JSON lines or a JSON list, also .gz: {line}")
    add("--metadata", metavar="FILE", help="what the prompts ask for, where the lines of --detections do not say it")
    add("--images", metavar="DIR", help="instead: pictures in GenEval's folders, for --judge to look at")
    add("--against", metavar="FILE|DIR", help="the other run, for paired differences with intervals")
    add_judge(parser)
    add("--write-detections", metavar="FILE", help="keep what the judge saw in --images, as JSON lines")
    add("--score", type=finite, metavar="S", help="boxes must be surer (default: 0.3; of the judge: 0)")
    add("--counting-score", type=finite, metavar="S", help="for the tag counting (default: 0.9; of the judge: 0)")
    add(
        "--overlap", type=finite, default=1.0, metavar="IOU", help="suppress boxes that overlap so much (default: none)"
    )


def add_judge(parser: argparse.ArgumentParser) -> None:
    help = "the small world's judge looks for categories and frames; DIR: another judge than the embedded one"
    parser.add_argument("--judge", nargs="?", const=EMBEDDED, metavar="DIR", help=help)


def load_judge(given: argparse.Namespace) -> Judge:
    """The judge of ``--judge``."""
    from ..world.judge import Judge
    from .models import placement

    place, _ = placement(given.device, given.dtype)
    return Judge.load(None if given.judge == EMBEDDED else given.judge, place)


def run(given: argparse.Namespace) -> int:
    from ..digests import weights_of
    from ..metrics import files
    from ..metrics.pictures import geneval_files

    if bool(given.detections) == bool(given.images):
        raise SteeringError("Detections come from --detections, or from --images with --judge: give one of them.")
    if bool(given.images) != bool(given.judge):
        raise SteeringError("--images and --judge go together: the judge looks at the pictures.")
    if (given.images and given.metadata) or (given.detections and given.write_detections):
        raise SteeringError("--metadata is for --detections, and --write-detections for --images.")
    prompts, problems, rules = [], [], _rules(given)
    if given.metadata:
        lines = files.rows(given.metadata)
        prompts, problems = geneval_files.requests(lines), lines.problems
    judge = load_judge(given) if given.judge else None
    rows = _rows(judge, given.detections or given.images)
    theirs = _rows(judge, given.against) if given.against else None
    if given.write_detections:
        text = "".join(json.dumps(row) + "\n" for _, row in rows)
        Path(given.write_detections).write_text(text, encoding="utf-8")
    parts = geneval_files.score(rows, prompts, rules)
    others = geneval_files.score(theirs, prompts, rules) if theirs else None
    ours = parts
    if others:
        ours, others, single = _common(parts, others)
        problems += single
    extra = geneval_files.totals(ours)
    if others:
        extra |= {f"against_{name}": value for name, value in geneval_files.totals(others).items()}
    settings: dict[str, Any] = {"detector": f"the small world's judge, {given.judge}" if judge else "given"}
    settings |= {"weights": weights_of(judge.network)} if judge else {}
    settings |= {"score": rules.score, "counting_score": rules.counting, "overlap": rules.overlap}
    return tables.report(given, settings, parts, others, extra, problems)


def _common(ours: Table, theirs: Table) -> tuple[Table, Table, list[str]]:
    """What both runs have scores of, and the problem that one of them has more.

    Raises:
        SteeringError: they have no tag in common.
    """
    both = [tag for tag in ours if tag in theirs]
    if not both:
        raise SteeringError("The two runs have no tag in common: compare pictures of the same prompts.")
    single = [tag for tag in (*ours, *theirs) if tag not in both]
    problems = [f"the tag {tag} has scores in one of the two runs only: the totals leave it out" for tag in single]
    return {tag: ours[tag] for tag in both}, {tag: theirs[tag] for tag in both}, problems


def _rules(given: argparse.Namespace) -> Rules:
    from ..metrics.pictures import judged
    from ..metrics.pictures.geneval import Rules

    base = judged.RULES if given.judge else Rules()
    score = base.score if given.score is None else given.score
    counting = base.counting if given.counting_score is None else given.counting_score
    return Rules(score, counting, overlap=given.overlap)


def _rows(judge: Judge | None, path: str) -> Rows:
    """Lines of detections from a file, or of the judge from a folder."""
    from ..metrics import files
    from ..metrics.pictures.geneval_files import line
    from ..metrics.pictures.judged import detections
    from .folders import read
    from .generate import load_picture

    if judge is None:
        return files.rows(path)
    folder, found = read(Path(path), None), files.Rows(path)
    found.problems += folder.problems
    for pictures in folder.pictures.values():
        seen = detections(judge, [load_picture(str(each.file)) for each in pictures])
        for each, boxes in zip(pictures, seen, strict=True):
            name = str(each.file.relative_to(path))
            found.rows.append(line(name, each.request, boxes))
            found.places.append(name)
    return found
