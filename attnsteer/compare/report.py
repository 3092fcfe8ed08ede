"""Everything that a comparison writes besides its answers; the same answers and seed give the same files."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path

from . import page, tables
from .plots import plots
from .results import Results, complete
from .run import Comparison


def write(comparison: Comparison, results: Results, folder: Path) -> list[Path]:
    """results.json, table.md, table.csv, table.tex, one PNG for each plot, and report.html; gives the files.

    Each is whole at any moment, so several processes may write the same ones.
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
        "report.html": page.page(comparison, results, pictures).encode(),
    }
    for name, content in contents.items():
        put(folder / name, content)
    return [folder / name for name in contents]


def note_samples(comparison: Comparison, folder: Path) -> None:
    """samples.json: the ids of what is asked, by task."""
    ids = {task.name: [sample.id for sample in task.samples] for task in comparison.tasks}
    put(folder / "samples.json", (json.dumps(ids, indent=1) + "\n").encode())


def made_up(comparison: Comparison) -> dict[str, dict[str, int]]:
    """For every method how often it names each category that is not there, in all tasks with descriptions."""
    found: dict[str, Counter[str]] = {method.label: Counter() for method in comparison.methods}
    for task in comparison.tasks:
        for entries in complete(comparison, task).values():
            for method, entry in zip(comparison.methods, entries, strict=True):
                found[method.label].update(entry["counts"].get("made_up", ()))
    return {label: dict(counts) for label, counts in found.items()}


def put(file: Path, content: bytes) -> None:
    """Write a file that is never seen half-written."""
    half = file.with_name(f".{file.name}.{os.getpid()}")
    half.write_bytes(content)
    half.replace(file)
