"""From attention over a picture to a part of the picture: contrast, heat maps in pixels, masks, regions, crops.

A map is ``(rows, columns)`` over image tokens, as ``hosts.vlm_grids.image_grids`` arranges them. Pictures are PIL's;
heat maps and masks are numpy arrays ``(H, W)``. Boxes are (left, top, right, bottom) in pixels, the ends excluded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .errors import SteeringError

Box = tuple[int, int, int, int]
Steps = Literal["all", "first", "end"]
Heat = NDArray[np.float64]
Mask = NDArray[np.bool_]
RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)


# ---- contrast --------------------------------------------------------------------------------------------------------
def contrast(question: Tensor, general: Tensor, lam: float = 0.0) -> Tensor:
    """``A_Q / (A_G + lambda)``, elementwise; 0 where neither prompt sees a token.

    The minimiser x of ``sum (x A_G - A_Q)^2 + lambda sum x^2 A_G``.
    """
    return question / (general + lam).clamp_min(torch.finfo(general.dtype).tiny)


def contrast_over_steps(question: Tensor, general: Tensor, lam: float, steps: Steps) -> Tensor:
    """The contrast of two generations, summed over layers and steps.

    Args:
        question, general: ``(T, L, rows, columns)``; T is the number of tokens that each generation predicted.
        steps: ``"all"`` pairs step t with step t as far as both go and weights it by t (from 1); ``"first"`` takes the
            first of both, ``"end"`` the last of each.

    Returns:
        ``(rows, columns)`` float64, not normalised.
    """
    question, general = question.double(), general.double()
    if steps != "all":
        at = 0 if steps == "first" else -1
        return contrast(question[at], general[at], lam).sum(dim=0)
    both = min(len(question), len(general))
    weight = torch.arange(1, both + 1, dtype=question.dtype, device=question.device)
    return torch.einsum("tlhw,t->hw", contrast(question[:both], general[:both], lam), weight)


# ---- pixels ----------------------------------------------------------------------------------------------------------
def to_pixels(grid: Tensor, size: tuple[int, int], area: Sequence[float] | None = None) -> Heat:
    """A map in the pixels of its picture: bilinear, half-pixel centres (``align_corners=False``), 0 outside ``area``.

    Args:
        grid: ``(rows, columns)``.
        size: width and height of the picture.
        area: left, top, right, bottom of what the grid covers, in pixels; by default the whole picture.

    Returns:
        ``(height, width)`` float64.
    """
    left, top, right, bottom = (0.0, 0.0, *map(float, size)) if area is None else area
    across = _weights(size[0], grid.shape[1], left, right)
    down = _weights(size[1], grid.shape[0], top, bottom)
    return down @ grid.detach().cpu().double().numpy() @ across.T


def covered(size: tuple[int, int], area: Sequence[float]) -> Mask:
    """Bool ``(height, width)``: the pixels of a picture of ``size`` whose centres lie in ``area``, as in
    ``to_pixels``."""
    left, top, right, bottom = area
    return _inside(size[1], top, bottom)[:, None] & _inside(size[0], left, right)


def _inside(pixels: int, start: float, stop: float) -> Mask:
    """Which pixels along one axis have their centres between two places."""
    centres = np.arange(pixels) + 0.5
    return (centres > start) & (centres < stop)


def _weights(pixels: int, cells: int, start: float, stop: float) -> Heat:
    """What each pixel takes of each cell along one axis, ``(pixels, cells)``."""
    centres = np.arange(pixels) + 0.5
    place = ((centres - start) / (stop - start) * cells - 0.5).clip(0, cells - 1)
    below = np.minimum(np.floor(place).astype(int), max(cells - 2, 0))
    share = place - below
    weights = np.zeros((pixels, cells))
    weights[np.arange(pixels), below] = 1 - share
    if cells > 1:
        weights[np.arange(pixels), below + 1] = share
    return weights * _inside(pixels, start, stop)[:, None]


# ---- masks -----------------------------------------------------------------------------------------------------------
def brightest(heat: Heat, keep: float, seen: Mask | None = None) -> Mask:
    """Pixels at or above the percentile ``100 (1 - keep)``, linearly interpolated.

    A tolerance of ``1e-6 max`` below it (ours): rounding would drop single pixels of a constant map.

    Args:
        heat: ``(H, W)``.
        keep: share of the pixels, in (0, 1].
        seen: bool ``(H, W)``, the pixels that there is a map of: the others neither count nor stay. None: all.
    """
    seen = np.ones(heat.shape, dtype=bool) if seen is None else seen
    threshold = np.percentile(heat[seen], 100 * (1 - keep))
    return seen & (heat >= threshold - 1e-6 * np.abs(heat).max())


def components(mask: Mask) -> tuple[NDArray[np.int64], int]:
    """4-connected parts: labels ``(H, W)``, 0 outside and 1, 2, ... in reading order of their first pixel; how many.

    Runs of a row are joined with those of the row above that they touch (union-find).
    """
    above: list[tuple[int, int, int]] = []  # start, stop and number of the runs of the row above
    runs: list[list[tuple[int, int, int]]] = []
    parent: list[int] = []

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for line in mask:
        edges = np.flatnonzero(np.diff(np.concatenate(([0], line.astype(np.int8), [0]))))
        here = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            number = len(parent)
            parent.append(number)
            for other_start, other_stop, other in above:
                if start < other_stop and other_start < stop:
                    low, high = sorted((root(number), root(other)))
                    parent[high] = low
            here.append((start, stop, number))
        runs.append(here)
        above = here
    names = {number: order + 1 for order, number in enumerate(n for n in range(len(parent)) if root(n) == n)}
    labels = np.zeros(mask.shape, dtype=np.int64)
    for row, here in enumerate(runs):
        for start, stop, number in here:
            labels[row, start:stop] = names[root(number)]
    return labels, len(names)


def strongest_regions(heat: Heat, mask: Mask, regions: int, keep: float) -> Mask:
    """The best ``max(regions, int(n keep))`` of the n connected parts of a mask, by the sum of ``heat`` inside."""
    labels, count = components(mask)
    scores = np.bincount(labels.ravel(), weights=heat.ravel(), minlength=count + 1)[1:]
    best = np.argsort(-scores, kind="stable")[: max(regions, int(count * keep))] + 1
    return np.isin(labels, best)


def bounding_box(mask: Mask) -> Box:
    """The tight box of a mask; the whole frame where it is empty."""
    if not mask.any():
        return 0, 0, mask.shape[1], mask.shape[0]
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# ---- pictures --------------------------------------------------------------------------------------------------------
def magnified(picture: Image.Image, mask: Mask) -> Image.Image:
    """The picture black outside the mask, cropped to its box and enlarged until it covers the size of the picture.

    ``scale = max(W / w, H / h)``, Lanczos; the aspect ratio is that of the box. An empty mask keeps everything.
    """
    picture = picture.convert("RGB")
    box = bounding_box(mask)
    if mask.any():
        pixels = np.asarray(picture) * mask[..., None].astype(np.uint8)
        picture = Image.fromarray(pixels).crop(box)
    width, height = covering_size(picture.size, (mask.shape[1], mask.shape[0]))
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)


def covering_size(crop: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """A crop's width and height, enlarged with the same aspect ratio until it covers ``size``."""
    scale = max(size[0] / crop[0], size[1] / crop[1])
    return round(crop[0] * scale), round(crop[1] * scale)


# ---- the box of ViCrop -----------------------------------------------------------------------------------------------
def crop_box(importance: Tensor, size: tuple[int, int], side: float, ratios: Sequence[float] = RATIOS) -> Box:
    """The square around the window of a map that stands out most from the windows beside it.

    For each ratio r a window of ``int(side r / cell)`` cells each way slides over the map. Where its sum is largest,
    ``sharpness = (sum - mean of the sums one cell left, right, above, below) / cells of the window``. The sharpest r
    wins, the first of equals; the crop is a square of side ``side r`` around that window, moved to stay inside.

    Args:
        importance: ``(rows, columns)``.
        size: width and height of the picture.
        side: side of the smallest crop in pixels.

    Returns:
        The whole picture where the smallest window covers the map already.
    """
    rows, columns = importance.shape
    cells = size[0] / columns, size[1] / rows
    table = F.pad(importance.detach().cpu().double(), (1, 0, 1, 0)).cumsum(0).cumsum(1)
    best: tuple[float, float, tuple[int, int], tuple[int, int]] | None = None
    for ratio in ratios:
        nx, ny = (max(1, min(int(side * ratio / c), n)) for c, n in zip(cells, (columns, rows), strict=True))
        if (nx, ny) == (columns, rows):
            if ratio == ratios[0]:
                return 0, 0, *size
            continue
        sums = table[ny:, nx:] - table[:-ny, nx:] - table[ny:, :-nx] + table[:-ny, :-nx]
        y, x = _first_largest(sums)
        sharp = _sharpness(sums, y, x) / (nx * ny)
        if best is None or sharp > best[0]:
            best = (sharp, ratio, (x, y), (nx, ny))
    if best is None:
        raise SteeringError(f"ratios={tuple(ratios)!r} leave no window: give at least one.")
    _, ratio, place, window = best
    centre = [int(c * p + c * n / 2) for c, p, n in zip(cells, place, window, strict=True)]
    half = int(side * ratio // 2)
    middle = [min(max(c, half), max(s - half, half)) for c, s in zip(centre, size, strict=True)]
    left, top = (max(0, m - half) for m in middle)
    right, bottom = (min(s, m + half) for m, s in zip(middle, size, strict=True))
    return left, top, right, bottom


def _first_largest(sums: Tensor) -> tuple[int, int]:
    """Row and column of the largest sum; of equals the leftmost, then the highest."""
    x, y = divmod(int(sums.T.reshape(-1).argmax()), sums.shape[0])
    return y, x


def _sharpness(sums: Tensor, y: int, x: int) -> float:
    """How much the sum of a window exceeds the mean of its neighbours'."""
    near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    beside = [float(sums[r, c]) for r, c in near if 0 <= r < sums.shape[0] and 0 <= c < sums.shape[1]]
    return float(sums[y, x]) - sum(beside) / len(beside)


def tiles(picture: Image.Image, longest: int = 1024) -> list[list[Image.Image]]:
    """A large picture in rows of tiles: ``ceil(H / longest)`` down and ``max(1, int(down W / H))`` across."""
    width, height = picture.size
    down = math.ceil(height / longest)
    across = max(1, int(down * width / height))
    xs, ys = (
        [round(n * length / parts) for n in range(parts + 1)] for length, parts in ((width, across), (height, down))
    )
    return [[picture.crop((xs[c], ys[r], xs[c + 1], ys[r + 1])) for c in range(across)] for r in range(down)]


# ---- edges -----------------------------------------------------------------------------------------------------------
def edges(picture: Image.Image, size: tuple[int, int], median: int = 7) -> Tensor:
    """Where a picture has detail, bool ``(H, W)`` at ``size`` = (W, H).

    ``|x - Gaussian blur of x|`` over colours (3 x 3, sigma 0.8), then the median of ``median x median`` pixels; True
    above the median of the whole.
    """
    array = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
    x = torch.from_numpy(array).permute(2, 0, 1)[None]
    taps = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * 0.8**2))
    kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 3, 3)
    detail = (x - F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=3)).norm(dim=1)
    edge = median // 2
    windows = F.unfold(F.pad(detail[None], (edge, edge, edge, edge), mode="reflect"), median)
    smooth = windows.median(dim=1).values.reshape(size[1], size[0])
    return smooth > smooth.median()
