"""Is one arm better than another? Differences paired by seed, with intervals from a bootstrap over prompts.

Prompts differ more than seeds do, and the pictures of one prompt are alike, so whole prompts are drawn (a cluster
bootstrap); both arms have the same prompts and seeds, so differences are drawn, not scores.

    effect = paired_bootstrap(steered, plain)      # arrays (prompts, seeds)
    print(f"{effect.delta:+.3f} [{effect.low:+.3f}, {effect.high:+.3f}]")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 1000
"""Draws at a time: memory is this times the number of prompts."""


@dataclass(frozen=True)
class Effect:
    """A paired difference.

    Attributes:
        mean, baseline: of the two arms; delta: their difference.
        low, high: ends of the interval of ``delta`` (percentiles of the bootstrap).
        positive: share of draws in which ``delta`` is above 0, ties counting half.
        p: two-sided, ``2 min(positive, 1 - positive)``, at least 2 / (draws + 1).
        prompts, seeds: how much was compared.
    """

    mean: float
    baseline: float
    delta: float
    low: float
    high: float
    positive: float
    p: float
    prompts: int
    seeds: int


def paired_bootstrap(
    treated: ArrayLike, plain: ArrayLike, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> Effect:
    """The mean difference of two arms and its bootstrap interval; prompts are drawn, with all their seeds.

    Args:
        treated, plain: scores of the same prompts and seeds, ``(prompts, seeds)`` or ``(prompts,)``.
        draws: bootstrap samples.
        level: of the interval, between 0 and 1.
        seed: of the draws.

    Raises:
        ValueError: different shapes, no scores, or scores that are not finite.
    """
    ours, theirs = _scores(treated), _scores(plain)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"Arms of shape {ours.shape} and {theirs.shape} are not paired: give the same prompts and seeds."
        )
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"level={level} and draws={draws}: level is between 0 and 1, draws are 1 or more.")
    difference = (ours - theirs).mean(axis=1)  # one for each prompt
    rng = np.random.default_rng(seed)
    sizes = [min(CHUNK, draws - done) for done in range(0, draws, CHUNK)]
    means = np.concatenate([rng.choice(difference, (size, len(difference))).mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    positive = float((means > 0).mean() + 0.5 * (means == 0).mean())
    p = min(1.0, max(2 * min(positive, 1 - positive), 2 / (draws + 1)))
    means_of = float(ours.mean()), float(theirs.mean()), float(difference.mean())
    return Effect(*means_of, float(low), float(high), positive, p, *ours.shape)


def holm(values: Sequence[float]) -> list[float]:
    """P-values of several comparisons, corrected by Holm's step-down rule (1979), in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, worst = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = worst
    return corrected


def _scores(given: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(given, dtype=np.float64)
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.ndim != 2 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"Scores of shape {scores.shape}: wanted are finite numbers, (prompts, seeds).")
    return scores
