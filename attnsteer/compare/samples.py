"""What is asked about which picture, and which of them a limited comparison takes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol


class Picture(Protocol):
    """A picture that is opened when it is needed."""

    def open(self) -> Any:
        """A PIL picture, RGB."""
        ...

    def digest(self) -> str:
        """A hash of its content."""
        ...


@dataclass(frozen=True)
class FilePicture:
    """A picture file."""

    path: Path

    def open(self) -> Any:
        from PIL import Image

        with Image.open(self.path) as picture:
            return picture.convert("RGB")

    def digest(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """Read once: many questions are about one picture."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    Attributes:
        id: its name in the task.
        image: the picture's name; questions about one picture are one unit for intervals.
        picture: the picture itself.
        prompt: the question.
        truth: categories in the picture (captions), or ("yes",) or ("no",).
        groups: parts of the task that it belongs to (POPE's splits, number of objects); the report has each by itself.
        stratum: what a limited sample takes its share of.
    """

    id: str
    image: str
    picture: Picture
    prompt: str
    truth: tuple[str, ...]
    groups: tuple[str, ...] = ()
    stratum: str = ""

    @cached_property
    def digest(self) -> str:
        """A hash of picture, question and truth: an answer to another question is not reused."""
        parts = [self.picture.digest(), self.prompt, *self.truth]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def limited(samples: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """All questions about ``limit`` pictures; every stratum keeps its share, up to rounding.

    Args:
        limit: pictures; None, or as many as there are, takes all.
        seed: of the draw. The order of the samples stays.
    """
    strata: dict[str, list[str]] = {}
    for image, stratum in {sample.image: sample.stratum for sample in samples}.items():
        strata.setdefault(stratum, []).append(image)
    total = sum(map(len, strata.values()))
    if limit is None or limit >= total:
        return list(samples)
    quotas = {stratum: limit * len(images) / total for stratum, images in strata.items()}
    counts = {stratum: int(quota) for stratum, quota in quotas.items()}
    rest = sorted(quotas, key=lambda stratum: (counts[stratum] - quotas[stratum], stratum))  # largest remainders first
    for stratum in rest[: limit - sum(counts.values())]:
        counts[stratum] += 1
    taken: set[str] = set()
    for stratum, images in strata.items():
        taken.update(random.Random(f"{seed} {stratum}").sample(sorted(images), counts[stratum]))
    return [sample for sample in samples if sample.image in taken]
