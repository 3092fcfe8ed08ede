"""The tasks on the small world: scenes against its habits, where a guess of what usually comes along is wrong.

In these scenes no object has its usual partner (``attnsteer.world.evaluate.answers.lonely``), and their combinations
are in no training scene. Ground truth is exact, and categories are COCO's, so the counting is that of real pictures.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..metrics import pope
from ..world import text
from ..world.catalog import CORE, find
from ..world.evaluate.answers import lonely
from ..world.scenes import Scene
from .samples import Sample
from .tasks import Describe, Exists

POOL = 600
"""Scenes to choose from."""
FREQUENT = 5
"""Absent objects that the popular split chooses from."""
MAX_NEW_TOKENS = 64
"""More than twice the longest true description."""


@dataclass(frozen=True)
class ScenePicture:
    """A scene, rendered when it is needed."""

    scene: Scene

    def open(self) -> Any:
        return self.scene.image()

    def digest(self) -> str:
        return hashlib.sha256(self.scene.array().tobytes()).hexdigest()


@cache
def scenes(count: int = POOL) -> dict[str, Scene]:
    """The first scenes to choose from, by name."""
    return {f"lonely-{number:04d}": lonely(number) for number in range(count)}


def describe(count: int = POOL) -> Describe:
    """Descriptions of all scenes; groups are numbers of objects."""
    samples = [
        Sample(name, name, ScenePicture(scene), text.DESCRIBE, scene.categories, (_size(scene),), _size(scene))
        for name, scene in scenes(count).items()
    ]
    return Describe(samples, MAX_NEW_TOKENS)


def exists(seed: int = 0, count: int = POOL) -> Exists:
    """Of every scene one object that is there, and for each of POPE's splits one that is not.

    random: any; popular: one of the five most frequent (of all scenes); adversarial: the partner of the object that is
    there. The question with the answer yes belongs to all splits. ``seed`` chooses the objects.
    """
    popular, samples = _by_frequency(list(scenes(count).values())), []
    for name, scene in scenes(count).items():
        rng = random.Random(f"{seed} {name}")
        present = rng.choice(scene.categories)
        samples.append(_question(f"{name}-yes", name, scene, present, pope.SPLITS))
        absent = [other for other in popular if other not in scene.counts]
        for split in pope.SPLITS:
            asked = {"random": absent, "popular": absent[:FREQUENT], "adversarial": [find(present).partner]}[split]
            samples.append(_question(f"{name}-{split}", name, scene, rng.choice(asked), (split,)))
    return Exists(samples)


def _question(label: str, image: str, scene: Scene, name: str, groups: tuple[str, ...]) -> Sample:
    truth = ("yes",) if name in scene.counts else ("no",)
    return Sample(label, image, ScenePicture(scene), text.exists(scene, name)[0], truth, groups, _size(scene))


def _by_frequency(drawn: Sequence[Scene]) -> list[str]:
    counts = {name: sum(name in scene.counts for scene in drawn) for name in CORE}
    return sorted(CORE, key=lambda name: -counts[name])


def _size(scene: Scene) -> str:
    count = len(scene.objects)
    return f"{count} object{'s' * (count > 1)}"
