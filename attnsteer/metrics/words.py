"""Which objects a caption names: words, their singulars, pairs of words, synonyms. Needs no language library.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv:1809.02156, as its scripts count today.

    COCO.mentions("A baby elephant and two wine glasses.")   # elephant, wine glass, with their places in the text

1. Lower case; words, by ``WORD``. 2. The lemma of each ("rules" below). 3. From left to right, two neighbours that are
a pair of ``DOUBLES`` become one word ("baby elephant" is an elephant, "train track" nothing). 4. Where a toilet is
named, every "seat" is dropped. 5. Words of the table are kept and become their category. Repeats count.

Lemmatisers differ more than captions do. "rules": a word of the vocabulary is its own lemma; else an irregular plural;
else the first of the endings of ``ENDINGS`` that gives a word of the vocabulary; else the word itself. It never takes a
verb for a noun ("seated" is no seat), where taggers do: results of different lemmatisers do not compare, so each result
names its own. To count with another one, lemmatise elsewhere and give ``mentions_of_lemmas`` the list.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..errors import SteeringError
from . import synonyms

WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*|'[a-z]*|\S")
"""Letters and digits, hyphens inside; an apostrophe with what follows; any other sign by itself."""

TOKENISER, LEMMATISER = "regex-1", "rules"
IRREGULAR = {"children": "child", "mice": "mouse", "geese": "goose", "busses": "bus"}
ENDINGS = (("men", "man"), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
SIBILANTS = ("s", "x", "z", "ch", "sh", "o")  # "es" is an ending only behind these: "cares" is no car

_SAME = (
    "motor bike,motor cycle,air plane,traffic light,street light,traffic signal,stop light,fire hydrant,stop sign,"
    "parking meter,suit case,sports ball,baseball bat,baseball glove,tennis racket,wine glass,hot dog,cell phone,"
    "mobile phone,teddy bear,hair drier,potted plant,laptop computer,stove top oven,home plate,train track"
)
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"
DOUBLES: dict[str, str] = {
    **{pair: pair for pair in _SAME.split(",")},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS.split()},
    **{"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"},
    **{"passenger jet": "jet", "passenger train": "train"},
}
"""Two words and the one that takes their place. "home plate" and "train track" are in no table: they name nothing.
"stove top oven" has three words and never matches; it is listed because the published scripts list it."""


@dataclass(frozen=True)
class Mention:
    """A category that a text names, and where: ``text[start:end]``, or in a list of lemmas ``lemmas[start:end]``."""

    category: str
    start: int
    end: int


@dataclass(frozen=True)
class Vocabulary:
    """What captions are searched for.

    Attributes:
        entries: {word or pair of words: category}.
        doubles: {pair of lemmas: the word that takes their place}.
        name: of the table, for results.
    """

    entries: Mapping[str, str]
    doubles: Mapping[str, str] = field(default_factory=lambda: DOUBLES)
    name: str = "custom"

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """A table of the format of CHAIR's authors, with exactly ``DOUBLES``, so that counts are theirs.

        Raises:
            SteeringError: the file names nothing.
            OSError: it cannot be read.
        """
        entries = synonyms.parse(Path(path).read_text(encoding="utf-8").splitlines())
        if not entries:
            raise SteeringError(f"{path} holds no synonyms: wanted are lines such as: car, automobile, van")
        return cls(entries, name=Path(path).name)

    @cached_property
    def known(self) -> frozenset[str]:
        """All entries, and the single words of the pairs."""
        return frozenset(self.entries) | {word for pair in self.doubles for word in pair.split(" ")}

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """The categories, sorted."""
        return tuple(sorted(set(self.entries.values())))

    @cached_property
    def digest(self) -> str:
        """The first 12 hexadecimal digits of SHA-256 of entries and pairs: equal tables count equally."""
        content = json.dumps([sorted(self.entries.items()), sorted(self.doubles.items())])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def lemma(self, word: str) -> str:
        """The singular of a lower-case word where it or its singular is known, else the word."""
        return lemma(word, self.known)

    def mentions(self, text: str) -> list[Mention]:
        """The categories that `text` names, in order, repeats included."""
        words = tokens(text)
        found = self.mentions_of_lemmas([self.lemma(word) for word, _, _ in words])
        return [Mention(m.category, words[m.start][1], words[m.end - 1][2]) for m in found]

    def mentions_of_lemmas(self, lemmas: Sequence[str]) -> list[Mention]:
        """The same for the lemmas of a text, one for each of its words."""
        merged = self.merge(lemmas)
        if any(word == "toilet" for word, _, _ in merged):
            merged = [part for part in merged if part[0] != "seat"]
        return [Mention(self.entries[word], start, end) for word, start, end in merged if word in self.entries]

    def merge(self, lemmas: Sequence[str]) -> list[tuple[str, int, int]]:
        """Pairs replaced, from left to right: (word, first lemma, one past its last lemma)."""
        merged, place = [], 0
        while place < len(lemmas):
            pair = " ".join(lemmas[place : place + 2])
            size = 2 if pair in self.doubles else 1
            merged.append((self.doubles[pair] if size == 2 else lemmas[place], place, place + size))
            place += size
        return merged

    def length(self, text: str) -> int:
        """Words of a text, punctuation included, pairs counted once: what CHAIR's scripts call its length."""
        return len(self.merge([self.lemma(word) for word, _, _ in tokens(text)]))


def tokens(text: str) -> list[tuple[str, int, int]]:
    """The words of a text in lower case, with their places in it."""
    lowered = "".join(sign.lower() if len(sign.lower()) == 1 else sign for sign in text)  # places stay what they were
    return [(match[0], match.start(), match.end()) for match in WORD.finditer(lowered)]


def lemma(word: str, known: frozenset[str] | set[str]) -> str:
    """The lemma of a lower-case word by the rules above, for a closed vocabulary."""
    if word in known:
        return word
    if word in IRREGULAR:
        return IRREGULAR[word]
    for ending, instead in ENDINGS:
        stem = word.removesuffix(ending)
        if stem == word or (ending == "es" and not stem.endswith(SIBILANTS)):
            continue
        if stem + instead in known:
            return stem + instead
    return word


def own_vocabulary() -> Vocabulary:
    """COCO's 80 categories with the project's own synonyms; every pair of words in the table is a pair here."""
    entries = synonyms.parse(synonyms.OWN.splitlines())
    pairs = {entry: entry for entry in entries if entry.count(" ") == 1}
    return Vocabulary(entries, {**pairs, **DOUBLES}, "attnsteer")


def names(mentions: Iterable[Mention]) -> list[str]:
    """The categories of some mentions, in order."""
    return [mention.category for mention in mentions]


COCO = own_vocabulary()
