"""CARVE: find what a question is about by contrast with a general prompt, black out the rest, magnify, ask again.

Ge et al., "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning", 2025, arXiv 2509.06461 (v2).

    A[t,l] = mean over heads of the last query's probabilities on the image tokens, in pass t and layer l
    S      = sum_t t  sum_l  A_Q[t,l] / (A_G[t,l] + lambda)      Q: the question, G: "Write a general description ..."
    M      = the strongest connected regions of { S >= percentile 100 (1 - keep) }, in pixels
    answer = model([picture, crop of M, black outside, magnified], question)

Attention is only read. Q and G are rows of one batch with one vision encoding; the last query's row is computed beside
the fused kernel at the chosen layers (``attnsteer.looking``). Cost: a greedy answer of ``max_new_tokens`` for Q and G
together, then the final one with twice the image tokens. G depends on the picture alone: share ``GeneralLooks``.

Left open by the paper, parameters here: lambda (the code has 1e-8, which does nothing on real maps), whether the final
call sees both pictures (the code) or the refined one (Algorithm 1), and for ``steps="end"`` how the last passes of Q
and G pair: here each its own last. The released code has "all" and "first".
Limits: questions about the whole picture (counting, relations, captions) can get worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image

from attnsteer.around import Encodings, batch, covered_area, greedy, words
from attnsteer.attach import sites
from attnsteer.errors import SteeringError
from attnsteer.looking import GeneralLooks, Look, Magnified, look_with_general
from attnsteer.processor import Processor, check_choice, check_integer, check_number
from attnsteer.regions import (
    bounding_box,
    brightest,
    contrast_over_steps,
    covered,
    magnified,
    strongest_regions,
    to_pixels,
)
from attnsteer.site import Site
from attnsteer.where import Where

GENERAL = "Write a general description of the image."
SUFFIX = " Answer the question using a single word or phrase."


@dataclass(frozen=True)
class CARVE(Processor):
    """Ask a vision-language model again with the part of the picture that matters.

    ``CARVE().answer(model, hf_processor, picture, question).answer``; it is not attached.

    Args:
        where: layers and heads to read. None takes the paper's layers 20 to 25 in models of 28 to 40 layers; in others
            those at 0.6 to 0.8 of the depth (ours).
        lam: lambda >= 0. Code: 1e-8; the paper gives no value.
        steps: ``"all"`` passes of both generations, paired and weighted 1, 2, 3, ... (code); ``"first"``, which is
            before the first word; ``"end"``, the last of each (the paper's best).
        keep: share of the pixels above the threshold, of those that the model sees, in (0, 1]. Code: 0.2; the paper's
            best is 0.2 to 0.6.
        regions: at least so many connected regions are kept (of n the best ``max(regions, int(n keep))``). Code: 3.
        final_images: ``"both"`` pictures in the final call, or ``"refined"`` alone for models of one picture.
        max_new_tokens: of every generation. Code: 32.
        general: the general instruction.
        suffix: behind the question and the general instruction, in all calls.
    """

    where: Where | None = None  # type: ignore[assignment]
    lam: float = 1e-8
    steps: str = "all"
    keep: float = 0.2
    regions: int = 3
    final_images: str = "both"
    max_new_tokens: int = 32
    general: str = GENERAL
    suffix: str = SUFFIX

    kinds: ClassVar = ("causal",)
    reads_only: ClassVar = True
    call: ClassVar[str] = "CARVE(...).answer(model, hf_processor, picture, question)"

    def __post_init__(self) -> None:
        check_number(self, "lam", 0)
        check_number(self, "keep", 1e-6, 1)
        check_integer(self, "regions", 1)
        check_integer(self, "max_new_tokens", 1)
        check_choice(self, "steps", ("all", "first", "end"))
        check_choice(self, "final_images", ("both", "refined"))
        if self.where is not None and self.where.steps != "all":
            raise SteeringError(f"CARVE chooses passes by steps=, not by where.steps={self.where.steps!r}.")

    def where_for(self, sites: Sequence[Site]) -> Where:
        return Where(layers=paper_layers(sites)) if self.where is None else self.where

    def answer(
        self,
        model: torch.nn.Module,
        hf_processor: Any,
        picture: Image.Image,
        question: str,
        template: str | None = None,
        memory: GeneralLooks | None = None,
        limit: int | None = None,
    ) -> Magnified:
        """The answer to one question about a picture; see ``answers``."""
        return self.answers(model, hf_processor, [picture], [question], template, memory, limit)[0]

    def answers(
        self,
        model: torch.nn.Module,
        hf_processor: Any,
        pictures: Sequence[Image.Image],
        questions: Sequence[str],
        template: str | None = None,
        memory: GeneralLooks | None = None,
        limit: int | None = None,
    ) -> list[Magnified]:
        """Question n about picture n, all in one batch (two: the maps, then the answers).

        Args:
            model: a vision-language model of transformers to which nothing is attached.
            hf_processor: its Hugging Face processor.
            pictures: the same picture may come several times: it is encoded once, and described once.
            template: a prompt typed by hand, e.g. ``"USER: <image>\\n{question} ASSISTANT:"``, in place of the chat
                template.
            memory: general maps of earlier calls.
            limit: most tokens of the final answer, where it differs from ``max_new_tokens``.

        Raises:
            SteeringError: families whose image tokens have no known grid; says why.
        """
        where = self.where_for(sites(model))
        pictures, asked = [p.convert("RGB") for p in pictures], [question + self.suffix for question in questions]
        passes = 1 if self.steps == "first" else self.max_new_tokens
        general, encodings = self.general + self.suffix, Encodings()
        looks = look_with_general(
            model, hf_processor, pictures, asked, general, where, passes, template, memory, encodings
        )
        found = [
            self.refine(picture, own, other, covered_area(hf_processor, picture.size))
            for picture, own, other in zip(pictures, *looks, strict=True)
        ]
        final = [(p, f[0]) if self.final_images == "both" else (f[0],) for p, f in zip(pictures, found, strict=True)]
        said = greedy(
            model, batch(model, hf_processor, final, asked, template, encodings), limit or self.max_new_tokens
        )
        return [Magnified(words(hf_processor, tokens), tokens, *f) for tokens, f in zip(said, found, strict=True)]

    def refine(
        self, picture: Image.Image, question: Look, general: Look, area: Sequence[float] | None = None
    ) -> tuple[Any, ...]:
        """The refined picture, its box, the heat map S, the mask M and the map on the grid, from what was looked at.

        Where the model sees an ``area`` of the picture alone, the mask is chosen inside it (ours).
        """
        attention = contrast_over_steps(question.maps, general.maps, self.lam, self.steps)  # type: ignore[arg-type]
        heat = to_pixels(attention, picture.size, area)
        seen = None if area is None else covered(picture.size, area)
        mask = strongest_regions(heat, brightest(heat, self.keep, seen), self.regions, self.keep)
        return magnified(picture, mask), bounding_box(mask), heat, mask, attention


def paper_layers(sites: Sequence[Site]) -> list[int]:
    """20 to 25 where there are 28 to 40 layers, else 0.6 to 0.8 of the depth."""
    total = 1 + max((site.layer for site in sites), default=0)
    if 28 <= total <= 40:
        return list(range(20, 26))
    first = min(round(0.6 * total), total - 1)
    return list(range(first, max(first, int(0.8 * total)) + 1))
