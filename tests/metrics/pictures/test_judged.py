"""The small world's judge as GenEval's detector, on true scenes."""

from __future__ import annotations

import pytest

from attnsteer.metrics.pictures.geneval import Detection, judge
from attnsteer.metrics.pictures.geneval_files import request_of
from attnsteer.metrics.pictures.judged import RULES, TAGS, detections, presence, request
from attnsteer.world import sampling
from attnsteer.world.evaluate.pictures import wishes
from attnsteer.world.judge import Judge


@pytest.fixture(scope="module")
def seen_by() -> Judge:
    return Judge.load()


def test_detections_are_the_objects_of_the_scene(seen_by: Judge) -> None:
    scene = sampling.compose(["dog", "car"], "blue", seed=3)
    found = detections(seen_by, [scene.image(), scene.image().resize((128, 192))])
    for boxes, (across, down) in zip(found, [(1, 1), (2, 3)], strict=True):
        assert {each.name for each in boxes} == {"dog", "car"}
        for each in boxes:
            true = next(thing.box for thing in scene.objects if thing.name == each.name)
            for side, wanted, factor in zip(each.box, true, (across, down, across, down), strict=True):
                assert abs(side / factor - wanted) <= 5
            assert each.score is not None and 0.6 < each.score <= 1
            assert each.color is None and each.frame == ""


@pytest.mark.parametrize("kind", list(TAGS))
def test_true_scenes_are_right_and_others_are_not(kind: str, seen_by: Judge) -> None:
    asked = wishes(kind, per_category=1)[:12]
    if kind == "place":  # GenEval wants them further apart than the world does
        asked = [wish for wish in asked if _apart(wish.scene) > 24]
    found = detections(seen_by, [wish.scene.image() for wish in asked])
    requests = [request_of(request(wish)) for wish in asked]
    assert len(requests) >= 3 and {each["tag"] for each in requests} == {TAGS[kind]}
    assert all(judge(each, boxes, RULES).correct for each, boxes in zip(requests, found, strict=True))
    shifted = [judge(each, boxes, RULES).correct for each, boxes in zip(requests, found[1:] + found[:1], strict=True)]
    assert not any(shifted)


def _apart(scene: object) -> float:
    one, other = (thing.centre for thing in scene.objects)  # type: ignore[attr-defined]
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_what_each_kind_of_wish_asks_for() -> None:
    count, place, frame = (request(wishes(kind, 1)[1]) for kind in ("count", "place", "frame"))
    assert count["include"][0]["count"] == 2 and count["exclude"] == [
        {"class": count["include"][0]["class"], "count": 3}
    ]
    target, moved = place["include"]
    relation, number = moved["position"]
    assert number == 0 and "position" not in target
    words = {"left of": "to the left of", "above": "above"}[relation]
    assert place["prompt"].index(moved["class"]) < place["prompt"].index(words) < place["prompt"].index(target["class"])
    frames = [clause["frame"] for clause in frame["include"]]
    assert sorted(map(bool, frames)) == [False, True]
    assert f"{max(frames)}-framed" in frame["prompt"]


def test_presence_by_hand() -> None:
    seen = [Detection(name, (0, 0, 1, 1)) for name in ("dog", "dog", "bus")]
    assert presence({"dog", "cat"}, seen).objects == 0.5 and not presence({"dog", "cat"}, seen).all
    assert presence({"dog"}, seen).all and not presence({"dog"}, seen).only
    assert presence({"dog", "bus"}, seen).only
    with pytest.raises(ValueError, match="names no category"):
        presence(set(), seen)
