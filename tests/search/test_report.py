"""The held-out curve and the pictures of a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attnsteer
from attnsteer import SteeringError
from attnsteer.processors import PAG, SoftPAG
from attnsteer.search import Head, Round, Selection
from attnsteer.search.curve import Curve, Metric, Point, curve
from attnsteer.search.report import GAP, MARK, TAKEN, colour, contact_sheet, heat_map, plot

from .common import CALLS, hunter, pipe, redness

HELD = [("a cat", 100), ("the blue bird", 101)]
FOUND = Selection(((Head(1, 0), Head(2, 1)), (Head(0, 2),)), settings={"pairs": [["a dog", 0]]})


def test_the_curve_measures_prefixes_on_held_out_pairs_against_no_heads(tmp_path: Path) -> None:
    import torch

    search = hunter(out=tmp_path)
    found = curve(search, FOUND, HELD, strengths=[1.0, 0.5])
    assert [(point.strength, point.heads) for point in found.points] == [(u, n) for u in (1.0, 0.5) for n in (0, 2, 3)]
    values: dict[Any, list[float]] = {}
    for strength, top in [(1.0, 0), (1.0, 2), (0.5, 3)]:
        for prompt, seed in HELD:
            methods = [SoftPAG(FOUND.where(top), strength=strength)] if top else [SoftPAG(scale=0.0)]
            with attnsteer.steer(pipe(), *methods):
                generator = torch.Generator().manual_seed(seed)
                image = pipe()(prompt, generator=generator, num_inference_steps=2, guidance_scale=1.0, **CALLS["sd3"])
            values.setdefault((strength, top), []).extend(redness(image.images, [prompt]))
    points = {(point.strength, point.heads): point for point in found.points}
    plain = np.array(values[1.0, 0])
    for key, expected in values.items():
        metric = points[key].metrics["redness"]
        delta = np.array(expected) - plain
        assert metric.mean == points[key].score == pytest.approx(np.mean(expected), abs=2e-2)
        assert metric.delta == pytest.approx(delta.mean(), abs=2e-2)
        assert metric.error == pytest.approx(delta.std(ddof=1) / 2**0.5, abs=2e-2)
    found.save(tmp_path / "curve.json")
    saved = json.loads((tmp_path / "curve.json").read_text())
    assert saved["points"][1]["heads"] == 2
    assert saved["pairs"] == [list(pair) for pair in HELD]
    again = hunter(out=tmp_path)
    assert curve(again, FOUND, HELD, strengths=[1.0, 0.5]) == found, "its scores are kept too"


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([("a dog", 100)], {}, "The search saw the prompt 'a dog'"),
        ([("a cat", 0)], {}, "The search saw the seed 0"),
        ([], {}, "nothing to search on"),
        (HELD, {"tops": [4]}, "the selection has 3 heads"),
        (HELD, {"strengths": []}, "leaves nothing to measure"),
        (HELD, {"strengths": [2.0]}, r"strength=2.0\) is out of range"),
    ],
)
def test_what_is_not_held_out_or_not_there_is_refused(pairs: Any, options: Any, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        curve(hunter(), FOUND, pairs, **options)


def test_a_method_without_strength_has_one_curve() -> None:
    search = hunter(processor=PAG())
    assert [point.heads for point in curve(search, FOUND, HELD, tops=[1]).points] == [0, 1]
    with pytest.raises(SteeringError, match="PAG has no strength"):
        curve(search, FOUND, HELD, strengths=[0.5])


def test_the_heat_map_shows_scores_and_marks_what_was_chosen() -> None:
    pool = [Head(layer, head) for layer in range(3) for head in range(2)]
    scores: dict[Head, float | None] = {head: float(place) for place, head in enumerate(pool)}
    second = {head: -score if score is not None else None for head, score in scores.items() if head != pool[5]}
    image = heat_map(pool, [Round(1, (pool[5],), scores), Round(2, (pool[0],), second)])
    colours = {pixel for _, pixel in image.getcolors(1 << 20) or []}
    assert {colour(0.0), colour(0.2), colour(1.0), MARK, TAKEN} <= colours
    one = heat_map(pool, [Round(1, (pool[5],), scores)])
    assert image.width - GAP == 2 * (one.width - GAP)
    named = heat_map(
        [Head("down.0.attn1", 0), Head("down.0.attn1", 3)], [Round(1, (), {Head("down.0.attn1", 0): None})]
    )
    assert named.width > 100
    assert heat_map(pool, []).size


def test_equal_scores_are_no_division_by_zero() -> None:
    assert heat_map([Head(0, 0)], [Round(1, (Head(0, 0),), {Head(0, 0): 0.5})]).size
    flat = Curve((Point(0, 1.0, 0.5, {"s": Metric(0.5, 0.0, 0.0)}),), (), {})
    assert plot(flat).size == plot(Curve((), (), {})).size


def test_the_sheet_shows_the_plain_model_each_best_head_and_all_together() -> None:
    search = hunter()
    sheet = contact_sheet(search, FOUND, top=2)
    rows = 1 + 2 + 1
    assert sheet.size == (8 + 2 * 136, 8 + 20 + rows * (20 + 128 + 8))
    cells = [np.asarray(sheet.crop((8, 48 + row * 156, 136, 176 + row * 156)), int) for row in range(rows)]
    for other in cells[1:]:
        assert abs(other - cells[0]).max() > 2
