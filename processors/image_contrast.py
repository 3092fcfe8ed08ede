"""Image contrast: prefer what the model would not have said without the picture. The second half of PAI.

Liu, Zheng, Chen, "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs", ECCV
2024, arXiv 2407.21771; PAINT (arXiv 2501.12206) uses it unchanged.

    s_c = log_softmax(l)        l:  next-token logits of the prompt, attention steered as other processors say
    s_u = log_softmax(l')       l': of the same prompt with the image tokens deleted, followed by the same tokens; no
                                    attention is steered there
    s   = s_u + gamma (s_c - s_u)
    s   = -inf   where s_c < log(cutoff) + max(s_c)

``s`` replaces the logits. Paper: gamma = 1.1, cutoff = 0.1; recommended with nucleus sampling. Attached beside a method
that steers attention towards the image it completes PAI, as published.

Cost: a second forward pass of the shorter prompt with a cache of its own for every token, and a second prefill.
Limits: rows without a picture are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnsteer.contrast import ImageFree, extrapolated
from attnsteer.processor import Processor, check_number


@dataclass(frozen=True)
class ImageContrast(Processor):
    """Contrast with the prediction without the image.

    Args:
        gamma: 1 to 100. Paper: 1.1 (2 in the authors' command line). At 1 the method is off, the cut included.
        cutoff: least probability of a token, as a fraction of the largest, 0 (no cut) to 1. Paper: 0.1.
    """

    gamma: float = 1.1
    cutoff: float = 0.1

    kinds: ClassVar = ("causal",)
    token_agnostic: ClassVar = True

    def __post_init__(self) -> None:
        check_number(self, "gamma", 1, 100)
        check_number(self, "cutoff", 0, 1)

    @property
    def inert(self) -> bool:
        return self.gamma == 1

    def contrast(self) -> ImageFree:
        return ImageFree()

    def combine(self, logits: Tensor, other: Tensor, step: Tensor) -> Tensor:
        return extrapolated(logits, other, self.gamma, self.cutoff)
