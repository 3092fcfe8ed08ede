"""Accuracies of groups of yes/no questions: pairs of an image (MME), and questions and figures (HallusionBench)."""

from __future__ import annotations

import pytest

from attnsteer import SteeringError
from attnsteer.metrics import hallusionbench as hb
from attnsteer.metrics import mme
from tests.metrics.common import document

# ---------------------------------------------------------------------------------------------------- MME


def asked(task: str, *answers: tuple[str, str]) -> list[mme.Question]:
    """Two questions an image, in turn true and false."""
    return [
        mme.line(task, f"{number}.jpg\tIs it?\t{label}\t{said}")
        for number, pair in enumerate(answers)
        for label, said in zip(("Yes", "No"), pair, strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("yes, it is", "yes"),
        ("No.", "no"),
        ("It is not", "other"),
        ("Not it", "no"),
        ("I'm not sure", "other"),
        ("", "other"),
        (" yes", "yes"),
        ("  yes", "other"),  # only the first four characters count
    ],
)
def test_mme_reads_the_first_four_characters(text: str, read: str) -> None:
    assert mme.read(text) == read


def test_mme_by_hand() -> None:
    table = mme.ratios(asked("count", ("Yes", "No"), ("Yes", "Yes"), ("No", "Yes"), ("what", "No")))
    assert table["acc"].value == 4 / 8 and table["acc_plus"].value == 1 / 4
    assert mme.scores(asked("count", ("Yes", "No"), ("Yes", "Yes"))) == {"count": 75 + 50}


def test_mme_always_yes_is_50_in_every_subtask() -> None:
    questions = [q for task in (*mme.PERCEPTION, *mme.COGNITION) for q in asked(task, *[("Yes", "Yes")] * 3)]
    found = mme.scores(questions)
    assert len(found) == 14 + 3
    assert {found[task] for task in (*mme.PERCEPTION, *mme.COGNITION)} == {50}
    assert (found["perception"], found["cognition"], found["hallucination"]) == (500, 200, 200)


def test_mme_pairs_by_image_and_refuses_a_missing_question() -> None:
    questions = asked("scene", ("Yes", "No"), ("Yes", "Yes"), ("No", "No"))
    mixed = [questions[i] for i in (4, 1, 2, 5, 0, 3)]
    assert mme.scores(mixed) == mme.scores(questions)
    with pytest.raises(SteeringError, match=r"scene without exactly two questions: 0\.jpg \(1\)"):
        mme.scores(questions[1:])


def test_mme_sums_only_what_is_complete() -> None:
    assert set(mme.scores(asked("count", ("Yes", "No")))) == {"count"}


@pytest.mark.parametrize(("line", "why"), [("a\tb\tYes", "3 parts"), ("a\tb\tmaybe\tYes", "'maybe'")])
def test_mme_bad_lines(line: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        mme.line("count", line)


# ---------------------------------------------------------------------------------------------------- HallusionBench


def entry(category: str, question: int, figure: int, truth: int = 1, kind: int = 1) -> dict[str, str]:
    names = {"category": category, "subcategory": "map", "set_id": "0", "question_id": str(question)}
    return {**names, "figure_id": str(figure), "visual_input": str(kind), "gt_answer": str(truth)}


def values(questions: list[hb.Question]) -> dict[str, float]:
    return {name: ratio.value for name, ratio in hb.ratios(questions).items()}


def test_groups_by_hand() -> None:
    right = {(0, 0): True, (0, 1): True, (1, 0): True, (1, 1): False, (2, 0): True, (2, 1): True}
    vs = [hb.question(entry("VS", q, f, kind=f), ok) for (q, f), ok in right.items()]  # figure 0: no image
    found = values(vs)
    assert found["a_acc"] == 5 / 6 and found["q_acc"] == 2 / 3
    assert found["f_acc"] == 0  # of figure 1 alone
    vd = [hb.question(entry("VD", q, f, kind=f + 1), ok) for (q, f), ok in right.items()]
    found = values(vd)
    assert found["f_acc"] == 1 / 2 and found["easy_acc"] == 1 and found["hard_acc"] == 2 / 3
    assert hb.overall(hb.ratios(vd)) == pytest.approx((5 / 6 + 2 / 3 + 1 / 2) / 3)


def test_unclear_is_right_only_without_a_figure() -> None:
    assert hb.judged(entry("VS", 0, 0), hb.UNCLEAR).right
    assert not hb.judged(entry("VS", 0, 1), hb.UNCLEAR).right
    assert not hb.judged(entry("VD", 0, 0), hb.UNCLEAR).right
    assert hb.judged(entry("VD", 0, 0), hb.RIGHT).right and not hb.judged(entry("VS", 0, 0), hb.WRONG).right


def test_answers_are_read() -> None:
    assert hb.answered(entry("VD", 0, 0, truth=1), "Yes, it is.").right
    assert hb.answered(entry("VD", 0, 0, truth=0), "No.").right
    assert not hb.answered(entry("VD", 0, 0, truth=0), "Who knows").right


@pytest.mark.parametrize(
    ("said", "with_image", "wanted"),
    [
        ("Yes", False, (42.8698, 3.9560, 7.2254)),
        ("No", False, (57.1302, 19.3407, 12.1387)),
        ("Yes", True, (42.1661, 4.6154, 7.2254)),
        ("No", True, (57.8339, 20.0, 12.1387)),
    ],
)
def test_always_the_same_answer(said: str, with_image: bool, wanted: tuple[float, float, float]) -> None:
    rows = [r for r in document("hallusionbench/HallusionBench.json.gz") if not with_image or r["visual_input"] != "0"]
    table = hb.ratios([hb.answered(row, said) for row in rows])
    assert len(rows) == (951 if with_image else 1129)
    assert (table["q_acc"].denominators.sum(), table["f_acc"].denominators.sum()) == (455, 346)
    assert [100 * table[name].value for name in ("a_acc", "q_acc", "f_acc")] == pytest.approx(wanted, abs=5e-5)
