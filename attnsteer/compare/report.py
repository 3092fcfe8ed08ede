"""Everything that a comparison writes besides its answers; the same answers and seed give the same files."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

from . import page, tables
from .answered import Answered
from .files import put
from .looks import Looks
from .plots import plots
from .results import Results


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


def made_up(comparison: Answered) -> dict[str, dict[str, int]]:
    """For every method how often it names each category that is not there, in all tasks with descriptions."""
    found: dict[str, Counter[str]] = {method.label: Counter() for method in comparison.methods}
    for task in comparison.tasks:
        for entries in comparison.complete(task).values():
            for method, entry in zip(comparison.methods, entries, strict=True):
                found[method.label].update(entry["counts"].get("made_up", ()))
    return {label: dict(counts) for label, counts in found.items()}
