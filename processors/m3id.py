"""M3ID: the longer the answer, the more the picture has to speak for a token.

Favero et al., "Multi-Modal Hallucination Control by Visual Information Grounding", CVPR 2024, arXiv 2403.14003.

    l_m3id = l + (1 - e^{-lambda t}) / e^{-lambda t} (l - l')      l': logits without the image, same tokens
    l_m3id = -inf   where l < log(beta) + max(l)

t counts the generated tokens. A model forgets its picture as its text grows; the weight e^{lambda t} - 1 grows against
that. Paper: lambda = 0.02.

Cost: that of ``ImageContrast``.
Limits: UNCONFIRMED are the cut (taken from VCD), its beta, and whether the first token has t = 1 (here) or 0. The
weight is 1.7 after 50 tokens, 6.4 after 100 and 28,000 after 512.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnsteer.contrast import ImageFree, amplified
from attnsteer.processor import Processor, check_number


@dataclass(frozen=True)
class M3ID(Processor):
    """Contrast with the prediction without the image, more so from token to token.

    Args:
        decay: lambda, 0 to 1 for each token. Paper: 0.02. At 0 the method is off, the cut included.
        beta: least probability of a token, as a fraction of the largest, 0 (no cut) to 1. UNCONFIRMED: 0.1.
    """

    decay: float = 0.02
    beta: float = 0.1

    kinds: ClassVar = ("causal",)
    token_agnostic: ClassVar = True

    def __post_init__(self) -> None:
        check_number(self, "decay", 0, 1)
        check_number(self, "beta", 0, 1)

    @property
    def inert(self) -> bool:
        return self.decay == 0

    def contrast(self) -> ImageFree:
        return ImageFree()

    def combine(self, logits: Tensor, other: Tensor, step: Tensor) -> Tensor:
        return amplified(logits, other, forgetting(self.decay, step + 1).to(logits.dtype)[:, None], self.beta)


def forgetting(decay: float, token: Tensor) -> Tensor:
    """``(1 - e^{-lambda t}) / e^{-lambda t} = e^{lambda t} - 1`` for the t-th token, float64."""
    return (decay * token.double()).expm1()
