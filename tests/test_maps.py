"""Arithmetic on maps: every function against naive loops and the examples of the papers' code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnsteer import maps

SMOOTH = {0: 0.33191, 1: 0.12210, 2: 0.04492}
"""The 3 x 3 kernel by distance from its centre, |dy| + |dx|."""


def random_maps(n: int = 4, h: int = 5, w: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smoothed(x: Tensor, variance: float = 0.5) -> Tensor:
    """The Gaussian in loops, reflected at the borders."""
    h, w = x.shape
    taps = {d: math.exp(-(d**2) / (2 * variance)) for d in (-1, 0, 1)}
    total = sum(taps.values())
    out = torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            for di, a in taps.items():
                for dj, b in taps.items():
                    y, z = abs(i + di), abs(j + dj)
                    y, z = (2 * (h - 1) - y if y >= h else y), (2 * (w - 1) - z if z >= w else z)
                    out[i, j] += a * b / total**2 * x[y, z]
    return out


def test_column_softmax_of_the_example() -> None:
    x = torch.tensor([0.02, 0.03, 0.05])[:, None, None]
    found = maps.column_softmax(x).flatten()
    torch.testing.assert_close(found, torch.tensor([0.0420, 0.1142, 0.8438]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("std", [math.sqrt(0.5), 1.0])
def test_smoothing_in_loops(std: float) -> None:
    x = random_maps()
    expected = torch.stack([smoothed(m, std**2) for m in x])
    torch.testing.assert_close(maps.smooth(x, std), expected, atol=1e-12, rtol=0)


def test_smoothing_of_one_peak_gives_the_kernel_and_reflects_it() -> None:
    x = torch.zeros(2, 3, 3)
    x[0, 1, 1] = x[1, 0, 0] = 1.0
    centre, corner = maps.smooth(x)
    assert centre[1, 1] == centre.max()
    assert float(centre[1, 1]) == pytest.approx(0.33191, abs=1e-5)
    assert float(centre[0, 0]) == pytest.approx(0.1797, abs=1e-4)
    assert float(corner[0, 0]) == pytest.approx(0.33191, abs=1e-5)


def test_smoothing_keeps_constants_also_of_a_single_row() -> None:
    for shape in ((1, 4, 4), (1, 1, 6), (1, 1, 1)):
        x = torch.full(shape, 0.3, dtype=torch.float64)
        torch.testing.assert_close(maps.smooth(x), x, atol=1e-12, rtol=0)


def test_overlap_is_a_half_for_equal_maps_and_nothing_for_none() -> None:
    a, b = random_maps(2)
    expected = sum(min(float(p), float(q)) for p, q in zip(a.flatten(), b.flatten(), strict=True)) / float(
        a.sum() + b.sum()
    )
    assert float(maps.overlap(a, b)) == pytest.approx(expected, abs=1e-12)
    assert float(maps.overlap(a, a)) == pytest.approx(0.5)
    assert float(maps.overlap(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))) == 0
    assert float(maps.overlap(torch.zeros(2, 2), torch.zeros(2, 2))) == 0


def test_total_variation_of_the_example() -> None:
    x = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    assert float(maps.total_variation(x)) == pytest.approx(0.6667 + 0.6667, abs=1e-4)
    assert float(maps.total_variation(x, "code")) == pytest.approx(0.6667 + 0.3333, abs=1e-4)
    assert float(maps.total_variation(torch.full((3, 4), 0.2))) == 0
    assert float(maps.total_variation(torch.ones(1, 1))) == 0


def test_divergences_of_the_examples() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    assert float(maps.kl(p, q)) == pytest.approx(0.1438, abs=5e-5)
    assert float(maps.kl(q, p)) == pytest.approx(0.1308, abs=5e-5)
    assert float(maps.symmetric_kl(p, q)) == pytest.approx(0.1373, abs=5e-5)
    assert float(maps.jensen_shannon(p, p)) == 0
    assert math.isfinite(float(maps.symmetric_kl(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))))


def test_spread_in_loops() -> None:
    x = random_maps(3)
    rows = [(m**3 / (m**3).sum()).flatten().tolist() for m in x]
    middle = [sum(r[i] for r in rows) / 3 for i in range(15)]
    expected = sum(p * math.log(p / m) for r in rows for p, m in zip(r, middle, strict=True)) / 3 / math.log(3)
    assert float(maps.spread(x)) == pytest.approx(expected, abs=1e-12)
    assert float(maps.spread(torch.eye(3)[:, None] + 0)) == pytest.approx(1.0, abs=1e-6)
    assert float(maps.spread(x[:1])) == 0


def test_contrastive_loss_in_loops() -> None:
    x, labels, tau = random_maps(6).flatten(1), [0, 0, 1, 2, 1, 0], 0.3
    terms = []
    for a in range(6):
        for p in range(6):
            if a == p or labels[a] != labels[p]:
                continue
            s = [float(torch.cosine_similarity(x[a], x[n], dim=0)) / tau for n in range(6)]
            others = sum(math.exp(s[n]) for n in range(6) if labels[n] != labels[a])
            terms.append(-math.log(math.exp(s[p]) / (math.exp(s[p]) + others)))
    assert float(maps.nt_xent(x, labels, tau)) == pytest.approx(sum(terms) / len(terms), abs=1e-12)


def test_contrastive_loss_of_the_examples() -> None:
    apart = torch.eye(2).repeat_interleave(2, 0)
    assert float(maps.nt_xent(apart, [0, 0, 1, 1])) == pytest.approx(0.2395, abs=5e-5)
    assert float(maps.nt_xent(torch.ones(4, 3), [0, 0, 1, 1])) == pytest.approx(math.log(3), abs=1e-5)
    assert float(maps.nt_xent(7 * apart, [0, 0, 1, 1])) == pytest.approx(0.2395, abs=5e-5)


def test_contrastive_loss_without_a_pair_is_zero_with_a_zero_gradient() -> None:
    x = torch.rand(2, 3, requires_grad=True)
    loss = maps.nt_xent(x, [0, 1])
    assert float(loss) == 0
    assert torch.autograd.grad(loss, x)[0].abs().max() == 0


def test_contrastive_loss_of_one_group_alone_is_zero_and_has_a_finite_gradient() -> None:
    x = torch.rand(3, 4, requires_grad=True)
    loss = maps.nt_xent(x, [0, 0, 0])
    assert float(loss) == 0
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


# ---- masks -----------------------------------------------------------------------------------------------------------
def otsu_mask(x: Tensor) -> Tensor:
    """Otsu's split in loops."""
    levels = [math.floor(255 * v) for v in x.flatten().tolist()]
    best, threshold = 0.0, None
    for candidate in range(1, 256):
        below, above = [v for v in levels if v < candidate], [v for v in levels if v >= candidate]
        if below and above:
            score = len(below) * len(above) * (sum(below) / len(below) - sum(above) / len(above)) ** 2
            if score > best * (1 + 1e-12):
                best, threshold = score, candidate
    if threshold is None:
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.tensor([v >= threshold for v in levels]).view(x.shape)


def connected(mask: Tensor, pixel: int) -> Tensor:
    """The 4-connected part by a stack."""
    h, w = mask.shape
    seen: set[tuple[int, int]] = set()
    stack = [divmod(pixel, w)]
    while stack:
        i, j = stack.pop()
        if 0 <= i < h and 0 <= j < w and bool(mask[i, j]) and (i, j) not in seen:
            seen.add((i, j))
            stack += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
    return torch.tensor([[(i, j) in seen for j in range(w)] for i in range(h)])


@pytest.mark.parametrize("seed", range(5))
def test_otsu_in_loops(seed: int) -> None:
    x = random_maps(1, 7, 6, seed)[0] ** 3
    assert torch.equal(maps.otsu(x), otsu_mask(x))


def test_otsu_takes_the_smallest_threshold_and_knows_no_split_of_a_constant() -> None:
    assert maps.otsu(torch.tensor([[0.0, 1.0]])).tolist() == [[False, True]]
    assert not maps.otsu(torch.full((3, 3), 0.4)).any()
    assert not maps.otsu(torch.full((3, 3), 7.0)).any()


def test_otsu_stretches_what_leaves_the_unit_interval() -> None:
    x = random_maps(1, 7, 6)[0]
    stretched = (x - x.min()) / (x.max() - x.min())
    assert torch.equal(maps.otsu(10 * x - 3), maps.otsu(stretched))


@pytest.mark.parametrize("seed", range(4))
def test_component_by_a_stack(seed: int) -> None:
    mask = random_maps(1, 6, 7, seed)[0] > 0.45
    for pixel in (0, 20, 41):
        assert torch.equal(maps.component(mask, pixel), connected(mask, pixel))
