"""PAG: perturbed-attention guidance.

Paper: "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", Ahn et al., ECCV 2024, arXiv 2403.17377.

A second prediction of the conditional rows is made with the maps of the chosen layers replaced by the identity::

    O' = V                            in the chosen layers
    eps = eps_cfg + w (eps_cond - eps_perturbed)            w = scale; eps_cfg is eps_cond without CFG

Fused, exactly: the head output is the value tensor. Equals ``SoftPAG(strength=1)``. Cost: the forward pass from the
first chosen layer on, for one extra row per conditional row.

Defaults of the authors: SD 1.5 and SDXL, the self-attention of the mid block, w = 3 beside CFG 4, or w = 5 without CFG.
Whole layers of joint transformers can come out worse than no guidance: choose layers and heads there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnsteer.edits import Edit, Mix, Tokens
from attnsteer.processor import Processor, check_choice, check_number
from attnsteer.site import Kind, Site

from .softpag import OWN_VALUE, Variant, head_weight


@dataclass(frozen=True)
class PAG(Processor):
    """PAG (arXiv 2403.17377).

    Args:
        where: layers, heads and steps; the paper takes all heads and all steps.
        scale: w >= 0. The authors' ADM code writes the same with ``1 + w``.
        adaptive_scale: ``w(t) = max(0, scale - adaptive_scale * (1000 - t))`` at scheduler timestep t (diffusers'
            ``pag_adaptive_scale``); 0 keeps the scale.
        variant: rows and keys of joint attention, as in ``SoftPAG``; diffusers' SD3 PAG pipelines use "image_logit".

    Raises:
        SteeringError: a value outside its range.
    """

    scale: float = 3.0
    adaptive_scale: float = 0.0
    variant: Variant = "full"

    kinds: ClassVar[tuple[Kind, ...]] = ("joint", "self")
    lanes: ClassVar[tuple[str, ...]] = ("perturbed",)

    def __post_init__(self) -> None:
        check_number(self, "scale", 0)
        check_number(self, "adaptive_scale", 0)
        check_choice(self, "variant", tuple(OWN_VALUE))

    @property
    def token_agnostic(self) -> bool:
        return self.variant == "full"

    @property
    def inert(self) -> bool:
        return self.scale == 0

    def plan(self, site: Site, heads: tuple[int, ...]) -> Edit:
        tokens: Tokens = "all" if self.variant == "full" else "image"
        return Mix(OWN_VALUE[self.variant], head_weight(site, heads, 1.0), tokens)

    def guidance(self, timestep: float) -> float:
        return max(0.0, self.scale - self.adaptive_scale * (1000 - timestep))
