"""Attention on the image: uniform and one-hot rows, a bias by hand, and where boxes fall on grids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attnsteer.metrics import grounding as g

KEYS, IMAGE = 13, np.array([1, 2, 3, 4, 5, 6])  # the first key is BOS, the last six are text


def rows(seed: int = 0) -> np.ndarray:
    """Rows of 3 layers and 5 heads."""
    return torch.randn(3, 5, KEYS, generator=torch.Generator().manual_seed(seed)).softmax(-1).numpy()


def test_uniform_attention() -> None:
    uniform = np.full((2, KEYS), 1 / KEYS)
    mass = g.image_attention(uniform, IMAGE)
    np.testing.assert_allclose(mass, len(IMAGE) / KEYS)
    np.testing.assert_allclose(g.relative(mass, len(IMAGE), KEYS), 1)
    spread = g.spread(uniform[:, IMAGE])
    np.testing.assert_allclose(spread.entropy, 1)
    np.testing.assert_allclose(spread.effective, len(IMAGE))
    np.testing.assert_allclose(spread.largest, 1 / len(IMAGE))
    inside = np.array([False, True, True, False, False, False])
    found = g.pointing(uniform[:, IMAGE], inside)
    assert not found.hit.any()  # the first of equals, which is outside
    np.testing.assert_allclose(found.energy, 2 / 6)
    assert found.chance == pytest.approx(2 / 6)
    assert g.pointing(uniform[:, IMAGE], ~inside).hit.all()


@pytest.mark.parametrize("patch", range(6))
def test_attention_to_one_patch(patch: int) -> None:
    spread = g.spread(np.eye(6)[patch])
    assert (spread.entropy, spread.effective, spread.largest) == (0, 1, 1)
    for inside in (np.arange(6) == patch, np.arange(6) != patch):
        found = g.pointing(np.eye(6)[patch], inside)
        assert found.hit == inside[patch] and found.energy == inside[patch]


def test_masses_sum_to_one_and_equal_loops() -> None:
    given = rows()
    image, text, bos = (g.image_attention(given, keys) for keys in (IMAGE, np.arange(7, KEYS), [0]))
    np.testing.assert_allclose(image + text + bos, 1, atol=1e-6)
    for layer in range(3):
        for head in range(5):
            total = sum(float(given[layer, head, key]) for key in (1, 2, 3, 4, 5, 6))
            assert image[layer, head] == pytest.approx(total)
    mask = np.isin(np.arange(KEYS), IMAGE)
    np.testing.assert_array_equal(g.image_attention(torch.from_numpy(given), mask), image)


def test_sinks_do_not_count() -> None:
    given = rows()
    np.testing.assert_allclose(g.image_attention(given, IMAGE, sinks=[0, 2]), given[..., [1, 3, 4, 5, 6]].sum(-1))
    peak = np.array([0.7, 0.1, 0.2])
    assert not g.pointing(peak, [False, False, True]).hit
    found = g.pointing(peak, [False, False, True], sinks=[0])
    assert found.hit and found.energy == pytest.approx(2 / 3) and found.chance == 0.5


def test_mass_from_log_sum_exps_is_the_mass() -> None:
    logits = torch.randn(4, KEYS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direct = g.image_attention(logits.softmax(-1), IMAGE)
    fused = g.image_attention_from_lse(logits[:, IMAGE].logsumexp(-1), logits.logsumexp(-1))
    np.testing.assert_allclose(fused, direct, atol=1e-12)


def test_a_bias_on_image_keys_by_hand() -> None:
    """Mass m becomes m e^b / (m e^b + 1 - m): a quarter and a bias of ln 3 give a half."""
    logits = np.zeros(8)
    logits[:2] += math.log(3)
    shares = np.exp(logits) / np.exp(logits).sum()
    plain = np.full(8, 1 / 8)
    divergence, change = g.shift(shares, plain, [0, 1])
    assert g.image_attention(shares, [0, 1]) == pytest.approx(0.5) and change == pytest.approx(0.25)
    assert divergence == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_shift_of_nothing_and_of_hidden_keys() -> None:
    given = rows()
    divergence, change = g.shift(given, given, IMAGE)
    assert not divergence.any() and not change.any()
    assert g.shift([0.5, 0.5], [1.0, 0.0], [0])[0] == np.inf
    assert g.shift([1.0, 0.0], [0.5, 0.5], [0])[0] == pytest.approx(math.log(2))


def test_layers_are_summed_and_heads_averaged() -> None:
    mass = g.image_attention(rows(), IMAGE)
    wanted = sum(sum(mass[layer, head] for head in range(5)) / 5 for layer in (1, 2))
    assert g.summed_over_layers(mass, 1, 2) == pytest.approx(wanted)
    assert g.summed_over_layers(np.ones((32, 4))) == 14  # LLaVA-1.5-7B, layers 5 to 18
    with pytest.raises(ValueError, match="5 to 18 are not all among the 3"):
        g.summed_over_layers(mass)


def test_spread_equals_a_loop_and_no_mass_is_nan() -> None:
    given = rows()[..., IMAGE]
    found = g.spread(given)
    for layer in range(3):
        for head in range(5):
            total = sum(given[layer, head].tolist())
            entropy = -sum(p / total * math.log(p / total) for p in given[layer, head].tolist())
            assert found.entropy[layer, head] == pytest.approx(entropy / math.log(6))
            assert found.effective[layer, head] == pytest.approx(math.exp(entropy))
            assert found.largest[layer, head] == pytest.approx(max(given[layer, head]) / total)
    empty = g.spread(np.zeros(4))
    assert np.isnan([empty.entropy, empty.effective, empty.largest]).all()
    assert g.spread(np.array([0.3])).entropy == 0
    assert np.isnan(g.pointing(np.zeros(2), [True, False]).energy)


# ---------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
@pytest.mark.parametrize(("size", "grid"), [((30, 20), (3, 5)), ((20, 30), (4, 4)), ((7, 7), (1, 3))])
def test_patches_inside_a_box_equal_a_loop(fit: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    width, height = size
    box = (0.2 * width, 0.1 * height, 0.8 * width, 0.75 * height)
    side = max(size) if fit == "pad" else min(size)
    seen = size if fit == "stretch" else (side, side)
    found = g.patches_inside(box, size, grid, fit)  # type: ignore[arg-type]
    for row in range(grid[0]):
        for column in range(grid[1]):
            x = (column + 0.5) * seen[0] / grid[1] - (seen[0] - width) / 2
            y = (row + 0.5) * seen[1] / grid[0] - (seen[1] - height) / 2
            assert found[row, column] == (box[0] <= x < box[2] and box[1] <= y < box[3])


def test_a_wide_picture_by_hand() -> None:
    """200 x 100 on a 4 x 4 grid: padded, the picture is the two middle rows; cropped, its middle half is all."""
    left_half = (0, 0, 100, 100)
    padded = g.patches_inside(left_half, (200, 100), (4, 4), "pad")
    assert padded.astype(int).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    cropped = g.patches_inside(left_half, (200, 100), (4, 4), "crop")
    assert cropped.astype(int).tolist() == [[1, 1, 0, 0]] * 4
    assert not g.patches_inside((0, 0, 50, 100), (200, 100), (4, 4), "crop").any()  # cut off


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: g.image_attention(rows(), [KEYS]), "not all among 0 to 12"),
        (lambda: g.image_attention(rows(), np.ones(4, bool)), r"shape \(4,\) for 13 keys"),
        (lambda: g.relative(0.5, 0, 3), "0 image keys"),
        (lambda: g.pointing(np.ones(4), [True]), "do not belong together"),
        (lambda: g.pointing(np.ones(2), [True, False], sinks=[0, 1]), "none is left"),
        (lambda: g.patches_inside((5, 0, 5, 9), (9, 9), (3, 3)), "nothing is inside"),
        (lambda: g.patches_inside((0, 0, 5, 9), (9, 9), (3, 3), "zoom"), "pad, crop and stretch"),  # type: ignore[arg-type]
    ],
)
def test_what_is_refused(call, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        call()
