"""Is one arm better than another? Differences paired by seed, with intervals from a bootstrap over prompts.

Prompts differ more than seeds do, and the pictures of one prompt are alike, so whole prompts are drawn (a cluster
bootstrap); both arms have the same prompts and seeds, so differences are drawn, not scores.

    effect = paired_bootstrap(steered, plain)      # arrays (prompts, seeds)
    print(f"{effect.delta:+.3f} [{effect.low:+.3f}, {effect.high:+.3f}]")

Metrics that are ratios of sums (CHAIR_I, recall, F1, ...) have no score for each image to take differences of. There
images are drawn, numerators and denominators summed over the draw, and the two ratios subtracted:

    effects = ratio_differences(chair.ratios(steered), chair.ratios(plain))
    effects["chair_i"].resolvable                  # what a difference must be for these images to show it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .ratios import Ratio, quotient

CHUNK = 1000
"""Draws at a time: memory is this times the number of prompts."""

CELLS = 2_000_000
"""Draws times images at a time, for ratios: about 40 MB."""


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
    _check(draws, level)
    difference = (ours - theirs).mean(axis=1)  # one for each prompt
    rng = np.random.default_rng(seed)
    sizes = [min(CHUNK, draws - done) for done in range(0, draws, CHUNK)]
    means = np.concatenate([rng.choice(difference, (size, len(difference))).mean(axis=1) for size in sizes])
    means_of = float(ours.mean()), float(theirs.mean()), float(difference.mean())
    return Effect(*means_of, *_percentiles(means, level), *_sign(means), *ours.shape)


@dataclass(frozen=True)
class Interval:
    """A ratio and how far the choice of images decides it.

    Attributes:
        value: the ratio; low, high: ends of its interval (percentiles of the bootstrap).
        spread: standard deviation over the draws, an estimate of the standard error.
        samples, draws, level, seed: what it was made from.
    """

    value: float
    low: float
    high: float
    spread: float
    samples: int
    draws: int
    level: float
    seed: int


@dataclass(frozen=True)
class RatioEffect:
    """The difference of one ratio between two arms on the same images.

    Attributes:
        value, baseline: of the two arms; delta: their difference.
        low, high, positive, p: as in ``Effect``.
        spread: standard deviation of the difference over the draws.
        resolvable: the smallest difference that so many images show, see ``resolvable``.
        samples, draws, level, seed: what it was made from.
    """

    value: float
    baseline: float
    delta: float
    low: float
    high: float
    positive: float
    p: float
    spread: float
    resolvable: float
    samples: int
    draws: int
    level: float
    seed: int


def ratio_intervals(
    table: Mapping[str, Ratio], draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Bootstrap intervals of several ratios over the same images; every draw of images serves all of them.

    Args:
        table: ratios with one sample an image. Questions about one image are alike: group them first
            (``ratios.grouped``).
        draws, level, seed: as in ``paired_bootstrap``.

    Raises:
        ValueError: ratios of different lengths.
    """
    _check(draws, level)
    found = {}
    for name, drawn in _drawn(table, draws, seed).items():
        low, high = _percentiles(drawn, level)
        images, spread = len(table[name].numerators), float(drawn.std())
        found[name] = Interval(table[name].value, low, high, spread, images, draws, level, seed)
    return found


def ratio_differences(
    ours: Mapping[str, Ratio], theirs: Mapping[str, Ratio], draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> dict[str, RatioEffect]:
    """Paired differences ``ours - theirs`` of the ratios that both tables have, with bootstrap intervals over images.

    Sample i of both arms is image i: whether the arms really saw the same images is the caller's to see to.

    Raises:
        ValueError: ratios of different lengths, or no name in common.
    """
    _check(draws, level)
    names = [name for name in ours if name in theirs]
    if not names:
        raise ValueError(f"No ratio in common: {', '.join(ours)} and {', '.join(theirs)}.")
    both = {(arm, name): table[name] for arm, table in enumerate((ours, theirs)) for name in names}
    drawn, found = _drawn(both, draws, seed), {}
    for name in names:
        deltas = drawn[0, name] - drawn[1, name]
        mean, baseline, spread = ours[name].value, theirs[name].value, float(deltas.std())
        found[name] = RatioEffect(
            mean,
            baseline,
            mean - baseline,
            *_percentiles(deltas, level),
            *_sign(deltas),
            spread=spread,
            resolvable=resolvable(spread, level),
            samples=len(ours[name].numerators),
            draws=draws,
            level=level,
            seed=seed,
        )
    return found


def resolvable(spread: float, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest true difference that a comparison with this standard error finds with probability ``power``.

    ``(z((1 + level) / 2) + z(power)) spread``, by the normal approximation: 2.8 standard errors by default. For two
    runs on different images give ``sqrt(2)`` times the spread of one.
    """
    if not (0 < level < 1 and 0 < power < 1):
        raise ValueError(f"level={level} and power={power} are between 0 and 1.")
    normal = NormalDist()
    return (normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)) * spread


def holm(values: Sequence[float]) -> list[float]:
    """P-values of several comparisons, corrected by Holm's step-down rule (1979), in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, worst = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = worst
    return corrected


def _drawn(table: Mapping[Any, Ratio], draws: int, seed: int) -> dict[Any, NDArray[np.float64]]:
    """Every ratio for every draw of as many images as there are, with replacement: {name: (draws,)}."""
    lengths = {len(ratio.numerators) for ratio in table.values()}
    if len(lengths) != 1:
        raise ValueError(f"Ratios of {sorted(lengths)} samples are not of the same images.")
    over = np.stack([ratio.numerators for ratio in table.values()], axis=1)  # (images, ratios)
    under = np.stack([ratio.denominators for ratio in table.values()], axis=1)
    drawn = np.concatenate([quotient(times @ over, times @ under) for times in _times(lengths.pop(), draws, seed)])
    return {name: drawn[:, column] for column, name in enumerate(table)}


def _times(images: int, draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often every image is in every draw, (some draws, images); the chunks do not change what is drawn."""
    rng, at_once = np.random.default_rng(seed), max(1, CELLS // images)
    for done in range(0, draws, at_once):
        size = min(at_once, draws - done)
        cells = rng.integers(images, size=(size, images)) + np.arange(size)[:, None] * images
        yield np.bincount(cells.ravel(), minlength=size * images).reshape(size, images).astype(np.float64)


def _check(draws: int, level: float) -> None:
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"level={level} and draws={draws}: level is between 0 and 1, draws are 1 or more.")


def _percentiles(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _sign(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """The share of draws above 0, ties counting half, and the two-sided p."""
    positive = float((drawn > 0).mean() + 0.5 * (drawn == 0).mean())
    return positive, min(1.0, max(2 * min(positive, 1 - positive), 2 / (len(drawn) + 1)))


def _scores(given: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(given, dtype=np.float64)
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.ndim != 2 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"Scores of shape {scores.shape}: wanted are finite numbers, (prompts, seeds).")
    return scores
