"""POPE from files: which answer belongs to which question.

Files are matched line by line in most scripts, so one missing answer shifts all others unseen. Here question_ids are
used where both files have the same ones, numbers of lines have to agree elsewhere, and where both files tell the object
asked about, it has to be the same.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import SteeringError
from . import files, yesno
from .files import LineError, Rows
from .objects import image_id
from .scored import Scored, each, nothing

_OBJECT = re.compile(r"\bis there an? (.+?) in the ima?n?ge", re.IGNORECASE)  # the first release says "imange"


def score_yes_no(labels: Rows, answers: Rows, rule: str = "pope") -> Scored:
    """Yes/no answers against a file of questions with labels.

    By question_id where both files have the same ones, else line by line; where both tell the object asked about, it
    has to be the same.

    Raises:
        SteeringError: files that do not belong together, no such rule, or no line can be used.
    """
    yesno.read("", True, rule)  # says what is wrong with the rule before anything else
    labels, answers = _unfolded(labels), _unfolded(answers)
    wanted = dict(each(labels, lambda row: (files.truth(row), row)))
    counted, plain = [], []
    for place, position in _matched(labels, answers):
        row = answers.rows[position]
        if place not in wanted or row is None:
            continue
        label, question = wanted[place]
        _same_question(labels, place, answers, position)
        try:
            text = files.string(row, files.ANSWER)
        except LineError as error:
            answers.drop(position, str(error))
            continue
        group = image_id(question.get("image", question.get("image_id", place)))
        counted.append(yesno.read(text, label, rule, group))
        plain.append({"question": place + 1, **asdict(counted[-1])})
    if not counted:
        raise nothing(answers)
    keys: list[Hashable] = list(dict.fromkeys(answer.group for answer in counted))
    problems = labels.problems + answers.problems
    return Scored(yesno.ratios(counted), keys, yesno.counts(counted), plain, problems=problems)


def of_category(questions: Rows, answers: Rows, category: str) -> Rows:
    """The answers to the questions of one category, in the order of the file of questions, matched by question_id: how
    one file of LLaVA's answers is divided into POPE's splits.

    Raises:
        SteeringError: no question has this category.
    """
    by_number = {str(row["question_id"]): position for position, row in answers if "question_id" in row}
    found = Rows(answers.path, problems=answers.problems)
    for position, row in questions:
        if row.get("category") != category:
            continue
        place = by_number.get(str(row.get("question_id")))
        found.rows.append(None if place is None else answers.rows[place])
        found.places.append(questions.places[position] if place is None else answers.places[place])
        if place is None:
            found.problems.append(f"{answers.path}: has no answer to question {row.get('question_id')}")
    if not found.rows:
        raise SteeringError(f"{questions.path} has no question of the category {category!r}.")
    return found


def _unfolded(given: Rows) -> Rows:
    """Six questions in one line (lists of texts, labels, answers, as in dialogues) become six lines."""
    if not any(isinstance(row.get(name), list) for _, row in given for name in ("text", "label", "answer")):
        return given
    found = Rows(given.path, problems=given.problems)
    for row, place in zip(given.rows, given.places, strict=True):
        lists = {name: value for name, value in (row or {}).items() if isinstance(value, list)}
        for number in range(max((len(value) for value in lists.values()), default=1)):
            part = {name: value[number] for name, value in lists.items() if number < len(value)}
            found.rows.append(None if row is None else {**{k: v for k, v in row.items() if k not in lists}, **part})
            found.places.append(place)
    return found


def _matched(labels: Rows, answers: Rows) -> list[tuple[int, int]]:
    """(position of the question, position of its answer)."""
    numbers = [[str(row.get("question_id")) for _, row in part if "question_id" in row] for part in (labels, answers)]
    whole = all(len(set(n)) == len(n) == len(part.rows) for n, part in zip(numbers, (labels, answers), strict=True))
    if whole and set(numbers[0]) == set(numbers[1]):
        place = {number: position for position, number in enumerate(numbers[1])}
        return [(position, place[number]) for position, number in enumerate(numbers[0])]
    if len(labels.rows) != len(answers.rows):
        raise SteeringError(
            f"{labels.path} has {len(labels.rows)} questions and {answers.path} {len(answers.rows)} answers: they are "
            "matched line by line unless both have the same question_id."
        )
    return [(position, position) for position in range(len(labels.rows))]


def _same_question(labels: Rows, place: int, answers: Rows, position: int) -> None:
    asked = _asked(labels.rows[place], ("text", "question", "prompt"))
    heard = _asked(answers.rows[position], ("question", "prompt"))
    if asked and heard and asked != heard:
        raise SteeringError(
            f"{answers.path}, {answers.places[position]}, answers about {heard!r}, and its question is about "
            f"{asked!r}: these files do not belong together."
        )


def _asked(row: dict[str, Any] | None, fields: Sequence[str]) -> str:
    texts = [(row or {}).get(name) for name in fields]
    found = next((match for text in texts if isinstance(text, str) and (match := _OBJECT.search(text))), None)
    return found[1].lower() if found else ""
