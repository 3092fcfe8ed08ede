"""Answers in a file, one JSON line for each (task, sample, method), as soon as they are given.

``answers-0.jsonl`` (one file for each process)::

    {"run": "5f1c...", "settings": {...}}
    {"run": "5f1c...", "task": "chair", "sample": "lonely-0003", "of": "9a2e...", "method": "77b0...", "prompt": ...,
     "output": ..., "tokens": [...], "finish": "stop", "counts": {...}}

``run`` is a hash of the model, the generation settings and the way of counting, ``of`` of picture, question and truth,
``method`` of the processors: lines of anything else are left alone and never used. A line with ``"error"`` instead of
an answer says what failed; the next start tries it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SteeringError
from ..lines import Lines, identity, whole_lines
from ..plain import short

Entry = dict[str, Any]


class Key(NamedTuple):
    """Whose answer to what, under which settings."""

    run: str
    task: str
    sample: str
    of: str
    method: str


class Answers:
    """All answers known so far, of all processes; new ones go to the file of this process.

    Args:
        folder: where the files are; made if it is missing.
        rank: number of this process; None only reads.

    Raises:
        SteeringError: another process writes to the file of this one, or a line is no answer.
    """

    def __init__(self, folder: Path, rank: int | None = 0):
        self.folder = folder
        self.answers: dict[Key, Entry] = {}
        self.errors: dict[Key, str] = {}
        self._runs: set[str] = set()
        self._file: Lines | None = None
        if rank is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = Lines(folder / f"answers-{rank}.jsonl", "comparison")
        self.reload()

    def reload(self) -> None:
        """Read what all processes have written."""
        for file in sorted(self.folder.glob("answers-*.jsonl")):
            for entry in _entries(file):
                if "settings" in entry:
                    self._runs.add(entry["run"])
                else:
                    self._know(entry)

    def begin(self, settings: Mapping[str, Any]) -> str:
        """The hash of settings, after noting them."""
        run = identity(settings)
        if run not in self._runs:
            self._runs.add(run)
            self._write([{"run": run, "settings": dict(settings)}])
        return run

    def add(self, entries: Sequence[Entry]) -> None:
        """Keep answers and errors, on the disk before this returns; what is known already is not written again."""
        new = [entry for entry in entries if _key(entry) not in self.answers]
        self._write(new)
        for entry in new:
            self._know(entry)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _know(self, entry: Entry) -> None:
        key = _key(entry)
        if "error" in entry:
            if key not in self.answers:
                self.errors[key] = entry["error"]
        else:
            self.answers.setdefault(key, entry)
            self.errors.pop(key, None)

    def _write(self, entries: Sequence[Entry]) -> None:
        if self._file is not None and entries:
            self._file.add(entries)


def _key(entry: Mapping[str, Any]) -> Key:
    return Key(*(str(entry[name]) for name in Key._fields))


def _entries(file: Path) -> Iterator[Entry]:
    """Every whole line of a file."""
    for number, line in whole_lines(file):
        try:
            entry = json.loads(line)
            if "settings" not in entry:
                _key(entry)
                if "error" not in entry:
                    _ = entry["output"], entry["finish"], dict(entry["counts"])
            else:
                _ = entry["run"]
        except (ValueError, KeyError, TypeError, AttributeError):
            shown = short(line.decode(errors="replace"))
            raise SteeringError(f"{file}, line {number}: {shown} is no answer: remove this line or the file.") from None
        yield entry
