"""Consistency, diversity, subjects on noise, pixels, FID and KID: by hand, in loops, and their symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from attnsteer.metrics.pictures import frechet, pixels, sets

RNG = np.random.default_rng(3)
ROWS = RNG.normal(size=(5, 7))


def picture(seed: int, width: int = 23, height: int = 17) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# ---- sets ------------------------------------------------------------------------------------------------------------
def test_consistency_in_loops() -> None:
    total = 0.0
    for i in range(5):
        for j in range(i + 1, 5):
            total += float(ROWS[i] @ ROWS[j] / np.linalg.norm(ROWS[i]) / np.linalg.norm(ROWS[j]))
    assert sets.consistency(ROWS) == pytest.approx(2 / (5 * 4) * total, rel=1e-12)


def test_consistency_by_hand() -> None:
    assert sets.consistency(np.repeat(ROWS[:1], 4, axis=0)) == pytest.approx(1.0)
    assert sets.consistency(np.eye(6)) == 0
    assert sets.consistency([[1.0, 0.0], [0.6, 0.8]]) == pytest.approx(0.6)
    assert sets.consistency([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]) == pytest.approx(1 / 3)


def test_order_and_length_do_not_matter_to_consistency() -> None:
    assert sets.consistency(ROWS[RNG.permutation(5)]) == pytest.approx(sets.consistency(ROWS), rel=1e-12)
    assert sets.consistency(RNG.uniform(0.1, 9, (5, 1)) * ROWS) == pytest.approx(sets.consistency(ROWS), rel=1e-12)


def test_one_picture_is_no_set() -> None:
    with pytest.raises(ValueError, match="two pictures or more"):
        sets.consistency(ROWS[:1])
    with pytest.raises(ValueError, match="two seeds or more"):
        sets.diversity([1.0], lambda a, b: a - b)


def test_diversity_is_the_mean_of_all_pairs() -> None:
    assert sets.diversity([0.0, 1.0, 5.0], lambda a, b: abs(a - b)) == pytest.approx((1 + 5 + 4) / 3)
    assert sets.diversity([0.0, 5.0, 1.0], lambda a, b: abs(a - b)) == pytest.approx(10 / 3)
    same = [picture(1)] * 3
    assert sets.diversity(same, pixels.rms) == 0


def test_subjects_stand_before_the_same_noise() -> None:
    first, second, mask = picture(1), picture(2), np.zeros((17, 23), bool)
    mask[3:9, 4:13] = True
    shown = [np.asarray(sets.on_noise(each, mask)) for each in (first, second)]
    np.testing.assert_array_equal(shown[0][mask], np.asarray(first)[mask])
    np.testing.assert_array_equal(shown[0][~mask], shown[1][~mask])
    assert not (shown[0][~mask] == np.asarray(first)[~mask]).all()
    other = np.asarray(sets.on_noise(first, mask, seed=1))
    assert (other[~mask] != shown[0][~mask]).any() and shown[0][~mask].std() > 60
    with pytest.raises(ValueError, match="for a picture of"):
        sets.on_noise(first, mask.T)
    with pytest.raises(ValueError, match="empty"):
        sets.on_noise(first, np.zeros((17, 23), bool))


# ---- pixels ----------------------------------------------------------------------------------------------------------
def test_equal_pictures() -> None:
    one = picture(1)
    assert pixels.rms(one, one) == 0 and pixels.psnr(one, one) == math.inf and pixels.ssim(one, one) == 1


def test_rms_and_psnr_by_hand() -> None:
    dark, light = Image.new("RGB", (12, 12), (10, 20, 30)), Image.new("RGB", (12, 12), (61, 71, 81))
    assert pixels.rms(dark, light) == pytest.approx(51 / 255) == pytest.approx(0.2)
    assert pixels.psnr(dark, light) == pytest.approx(10 * math.log10(1 / 0.04))
    black, white = Image.new("RGB", (12, 12)), Image.new("RGB", (12, 12), "white")
    assert pixels.rms(black, white) == 1 and pixels.psnr(black, white) == 0


@pytest.mark.parametrize(("sigma", "radius"), [(1.5, 5), (0.7, 2)])
def test_ssim_in_loops(sigma: float, radius: int) -> None:
    one, other = picture(1), picture(2)
    a, b = (np.asarray(each, dtype=float) / 255 for each in (one, other))
    b = 0.7 * a + 0.3 * b
    other = Image.fromarray((255 * b).round().astype(np.uint8))
    b = np.asarray(other, dtype=float) / 255
    weights = {
        (y, x): math.exp(-(y * y + x * x) / (2 * sigma**2))
        for y in range(-radius, radius + 1)
        for x in range(-radius, radius + 1)
    }
    whole, found = sum(weights.values()), []
    for row in range(radius, 17 - radius):
        for column in range(radius, 23 - radius):
            for colour in range(3):
                cells = [(w / whole, a[row + y, column + x, colour], b[row + y, column + x, colour])
                         for (y, x), w in weights.items()]  # fmt: skip
                m1, m2 = sum(w * p for w, p, _ in cells), sum(w * q for w, _, q in cells)
                v1, v2 = sum(w * (p - m1) ** 2 for w, p, _ in cells), sum(w * (q - m2) ** 2 for w, _, q in cells)
                both = sum(w * (p - m1) * (q - m2) for w, p, q in cells)
                over = (2 * m1 * m2 + 0.0001) * (2 * both + 0.0009)
                found.append(over / ((m1**2 + m2**2 + 0.0001) * (v1 + v2 + 0.0009)))
    assert 0.2 < np.mean(found) < 0.98
    assert pixels.ssim(one, other, sigma, radius) == pytest.approx(np.mean(found), rel=1e-9)
    assert pixels.ssim(other, one, sigma, radius) == pytest.approx(np.mean(found), rel=1e-9)


def test_pictures_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="pixel by pixel"):
        pixels.rms(picture(1), picture(1, 24))
    with pytest.raises(ValueError, match="11 pixels"):
        pixels.ssim(picture(1, 23, 9), picture(2, 23, 9))


# ---- FID and KID -----------------------------------------------------------------------------------------------------
FEATURES, OTHERS = RNG.normal(size=(60, 6)) @ RNG.normal(size=(6, 6)), 2 + RNG.normal(size=(45, 6))


def test_equal_features_have_no_distance() -> None:
    assert abs(frechet.fid(FEATURES, FEATURES)) < 1e-6 * np.trace(np.cov(FEATURES, rowvar=False))
    few = RNG.normal(size=(4, 9))  # fewer pictures than features: the product is singular
    assert abs(frechet.fid(few, few)) < 1e-6 * np.trace(np.cov(few, rowvar=False))


def test_a_shift_costs_its_squared_length() -> None:
    shift = RNG.normal(size=6)
    assert frechet.fid(FEATURES, FEATURES + shift) == pytest.approx(sum(v * v for v in shift), rel=1e-6)


def test_one_dimension_by_hand() -> None:
    a, b = RNG.normal(1.0, 2.0, (30, 1)), RNG.normal(-2.0, 0.5, (41, 1))
    apart = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet.fid(a, b) == pytest.approx(apart, rel=1e-9)


def test_fid_of_commuting_covariances_and_its_symmetry() -> None:
    scales = np.array([1.0, 2.0, 3.0, 0.5, 1.5, 0.1])
    apart = ((np.sqrt(np.linalg.eigvalsh(np.cov(FEATURES * 2, rowvar=False)))
              - np.sqrt(np.linalg.eigvalsh(np.cov(FEATURES, rowvar=False)))) ** 2).sum()  # fmt: skip
    mean = ((FEATURES.mean(0) * 2 - FEATURES.mean(0)) ** 2).sum()
    assert frechet.fid(FEATURES * 2, FEATURES) == pytest.approx(apart + mean, rel=1e-9)
    assert frechet.fid(FEATURES * scales, OTHERS) == pytest.approx(frechet.fid(OTHERS, FEATURES * scales), rel=1e-9)
    assert frechet.fid(FEATURES[::-1], OTHERS) == pytest.approx(frechet.fid(FEATURES, OTHERS), rel=1e-9)


def test_kid_in_loops() -> None:
    a, b = FEATURES[:7], OTHERS[:5]

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 6 + 1) ** 3

    within = [
        sum(kernel(g[i], g[j]) for i in range(len(g)) for j in range(len(g)) if i != j) / (len(g) * (len(g) - 1))
        for g in (a, b)
    ]
    between = sum(kernel(x, y) for x in a for y in b) / 35
    assert frechet.kid(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-12)
    assert frechet.kid(b, a) == pytest.approx(frechet.kid(a, b), rel=1e-12)


def test_features_that_do_not_belong_together() -> None:
    for function in (frechet.fid, frechet.kid):
        with pytest.raises(ValueError, match="2 or more of one width"):
            function(FEATURES, OTHERS[:, :4])
        with pytest.raises(ValueError, match="2 or more of one width"):
            function(FEATURES[:1], OTHERS)
