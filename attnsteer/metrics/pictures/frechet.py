"""FID and KID: how far the features of two sets of pictures are apart. What network made them the caller says.

Distances of different networks, resize filters, file formats or numbers of pictures do not compare. FID is biased, the
more so the fewer pictures, and strongly with fewer than the width of the features; KID is not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def fid(ours: ArrayLike, theirs: ArrayLike) -> float:
    """``|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))`` (Heusel et al., 2017, arXiv:1706.08500); 0 for equal features.

    The trace of the root is the sum of the roots of the eigenvalues of ``S1 S2``, whose rounding below 0 counts as 0.

    Args:
        ours, theirs: ``(n, width)`` and ``(m, width)``; covariances are divided by ``n - 1``.

    Raises:
        ValueError: different widths, or fewer than two rows.
    """
    a, b = _features(ours, theirs)
    first, second = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    roots = np.sqrt(np.clip(np.linalg.eigvals(first @ second).real, 0, None)).sum()
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(apart + np.trace(first) + np.trace(second) - 2 * roots)


def kid(ours: ArrayLike, theirs: ArrayLike) -> float:
    """The unbiased squared maximum mean discrepancy with the kernel ``(<x, y> / width + 1)^3`` (Bińkowski et al., 2018,
    arXiv:1801.01401); about 0 for sets of one distribution, and then of either sign.

    The whole sets are used, not averages over subsets. The kernel's constants are the usual ones; they were not checked
    against the authors' code.

    Raises:
        ValueError: as for ``fid``.
    """
    a, b = _features(ours, theirs)

    def kernel(x: Floats, y: Floats) -> Floats:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Floats) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def _features(ours: ArrayLike, theirs: ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"Features of shape {a.shape} and {b.shape}: wanted are (n, width), 2 or more of one width.")
    return a, b
