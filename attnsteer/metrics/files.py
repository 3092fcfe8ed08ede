"""Answers and captions from files: JSON lines or one JSON list, plain or .gz, with the field names that are in use.

A line that cannot be used is not skipped in silence: it is named with its number, and its place is kept, because files
of questions and answers are often matched line by line.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SteeringError

IMAGE = ("image_id", "image", "file_name", "filename", "img_id", "id")
CAPTION = ("caption", "answer", "response", "output", "outputs", "prediction", "pred", "text")
ANSWER = ("answer", "response", "output", "outputs", "prediction", "pred", "model_prediction", "text")
LABEL = ("label", "gt_ans", "gt", "ground_truth", "gt_answer")
NUMBER = ("question_id", "id")
"""Names of fields, in the order in which they are looked for; "text" is last, as it may be the question."""


class LineError(ValueError):
    """What is wrong with a line, without its place."""


@dataclass
class Rows:
    """The objects of a file, in order; None where a line was bad. ``problems`` says which and why."""

    path: str
    rows: list[dict[str, Any] | None] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(position, object) of the good ones."""
        return ((number, row) for number, row in enumerate(self.rows) if row is not None)

    def drop(self, position: int, why: str) -> None:
        """This line is bad after all."""
        self.rows[position] = None
        self.problems.append(f"{self.path}: {self.places[position]}: {why}")


def text_of(path: str | Path) -> str:
    """The text of a file; .gz is unpacked.

    Raises:
        SteeringError: it is no text, or no .gz that can be unpacked.
        OSError: it cannot be read.
    """
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            return str(file.read())
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise SteeringError(f"{path} cannot be read as text: {error}.") from error


def document(path: str | Path) -> Any:
    """One JSON document.

    Raises:
        SteeringError: it is none.
    """
    try:
        return json.loads(text_of(path))
    except json.JSONDecodeError as error:
        raise SteeringError(f"{path} is not JSON: line {error.lineno}: {error.msg}.") from error


def rows(path: str | Path) -> Rows:
    """The objects of a file of JSON lines, or of one JSON list of objects. Empty lines are none.

    Raises:
        SteeringError: a list that is no JSON.
    """
    text, found = text_of(path), Rows(str(path))
    if text.lstrip().startswith("["):
        for number, entry in enumerate(document(path), start=1):
            _add(found, f"entry {number}", entry)
        return found
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            _add(found, f"line {number}", json.loads(line))
        except json.JSONDecodeError as error:
            _add(found, f"line {number}", error)
    return found


def _add(found: Rows, place: str, entry: Any) -> None:
    found.rows.append(entry if isinstance(entry, dict) else None)
    found.places.append(place)
    if not isinstance(entry, dict):
        why = f"not JSON ({entry.msg})" if isinstance(entry, json.JSONDecodeError) else "no JSON object"
        found.problems.append(f"{found.path}: {place}: {why}")


def first(row: dict[str, Any], fields: Sequence[str]) -> Any:
    """The value of the first of these fields that the row has.

    Raises:
        LineError: it has none.
    """
    for name in fields:
        if row.get(name) is not None:
            return row[name]
    raise LineError(f"has none of the fields {', '.join(fields)}")


def string(row: dict[str, Any], fields: Sequence[str]) -> str:
    """The same where a text is wanted.

    Raises:
        LineError: there is none, or it is no text.
    """
    value = first(row, fields)
    if not isinstance(value, str):
        raise LineError(f"{next(name for name in fields if row.get(name) is not None)} is {value!r} and no text")
    return value


def strings(row: dict[str, Any], name: str) -> list[str]:
    """The same for a list of words.

    Raises:
        LineError: there is none, or it holds something else.
    """
    value = first(row, (name,))
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise LineError(f"{name} is no list of words")
    return value


def truth(row: dict[str, Any]) -> bool:
    """Whether the true answer is yes: "yes", "no", 1, 0, true, false.

    Raises:
        LineError: it is none of these.
    """
    value = first(row, LABEL)
    known = {"yes": True, "no": False, "1": True, "0": False, "true": True, "false": False}
    if str(value).strip().lower() not in known:
        raise LineError(f"the label is {value!r} where yes or no is wanted")
    return known[str(value).strip().lower()]
