"""The pictures of the categories: one atlas in `assets/world/`, made once from the Noto Color Emoji font (OFL 1.1).

Nothing here needs the font at run time. To rebuild the atlas after a change of the catalog, install Debian's package
`fonts-noto-color-emoji` and run `python -m attnsteer.world.sprites` (`--font` if the font is elsewhere).
"""

from __future__ import annotations

import argparse
import json
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from attnsteer.world import assets
from attnsteer.world.catalog import CATEGORIES, find

CELL = 64  # pixels: the longer side of every sprite in the atlas
COLUMNS = 10
BITMAP_SIZE = 109  # the one size that the font's bitmaps exist in
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


def draw_glyph(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One glyph as RGBA, cropped to its visible pixels and scaled so that its longer side is `CELL`."""
    canvas = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), emoji, font=font, embedded_color=True)
    box = canvas.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox()
    if box is None:
        raise ValueError(f"The font has no glyph for U+{ord(emoji[0]):04X}.")
    glyph = canvas.crop(box)
    scale = CELL / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    return _resize(glyph, size)


def build(font_file: str | Path, folder: Path) -> None:
    """Write `sprites.png` and `sprites.json` (name -> [x, y, width, height]) for every category into `folder`."""
    font = ImageFont.truetype(str(font_file), BITMAP_SIZE)
    rows = -(-len(CATEGORIES) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
    index = {}
    for number, category in enumerate(CATEGORIES):
        glyph = draw_glyph(category.emoji, font)
        x, y = number % COLUMNS * CELL, number // COLUMNS * CELL
        atlas.paste(glyph, (x, y))
        index[category.name] = [x, y, glyph.width, glyph.height]
    folder.mkdir(parents=True, exist_ok=True)
    atlas.save(folder / "sprites.png", optimize=True)
    (folder / "sprites.json").write_text(json.dumps(index, indent=1) + "\n")


@cache
def _atlas() -> tuple[Image.Image, dict[str, list[int]]]:
    folder = assets.path("world")
    return Image.open(folder / "sprites.png").convert("RGBA"), json.loads((folder / "sprites.json").read_text())


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize with premultiplied alpha, so that edges do not take the colour of what is invisible."""
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).convert("RGBA")


def _turn(image: Image.Image, angle: int) -> Image.Image:
    """Turned to the left by `angle` degrees, cut to what is visible."""
    turned = image.convert("RGBa").rotate(angle, Image.Resampling.BICUBIC, expand=True).convert("RGBA")
    return turned.crop(turned.getchannel("A").point(lambda alpha: 255 * (alpha >= 16)).getbbox())


@lru_cache(maxsize=16384)
def sprite(name: str, size: int, flip: bool = False, angle: int = 0) -> np.ndarray:
    """One category's picture with its longer side `size` pixels long.

    Args:
        name: category name; size: 1 or more; flip: mirrored; angle: degrees turned to the left, after that.
    Returns:
        read-only uint8 array [height, width, 4], RGBA, not premultiplied.
    """
    atlas, index = _atlas()
    x, y, width, height = index[find(name).name]
    picture = atlas.crop((x, y, x + width, y + height))
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        picture = _turn(picture, angle)
    scale = size / max(picture.size)
    picture = _resize(picture, (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    pixels = np.asarray(picture).copy()
    pixels.setflags(write=False)
    return pixels


def main(arguments: list[str] | None = None) -> None:
    """Rebuild the atlas from the font."""
    parser = argparse.ArgumentParser(prog="python -m attnsteer.world.sprites", description=main.__doc__)
    parser.add_argument("--font", default=FONT, help="NotoColorEmoji.ttf with bitmap glyphs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: assets/world)")
    options = parser.parse_args(arguments)
    build(options.font, options.out or assets.root() / "world")


if __name__ == "__main__":
    main()
