"""What the model says where a sample is asked alone and not in a batch, and how many answers that changes.

Rounding depends on the shapes of a batch, and where two words are almost equally likely it decides. What was said
alone is kept in ``verified.json`` beside the answers and under the same keys, so that later reports know it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SteeringError
from .answered import Answered
from .files import put
from .store import Key
from .tasks import Task

FILE = "verified.json"


def keep(folder: Path, said: Mapping[Key, str]) -> None:
    """Write what was said alone, beside what is there already."""
    lines = [{**key._asdict(), "output": text} for key, text in sorted({**_read(folder), **said}.items())]
    put(folder / FILE, ("[" + ",\n".join(map(json.dumps, lines)) + "]\n").encode())


def verified(comparison: Answered) -> dict[str, Any]:
    """For each task how many answers of each method change, and under "samples" of how many; {} where nothing is known.

    Samples count that every method which was asked again was asked about.
    """
    said, flips, sizes = _read(comparison.answers.folder), dict[str, Any](), dict[str, int]()
    for task in comparison.tasks if said else ():
        found = {label: changed for label, changed in _changed(comparison, task, said).items() if changed}
        both = set.intersection(*map(set, found.values())) if found else set()
        if both:
            flips[task.name] = {label: sum(changed[name] for name in both) for label, changed in found.items()}
            sizes[task.name] = len(both)
    return {**flips, "samples": sizes} if flips else {}


def _changed(comparison: Answered, task: Task, said: Mapping[Key, str]) -> dict[str, dict[str, bool]]:
    """By method and sample, where both answers are there, whether they differ."""
    known, found = comparison.answers.answers, dict[str, dict[str, bool]]()
    for method in comparison.methods:
        keys = {sample.id: comparison.key(task, sample, method) for sample in task.samples}
        there = {name: key for name, key in keys.items() if key in said and key in known}
        found[method.label] = {name: said[key] != known[key]["output"] for name, key in there.items()}
    return found


def _read(folder: Path) -> dict[Key, str]:
    try:
        lines = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return {Key(*(line[name] for name in Key._fields)): line["output"] for line in lines}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise SteeringError(f"{folder / FILE} is not what --verify-batch writes: remove it.") from error
