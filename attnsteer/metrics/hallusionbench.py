"""HallusionBench: yes/no questions about charts, maps, illusions and the same pictures edited.

Guan et al., "HallusionBench", CVPR 2024, arXiv:2310.14566. Three accuracies, from its authors' file:

    a_acc = questions answered rightly                             (1,129; published LLaVA-1.5: 530 of them, 46.94 %)
    q_acc = questions answered rightly about each of their images  (455 groups: category, subcategory, set, question)
    f_acc = images with all of their questions right               (346 groups: category, subcategory, set, figure;
                                                                    VS questions without an image are in none)

The published numbers were judged by GPT-4 against "gt_answer_details" (0 wrong, 1 right, 2 unclear; unclear is right
for VS questions without an image). Without a judge, answers are read as yes or no (``attnsteer.metrics.yesno``), which
is another measurement: the result names it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import yesno
from .ratios import Ratio

WRONG, RIGHT, UNCLEAR = 0, 1, 2


@dataclass(frozen=True)
class Question:
    """One question: category, subcategory, set_id, question_id and figure_id of the file, visual_input ("0" none, "1"
    original, "2" edited), and whether the answer was right."""

    category: str
    subcategory: str
    set_id: str
    question_id: str
    figure_id: str
    visual_input: str
    right: bool

    @property
    def cluster(self) -> Hashable:
        """Its set: questions of one set are about the same things, so intervals draw whole sets."""
        return self.category, self.subcategory, self.set_id

    @property
    def has_figure(self) -> bool:
        return self.category != "VS" or self.figure_id != "0"


def question(entry: Mapping[str, Any], right: bool) -> Question:
    """A question of the authors' file and whether it was answered rightly.

    Raises:
        KeyError: a field is missing.
    """
    fields = ("category", "subcategory", "set_id", "question_id", "figure_id", "visual_input")
    return Question(**{field: str(entry[field]) for field in fields}, right=right)


def judged(entry: Mapping[str, Any], verdict: int) -> Question:
    """The same by a judge's verdict: 0 wrong, 1 right, 2 unclear."""
    found = question(entry, verdict == RIGHT)
    return question(entry, True) if verdict == UNCLEAR and not found.has_figure else found


def answered(entry: Mapping[str, Any], text: str, rule: str = "words") -> Question:
    """The same by reading the answer's text as yes or no; neither is wrong. "gt_answer" is "1" for yes."""
    label = str(entry["gt_answer"]) == "1"
    return question(entry, yesno.read(text, label, rule).said == label)


def ratios(questions: Sequence[Question]) -> dict[str, Ratio]:
    """a_acc, q_acc and f_acc, and the accuracies on original (easy) and edited (hard) images; one sample a set.

    Raises:
        ValueError: no questions.
    """
    by_question = [(q.cluster, q.question_id) for q in questions]
    with_figure = [q for q in questions if q.has_figure]
    sets = list(dict.fromkeys(q.cluster for q in questions))
    table = {
        "a_acc": _by_set(sets, questions, list(range(len(questions)))),
        "q_acc": _by_set(sets, questions, by_question),
        "f_acc": _by_set(sets, with_figure, [(q.cluster, q.figure_id) for q in with_figure]),
    }
    for name, kind in (("easy_acc", "1"), ("hard_acc", "2")):
        some = [q for q in questions if q.visual_input == kind]
        table[name] = _by_set(sets, some, list(range(len(some))))
    return table


def overall(table: Mapping[str, Ratio]) -> float:
    """The mean of a_acc, q_acc and f_acc, as leaderboards show it."""
    return sum(table[name].value for name in ("a_acc", "q_acc", "f_acc")) / 3


def _by_set(sets: Iterable[Hashable], questions: Sequence[Question], groups: Sequence[Hashable]) -> Ratio:
    """Groups with all questions right over groups, for each set."""
    place = {cluster: number for number, cluster in enumerate(sets)}
    right: dict[Hashable, bool] = {}
    home: dict[Hashable, int] = {}
    for q, group in zip(questions, groups, strict=True):
        right[group] = right.get(group, True) and q.right
        home[group] = place[q.cluster]
    columns = np.zeros((2, len(place)))
    for group, number in home.items():
        columns[:, number] += (right[group], 1)
    return Ratio(*columns)
