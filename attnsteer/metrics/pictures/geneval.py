"""GenEval: does a picture show the objects, numbers, colours and places that its prompt names? From detections alone.

Ghosh et al., 2023, arXiv:2310.11513. A request is the metadata of one prompt, with the names of the published file:

    {"tag": "position", "prompt": "a photo of a dog right of a cat",
     "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
     "exclude": [{"class": "bus", "count": 1}]}

Rules: of each class of ``include`` the surest ``count`` boxes must be there; ``count`` of them must have the colour
(or the ``frame``, which only pictures of the small world have); each of them must be where ``position`` says with
respect to each box of that earlier entry. Of no class of ``exclude`` there may be ``count`` or more. Which network
detects is for the caller: the published numbers are of a Mask2Former and of CLIP ViT-L/14 for colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The published tags."""
RELATIONS = ("left of", "right of", "above", "below")
LOOKS = {"color": "color", "frame": "frame"}
MARGIN = 0.1
"""How much of both sizes together the distance of two centres is shortened by."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Attributes:
        name: its class; box: left, top, right, bottom in pixels.
        score: how sure the detector is; None where it gives no score and has chosen by itself.
        color, frame: None where nobody has looked.
    """

    name: str
    box: Box
    score: float | None = None
    color: str | None = None
    frame: str | None = None


@dataclass(frozen=True)
class Rules:
    """What is taken for an object.

    Attributes:
        score: boxes must be surer than this; counting: for prompts of the tag "counting".
        most: boxes of one class at most, the surest.
        overlap: boxes that overlap a surer one of their class by so much (intersection over union) do not count; 1, as
            published: all count.
    """

    score: float = 0.3
    counting: float = 0.9
    most: int = 16
    overlap: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is right, and if not, why."""

    correct: bool
    reasons: tuple[str, ...] = ()


class UnseenError(ValueError):
    """A request asks for something that the detections do not say."""


def relations(one: Box, other: Box, margin: float = MARGIN) -> set[str]:
    """Where ``one`` is with respect to ``other``: none, one or two of ``RELATIONS``; y grows downwards.

    ``d`` is the difference of the centres, with each component brought ``margin (size + size)`` nearer to 0 and then
    divided by the length of the difference as it was: "left of" where its x is below -0.5, "below" where its y is above
    0.5, and so on. Where both components are below 0.001 there is no relation.
    """
    a, b = np.asarray(one, dtype=np.float64).reshape(2, 2), np.asarray(other, dtype=np.float64).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    left = np.sign(offset) * np.maximum(np.abs(offset) - margin * ((a[1] - a[0]) + (b[1] - b[0])), 0.0)
    if (np.abs(left) < 1e-3).all():
        return set()
    x, y = left / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}


def chosen(detections: Sequence[Detection], tag: str, rules: Rules | None = None) -> dict[str, list[Detection]]:
    """The detections that count, by class, surest first; those without a score keep their order."""
    rules = rules or Rules()
    least = rules.counting if tag == "counting" else rules.score
    found: dict[str, list[Detection]] = {}
    for each in sorted(detections, key=lambda d: -(d.score or 0.0)):
        if each.score is None or each.score > least:
            found.setdefault(each.name, []).append(each)
    return {name: _apart(boxes[: rules.most], rules.overlap) for name, boxes in found.items()}


def judge(request: Mapping[str, Any], detections: Sequence[Detection], rules: Rules | None = None) -> Verdict:
    """Whether the detections are what the request asks for.

    Raises:
        UnseenError: a colour or frame is asked for that the detections do not have.
    """
    found = chosen(detections, str(request.get("tag", "")), rules)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for clause in request.get("include", ()):
        boxes = found.get(clause["class"], [])[: clause["count"]]
        wrong = _clause(clause, boxes, matched)
        reasons += wrong
        matched.append(None if wrong else boxes)
    for clause in request.get("exclude", ()):
        count = len(found.get(clause["class"], []))
        if count >= clause["count"]:
            reasons.append(f"{count} {clause['class']}, allowed are fewer than {clause['count']}")
    return Verdict(not reasons, tuple(reasons))


def _clause(clause: Mapping[str, Any], boxes: Sequence[Detection], matched: Sequence[Any]) -> list[str]:
    """What is wrong with the boxes of one entry of ``include``."""
    name, count = clause["class"], clause["count"]
    if len(boxes) < count:
        return [f"{len(boxes)} {name}, wanted are {count}"]
    wrong = []
    for look in LOOKS:
        if look in clause:
            seen = [getattr(box, look) for box in boxes]
            if None in seen:
                raise UnseenError(f"asks for the {look} of {name}, which the detections do not have")
            if seen.count(clause[look]) < count:
                wrong.append(f"{look} {', '.join(seen)} of {name}, wanted is {clause[look]}")
    if "position" in clause and not wrong:
        wanted, target = clause["position"]
        wrong += _place(name, boxes, wanted, matched[target])
    return wrong


def _place(name: str, boxes: Sequence[Detection], wanted: str, others: Sequence[Detection] | None) -> list[str]:
    if others is None:
        return [f"nothing that {name} could be {wanted}"]
    for box in boxes:
        for other in others:
            seen = relations(box.box, other.box)
            if wanted not in seen:
                return [f"{name} is {' and '.join(sorted(seen)) or 'nowhere'}, wanted is {wanted} {other.name}"]
    return []


def _apart(boxes: list[Detection], most: float) -> list[Detection]:
    kept: list[Detection] = []
    for box in boxes:
        if most >= 1 or all(_overlap(box.box, other.box) < most for other in kept):
            kept.append(box)
    return kept


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width, height = (max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    together = sum(areas) - width * height
    return width * height / together if together else 0.0
