"""Consistent self-attention: the pictures of a story also attend to random tokens of each other.

Paper: "StoryDiffusion: Consistent Self-Attention for Long-Range Image and Video Generation", Zhou et al., NeurIPS 2024,
arXiv 2405.01434; the form of the authors' low-memory application.

Of each picture j a random set S_j of tokens is lent, every token with probability ``rate``, drawn anew in each step and
for each resolution, the same in all layers::

    picture i:  softmax over [ own keys | keys of S_j of every other picture j ]

All queries of a picture see the same keys. In each layer and step a coin decides whether this happens at all (with
probability 0.7, from step 20 on 0.9). Only the first ``writers`` pictures lend tokens; the others read theirs alone,
as the authors' later pictures read a bank. The first step is plain.

Fused: one call per picture that is read and one for the log-sum-exp of the own keys, merged; no map over several
pictures. Cost per chosen layer: 1 + (pictures read) more calls of the size of the own one; tokens that are not lent are
masked, not skipped. In joint attention (our extension) image queries read image keys, text takes no part.
Limits: everything is shared, background and style too. The authors advise 50 steps and the full resolution; the paper's
own sampling rate is unconfirmed. Draws are reproducible by seed and differ from the authors' generators. With
guidance (PAG, SoftPAG) perturbed rows read conditional ones: ``attnsteer.lending``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from attnsteer.draws import kept, uniform
from attnsteer.edits import Edit
from attnsteer.errors import SteeringError
from attnsteer.processor import Processor, check_integer, check_number
from attnsteer.site import AttentionCall, Kind
from attnsteer.stories import picture, share
from attnsteer.where import Where


@dataclass(frozen=True)
class ConsistentSelfAttention(Processor):
    """StoryDiffusion (arXiv 2405.01434).

    Args:
        where: layers, heads and steps; default: self-attention of a UNet's up blocks, all steps but the first.
        frames: pictures of one story: rows of the batch in contiguous blocks of this many prompts.
        writers: how many of them, from the first on, lend tokens; None: all. Authors: 1 to 4.
        rate: probability of a token to be lent. Authors: 0.5.
        skip: probability that a layer stays plain in a step, before ``change`` and from then on. Authors: 0.3, 0.1.
        change: the step at which the probability changes. Authors: 20.
        strength: factor on the weights of lent keys before renormalisation, >= 0; 0 is off. Authors: 1.
        seed: of all draws; stories of one batch draw alike.

    Raises:
        SteeringError: a value outside its range.
    """

    where: Where = Where("up_blocks*.attn1", steps=slice(1, None))
    frames: int = 4
    writers: int | None = None
    rate: float = 0.5
    skip: tuple[float, float] = (0.3, 0.1)
    change: int = 20
    strength: float = 1.0
    seed: int = 0

    kinds: ClassVar[tuple[Kind, ...]] = ("joint", "self")
    reads_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer(self, "frames", 1)
        if self.writers is not None:
            check_integer(self, "writers", 1, self.frames)
        check_number(self, "rate", 0, 1)
        check_number(self, "strength", 0)
        check_integer(self, "change")
        check_integer(self, "seed")
        if len(self.skip) != 2 or not all(isinstance(p, (int, float)) and 0 <= p <= 1 for p in self.skip):
            raise SteeringError(f"ConsistentSelfAttention(skip={self.skip!r}): give two probabilities from 0 to 1.")

    @property
    def inert(self) -> bool:
        return self.strength == 0 or self.rate == 0 or self.frames == 1 or self.skip == (1, 1)

    def react(self, call: AttentionCall) -> Edit:
        writers, device = range(self.writers or self.frames), call.q.device
        image = picture(call)
        n, step = image.stop - image.start, 0 if call.step is None else call.step
        frame, token = torch.arange(self.frames, device=device), torch.arange(n, device=device)
        lent = kept(self.rate, self.seed, step, n, frame[:, None], token, device=device)
        read = [[j for j in writers if j != i] for i in range(self.frames)]
        phase = (frame - len(writers) + 1).clamp(min=0)  # pictures that write share a coin, readers come one by one
        coin = uniform(self.seed, step, call.site.index, phase, n + 1, device=device)
        late = torch.as_tensor(step, device=device) >= self.change
        on = coin >= torch.where(late, self.skip[1], self.skip[0])
        weight = torch.where(on, self.strength, 0.0)[:, None].expand(-1, call.site.heads)
        return share(call, self.frames, read, lent, weight)
