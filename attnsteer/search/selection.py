"""The result of a search: heads in the order in which they were found, round by round, as a JSON file.

``heads.json``::

    {"format": 1, "rounds": [{"heads": [[3, 5], [0, 1]], "scores": [0.81, 0.79]}, ...], "settings": {...}}

A head is ``[layer, head]``, both from 0; the layer is a site name where a layer number would not say which site is
meant. ``scores`` are the objective's, of the set with this head added; ``settings`` say how they were made. Reading
checks every key and type and runs nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SteeringError
from ..plain import short
from ..where import Steps, Where

FORMAT = 1


class Head(NamedTuple):
    """One attention head: the layer as ``Where`` takes it (a number, or a site name), and the head, from 0."""

    layer: int | str
    head: int

    def __str__(self) -> str:
        return f"L{self.layer} H{self.head}"


@dataclass(frozen=True)
class Selection:
    """The heads that a search found.

    Args:
        rounds: the heads of each round, best first.
        scores: for each of them the score of the set with it added; empty where there are none.
        settings: how they were found.
    """

    rounds: tuple[tuple[Head, ...], ...]
    scores: tuple[tuple[float, ...], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        heads = self.heads
        if len(set(heads)) < len(heads):
            twice = next(head for head in heads if heads.count(head) > 1)
            raise SteeringError(f"The head {twice} is selected twice.")
        if self.scores and [len(s) for s in self.scores] != [len(r) for r in self.rounds]:
            raise SteeringError("A selection needs one score for each head, or none at all.")

    @property
    def heads(self) -> tuple[Head, ...]:
        """All heads in the order in which they were found."""
        return tuple(head for found in self.rounds for head in found)

    def prefix(self, rounds: int) -> Selection:
        """What the search had after its first ``rounds`` rounds."""
        if not 0 <= rounds <= len(self.rounds):
            raise SteeringError(f"rounds={rounds!r} is out of range: this search had {len(self.rounds)}.")
        return Selection(self.rounds[:rounds], self.scores[:rounds], self.settings)

    def where(self, top: int | None = None, steps: Steps = "all") -> Where:
        """The first ``top`` heads (default: all) as a selection that every processor takes."""
        heads = self.heads
        if not heads:
            raise SteeringError("This selection has no heads: the search found none that passed its thresholds.")
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= len(heads)):
            raise SteeringError(f"top={top!r} is out of range: the selection has {len(heads)} heads, allowed is 1 up.")
        return where_of(heads[:top], steps)

    # ---- the file --------------------------------------------------------------------------------------------------
    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the selection; an existing file is replaced in one go."""
        rounds: list[dict[str, Any]] = [{"heads": [list(head) for head in found]} for found in self.rounds]
        for entry, scores in zip(rounds, self.scores, strict=False):
            entry["scores"] = list(scores)
        lines = ",\n  ".join(json.dumps(entry) for entry in rounds)
        settings = json.dumps(dict(self.settings), indent=1, sort_keys=True)
        place = Path(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(place.name + ".part")
        beside.write_text(f'{{"format": {FORMAT},\n "rounds": [\n  {lines}],\n "settings": {settings}}}\n', "utf-8")
        os.replace(beside, place)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Selection:
        """Read what ``save`` wrote.

        Raises:
            SteeringError: no such file, or anything in it that is not as described above.
        """
        place = Path(file).expanduser()
        if not place.is_file():
            raise SteeringError(f"There is no selection file {str(place)!r}.")
        try:
            return _read(json.loads(place.read_text(encoding="utf-8")))
        except (SteeringError, ValueError) as error:
            raise SteeringError(f"{place}: {error if isinstance(error, SteeringError) else 'not JSON'}") from error


def where_of(heads: Sequence[Head], steps: Steps = "all") -> Where:
    """These heads as ``Where``, by layer."""
    by_layer: dict[int | str, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    return Where(heads={layer: tuple(sorted(found)) for layer, found in by_layer.items()}, steps=steps)


def _read(data: Any) -> Selection:
    if not isinstance(data, dict) or set(data) != {"format", "rounds", "settings"}:
        raise SteeringError("the keys must be 'format', 'rounds' and 'settings'.")
    if type(data["format"]) is not int or data["format"] != FORMAT:
        raise SteeringError(f"format={short(data['format'])} is not known: this version reads format {FORMAT}.")
    if not isinstance(data["settings"], dict) or not isinstance(data["rounds"], list):
        raise SteeringError("'settings' must be a mapping and 'rounds' a list.")
    for entry in data["rounds"]:
        if not isinstance(entry, dict) or not {"heads"} <= set(entry) <= {"heads", "scores"}:
            raise SteeringError(f"{short(entry)} is no round: wanted are its 'heads' and, if known, their 'scores'.")
        if not all(isinstance(part, list) for part in entry.values()):
            raise SteeringError(f"{short(entry)} is no round: 'heads' and 'scores' are lists.")
    rounds = tuple(tuple(_head(item) for item in entry["heads"]) for entry in data["rounds"])
    scored = [entry["scores"] for entry in data["rounds"] if "scores" in entry]
    if scored and len(scored) < len(rounds):
        raise SteeringError("either all rounds have scores or none.")
    return Selection(rounds, tuple(tuple(_score(value) for value in part) for part in scored), data["settings"])


def _head(item: Any) -> Head:
    layer, head = item if isinstance(item, list) and len(item) == 2 else (None, None)
    if (type(layer) is int or (isinstance(layer, str) and layer)) and type(head) is int and head >= 0:
        return Head(layer, head)
    raise SteeringError(f"{short(item)} is no head: wanted is [layer, head], from 0.")


def _score(value: Any) -> float:
    if type(value) in (int, float) and math.isfinite(value):
        return float(value)
    raise SteeringError(f"{short(value)} is no score: wanted is a finite number.")
