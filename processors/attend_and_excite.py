"""Attend-and-Excite: every subject of the prompt shall have a place where it is attended to.

Paper: "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models", Chefer, Alaluf,
Vinker, Wolf, Cohen-Or, SIGGRAPH 2023, arXiv 2301.13826. Formula and defaults from the released code (MIT).

``M`` is the mean attention map of each token, read from the conditional branch. Before each of the first 25 steps::

    N = softmax over tokens(100 M), then a 3 x 3 Gaussian
    L = max over subjects s of max(0, 1 - max over pixels N_s)              the most neglected subject
    z <- z - a_i dL/dz          a_i = 20 sqrt(linspace(1, .5, steps)[i])

At steps 0, 10 and 20 the update is repeated, at most 20 times, until the weakest subject's peak is at least .05, .5
and .8. As published, the loop looks at the value before each repetition, so it makes one more than it needs.

Several tokens of one word count as entries of their own where there is one text encoder; SD3's two encoders see other
tokens, so there a subject's map is the mean over both.

Cost: one conditional forward up to the last layer that is read, and its backward, for each update. diffusers' pipeline
of this name differs in what it reshapes wrongly (pictures that are not square). SD 1.x's usual scheduler, PNDM, drops
the update of its second step (``attnsteer.nursing``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnsteer.maps import column_softmax, smooth
from attnsteer.nursing import Moment, Nursing, Slope, TokenMaps, root_decay, subject_entries, word_groups
from attnsteer.processor import Processor, check_integer, check_number, check_numbers, check_thresholds
from attnsteer.site import Kind


def excitation(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss ``max_s max(0, 1 - max N_s)`` and the smallest peak."""
    peaks = torch.stack([x.max() for x in maps])
    weakest = peaks.min()
    return (1 - peaks[peaks.argmin()]).clamp_min(0), weakest.detach()


@dataclass(frozen=True)
class AttendAndExcite(Processor):
    """Attend-and-Excite (arXiv 2301.13826).

    Args:
        where: layers, heads and steps. Layers "all" means the cross-attention layers of ``level``, or the middle third
            of a transformer with joint attention.
        subjects: the words of the prompt that each name a subject, e.g. ``("dog", "car")``.
        tokens: instead of words, the positions of each subject's tokens among the text keys.
        scale_factor, scale_range: the step is ``scale_factor * sqrt(linspace(*scale_range, steps)[i])``; 20, 1 to .5.
        max_iter_to_alter: no update from this step on; 25 of 50. It counts steps: the first half of any schedule, also
            of the shorter ones of SD3 and FLUX, is ``Where(steps=(0.0, 0.5))``.
        thresholds: step -> the peak that the weakest subject must reach by repeated updates.
        max_refinement_steps: most repetitions; 20.
        padding: the end and the padding of the prompt take part in the softmax: True for SD 1.x; give False for SD 2.x,
            as the authors do. Nothing tells the two apart for you.
        level: how often the latent is halved where maps are read; 2 is 16 x 16 for SD 1.x at 512 pixels.

    Raises:
        SteeringError: no subjects, or a value outside its range.
    """

    subjects: tuple[str, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    scale_factor: float = 20.0
    scale_range: tuple[float, float] = (1.0, 0.5)
    max_iter_to_alter: int = 25
    thresholds: Mapping[int, float] = field(default_factory=lambda: {0: 0.05, 10: 0.5, 20: 0.8})
    max_refinement_steps: int = 20
    padding: bool = True
    level: int = 2

    kinds: ClassVar[tuple[Kind, ...]] = ("cross", "joint")

    def __post_init__(self) -> None:
        word_groups(self)
        check_number(self, "scale_factor", 0)
        check_numbers(self, "scale_range", 2, 0)
        check_thresholds(self, "thresholds")
        for name in ("max_iter_to_alter", "max_refinement_steps", "level"):
            check_integer(self, name)

    @property
    def inert(self) -> bool:
        return self.scale_factor == 0 or (self.max_iter_to_alter == 0 and not self.thresholds)

    def nursing(self) -> Nursing:
        return Nursing(
            groups=word_groups(self),
            loss=self.loss,
            step_size=root_decay(self.scale_factor, self.scale_range),
            stop=self.max_iter_to_alter,
            refine=self.thresholds,
            rounds=lambda index: self.max_refinement_steps,
            padding=self.padding,
            level=self.level,
        )

    def loss(self, views: Sequence[TokenMaps], memory: None, moment: Moment) -> Slope:
        """The loss of one picture."""
        entries = subject_entries(views, lambda maps: smooth(column_softmax(maps)))
        loss, weakest = excitation([x for group in entries for word in group for x in word])
        return Slope(loss, presence=weakest)
