"""CHAIR: how many of the objects that captions name are not in the picture.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv:1809.02156. For caption i with m_i
mentions (repeats count), b_i of them of categories that are not there, g_i the categories named, G_i those there:

    chair_s          = #{i: b_i > 0} / N                 chair_i = sum b_i / sum m_i
    recall           = sum |g_i & G_i| / sum |G_i|       precision = sum |g_i & G_i| / sum |g_i|
    f1               = 2 sum |g_i & G_i| / (sum |g_i| + sum |G_i|), the harmonic mean of those two
    chair_i_distinct = sum |g_i - G_i| / sum |g_i|       made-up objects once each: saying a true object again, which
                                                         lowers chair_i, changes nothing here

Denominators that are 0 give 0. Every value is made of integers of single captions (``Caption``), so intervals and
paired comparisons need nothing else. chair_s of 500 captions is known to about 4.4 points: print intervals.

    records = [caption(image, names(COCO.mentions(said)), there[image], said) for image, said in captions]
    values = {name: ratio.value for name, ratio in ratios(records).items()}
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .ratios import Ratio, mean_of, quotient


@dataclass(frozen=True)
class Caption:
    """One caption, counted.

    Attributes:
        image: which.
        mentions: objects named, with repeats; made_up: those that are not there, with repeats, in order.
        named: categories named; right: those of them that are there; there: categories in the picture.
        length: its words as ``Vocabulary.length`` counts them; None where only objects are known.
        words, distinct_words: split at white space, in lower case; None likewise.
        truncated: whether the length limit ended it; None where nobody said.
    """

    image: int | str
    mentions: int
    made_up: tuple[str, ...]
    named: int
    right: int
    there: int
    length: int | None = None
    words: int | None = None
    distinct_words: int | None = None
    truncated: bool | None = None

    @property
    def values(self) -> dict[str, float]:
        """The metrics of this caption alone; f1 is the harmonic mean of its precision and recall."""
        return {
            "chair_s": float(bool(self.made_up)),
            "chair_i": float(quotient(len(self.made_up), self.mentions)),
            "recall": float(quotient(self.right, self.there)),
            "precision": float(quotient(self.right, self.named)),
            "f1": float(quotient(2 * self.right, self.named + self.there)),
            "chair_i_distinct": float(quotient(self.named - self.right, self.named)),
        }


def caption(
    image: int | str,
    named: Sequence[str],
    there: Collection[str],
    text: str | None = None,
    length: int | None = None,
    truncated: bool | None = None,
) -> Caption:
    """Count one caption.

    Args:
        named: the categories that it names, in order, with repeats (``words.names(COCO.mentions(text))``).
        there: the categories in the picture.
        text: the caption, for the share of distinct words; length: its words (``COCO.length(text)``).
    """
    present, different = set(there), set(named)
    words = None if text is None else text.lower().split()
    return Caption(
        image,
        len(named),
        tuple(name for name in named if name not in present),
        len(different),
        len(different & present),
        len(present),
        length,
        None if words is None else len(words),
        None if words is None else len(set(words)),
        truncated,
    )


def ratios(records: Sequence[Caption]) -> dict[str, Ratio]:
    """All metrics of some captions; values are shares, ``length`` and ``words`` are numbers of words a caption.

    ``length`` is there when every caption has one, ``words`` and ``distinct_words`` (the mean share of different words
    in a caption; 0 for an empty one) when every caption has its text, ``truncated`` when it is known for all.

    Raises:
        ValueError: no captions.
    """
    if not records:
        raise ValueError("No captions: CHAIR is of one or more.")
    column = {name: [getattr(r, name) for r in records] for name in ("mentions", "named", "right", "there")}
    made_up = [len(r.made_up) for r in records]
    table = {
        "chair_s": mean_of(float(count > 0) for count in made_up),
        "chair_i": Ratio(made_up, column["mentions"]),
        "recall": Ratio(column["right"], column["there"]),
        "precision": Ratio(column["right"], column["named"]),
        "f1": Ratio([2 * r.right for r in records], [r.named + r.there for r in records]),
        "chair_i_distinct": Ratio([r.named - r.right for r in records], column["named"]),
    }
    lengths = [r.length for r in records if r.length is not None]
    texts = [(r.words, r.distinct_words) for r in records if r.words is not None and r.distinct_words is not None]
    ended = [r.truncated for r in records if r.truncated is not None]
    if len(lengths) == len(records):
        table["length"] = mean_of(lengths)
    if len(texts) == len(records):
        table["words"] = mean_of(words for words, _ in texts)
        table["distinct_words"] = mean_of(float(quotient(different, words)) for words, different in texts)
    if len(ended) == len(records):
        table["truncated"] = mean_of(ended)
    return table


def totals(records: Sequence[Caption]) -> dict[str, int]:
    """The integers that the metrics are made of, summed."""
    return {
        "captions": len(records),
        "hallucinated_captions": sum(bool(r.made_up) for r in records),
        "hallucinated_mentions": sum(len(r.made_up) for r in records),
        "mentions": sum(r.mentions for r in records),
        "recalled": sum(r.right for r in records),
        "gt_objects": sum(r.there for r in records),
        "distinct_generated": sum(r.named for r in records),
    }
