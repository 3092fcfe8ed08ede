"""Contrast, masks, regions, crops: the hand examples of the papers' formulas, and naive loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from attnsteer import SteeringError, regions
from attnsteer.regions import (
    bounding_box,
    brightest,
    components,
    contrast,
    contrast_over_steps,
    covered,
    covering_size,
    crop_box,
    edges,
    magnified,
    strongest_regions,
    tiles,
    to_pixels,
)

A_Q, A_G = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), torch.tensor([0.2, 0.2, 0.2, 0.4]).double()


# ---- contrast --------------------------------------------------------------------------------------------------------
def test_contrast_by_hand() -> None:
    expected = torch.tensor([1 / 3, 2 / 3, 1.0, 0.8]).double()
    torch.testing.assert_close(contrast(A_Q, A_G, 0.1), expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(contrast(A_Q, A_G), torch.tensor([0.5, 1, 1.5, 1]).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(1e9 * contrast(A_Q, A_G, 1e9), A_Q, atol=1e-8, rtol=0)
    assert contrast(torch.zeros(2), torch.zeros(2)).tolist() == [0, 0]


def test_contrast_is_the_minimiser_of_its_objective() -> None:
    best = contrast(A_Q, A_G, 0.03).requires_grad_()
    ((best * A_G - A_Q).square().sum() + 0.03 * (best.square() * A_G).sum()).backward()
    assert best.grad.abs().max() < 1e-12


def test_steps_are_paired_and_weighted() -> None:
    question, general = torch.rand(4, 3, 2, 5), torch.rand(3, 3, 2, 5)
    lam, total = 0.01, torch.zeros(2, 5).double()
    for t in range(3):  # as far as both go
        for layer in range(3):
            for i in range(2):
                for j in range(5):
                    total[i, j] += (t + 1) * question[t, layer, i, j] / (general[t, layer, i, j] + lam)
    torch.testing.assert_close(contrast_over_steps(question, general, lam, "all"), total, atol=1e-4, rtol=1e-6)
    for steps, own, other in (("first", 0, 0), ("end", 3, 2)):
        expected = (question[own].double() / (general[other].double() + lam)).sum(0)
        torch.testing.assert_close(contrast_over_steps(question, general, lam, steps), expected, atol=1e-12, rtol=0)


# ---- pixels ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("grid", "size"), [((3, 5), (17, 11)), ((7, 2), (5, 3)), ((1, 1), (4, 3)), ((4, 1), (6, 9))])
def test_pixels_are_bilinear_with_half_pixel_centres(grid: tuple[int, int], size: tuple[int, int]) -> None:
    x = torch.rand(grid).double()
    expected = F.interpolate(x[None, None], (size[1], size[0]), mode="bilinear", align_corners=False)[0, 0].numpy()
    np.testing.assert_allclose(to_pixels(x, size), expected, atol=1e-12)


def test_a_grid_that_covers_a_part_leaves_the_rest_at_zero() -> None:
    x = torch.rand(3, 4).double()
    heat = to_pixels(x, (20, 12), (4, 0, 16, 12))
    np.testing.assert_allclose(heat[:, 4:16], to_pixels(x, (12, 12)), atol=1e-12)
    assert (heat[:, :4] == 0).all()
    assert (heat[:, 16:] == 0).all()
    np.testing.assert_allclose(to_pixels(x, (20, 12), (0, -4, 20, 16)), to_pixels(x, (20, 20))[4:16], atol=1e-12)


def test_summing_before_or_after_resizing_is_the_same() -> None:
    a, b = torch.rand(2, 3, 4).double()
    np.testing.assert_allclose(to_pixels(a + b, (9, 7)), to_pixels(a, (9, 7)) + to_pixels(b, (9, 7)), atol=1e-12)


# ---- masks and regions -----------------------------------------------------------------------------------------------
def test_the_percentile_by_hand() -> None:
    heat = np.arange(1.0, 17.0).reshape(4, 4)
    assert np.percentile(heat, 75) == 12.25
    mask = brightest(heat, 0.25)
    assert mask.tolist() == [[False] * 4] * 3 + [[True] * 4]
    assert components(mask)[1] == 1


def test_pixels_that_were_not_seen_neither_count_nor_stay() -> None:
    """More of the picture is unseen than is dropped: over all pixels the percentile would be 0, and all stay."""
    heat = np.zeros((4, 12))
    heat[:, 4:8] = np.arange(1.0, 17.0).reshape(4, 4)
    seen = covered((12, 4), (4, 0, 8, 4))
    assert seen.sum() == 16
    assert seen[:, 4:8].all()
    mask = brightest(heat, 0.5, seen)
    assert mask[:, 4:8].tolist() == brightest(heat[:, 4:8], 0.5).tolist()
    assert mask.sum() == 8
    assert not brightest(np.zeros((4, 12)), 0.5, seen)[:, :4].any()


@pytest.mark.parametrize("area", [(3.4, 0.5, 9.6, 5.0), (-2.0, -1.0, 14.0, 8.0), (0, 1.5, 12, 4.5)])
def test_covered_pixels_are_those_that_a_map_reaches(area: tuple[float, float, float, float]) -> None:
    reached = to_pixels(torch.ones(3, 2), (12, 6), area) > 0
    assert (covered((12, 6), area) == reached).all()


def test_a_constant_map_keeps_every_pixel_whatever_the_rounding() -> None:
    heat = to_pixels(torch.full((5, 7), 1 / 3), (33, 29)).astype(np.float32)
    assert brightest(heat, 0.2).all()


def test_diagonal_neighbours_are_apart() -> None:
    labels, count = components(np.eye(2, dtype=bool))
    assert count == 2
    assert labels.tolist() == [[1, 0], [0, 2]]


@pytest.mark.parametrize("density", [0.0, 0.3, 0.55, 0.8, 1.0])
def test_components_are_those_of_a_flood_fill(density: float) -> None:
    mask = np.random.default_rng(int(100 * density)).random((23, 31)) < density
    expected, count = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if expected[start]:
            continue
        count += 1
        stack = [start]
        while stack:
            y, x = stack.pop()
            if 0 <= y < 23 and 0 <= x < 31 and mask[y, x] and not expected[y, x]:
                expected[y, x] = count
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    labels, found = components(mask)
    assert found == count
    assert (labels == expected).all()


def test_how_many_regions_stay() -> None:
    mask = np.zeros((1, 40), bool)
    mask[0, ::2] = True  # 20 single pixels
    heat = np.arange(40.0)[None]
    kept = strongest_regions(heat, mask, regions=3, keep=0.2)
    assert np.flatnonzero(kept[0]).tolist() == [32, 34, 36, 38]  # max(3, int(20 * 0.2))
    assert strongest_regions(heat, mask, regions=6, keep=0.2).sum() == 6
    assert strongest_regions(heat, mask, regions=99, keep=0.2).sum() == 20


def test_regions_are_ranked_by_their_sum_not_their_peak() -> None:
    heat = np.array([[3.0, 3.0, 0.0, 5.0, 0.0, 4.0]])
    kept = strongest_regions(heat, heat > 0, regions=1, keep=0.1)
    assert kept.tolist() == [[True, True, False, False, False, False]]


# ---- pictures --------------------------------------------------------------------------------------------------------
def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(1, 256, (height, width, 3), dtype=np.uint8))


def test_a_crop_is_enlarged_until_it_covers() -> None:
    assert covering_size((100, 50), (400, 400)) == (800, 400)
    mask = np.zeros((400, 400), bool)
    mask[200:250, 100:200] = True
    assert magnified(picture(400, 400), mask).size == (800, 400)


def test_outside_of_the_mask_is_black() -> None:
    plain, mask = picture(8, 8), np.zeros((8, 8), bool)
    mask[0, :] = mask[:, 0] = True  # its box is the whole frame
    found = np.asarray(magnified(plain, mask))
    assert (found[mask] == np.asarray(plain)[mask]).all()
    assert (found[~mask] == 0).all()


def test_a_full_or_empty_mask_changes_nothing() -> None:
    plain = picture(13, 7)
    for mask in (np.ones((7, 13), bool), np.zeros((7, 13), bool)):
        assert magnified(plain, mask).tobytes() == plain.tobytes()
        assert bounding_box(mask) == (0, 0, 13, 7)


def test_the_box_of_a_mask_is_tight() -> None:
    mask = np.zeros((9, 9), bool)
    mask[2, 3] = mask[6, 5] = True
    assert bounding_box(mask) == (3, 2, 6, 7)


# ---- the box of ViCrop -----------------------------------------------------------------------------------------------
def naive_box(x: np.ndarray, size: tuple[int, int], side: float) -> tuple[int, int, int, int]:
    rows, columns = x.shape
    cw, ch = size[0] / columns, size[1] / rows
    found = []
    for r in (1, 1.2, 1.4, 1.6, 1.8, 2):
        nx, ny = max(1, min(int(side * r / cw), columns)), max(1, min(int(side * r / ch), rows))
        if nx == columns and ny == rows:
            if r == 1:
                return 0, 0, *size
            continue
        sums = {(a, b): x[b : b + ny, a : a + nx].sum() for a in range(columns - nx + 1) for b in range(rows - ny + 1)}
        best = max(sums, key=lambda p: (round(sums[p], 9), -p[0], -p[1]))
        a, b = best
        near = [sums[p] for p in ((a - 1, b), (a + 1, b), (a, b - 1), (a, b + 1)) if p in sums]
        found.append(((sums[best] - sum(near) / len(near)) / (nx * ny), r, best, (nx, ny)))
    sharp = max(round(f[0], 9) for f in found)
    _, r, (a, b), (nx, ny) = next(f for f in found if round(f[0], 9) == sharp)
    half = int(side * r // 2)
    cx, cy = int(cw * a + cw * nx / 2), int(ch * b + ch * ny / 2)
    cx, cy = max(half, min(cx, size[0] - half)), max(half, min(cy, size[1] - half))
    return max(0, cx - half), max(0, cy - half), min(size[0], cx + half), min(size[1], cy + half)


def test_the_box_by_hand() -> None:
    x = torch.ones(6, 6)
    x[2, 3] = 10
    assert crop_box(x, (600, 600), 200) == (200, 100, 400, 300)
    sums = F.avg_pool2d(x[None], 2, 1)[0] * 4
    assert regions._sharpness(sums, *regions._first_largest(sums)) / 4 == 1.125


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("grid", "size"), [((6, 9), (900, 610)), ((7, 7), (400, 431)), ((3, 11), (300, 90))])
def test_the_box_is_that_of_naive_loops(seed: int, grid: tuple[int, int], size: tuple[int, int]) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 50, grid).astype(np.float64))
    for side in (20, 128, 224.0):
        assert crop_box(x, size, side) == naive_box(x.numpy(), size, side)


def test_small_pictures_are_kept_whole_and_boxes_stay_inside() -> None:
    assert crop_box(torch.rand(4, 4), (100, 100), 100) == (0, 0, 100, 100)
    corner = torch.zeros(10, 10)
    corner[9, 0] = 1
    assert crop_box(corner, (1000, 1000), 300) == (0, 700, 300, 1000)
    huge = crop_box(torch.rand(5, 5), (9000, 9000), 300)  # windows of less than a cell
    assert huge[2] - huge[0] in {300, 360, 420, 480, 540, 600}
    with pytest.raises(SteeringError, match="leave no window"):
        crop_box(corner, (1000, 1000), 300, ())


def test_large_pictures_come_in_tiles() -> None:
    for size, rows, columns in (((3000, 2000), 2, 3), ((1000, 900), 1, 1), ((500, 3000), 3, 1)):
        found = tiles(picture(*size))
        assert (len(found), len(found[0])) == (rows, columns)
        assert sum(line[0].height for line in found) == size[1]
        assert sum(tile.width for tile in found[0]) == size[0]


def test_edges_are_where_the_picture_changes() -> None:
    plain = Image.new("RGB", (32, 32), (120, 120, 120))
    plain.paste((255, 0, 0), (16, 0, 32, 32))
    found = edges(plain, (32, 32))
    assert found.shape == (32, 32)
    assert not found[:, :8].any()
    assert not edges(Image.new("RGB", (16, 16)), (16, 16)).any()
    noisy = edges(picture(40, 24), (40, 24), median=3)
    assert 0.4 < noisy.float().mean() < 0.6  # above their own median


def test_the_detail_of_edges_by_naive_loops() -> None:
    plain = picture(9, 8)
    x = np.asarray(plain, dtype=np.float64) / 255
    taps = np.exp(-(np.array([-1, 0, 1.0]) ** 2) / (2 * 0.8**2))
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    blurred = sum(kernel[i, j] * padded[i : i + 8, j : j + 9] for i in range(3) for j in range(3))
    detail = np.linalg.norm(x - blurred, axis=-1)
    around = np.pad(detail, 1, mode="reflect")
    smooth = np.array([[np.median(around[i : i + 3, j : j + 3]) for j in range(9)] for i in range(8)])
    middle = np.sort(smooth.ravel())[(smooth.size - 1) // 2]
    assert (edges(plain, (9, 8), median=3).numpy() == (smooth > middle)).mean() > 0.97  # float32 ties apart
