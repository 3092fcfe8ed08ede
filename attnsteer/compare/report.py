"""Everything that a comparison writes besides its answers; the same answers and seed give the same files."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SteeringError
from . import page, tables
from .answered import Answered
from .files import put
from .looks import Looks
from .plots import plots
from .results import Results

PLAN = "comparison.json"


def write(comparison: Answered, results: Results, folder: Path, looks: Looks | None = None) -> list[Path]:
    """results.json, table.md, table.csv, table.tex, one PNG for each plot, and report.html; gives the files.

    Each is whole at any moment, so several processes may write the same ones.

    Args:
        looks: heat maps of the examples.
    """
    pictures = {}
    for name, picture in plots(results, made_up(comparison)).items():
        file = io.BytesIO()
        picture.save(file, "PNG")
        pictures[name] = file.getvalue()
    contents: dict[str, bytes] = {
        "results.json": (json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode(),
        "table.md": tables.page(results).encode(),
        "table.csv": tables.lines(results).encode(),
        "table.tex": tables.document(results).encode(),
        **{f"{name}.png": content for name, content in pictures.items()},
        "report.html": page.page(comparison, results, pictures, looks).encode(),
    }
    if looks is not None:
        looks.keep()
    for name, content in contents.items():
        put(folder / name, content)
    return [folder / name for name in contents]


def note_samples(comparison: Answered, folder: Path) -> None:
    """samples.json: the ids of what is asked, by task."""
    ids = {task.name: [sample.id for sample in task.samples] for task in comparison.tasks}
    put(folder / "samples.json", (json.dumps(ids, indent=1) + "\n").encode())


def note_plan(comparison: Answered, arguments: Mapping[str, Any], folder: Path) -> None:
    """comparison.json: what the comparison was started with, and under which settings its answers are kept."""
    plan = {"arguments": dict(arguments), "runs": comparison.runs}
    put(folder / PLAN, (json.dumps(plan, indent=1) + "\n").encode())


def planned(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments and, for each task, the hash of settings that ``note_plan`` wrote.

    Raises:
        SteeringError: no comparison was started there.
    """
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        return dict(plan["arguments"]), dict(plan["runs"])
    except FileNotFoundError:
        raise SteeringError(f"{str(folder)!r} holds no {PLAN}: no comparison was started there.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SteeringError(f"{folder / PLAN} is not what a comparison writes: start the comparison again.") from error


def made_up(comparison: Answered) -> dict[str, dict[str, int]]:
    """For every method how often it names each category that is not there, in all tasks with descriptions."""
    found: dict[str, Counter[str]] = {method.label: Counter() for method in comparison.methods}
    for task in comparison.tasks:
        for entries in comparison.complete(task).values():
            for method, entry in zip(comparison.methods, entries, strict=True):
                found[method.label].update(entry["counts"].get("made_up", ()))
    return {label: dict(counts) for label, counts in found.items()}
