"""VHR: strengthen the heads that look at the image.

He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025, arXiv 2412.13949.

At the first generation step every head of a layer is asked how much its output at the last prompt position depends on
the image:

    VHD_i = || A_i(with image) - A_i(without image) ||_2                A_i: head output before the output projection
    VHD_i = 0   where VHD_i > mean + std  and  TA_i > mean + std        TA_i = || A_i(without image) ||^2: heads that
                                                                        surge when the image is taken away
    H     = { i : VHD_i > median(VHD) }                                 the upper half of the heads
    A_i  <- alpha A_i   for i in H, at all positions, prefill and decode

Layer by layer: VHD of a layer is measured with all earlier layers already reinforced. Paper: alpha = 2, layers "the
second and the last 14" of 32. ``std`` is unbiased, the median the lower one.

Fused form: one multiply of the kernel's output; no attention map. Cost: before the generation one prefill of twice the
rows (with and without image, of the same length), then one multiply per layer and step.
Limits: more than 14 last layers or alpha 4 break the text (a low CHAIR score then means nothing). The paper leaves open
whether the image-free branch is reinforced too, and how the image is removed; both are parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnsteer.edits import Scale
from attnsteer.errors import SteeringError
from attnsteer.processor import Processor, check_choice, check_number
from attnsteer.site import AttentionCall, Site
from attnsteer.where import Where


@dataclass(frozen=True)
class VHR(Processor):
    """Scale the outputs of the vision-aware heads by ``alpha``.

    Args:
        where: layers (decoder layers from 0) and heads that may be reinforced, and ``steps`` (``"prefill"``,
            ``"decode"``, ``"all"``). None takes the paper's layers, {1} and the last 14; in models of fewer than 16
            layers {1} and the last 14/32 of them (ours).
        alpha: factor on the chosen heads, 0 to 10. Paper: 2. At 1 the method is off.
        outliers: drop heads that surge when the image is removed. Paper: True.
        second_layer: whether the default layers include layer 1. Paper: True for captions; it can unsettle other tasks.
        reference: ``"reinforced"`` scales the image-free rows with the same heads, ``"plain"`` leaves them.
        removal: ``"delete"`` takes the image tokens out of the reference prompt, ``"mask"`` hides them as keys.
    """

    where: Where | None = None  # type: ignore[assignment]
    alpha: float = 2.0
    outliers: bool = True
    second_layer: bool = True
    reference: str = "reinforced"
    removal: str = "delete"

    kinds: ClassVar = ("causal",)
    lanes: ClassVar = ("image_free",)
    per_row: ClassVar = ("alpha",)
    token_agnostic: ClassVar = True

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0, 10)
        check_choice(self, "reference", ("reinforced", "plain"))
        check_choice(self, "removal", ("delete", "mask"))

    @property
    def inert(self) -> bool:
        return self.alpha == 1

    def where_for(self, sites: Sequence[Site]) -> Where:
        return Where(layers=paper_layers(sites, self.second_layer)) if self.where is None else self.where

    def react(self, call: AttentionCall) -> Scale:
        if "image_free" in call.lanes:
            return self._choose(call)
        if "factor" not in call.state:
            raise SteeringError(
                "VHR has not seen this prompt without its image: call the steered model or its generate()."
            )
        return Scale(call.state["factor"])

    def _choose(self, call: AttentionCall) -> Scale:
        """Measure and choose at the last position; keep ``vhd``, ``heads`` and ``factor``, each ``(B, H)``."""
        with_image, without = last_outputs(call)
        distance = vhd(with_image, without)
        chosen = select_heads(distance, text_activation(without), outliers=self.outliers)
        chosen = chosen & sees_image(call, with_image, distance)[:, None]
        factor = torch.where(chosen, call.by_row(self.alpha, chosen), 1.0)
        call.state.update(vhd=distance, heads=chosen, factor=factor)
        return Scale(torch.cat([factor, factor if self.reference == "reinforced" else torch.ones_like(factor)]))


# ---- the formulas ----------------------------------------------------------------------------------------------------
def vhd(with_image: Tensor, without: Tensor) -> Tensor:
    """Vision-aware head divergence ``|| A_i(with) - A_i(without) ||_2``; ``(..., D)`` -> ``(...)``, float32 or
    wider."""
    return torch.linalg.vector_norm(_wide(with_image) - _wide(without), dim=-1)


def text_activation(without: Tensor) -> Tensor:
    """``|| A_i(without) ||^2``, the strength of a head when there is no image; ``(..., D)`` -> ``(...)``."""
    return _wide(without).square().sum(-1)


def negative_sensitivity(distance: Tensor, activation: Tensor) -> Tensor:
    """Bool ``(..., H)``: heads whose divergence and whose image-free strength both exceed mean + std of their layer."""
    if distance.shape[-1] < 2:
        return torch.zeros_like(distance, dtype=torch.bool)

    def high(x: Tensor) -> Tensor:
        return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True)

    return high(distance) & high(activation)


def select_heads(distance: Tensor, activation: Tensor, outliers: bool = True) -> Tensor:
    """Bool ``(..., H)``: heads above the lower median of their layer, after outliers were set to 0."""
    if outliers:
        distance = distance.masked_fill(negative_sensitivity(distance, activation), 0.0)
    return distance > distance.median(-1, keepdim=True).values


def paper_layers(sites: Sequence[Site], second_layer: bool = True) -> list[int]:
    """{1} and the last 14 layers; the last 14/32 where there are fewer than 16."""
    total = 1 + max((site.layer for site in sites), default=0)
    last = 14 if total >= 16 else max(1, round(total * 14 / 32))
    second = {1} if second_layer and total > 1 else set()
    return sorted(second | set(range(total - last, total)))


# ---- the measured positions ------------------------------------------------------------------------------------------
def last_outputs(call: AttentionCall, positions: int | None = None) -> tuple[Tensor, Tensor]:
    """Head outputs of both lanes at the last position ``(B, H, D)``, or at the last few ``(B, H, positions, D)``."""
    rows = call.output[:, :, -1] if positions is None else call.output[:, :, -positions:]
    return rows[call.lanes["main"]], rows[call.lanes["image_free"]]


def sees_image(call: AttentionCall, with_image: Tensor, distance: Tensor) -> Tensor:
    """Bool ``(B,)``: rows that have an image which reaches this layer.

    Both lanes are equal without one, but only up to rounding; a median over that noise would choose half of the heads.
    """
    assert call.spans is not None
    assert isinstance(call.spans.image, Tensor)
    has_image = call.spans.image[call.lanes["main"]].any(-1)
    floor = max(1e-5, 2 * torch.finfo(with_image.dtype).eps) * torch.linalg.vector_norm(_wide(with_image), dim=-1)
    return has_image.to(distance.device) & (distance > floor).flatten(1).any(-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
