"""IR-Diffusion: several subjects from reference pictures, each kept apart and put in its place.

Paper: "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition Attention", He
et al., 2024, arXiv 2411.19261, with the masked mutual cross-attention of DreamStory (arXiv 2407.12899) that it runs on.
After the published description of the authors' code; the paper's own equations and values are unconfirmed.

A story is ``[reference_1 .. reference_S, scene]``, made in one batch; references are never changed. R_i, T_i: subject i
in its reference and in the scene. In the scene alone:

* isolation:   tokens of T_a do not see tokens of T_b, a != b; the background sees and is seen by all;
* reposition:  softmax over [ own keys | keys of subject i, for queries in T_i ], from ``start_layer`` on. The box of
  R_i is resized onto that of T_i (nearest), so token k is there m_k times: bias ``log m_k + reference_bias``. Queries
  in T_i are left out with probability ``dropout`` in each step;
* mutual cross-attention:  ``o <- (1 - l) o + l sum_i T_i o_i / sum_i T_i``, o_i: the scene's queries on the prompt of
  reference i; mixed before the output projection, which is affine.

Models without rotary positions know only how often a key is there, so ``log m`` is exact. With rotary positions (FLUX)
the keys are turned to the place where they are pasted: our extension. So is joint attention, where text is background.

Fused: masked queries are computed once more by class; one call per subject over its own foreground keys, merged by
their log-sum-exps; one call per subject in cross-attention. Limits: subjects must not overlap; masks are fixed before
the run (``attnsteer.stories`` makes them from boxes, ``attnsteer.rehearsal`` from a plain run); the authors also close
and box small masks and cut the lower sixth of references, which is left to the user. Compiled models pause at each site
in the first step, where the masks are laid, so they cannot be one graph each (``fullgraph``). Given pictures as
references: ``attnsteer.references``. With guidance (PAG, SoftPAG) perturbed rows read conditional ones, and references
are guided as if alone: ``attnsteer.lending``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnsteer.classes import TokenClasses
from attnsteer.draws import kept
from attnsteer.edits import ClassMask, Edit, Mix, RowKeys, Segments
from attnsteer.errors import SteeringError
from attnsteer.layouts import disjoint, isolation_table, packed, reposition
from attnsteer.logits import compute_dtype
from attnsteer.processor import Processor, check_integer, check_number
from attnsteer.site import AttentionCall, Kind, Site
from attnsteer.stories import check_masks, count, picture, sources, to_grid
from attnsteer.where import Where


@dataclass(frozen=True)
class IRDiffusion(Processor):
    """Isolation and reposition attention (arXiv 2411.19261).

    Args:
        where: layers, heads and steps; all attention of these layers takes part (cross-attention if ``mutual`` > 0).
        references: ``(S, height, width)``: subject i in reference picture i, of any size.
        scene: ``(S, height, width)``: subject i in the scene; zeros where it is missing.
        isolate: isolation on or off. Authors: on.
        start_layer: first layer with reposition; None turns it off. Authors: 36 of SDXL's 70, the third of the decoder.
        start_step: first step with reposition. Authors: 0.
        dropout: p in [0, 1). Authors: 0.5.
        reference_bias: added to the logits of reference keys. Authors: 0.
        mutual: l in [0, 1]. Authors: 0.9. Only where there is cross-attention.
        seed: of the dropout; stories of one batch draw alike.

    Raises:
        SteeringError: a value outside its range, or masks that do not fit or overlap.
    """

    references: Tensor | None = field(default=None, compare=False)
    scene: Tensor | None = field(default=None, compare=False)
    isolate: bool = True
    start_layer: int | None = 36
    start_step: int = 0
    dropout: float = 0.5
    reference_bias: float = 0.0
    mutual: float = 0.9
    seed: int = 0

    kinds: ClassVar[tuple[Kind, ...]] = ("joint", "self", "cross")
    reads_rows: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("grid", "rotary")

    def __post_init__(self) -> None:
        check_number(self, "dropout", 0, 1 - 1e-6)
        check_number(self, "reference_bias")
        check_number(self, "mutual", 0, 1)
        for name in ("start_step", "seed") if self.start_layer is None else ("start_layer", "start_step", "seed"):
            check_integer(self, name)
        subjects = self.references.shape[0] if isinstance(self.references, Tensor) and self.references.dim() else 1
        reasons = check_masks("references", self.references, subjects) + check_masks("scene", self.scene, subjects)
        if not reasons and isinstance(self.scene, Tensor) and bool(((self.scene > 0.5).sum(0) > 1).any()):
            reasons.append("Subjects of the scene overlap: an isolated token of two subjects would see neither.")
        if reasons:
            raise SteeringError(reasons)

    @property
    def subjects(self) -> int:
        return 0 if self.references is None else self.references.shape[0]

    @property
    def inert(self) -> bool:
        off = not (self.isolate and self.subjects > 1) and self.start_layer is None and self.mutual == 0
        return off or not bool(self.scene is not None and (self.scene > 0).any())

    def where_for(self, sites: Sequence[Site]) -> Where:
        last = max(site.layer for site in sites)
        if self.start_layer is not None and self.start_layer > last:
            raise SteeringError(
                f"start_layer={self.start_layer} does not exist: layers are 0 to {last}. It counts the layers of SDXL; "
                f"about half of this model's would be {math.ceil((last + 1) / 2)}."
            )
        layers = {site.layer: h for site, h in self.where.select(sites, ("joint", "self")).items()}
        kinds = ("joint", "self", "cross") if self.mutual > 0 else ("joint", "self")
        heads: dict[int | str, tuple[int, ...]] = {
            site.name: layers[site.layer] for site in sites if site.layer in layers and site.kind in kinds
        }
        return Where(heads=heads, steps=self.where.steps)

    def refusals(self, site: Site) -> list[str]:
        reasons = []
        if site.kind == "joint" and self.mutual > 0:
            reasons.append("IRDiffusion(mutual=...) mixes cross-attentions, which joint models do not have: mutual=0.")
        if site.rotary == "unknown" and self.start_layer is not None:
            reasons.append(
                f"Keys of {site.name!r} cannot be moved: its rotary positions are unknown; start_layer=None."
            )
        return reasons

    def react(self, call: AttentionCall) -> tuple[Edit, ...]:
        batch = call.q.shape[0]
        if call.state.get("batch") != batch:
            call.state.update(self._prepared(call), batch=batch)
        if call.site.kind == "cross":
            return (self._mutual(call),)
        edits: list[Edit] = [ClassMask(call.state["classes"], self._heads(call))] if "classes" in call.state else []
        return (*edits, self._repositioned(call)) if "keys" in call.state else tuple(edits)

    def _heads(self, call: AttentionCall, value: float = 1.0) -> Tensor:
        return torch.full((1, call.site.heads), value, device=call.q.device)

    def _read(self, call: AttentionCall) -> tuple[tuple[int, ...], ...]:
        """The scene reads every reference, the references read nothing."""
        scene = list(range(self.subjects))
        return sources(call, self.subjects + 1, [[] for _ in scene] + [scene])

    # ---- masks at the site's resolution, made once -------------------------------------------------------------------
    @torch.compiler.disable
    def _prepared(self, call: AttentionCall) -> dict[str, object]:
        if call.spans is None or call.spans.grid is None or self.references is None or self.scene is None:
            raise SteeringError(f"The image grid is unknown at {call.site.name!r}, so masks cannot be laid on it.")
        grid, device = call.spans.grid, call.q.device
        target, reference = disjoint(to_grid(self.scene.cpu(), grid)), to_grid(self.references.cpu(), grid)
        prepared: dict[str, object] = {"target": target.to(device)}
        if call.site.kind == "cross":
            return prepared
        image, total = picture(call), call.q.shape[2]
        if self.isolate and self.subjects > 1:
            numbers = torch.arange(1, self.subjects + 1)[:, None]
            token = torch.zeros(count(call, self.subjects + 1), self.subjects + 1, total, dtype=torch.long)
            token[:, -1, image] = (target * numbers).sum(0)
            token = token.flatten(0, 1)
            prepared["classes"] = TokenClasses(isolation_table(self.subjects)[None], token, token)
        if self.start_layer is not None and call.site.layer >= self.start_layer:
            pairs = zip(reference.unflatten(1, grid[1:]), target.unflatten(1, grid[1:]), strict=True)
            keys, bias, places = packed([reposition(r, t) for r, t in pairs], call.site.rotary != "none")
            bias = (bias + self.reference_bias).to(compute_dtype(call.q))
            prepared |= {"keys": keys.to(device) + image.start, "bias": bias.to(device)}
            prepared["positions"] = None if places is None else places.to(device) + image.start
        return prepared

    # ---- edits -------------------------------------------------------------------------------------------------------
    def _repositioned(self, call: AttentionCall) -> Segments:
        state, device, image = call.state, call.q.device, picture(call)
        target, step = state["target"], 0 if call.step is None else call.step
        subject, token = (torch.arange(size, device=device) for size in target.shape)
        gate = target & kept(1 - self.dropout, self.seed, step, len(token), subject[:, None], token, device=device)
        gate = torch.where(gate.any(1, keepdim=True), gate, target)  # never all of a subject
        queries = torch.zeros(1, self.subjects, call.q.shape[2], dtype=torch.bool, device=device)
        queries[:, :, image] = gate
        weight = self._heads(call) * (torch.as_tensor(step, device=device) >= self.start_step)
        return Segments(self._read(call), weight, state["bias"], state["keys"], queries, state["positions"])

    def _mutual(self, call: AttentionCall) -> Mix:
        share = call.state["target"].float()[None]
        return Mix(RowKeys(self._read(call), share), self._heads(call, self.mutual))
