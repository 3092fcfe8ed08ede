"""SynGen: an attribute is attended to where its noun is, and neither where the rest of the prompt is.

Paper: "Linguistic Binding in Diffusion Models: Enhancing Attribute Correspondence through Attention Map Alignment",
Rassin, Hirsch, Glickman, Ravfogel, Goldberg, Chechik, NeurIPS 2023, arXiv 2306.08877. Formula from the released code.

Mean attention maps, neither sharpened nor smoothed, each with sum 1; ``dist`` is the symmetric KL divergence, for words
of several tokens the largest over their pieces. Before each of the first 25 steps, for each noun n with a modifier m::

    L += dist(A_n, A_m) - 1/2 (mean over u of dist(A_n, A_u) + mean over u of dist(A_m, A_u))
    z <- z - 20 dL/dz

u are all tokens of the prompt outside this noun's phrase, articles included. The code finds the phrases by a parser of
English; here you name them, noun last. L is not bounded below.

Cost: one conditional forward up to the last layer that is read, and its backward, in each of these steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnsteer.errors import SteeringError
from attnsteer.maps import as_distribution, symmetric_kl
from attnsteer.nursing import Moment, Nursing, Slope, TokenMaps, word_groups
from attnsteer.processor import Processor, check_integer, check_number
from attnsteer.site import Kind


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The largest symmetric KL divergence between pieces of two words."""
    return torch.stack([symmetric_kl(p, q) for p in a for q in b]).max()


def mean_distance(word: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The mean distance of a word to other tokens; 0 where there are none."""
    return torch.stack([distance(word, [u]) for u in others]).mean() if others else word[0].new_zeros(())


@dataclass(frozen=True)
class SynGen(Processor):
    """SynGen (arXiv 2306.08877).

    Args:
        where: layers, heads and steps. Layers "all" means the cross-attention layers of ``level``, or the middle third
            of a transformer with joint attention.
        subjects: phrases with the noun last: ``("red car", ("spotted", "fire truck"))``.
        tokens: instead of words, the positions of each phrase's words, noun last.
        scale_factor: the step, constant; 20.
        max_iter_to_alter: no update from this step on; 25 of 50.
        include_entities: nouns without modifiers are kept from the rest of the prompt too.
        level: see ``AttendAndExcite``.

    Raises:
        SteeringError: no subjects, nothing to bind, or a value outside its range.
    """

    subjects: tuple[str | tuple[str, ...], ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    scale_factor: float = 20.0
    max_iter_to_alter: int = 25
    include_entities: bool = False
    level: int = 2

    kinds: ClassVar[tuple[Kind, ...]] = ("cross", "joint")

    def __post_init__(self) -> None:
        groups = word_groups(self, phrases=True)
        check_number(self, "scale_factor", 0)
        for name in ("max_iter_to_alter", "level"):
            check_integer(self, name)
        if not self.include_entities and all(len(group) == 1 for group in groups):
            raise SteeringError(
                f"SynGen(subjects={self.subjects or self.tokens!r}) has no modifier to bind: give phrases with the "
                "noun last, or include_entities=True."
            )

    @property
    def inert(self) -> bool:
        return self.scale_factor == 0 or self.max_iter_to_alter == 0

    def nursing(self) -> Nursing:
        return Nursing(
            groups=word_groups(self, phrases=True),
            loss=self.loss,
            step_size=lambda at: self.scale_factor,
            stop=self.max_iter_to_alter,
            padding=False,
            level=self.level,
        )

    def loss(self, views: Sequence[TokenMaps], memory: None, moment: Moment) -> Slope:
        """The loss of one picture: the mean over text encoders."""
        return Slope(torch.stack([self._of(view) for view in views]).mean())

    def _of(self, view: TokenMaps) -> Tensor:
        maps = [as_distribution(x) for x in view.maps]
        everything = {*view.other_words(), *(i for group in view.groups for word in group for i in word)}
        terms = []
        for group in view.groups:
            others = [maps[i] for i in sorted(everything - {i for word in group for i in word})]
            *modifiers, noun = [[maps[i] for i in word] for word in group]
            if not modifiers and self.include_entities:
                terms.append(-mean_distance(noun, others))
            for modifier in modifiers:
                apart = mean_distance(noun, others) + mean_distance(modifier, others)
                terms.append(distance(noun, modifier) - 0.5 * apart)
        return torch.stack(terms).sum() if terms else maps[0].new_zeros(())
