"""ViCrop: look where the model looks, crop a square around it, ask again with the picture and the crop.

Zhang et al., "MLLMs Know Where to Look: Training-free Perception of Small Visual Details with Multimodal LLMs", ICLR
2025, arXiv 2502.17422.

    rel-att    mean_h A_Q[h, last, image] / mean_h A_G[h, last, image]         Q: the question, G: a general prompt
    grad-att   mean_h ( A[h, last, image] ReLU(dv/dA[h, last, image]) )        v = log p of the likeliest first token
    pure-grad  g_Q / g_G per pixel, g = || dv/dpixel || over colours, where the picture has edges; mean of each patch

One layer; ``last`` is the last prompt token, before the first word. Around the map's sharpest window among six sizes
(``attnsteer.regions.crop_box``) goes a square crop of the picture; the answer comes from [picture, crop].

Fused: rel-att reads one row beside the kernel; grad-att runs one token with gradient
(exact); pure-grad runs the whole prompt and the vision tower with gradient.
Layers of the paper: 14 of LLaVA-1.5-7B's 32, 22 of Qwen2.5-VL-3B's 36. rel-att is the same as CARVE's contrast of one
layer and the first pass at lambda 0. InstructBLIP is not supported: its picture passes through a Q-Former.
Open: the median filter of pure-grad (7 in the code, 3 is reported of the paper) is a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from attnsteer.around import (
    batch,
    covered_area,
    greedy,
    image_grids,
    last_row_gradients,
    patch_side,
    picture_side,
    pixel_gradients,
    row,
    words,
)
from attnsteer.attach import sites
from attnsteer.errors import SteeringError
from attnsteer.looking import GeneralLooks, Magnified, look_with_general
from attnsteer.processor import Processor, check_choice, check_integer
from attnsteer.regions import RATIOS, contrast_over_steps, crop_box, edges, tiles, to_pixels
from attnsteer.site import Site
from attnsteer.where import Where

from .carve import GENERAL, SUFFIX


@dataclass(frozen=True)
class ViCrop(Processor):
    """Ask a vision-language model again with a crop of what it looked at.

    ``ViCrop().answer(model, hf_processor, picture, question).answer``; it is not attached.

    Args:
        where: which heads the two attention maps average; layers are chosen by ``layer``.
        map: ``"rel-att"``, ``"grad-att"`` or ``"pure-grad"``.
        layer: decoder layer from 0 of the two attention maps. None takes the paper's: 14 of 32 layers, 22 of 36; in
            other depths 0.45 of it (ours).
        side: side of the smallest crop in pixels. None takes the paper's: the side of the model's pictures (LLaVA-1.5:
            336), 224 for Qwen-VL.
        ratios: sizes of the crop, as multiples of ``side``.
        high_resolution: large pictures get their map in tiles of at most about 1024 pixels (rows of tiles:
            ``ceil(H / 1024)``, so many in a row that they are nearly square), each with passes of its own. What a
            processor crops from a tile counts 0 (ours).
        final_images: ``"both"`` pictures in the final call, or ``"refined"`` alone for models of one picture (ours).
        median: of pure-grad's edges, an odd number of pixels.
        max_new_tokens: of the answer. Code: 20.
        general, suffix: the general instruction, and what stands behind it and behind the question.
    """

    map: str = "rel-att"
    layer: int | None = None
    side: int | None = None
    ratios: tuple[float, ...] = RATIOS
    high_resolution: bool = False
    final_images: str = "both"
    median: int = 7
    max_new_tokens: int = 20
    general: str = GENERAL
    suffix: str = SUFFIX

    kinds: ClassVar = ("causal",)
    reads_only: ClassVar = True
    call: ClassVar[str] = "ViCrop(...).answer(model, hf_processor, picture, question)"

    def __post_init__(self) -> None:
        check_choice(self, "map", ("rel-att", "grad-att", "pure-grad"))
        check_choice(self, "final_images", ("both", "refined"))
        check_integer(self, "max_new_tokens", 1)
        check_integer(self, "median", 1)
        if self.side is not None:
            check_integer(self, "side", 1)
        if self.where.layers != "all" or self.where.steps != "all":
            raise SteeringError("ViCrop reads one layer of the first pass: give layer=, and in where= heads alone.")
        if self.median % 2 == 0:
            raise SteeringError(f"ViCrop(median={self.median}) has no middle: give an odd number.")

    def answer(
        self,
        model: torch.nn.Module,
        hf_processor: Any,
        picture: Image.Image,
        question: str,
        short_question: str | None = None,
        template: str | None = None,
        memory: GeneralLooks | None = None,
        limit: int | None = None,
    ) -> Magnified:
        """The answer to one question about a picture.

        Args:
            model: a vision-language model of transformers to which nothing is attached.
            hf_processor: its Hugging Face processor.
            short_question: what the map is made with where it differs, e.g. without the options of a choice.
            template: a prompt typed by hand in place of the chat template.
            memory: general maps of earlier calls (rel-att).
            limit: most tokens of the answer, where it differs from ``max_new_tokens``.

        Raises:
            SteeringError: families whose image tokens have no known grid, or that a gradient map is not defined for.
        """
        picture = picture.convert("RGB")
        asked = (question if short_question is None else short_question) + self.suffix
        parts = tiles(picture) if self.high_resolution else [[picture]]
        maps = [
            [self.importance(model, hf_processor, part, asked, template, memory) for part in line] for line in parts
        ]
        if len(parts) == len(parts[0]) == 1:
            attention, area = maps[0][0], covered_area(hf_processor, picture.size)
        else:
            seen = [[covered_area(hf_processor, part.size) for part in line] for line in parts]
            attention, area = _beside(parts, maps, seen), (0, 0, *picture.size)
        box = self.box(model, attention, picture.size, area)
        crop = picture.crop(box)
        final = (picture, crop) if self.final_images == "both" else (crop,)
        rows = batch(model, hf_processor, [final], [question + self.suffix], template)
        tokens = greedy(model, rows, limit or self.max_new_tokens)[0]
        heat = to_pixels(attention, picture.size, area)
        mask = np.zeros(heat.shape, dtype=bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        return Magnified(words(hf_processor, tokens), tokens, crop, box, heat, mask, attention)

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
        """Question n about picture n, one after the other; see ``answer``."""
        return [
            self.answer(model, hf_processor, picture, question, None, template, memory, limit)
            for picture, question in zip(pictures, questions, strict=True)
        ]

    def importance(
        self,
        model: torch.nn.Module,
        hf_processor: Any,
        picture: Image.Image,
        question: str,
        template: str | None = None,
        memory: GeneralLooks | None = None,
    ) -> Tensor:
        """The map of one picture, ``(rows, columns)`` float64 on the CPU; of patches for pure-grad."""
        general, where = self.general + self.suffix, self.where_for(sites(model))
        if self.map == "rel-att":
            looks = look_with_general(model, hf_processor, [picture], [question], general, where, 1, template, memory)
            return contrast_over_steps(looks[0][0].maps, looks[1][0].maps, 0.0, "first")
        inputs = row(model, hf_processor, (picture,), question, template)
        if self.map == "grad-att":
            ((seen, slope),) = last_row_gradients(model, inputs, where)
            heads = next(iter(where.select(sites(model), self.kinds).values()))
            weighted = (seen * slope.relu())[0, list(heads)].mean(dim=0)
            ((grid,),) = image_grids(model, inputs, hf_processor, [picture])
            return weighted.cpu()[grid].double()
        other = row(model, hf_processor, (picture,), general, template)
        asked, plain = (pixel_gradients(model, given).cpu().double() for given in (inputs, other))
        left, top, right, bottom = covered_area(hf_processor, picture.size)
        shown = picture.crop((round(left), round(top), round(right), round(bottom)))
        ratio = asked / plain.clamp_min(torch.finfo(plain.dtype).tiny)
        ratio = ratio * edges(shown, (ratio.shape[1], ratio.shape[0]), self.median)
        return F.avg_pool2d(ratio[None], patch_side(model))[0]

    def box(
        self, model: torch.nn.Module, attention: Tensor, size: tuple[int, int], area: Sequence[float]
    ) -> tuple[int, int, int, int]:
        """The square crop of a picture of ``size`` whose map covers ``area``."""
        left, top, right, bottom = map(round, area)
        side = picture_side(model) if self.side is None else self.side
        box = crop_box(attention, (right - left, bottom - top), side, self.ratios)
        return (
            max(0, box[0] + left),
            max(0, box[1] + top),
            min(size[0], box[2] + left),
            min(size[1], box[3] + top),
        )

    def where_for(self, sites: Sequence[Site]) -> Where:
        layers = 1 + max((site.layer for site in sites), default=0)
        layer = {32: 14, 36: 22}.get(layers, round(0.45 * layers)) if self.layer is None else self.layer
        return Where(layers=[layer], heads=self.where.heads)


def _beside(
    parts: Sequence[Sequence[Image.Image]], maps: Sequence[Sequence[Tensor]], areas: Sequence[Sequence[Sequence[float]]]
) -> Tensor:
    """Maps of tiles as one; tiles whose maps differ in height or width are brought to those of the first."""
    whole = [
        [_over(m, tile.size, area) for tile, m, area in zip(*line, strict=True)]
        for line in zip(parts, maps, areas, strict=True)
    ]
    rows, columns = whole[0][0].shape
    same = [[F.interpolate(m[None, None], (rows, columns), mode="nearest-exact")[0, 0] for m in line] for line in whole]
    return torch.cat([torch.cat(line, dim=1) for line in same])


def _over(grid: Tensor, size: tuple[int, int], area: Sequence[float]) -> Tensor:
    """A map of an ``area`` of a tile as one of the whole tile, in cells of about the same size; 0 outside the area."""
    left, top, right, bottom = area
    across = max(1, round(size[0] * grid.shape[1] / (right - left)))
    down = max(1, round(size[1] * grid.shape[0] / (bottom - top)))
    x, y = across / size[0], down / size[1]  # cells per pixel
    return torch.from_numpy(to_pixels(grid, (across, down), (left * x, top * y, right * x, bottom * y)))
