"""``attnsteer compare``: methods against the plain model on hallucination benchmarks, with intervals and a report."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SteeringError
from . import models
from .options import command, positive, written

if TYPE_CHECKING:
    from ..compare import Answered, Method, Task

METHODS = ("baseline", "vhr", "var", "gift", "pai", "vaf", "vcd")
"""Compared where the user names none."""
TASKS_WORDS = {"suffix": ""}
"""Defaults of methods that ask in words of their own: all are asked in the task's."""
TASKS = ("chair", "pope")
WORLD = "world-llava"
LIMIT = 200
"""Pictures of the small world where the user sets no limit."""
PLANNED = (
    *("model", "method", "controls", "tasks", "limit", "max_new_tokens", "draws", "seed"),
    *("images", "instances", "captions_gt", "questions", "prompt"),
)
"""Arguments that decide what is asked and counted."""
EVERY = 20.0
"""Seconds between two lines about the progress, where there is no terminal."""


def add(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "compare",
        run,
        "Compare methods on hallucination benchmarks: CHAIR and POPE, on the same pictures, with intervals.",
        [
            "compare",
            "compare --method vhr:alpha=1.5 --method strong=vhr:alpha=3,layers=4:8 --controls random-heads",
            "compare --merge --output outputs/compare",
            "compare --model llava-hf/llava-1.5-7b-hf --images val2014 --instances instances_val2014.json "
            "--captions-gt captions_val2014.json --tasks chair --limit 500",
        ],
    )
    parser.description = (
        f"{parser.description} Without arguments: {WORLD} on scenes against its habits. Every answer is kept as soon as"
        " it is given; a killed comparison goes on where it was when it is started again, and one with more methods"
        " uses the answers that are there. `accelerate launch --multi_gpu -m attnsteer compare ...` (or torchrun) deals"
        " it to several processes; whatever one of them leaves undone, the same command without a launcher finishes."
    )
    add = parser.add_argument
    add("--model", default=WORLD, metavar="MODEL", help=f"folder, hub id or an embedded model (default: {WORLD})")
    form = "baseline, NAME:param=value,param=value, several joined with +, and LABEL= before it to name it (repeatable)"
    add("--method", "--processor", action="append", default=[], metavar="METHOD", help=form)
    control = "random-heads, all-heads, rest-heads: arms of the same strength on other heads, separated by commas"
    add("--controls", type=_listed, default=[], metavar="NAMES", help=control)
    add("--tasks", type=_tasks, default=list(TASKS), metavar="TASKS", help=f"of {','.join(TASKS)} (default: all)")
    add("--limit", type=positive, help=f"pictures of each task (default: all; {LIMIT} of the small world)")
    add("--batch-size", type=positive, default=16, help="samples at once, times the methods (default: 16)")
    tokens = "of an answer (default: 512 for descriptions, 64 of the small world; 32 for questions)"
    add("--max-new-tokens", type=positive, help=tokens)
    add("--draws", type=positive, default=10_000, help="samples of the bootstrap (default: 10000)")
    add("--verify-batch", type=positive, metavar="K", help="ask K samples of each task again, alone: how many change")
    add("--no-maps", action="store_true", help="no heat maps of where the plain model looks in the report's examples")
    merge = "ask nothing: write the report of the comparison started last in --output, of the answers that are there"
    add("--merge", action="store_true", help=merge)
    add("--output", default="outputs/compare", metavar="DIR", help="for answers and report (default: outputs/compare)")
    _add_pictures(parser.add_argument_group("real pictures"))
    parser.set_defaults(unsaid={name: parser.get_default(name) for name in PLANNED})


def _add_pictures(group: Any) -> None:
    add = group.add_argument
    add("--images", type=Path, metavar="DIR", help="pictures, instead of the small world")
    add("--instances", type=Path, metavar="FILE", help="their objects, in COCO's format")
    add("--captions-gt", type=Path, metavar="FILE", help="captions by people, in COCO's format")
    add("--questions", type=Path, action="append", default=[], metavar="FILE", help="POPE's questions (repeatable)")
    add("--prompt", metavar="TEXT", help="what to ask for a description")


def run(given: argparse.Namespace) -> int:
    from ..compare import Answerer, Answers, Comparison, Looks, report
    from ..compare.results import results

    if given.merge:
        return merged(given)
    methods, wanted = arms(given), tasks(given)
    model, processor = models.load(given.model, local_device(given.device), given.dtype)
    if processor is None:
        raise SteeringError(f"{given.model!r} makes pictures: a comparison needs a model that answers questions.")
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = Path(given.output)
    answers = Answers(folder, rank)
    try:
        comparison = Comparison(
            Answerer(model, processor), wanted, methods, answers, given.batch_size, rank, count, _teller(given)
        )
        report.note_samples(comparison, folder)
        report.note_plan(comparison, {name: _plain(getattr(given, name)) for name in PLANNED}, folder)
        comparison.run()
        answers.reload()
        missing = sum(total - done for done, total in map(comparison.there, wanted))
        errors = comparison.errors()
        if missing > len(errors) and count > 1:
            print(f"process {rank} is done; others have {missing} answers left", file=sys.stderr)
            return 1 if errors else 0
        if given.verify_batch:
            comparison.verify(given.verify_batch, given.seed)
        found = results(comparison, given.model, given.seed, given.draws)
        looks = None if given.no_maps else Looks(folder, comparison.answerer)
        files = report.write(comparison, found, folder, looks)
    finally:
        answers.close()
    _say(given, comparison, found, files, errors)
    return 1 if missing else 0


def merged(given: argparse.Namespace) -> int:
    """Write the report of what all processes have answered so far; asks nothing, and gives the same files every time.

    Methods, tasks and settings are those of the comparison that was started last in the folder.

    Raises:
        SteeringError: no comparison was started there, or arguments that it was not started with.
    """
    from ..compare import Answers, Looks, Recorded, report
    from ..compare.results import results

    if given.verify_batch:
        raise SteeringError("--merge asks nothing, so that it cannot take --verify-batch: leave one of them out.")
    folder = Path(given.output)
    arguments, runs = report.planned(folder)
    for name in PLANNED:
        said = _plain(getattr(given, name))
        if said not in (_plain(given.unsaid[name]), arguments.get(name)):
            raise SteeringError(
                f"--{name.replace('_', '-')} is {arguments.get(name)!r} in {str(folder)!r}, so that --merge cannot "
                f"take {said!r}: leave it out."
            )
    as_started = argparse.Namespace(**vars(given) | arguments)
    for name in ("images", "instances", "captions_gt"):
        setattr(as_started, name, Path(arguments[name]) if arguments[name] else None)
    as_started.questions = [Path(file) for file in arguments["questions"]]
    recorded = Recorded(tasks(as_started), arms(as_started), Answers(folder, None), runs)
    missing = sum(total - done for done, total in map(recorded.there, recorded.tasks))
    found = results(recorded, as_started.model, as_started.seed, as_started.draws)
    files = report.write(recorded, found, folder, None if given.no_maps else Looks(folder))
    _say(given, recorded, found, files, recorded.errors())
    if missing:
        print(f"attnsteer: {missing} answers are missing", file=sys.stderr)
    return 1 if missing else 0


def _plain(value: Any) -> Any:
    """An argument as JSON has it; files by their whole path."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value.resolve()) if isinstance(value, Path) else value


def local_device(wanted: str) -> str:
    """The GPU of this process, where there are several processes and the user does not say otherwise."""
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{local}" if several and wanted in ("auto", "cuda") and torch.cuda.is_available() else wanted


# ---- what is compared ------------------------------------------------------------------------------------------------
def arms(given: argparse.Namespace) -> list[Method]:
    """The plain model, methods and controls."""
    from ..compare import with_controls

    methods = [parsed(text, given.model) for text in given.method or METHODS]
    return with_controls(methods, given.controls, given.seed)


def parsed(text: str, model: str = WORLD) -> Method:
    """``pai:alpha=0.5+image-contrast:gamma=1.1`` as a method; ``mine=vhr:alpha=2`` is called mine.

    Raises:
        SteeringError: an unknown processor or parameter, or a value that is not allowed.
    """
    from ..compare import BASELINE, Method

    head, equals, rest = text.partition("=")
    labelled = bool(equals) and ":" not in head and "+" not in head
    label, wanted = (head, rest) if labelled else (text, text)
    if wanted == BASELINE:
        return Method(BASELINE)
    if not label.strip() or not wanted.strip():
        raise SteeringError(f"--method {text!r} is empty: write NAME:param=value or LABEL=NAME:param=value.")
    return Method(label, tuple(written(wanted, model, TASKS_WORDS)))


def tasks(given: argparse.Namespace) -> list[Task]:
    """The tasks with their samples.

    Raises:
        SteeringError: files that are missing, or have nothing to do with each other.
    """
    from ..compare import folders, limited, world

    files = [name for name in ("instances", "captions_gt", "questions") if getattr(given, name)]
    if given.images is None:
        if files:
            raise SteeringError(f"--{files[0].replace('_', '-')} is about pictures: say where they are with --images.")
        made: dict[str, Any] = {"chair": world.describe, "pope": lambda: world.exists(given.seed)}
    else:
        made = {
            "chair": lambda: folders.describe(given.images, given.instances, given.captions_gt),
            "pope": lambda: folders.exists(given.images, given.questions, given.instances, given.seed),
        }
    limit, found = given.limit or (LIMIT if given.images is None else None), []
    for name in given.tasks:
        task = made[name]()
        if given.max_new_tokens:
            task = replace(task, max_new_tokens=given.max_new_tokens)
        if name == "chair" and given.prompt:
            task = replace(task, samples=[replace(sample, prompt=given.prompt) for sample in task.samples])
        found.append(replace(task, samples=limited(task.samples, limit, given.seed)))
    return found


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _tasks(text: str) -> list[str]:
    found = list(dict.fromkeys(_listed(text)))
    wrong = [name for name in found if name not in TASKS]
    if wrong or not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no task: allowed are {', '.join(TASKS)}")
    return found


# ---- what is said ----------------------------------------------------------------------------------------------------
def _teller(given: argparse.Namespace) -> Any:
    """A function that says how far a comparison is: at once on a terminal, now and then elsewhere."""
    last = time.monotonic()

    def tell(task: str, done: int, total: int) -> None:
        nonlocal last
        if given.json:
            return
        line = f"{task}: {done} of {total} answers"
        if sys.stderr.isatty():
            print(f"\r{line}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
        elif time.monotonic() - last > EVERY:
            last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return tell


def _say(given: argparse.Namespace, comparison: Answered, found: Any, files: list[Path], errors: Any) -> None:
    from ..compare import tables

    if given.json:
        print(json.dumps({**found, "files": [str(file) for file in files], "errors": len(errors)}, indent=2))
    else:
        for task in found["tasks"]:
            print(f"\n{tables.TITLES[task]}")
            if found["tasks"][task]["groups"]:
                print(tables.text(*tables.table(found, task)))
            print("\n".join(tables.notes(found, task)))
        print(f"\n{files[-1]}")
    labels = {method.digest: method.label for method in comparison.methods}
    for key, reason in list(errors.items())[:5]:
        print(f"attnsteer: {key.task}, {key.sample}, {labels[key.method]}: {reason}", file=sys.stderr)
    if errors:
        print(f"attnsteer: {len(errors)} answers failed; the same command tries them again", file=sys.stderr)
