"""Does SoftPAG help the embedded picture model? Two-object prompts, judged, plain against several settings.

    OMP_NUM_THREADS=2 python benchmarks/two_objects.py --log benchmarks/logs/two-objects.json

The judge is that of ``attnsteer.world.evaluate``: lenient, and not independent of world-llava. ``extra`` counts
categories that it reads without being asked for, a sign of clutter. Same prompts, same initial noise in every setting.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from overhead import environment

import attnsteer
from attnsteer import Where
from attnsteer.processors import SoftPAG
from attnsteer.world import assets
from attnsteer.world.evaluate.pictures import Judge, prompts

SETTINGS = [None] + [SoftPAG(Where(layers=pair), strength=0.5, scale=2.0) for pair in ([2, 3], [4, 5], [5, 6])]
BATCH = 28


def score(
    pipe: Any, judge: Judge, wanted: list[tuple[str, set[str]]], guidance: float, method: Any
) -> dict[str, float]:
    """Shares of pictures with both objects and of objects found, and unasked categories a picture."""
    pictures = []
    with attnsteer.attach(pipe, method) if method else nullcontext():
        for first in range(0, len(wanted), BATCH):
            part = [prompt for prompt, _ in wanted[first : first + BATCH]]
            noise = [torch.Generator().manual_seed(1000 + first + i) for i in range(len(part))]
            call = {"num_inference_steps": 16, "guidance_scale": guidance, "max_sequence_length": 1}
            pictures += pipe(part, generator=noise, **call).images
    seen = [(asked, set(found)) for (_, asked), found in zip(wanted, judge(pictures), strict=True)]
    return {
        "both": sum(asked <= found for asked, found in seen) / len(seen),
        "found": sum(len(asked & found) for asked, found in seen) / sum(len(asked) for asked, _ in seen),
        "extra": sum(len(found - asked) for asked, found in seen) / len(seen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-category", type=int, default=4, help="prompts for each category (default: 4)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--log", type=Path, default=None, help="write everything as JSON")
    args = parser.parse_args()
    from diffusers import StableDiffusion3Pipeline

    folder = assets.path("models/world-sd3")
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    judge, wanted = Judge(assets.path("models/world-llava")), prompts(args.per_category, 2)
    results = []
    for guidance in args.guidance:
        for method in SETTINGS:
            name = "plain" if method is None else f"SoftPAG layers {method.where.layers}"
            row = {"guidance": guidance, "method": name, **score(pipe, judge, wanted, guidance, method)}
            results.append(row)
            print(f"guidance {guidance:g}  {name:22s} both {row['both']:.3f}  found {row['found']:.3f}"
                  f"  extra {row['extra']:.3f}  ({len(wanted)} pictures)", flush=True)  # fmt: skip
    if args.log:
        args.log.parent.mkdir(parents=True, exist_ok=True)
        args.log.write_text(json.dumps({**environment("cpu"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
