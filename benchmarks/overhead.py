"""What steering costs: ratios of steered to plain time, measured in turns within one run.

    python benchmarks/overhead.py                               # embedded models, CPU
    python benchmarks/overhead.py --device cuda --dtype bfloat16 --log benchmarks/logs/overhead-cuda.json
    python benchmarks/overhead.py --diffusion stabilityai/stable-diffusion-3-medium-diffusers --size 1024 --device cuda

Every case is timed ``--repeats`` times in turns with its baseline, so that a slow moment hits both. The log holds the
command, versions, hardware, seeds and every raw time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import attnsteer
from attnsteer import Where
from attnsteer.chat import question_inputs
from attnsteer.edits import Mix, OwnValue
from attnsteer.processors import VHR, SoftPAG
from attnsteer.world import assets, sampling

ROOT = Path(__file__).resolve().parents[1]
"""Logs name files from here on, wherever the checkout is."""
Cases = dict[str, Callable[[], Any]]


def clock(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(cases: Cases, repeats: int, device: str) -> dict[str, list[float]]:
    """Time every case ``repeats`` times, all cases in turn, after one warm-up each."""
    for run in cases.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            times[name].append(clock(run, device))
    return times


def kernel_cases(device: str, dtype: torch.dtype) -> Cases:
    """One attention call of SD3's size at 512 pixels, bare and with SoftPAG's edit."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 24, 1024 + 77, 64, generator=generator).to(device, dtype) for _ in range(3))
    site = attnsteer.Site("attn", "joint", 0, 0, 24, 24, 64, ("image", "text"))
    weight = torch.rand(1, 24, generator=generator).to(device)
    kernel = torch.nn.functional.scaled_dot_product_attention
    edits = (Mix(OwnValue(), weight),)
    spans = attnsteer.Spans(slice(0, 1024), slice(1024, None))
    return {
        "kernel: plain": lambda: kernel(q, k, v),
        "kernel: SoftPAG edit": lambda: attnsteer.attend(
            attnsteer.AttentionCall(site, lambda a, b, c, mask=None: kernel(a, b, c), q, k, v, spans=spans), edits
        ),
    }


def diffusion_cases(pipe: Any, size: int | None, steps: int) -> Cases:
    """Pictures with the plain pipeline, with SoftPAG forked early and late, and with four variants at once."""
    shape = {"height": size, "width": size} if size else {}
    layers = 1 + max(site.layer for site in attnsteer.sites(pipe))

    def generate(*processors: Any) -> None:
        with attnsteer.attach(pipe, *processors) if processors else nullcontext():
            seed = torch.Generator().manual_seed(0)
            pipe("a dog", num_inference_steps=steps, generator=seed, output_type="latent", **shape)

    def variants(batch: int) -> None:
        wanted = [SoftPAG(Where(layers=layers // 2), strength=u) for u in (0.25, 0.5, 0.75, 1.0)]
        call = {"num_inference_steps": steps, "output_type": "latent", **shape}
        list(attnsteer.run_variants(pipe, "a dog", variants=wanted, batch_size=batch, **call))

    return {
        "pictures: plain": generate,
        "pictures: attached, strength 0": lambda: generate(SoftPAG(strength=0.0)),
        "pictures: SoftPAG, first layer": lambda: generate(SoftPAG(Where(layers=0))),
        "pictures: SoftPAG, middle layer": lambda: generate(SoftPAG(Where(layers=layers // 2))),
        "pictures: SoftPAG, last layer": lambda: generate(SoftPAG(Where(layers=layers - 1))),
        "pictures: 4 variants one by one": lambda: variants(1),
        "pictures: 4 variants in a batch": lambda: variants(4),
    }


def language_cases(model: Any, processor: Any, tokens: int) -> Cases:
    """A caption with the plain model and with VHR."""
    inputs = question_inputs(processor, [sampling.sample(0).image()], ["Please describe this image."])
    inputs = inputs.to(model.device, model.dtype)

    def generate(*processors: Any) -> None:
        with attnsteer.attach(model, *processors) if processors else nullcontext():
            model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    return {"answers: plain": generate, "answers: VHR": lambda: generate(VHR())}


def report(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median, spread and the ratio to the first case of the same group."""
    rows = []
    for name, raw in times.items():
        base = next(b for n, b in times.items() if n.split(":")[0] == name.split(":")[0])
        ratios = [a / b for a, b in zip(raw, base, strict=True)]
        rows.append({"case": name, "median_s": statistics.median(raw), "ratio": statistics.median(ratios)})
        rows[-1] |= {"ratio_min": min(ratios), "ratio_max": max(ratios), "raw_s": raw}
        print(f"{name:36s} {1e3 * rows[-1]['median_s']:9.2f} ms   x {rows[-1]['ratio']:.3f}"
              f"   ({rows[-1]['ratio_min']:.3f} to {rows[-1]['ratio_max']:.3f})")  # fmt: skip
    return rows


def environment(device: str) -> dict[str, Any]:
    import diffusers
    import transformers

    return {
        "command": " ".join(sys.argv).replace(f"{ROOT}/", ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "hardware": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor() or platform.machine()} CPU",
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusion", default=None, help="pipeline folder or hub id (default: the embedded one)")
    parser.add_argument("--language", default=None, help="model folder or hub id (default: the embedded one)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument(
        "--size", type=int, default=None, help="height and width in pixels (default: the pipeline's own)"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--log", type=Path, default=None, help="write everything as JSON")
    args = parser.parse_args()
    from diffusers import DiffusionPipeline
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = getattr(torch, args.dtype)
    painter = args.diffusion or assets.path("models/world-sd3")
    pipe = DiffusionPipeline.from_pretrained(painter, torch_dtype=dtype).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    teller = args.language or assets.path("models/world-llava")
    model = AutoModelForImageTextToText.from_pretrained(teller, dtype=dtype).to(args.device).eval()
    cases = kernel_cases(args.device, dtype) | diffusion_cases(pipe, args.size, args.steps)
    cases |= language_cases(model, AutoProcessor.from_pretrained(teller), args.tokens)
    with torch.no_grad():
        rows = report(in_turns(cases, args.repeats, args.device))
    if args.log:
        args.log.parent.mkdir(parents=True, exist_ok=True)
        args.log.write_text(json.dumps({**environment(args.device), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
