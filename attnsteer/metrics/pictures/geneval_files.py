"""GenEval over files: one line of JSON for each picture, and the scores of each tag.

    {"image": "00000/samples/0000.png", "tag": "single_object", "prompt": "a photo of a dog",
     "include": [{"class": "dog", "count": 1}],
     "detections": [{"class": "dog", "box": [10, 12, 200, 180], "score": 0.97, "color": "brown"}]}

The request may stand under "metadata" instead, or in the published file of all prompts, by the number of the line (from
0) that the picture's line gives as "id", or the folder of its name does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..files import LineError, Rows, first, string
from ..ratios import mean_of
from ..scored import Scored, each, nothing
from .geneval import LOOKS, RELATIONS, Detection, Rules, UnseenError, judge

PICTURE = ("image", "filename", "file_name", "file")
Table = dict[str, Scored]


def requests(given: Rows) -> list[dict[str, Any] | None]:
    """The lines of a file of prompts; None where one cannot be used."""
    found: list[dict[str, Any] | None] = [None] * len(given.rows)
    for position, request in each(given, request_of):
        found[position] = request
    return found


def score(given: Rows, prompts: Sequence[Mapping[str, Any] | None] = (), rules: Rules | None = None) -> Table:
    """The scores by tag, of pictures with detections.

    A tag is left out where the detections of one of its pictures lack a colour or frame that is asked for: the pictures
    that are left would be those in which the object itself is missing.

    Args:
        prompts: of ``requests``, for lines without a request of their own.
        rules: what counts as an object.

    Raises:
        SteeringError: no line can be used.
    """
    there: set[str] = set()
    unseen: dict[str, str] = {}

    def one(row: dict[str, Any]) -> dict[str, Any]:
        name = string(row, PICTURE)
        if name in there:
            raise LineError(f"picture {name} is there already")
        request, found = _request(row, name, prompts), detections(row)
        try:
            record = verdict(name, request, found, rules)
        except UnseenError as error:
            unseen.setdefault(request["tag"], str(error))
            raise LineError(str(error)) from error
        there.add(name)
        return record

    records = [record for _, record in each(given, one) if record["tag"] not in unseen]
    left_out = [f"the tag {tag} is left out: one of its pictures {why}" for tag, why in unseen.items()]
    given.problems[:0] = [f"{given.path}: {problem}" for problem in left_out]
    if not records:
        raise nothing(given)
    return tables(records, given.problems)


def verdict(
    name: str, request: Mapping[str, Any], found: Sequence[Detection], rules: Rules | None = None
) -> dict[str, Any]:
    """The record of one picture.

    Raises:
        UnseenError: what is asked for cannot be seen in these detections.
    """
    given = judge(request, found, rules)
    said = {"image": name, "tag": request["tag"], "prompt": request["prompt"]}
    return {**said, "correct": given.correct, "reasons": list(given.reasons)}


def tables(records: Sequence[Mapping[str, Any]], problems: Sequence[str] = ()) -> Table:
    """By tag the share of right pictures, and of prompts with one; prompts are the samples of intervals."""
    found = {}
    for tag in dict.fromkeys(record["tag"] for record in records):
        mine = [dict(record) for record in records if record["tag"] == tag]
        prompts: dict[str, list[bool]] = {}
        for record in mine:
            prompts.setdefault(record["prompt"], []).append(record["correct"])
        images = mean_of(record["correct"] for record in mine).grouped([record["prompt"] for record in mine])
        table = {"correct": images, "correct_prompts": mean_of(any(each) for each in prompts.values())}
        counts = {"images": len(mine), "prompts": len(prompts), "right": sum(record["correct"] for record in mine)}
        found[tag] = Scored(table, list(prompts), counts, mine, problems=list(problems))
    return found


def totals(parts: Mapping[str, Scored]) -> dict[str, float]:
    """overall: the mean of the tags' scores, each weighing the same; and the shares of all pictures and all prompts."""
    pictures = [record for part in parts.values() for record in part.records]
    prompts = [value for part in parts.values() for value in part.table["correct_prompts"].numerators]
    return {
        "overall": sum(part.table["correct"].value for part in parts.values()) / len(parts),
        "correct_images": sum(record["correct"] for record in pictures) / len(pictures),
        "correct_prompts": float(sum(prompts) / len(prompts)),
    }


# ---- lines -----------------------------------------------------------------------------------------------------------
def request_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The request of a line, checked.

    Raises:
        LineError: something is missing or is not what it should be.
    """
    found: dict[str, Any] = {name: string(dict(row), (name,)) for name in ("tag", "prompt")}
    for part in ("include", "exclude"):
        clauses = row.get(part, [])
        if not isinstance(clauses, list):
            raise LineError(f"{part} is no list")
        found[part] = [_clause(clause, number if part == "include" else 0) for number, clause in enumerate(clauses)]
    if not found["include"] and not found["exclude"]:
        raise LineError("has neither include nor exclude")
    return found


def _clause(given: Any, number: int) -> dict[str, Any]:
    """One entry of include or exclude; ``number`` entries stand before it."""
    if not isinstance(given, dict) or not isinstance(given.get("class"), str):
        raise LineError(f"{given!r} names no class")
    count = given.get("count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise LineError(f"the count {count!r} of {given['class']} is no whole number from 1")
    for look in LOOKS:
        if look in given and not isinstance(given[look], str):
            raise LineError(f"the {look} {given[look]!r} of {given['class']} is no text")
    if "position" in given:
        place = given["position"]
        right = isinstance(place, list) and len(place) == 2 and place[0] in RELATIONS
        if not right or not isinstance(place[1], int) or not 0 <= place[1] < number:
            raise LineError(f"the position {place!r} of {given['class']} is no relation to an earlier entry")
    return {**given, "count": count}


def _request(row: dict[str, Any], name: str, prompts: Sequence[Mapping[str, Any] | None]) -> Mapping[str, Any]:
    own = row.get("metadata", row)
    if isinstance(own, str):
        try:
            own = json.loads(own)
        except json.JSONDecodeError as error:
            raise LineError("metadata is no JSON") from error
    if isinstance(own, dict) and ("include" in own or "exclude" in own):
        return request_of(own)
    folder = re.match(r"(?:.*/)?(\d+)/samples/", name)
    number = row.get("id", int(folder[1]) if folder else None)
    if not prompts or not isinstance(number, int):
        raise LineError("has no include; its request may also come from a file of prompts, by its id")
    request = prompts[number] if 0 <= number < len(prompts) else None
    if request is None:
        raise LineError(f"the file of prompts has no usable line {number} (counted from 0)")
    return request


def detections(row: dict[str, Any]) -> list[Detection]:
    """The detections of a line, checked.

    Raises:
        LineError: they are not what they should be.
    """
    given = first(row, ("detections",))
    if not isinstance(given, list):
        raise LineError("detections is no list")
    return [_detection(entry) for entry in given]


def line(name: str, request: Mapping[str, Any], found: Sequence[Detection]) -> dict[str, Any]:
    """One picture as a line of such a file."""
    boxes = [
        {"class": each.name, "box": list(each.box)}
        | {part: getattr(each, part) for part in ("score", *LOOKS) if getattr(each, part) is not None}
        for each in found
    ]
    return {"image": name, "metadata": dict(request), "detections": boxes}


def _detection(given: Any) -> Detection:
    if not isinstance(given, dict) or not isinstance(given.get("class"), str):
        raise LineError(f"the detection {given!r} names no class")
    box, score = given.get("box"), given.get("score")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(side) for side in box):
        raise LineError(f"the box {box!r} of {given['class']} is not [left, top, right, bottom]")
    if score is not None and not _is_number(score):
        raise LineError(f"the score {score!r} of {given['class']} is no number")
    left, top, right, bottom = map(float, box)
    looks = {look: given.get(look) for look in LOOKS}
    return Detection(given["class"], (left, top, right, bottom), score, **looks)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
