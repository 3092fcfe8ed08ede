"""What a search found, as pictures: a heat map of layers and heads, a sheet of the best heads, the held-out curve.

Drawn with Pillow, which is always there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from .hunter import Heads, Round
from .selection import Head, Selection

if TYPE_CHECKING:
    from .curve import Curve
    from .headhunter import HeadHunter

INK, FAINT, PAPER, TAKEN, MARK = (20, 20, 24), (110, 110, 120), (255, 255, 255), (214, 214, 218), (214, 40, 40)
RAMP = ((52, 20, 82), (56, 88, 140), (32, 145, 140), (94, 201, 98), (253, 231, 37))
LINES = ((31, 90, 160), (214, 96, 20), (40, 140, 70), (150, 60, 150), (110, 110, 120))
GAP, CELL, TITLE = 10, 20, 170  # pixels
PANELS = 3
"""Rounds beside each other in the heat map."""


def colour(value: float) -> tuple[int, int, int]:
    """A colour for 0 (worst) to 1 (best)."""
    place = min(max(value, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    red, green, blue = (round(a + (place - low) * (b - a)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    return red, green, blue


# ---- heat map --------------------------------------------------------------------------------------------------------
def heat_map(pool: Sequence[Head], history: Sequence[Round]) -> Image.Image:
    """Layers (rows) by heads (columns), one panel a round: colours from the round's lowest score to its highest.

    Heads that a round chose carry their number in the final order; heads chosen before are grey.
    """
    layers = list(dict.fromkeys(head.layer for head in pool))
    columns = sorted({head.head for head in pool})
    left = 8 + max(int(_font().getlength(str(layer))) for layer in layers)
    size = max(left + CELL * len(columns), TITLE), 36 + CELL * len(layers)
    width = min(PANELS, max(1, len(history)))
    rows = math.ceil(max(1, len(history)) / width)
    page = Image.new("RGB", (GAP + width * (size[0] + GAP), GAP + rows * (size[1] + GAP)), PAPER)
    draw = ImageDraw.Draw(page)
    taken: list[Head] = []
    for number, found in enumerate(history):
        x, y = GAP + number % width * (size[0] + GAP), GAP + number // width * (size[1] + GAP)
        _panel(draw, (x, y), left, layers, columns, found, taken)
        taken += found.chosen
    return page


def _panel(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    left: int,
    layers: Sequence[int | str],
    columns: Sequence[int],
    found: Round,
    taken: Sequence[Head],
) -> None:
    x, y = at
    known = [score for score in found.scores.values() if score is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    draw.text((x, y), f"round {found.number}: {low:.4g} to {high:.4g}", INK, _font(12))
    for place, column in enumerate(columns):
        draw.text((x + left + CELL * place + CELL // 2, y + 26), str(column), FAINT, _font(), anchor="mm")
    for row, layer in enumerate(layers):
        top = y + 34 + CELL * row
        draw.text((x + left - 4, top + CELL // 2), str(layer), FAINT, _font(), anchor="rm")
        for place, column in enumerate(columns):
            head, cell = Head(layer, column), (x + left + CELL * place, top)
            score = found.scores.get(head)
            fill = colour((score - low) / (high - low) if high > low else 0.0) if score is not None else TAKEN
            if head in found.scores or head in taken:
                draw.rectangle((*cell, cell[0] + CELL - 2, cell[1] + CELL - 2), fill)
            order = [*taken, *found.chosen]
            if head in order:
                chosen = head in found.chosen
                if chosen:
                    draw.rectangle((*cell, cell[0] + CELL - 2, cell[1] + CELL - 2), outline=MARK, width=2)
                middle = (cell[0] + CELL // 2 - 1, cell[1] + CELL // 2 - 1)
                draw.text(middle, str(1 + order.index(head)), INK if chosen else FAINT, _font(9), anchor="mm")


# ---- sheet -----------------------------------------------------------------------------------------------------------
def contact_sheet(hunter: HeadHunter, selection: Selection, top: int = 12, pairs: int = 4) -> Image.Image:
    """The plain model, each of the best heads alone, and all heads together, on the first pairs of the search."""
    from ..cli.sheet import picture_sheet
    from .painter import Job

    shown, best = hunter.pairs[:pairs], selection.heads[:top]
    rows_of: dict[Heads, str] = {(): "plain"}
    alone = selection.scores[0] if selection.scores else ()  # later scores are on top of the rounds before
    for place, head in enumerate(best):
        rows_of[(head,)] = f"{place + 1}: {head} alone" + (f", {alone[place]:.4g}" if place < len(alone) else "")
    rows_of.setdefault(selection.heads, f"all {len(selection.heads)} heads")
    sets, labels = list(rows_of), list(rows_of.values())
    jobs = [Job(heads, *pair) for heads in sets for pair in shown]
    pictures: list[Any] = []
    hunter.follow("sheet", len(jobs))
    with hunter.painter.ready():
        for start in range(0, len(jobs), hunter.batch):
            pictures += hunter.painter(jobs[start : start + hunter.batch])
    rows = [pictures[start : start + len(shown)] for start in range(0, len(jobs), len(shown))]
    return picture_sheet(rows, [f"seed {seed}" for _, seed in shown], labels)


# ---- curve -----------------------------------------------------------------------------------------------------------
def plot(curve: Curve, title: str = "held-out score against number of heads") -> Image.Image:
    """One line for each strength, with the standard error of the difference to no heads where there is one metric."""
    width, height, left, top, right, bottom = 640, 420, 70, 40, 130, 50
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((left, 12), title, INK, _font(14))
    series = {
        strength: [point for point in curve.points if point.strength == strength and point.score is not None]
        for strength in dict.fromkeys(point.strength for point in curve.points)
    }
    ends = [_bar(point) for points in series.values() for point in points]
    most = max((point.heads for point in curve.points), default=1) or 1
    low, high = min((e[0] for e in ends), default=0.0), max((e[1] for e in ends), default=1.0)
    low, high = (low - 0.5, high + 0.5) if high <= low else (low, high)

    def place(heads: float, score: float) -> tuple[float, float]:
        across = left + heads / most * (width - left - right)
        return across, height - bottom - (score - low) / (high - low) * (height - top - bottom)

    _axes(draw, place, sorted({point.heads for point in curve.points}), (low, high), most)
    for number, (strength, points) in enumerate(series.items()):
        ink = LINES[number % len(LINES)]
        spots = [place(point.heads, point.score or 0.0) for point in points]
        draw.line(spots, ink, 2)
        for spot, point in zip(spots, points, strict=True):
            start, stop = _bar(point)
            draw.line((place(point.heads, start), place(point.heads, stop)), ink, 1)
            draw.ellipse((spot[0] - 3, spot[1] - 3, spot[0] + 3, spot[1] + 3), ink)
        draw.text((width - right + 14, top + 18 * number), f"strength {strength:g}", ink, _font(12))
    return page


def _bar(point: Any) -> tuple[float, float]:
    """A point's score with its error below and above."""
    metrics = list(point.metrics.values())
    error = metrics[0].error if len(metrics) == 1 else 0.0
    return point.score - error, point.score + error


def _axes(draw: ImageDraw.ImageDraw, place: Any, heads: Sequence[int], span: tuple[float, float], most: int) -> None:
    low, high = span
    draw.line((place(0, high), place(0, low), place(most, low)), FAINT, 1)
    for value in ticks(low, high):
        x, y = place(0, value)
        draw.line((x - 4, y, x, y), FAINT, 1)
        draw.text((x - 8, y), f"{value:.4g}", FAINT, _font(), anchor="rm")
    step = max(1, math.ceil(len(heads) / 14))
    for count in heads[::step]:
        x, y = place(count, low)
        draw.line((x, y, x, y + 4), FAINT, 1)
        draw.text((x, y + 14), str(count), FAINT, _font(), anchor="mm")
    x, y = place(most / 2, low)
    draw.text((x, y + 34), "heads", FAINT, _font(12), anchor="mm")


def ticks(low: float, high: float, count: int = 5) -> Iterator[float]:
    """Round numbers between the ends."""
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough)
    value = math.ceil(low / step) * step
    while value <= high + 1e-9 * step:
        yield 0.0 if abs(value) < 1e-9 * step else value
        value += step


def _font(size: int = 11) -> Any:
    return ImageFont.load_default(size)
