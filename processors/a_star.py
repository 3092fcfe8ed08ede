"""A-STAR: test-time attention segregation and retention, for prompts with several subjects.

Paper: "A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis", Agarwal, Karanam, Joseph,
Saxena, Goswami, Srinivasan, ICCV 2023, arXiv 2306.14544. No code was released.

Before every step the latent goes one step down the slope of a loss on the subjects' attention maps ``A_m``::

    L_seg = sum over pairs  sum min(A_m, A_n) / sum (A_m + A_n)              subjects overlap: 1/2 where equal, 0 apart
    L_ret = sum over m  1 - sum min(A_m, B_m) / sum (A_m + B_m)              a subject left its mask of the last step
    z <- z - a_i d(L_seg + L_ret)/dz

``B_m`` is where the subject was in the step before, binary and constant; the first step has none. ``layout`` puts
masks of yours in its place in all steps (section 5 of the paper).

Not in the paper, hence parameters: the step ``a_i`` (default: that of Attend-and-Excite, ``20 sqrt(linspace(1, .5))``),
the rule for B (default: Otsu's threshold and the connected part that holds the peak; ``mask="relative"``: half of the
peak), softmax and smoothing of the maps (default: as Attend-and-Excite; without the softmax B is "relative").

Cost: one conditional forward up to the last layer that is read, and its backward, in every step. Only the text columns
of those layers are made, never a map of other layers. Limits: segregation cannot make a missing subject appear, and a
flat map has no mask to retain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attnsteer.errors import SteeringError
from attnsteer.maps import column_softmax, component, otsu, overlap, smooth
from attnsteer.nursing import Moment, Nursing, Slope, TokenMaps, mean_map, root_decay, subject_entries, word_groups
from attnsteer.processor import Processor, check_choice, check_integer, check_number, check_numbers
from attnsteer.site import Kind


def segregation(maps: Sequence[Tensor]) -> Tensor:
    """``L_seg``: the overlaps of all pairs, summed; 0 for a single map."""
    pairs = [overlap(a, b) for i, a in enumerate(maps) for b in maps[:i]]
    return torch.stack(pairs).sum() if pairs else maps[0].new_zeros(())


def retention(maps: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """``L_ret``: how far each map is from its mask; a term is 1 where nothing is there."""
    return torch.stack([1 - overlap(a, b.to(a.dtype)) for a, b in zip(maps, masks, strict=True)]).sum()


def peak_mask(x: Tensor, rule: str) -> Tensor:
    """Where a subject is, bool ``(h, w)``: half of the peak ("relative"), or Otsu's class around the peak ("otsu").

    Empty where the map is flat."""
    x = x.detach()
    if rule == "relative":
        return (x >= 0.5 * x.max()) & (x.max() > x.min())
    return component(otsu(x), int(x.argmax()))


@dataclass(frozen=True)
class AStar(Processor):
    """A-STAR (arXiv 2306.14544).

    Args:
        where: layers, heads and steps. Layers "all" means the cross-attention layers of ``level``, or the middle third
            of a transformer with joint attention. Paper: all steps.
        subjects: the words of the prompt that each name a subject, e.g. ``("dog", "red chair")``.
        tokens: instead of words, the positions of each subject's tokens among the text keys.
        seg_weight, ret_weight: weights of the two losses; paper 1 and 1, 0 leaves one away.
        scale_factor, scale_range: the step is ``scale_factor * sqrt(linspace(*scale_range, steps)[i])``; unconfirmed.
        mask: "otsu" or "relative", see above; unconfirmed. "auto" is "otsu" with the softmax, else "relative".
        layout: ``(subjects, height, width)`` masks in place of those of the step before, resized to the maps.
        softmax: sharpen the maps by a softmax over the tokens, 100 times the probability; unconfirmed.
        smoothing: smooth them by a 3 x 3 kernel; unconfirmed.
        padding, level: see ``AttendAndExcite``.

    Raises:
        SteeringError: no subjects, or a value outside its range.
    """

    subjects: tuple[str, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    seg_weight: float = 1.0
    ret_weight: float = 1.0
    scale_factor: float = 20.0
    scale_range: tuple[float, float] = (1.0, 0.5)
    mask: Literal["auto", "otsu", "relative"] = "auto"
    layout: Tensor | None = field(default=None, compare=False)
    softmax: bool = True
    smoothing: bool = True
    padding: bool = True
    level: int = 2

    kinds: ClassVar[tuple[Kind, ...]] = ("cross", "joint")

    def __post_init__(self) -> None:
        groups = word_groups(self)
        several = next((group for group in groups if len(group) > 1), None)
        if several:
            raise SteeringError(
                f"AStar has one map for each subject, and {several!r} are {len(several)} words: name the noun, or the "
                f"phrase as one string ({' '.join(map(str, several))!r}), whose tokens are averaged."
            )
        for name in ("seg_weight", "ret_weight", "scale_factor"):
            check_number(self, name, 0)
        check_numbers(self, "scale_range", 2, 0)
        check_integer(self, "level")
        check_choice(self, "mask", ("auto", "otsu", "relative"))
        if self.layout is not None and (self.layout.dim() != 3 or self.layout.shape[0] != len(groups)):
            raise SteeringError(
                f"AStar(layout=...) has the shape {tuple(self.layout.shape)}; wanted is a mask for each of the "
                f"{len(groups)} subjects: ({len(groups)}, height, width)."
            )

    @property
    def inert(self) -> bool:
        return self.scale_factor == 0 or self.seg_weight == self.ret_weight == 0

    def nursing(self) -> Nursing:
        return Nursing(
            groups=word_groups(self),
            loss=self.loss,
            step_size=root_decay(self.scale_factor, self.scale_range),
            padding=self.padding,
            level=self.level,
        )

    def prepare(self, maps: Tensor) -> Tensor:
        maps = column_softmax(maps) if self.softmax else maps
        return smooth(maps) if self.smoothing else maps

    def loss(self, views: Sequence[TokenMaps], memory: list[Tensor] | None, moment: Moment) -> Slope:
        """The loss of one picture; remembers the masks for the next step."""
        maps = [mean_map(group[0]) for group in subject_entries(views, self.prepare, apart=not self.softmax)]
        rule = self.mask if self.mask != "auto" else "otsu" if self.softmax else "relative"
        masks = memory if self.layout is None else self._layout(maps[0])
        loss = self.seg_weight * segregation(maps) if self.seg_weight else maps[0].new_zeros(())
        if self.ret_weight and masks is not None:
            loss = loss + self.ret_weight * retention(maps, masks)
        again = self.ret_weight and self.layout is None
        return Slope(loss, memory=[peak_mask(x, rule) for x in maps] if again else None)

    def _layout(self, like: Tensor) -> list[Tensor]:
        assert self.layout is not None
        given = self.layout.to(like.device, like.dtype)[None]
        return list(F.interpolate(given, size=like.shape, mode="area")[0] >= 0.5)
