"""Divide & Bind: every subject gets places of high contrast, and its attribute the same places.

Paper: "Divide & Bind Your Attention for Improved Generative Semantic Nursing", Li, Keuper, Zhang, Khoreva, BMVC 2023,
arXiv 2307.10864. Formula and defaults from the released code, except where ``compat`` says so.

Maps as in Attend-and-Excite: ``N = smooth(softmax over tokens(100 M))``. Before each of the first 25 steps::

    TV_s  = mean |horizontal differences of N_s| + mean |vertical differences|
    JSD_s = Jensen-Shannon divergence of the subject's and its attribute's map      (binding)
    L     = max over subjects s of -(TV_s - c JSD_s)          c = 1, 5, 10 in steps 0-9, 10-19, 20 and later
    z    <- z - a_i dL/dz                                      a_i = 20 sqrt(linspace(1, .5, steps)[i])

For the divergence the attribute's map is scaled to the peak of the subject's, both go through a softmax over the
pixels, lose ``q`` times the subject's peak, and are cut at 0 and lifted by 1e-5; ``q`` is .3 where TV_s < .1, else .2.
In a UNet the attribute's map comes from all finer levels (32 x 32 and 64 x 64 for SD 1.x at 512 pixels).

At steps 0, 10 and 20 the update is repeated until the smallest TV_s is at least .05, .2 and .3, at most 100 times at
step 0 and 50 times later.

The released code compares every row of a map with the last one instead of the row above; the default here is the
formula, ``compat="code"`` the code. Paper and code differ in the weight of the divergence (the paper has one lambda).

Cost: a conditional forward and its backward for each update; binding reads the finest level, which is at a UNet's end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attnsteer.maps import column_softmax, jensen_shannon, smooth, total_variation
from attnsteer.nursing import (
    LevelMaps,
    Moment,
    Nursing,
    Slope,
    TokenMaps,
    mean_map,
    root_decay,
    subject_entries,
    weighted_mean,
    word_groups,
)
from attnsteer.processor import (
    Processor,
    check_choice,
    check_integer,
    check_integers,
    check_number,
    check_numbers,
    check_thresholds,
)
from attnsteer.site import Kind


def binding_divergence(subject: Tensor, attribute: Tensor, variation: Tensor) -> Tensor:
    """``JSD_s`` of two maps ``(h, w)``; ``variation`` is the subject's TV."""
    attribute = attribute * (subject.max() / attribute.max())
    p, q = (torch.softmax(x.flatten(), dim=0) for x in (subject, attribute))
    floor = p.max() * torch.where(variation < 0.1, 0.3, 0.2)
    return jensen_shannon((p - floor).relu() + 1e-5, (q - floor).relu() + 1e-5)


def coarse_maps(view: TokenMaps) -> Tensor:
    """The maps of the smallest size that was read."""
    return min((level.mean for level in view.levels.values()), key=lambda maps: maps.shape[1] * maps.shape[2])


def fine_maps(view: TokenMaps) -> Tensor:
    """The mean of all larger maps, every n-th pixel of them; the smallest ones where there are no others."""
    coarse = coarse_maps(view)
    size = coarse.shape[1:]
    finer = [
        LevelMaps(F.interpolate(level.mean[None], size=size, mode="nearest")[0], level.count)
        for level in view.levels.values()
        if level.mean.shape[1:] != size
    ]
    return weighted_mean(finer) if finer else coarse


@dataclass(frozen=True)
class DivideAndBind(Processor):
    """Divide & Bind (arXiv 2307.10864).

    Args:
        where: layers, heads and steps. Layers "all" means the cross-attention layers of ``level`` (with binding also
            all finer ones), or the middle third of a transformer with joint attention.
        subjects: the subjects with their attributes, noun last: ``("red cat", ("blue", "fire truck"))``.
        tokens: instead of words, the positions of each subject's words, noun last.
        binding: also bind attributes; without it, or without attributes, only TV counts.
        bind_weights: the weight c in steps 0-9, 10-19 and from 20 on; paper: one lambda, unconfirmed.
        scale_factor, scale_range: the step is ``scale_factor * sqrt(linspace(*scale_range, steps)[i])``.
        max_iter_to_alter: no update from this step on; 25 of 50.
        thresholds: step -> the TV that the weakest subject must reach by repeated updates.
        max_refinement_steps: most repetitions at step 0 and later.
        compat: "paper" or "code", see above.
        padding, level: see ``AttendAndExcite``.

    Raises:
        SteeringError: no subjects, or a value outside its range.
    """

    subjects: tuple[str | tuple[str, ...], ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    binding: bool = True
    bind_weights: tuple[float, float, float] = (1.0, 5.0, 10.0)
    scale_factor: float = 20.0
    scale_range: tuple[float, float] = (1.0, 0.5)
    max_iter_to_alter: int = 25
    thresholds: Mapping[int, float] = field(default_factory=lambda: {0: 0.05, 10: 0.2, 20: 0.3})
    max_refinement_steps: tuple[int, int] = (100, 50)
    compat: Literal["paper", "code"] = "paper"
    padding: bool = True
    level: int = 2

    kinds: ClassVar[tuple[Kind, ...]] = ("cross", "joint")

    def __post_init__(self) -> None:
        word_groups(self, phrases=True)
        check_number(self, "scale_factor", 0)
        check_numbers(self, "scale_range", 2, 0)
        check_numbers(self, "bind_weights", 3)
        check_thresholds(self, "thresholds")
        check_integers(self, "max_refinement_steps", 2)
        for name in ("max_iter_to_alter", "level"):
            check_integer(self, name)
        check_choice(self, "compat", ("paper", "code"))

    @property
    def inert(self) -> bool:
        return self.scale_factor == 0 or (self.max_iter_to_alter == 0 and not self.thresholds)

    def nursing(self) -> Nursing:
        first, later = self.max_refinement_steps
        groups = word_groups(self, phrases=True)
        return Nursing(
            groups=groups,
            loss=self.loss,
            step_size=root_decay(self.scale_factor, self.scale_range),
            stop=self.max_iter_to_alter,
            refine=self.thresholds,
            rounds=lambda index: later if index else first,
            padding=self.padding,
            level=self.level,
            finer=self.binding and any(len(group) > 1 for group in groups),
        )

    def loss(self, views: Sequence[TokenMaps], memory: None, moment: Moment) -> Slope:
        """The loss of one picture."""

        def prepare(maps: Tensor) -> Tensor:
            return smooth(column_softmax(maps))

        subjects = subject_entries(views, prepare, coarse_maps)
        attributes = subject_entries(views, prepare, fine_maps) if self.binding else subjects
        weight = self.bind_weights[min(moment.index // 10, 2)]
        values, variations = [], []
        for group, finer in zip(subjects, attributes, strict=True):
            subject = mean_map(group[-1])
            variation = value = total_variation(subject, self.compat)
            bound = [binding_divergence(subject, mean_map(a), variation.detach()) for a in finer[:-1]]
            if self.binding and bound:
                value = variation - weight * torch.stack(bound).mean()
            values.append(value)
            variations.append(variation.detach())
        return Slope(-torch.stack(values).min(), presence=torch.stack(variations).min())
