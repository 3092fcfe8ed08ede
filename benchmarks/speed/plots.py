"""How times grow: exponents of ``time ~ size ** exponent``, and curves on two logarithmic axes. Drawn with Pillow.

A log of ``scale.py`` says in its settings what grew (``over``), the sizes and the curves; the case of a curve at a size
is called "curve, size".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 70, 190, 40, 50
INK, FAINT, PAPER, GRID = (20, 20, 24), (110, 110, 120), (255, 255, 255), (232, 232, 236)
LINES = ((110, 110, 120), (31, 90, 160), (214, 96, 20), (40, 140, 70), (150, 60, 150), (190, 40, 60), (0, 130, 150))
LINES += ((130, 100, 20), (200, 90, 150))


def curves(found: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Sizes and median seconds of every curve of a log."""
    settings, cases = found["settings"], found["cases"]
    return {
        name: [(float(size), cases[f"{name}, {size}"]["median_s"]) for size in settings["sizes"]]
        for name in settings["curves"]
    }


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the least-squares line through ``log time`` against ``log size``, of the upper half of the sizes:
    small ones show the cost of a call and not its growth."""
    kept = [(math.log(size), math.log(time)) for size, time in points[(len(points) - 1) // 2 :]]
    if len(kept) < 2:
        return math.nan
    mean_x, mean_y = (sum(each[axis] for each in kept) / len(kept) for axis in (0, 1))
    return sum((x - mean_x) * (y - mean_y) for x, y in kept) / sum((x - mean_x) ** 2 for x, _ in kept)


def picture(found: Mapping[str, Any]) -> Image.Image:
    """All curves of a log."""
    lines = curves(found)
    sizes = [size for points in lines.values() for size, _ in points]
    times = [time for points in lines.values() for _, time in points]
    x = _axis(min(sizes), max(sizes), LEFT, WIDTH - RIGHT)
    y = _axis(min(times), max(times), HEIGHT - BOTTOM, TOP)
    page = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(page)
    over = found["settings"]["over"]
    draw.text((LEFT, 10), f"Seconds against number of {over} ({found['hardware']})", INK, _font(14))
    for size in found["settings"]["sizes"]:
        draw.line([(x(size), TOP), (x(size), HEIGHT - BOTTOM)], GRID)
        draw.text((x(size), HEIGHT - BOTTOM + 14), f"{size:,}", FAINT, _font(11), anchor="mm")
    for power in range(math.floor(math.log10(min(times))), math.ceil(math.log10(max(times))) + 1):
        if min(times) <= 10**power <= max(times):
            draw.line([(LEFT, y(10**power)), (WIDTH - RIGHT, y(10**power))], GRID)
            draw.text((LEFT - 8, y(10**power)), f"{10**power:g}", FAINT, _font(11), anchor="rm")
    for number, (name, points) in enumerate(lines.items()):
        ink, spots = LINES[number % len(LINES)], [(x(size), y(time)) for size, time in points]
        draw.line(spots, ink, 2)
        for spot in spots:
            draw.ellipse((spot[0] - 3, spot[1] - 3, spot[0] + 3, spot[1] + 3), ink)
        draw.text((WIDTH - RIGHT + 14, TOP + 18 * number), f"{name}  ^{exponent(points):.2f}", ink, _font(12))
    return page.quantize(32)


def _axis(low: float, high: float, start: float, stop: float) -> Any:
    """Values to pixels, logarithmic."""
    span = math.log(high / low) or 1.0
    return lambda value: start + math.log(value / low) / span * (stop - start)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
