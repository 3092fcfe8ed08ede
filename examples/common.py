"""What the examples share: their options, a pipeline with its call, pictures from given noise, and the sheet of them.

The embedded models (world-sd, world-sd3) and checkpoints from the hub take the same way; only the arguments of the
pipeline's call, and the parameters that papers give for large models, are chosen to fit the embedded ones.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image

from attnsteer import Processor, Variant, run_variants, steer
from attnsteer.cli import models
from attnsteer.cli.generate import call_defaults
from attnsteer.cli.options import EMBEDDED
from attnsteer.cli.sheet import captioned_sheet


def options(about: str | None, file: str, model: str, prompt: str | list[str]) -> argparse.ArgumentParser:
    """The options of an example; a list of prompts is a story, one prompt is painted from several seeds."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model, help=f"embedded model, folder or hub id (default: {model})")
    if isinstance(prompt, str):
        parser.add_argument("--prompt", default=prompt)
        parser.add_argument("--num-seeds", type=int, default=2, help="pictures of each kind")
    else:
        parser.add_argument("--prompts", nargs="+", default=prompt)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("outputs") / f"{Path(file).stem}.png")
    return parser


def setting(given: argparse.Namespace, name: str, published: Any) -> Any:
    """The published value of a parameter, or for the small embedded models the one that fits them."""
    return EMBEDDED.get(given.model, {}).get(name, published)


def load(given: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline and the arguments of its call."""
    logging.set_verbosity_error()
    pipe, _ = models.load(given.model, given.device, given.dtype)
    return pipe, call_defaults(given.model, pipe) | {"num_inference_steps": given.num_steps}


def compare(given: argparse.Namespace, pipe: Any, call: dict[str, Any], methods: dict[str, Processor]) -> None:
    """The prompt, plain and with each method, from the same noise: a row for each, a column for each seed."""
    variants = [Variant((), "plain"), *(Variant((method,), name) for name, method in methods.items())]
    seeds = range(given.seed, given.seed + given.num_seeds)
    rows: dict[str, list[Image.Image]] = {variant.name: [] for variant in variants}
    for variant, _, picture in run_variants(pipe, given.prompt, variants=variants, seeds=seeds, progress=True, **call):
        rows[variant.name].append(picture)
    show(given, rows, [f"seed {seed}" for seed in seeds])


def generators(given: argparse.Namespace) -> list[torch.Generator]:
    """The noise of each picture of a story."""
    return [torch.Generator().manual_seed(given.seed + number) for number in range(len(given.prompts))]


def tell(
    given: argparse.Namespace, pipe: Any, call: dict[str, Any], method: Processor | None = None
) -> list[Image.Image]:
    """The pictures of a story, in one batch."""
    with steer(pipe, method) if method else nullcontext():
        return pipe(given.prompts, generator=generators(given), **call).images


def show(given: argparse.Namespace, rows: dict[str, list[Image.Image]], titles: list[str]) -> None:
    """Write the sheet and say where it is."""
    captioned = [(p, f"{name}, {title}") for name, row in rows.items() for p, title in zip(row, titles, strict=True)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    captioned_sheet(captioned, len(titles), min(512, max(176, captioned[0][0].width))).save(given.out)
    print(given.out)
