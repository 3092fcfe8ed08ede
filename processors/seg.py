"""SEG: smoothed energy guidance.

Paper: "Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention", Hong, NeurIPS
2024, arXiv 2408.00760.

A second prediction of the conditional rows is made with the attention logits blurred along the query axis, which is
the same as blurred queries (the blur G is linear)::

    logits' = G (Q K^T) = (G Q) K^T
    eps = eps_cfg + w (eps_cond - eps_perturbed)            w = scale; eps_cfg is eps_cond without CFG

Only image queries are blurred, over their real (height, width), frame by frame; kernel sizes are clipped per axis,
which on square grids is the authors' code. Infinite sigma gives every image query the mean over all of them (of all
frames): one row of attention, broadcast. Cost: the forward pass from the first chosen layer on, for one extra row per
conditional row, plus one more kernel call in the chosen layers where sigma is finite.

The paper's text and the authors' code differ in the combination; this is the code's. Default of the authors: SDXL, mid
block, w = 3, sigma = infinity (1, 2, 5 and 10 were also tried), all steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from attnsteer.edits import BlurredQuery, Edit, MeanQuery, Mix, Target
from attnsteer.errors import SteeringError
from attnsteer.processor import Processor, check_number
from attnsteer.site import Kind, Site

from .softpag import head_weight


@dataclass(frozen=True)
class SEG(Processor):
    """SEG (arXiv 2408.00760).

    Args:
        where: layers, heads and steps; the paper takes all heads and all steps.
        sigma: width of the blur in tokens, >= 0; ``math.inf`` for the mean query. 0 changes nothing.
        scale: w >= 0.
        strength: u in [0, 1]; below 1 the head output is mixed with the plain one (SoftSEG, arXiv 2506.10978).

    Raises:
        SteeringError: a value outside its range.
    """

    sigma: float = math.inf
    scale: float = 3.0
    strength: float = 1.0

    kinds: ClassVar[tuple[Kind, ...]] = ("joint", "self")
    lanes: ClassVar[tuple[str, ...]] = ("perturbed",)

    def __post_init__(self) -> None:
        number = isinstance(self.sigma, (int, float)) and not isinstance(self.sigma, bool)
        if not number or not self.sigma >= 0:
            raise SteeringError(f"SEG(sigma={self.sigma!r}) is out of range: allowed is a number from 0 to infinity.")
        check_number(self, "scale", 0)
        check_number(self, "strength", 0, 1)

    @property
    def inert(self) -> bool:
        return self.scale == 0 or self.strength == 0 or self.sigma == 0

    def plan(self, site: Site, heads: tuple[int, ...]) -> Edit:
        target: Target = MeanQuery("image") if math.isinf(self.sigma) else BlurredQuery(self.sigma)
        return Mix(target, head_weight(site, heads, self.strength), tokens="image")

    def guidance(self, timestep: float) -> float:
        return self.scale
