"""FOCUS: disentangled subjects in joint attention (SD3, FLUX), by a divergence between the maps of their tokens.

Paper: Bill, Simsar, Hofmann, 2025, arXiv 2510.02315. Formula and defaults from the released code, with the sign of the
FLUX pipeline corrected.

``Q_j`` is the mean attention of the image to text token j, over joint keys, heads and layers; smoothed by a 3 x 3
Gaussian of std 1, cubed, with sum 1. With ``JSD(Q) = mean over j of KL(Q_j || mean Q) / ln(number of maps)``::

    L = 1/2 (mean over subjects with several tokens of JSD(its tokens)  +  1 - JSD(mean maps of the subjects))

The tokens of a subject are those of every text encoder that the model joins with the image. Control::

    "velocity"   v <- v + lambda c dL/dx      c = 2 (1 - tau + .001) / (tau + .001) (1 - tau),  tau = 1 - t / 1000
    "latent"     x <- x - size dL/dx          before the prediction

The scheduler's step has a negative factor on v, so that plus lowers the loss. The factor c is 2000 at the first step
and 1 in the middle: nearly all control happens at the beginning. Small models have larger gradients, so that the
paper's lambda can overshoot: on the embedded world-sd3 (20 steps) 1 raises the loss of the next step, .1 does not.

Fused: a text column is the attention with a one-hot value, ``P[:, T] = SDPA(Q_image, K, onehot)``; its gradient is
that of the fused kernel. No map of joint attention is made. Cost: one conditional forward up to the last layer that is
read, and its backward, in each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attnsteer.errors import SteeringError
from attnsteer.maps import smooth, spread
from attnsteer.nursing import Moment, Nursing, Slope, TokenMaps, word_groups
from attnsteer.processor import Processor, check_choice, check_number
from attnsteer.site import Kind


def focus_loss(subjects: Sequence[Tensor]) -> Tensor:
    """L of the maps ``(n, h, w)`` of each subject's tokens, in [0, 1]."""
    within = [spread(maps) for maps in subjects if maps.shape[0] > 1]
    between = 1 - spread(torch.stack([maps.mean(dim=0) for maps in subjects]))
    return 0.5 * (torch.stack(within).mean() + between if within else between)


@dataclass(frozen=True)
class Focus(Processor):
    """FOCUS (arXiv 2510.02315).

    Args:
        where: layers, heads and steps. Layers "all" means the middle third of the layers with joint attention; the
            paper reads all blocks of SD3.5, ``Where(layers="transformer_blocks.*")`` for FLUX.1. Paper: all steps.
        subjects: the words of each subject, e.g. ``("black cat", "brown dog")``; at least two subjects.
        tokens: instead of words, the positions of each subject's tokens among the text keys.
        scale: lambda of the control of the velocity, 1 to 5 in the paper; with ``control="latent"`` the step size.
        control: see above.

    Raises:
        SteeringError: fewer than two subjects, or a value outside its range.
    """

    subjects: tuple[str | tuple[str, ...], ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    scale: float = 1.0
    control: Literal["velocity", "latent"] = "velocity"

    kinds: ClassVar[tuple[Kind, ...]] = ("joint",)

    def __post_init__(self) -> None:
        groups = word_groups(self, phrases=True)
        check_number(self, "scale", 0)
        check_choice(self, "control", ("velocity", "latent"))
        if len(groups) < 2:
            raise SteeringError(f"Focus tells subjects apart: give at least two, not {len(groups)}.")

    @property
    def inert(self) -> bool:
        return self.scale == 0

    def nursing(self) -> Nursing:
        return Nursing(
            groups=word_groups(self, phrases=True),
            loss=self.loss,
            step_size=lambda at: self.scale,
            padding=False,
            level=0,
            velocity=self.gain if self.control == "velocity" else None,
        )

    def gain(self, at: Moment) -> float:
        """``lambda c`` at a timestep t of 0 to 1000."""
        tau = 1 - at.timestep / 1000
        return self.scale * 2 * (1 - tau + 1e-3) / (tau + 1e-3) * (1 - tau)

    def loss(self, views: Sequence[TokenMaps], memory: None, moment: Moment) -> Slope:
        """The loss of one picture."""
        smoothed = [smooth(view.maps, std=1.0) for view in views]
        tokens = [[[i for word in group for i in word] for group in view.groups] for view in views]
        subjects = [
            torch.cat([maps[own[g]] for maps, own in zip(smoothed, tokens, strict=True)]) for g in range(len(tokens[0]))
        ]
        return Slope(focus_loss(subjects))
