"""VCD: prefer what the model says because of the picture, not in spite of its noise.

Leng et al., "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding",
CVPR 2024, arXiv 2311.16922.

Every token is predicted twice, from the picture and from a noised copy of it, both followed by the same tokens:

    x'    = sqrt(abar_t) x + sqrt(1 - abar_t) eps       x: preprocessed pixels, eps ~ N(0, 1), drawn once
    abar_t = prod_{k <= t} (1 - beta_k)                 beta_k = 1e-5 + (0.005 - 1e-5) sigmoid(-6 + 12 k / 999)
    l_vcd = (1 + alpha) l - alpha l'                    l, l': next-token logits with x and with x'
    l_vcd = -inf   where l < log(beta) + max(l)         tokens that the model itself finds implausible

and ``l_vcd`` goes on to whatever ``generate`` does with logits. Paper: alpha = 1, beta = 0.1, t = 500, and sampling
from the result at temperature 1 (``do_sample=True``); the language model's attention is not touched.

Cost: a second forward pass with a cache of its own for every token, and a second prefill.
Limits: pictures (and tiles) of a batch get the same noise. Rows without a picture are left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnsteer.contrast import Noised, amplified
from attnsteer.processor import Processor, check_integer, check_number

STEPS = 1000


@dataclass(frozen=True)
class VCD(Processor):
    """Contrast with the prediction from a noised picture.

    Args:
        alpha: strength, 0 to 100. Paper: 1. At 0 the method is off, the cut included.
        beta: least probability of a token, as a fraction of the largest, 0 (no cut) to 1. Paper: 0.1 (0.2 for POPE).
        noise_step: t, how much noise, 0 to 999. The authors' script: 500.
        seed: of the noise, 0 or more.
    """

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    seed: int = 0

    kinds: ClassVar = ("causal",)
    token_agnostic: ClassVar = True

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0, 100)
        check_number(self, "beta", 0, 1)
        check_integer(self, "noise_step", 0, STEPS - 1)
        check_integer(self, "seed", 0)

    @property
    def inert(self) -> bool:
        return self.alpha == 0

    def contrast(self) -> Noised:
        signal, noise = diffusion_levels(self.noise_step)
        return Noised(signal, noise, self.seed)

    def combine(self, logits: Tensor, other: Tensor, step: Tensor) -> Tensor:
        return amplified(logits, other, self.alpha, self.beta)


def diffusion_levels(step: int) -> tuple[float, float]:
    """``(sqrt(abar_t), sqrt(1 - abar_t))`` of the sigmoid schedule: how much picture and how much noise."""
    k = torch.arange(step + 1, dtype=torch.float64)
    beta = 1e-5 + (0.005 - 1e-5) * torch.sigmoid(-6 + 12 * k / (STEPS - 1))
    kept = float((1 - beta).prod())
    return math.sqrt(kept), math.sqrt(1 - kept)
