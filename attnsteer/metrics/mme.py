"""MME: two yes/no questions about every image, in 14 subtasks.

Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models", 2023, arXiv:2306.13394.
For a subtask:

    acc = right answers / questions      acc_plus = images with both right / images      score = 100 acc + 100 acc_plus

Perception (ten subtasks, at most 2000) and Cognition (four, at most 800) are sums of scores; papers on hallucination
show existence, count, position and color (at most 800). Questions are paired by image: a missing line shifts every
later pair where one counts lines, so an image without its two questions is an error here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import SteeringError
from .ratios import Ratio, mean_of

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUMS = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination": HALLUCINATION}


@dataclass(frozen=True)
class Question:
    """One question: its subtask, image, text, true answer ("yes" or "no") and what was said."""

    task: str
    image: str
    text: str
    label: str
    said: str

    @property
    def right(self) -> bool:
        return read(self.said) == self.label.strip().lower()


def read(text: str) -> str:
    """ "yes", "no" or "other": in lower case, exactly one of them, else what the first four characters contain."""
    lowered = text.lower()
    if lowered in ("yes", "no"):
        return lowered
    return next((word for word in ("yes", "no") if word in lowered[:4]), "other")


def line(task: str, text: str) -> Question:
    """A line of a results file, tab-separated: image, question, truth, answer.

    Raises:
        ValueError: it has not these four parts, or the truth is neither yes nor no.
    """
    parts = text.rstrip("\r\n").split("\t")
    if len(parts) != 4:
        raise ValueError(f"{len(parts)} parts between tabs where image, question, truth and answer are wanted")
    if parts[2].strip().lower() not in ("yes", "no"):
        raise ValueError(f"the truth is {parts[2]!r} where Yes or No is wanted")
    return Question(task, *parts)


def ratios(questions: Sequence[Question]) -> dict[str, Ratio]:
    """ "acc" and "acc_plus" of one subtask, one sample an image.

    Raises:
        SteeringError: an image has not two questions.
        ValueError: no questions.
    """
    images: dict[str, list[bool]] = {}
    for question in questions:
        images.setdefault(question.image, []).append(question.right)
    odd = [f"{image} ({len(found)})" for image, found in images.items() if len(found) != 2]
    if odd:
        some = ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
        raise SteeringError(f"Images of {questions[0].task} without exactly two questions: {some}.")
    counts = [sum(found) for found in images.values()]
    return {"acc": Ratio(counts, [2] * len(counts)), "acc_plus": mean_of(count == 2 for count in counts)}


def by_task(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """The questions of every subtask."""
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(question.task, []).append(question)
    return found


def scores(questions: Iterable[Question]) -> dict[str, float]:
    """The score of every subtask, 0 to 200, and the sums that are complete: perception, cognition, hallucination."""
    found = {}
    for task, asked in by_task(questions).items():
        table = ratios(asked)
        found[task] = 100 * table["acc"].value + 100 * table["acc_plus"].value
    sums = {name: sum(found[task] for task in tasks) for name, tasks in SUMS.items() if set(tasks) <= set(found)}
    return found | sums
