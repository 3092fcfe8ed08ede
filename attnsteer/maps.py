"""Arithmetic on the attention maps of words: smoothing, normalising, masks, and the distances that losses are made of.

A map is ``(h, w)``, a stack of maps ``(n, h, w)``, both non-negative. Everything here has exact gradients, except the
masks, which are constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-12
"""Below this a probability counts as this much, so that logarithms stay finite."""


def column_softmax(maps: Tensor, sharpness: float = 100.0) -> Tensor:
    """``softmax over tokens(100 A)``: which token a pixel looks at most. ``(n, h, w)`` -> ``(n, h, w)``.

    A second softmax over probabilities, as Attend-and-Excite has it: (.02, .03, .05) becomes (.0420, .1142, .8438).
    """
    return torch.softmax(sharpness * maps, dim=0)


def smooth(maps: Tensor, std: float = math.sqrt(0.5)) -> Tensor:
    """A 3 x 3 Gaussian with reflected borders; constant maps stay as they are.

    The default is what the code of Attend-and-Excite computes for its "sigma 0.5", ``exp(-x^2)`` per axis: .33191 in
    the centre, .12210 beside it, .04492 in the corners.
    """
    side = math.exp(-1 / (2 * std**2))
    taps = maps.new_tensor([side, 1.0, side]) / (1 + 2 * side)
    padded = maps[:, None]
    for axis, pad in ((-1, (1, 1, 0, 0)), (-2, (0, 0, 1, 1))):
        padded = F.pad(padded, pad, mode="reflect" if maps.shape[axis] > 1 else "replicate")
    return F.conv2d(padded, (taps[:, None] * taps)[None, None])[:, 0]


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """``sum min(a, b) / sum (a + b)``, in [0, 1/2]; 1/2 where both are equal, 0 without gradient where nothing is."""
    total = (a + b).sum()
    found = torch.minimum(a, b).sum() / torch.where(total > 0, total, torch.ones_like(total))
    return torch.where(total > 0, found, torch.zeros_like(found))


def total_variation(x: Tensor, compat: str = "") -> Tensor:
    """Mean absolute difference of horizontal plus that of vertical neighbours.

    ``compat="code"``: the vertical term of Divide & Bind's released code, which compares every row but the first with
    the last one.
    """
    down = x[1:] - (x[-1:] if compat == "code" else x[:-1])
    across = x[:, 1:] - x[:, :-1]
    return sum((d.abs().mean() for d in (across, down) if d.numel()), start=x.new_zeros(()))


def as_distribution(x: Tensor) -> Tensor:
    """The map divided by its sum."""
    return x / x.sum().clamp_min(TINY)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """``sum p ln(p / q)``, finite where either is zero."""
    return (p * (p.clamp_min(TINY).log() - q.clamp_min(TINY).log())).sum()


def symmetric_kl(p: Tensor, q: Tensor) -> Tensor:
    """``(KL(p||q) + KL(q||p)) / 2``."""
    return 0.5 * (kl(p, q) + kl(q, p))


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p||m)/2 + KL(q||m)/2`` with ``m = (p + q) / 2``; neither is normalised here."""
    middle = 0.5 * (p + q)
    return 0.5 * kl(p, middle) + 0.5 * kl(q, middle)


def spread(maps: Tensor, power: float = 3.0) -> Tensor:
    """How different n maps are, in [0, 1]: Jensen-Shannon divergence of all over ``ln n``; 0 for a single map.

    Each map is raised to ``power`` and normalised to sum 1 first.
    """
    count = maps.shape[0]
    if count < 2:
        return maps.new_zeros(())
    rows = torch.stack([as_distribution(m) for m in maps**power])
    middle = rows.mean(dim=0)
    return torch.stack([kl(row, middle) for row in rows]).mean() / math.log(count)


def nt_xent(vectors: Tensor, labels: Sequence[int], temperature: float = 0.5) -> Tensor:
    """Contrastive loss of ``(n, d)`` vectors under cosine similarity s: the mean over ordered pairs (a, p) of one label
    of ``-ln(e^{s_ap/t} / (e^{s_ap/t} + sum over other labels n of e^{s_an/t}))``; 0 without such a pair."""
    unit = F.normalize(vectors, dim=1, eps=TINY)
    similar = unit @ unit.T / temperature
    label = torch.tensor(labels, device=vectors.device)
    same = label[:, None] == label
    others = (similar[:, None] - similar[:, :, None]).masked_fill(same[:, None], -math.inf)  # (anchor, positive, n)
    terms = F.pad(others, (1, 0)).logsumexp(dim=-1)  # ln(1 + sum of e^{s_an - s_ap})
    pairs = same & ~torch.eye(len(labels), dtype=torch.bool, device=vectors.device)
    return terms[pairs].mean() if bool(pairs.any()) else (0 * vectors).sum()


def otsu(x: Tensor) -> Tensor:
    """The brighter class of Otsu's split into two, bool ``(h, w)``; a constant map has none.

    Levels ``floor(255 x)``; the threshold in 1..255 maximises ``n0 n1 (mean0 - mean1)^2``, the smallest on ties. Maps
    that leave [0, 1] are stretched to it first.
    """
    x = x.detach().double()
    low, high = x.min(), x.max()
    outside = (low < 0) | (high > 1)
    scaled = torch.where(outside, (x - low) / (high - low).clamp_min(TINY), x)
    levels = (255 * scaled).floor().long().clamp(0, 255)
    histogram = torch.bincount(levels.flatten(), minlength=256).double()
    weighted = histogram * torch.arange(256, device=x.device)
    below, sum_below = histogram.cumsum(0)[:-1], weighted.cumsum(0)[:-1]  # of thresholds 1 to 255
    above, sum_above = histogram.sum() - below, weighted.sum() - sum_below
    product = below * above
    score = torch.where(product > 0, (above * sum_below - below * sum_above) ** 2 / product.clamp_min(1), 0.0)
    best = int((score == score.max()).nonzero()[0])
    return levels >= best + 1 if bool(score[best] > 0) else torch.zeros_like(levels, dtype=torch.bool)


def component(mask: Tensor, pixel: int) -> Tensor:
    """The 4-connected part of a mask ``(h, w)`` that holds a pixel (row-major position); empty where it is outside."""
    grown = torch.zeros_like(mask)
    grown.view(-1)[pixel] = mask.reshape(-1)[pixel]
    while True:
        wider = grown.clone()
        wider[1:] |= grown[:-1]
        wider[:-1] |= grown[1:]
        wider[:, 1:] |= grown[:, :-1]
        wider[:, :-1] |= grown[:, 1:]
        wider &= mask
        if torch.equal(wider, grown):
            return grown
        grown = wider
