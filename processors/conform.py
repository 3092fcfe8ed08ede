"""CONFORM: the maps of a subject and its attributes attract each other, those of different subjects repel.

Paper: "CONFORM: Contrast is All You Need For High-Fidelity Text-to-Image Diffusion Models", Meral, Simsar, Tombari,
Yanardag, CVPR 2024, arXiv 2312.06059. Formula and defaults from the released code and notebook (MIT).

Each token of a group is a vector: its mean attention map, smoothed and flattened; the same maps of the step before
(constant) join with the same labels. With cosine similarity s, before each of the first 30 steps::

    L = mean over ordered pairs (a, p) of one group of
            -ln( e^{s_ap/tau} / (e^{s_ap/tau} + sum over n of other groups e^{s_an/tau}) )          tau = .5
    z <- z - a_i dL/dz                                      a_i = 20 sqrt(linspace(1, .5, steps)[i])

At steps 0, 10 and 20 the update is repeated 20 times without a condition. In step 0 there is no map of a step before:
groups of one token then have no pair and nothing happens.

Cost: one conditional forward up to the last layer that is read, and its backward, for each update. The memory of the
step before is kept for each picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnsteer.maps import column_softmax, nt_xent, smooth
from attnsteer.nursing import Moment, Nursing, Slope, TokenMaps, root_decay, subject_entries, word_groups
from attnsteer.processor import Processor, check_integer, check_integers, check_number, check_numbers
from attnsteer.site import Kind


@dataclass(frozen=True)
class Conform(Processor):
    """CONFORM (arXiv 2312.06059).

    Args:
        where: layers, heads and steps. Layers "all" means the cross-attention layers of ``level``, or the middle third
            of a transformer with joint attention.
        subjects: the subjects with their attributes: ``("red car", "blue dog")``.
        tokens: instead of words, the positions of each subject's tokens: ``((2, 3), (6, 7))``.
        temperature: tau > 0; .5 (a helper of the code has .07).
        scale_factor, scale_range: the step is ``scale_factor * sqrt(linspace(*scale_range, steps)[i])``.
        max_iter_to_alter: no update from this step on; 30 of 50 in the notebook, 25 in the pipeline.
        refine_steps: the steps whose update is repeated.
        max_refinement_steps: how often; 20.
        softmax: sharpen the maps by a softmax over the tokens (the notebook does not).
        padding, level: see ``AttendAndExcite``.

    Raises:
        SteeringError: no subjects, or a value outside its range.
    """

    subjects: tuple[str | tuple[str, ...], ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    temperature: float = 0.5
    scale_factor: float = 20.0
    scale_range: tuple[float, float] = (1.0, 0.5)
    max_iter_to_alter: int = 30
    refine_steps: tuple[int, ...] = (0, 10, 20)
    max_refinement_steps: int = 20
    softmax: bool = False
    padding: bool = True
    level: int = 2

    kinds: ClassVar[tuple[Kind, ...]] = ("cross", "joint")

    def __post_init__(self) -> None:
        word_groups(self, phrases=True)
        check_number(self, "temperature", 0.01)
        check_number(self, "scale_factor", 0)
        check_numbers(self, "scale_range", 2, 0)
        check_integers(self, "refine_steps")
        for name in ("max_iter_to_alter", "max_refinement_steps", "level"):
            check_integer(self, name)

    @property
    def inert(self) -> bool:
        return self.scale_factor == 0 or (self.max_iter_to_alter == 0 and not self.refine_steps)

    def nursing(self) -> Nursing:
        return Nursing(
            groups=word_groups(self, phrases=True),
            loss=self.loss,
            step_size=root_decay(self.scale_factor, self.scale_range),
            stop=self.max_iter_to_alter,
            refine=dict.fromkeys(self.refine_steps, 0.0),
            rounds=lambda index: self.max_refinement_steps,
            padding=self.padding,
            level=self.level,
        )

    def prepare(self, maps: Tensor) -> Tensor:
        return smooth(column_softmax(maps) if self.softmax else maps)

    def loss(self, views: Sequence[TokenMaps], memory: Tensor | None, moment: Moment) -> Slope:
        """The loss of one picture; remembers its vectors for the next step."""
        entries = subject_entries(views, self.prepare, apart=not self.softmax)
        labels = [g for g, group in enumerate(entries) for word in group for _ in word]
        now = torch.stack([x.flatten() for group in entries for word in group for x in word])
        vectors = now if memory is None else torch.cat([now, memory])
        labels = labels if memory is None else labels * 2
        return Slope(nt_xent(vectors, labels, self.temperature), memory=now.detach())
