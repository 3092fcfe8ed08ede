"""The results as pictures: metrics with intervals, what a better headline costs, and where mistakes are. Drawn with
Pillow, which is always there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..search.report import FAINT, GAP, INK, LINES, PAPER, ticks
from .results import ALL, Results
from .tables import TITLES

WIDTH, ROW, TOP = 720, 26, 56  # pixels
TEXT = 13
INKS = (*LINES, (190, 40, 60), (0, 130, 150), (130, 100, 20), (90, 80, 200), (200, 90, 150))
MOST = 12
"""Categories in the plot of made-up objects."""


def plots(results: Results, made_up: dict[str, dict[str, int]]) -> dict[str, Image.Image]:
    """All pictures by name, without ``.png``.

    Args:
        made_up: for every method how often it names each category that is not there.
    """
    found = {}
    for task, part in results["tasks"].items():
        if not part["groups"]:
            continue
        for metric in part["metrics"]:
            if metric["headline"]:
                found[f"{task}-{metric['name']}"] = intervals(results, task, metric)
        if len(part["groups"]) > 1:
            first = next(metric for metric in part["metrics"] if metric["headline"])
            found[f"{task}-groups"] = by_group(results, task, first)
    if results["tasks"].get("chair", {}).get("groups"):
        found["chair-recall"] = scatter(results, "chair", "chair_i", "recall")
        found["chair-categories"] = categories(made_up)
    if results["tasks"].get("pope", {}).get("groups"):
        found["pope-yes"] = scatter(results, "pope", "f1", "yes")
    return found


def intervals(results: Results, task: str, metric: dict[str, Any]) -> Image.Image:
    """One metric: a row for each method, its value and interval; a line where the baseline is."""
    found = results["tasks"][task]["groups"][ALL]["methods"]
    values = {label: _scaled(each[metric["name"]], metric) for label, each in found.items()}
    better = f", {metric['better']} is better" if metric["better"] else ""
    title = f"{TITLES.get(task, task)}: {_title(metric)}{better}"
    return _rows(title, [(label, 0, *value) for label, value in values.items()], list(values)[:1])


def by_group(results: Results, task: str, metric: dict[str, Any]) -> Image.Image:
    """One metric in every group: a block of rows for each."""
    rows = []
    groups = {name: part for name, part in results["tasks"][task]["groups"].items() if name != ALL}
    for name, part in groups.items():
        for number, (label, values) in enumerate(part["methods"].items()):
            rows.append((f"{name}: {label}", number, *_scaled(values[metric["name"]], metric)))
    return _rows(f"{TITLES.get(task, task)}: {_title(metric)} by group", rows, [])


def scatter(results: Results, task: str, across: str, up: str) -> Image.Image:
    """Two metrics against each other, a cross of intervals for each method."""
    part = results["tasks"][task]
    metrics = {metric["name"]: metric for metric in part["metrics"]}
    found = part["groups"][ALL]["methods"]
    spots = {k: (_scaled(v[across], metrics[across]), _scaled(v[up], metrics[up])) for k, v in found.items()}
    height, left, bottom, top = 440, 70, 54, 40
    page = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(page)
    right = 40 + max(_width(label) for label in spots)
    x = _Axis([end for spot in spots.values() for end in spot[0]], left, WIDTH - right)
    y = _Axis([end for spot in spots.values() for end in spot[1]], height - bottom, top)
    draw.text(
        (left, 10), f"{TITLES.get(task, task)}: {_title(metrics[up])} against {_title(metrics[across])}", INK, _font(14)
    )
    draw.line([(left, top), (left, height - bottom), (WIDTH - right, height - bottom)], FAINT)
    for value in ticks(*x.span):
        draw.text((x(value), height - bottom + 14), f"{value:.4g}", FAINT, _font(11), anchor="mm")
    for value in ticks(*y.span):
        draw.text((left - 8, y(value)), f"{value:.4g}", FAINT, _font(11), anchor="rm")
    draw.text(((left + WIDTH - right) / 2, height - 16), _title(metrics[across]), FAINT, _font(), anchor="mm")
    drawn: list[tuple[float, float]] = []
    for number, (label, (one, other)) in enumerate(spots.items()):
        ink, at = _ink(number), (x(one[0]), y(other[0]))
        draw.line([(x(one[1]), at[1]), (x(one[2]), at[1])], ink)
        draw.line([(at[0], y(other[1])), (at[0], y(other[2]))], ink)
        side = 4 + 3 * sum(math.dist(at, place) < 4 for place in drawn)  # a ring around what is at the same place
        draw.ellipse((at[0] - side, at[1] - side, at[0] + side, at[1] + side), ink if side == 4 else None, ink, 2)
        drawn.append(at)
        draw.text((WIDTH - right + 20, top + 18 * number), label, ink, _font())
    return page


def categories(made_up: dict[str, dict[str, int]]) -> Image.Image:
    """How often each method names categories that are not there; those named most often, one block of bars for each."""
    totals: dict[str, int] = {}
    for counts in made_up.values():
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    shown = sorted(totals, key=lambda name: (-totals[name], name))[:MOST]
    bar = 12
    left = GAP * 2 + max([_width(name) for name in shown] + [60])
    block = bar * len(made_up) + GAP
    legend = 18 * len(made_up)
    page = Image.new("RGB", (WIDTH, TOP + legend + block * len(shown) + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 10), "Made-up objects: how often each is named", INK, _font(14))
    for number, label in enumerate(made_up):
        draw.text((GAP, 34 + 18 * number), label, _ink(number), _font())
    most = max([count for counts in made_up.values() for count in counts.values()] + [1])
    for place, name in enumerate(shown):
        top = TOP + legend + place * block
        draw.text((left - GAP, top + bar * len(made_up) / 2), name, INK, _font(), anchor="rm")
        for number, counts in enumerate(made_up.values()):
            count = counts.get(name, 0)
            end = left + count / most * (WIDTH - left - 50)
            draw.rectangle((left, top + bar * number, end, top + bar * (number + 1) - 2), _ink(number))
            draw.text((end + 6, top + bar * number + bar / 2 - 1), str(count), FAINT, _font(11), anchor="lm")
    return page


# ---- parts -----------------------------------------------------------------------------------------------------------
def _rows(title: str, rows: Sequence[tuple[str, int, float, float, float]], lines: Sequence[str]) -> Image.Image:
    """Labels, points and intervals below each other; vertical lines at the points of some labels."""
    left = GAP * 2 + max(_width(label) for label, *_ in rows)
    page = Image.new("RGB", (WIDTH, TOP + ROW * len(rows) + 34), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 10), title, INK, _font(14))
    axis = _Axis([end for row in rows for end in row[2:]], left + GAP, WIDTH - 70)
    bottom = TOP + ROW * len(rows)
    for value in ticks(*axis.span):
        draw.line([(axis(value), TOP - 12), (axis(value), bottom)], (232, 232, 236))
        draw.text((axis(value), bottom + 12), f"{value:.4g}", FAINT, _font(11), anchor="mm")
    for label, _, value, _, _ in rows:
        if label in lines:
            draw.line([(axis(value), TOP - 12), (axis(value), bottom)], FAINT)
    for place, (label, number, value, low, high) in enumerate(rows):
        y, ink = TOP + ROW * place + ROW / 2 - 6, _ink(number if not lines else place)
        draw.text((left, y), label, INK, _font(), anchor="rm")
        draw.line([(axis(low), y), (axis(high), y)], ink, 2)
        draw.ellipse((axis(value) - 4, y - 4, axis(value) + 4, y + 4), ink)
        draw.text((WIDTH - 60, y), f"{value:.1f}", ink, _font(), anchor="lm")
    return page


class _Axis:
    """Values to pixels, with a little room at both ends."""

    def __init__(self, values: Sequence[float], start: float, stop: float):
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or 0.5
        self.span, self._start, self._stop = (low - room, high + room), start, stop

    def __call__(self, value: float) -> float:
        low, high = self.span
        return self._start + (value - low) / (high - low) * (self._stop - self._start)


def _scaled(found: dict[str, Any], metric: dict[str, Any]) -> tuple[float, float, float]:
    factor = 100 if metric["percent"] else 1
    return factor * found["value"], factor * found["low"], factor * found["high"]


def _title(metric: dict[str, Any]) -> str:
    return f"{metric['title']}{' in %' if metric['percent'] else ''}"


def _ink(number: int) -> tuple[int, int, int]:
    return INKS[number % len(INKS)]


def _width(text: str) -> int:
    return int(_font().getlength(text))


def _font(size: int = TEXT) -> Any:
    return ImageFont.load_default(size)
