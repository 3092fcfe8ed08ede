"""Scores in a file, each as soon as it is known: lines of JSON that survive a kill at any moment.

``scores-0.jsonl`` (one file for each process)::

    {"run": "5f1c...", "settings": {...}}
    {"run": "5f1c...", "set": [[3, 5]], "prompt": "a dog", "seed": 0, "scores": {"judge": 0.81}}

``run`` is a hash of everything that a score depends on besides what stands in its line: lines of other settings are
left alone and never used. A kill in the middle of a write leaves a torn last line, which the next start cuts off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SteeringError
from ..lines import Lines, identity, whole_lines
from ..plain import short
from .hunter import Heads
from .selection import Head

Scores = Mapping[str, float]


class Key(NamedTuple):
    """What was scored: the run's hash, the perturbed heads in the order of the model, the prompt and the seed."""

    run: str
    heads: Heads
    prompt: str
    seed: int


class Store:
    """All scores known so far, of all processes; new ones go to the file of this process.

    Args:
        folder: where the files are; None keeps scores in memory only.
        rank: number of this process.
    """

    def __init__(self, folder: Path | None, rank: int = 0):
        self.folder = folder
        self._known: dict[Key, Scores] = {}
        self._runs: set[str] = set()
        self._file: Lines | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = Lines(folder / f"scores-{rank}.jsonl", "search")
            self.reload()

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def __getitem__(self, key: Key) -> Scores:
        return self._known[key]

    def reload(self) -> None:
        """Read what all processes have written."""
        if self.folder is None:
            return
        for file in sorted(self.folder.glob("scores-*.jsonl")):
            for key, scores in _lines(file):
                if isinstance(key, str):
                    self._runs.add(key)
                else:
                    self._known.setdefault(key, scores)

    def begin(self, settings: Mapping[str, Any]) -> str:
        """The hash of a run, after noting its settings."""
        run = identity(settings)
        if run not in self._runs:
            self._runs.add(run)
            self._write([{"run": run, "settings": settings}])
        return run

    def add(self, found: Sequence[tuple[Key, Scores]]) -> None:
        """Keep scores, on the disk before this returns."""
        self._write(
            [{**key._asdict(), "set": key.heads, "scores": dict(scores)} for key, scores in found if key not in self]
        )
        for key, scores in found:
            self._known.setdefault(key, scores)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, entries: Sequence[dict[str, Any]]) -> None:
        if self._file is None:
            return
        for entry in entries:
            entry.pop("heads", None)
        self._file.add(entries)


def _lines(file: Path) -> Iterator[tuple[Key | str, Scores]]:
    """Every run and every score of a file; what stands behind its last end of line is still being written."""
    for number, line in whole_lines(file):
        try:
            entry = json.loads(line)
            if "settings" in entry:
                yield str(entry["run"]), {}
                continue
            heads = tuple(Head(layer, head) for layer, head in entry["set"])
            scores = {str(name): float(value) for name, value in entry["scores"].items()}
            found = Key(str(entry["run"]), heads, str(entry["prompt"]), int(entry["seed"])), scores
        except (ValueError, KeyError, TypeError, AttributeError):
            shown = short(line.decode(errors="replace"))
            raise SteeringError(f"{file}, line {number}: {shown} is no score: remove this line or the file.") from None
        yield found
