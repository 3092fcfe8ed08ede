"""GenEval: geometry, rules, files, and scores by tag."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from attnsteer.errors import SteeringError
from attnsteer.metrics import files
from attnsteer.metrics.pictures import geneval_files
from attnsteer.metrics.pictures.geneval import Box, Detection, Rules, UnseenError, chosen, judge, relations
from tests.metrics.common import fixture

HERE = (0.0, 0.0, 10.0, 10.0)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((20, 0, 30, 10), {"left of"}),
        ((20, 20, 30, 30), {"left of", "above"}),
        ((1, 1, 11, 11), set()),
        ((20, 10, 30, 20), {"left of"}),
        ((0, 0, 10, 10), set()),
        ((0, -20, 10, -10), {"below"}),
        ((-20, 0, -10, 10), {"right of"}),
        ((3, 0, 13, 10), set()),  # 3 - 2 of 3: a third
        ((5, 0, 15, 10), {"left of"}),  # 5 - 2 of 5
    ],
)
def test_relations_of_boxes(other: Box, expected: set[str]) -> None:
    assert relations(HERE, other) == expected
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(other, HERE) == {opposite[name] for name in expected}


def thing(name: str, left: float = 0, top: float = 0, score: float | None = 0.95, **looks: str) -> Detection:
    return Detection(name, (left, top, left + 10, top + 10), score, **looks)


def verdict(request: dict[str, Any], *found: Detection, rules: Rules | None = None) -> bool:
    return judge(request, found, rules).correct


TWO = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}


def test_all_objects_must_be_there() -> None:
    assert verdict(TWO, thing("cat"), thing("dog"), thing("bus"))
    assert judge(TWO, [thing("dog")]).reasons == ("0 cat, wanted are 1",)
    assert judge(TWO, []).reasons == ("0 dog, wanted are 1", "0 cat, wanted are 1")


def test_boxes_must_be_surer_than_the_threshold_of_their_tag() -> None:
    assert not verdict(TWO, thing("cat"), thing("dog", score=0.3))
    assert verdict(TWO, thing("cat"), thing("dog", score=0.31))
    assert verdict(TWO, thing("cat"), thing("dog", score=None))
    counting = {"tag": "counting", "include": [{"class": "dog", "count": 1}]}
    assert not verdict(counting, thing("dog", score=0.9)) and verdict(counting, thing("dog", score=0.91))
    assert verdict(counting, thing("dog", score=0.5), rules=Rules(counting=0.4))


def test_counting_excludes_one_more() -> None:
    request = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    dogs = [thing("dog", 20 * n) for n in range(4)]
    assert [verdict(request, *dogs[:n]) for n in range(5)] == [False, False, True, False, False]
    assert judge(request, dogs[:3]).reasons == ("3 dog, allowed are fewer than 3",)
    assert verdict(request, *dogs[:2], thing("dog", 60, score=0.7))


def test_colours_of_the_surest_boxes() -> None:
    request = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    red, blue = thing("dog", color="red"), thing("dog", score=0.8, color="blue")
    assert verdict(request, red) and verdict(request, blue, red) and not verdict(request, blue)
    assert not verdict(request, Detection("dog", HERE, 0.99, "blue"), red)
    assert judge(request, [blue]).reasons == ("color blue of dog, wanted is red",)
    two = {"tag": "colors", "include": [{"class": "dog", "count": 2, "color": "red"}]}
    assert verdict(two, red, red) and not verdict(two, red, blue)
    assert verdict({**two, "include": [{"class": "dog", "count": 1, "frame": "red"}]}, thing("dog", frame="red"))


def test_what_detections_do_not_say_is_no_wrong_picture() -> None:
    with pytest.raises(UnseenError, match="color of dog"):
        verdict({"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}, thing("dog"))


PLACE = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
}


def test_places() -> None:
    cat, dog = thing("cat", 0), thing("dog", 30)
    assert verdict(PLACE, cat, dog) and not verdict(PLACE, thing("cat", 60), dog)
    assert judge(PLACE, [dog]).reasons == ("0 cat, wanted are 1", "nothing that dog could be right of")
    assert judge(PLACE, [cat, thing("dog", 0, 30)]).reasons == ("dog is below, wanted is right of cat",)
    assert judge(PLACE, [cat, thing("dog", 1)]).reasons == ("dog is nowhere, wanted is right of cat",)
    # only the surest cat and the surest dog are looked at
    assert verdict(PLACE, thing("cat", 90, score=0.5), cat, dog, thing("dog", -50, score=0.4))


def test_every_pair_must_hold() -> None:
    cats = {"class": "cat", "count": 2}
    request = {"tag": "position", "include": [cats, PLACE["include"][1]]}  # type: ignore[index]
    assert verdict(request, thing("cat", 0), thing("cat", 10), thing("dog", 60))
    assert not verdict(request, thing("cat", 0), thing("cat", 90), thing("dog", 60))


def test_a_wrong_colour_is_no_target() -> None:
    request = {**PLACE, "include": [{"class": "cat", "count": 1, "color": "red"}, PLACE["include"][1]]}
    reasons = judge(request, [thing("cat", color="blue"), thing("dog", 30)]).reasons
    assert reasons == ("color blue of cat, wanted is red", "nothing that dog could be right of")


def test_which_boxes_count() -> None:
    boxes = [Detection("dog", (n, 0, n + 10, 10), n / 40) for n in range(40)]
    found = chosen(boxes, "two_object")["dog"]
    assert [box.score for box in found] == [n / 40 for n in range(39, 23, -1)]
    # neighbours overlap by 9 of 11; those two apart by 8 of 12
    apart = chosen(boxes, "two_object", Rules(overlap=0.7))["dog"]
    assert [box.score for box in apart] == [n / 40 for n in range(39, 23, -2)]


def test_the_order_of_detections_does_not_matter() -> None:
    found = [thing("cat", 0), thing("dog", 30, score=0.9), thing("dog", -40, score=0.8), thing("bus")]
    assert verdict(PLACE, *found) and verdict(PLACE, *found[::-1]) and verdict(PLACE, *found[2:], *found[:2])


# ---- files -----------------------------------------------------------------------------------------------------------
def line(image: str, correct: bool, tag: str = "single_object", prompt: str = "a dog", **more: Any) -> dict[str, Any]:
    found = [{"class": "dog", "box": [0, 0, 5, 5], "score": 0.9}] if correct else []
    return {
        "image": image,
        "tag": tag,
        "prompt": prompt,
        "include": [{"class": "dog", "count": 1}],
        "detections": found,
    } | more


def rows(path: Path, lines: list[Any]) -> files.Rows:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return files.rows(path)


def test_scores_of_tags_and_their_mean(tmp_path: Path) -> None:
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    lines = [line(f"{tag}-{n}", tag != "color_attr", tag) for tag in tags for n in range(3 if tag == "colors" else 2)]
    lines[-1]["detections"] = line("x", False)["detections"]
    parts = geneval_files.score(rows(tmp_path / "d.jsonl", [{**each, "detections": [
        {**box, "score": 0.95} for box in each["detections"]]} for each in lines]))  # fmt: skip
    assert [parts[tag].table["correct"].value for tag in tags] == [1, 1, 1, 1, 1, 0]
    totals = geneval_files.totals(parts)
    assert totals["overall"] == pytest.approx(0.8333, abs=1e-4)
    assert totals["correct_images"] == pytest.approx(11 / 13) and totals["correct_prompts"] == pytest.approx(5 / 6)


def test_images_and_prompts_are_counted(tmp_path: Path) -> None:
    lines = [line(f"{n}", n in (0, 3), prompt="a dog" if n < 4 else "one dog") for n in range(6)]
    part = geneval_files.score(rows(tmp_path / "d.jsonl", lines))["single_object"]
    assert part.table["correct"].value == pytest.approx(2 / 6) and part.table["correct_prompts"].value == 0.5
    assert part.counts == {"images": 6, "prompts": 2, "right": 2} and part.keys == ["a dog", "one dog"]
    assert part.table["correct"].denominators.tolist() == [4, 2]
    assert part.records[1] == {
        "image": "1",
        "tag": "single_object",
        "prompt": "a dog",
        "correct": False,
        "reasons": ["0 dog, wanted are 1"],
    }


def test_requests_come_from_three_places(tmp_path: Path) -> None:
    own = line("a.png", True)
    told = {"image": "00001/samples/0000.png", "detections": own["detections"]}
    request = {name: own[name] for name in ("tag", "prompt", "include")}
    prompts = geneval_files.requests(rows(tmp_path / "p.jsonl", [{**request, "prompt": "first"}, request, {"tag": 1}]))
    assert [each and each["prompt"] for each in prompts] == ["first", "a dog", None]
    lines = [
        own,
        told,
        {**told, "image": "b.png", "id": 0},
        {**told, "image": "c.png", "metadata": json.dumps(request)},
    ]
    part = geneval_files.score(rows(tmp_path / "d.jsonl", lines), prompts)["single_object"]
    assert [record["prompt"] for record in part.records] == ["a dog", "a dog", "first", "a dog"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"image": "a"}, "picture a is there already"),
    ({"include": None}, "has no include"),
    ({"include": [{"count": 1}]}, "names no class"),
    ({"include": [{"class": "dog", "count": 0}]}, "the count 0 of dog is no whole number from 1"),
    ({"include": [{"class": "dog", "position": ["left of", 0]}]}, "no relation to an earlier entry"),
    ({"include": [{"class": "cat"}, {"class": "dog", "position": ["near", 0]}]}, "no relation to an earlier entry"),
    ({"include": [{"class": "dog", "color": 3}]}, "the color 3 of dog is no text"),
    ({"include": []}, "has neither include nor exclude"),
    ({"tag": None}, "has none of the fields tag"),
    ({"detections": None}, "has none of the fields detections"),
    ({"detections": [{"class": "dog", "box": [1, 2, 3]}]}, "is not .left, top, right, bottom."),
    ({"detections": [{"class": "dog", "box": [1, 2, 3, float("nan")]}]}, "is not .left, top, right, bottom."),
    ({"detections": [{"class": "dog", "box": [1, 2, 3, 4], "score": "high"}]}, "the score 'high' of dog"),
    ({"detections": [{"box": [1, 2, 3, 4]}]}, "names no class"),
    ({"include": None, "metadata": "{"}, "metadata is no JSON"),
    ({"include": None, "id": 7}, "has no usable line 7"),
]


@pytest.mark.parametrize(("change", "why"), BAD)
def test_bad_lines_are_named_and_left_out(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    wrong = {name: value for name, value in (line("b", True) | change).items() if value is not None}
    given = rows(tmp_path / "d.jsonl", [line("a", True), wrong])
    prompts = [geneval_files.request_of(line("x", True))] if "id" in change else []
    part = geneval_files.score(given, prompts)["single_object"]
    assert part.counts["images"] == 1
    assert len(part.problems) == 1
    assert re.search(f"line 2: .*{why}", part.problems[0])


def test_a_tag_whose_colours_nobody_has_seen_is_left_out(tmp_path: Path) -> None:
    red = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    lines = [line("a", True), line("b", True, **red), line("c", False, **red), line("d", True, **red)]
    lines[3]["detections"] = [{**lines[3]["detections"][0], "color": "red"}]
    parts = geneval_files.score(rows(tmp_path / "d.jsonl", lines))
    assert list(parts) == ["single_object"] and geneval_files.totals(parts)["overall"] == 1
    tag, bad = parts["single_object"].problems
    assert tag.endswith("the tag colors is left out: one of its pictures asks for the color of dog, which the "
                        "detections do not have")  # fmt: skip
    assert "line 2: asks for the color of dog" in bad


def test_a_file_without_a_usable_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="No line"):
        geneval_files.score(rows(tmp_path / "d.jsonl", [{"image": "a"}]))


def test_the_published_prompts_are_read() -> None:
    given = files.rows(fixture("geneval/evaluation_metadata.jsonl"))
    prompts = geneval_files.requests(given)
    assert not given.problems and len(prompts) == 553
    tags = [prompt["tag"] for prompt in prompts if prompt]
    published = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    assert [tags.count(tag) for tag in published] == [80, 99, 80, 94, 100, 100]
