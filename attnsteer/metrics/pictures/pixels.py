"""Distances between two pictures of one size, without a model. Pictures are PIL pictures, compared as 8-bit RGB."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]


def rms(one: Image.Image, other: Image.Image) -> float:
    """The root of the mean squared difference of all values in 0..1: 0 for equal pictures, at most 1."""
    return math.sqrt(_squared(one, other))


def psnr(one: Image.Image, other: Image.Image) -> float:
    """``10 log10(1 / MSE)`` in decibels, values in 0..1; infinite for equal pictures."""
    error = _squared(one, other)
    return -10 * math.log10(error) if error else math.inf


def ssim(one: Image.Image, other: Image.Image, sigma: float = 1.5, radius: int = 5) -> float:
    """Structural similarity (Wang et al., 2004), the mean over colours and over places whose window lies inside: 1 for
    equal pictures.

        (2 m1 m2 + c1)(2 s12 + c2) / ((m1^2 + m2^2 + c1)(s1^2 + s2^2 + c2)),   c1 = 0.01^2, c2 = 0.03^2

    Args:
        sigma, radius: of the Gaussian window for means, variances and covariance; the paper's 11 x 11 by default.

    Raises:
        ValueError: pictures of different sizes, or smaller than the window.
    """
    a, b = _values(one, other)
    if min(a.shape[:2]) < 2 * radius + 1:
        raise ValueError(f"SSIM needs {2 * radius + 1} pixels on each side; the pictures have {a.shape[:2]}.")
    window = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    window /= window.sum()
    m1, m2, aa, bb, ab = (_blurred(given, window) for given in (a, b, a * a, b * b, a * b))
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * m1 * m2 + c1) * (2 * (ab - m1 * m2) + c2)
    return float((alike / ((m1**2 + m2**2 + c1) * (aa - m1**2 + bb - m2**2 + c2))).mean())


def _blurred(given: Floats, window: Floats) -> Floats:
    """A separable window over height and width, ``(h, w, 3)`` -> ``(h - 2 radius, w - 2 radius, 3)``."""
    for axis in (0, 1):
        given = np.lib.stride_tricks.sliding_window_view(given, len(window), axis) @ window
    return given


def _squared(one: Image.Image, other: Image.Image) -> float:
    a, b = _values(one, other)
    return float(((a - b) ** 2).mean())


def _values(one: Image.Image, other: Image.Image) -> tuple[Floats, Floats]:
    if one.size != other.size:
        raise ValueError(f"Pictures of {one.size} and {other.size} pixels cannot be compared pixel by pixel.")
    first, second = (np.asarray(picture.convert("RGB"), dtype=np.float64) / 255 for picture in (one, other))
    return first, second
