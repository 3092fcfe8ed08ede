"""AMBER: made-up objects in descriptions, and yes/no questions about existence, attributes and relations.

Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation", 2023,
arXiv:2311.07397, as its published script counts. Its files (annotations.json, relation.json, safe_words.txt) come from
its authors. Of k nouns of AMBER's vocabulary in a response, repeats counted:

    chair = flagged nouns / k        cover = truths named / truths        hal = responses with a flag / responses
    cog = listed hallucinations named / listed hallucinations

A noun is flagged that is no safe word, no truth or association of one, and no listed hallucination, or is one. Every
truth and hallucination owns its associations in relation.json; the first owner of a noun gets it. cog divides by all
listed hallucinations, as the script does; the paper describes it per generated object (not confirmed).

The script finds nouns with a tagger and compares words by vectors too. Here nouns are a list made elsewhere, or by
default ``nouns``: all words of the vocabulary, without a tagger, which also counts the "hot" of a hot day. On a public
file of 1,004 responses that makes chair 6.1 % instead of 5.6 %, cover 48.4 % instead of 47.8 %, hal 27.8 % instead of
25.8 % and cog 2.7 % instead of 2.6 %: compare only results of the same kind. ``similarity`` is a function where one is
wanted; on the one public file that was compared, vectors changed no printed digit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import SteeringError
from .ratios import Ratio, mean_of, quotient
from .words import lemma, tokens

Similarity = Callable[[str, str], float]
CLOSE = 0.8  # words more similar than this are the same
KINDS = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}
"""The types of annotations.json and the lines of the report that they count in, besides "all"."""


@dataclass(frozen=True)
class Response:
    """One description, counted.

    Attributes:
        number: its id; nouns: of the vocabulary, with repeats; flagged: those that are made up, in order.
        covered of truths, expected of hallucinations: how many of the listed words were named.
    """

    number: int
    nouns: int
    flagged: tuple[str, ...]
    covered: int
    truths: int
    expected: int
    hallucinations: int


@dataclass(frozen=True)
class World:
    """What relation.json and safe_words.txt say: {word: words that come with it}, and words that are never flagged."""

    relation: Mapping[str, Sequence[str]]
    safe: Collection[str] = ()

    @property
    def vocabulary(self) -> frozenset[str]:
        """All words and their associations: the only nouns that count."""
        return frozenset(self.relation).union(*self.relation.values())

    def owned(self, listed: Sequence[str]) -> list[tuple[str, int]]:
        """(word, number of the listed word that it stands for): associations of all of them, then they themselves."""
        pairs = [(word, i) for i, owner in enumerate(listed) for word in self.relation.get(owner, ())]
        return pairs + [(word, i) for i, word in enumerate(listed)]


def nouns(text: str, vocabulary: frozenset[str]) -> list[str]:
    """The words of a text that are in the vocabulary, singular, in order; no tagger looks whether they are nouns."""
    spelt = {word.lower(): word for word in sorted(vocabulary)}  # "TV" is the one with capitals
    known = frozenset(spelt)
    found = [lemma(word, known) for word, _, _ in tokens(text)]
    return [spelt[word] for word in found if word in spelt]


def response(
    number: int,
    named: Iterable[str],
    truth: Sequence[str],
    hallucinations: Sequence[str],
    world: World,
    similarity: Similarity | None = None,
) -> Response:
    """Count one description.

    Args:
        named: its nouns in order, with repeats; those outside the vocabulary do not count.
        truth, hallucinations: "truth" and "hallu" of its annotation.
        similarity: (noun, word) -> number; above 0.8 they are the same. None: only equal words are.
    """
    vocabulary = world.vocabulary
    counted = [noun for noun in named if noun in vocabulary]
    true, false = world.owned(truth), world.owned(hallucinations)
    covered: set[int] = set()
    expected: set[int] = set()
    flagged = []
    for noun in counted:
        if noun in world.safe:
            continue
        if _mark(noun, true, covered):
            continue
        _mark(noun, false, expected)
        if similarity is not None:
            _mark(noun, false, expected, similarity)
            if _mark(noun, true, covered, similarity):
                continue
        flagged.append(noun)
    sizes = (len(covered), len(truth), len(expected), len(hallucinations))
    return Response(number, len(counted), tuple(flagged), *sizes)


def ratios(responses: Sequence[Response]) -> dict[str, Ratio]:
    """chair, cover, hal and cog as shares, one sample a response.

    Raises:
        ValueError: no responses.
    """
    return {
        "chair": Ratio([len(r.flagged) for r in responses], [r.nouns for r in responses]),
        "cover": Ratio([r.covered for r in responses], [r.truths for r in responses]),
        "hal": mean_of(float(bool(r.flagged)) for r in responses),
        "cog": Ratio([r.expected for r in responses], [r.hallucinations for r in responses]),
    }


def totals(responses: Sequence[Response]) -> dict[str, int]:
    """The integers that the metrics are made of, summed."""
    return {
        "responses": len(responses),
        "clean_responses": sum(not r.flagged for r in responses),
        "flagged": sum(len(r.flagged) for r in responses),
        "nouns": sum(r.nouns for r in responses),
        "covered": sum(r.covered for r in responses),
        "truths": sum(r.truths for r in responses),
        "expected_hallucinations": sum(r.expected for r in responses),
        "hallucinations": sum(r.hallucinations for r in responses),
    }


# ---- yes and no ------------------------------------------------------------------------------------------------------
def answer(text: str, strict: bool = False) -> str:
    """What an answer counts as: "Yes", "No", or itself, which is wrong.

    Args:
        strict: only exactly "Yes" and "No" count, as in the published script. Else the first word does, in any case.
    """
    if strict:
        return text
    first = next((word for word, _, _ in tokens(text) if word.isalnum()), "")
    return {"yes": "Yes", "no": "No"}.get(first, text)


def discriminative(answers: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, float]]:
    """Scores of "all" and of every kind that has questions; No is positive.

    precision, recall and accuracy are in percent, rounded to 0.1 before f1 = 2PR / (P + R + 1e-4) is made of them (as
    shares; existence has 1e-3), which is rounded too: the published script does so, and its digits are wanted. All
    existence questions have the answer No: always No has an f1 of 100 there. The files do not say which questions are
    about the same image, so there are no intervals.

    Args:
        answers: (type of the annotation, truth "yes" or "no", answer "Yes", "No" or anything else).

    Raises:
        SteeringError: a type that AMBER does not have.
    """
    rows: dict[str, list[tuple[str, str]]] = {}
    for kind, truth, said in answers:
        if kind not in KINDS:
            raise SteeringError(f"{kind!r} is no type of yes/no question of AMBER; it has {', '.join(KINDS)}.")
        for line in ("all", *KINDS[kind]):
            rows.setdefault(line, []).append((truth, said))
    return {line: _scores(pairs, 1e-3 if line == "existence" else 1e-4) for line, pairs in rows.items()}


def amber_score(chair: float, f1: float) -> float:
    """(100 - chair + f1) / 2, all in percent: the paper's single number (formula not confirmed)."""
    return (100 - chair + f1) / 2


def _scores(pairs: Sequence[tuple[str, str]], little: float) -> dict[str, float]:
    right = sum(said.lower() == truth for truth, said in pairs if said in ("Yes", "No"))
    said_no = [truth for truth, said in pairs if said == "No"]
    hits, true_no = said_no.count("no"), sum(truth == "no" for truth, _ in pairs)
    precision = round(float(quotient(100 * hits, len(said_no))), 1)
    recall = round(float(quotient(100 * hits, true_no)), 1)
    p, r = precision / 100, recall / 100
    return {
        "questions": len(pairs),
        "right": right,
        "said_no": len(said_no),
        "true_no": true_no,
        "said_no_rightly": hits,
        "accuracy": round(100 * right / len(pairs), 1),
        "precision": precision,
        "recall": recall,
        "f1": round(100 * 2 * p * r / (p + r + little), 1),
    }


def _mark(noun: str, owned: Sequence[tuple[str, int]], marked: set[int], similarity: Similarity | None = None) -> bool:
    """Mark the owner of the first word that is the noun, or that is close to it; whether there was one."""
    for word, owner in owned:
        if word == noun if similarity is None else similarity(noun, word) > CLOSE:
            marked.add(owner)
            return True
    return False
