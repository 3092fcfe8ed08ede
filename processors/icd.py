"""ICD: prefer what the model would not have said after a disturbing instruction.

Wang et al., "Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding", Findings
of ACL 2024, arXiv 2403.18715.

    l'    = logits of the same picture and prompt with a disturbing instruction in front, followed by the same tokens
    l_icd = (1 + alpha) l - alpha l'
    l_icd = -inf   where l < log(beta) + max(l)

An instruction that confuses the model brings out what it makes up; that is subtracted. Paper: alpha = 1, beta = 0.1.

Cost: a second forward pass of the longer prompt with a cache of its own for every token, and a second prefill.
Limits: the wordings here are ours, in the manner of the paper (UNCONFIRMED); ``disturbance`` takes any sentence. For
LLaVA the paper puts it in place of the system message, for which the Hugging Face template has none: it goes behind the
start token. Rows without a picture are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnsteer.contrast import Instructed, amplified
from attnsteer.errors import SteeringError
from attnsteer.processor import Processor, check_choice, check_number

DISTURBANCES = {
    "objects": "You are a confused detector of objects. ",
    "attributes": "You mix up the colours and shapes of things. ",
    "relations": "You mix up where things are and what they do. ",
    "blind": "You cannot see the picture and guess what is in it. ",
}


@dataclass(frozen=True)
class ICD(Processor):
    """Contrast with the prediction after a disturbing instruction. Needs ``steer(..., processor=)``.

    Args:
        alpha: strength, 0 to 100. Paper: 1. At 0 the method is off, the cut included.
        beta: least probability of a token, as a fraction of the largest, 0 (no cut) to 1. Paper: 0.1.
        disturbance: ``"objects"``, ``"attributes"``, ``"relations"``, ``"blind"``, or a sentence of your own (with the
            space or line break that shall follow it).
        place: ``"start"`` writes it behind the start token, ``"question"`` behind the last image.
    """

    alpha: float = 1.0
    beta: float = 0.1
    disturbance: str = "objects"
    place: str = "start"

    kinds: ClassVar = ("causal",)
    token_agnostic: ClassVar = True

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0, 100)
        check_number(self, "beta", 0, 1)
        check_choice(self, "place", ("start", "question"))
        if self.disturbance not in DISTURBANCES and len(str(self.disturbance).split()) < 2:
            raise SteeringError(
                f"ICD(disturbance={self.disturbance!r}) is not known: allowed are {', '.join(map(repr, DISTURBANCES))} "
                "or a sentence."
            )

    @property
    def inert(self) -> bool:
        return self.alpha == 0

    def contrast(self) -> Instructed:
        return Instructed(DISTURBANCES.get(self.disturbance, self.disturbance), self.place)

    def combine(self, logits: Tensor, other: Tensor, step: Tensor) -> Tensor:
        return amplified(logits, other, self.alpha, self.beta)
