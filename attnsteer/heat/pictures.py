"""Drawing heat maps with Pillow: colours, a map laid over its picture, and sheets of them with titles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER = (20, 20, 24), (110, 110, 120), (255, 255, 255)
GAP, LINE, BAR = 8, 16, 10
ANCHORS = ((10, 8, 40), (60, 20, 110), (140, 35, 120), (205, 65, 85), (240, 125, 40), (250, 190, 50), (252, 250, 190))
"""Colours from no heat to most: lightness rises evenly and hue turns, so that order shows in grey and to everybody."""


class Panel(NamedTuple):
    """One picture of a sheet with a title and, fainter, a second line."""

    image: Image.Image
    title: str
    note: str = ""


@functools.cache
def palette() -> np.ndarray:
    """The colours, uint8 ``(256, 3)``, between ``ANCHORS`` so that lightness (CIE L*) is a straight line."""
    anchors = np.array(ANCHORS, float)
    fine = np.stack([np.interp(np.linspace(0, 6, 6001), range(7), anchors[:, c]) for c in range(3)], 1)
    light = lightness(fine)
    wanted = np.linspace(light[0], light[-1], 256)
    return fine[np.searchsorted(light, wanted).clip(0, 6000)].round().astype(np.uint8)


def lightness(colours: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours ``(..., 3)`` in 0 to 255."""
    x = colours / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def overlay(heat: np.ndarray, picture: Image.Image | None, size: tuple[int, int], top: float | None = None) -> Any:
    """A map laid over its picture: the picture in grey, coloured and the more opaque the hotter it is.

    Args:
        heat: ``(h, w)``, 0 or more; nan shows as no heat.
        picture: what the map is about; None gives the colours alone.
        size: width and height of the result in pixels.
        top: what gets the last colour (default: the maximum of the map).
    """
    heat = np.nan_to_num(heat.astype(np.float32))
    most = float(heat.max()) if top is None else top
    scaled = (heat / most if most > 0 else heat).clip(0, 1)
    wide = np.asarray(Image.fromarray(scaled, "F").resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    colours = palette()[(255 * wide).round().astype(int)].astype(float)
    if picture is not None:
        grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.LANCZOS), float)[..., None]
        alpha = 0.2 + 0.65 * wide[..., None]
        colours = (1 - alpha) * grey + alpha * colours
    return Image.fromarray(colours.round().astype(np.uint8))


def mark(panel: Image.Image, cells: np.ndarray) -> Image.Image:
    """Crosses over the cells of a bool map ``(h, w)``."""
    panel = panel.copy()
    draw = ImageDraw.Draw(panel)
    across, down = panel.width / cells.shape[1], panel.height / cells.shape[0]
    for row, column in zip(*cells.nonzero(), strict=True):
        box = (column * across, row * down, (column + 1) * across - 1, (row + 1) * down - 1)
        draw.line(box, (90, 220, 255), 1)
        draw.line((box[0], box[3], box[2], box[1]), (90, 220, 255), 1)
    return panel


def sheet(rows: Sequence[Sequence[Panel]], head: str, columns: int) -> Image.Image:
    """Panels of one size in rows, a headline above, the colours below. Rows longer than ``columns`` are broken into
    even parts."""
    parts = [-(-len(row) // -(-len(row) // columns)) for row in rows]
    broken = [
        row[start : start + part] for row, part in zip(rows, parts, strict=True) for start in range(0, len(row), part)
    ]
    width, height = broken[0][0].image.size
    lines = [2 if any(panel.note for panel in row) else 1 for row in broken]
    total = max(320, GAP + max(map(len, broken)) * (width + GAP))
    titles = _wrapped(head, total - 2 * GAP)
    size = (total, 3 * GAP + LINE * len(titles) + sum(LINE * n + height + GAP for n in lines) + BAR + LINE + GAP)
    canvas = Image.new("RGB", size, PAPER)
    draw, y = ImageDraw.Draw(canvas), GAP
    for title in titles:
        draw.text((GAP, y), title, INK, _font(13))
        y += LINE
    y += GAP
    for row, count in zip(broken, lines, strict=True):
        for number, panel in enumerate(row):
            x = GAP + number * (width + GAP)
            draw.text((x, y), _fitting(panel.title, width), INK, _font(12))
            draw.text((x, y + LINE), _fitting(panel.note, width), FAINT, _font(12))
            canvas.paste(panel.image, (x, y + LINE * count))
        y += LINE * count + height + GAP
    _bar(canvas, y)
    return canvas


def _bar(canvas: Image.Image, y: int) -> None:
    """What the colours mean, at the foot of a sheet."""
    strip = Image.fromarray(np.repeat(palette()[None], BAR, 0)).resize((200, BAR))
    canvas.paste(strip, (GAP, y))
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, y + BAR), "0", FAINT, _font(12))
    draw.text((GAP + 140, y + BAR), "max of each", FAINT, _font(12))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _fitting(text: str, width: int) -> str:
    while text and _font(12).getlength(text) > width:
        text = text[:-2].rstrip("… ") + "…" if len(text) > 2 else ""
    return text


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font(13).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
