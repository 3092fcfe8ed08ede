"""Labelled sheets of pictures and answers, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, WRONG, PAPER = (20, 20, 24), (110, 110, 120), (196, 30, 40), (255, 255, 255)
GAP = 8


def font(size: int = 15) -> Any:
    return ImageFont.load_default(size)


def wrap(text: str, width: int, size: int = 15) -> list[str]:
    """Lines of at most ``width`` pixels; a single longer word gets a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def picture_sheet(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], labels: Sequence[str], side: int = 128
) -> Image.Image:
    """Pictures in rows, each row with a label above it, each column with a title.

    Args:
        rows: pictures, scaled to ``side`` pixels.
        columns: one title for each picture of a row.
        labels: one for each row.
    """
    line, width = 20, GAP + len(columns) * (side + GAP)
    height = GAP + line + len(rows) * (line + side + GAP)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, title in enumerate(columns):
        draw.text((GAP + number * (side + GAP), GAP), title, INK, font())
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = GAP + line + index * (line + side + GAP)
        draw.text((GAP, top), label, FAINT, font(13))
        for number, picture in enumerate(row):
            scaled = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (GAP + number * (side + GAP), top + line))
    return sheet


def captioned_sheet(pictures: Sequence[tuple[Image.Image, str]], columns: int, side: int = 128) -> Image.Image:
    """Pictures row by row, each with its caption above it.

    Args:
        pictures: each with what is to be said of it.
        columns: how many stand side by side.
        side: what pictures are scaled to, in pixels.
    """
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    captions = [[wrap(caption, side, 13) for _, caption in row] for row in rows]
    line = 17
    tops = [line * max(map(len, row)) for row in captions]
    size = (GAP + columns * (side + GAP), GAP + sum(tops) + len(rows) * (side + GAP))
    sheet = Image.new("RGB", size, PAPER)
    draw, y = ImageDraw.Draw(sheet), GAP
    for row, texts, top in zip(rows, captions, tops, strict=True):
        for number, ((picture, _), lines) in enumerate(zip(row, texts, strict=True)):
            x = GAP + number * (side + GAP)
            for index, text in enumerate(lines):
                draw.text((x, y + line * index), text, INK, font(13))
            sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (x, y + top))
        y += top + side + GAP
    return sheet


def answer_sheet(
    entries: Sequence[tuple[Image.Image, Sequence[tuple[str, str]]]], wrong: Sequence[Collection[str]], side: int = 128
) -> Image.Image:
    """Pictures with answers beside them; words of what is not in the picture are red.

    Args:
        entries: for each picture its ``(title, answer)`` pairs.
        wrong: for each picture the words to mark.
    """
    line, text_width = 20, 460
    blocks = [[(title, wrap(answer, text_width)) for title, answer in answers] for _, answers in entries]
    heights = [max(side, sum(line * (1 + len(lines)) for _, lines in block)) + GAP for block in blocks]
    sheet = Image.new("RGB", (3 * GAP + side + text_width, GAP + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for (picture, _), block, height, words in zip(entries, blocks, heights, wrong, strict=True):
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (GAP, top))
        y = top
        for title, lines in block:
            draw.text((2 * GAP + side, y), title, FAINT, font(13))
            for number, text in enumerate(lines, start=1):
                _line(draw, (2 * GAP + side, y + number * line), text, words)
            y += line * (1 + len(lines))
        top += height
    return sheet


def side_by_side(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets next to each other, tops aligned."""
    both = Image.new("RGB", (sum(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets)), PAPER)
    left = 0
    for sheet in sheets:
        both.paste(sheet, (left, 0))
        left += sheet.width
    return both


def _line(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, wrong: Collection[str]) -> None:
    x, y = at
    for word in text.split():
        bare = word.strip(".,;!?").lower()
        draw.text((x, y), word, WRONG if bare in wrong else INK, font())
        x += font().getlength(word + " ")
