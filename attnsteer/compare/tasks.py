"""The tasks of a comparison: what is counted in an answer, and which numbers are shown.

``chair``: describe the picture; how many of the objects named are not there (``attnsteer.metrics.chair``).
``pope``: is this object there? (``attnsteer.metrics.pope`` and ``yesno``.)

An answer is counted once, into plain integers that are kept with it; everything else is made from these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from ..metrics import chair, yesno
from ..metrics.objects import made_by
from ..metrics.ratios import Ratio, grouped, mean_of, quotient
from ..metrics.words import COCO, Vocabulary, names
from .samples import Sample

Counts = dict[str, Any]
DESCRIBE = "Please describe this image in detail."


@dataclass(frozen=True)
class Metric:
    """A number of the report.

    Attributes:
        name: in the table of ratios; title: in tables.
        better: which way is better; "" for numbers that only have to stay where they are.
        headline: whether the task is about it; the others are guards, which say what a better headline has cost.
        percent: a share, shown in percent; else a number of words.
    """

    name: str
    title: str
    better: Literal["lower", "higher", ""] = ""
    headline: bool = False
    percent: bool = True


class Task(Protocol):
    """One benchmark: samples, how an answer is counted, and what is made of the counts."""

    name: str
    samples: Sequence[Sample]
    max_new_tokens: int
    metrics: tuple[Metric, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """How answers are counted: lines that were counted otherwise are not used."""
        ...

    def count(self, sample: Sample, text: str, truncated: bool) -> Counts:
        """The integers of one answer."""
        ...

    def ratios(self, samples: Sequence[Sample], counts: Sequence[Counts]) -> dict[str, Ratio]:
        """All metrics, one sample of the ratios for each picture."""
        ...


@dataclass(frozen=True)
class Describe:
    """CHAIR of descriptions.

    Args:
        samples: with the categories of the picture as truth.
        max_new_tokens: 512 in papers with long descriptions, 64 with short ones.
        vocabulary: which words are which objects.
    """

    samples: Sequence[Sample]
    max_new_tokens: int = 512
    vocabulary: Vocabulary = COCO

    name = "chair"
    metrics = (
        Metric("chair_s", "CHAIR_S", "lower", headline=True),
        Metric("chair_i", "CHAIR_I", "lower", headline=True),
        Metric("chair_i_distinct", "CHAIR_I distinct", "lower"),
        Metric("recall", "recall", "higher"),
        Metric("words", "words", percent=False),
        Metric("distinct_words", "distinct words"),
        Metric("truncated", "truncated", "lower"),
    )

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **made_by(self.vocabulary)}

    def count(self, sample: Sample, text: str, truncated: bool) -> Counts:
        mentions = self.vocabulary.mentions(text)
        found = chair.caption("", names(mentions), sample.truth, text, truncated=truncated)
        kept = {name: value for name, value in asdict(found).items() if name not in ("image", "length")}
        places = [[m.start, m.end, m.category] for m in mentions]
        return {**kept, "made_up": list(found.made_up), "places": places}

    def ratios(self, samples: Sequence[Sample], counts: Sequence[Counts]) -> dict[str, Ratio]:
        own = [{k: v for k, v in each.items() if k != "places"} for each in counts]
        records = [chair.Caption(s.image, **each) for s, each in zip(samples, own, strict=True)]
        return grouped(chair.ratios(records), [sample.image for sample in samples])


@dataclass(frozen=True)
class Exists:
    """POPE: yes/no questions.

    Args:
        samples: with ("yes",) or ("no",) as truth.
        max_new_tokens: answers are short; what runs into the limit is counted as truncated.
        rule: how answers are read, a name of ``attnsteer.metrics.yesno.RULES``.
    """

    samples: Sequence[Sample]
    max_new_tokens: int = 32
    rule: str = "pope"

    name = "pope"
    metrics = (
        Metric("f1", "F1", "higher", headline=True),
        Metric("accuracy", "accuracy", "higher", headline=True),
        Metric("precision", "precision", "higher"),
        Metric("recall", "recall", "higher"),
        Metric("yes", "yes ratio"),
        Metric("unparsed", "unparsed", "lower"),
        Metric("words", "words", percent=False),
        Metric("distinct_words", "distinct words"),
        Metric("truncated", "truncated", "lower"),
    )

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "rule": self.rule}

    def count(self, sample: Sample, text: str, truncated: bool) -> Counts:
        answer = yesno.read(text, sample.truth == ("yes",), self.rule)
        words = text.lower().split()
        read = {"label": answer.label, "said": answer.said, "plain": answer.plain}
        return {**read, "words": len(words), "distinct_words": len(set(words)), "truncated": truncated}

    def ratios(self, samples: Sequence[Sample], counts: Sequence[Counts]) -> dict[str, Ratio]:
        images = [sample.image for sample in samples]
        read = [
            yesno.Answer(image, each["label"], each["said"], each["plain"])
            for image, each in zip(images, counts, strict=True)
        ]
        guards = {
            "words": mean_of(each["words"] for each in counts),
            "distinct_words": mean_of(float(quotient(each["distinct_words"], each["words"])) for each in counts),
            "truncated": mean_of(each["truncated"] for each in counts),
        }
        return yesno.ratios(read) | grouped(guards, images)


def marked(counts: Mapping[str, Any]) -> list[tuple[int, int, bool]]:
    """Places of an answer that name an object, ``text[start:end]``, and whether it is made up."""
    made_up = set(counts.get("made_up", ()))
    return [(start, end, name in made_up) for start, end, name in counts.get("places", ())]


def wrong(counts: Mapping[str, Any]) -> bool:
    """Whether the answer to a question was not read as the right one."""
    return "label" in counts and counts["said"] != counts["label"]
