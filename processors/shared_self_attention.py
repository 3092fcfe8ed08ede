"""Shared self-attention: the pictures of a set also attend to the subject in the anchor pictures.

Paper: "Training-Free Consistent Text-to-Image Generation" (ConsiStory), Tewel et al., SIGGRAPH 2024, arXiv 2402.03286;
its subject-driven self-attention (SDSA), after the published description of the authors' code.

Of each anchor picture j the tokens of the subject are lent, each dropped with probability ``dropout`` in each step::

    picture i:  softmax over [ own keys | keys of subject_j that remain, for every anchor j != i ]

All queries of a picture see the same keys; there is one softmax over them all.

Fused: one call per anchor that is read, over the keys of its subject alone, and one for the log-sum-exp of the own
keys, merged; no map over several pictures. Cost per chosen layer: one call of the size of the own one, and one of the
subject's share of it per anchor. In joint attention (our extension) image queries read image keys, text takes no part.

Where the subject is: ``masks`` (of boxes by ``attnsteer.stories``, from a run before by ``attnsteer.rehearsal``), or
the authors' way, ``words``: anew after every step, from the conditional rows' cross-attention to these words, averaged
over layers and the last ``window`` steps (``attnsteer.subjects``; UNets). A step without a mask yet shares nothing.
Unlike the authors, all tokens of a word and all its occurrences count. With neither, whole pictures are shared.

Query blending (``queries``; authors: (0.9, 0.81836735)), in steps t = 0 .. T = steps // 10 that share::

    q  <-  w_t q_plain + (1 - w_t) q          w = linspace(*queries, T + 1),   q_plain: a plain forward, same latents

Cost: one more forward of the whole batch in each of these steps, and its queries at the chosen layers until their end.

Left out: feature injection (steps T to a third: outputs of attention at 64 x 64 take 0.8 of the best matching token of
another picture). Mixing outputs is attention's business, but the matches are not: they come from hidden states of an
up block at timestep 261 of a whole first run, which only a hook on the model could read. With it goes the authors'
second run. Their FreeU is a setting of the pipeline. The cache of anchors is a batch here: anchors are rows of it.
Their values are those of the code; the paper's own are unconfirmed.
Limit: with ``words`` the number of subject tokens changes with the step, which compiled models take as a new size.
With guidance (PAG, SoftPAG) perturbed rows read conditional ones: ``attnsteer.lending``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnsteer.draws import kept
from attnsteer.edits import Reaction, Replace
from attnsteer.errors import SteeringError
from attnsteer.nursing import Moment, Word
from attnsteer.processor import Processor, check_integer, check_number
from attnsteer.site import AttentionCall, Kind, Site
from attnsteer.steps import StepEnd
from attnsteer.stories import check_masks, picture, share
from attnsteer.subjects import look, map_sites, refresh, subject_tokens
from attnsteer.where import Where


@dataclass(frozen=True)
class SharedSelfAttention(Processor):
    """Subject-driven self-attention of ConsiStory (arXiv 2402.03286).

    Args:
        where: layers, heads and steps; default: self-attention of a UNet's up blocks, all steps but the first (with
            ``words`` the first is watched).
        frames: pictures of one set: rows of the batch in contiguous blocks of this many prompts.
        anchors: how many of them, from the first on, are read by all others; None: all. Authors: 2.
        masks: ``(anchors, height, width)`` of any size: the subject in each anchor; None: whole pictures.
        dropout: probability of a subject token to be dropped in a step. Authors: 0.5.
        strength: factor on the weights of lent keys before renormalisation, >= 0; 0 is off. Authors: 1.
        seed: of the dropout; sets of one batch draw alike.
        words: the subject's words in the prompts of the anchors (or positions of their tokens) instead of masks.
        window: how many steps the maps of the words are averaged over. Authors: 20.
        queries: weights of the plain queries in the first and in the last blended step, in [0, 1]; None: no blending.

    Raises:
        SteeringError: a value outside its range, masks that do not fit, or masks and words.
    """

    where: Where = Where("up_blocks*.attn1", steps=slice(1, None))
    frames: int = 4
    anchors: int | None = 2
    masks: Tensor | None = field(default=None, compare=False)
    dropout: float = 0.5
    strength: float = 1.0
    seed: int = 0
    words: tuple[Word, ...] = ()
    window: int = 20
    queries: tuple[float, float] | None = None

    kinds: ClassVar[tuple[Kind, ...]] = ("joint", "self", "cross")
    reads_rows: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("grid",)

    def __post_init__(self) -> None:
        check_integer(self, "frames", 1)
        if self.anchors is not None:
            check_integer(self, "anchors", 1, max(self.frames, 2))
        check_number(self, "dropout", 0, 1)
        check_number(self, "strength", 0)
        check_integer(self, "seed")
        check_integer(self, "window", 1)
        reasons = [] if self.masks is None else check_masks("masks", self.masks, self.lenders)
        if self.masks is not None and self.words:
            reasons.append("Give the masks of the subject or its words, not both.")
        if not isinstance(self.words, (tuple, list)):
            reasons.append(f"SharedSelfAttention(words={self.words!r}): give a tuple of words.")
        pair = (0.0, 0.0) if self.queries is None else self.queries
        if len(pair) != 2 or not all(isinstance(w, (int, float)) and 0 <= w <= 1 for w in pair):
            reasons.append(f"SharedSelfAttention(queries={self.queries!r}): give two weights from 0 to 1, or None.")
        if reasons:
            raise SteeringError(reasons)

    @property
    def lenders(self) -> int:
        """The number of pictures that others read."""
        return self.frames if self.anchors is None else min(self.anchors, self.frames)

    @property
    def inert(self) -> bool:
        return self.strength == 0 or self.dropout == 1 or self.frames == 1

    @property
    def finds_words(self) -> bool:
        return bool(self.words)

    def where_for(self, sites: Sequence[Site]) -> Where:
        heads: dict[int | str, tuple[int, ...]] = {
            site.name: chosen for site, chosen in self.where.select(sites, ("joint", "self")).items()
        }
        if not self.words:
            return Where(heads=heads, steps=self.where.steps)
        watched = map_sites(sites)
        if not watched:
            raise SteeringError("words= are found in cross-attention, which this model does not have: give masks=.")
        steps = "all" if self.where.steps == slice(1, None) else self.where.steps
        return Where(heads=heads | {site.name: tuple(range(site.heads)) for site in watched}, steps=steps)

    # ---- around the steps --------------------------------------------------------------------------------------------
    def plain_first(self, moment: Moment) -> bool:
        first = 1 if self.words else 0  # the first step is watched and shares nothing
        return self.queries is not None and first <= moment.index <= moment.total // 10

    def note(self, call: AttentionCall, moment: Moment) -> None:
        if call.site.kind != "cross" and self.queries is not None:
            first, last = self.queries
            weight = first + (last - first) * moment.index / max(1, moment.total // 10)
            call.state["plain"] = call.q, torch.full((1, call.site.heads), weight, device=call.q.device)

    def after_step(self, states: Mapping[Site, dict[str, Any]], end: StepEnd) -> None:
        for state in states.values():
            state.pop("plain", None)
        if self.words:
            refresh(states, end, tuple((word,) for word in self.words), self.frames, self.lenders, self.window)

    # ---- edits -------------------------------------------------------------------------------------------------------
    def react(self, call: AttentionCall) -> Reaction:
        if call.site.kind == "cross":
            look(call)
            return None
        subjects = self._subjects(call)
        if subjects is None:
            return None
        tokens, subject = subjects
        device = call.q.device
        step = 0 if call.step is None else call.step
        frame = torch.arange(self.lenders, device=device)[:, None]
        image = picture(call)
        n = image.stop - image.start
        remains = subject & kept(1 - self.dropout, self.seed, step, n, frame, tokens, device=device)
        read = [[j for j in range(self.lenders) if j != i] for i in range(self.frames)]
        weight = torch.full((1, call.site.heads), float(self.strength), device=device)
        whole = self.masks is None and not self.words
        shared = share(call, self.frames, read, remains, weight, None if whole else tokens)
        return (Replace(*call.state["plain"]), shared) if "plain" in call.state else shared

    def _subjects(self, call: AttentionCall) -> tuple[Tensor, Tensor] | None:
        """The subject tokens of every anchor, ``(anchors, m)`` or ``(sets, anchors, m)`` where they come from masks or
        words, and which of these entries are real; None where nothing is known yet."""
        image, device = picture(call), call.q.device
        if self.words:
            if call.spans is not None and call.spans.grid is not None:
                call.state["grid"] = call.spans.grid
            return call.state.get("subjects")
        if self.masks is None:
            every = torch.arange(image.stop - image.start, device=device).expand(self.lenders, -1)
            return every, torch.ones_like(every, dtype=torch.bool)
        if "subjects" not in call.state:
            if call.spans is None or call.spans.grid is None:
                raise SteeringError(f"The image grid is unknown at {call.site.name!r}, so masks cannot be laid on it.")
            tokens, real = subject_tokens(self.masks.cpu()[:, None], call.spans.grid, self.lenders)
            call.state["subjects"] = tokens.to(device), real.to(device)
        return call.state["subjects"]
