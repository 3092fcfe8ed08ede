"""POPE: how answers are read, what is counted, how questions are made, and published answers."""

from __future__ import annotations

import itertools

import pytest

from attnsteer import SteeringError
from attnsteer.metrics import pope, yesno
from tests.metrics.common import lines

YES, NO, NEITHER = True, False, None

TABLE = {  # rules in the order of RULES, for a question whose answer is no
    "No, there is no car.": (NO, NO, NO, NEITHER, NO),
    "There isn't a car.": (YES, NO, YES, NEITHER, NEITHER),
    "Yes. It is not small.": (YES, NO, NO, NEITHER, YES),
    "NO": (YES, NO, NO, NO, NO),
    "I do not know": (NO, NO, NO, NEITHER, NEITHER),
    "Yes.": (YES, YES, YES, NEITHER, YES),
    "yes ": (YES, YES, YES, YES, YES),
    "": (YES, YES, YES, NEITHER, NEITHER),
    "Yes and no": (NO, NO, NO, NEITHER, NEITHER),
    "Another one": (YES, YES, NO, NEITHER, NEITHER),
}


@pytest.mark.parametrize("text", TABLE)
def test_rules_by_hand(text: str) -> None:
    assert tuple(yesno.read(text, False, rule).said for rule in yesno.RULES) == TABLE[text]


def test_substring_looks_at_the_label() -> None:
    assert yesno.read("There is no car, yes.", True, "substring").said is True
    assert yesno.read("There is no car, yes.", False, "substring").said is False
    assert yesno.read("A car.", True, "substring").said is False and yesno.read("A car.", False, "substring").said


def test_an_unknown_rule_names_the_others() -> None:
    with pytest.raises(SteeringError, match="pope, opera, substring, exact, words"):
        yesno.read("Yes", True, "vibes")


def score(texts: list[str], labels: list[bool], rule: str = "pope") -> tuple[dict[str, int], dict[str, float]]:
    answers = [yesno.read(text, label, rule) for text, label in zip(texts, labels, strict=True)]
    return yesno.counts(answers), {name: ratio.value for name, ratio in yesno.ratios(answers).items()}


def test_always_yes_and_always_no() -> None:
    labels = [True, False] * 5
    _, yes = score(["Yes"] * 10, labels)
    assert yes == pytest.approx({"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes": 1, "unparsed": 0})
    _, no = score(["No"] * 10, labels)
    assert no == pytest.approx({"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes": 0, "unparsed": 0})


def test_neither_is_wrong_and_no_yes() -> None:
    counts, found = score(["yes", "maybe", "no", "maybe", "yes"], [True, True, False, False, False], "words")
    assert counts == {"tp": 1, "fp": 1, "tn": 1, "fn": 1, "neither": 1, "unparsed": 2, "questions": 5}
    assert found["accuracy"] == 2 / 5 and found["yes"] == 2 / 5 and found["unparsed"] == 2 / 5
    assert found["precision"] == found["recall"] == found["f1"] == 1 / 2


def test_every_combination_equals_a_loop() -> None:
    for size in (1, 2, 3):
        for labels in itertools.product([True, False], repeat=size):
            for said in itertools.product(["yes", "no", "well"], repeat=size):
                tp = fp = fn = right = 0
                for text, label in zip(said, labels, strict=True):
                    tp += text == "yes" and label
                    fp += text == "yes" and not label
                    fn += text != "yes" and label
                    right += text == ("yes" if label else "no")
                _, found = score(list(said), list(labels), "exact")
                assert found["accuracy"] == pytest.approx(right / size)
                assert found["precision"] == pytest.approx(tp / (tp + fp) if tp + fp else 0)
                assert found["recall"] == pytest.approx(tp / (tp + fn) if tp + fn else 0)
                assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0)


def test_questions_of_an_image_are_one_sample() -> None:
    answers = [yesno.read("Yes", n % 2 == 0, group=f"image {n // 6}") for n in range(18)]
    table = yesno.ratios(answers)
    assert all(len(ratio.numerators) == 3 for ratio in table.values())
    assert table["accuracy"].denominators.tolist() == [6, 6, 6] and table["accuracy"].value == 0.5


# ---------------------------------------------------------------------------------------------------- questions

OBJECTS = {
    "1": ["dog", "cat", "car"],
    "2": ["dog", "cat", "bed", "apple"],
    "3": ["dog", "bed", "tv"],
    "4": ["dog", "orange"],  # two objects: not asked about
    "5": ["bus", "train", "dog", "truck"],
}


def asked(split: str, **options: object) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in pope.questions(OBJECTS, split, images=None, **options):  # type: ignore[arg-type]
        found.setdefault(row["image"], []).append(row["text"].removeprefix("Is there ").removesuffix(" in the image?"))
    return found


def test_popular_by_hand() -> None:
    """Images: dog 4, cat 2, bed 2, then car, apple, tv, bus, train, truck once each."""
    assert asked("popular") == {
        "1": ["a dog", "a bed", "a cat", "an apple", "a car", "a tv"],
        "2": ["a dog", "a car", "a cat", "a tv", "a bed", "a bus"],
        "3": ["a dog", "a cat", "a bed", "a car", "a tv", "an apple"],
        "5": ["a bus", "a cat", "a train", "a bed", "a dog", "a car"],
    }


def test_adversarial_by_hand() -> None:
    """With dog: cat 2, bed 2, car, apple, tv, bus, ...; with cat: dog 2, car, bed, apple; with bed: dog 2, cat, apple,
    tv; with tv: dog, bed."""
    found = asked("adversarial")
    assert found["3"][:4] == ["a dog", "a cat", "a bed", "an apple"]
    assert found["1"][:4] == ["a dog", "a bed", "a cat", "an apple"]
    assert found["3"][4] == "a tv" and found["3"][5] not in {"a dog", "a cat", "a bed", "an apple"}  # a random one


@pytest.mark.parametrize("split", pope.SPLITS)
def test_what_every_split_keeps(split: str) -> None:
    rows = pope.questions(OBJECTS, split, images=3, seed=4)
    assert [row["question_id"] for row in rows] == list(range(1, 19))
    assert [row["label"] for row in rows] == ["yes", "no"] * 9
    for image, group in itertools.groupby(rows, key=lambda row: row["image"]):
        names = [row["text"].split(" ", 3)[3].removesuffix(" in the image?") for row in group]
        assert names[::2] == OBJECTS[image][:3]
        assert not set(names[1::2]) & set(OBJECTS[image]) and len(set(names)) == 6
    assert rows == pope.questions(OBJECTS, split, images=3, seed=4)
    positives = [(r["image"], r["text"]) for r in rows if r["label"] == "yes"]
    other = pope.questions(OBJECTS, "random", images=3, seed=4)
    assert positives == [(r["image"], r["text"]) for r in other if r["label"] == "yes"]


def test_what_cannot_be_asked() -> None:
    with pytest.raises(SteeringError, match="random, popular, adversarial"):
        pope.questions(OBJECTS, "easy")
    with pytest.raises(SteeringError, match="4 have 3 objects"):
        pope.questions(OBJECTS, "random", images=5)
    with pytest.raises(SteeringError, match="none is left"):
        pope.questions({"1": ["dog", "cat", "car"]}, "popular", images=None)
    with pytest.raises(SteeringError, match="listed twice"):
        pope.questions({"1": ["dog", "cat", "dog"]}, "random", images=None)


# ---------------------------------------------------------------------------------------------------- other people's

PUBLISHED = {
    "adversarial": ("coco_pope_adversarial_e3e3926", 1182, 117, 1383, 318, 0.844587),
    "popular": ("coco_pope_popular_e3e3926", 1182, 59, 1441, 318, 0.862459),
    "random": ("coco_pope_random_2910", 1182, 31, 1379, 318, 0.871360),
}
ORDER = ["person", "dining table", "car", "chair", "cup", "bottle", "backpack", "handbag", "bowl", "truck"]


def test_published_answers_give_the_published_counts() -> None:
    questions = lines("pope/llava_pope_test.jsonl.gz")
    said = {row["question_id"]: row["text"] for row in lines("pope/answers_llava-v1.5-13b.jsonl.gz")}
    scores = []
    for split, (file, tp, fp, tn, fn, f1) in PUBLISHED.items():
        labels = [row["label"] == "yes" for row in lines(f"pope/{file}.json.gz")]
        texts = [said[row["question_id"]] for row in questions if row["category"] == split]
        counts, found = score(texts, labels)
        assert [counts[name] for name in ("tp", "fp", "tn", "fn")] == [tp, fp, tn, fn]
        assert counts["questions"] == len(labels) and counts["neither"] == counts["unparsed"] == 0
        assert found["f1"] == pytest.approx(f1, abs=1e-6)
        scores.append(found["f1"])
        for rule in ("opera", "words", "exact", "substring"):  # single words: all rules agree
            assert score(texts, labels, rule) == (counts, found)
    assert sum(scores) / 3 == pytest.approx(0.8594688091, abs=1e-10)


def rebuilt(split: str, popular: list[str] | None = None) -> dict[str, list[tuple[str, str]]]:
    objects = {row["image"]: row["objects"] for row in lines("pope/segmentation_objects_301.jsonl.gz")}
    found: dict[str, list[tuple[str, str]]] = {}
    for row in pope.questions(objects, split, images=None, popular=popular):
        found.setdefault(row["image"], []).append((row["text"], row["label"]))
    return found


def released(split: str) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for row in lines(f"pope/coco_pope_{split}.json.gz"):
        found.setdefault(row["image"], []).append((row["text"], row["label"]))
    return found


def test_popular_questions_of_the_release_are_rebuilt() -> None:
    """301 of its 500 images; the order of the objects is that of all 500."""
    ours, theirs = rebuilt("popular", ORDER), released("popular")
    assert len(ours) == 301 and all(theirs[image] == questions for image, questions in ours.items())


@pytest.mark.parametrize("split", pope.SPLITS)
def test_positive_questions_of_the_release_are_rebuilt(split: str) -> None:
    theirs = released(split)
    for image, questions in rebuilt(split).items():
        assert questions[::2] == theirs[image][::2]
