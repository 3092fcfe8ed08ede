"""PAG and SoftPAG in one layer: attnsteer, which forks there, against diffusers' PAG pipelines and itself unforked.

    python benchmarks/speed/guidance.py --log
    python benchmarks/speed/guidance.py --model sd15 sdxl sd3 --steps 10 --device cuda --dtype bfloat16 --log

The layer is the middle one: the UNets' mid block beside classifier-free guidance, layer 12 of SD3 without it. Perturbed
rows need what comes before it no second time. Of a fraction f of the forward, counted in FLOPs, a step costs 3 - f rows
in place of 2 (or 2 - f in place of 1). Aims: at most 1.03 times this bound; at most 0.9 of diffusers' time on SDXL and
0.75 on SD3; no more memory than the plain model takes for as many rows (3 %).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import measure
import models
import torch
from measure import Ratio
from torch.utils.flop_counter import FlopCounterMode

import attnsteer
from attnsteer import Where
from attnsteer.fork import stages_before
from attnsteer.hosts import denoisers
from attnsteer.processors import PAG, SoftPAG

FASTER = {"sdxl": 0.9, "sd3": 0.75}
"""At most this of diffusers' time is aimed at."""
UNGUIDED = ("sd3", "world-sd3")


# ---- the peers -------------------------------------------------------------------------------------------------------
def pag_pipeline(pipe: Any, layer: str) -> Any:
    """diffusers' PAG pipeline of the same components, perturbing one layer."""
    from diffusers import StableDiffusion3PAGPipeline, StableDiffusionPAGPipeline, StableDiffusionXLPAGPipeline

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "StableDiffusionPipeline": (StableDiffusionPAGPipeline, {"requires_safety_checker": False}),
        "StableDiffusionXLPipeline": (StableDiffusionXLPAGPipeline, {"add_watermarker": False}),
        "StableDiffusion3Pipeline": (StableDiffusion3PAGPipeline, {}),
    }
    kind, more = kinds[type(pipe).__name__]
    parts = {n: p for n, p in pipe.components.items() if type(pipe).__name__ != "StableDiffusion3Pipeline" or p}
    made = kind(**parts, pag_applied_layers=[layer], **more)
    made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def unforked() -> Iterator[None]:
    """Inside, perturbed rows are computed from the first stage on."""
    with mock.patch("attnsteer.hosts.diffusion.why_no_fork", return_value="this is the peer that does not fork"):
        yield


def without_fork(run: Callable[[], Any]) -> Callable[[], Any]:
    def whole() -> Any:
        with unforked():
            return run()

    return whole


# ---- the bound -------------------------------------------------------------------------------------------------------
def attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Of the CPU's fused attention, which torch does not count."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (width + v[-1])


def flops(run: Callable[[], Any], model: Any, stages: list[str]) -> tuple[int, int]:
    """All FLOPs of a run, and those inside these stages of the denoiser."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: attention_flops}) as counter:
        run()
    by_name = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    return counter.get_total_flops(), sum(by_name.get(f"{type(model).__name__}.{name}", 0) for name in stages)


def shared(pipe: Any, paint: Callable[[], Any], where: Where) -> float:
    """The fraction of the plain forward, in FLOPs, that comes before the selected layer."""
    model = models.denoiser(pipe)
    family = denoisers.family_of(model)
    assert family is not None
    names = [site.name for site in where.select(attnsteer.sites(pipe), ("self", "joint"))]
    before = [name for name, _ in stages_before(denoisers.stages(model, family), names)]
    with torch.no_grad():
        total, early = flops(paint, model, before)
    return early / total


# ---- the measurement -------------------------------------------------------------------------------------------------
def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, repeats=3)
    models.options(parser, "sd15 sdxl sd3", steps=1, scale=0.125, size=512)
    given = parser.parse_args(arguments)
    if any("flux" in name for name in given.model):
        parser.error("--model: diffusers has no PAG pipeline for FLUX.")
    return [measured(name, given) for name in given.model]


def middle(pipe: Any) -> tuple[Where, str]:
    """The layer in the middle, for attnsteer and for diffusers."""
    if hasattr(pipe, "unet"):
        return Where(layers="mid_block*attn1"), "mid"
    layer = len(pipe.transformer.transformer_blocks) // 2
    return Where(layers=layer), f"blocks.{layer}"


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    pipe, size, settings = models.from_options(name, given)
    guidance = 1.0 if name in UNGUIDED else 5.0
    rows = 1 if guidance == 1 else 2
    where, layer = middle(pipe)
    plain = models.painter(pipe, size, given.steps, guidance)
    fraction = shared(pipe, models.painter(pipe, size, 1, guidance), where)
    peer = models.painter(pag_pipeline(pipe, layer), size, given.steps, guidance, pag_scale=3.0)
    pag = models.steered(plain, pipe, PAG(where, variant="image_logit" if "sd3" in name else "full"))
    cases = {
        "plain": plain,
        "PAG": pag,
        "SoftPAG": models.steered(plain, pipe, SoftPAG(where, strength=0.5)),
        "PAG, unforked": without_fork(pag),
        "PAG of diffusers": peer,
        "plain, a row more": models.painter(pipe, size, given.steps, rows=rows + 1),
    }
    bound = (rows + 1 - fraction) / rows
    ratios = [
        *(Ratio(case, "plain", most=round(1.03 * bound, 4)) for case in ("PAG", "SoftPAG")),
        Ratio("PAG", "PAG of diffusers", most=FASTER.get(name)),
        Ratio("PAG", "PAG, unforked"),
        *(Ratio(case, "plain, a row more", most=1.03, what="memory") for case in ("PAG", "SoftPAG")),
        Ratio("PAG of diffusers", "plain, a row more", what="memory"),
    ]
    settings |= {"layer": layer, "rows": rows, "guidance": guidance, "f": round(fraction, 4), "bound": round(bound, 4)}
    notes = [f"Bound: {rows + 1} - f rows for {rows}, f = {fraction:.3f} of the FLOPs come before the layer."]
    return measure.report(f"guidance-{name}", given, cases, ratios, settings, notes)


if __name__ == "__main__":
    main()
