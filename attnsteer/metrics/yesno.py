"""Yes or no? Five rules in use for free text, and the counts that follow.

The rules agree on single words and differ by points on sentences ("There isn't a car." is a Yes by the rule of POPE),
so each has a name and every result says by which it was read:

| rule | no | yes | used by |
|---|---|---|---|
| pope | No, not or no is a word of the text before the first "." (no commas, split at spaces) | else | POPE, LLaVA |
| opera | No, not, no, NO or ...n't is a word of the text ("." and "," removed, split at spaces) | else | OPERA, PAI |
| substring | right if the text in lower case contains the label, else wrong: it looks at the label | | VCD, CAAC |
| exact | the text in lower case, stripped, is "no" | is "yes" | lmms-eval |
| words | "no" and no "yes" among the words, lower case, without punctuation | the reverse | VLMEvalKit |

What is neither yes nor no (rules exact and words) is wrong and no Yes.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ..errors import SteeringError
from .ratios import Ratio, grouped, mean_of


def pope(text: str, label: bool) -> bool | None:
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def opera(text: str, label: bool) -> bool | None:
    words = text.replace(".", "").replace(",", "").split(" ")
    return not ({"No", "not", "no", "NO"} & set(words) or any(word.endswith("n't") for word in words))


def substring(text: str, label: bool) -> bool | None:
    right = ("yes" if label else "no") in text.lower()
    return label == right


def exact(text: str, label: bool) -> bool | None:
    return {"yes": True, "no": False}.get(text.lower().strip())


def words(text: str, label: bool) -> bool | None:
    found = _plain_words(text)
    yes, no = "yes" in found, "no" in found
    return yes if yes != no else None


RULES: dict[str, Callable[[str, bool], bool | None]] = {
    "pope": pope,
    "opera": opera,
    "substring": substring,
    "exact": exact,
    "words": words,
}


@dataclass(frozen=True)
class Answer:
    """One answer, read.

    Attributes:
        group: what the question belongs to, mostly its image.
        label: whether Yes is true; said: what the rule read, None for neither.
        plain: whether "yes" or "no" is a word of it, whatever the rule made of it.
    """

    group: Hashable
    label: bool
    said: bool | None
    plain: bool


def read(text: str, label: bool, rule: str = "pope", group: Hashable = None) -> Answer:
    """Read one answer.

    Raises:
        SteeringError: there is no such rule.
    """
    if rule not in RULES:
        raise SteeringError(f"There is no rule {rule!r} for answers; there are {', '.join(RULES)}.")
    return Answer(group, label, RULES[rule](text, label), bool({"yes", "no"} & set(_plain_words(text))))


def counts(answers: Sequence[Answer]) -> dict[str, int]:
    """tp, fp, tn, fn (Yes is positive; a question whose answer is Yes and gets neither is an fn), neither: questions
    whose answer is No and get neither, unparsed: answers without a "yes" or "no", questions: all."""
    pairs = [(a.label, a.said) for a in answers]
    return {
        "tp": pairs.count((True, True)),
        "fp": pairs.count((False, True)),
        "tn": pairs.count((False, False)),
        "fn": pairs.count((True, False)) + pairs.count((True, None)),
        "neither": pairs.count((False, None)),
        "unparsed": sum(not a.plain for a in answers),
        "questions": len(answers),
    }


def ratios(answers: Sequence[Answer]) -> dict[str, Ratio]:
    """accuracy = (tp + tn) / questions, precision = tp / (tp + fp), recall = tp / (tp + fn), f1 = 2 tp / (2 tp + fp +
    fn), yes = Yes said / questions, unparsed; one sample a group, as questions about one image are alike.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("No answers: there is nothing to count.")
    right = [a.said == a.label for a in answers]
    yes = [a.said is True for a in answers]
    true = [a.label for a in answers]
    hits = [a and b for a, b in zip(yes, true, strict=True)]
    table = {
        "accuracy": mean_of(right),
        "precision": Ratio(hits, yes),
        "recall": Ratio(hits, true),
        "f1": Ratio([2 * hit for hit in hits], [a + b for a, b in zip(yes, true, strict=True)]),
        "yes": mean_of(yes),
        "unparsed": mean_of(not a.plain for a in answers),
    }
    return grouped(table, [a.group if a.group is not None else number for number, a in enumerate(answers)])


def _plain_words(text: str) -> list[str]:
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()
