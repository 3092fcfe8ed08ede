"""AMBER: rules by hand, properties on its own files, and the counts of published responses."""

from __future__ import annotations

import itertools

import pytest

from attnsteer import SteeringError
from attnsteer.metrics import amber
from tests.metrics.common import document, text

WORLD = amber.World(
    {"dog": ["puppy"], "cat": ["kitten", "puppy"], "car": [], "forest": ["tree"], "TV": []}, {"light", "car"}
)


def count(named: str, truth: str = "dog forest", false: str = "cat car", similarity: amber.Similarity | None = None):
    return amber.response(1, named.split(), truth.split(), false.split(), WORLD, similarity)


def test_one_response_by_hand() -> None:
    found = count("puppy dog tree cat kitten car light lamp TV")
    assert found.nouns == 7  # light and lamp are not in the vocabulary; safe words of the vocabulary count
    assert found.flagged == ("cat", "kitten", "TV")  # the car is a safe word, and the tree belongs to the forest
    assert (found.covered, found.truths, found.expected, found.hallucinations) == (2, 2, 1, 2)


def test_a_word_belongs_to_its_first_owner_and_associations_come_first() -> None:
    assert count("puppy", "cat dog").covered == 1 and count("puppy dog cat", "cat dog").covered == 2
    assert count("dog dog", "dog dog").covered == 1  # the second of two equal truths is never covered
    assert count("puppy", "dog", "cat").flagged == ()  # truth before hallucinations


def test_similar_words_where_a_function_says_so() -> None:
    def close(a: str, b: str) -> float:
        return 0.9 if {a, b} == {"TV", "dog"} else 0.8 if {a, b} == {"TV", "forest"} else 0.0

    assert count("TV").flagged == ("TV",)
    found = count("TV", similarity=close)
    assert found.flagged == () and found.covered == 1
    assert count("TV", truth="forest", similarity=close).flagged == ("TV",)  # 0.8 is not above 0.8
    assert count("TV", truth="forest", false="dog", similarity=close).expected == 1


def test_words_of_a_text() -> None:
    assert amber.nouns("Puppies, cats and a TV in forests; dogged.", WORLD.vocabulary) == [
        "puppy",
        "cat",
        "TV",
        "forest",
    ]


@pytest.mark.parametrize(
    ("said", "read"), [("Yes", "Yes"), ("no, it is not.", "No"), (" YES!", "Yes"), ("It is.", "It is."), ("", "")]
)
def test_answers(said: str, read: str) -> None:
    assert amber.answer(said) == read
    assert amber.answer(said, strict=True) == said


def test_yes_no_equals_a_loop() -> None:
    kind = "discriminative-attribute-state"
    for truths in itertools.product(["yes", "no"], repeat=3):
        for said in itertools.product(["Yes", "No", "no"], repeat=3):
            right = sum((s, t) in (("Yes", "yes"), ("No", "no")) for s, t in zip(said, truths, strict=True))
            both = sum(s == "No" and t == "no" for s, t in zip(said, truths, strict=True))
            found = amber.discriminative((kind, t, s) for t, s in zip(truths, said, strict=True))
            assert set(found) == {"all", "attribute", "state"}
            p = round(100 * both / said.count("No"), 1) if "No" in said else 0.0
            r = round(100 * both / truths.count("no"), 1) if "no" in truths else 0.0
            f1 = round(100 * (2 * (p / 100) * (r / 100) / (p / 100 + r / 100 + 1e-4)), 1)
            wanted = {"accuracy": round(100 * right / 3, 1), "precision": p, "recall": r, "f1": f1}
            assert {name: found["state"][name] for name in wanted} == wanted


def test_a_strange_type_is_refused() -> None:
    with pytest.raises(SteeringError, match="no type of yes/no question"):
        amber.discriminative([("generative", "yes", "Yes")])


def test_score_by_hand() -> None:
    assert amber.amber_score(10.0, 60.0) == 75.0


# ---------------------------------------------------------------------------------------------------- its own files


def world() -> amber.World:
    return amber.World(document("amber/relation.json"), set(text("amber/safe_words.txt").split()))


def generative() -> list[dict]:
    return [entry for entry in document("amber/annotations.json.gz") if entry["type"] == "generative"]


def values(responses: list[amber.Response]) -> dict[str, float]:
    return {name: 100 * ratio.value for name, ratio in amber.ratios(responses).items()}


def test_the_vocabulary_has_418_words() -> None:
    assert len(world().relation) == 340 and len(world().vocabulary) == 418


def test_saying_the_truths_is_right() -> None:
    about = world()
    said = [amber.response(e["id"], e["truth"], e["truth"], e["hallu"], about) for e in generative()]
    found = values(said)
    assert found["chair"] == found["hal"] == found["cog"] == 0 and 90 < found["cover"] <= 100


def test_saying_one_listed_hallucination_is_wrong() -> None:
    about, safe, said = world(), 0, []
    for entry in generative():
        related = {word for word, _ in about.owned(entry["truth"])}
        for word in entry["hallu"]:
            safe += word in about.safe and word not in related
            if word in about.vocabulary and word not in about.safe and word not in related:
                said.append(amber.response(entry["id"], [word], entry["truth"], entry["hallu"], about))
    assert safe == 256 and len(said) > 4000
    assert values(said)["chair"] == values(said)["hal"] == 100
    assert all(found.expected == 1 for found in said)


def test_published_nouns_give_the_published_counts() -> None:
    about, nouns = world(), document("amber/nouns_LLaVA_response_512.json.gz")
    said = [amber.response(e["id"], nouns[str(e["id"])], e["truth"], e["hallu"], about) for e in generative()]
    wanted = document("amber/expected.json")["LLaVA"]["response_512"]
    totals = amber.totals(said)
    names = ("flagged", "nouns", "covered", "truths", "clean_responses", "responses")
    names += ("expected_hallucinations", "hallucinations")
    assert [totals[name] for name in names] == wanted["counts"]
    for ours, theirs in (("chair", "CHAIR"), ("cover", "Cover"), ("hal", "Hal"), ("cog", "Cog")):
        assert values(said)[ours] == pytest.approx(wanted[theirs])


@pytest.mark.parametrize("length", [64, 512])
def test_without_a_tagger_scores_are_as_close_as_the_docstring_says(length: int) -> None:
    about, wanted = world(), document("amber/expected.json")["LLaVA"][f"response_{length}"]
    texts = {row["id"]: row.get(f"response_{length}") for row in document("amber/caac_LLaVA.json.gz")}
    said = [
        amber.response(e["id"], amber.nouns(texts[e["id"]], about.vocabulary), e["truth"], e["hallu"], about)
        for e in generative()
    ]
    found = values(said)
    for ours, theirs, within in (
        ("chair", "CHAIR", 0.6),
        ("cover", "Cover", 0.6),
        ("hal", "Hal", 2.1),
        ("cog", "Cog", 0.2),
    ):
        assert wanted[theirs] < found[ours] < wanted[theirs] + within  # words that are no nouns only add


@pytest.mark.parametrize("strict", [True, False])
def test_published_answers_give_the_published_scores(strict: bool) -> None:
    entries = {entry["id"]: entry for entry in document("amber/annotations.json.gz")}
    rows = [row for row in document("amber/caac_LLaVA.json.gz") if "response" in row]
    pairs = [(entries[row["id"]], amber.answer(row["response"], strict)) for row in rows]
    found = amber.discriminative((entry["type"], entry["truth"], said) for entry, said in pairs)
    wanted = document("amber/expected.json")["LLaVA"]["discriminative"]
    assert set(found) == set(wanted)
    for line, scores in wanted.items():
        ours = found[line]
        row = {
            "n": ours["questions"],
            "acc": ours["accuracy"],
            "P": ours["precision"],
            "R": ours["recall"],
            "F1": ours["f1"],
        }
        assert row == scores


def test_always_no() -> None:
    entries = [entry for entry in document("amber/annotations.json.gz") if entry["type"] != "generative"]
    found = amber.discriminative((entry["type"], entry["truth"], "No") for entry in entries)
    assert all(scores["recall"] == 100 for scores in found.values())
    assert found["relation"]["precision"] == 41.4 and found["relation"]["said_no_rightly"] == 689
    assert found["existence"]["f1"] == pytest.approx(100, abs=0.1) and found["existence"]["precision"] == 100
