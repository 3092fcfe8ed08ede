"""IR-Diffusion with three subjects in the attention layers of SDXL: attnsteer against explicit maps.

    python benchmarks/speed/sharing.py --log
    python benchmarks/speed/sharing.py --device cuda --dtype bfloat16 --log

What is timed are the attention calls of one denoising step, 70 self and 70 cross (on a CPU every tenth layer, at a
fifth of the heads), in a batch of three references and the scene, unconditional and conditional. The peer does what
reference implementations do: maps of all rows in every layer, for the scene one more over the keys of all pictures,
with masks; keys of the subjects resized into place. A second peer is what one writes who knows fused kernels: the same
joint softmax of the scene with a dense mask. Both make their masks once. Aims: at most 0.25 times the time of explicit
maps; memory linear in the number of tokens (5 %).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import measure
import models
import torch
from measure import Ratio
from torch import Tensor
from torch.nn import functional as F

import attnsteer
from attnsteer.attend import attend
from attnsteer.draws import kept
from attnsteer.processors import IRDiffusion
from attnsteer.site import AttentionCall, Site, Spans
from attnsteer.stories import box_masks, to_grid

SUBJECTS = 3
LANES = 2
WORDS = 77
IN_REFERENCE = [(0.25, 0.15, 0.75, 0.95), (0.3, 0.3, 0.7, 0.9), (0.2, 0.25, 0.85, 0.85)]
IN_SCENE = [(0.02, 0.3, 0.32, 0.95), (0.36, 0.4, 0.64, 0.9), (0.68, 0.25, 0.98, 0.85)]
Attend = Callable[["Layer"], Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """One attention call of the model and its grid of image tokens."""

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    side: int
    state: dict[str, Any] = field(default_factory=dict)


def method(pixels: int) -> IRDiffusion:
    masks = (box_masks(boxes, (pixels, pixels)) for boxes in (IN_REFERENCE, IN_SCENE))
    return IRDiffusion(references=next(masks), scene=next(masks))


# ---- attnsteer -------------------------------------------------------------------------------------------------------
def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def steered(layer: Layer, processor: IRDiffusion) -> Tensor:
    """As the engine does it in every kernel call."""
    none, every = slice(0, 0), slice(0, None)
    image, text = (none, every) if layer.site.kind == "cross" else (every, none)
    spans = Spans(image=image, text=text, grid=(1, layer.side, layer.side))
    step = torch.zeros((), dtype=torch.long, device=layer.q.device)
    call = AttentionCall(layer.site, plain, layer.q, layer.k, layer.v, spans=spans, state=layer.state, step=step)
    return attend(call, processor.react(call))


# ---- the peers -------------------------------------------------------------------------------------------------------
class ByMaps:
    """IR-Diffusion after its published description, on maps.

    Args:
        processor: its parameters.
        dense: references by the fused kernel, the scene by the fused kernel with a dense mask.
    """

    def __init__(self, processor: IRDiffusion, dense: bool = False):
        self.processor, self.dense = processor, dense
        self._masks: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, layer: Layer) -> Tensor:
        output = plain(layer.q, layer.k, layer.v) if self.dense else by_map(layer.q, layer.k, layer.v)[0]
        output = output.clone()
        for lane in range(LANES):
            first = lane * (SUBJECTS + 1)
            scene = first + SUBJECTS
            changed = self._cross if layer.site.kind == "cross" else self._joint
            output[scene] = changed(layer, list(range(first, scene)), scene, output[scene])
        return output

    def _joint(self, layer: Layer, references: Sequence[int], scene: int, output: Tensor) -> Tensor:
        """One softmax of the scene over the keys of all subjects and its own."""
        target, boxed, mask = self._masks_of(layer)
        repositioned = layer.site.layer >= (self.processor.start_layer or 0)
        count = layer.side**2
        keys, values = [layer.k[scene]], [layer.v[scene]]
        for subject, row in enumerate(references if repositioned else []):
            keys.append(self._placed(layer.k[row], boxed[subject], target[subject], layer.side))
            values.append(self._placed(layer.v[row], boxed[subject], target[subject], layer.side))
        mask = mask[None, None, :, : count * len(keys)]
        k, v = torch.cat(keys, dim=1)[None], torch.cat(values, dim=1)[None]
        q = layer.q[scene][None]
        return (plain(q, k, v, mask) if self.dense else by_map(q, k, v, mask)[0])[0]

    def _placed(self, x: Tensor, reference: Tensor, target: Tensor, side: int) -> Tensor:
        """``(H, N, D)`` of a reference: the box of its subject resized onto that of the scene, zeros elsewhere."""
        image = x.transpose(1, 2).unflatten(2, (side, side)) * reference.view(side, side)
        top, bottom, left, right = box_of(reference.view(side, side))
        a_top, a_bottom, a_left, a_right = box_of(target.view(side, side))
        box = image[..., top:bottom, left:right]
        placed = torch.zeros_like(image)
        placed[..., a_top:a_bottom, a_left:a_right] = F.interpolate(box, size=(a_bottom - a_top, a_right - a_left))
        return placed.flatten(2).transpose(1, 2)

    def _cross(self, layer: Layer, references: Sequence[int], scene: int, output: Tensor) -> Tensor:
        target = self._masks_of(layer)[0].to(output.dtype)
        q, total = layer.q[scene][None], torch.zeros_like(output)
        for subject, row in enumerate(references):
            k, v = layer.k[row][None], layer.v[row][None]
            part = plain(q, k, v) if self.dense else by_map(q, k, v)[0]
            total = total + target[subject][None, :, None] * part[0]
        share = target.sum(0)[None, :, None]
        mixed = total / share.clamp_min(1e-8)
        return torch.where(share > 0, torch.lerp(output, mixed, self.processor.mutual), output)

    def _masks_of(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """Subjects in the scene and in their references, ``(S, N)``, and the additive mask of the scene,
        ``(N, (1 + S) N)``; made once for each size."""
        if layer.side not in self._masks:
            grid, device, processor = (1, layer.side, layer.side), layer.q.device, self.processor
            assert processor.scene is not None and processor.references is not None
            target, reference = (to_grid(x, grid).to(device) for x in (processor.scene, processor.references))
            apart = target.float().T @ (~target).float() > 0  # the query is in a subject in which the key is not
            hidden = [apart & target.any(0)[None]]
            token, subject = torch.arange(layer.side**2, device=device), torch.arange(SUBJECTS, device=device)[:, None]
            gate = target & kept(1 - processor.dropout, processor.seed, 0, len(token), subject, token, device=device)
            for s in range(SUBJECTS):
                there = self._placed(reference[s].float()[None, :, None], reference[s], target[s], layer.side) > 0
                hidden.append(~(gate[s][:, None] & there[0, :, 0][None]))
            mask = torch.zeros(len(token), len(token) * (1 + SUBJECTS), device=device, dtype=layer.q.dtype)
            self._masks[layer.side] = target, reference, mask.masked_fill(torch.cat(hidden, dim=1), -torch.inf)
        return self._masks[layer.side]


def by_map(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output and the map that it is made with."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    weights = (logits if mask is None else logits + mask).softmax(dim=-1)
    return weights @ v, weights


def box_of(mask: Tensor) -> tuple[int, int, int, int]:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


# ---- the measurement -------------------------------------------------------------------------------------------------
def layers_of(pixels: int, scale: float, device: str, dtype: str) -> list[Layer]:
    """The attention calls of a step of SDXL, with random queries, keys and values, one set for each size."""
    with models.made_as("meta", torch.float32):
        sites = attnsteer.sites(models.sdxl_unet(models.scaled(5, scale)))
    rows = LANES * (SUBJECTS + 1)
    known: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
    found = []
    generator = torch.Generator().manual_seed(0)
    for site in sites:
        assert site.level is not None
        side = pixels // 8 // 2**site.level
        keys = WORDS if site.kind == "cross" else side**2
        if (keys, side) not in known:
            shapes = [(rows, site.heads, count, site.head_dim) for count in (side**2, keys, keys)]
            q, k, v = (torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)) for shape in shapes)
            known[keys, side] = q, k, v
        q, k, v = known[keys, side]
        found.append(Layer(site, q, k, v, side))
    return found


def through(layers: Sequence[Layer], attention: Attend) -> Callable[[], None]:
    """A run of all these layers."""

    def run() -> None:
        for layer in layers:
            attention(layer)

    return run


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = measure.parser(__doc__, repeats=3)
    models.options(parser, "sdxl", steps=1, scale=0.2, size=1024)
    parser.add_argument("--every", type=int, help="measure each so many layers (default: 1 on a GPU, 10 on a CPU)")
    given = parser.parse_args(arguments)
    if given.model != ["sdxl"] or given.steps != 1:
        parser.error("The layers of one step of sdxl are measured: no other --model and --steps.")
    return measured(given)


def measured(given: argparse.Namespace) -> dict[str, Any]:
    small, pixels = given.small if given.device == "cpu" else (1.0, 1024)
    scale, pixels = given.scale or small, given.size or pixels
    processor = method(pixels)
    every = given.every or (10 if given.device == "cpu" else 1)
    # the middle of each group: at either resolution, and behind start_layer, as large a part as of all layers
    chosen = range(every // 2, 70, every)
    layers = [x for x in layers_of(pixels, scale, given.device, given.dtype) if x.site.layer in chosen]
    ways: dict[str, Attend] = {
        "plain": lambda layer: plain(layer.q, layer.k, layer.v),
        "IR-Diffusion": lambda layer: steered(layer, processor),
        "explicit maps": ByMaps(processor),
        "dense mask": ByMaps(processor, dense=True),
    }
    cases = {name: through(layers, way) for name, way in ways.items()}
    ratios = [
        Ratio("IR-Diffusion", "explicit maps", most=0.25),
        Ratio("IR-Diffusion", "dense mask"),
        Ratio("IR-Diffusion", "plain"),
    ]
    few, many = (layers_of(size, scale, given.device, given.dtype)[-2:-1] for size in (pixels // 2, pixels))
    for name, aim in (("IR-Diffusion", 4.2), ("explicit maps", None)):
        cases |= {f"{name}, a layer of {part[0].side ** 2} tokens": through(part, ways[name]) for part in (few, many)}
        one, four = list(cases)[-2:]
        ratios.append(Ratio(four, one, most=aim, what="memory"))
    settings = {"model": "sdxl", "pixels": pixels, "scale": scale, "subjects": SUBJECTS, "rows": len(layers[0].q)}
    settings["layers"] = len(chosen)
    return measure.report("sharing-sdxl", given, cases, ratios, settings)


if __name__ == "__main__":
    main()
