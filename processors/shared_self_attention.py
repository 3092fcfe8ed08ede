"""Shared self-attention: the pictures of a set also attend to the subject in the anchor pictures.

Paper: "Training-Free Consistent Text-to-Image Generation" (ConsiStory), Tewel et al., SIGGRAPH 2024, arXiv 2402.03286;
its subject-driven self-attention (SDSA), after the published description of the authors' code.

Of each anchor picture j the tokens of the subject are lent, each dropped with probability ``dropout`` in each step::

    picture i:  softmax over [ own keys | keys of subject_j that remain, for every anchor j != i ]

All queries of a picture see the same keys; there is one softmax over them all.

Fused: one call per anchor that is read, over the keys of its subject alone, and one for the log-sum-exp of the own
keys, merged; no map over several pictures. Cost per chosen layer: one call of the size of the own one, and one of the
subject's share of it per anchor. In joint attention (our extension) image queries read image keys, text takes no part.
Limits, against the authors' code: the masks are given once (``attnsteer.stories`` makes them from boxes,
``attnsteer.rehearsal`` from a run before); the authors make them anew after every step, from the conditional rows'
cross-attention to the subject's words at a sixteenth of the latent's area, averaged over layers and the last 20 steps.
Missing altogether: query blending (queries of a plain forward in the first tenth of the steps) and feature injection (a
second run in which outputs of attention take 0.8 of the best matching token of another picture, by DIFT features of the
first run). Without masks whole pictures are shared. The paper's own parameter values are unconfirmed.
With guidance (PAG, SoftPAG) perturbed rows read conditional ones: ``attnsteer.lending``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnsteer.draws import kept
from attnsteer.edits import Edit
from attnsteer.errors import SteeringError
from attnsteer.layouts import pad
from attnsteer.processor import Processor, check_number
from attnsteer.site import AttentionCall, Kind
from attnsteer.stories import check_masks, picture, share, to_grid
from attnsteer.where import Where

from .consistent_self_attention import check_frames


@dataclass(frozen=True)
class SharedSelfAttention(Processor):
    """Subject-driven self-attention of ConsiStory (arXiv 2402.03286).

    Args:
        where: layers, heads and steps; default: self-attention of a UNet's up blocks, all steps but the first.
        frames: pictures of one set: rows of the batch in contiguous blocks of this many prompts.
        anchors: how many of them, from the first on, are read by all others; None: all. Authors: 2.
        masks: ``(anchors, height, width)`` of any size: the subject in each anchor; None: whole pictures.
        dropout: probability of a subject token to be dropped in a step. Authors: 0.5.
        strength: factor on the weights of lent keys before renormalisation, >= 0; 0 is off. Authors: 1.
        seed: of the dropout; sets of one batch draw alike.

    Raises:
        SteeringError: a value outside its range, or masks that do not fit.
    """

    where: Where = Where("up_blocks*.attn1", steps=slice(1, None))
    frames: int = 4
    anchors: int | None = 2
    masks: Tensor | None = field(default=None, compare=False)
    dropout: float = 0.5
    strength: float = 1.0
    seed: int = 0

    kinds: ClassVar[tuple[Kind, ...]] = ("joint", "self")
    reads_rows: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("grid",)

    def __post_init__(self) -> None:
        check_frames(self, "frames", self.frames)
        if self.anchors is not None:
            check_frames(self, "anchors", self.anchors, max(self.frames, 2))
        check_number(self, "dropout", 0, 1)
        check_number(self, "strength", 0)
        check_frames(self, "seed", self.seed, low=0)
        reasons = [] if self.masks is None else check_masks("masks", self.masks, self.lenders)
        if reasons:
            raise SteeringError(reasons)

    @property
    def lenders(self) -> int:
        """The number of pictures that others read."""
        return self.frames if self.anchors is None else min(self.anchors, self.frames)

    @property
    def inert(self) -> bool:
        return self.strength == 0 or self.dropout == 1 or self.frames == 1

    def react(self, call: AttentionCall) -> Edit:
        device = call.q.device
        step = 0 if call.step is None else call.step
        tokens, subject = self._subjects(call)
        frame = torch.arange(self.lenders, device=device)[:, None]
        image = picture(call)
        n = image.stop - image.start
        remains = subject & kept(1 - self.dropout, self.seed, step, n, frame, tokens, device=device)
        read = [[j for j in range(self.lenders) if j != i] for i in range(self.frames)]
        weight = torch.full((1, call.site.heads), float(self.strength), device=device)
        return share(call, self.frames, read, remains, weight, None if self.masks is None else tokens)

    def _subjects(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """The subject tokens of every anchor ``(anchors, m)``, and which of these entries are real."""
        image, device = picture(call), call.q.device
        if self.masks is None:
            every = torch.arange(image.stop - image.start, device=device).expand(self.lenders, -1)
            return every, torch.ones_like(every, dtype=torch.bool)
        if "subjects" not in call.state:
            if call.spans is None or call.spans.grid is None:
                raise SteeringError(f"The image grid is unknown at {call.site.name!r}, so masks cannot be laid on it.")
            tokens, real = subject_tokens(self.masks, call.spans.grid)
            call.state["subjects"] = tokens.to(device), real.to(device)
        return call.state["subjects"]


@torch.compiler.disable
def subject_tokens(masks: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The tokens of masks at the resolution of a site, ``(S, m)``, and which of these entries are real."""
    return pad([mask.nonzero().flatten() for mask in to_grid(masks.cpu(), grid)])
