"""Captions become categories: lemmas, pairs of words, synonyms, places in the text."""

from __future__ import annotations

import pytest

from attnsteer import SteeringError
from attnsteer.metrics.words import COCO, DOUBLES, Vocabulary, lemma, names, tokens
from attnsteer.world import sampling, text
from attnsteer.world.catalog import CATEGORIES
from attnsteer.world.evaluate.answers import named
from tests.metrics.common import shared


def published() -> Vocabulary:
    return Vocabulary.load(shared("methods/data/chair-synonyms.txt"))


SENTENCES = {
    "A man and a dog sit on a bench. The dog is happy.": ["person", "dog", "bench", "dog"],
    "A cat on a couch.": ["cat", "couch"],
    "Nothing here.": [],
    "The seat of the toilet is near a chair.": ["toilet", "chair"],
    "A baby elephant and passenger jets": ["elephant", "airplane"],
    "Three wine glasses": ["wine glass"],
    "The train tracks": [],
    "A stove top oven.": ["oven", "oven"],
    "Several people are seated around a table.": ["person", "dining table"],
    "A bus drives down the road.": ["bus"],
    "There is a parking meter on the street.": ["parking meter"],
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences_by_hand(sentence: str) -> None:
    assert names(COCO.mentions(sentence)) == SENTENCES[sentence]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences_by_hand_with_the_published_table(sentence: str) -> None:
    assert names(published().mentions(sentence)) == SENTENCES[sentence]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("A Hot Dog, a hot-dog and a hot day for a dog", ["hot dog", "dog"]),  # hyphens keep a word whole
        ("The dog's ball", ["dog", "sports ball"]),
        ("a toilet and two seats", ["toilet"]),  # every seat is dropped, wherever it stands
        ("two seats", ["chair"]),
        ("He cares for the skies", []),  # no car, no skis
        ("skiing, bowling and seated", []),  # verbs are no objects
        ("boxes of dishes, buses, knives, mice and women", ["bus", "knife", "mouse", "person"]),
        ("home plate on the plane", ["airplane"]),
        ("A TV.", ["tv"]),
        ("", []),
    ],
)
def test_corners(sentence: str, expected: list[str]) -> None:
    assert names(COCO.mentions(sentence)) == expected


def test_places_are_those_of_the_words_in_the_text() -> None:
    said = (
        "\u0130ki: A Baby  Elephant and two wine glasses, the dogs' bowl"  # the first letter gets longer in lower case
    )
    found = [said[m.start : m.end] for m in COCO.mentions(said)]
    assert found == ["Baby  Elephant", "wine glasses", "dogs", "bowl"]


def test_lemmas_made_elsewhere_give_the_same_mentions() -> None:
    for sentence in SENTENCES:
        lemmas = [COCO.lemma(word) for word, _, _ in tokens(sentence)]
        found = COCO.mentions_of_lemmas(lemmas)
        assert names(found) == names(COCO.mentions(sentence))
        assert all(COCO.entries.get(" ".join(lemmas[m.start : m.end]), m.category) == m.category for m in found)


def test_length_counts_pairs_once_and_punctuation() -> None:
    assert COCO.length("Two hot dogs, here.") == 5  # two, hot dog, comma, here, period
    assert COCO.length("") == 0


def test_lemma_by_hand() -> None:
    known = {"bus", "dish", "knife", "calf", "pony", "man", "mouse", "car", "shoe", "box"}
    plural = {"buses": "bus", "busses": "bus", "dishes": "dish", "knives": "knife", "calves": "calf", "ponies": "pony"}
    plural |= {"men": "man", "mice": "mouse", "cars": "car", "shoes": "shoe", "boxes": "box"}
    assert {word: lemma(word, known) for word in plural} == plural
    assert [lemma(word, known) for word in ("cares", "bus", "manes", "s", "ss")] == ["cares", "bus", "manes", "s", "ss"]


def test_the_table_has_the_80_categories_and_all_pairs() -> None:
    assert len(COCO.categories) == 80 and len(DOUBLES) == 55
    assert {category.name for category in CATEGORIES} <= set(COCO.categories)
    for entry, category in COCO.entries.items():
        assert entry == entry.lower().strip() and entry.count(" ") <= 1
        assert names(COCO.mentions(f"There is a {entry} in the picture.")) == [category]


def test_every_plural_of_the_table_is_found() -> None:
    """With the endings of English: what the table names it also finds in the plural."""
    same = {"people", "cattle", "oxen", "sheep", "skis", "scissors", "broccoli", "aircraft"}
    irregular = {
        "man": "men",
        "child": "children",
        "mouse": "mice",
        "goose": "geese",
        "knife": "knives",
        "calf": "calves",
    }
    for entry, category in COCO.entries.items():
        last = entry.split(" ")[-1]
        if last in same:
            continue
        end = "ies" if last.endswith("y") and last[-2] not in "aeiou" else ""
        end = end or ("es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s")
        plural = irregular.get(last, last[:-1] + end if end == "ies" else last + end)
        if last.endswith("man") and last != "human":
            plural = last[:-3] + "men"
        if last == "ox":
            continue  # oxen is an entry
        assert names(COCO.mentions(entry[: len(entry) - len(last)] + plural)) == [category], plural


def test_published_table_as_its_scripts_read_it() -> None:
    table = published()
    assert len(table.entries) == 403 and table.categories == COCO.categories
    assert " motor bike" in table.entries  # keeps its space, so it is never found
    assert names(table.mentions("A motor bike.")) == [] and names(COCO.mentions("A motor bike.")) == ["motorcycle"]
    assert table.digest != COCO.digest


def test_a_table_without_words_is_refused(tmp_path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(SteeringError, match="no synonyms"):
        Vocabulary.load(tmp_path / "empty.txt")


def test_the_small_world_is_read_as_it_reads_itself() -> None:
    for seed in range(60):
        scene = sampling.sample(seed, categories=[category.name for category in CATEGORIES])
        for said in (text.describe(scene), text.caption(scene)):
            assert set(names(COCO.mentions(said))) == named(said) == set(scene.categories)
