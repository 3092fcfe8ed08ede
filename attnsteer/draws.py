"""Random numbers without a state: every draw follows from a seed and from what it is for (step, layer, picture, token).

Methods that drop tokens or toss coins draw here. A row then draws the same alone and in any batch, in either branch of
classifier-free guidance, on every device, and with several model calls in a step; and the step may be a tensor, so that
a compiled graph serves all steps. The mixing function is a 32-bit xor-shift-multiply hash ("lowbias32").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def uniform(*keys: int | Tensor, device: torch.device | None = None) -> Tensor:
    """Numbers in [0, 1), float32, of the common shape of the keys.

    Args:
        keys: ints >= 0 or int tensors that broadcast: the seed first, then what the draw is for.
        device: where the numbers shall be; tensors among the keys must be there.
    """
    state = torch.zeros((), dtype=torch.long, device=device)
    for key in keys:
        state = _mixed(state * 0x01000193 + key + 0x3C6EF372)
    return (state >> 8).float() * 2.0**-24


def normal(*keys: int | Tensor, device: torch.device | None = None) -> Tensor:
    """Numbers of the standard normal distribution, float32, of the common shape of the keys; see ``uniform``.

    Box and Muller's transform of two uniform numbers of 24 bits, so no draw lies beyond 5.8.
    """
    radius = (-2 * (1 - uniform(*keys, 0, device=device)).log()).sqrt()
    return radius * (2 * math.pi * uniform(*keys, 1, device=device)).cos()


def _mixed(x: Tensor) -> Tensor:
    x = x & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


def kept(probability: float, *keys: int | Tensor, device: torch.device | None = None) -> Tensor:
    """Bool: True with the given probability; 0 is never and 1 always."""
    return uniform(*keys, device=device) < probability
