"""SoftPAG: perturbed-attention guidance on single heads, with a continuous strength.

Paper: "Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models", Ahn, Kang et
al., NeurIPS 2025, arXiv 2506.10978 (first versions: "Fine-Grained Perturbation Guidance via Attention Head Selection").

A second prediction of the conditional rows is made with the maps of the chosen heads moved toward a target ``A*``::

    A' = (1 - u) A + u A*            in the chosen heads, u = strength; the other heads keep A
    eps = eps_cfg + w (eps_cond - eps_perturbed)            w = scale; eps_cfg is eps_cond without CFG

Fused, exactly: ``A' V = (1 - u) O + u O*``, a lerp of the head output toward the target's own output. The identity
needs no attention (``O* = V``), "uniform" and "mean_query" are O(N), "argmax" computes logits in chunks, and the joint
variants cost one or two more fused calls. Besides: the forward pass from the first chosen layer on, for one extra row
per conditional row.

Joint attention, the paper's code: the identity covers image *and* text rows ("full"). The other variants change image
rows only: "image_logit" attends to the own key and all text keys (diffusers' SD3 PAG pipelines), "image_only" to the
own key alone, "image_renorm" moves the image mass to the own key and keeps the text weights. Without text tokens (UNet
attn1) all variants are one.

Choosing (paper): search heads at u = 1, then lower u to about 0.5 and take more heads; too many heads or u = 1
over-saturate. SD3 runs use w = 3, FLUX runs w = 8 (which distilled guidance those used is unconfirmed), figures w = 5.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attnsteer.edits import ArgmaxValue, Edit, MeanQuery, MeanValue, Mix, OwnValue, Path, Target, Tokens
from attnsteer.errors import SteeringError
from attnsteer.processor import Processor, check_choice, check_number
from attnsteer.site import Kind, Site
from attnsteer.where import Steps

Variant = Literal["full", "image_logit", "image_only", "image_renorm"]

OWN_VALUE: dict[str, OwnValue] = {
    "full": OwnValue(),
    "image_logit": OwnValue("logit"),
    "image_only": OwnValue(),
    "image_renorm": OwnValue("renorm"),
}
"""What becomes of the text keys in each variant of the identity."""


def head_weight(site: Site, heads: tuple[int, ...], strength: float) -> Tensor:
    """``(1, H)`` float32: the strength on the chosen heads, 0 on the others."""
    weight = torch.zeros(1, site.heads)
    weight[0, list(heads)] = strength
    return weight


@dataclass(frozen=True)
class SoftPAG(Processor):
    """SoftPAG (arXiv 2506.10978).

    Args:
        where: layers, heads and steps. The paper takes all steps and the heads found by HeadHunter; of SD3-medium's
            layers 7 to 10 are the best single ones.
        strength: u in [0, 1]; 0 leaves the prediction as it is, 1 replaces the map (PAG on single heads). Paper: 0.25
            to 1, 0.5 after a search at 1.
        scale: w >= 0 in units of CFG's ``scale - 1``; adds to CFG.
        variant: rows and keys of joint attention, see above; other targets than "identity" take "full" or "image_only".
        target: "identity" (own value), "uniform" (mean value), "mean_query" (one query for all, as SEG), "argmax".
        region: the tokens whose mean query is taken by "mean_query".
        path: from A to the identity: "linear", or the square-root geometries "chord" and "slerp", or "log_linear".

    Raises:
        SteeringError: a value outside its range, or a combination that has no meaning.
    """

    strength: float = 0.5
    scale: float = 3.0
    variant: Variant = "full"
    target: Literal["identity", "uniform", "mean_query", "argmax"] = "identity"
    region: Tokens = "all"
    path: Path = "linear"

    kinds: ClassVar[tuple[Kind, ...]] = ("joint", "self")
    lanes: ClassVar[tuple[str, ...]] = ("perturbed",)

    def __post_init__(self) -> None:
        check_number(self, "strength", 0, 1)
        check_number(self, "scale", 0)
        check_choice(self, "variant", tuple(OWN_VALUE))
        check_choice(self, "target", ("identity", "uniform", "mean_query", "argmax"))
        check_choice(self, "region", ("all", "image", "text"))
        check_choice(self, "path", ("linear", "chord", "slerp", "log_linear"))
        keys_matter = self.variant in ("image_logit", "image_renorm")
        reasons = []
        if keys_matter and self.target != "identity":
            reasons.append(f"variant={self.variant!r} is defined for target='identity' only, not for {self.target!r}.")
        if self.path != "linear" and (keys_matter or self.target != "identity"):
            reasons.append(f"path={self.path!r} is defined for target='identity', variant='full' or 'image_only' only.")
        if self.region != "all" and self.target != "mean_query":
            reasons.append(f"region={self.region!r} is defined for target='mean_query' only, not for {self.target!r}.")
        if reasons:
            raise SteeringError(reasons)

    @classmethod
    def from_search(
        cls,
        file: str | os.PathLike[str],
        top: int | None = None,
        *,
        strength: float = 0.5,
        scale: float = 3.0,
        steps: Steps = "all",
    ) -> SoftPAG:
        """SoftPAG on the heads that a search found (``heads.json`` of ``attnsteer search``).

        Args:
            file: the selection.
            top: take the first so many heads (default: all).
            strength, scale: u and w; the paper searches at u = 1 and then lowers u.
            steps: as in ``Where``.

        Raises:
            SteeringError: no selection there, or not so many heads in it.
        """
        from attnsteer.search.selection import Selection

        return cls(Selection.load(file).where(top, steps), strength=strength, scale=scale)

    @property
    def token_agnostic(self) -> bool:
        return self.variant == "full" and self.region == "all"

    @property
    def inert(self) -> bool:
        return self.strength == 0 or self.scale == 0

    def refusals(self, site: Site) -> list[str]:
        if self.region == "text" and site.kind == "self":
            return [f"region='text' needs text queries; {site.name!r} has image queries only: choose 'image' or 'all'."]
        return []

    def plan(self, site: Site, heads: tuple[int, ...]) -> Edit:
        targets: dict[str, Target] = {
            "identity": OWN_VALUE[self.variant],
            "uniform": MeanValue(),
            "mean_query": MeanQuery(self.region),
            "argmax": ArgmaxValue(),
        }
        tokens: Tokens = "all" if self.variant == "full" else "image"
        return Mix(targets[self.target], head_weight(site, heads, self.strength), tokens, self.path)

    def guidance(self, timestep: float) -> float:
        return self.scale
