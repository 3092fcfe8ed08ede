"""Metrics as ratios of sums: a numerator and a denominator for each sample, so that nothing has to be counted again.

    chair_i = Ratio([1, 0, 2], [4, 2, 5])    # made-up mentions and mentions, of three captions
    chair_i.value                            # 3 / 11, the ratio of the sums and not the mean of the ratios

Totals, intervals (``attnsteer.metrics.statistics``) and comparisons all come from these two columns.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Ratio:
    """Sum of ``numerators`` over sum of ``denominators``, both ``(samples,)`` float64.

    Raises:
        ValueError: the columns are not of one length, are empty or hold what is not finite, or a denominator is
            negative.
    """

    numerators: NDArray[np.float64]
    denominators: NDArray[np.float64]

    def __init__(self, numerators: ArrayLike, denominators: ArrayLike) -> None:
        over, under = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
        if over.ndim != 1 or over.shape != under.shape or not over.size:
            raise ValueError(
                f"Columns of shape {over.shape} and {under.shape}: wanted are two of one length, 1 or more."
            )
        if not (np.isfinite(over).all() and np.isfinite(under).all() and (under >= 0).all()):
            raise ValueError("Numerators are finite numbers, denominators finite and 0 or more.")
        object.__setattr__(self, "numerators", over)
        object.__setattr__(self, "denominators", under)

    @property
    def value(self) -> float:
        """The ratio of the sums; 0 where the denominators sum to 0."""
        return float(quotient(self.numerators.sum(), self.denominators.sum()))

    def grouped(self, keys: Sequence[Hashable]) -> Ratio:
        """The same ratio with one sample for each different key (all questions of an image are one), in order of
        first appearance."""
        if len(keys) != len(self.numerators):
            raise ValueError(f"{len(keys)} keys for {len(self.numerators)} samples.")
        place = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        index = [place[key] for key in keys]
        columns = [np.bincount(index, weights=column) for column in (self.numerators, self.denominators)]
        return Ratio(*columns)


def quotient(over: ArrayLike, under: ArrayLike) -> NDArray[np.float64]:
    """``over / under``, and 0 where ``under`` is 0."""
    over, under = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)
    return np.divide(over, under, out=np.zeros(np.broadcast_shapes(over.shape, under.shape)), where=under != 0)


def mean_of(values: Iterable[float]) -> Ratio:
    """A mean over samples as a ratio: every denominator is 1."""
    column = np.fromiter(values, dtype=np.float64)
    return Ratio(column, np.ones_like(column))


def grouped(table: Mapping[str, Ratio], keys: Sequence[Hashable]) -> dict[str, Ratio]:
    """``Ratio.grouped`` for a table of ratios."""
    return {name: ratio.grouped(keys) for name, ratio in table.items()}
