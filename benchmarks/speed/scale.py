"""How cost grows: with the number of tokens, of variants in one batch, and of steered sites.

    python benchmarks/speed/scale.py --log                                      # all three, on a CPU
    python benchmarks/speed/scale.py --over tokens --sizes 1024 4096 --log
    python benchmarks/speed/scale.py --device cuda --dtype bfloat16 --log

* tokens: one attention call of N joint tokens with SoftPAG's edit, with a Segment of a quarter of another row's keys,
  and with Capture of four columns, beside the plain kernel. Attention is quadratic in N by itself, so what counts is
  the ratio to plain.
* variants: the same calls of 1 to 64 rows, each row with a strength of its own; attaching that many variants to a
  pipeline and to a language model, a step of the pipeline and a token of the model. Aim: nothing grows faster than
  the number of variants.
* sites: steps of SD3's layout (24 joint layers) with 0 to 24 of them steered.

``plots.py`` fits the exponent of ``time ~ size ** exponent`` and draws ``benchmarks/plots/scale-*.png`` from the logs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import measure
import models
import plots
import tellers
import torch
from measure import Ratio

import attnsteer
from attnsteer import AttentionCall, Site, Spans, Where
from attnsteer.capture import Capture
from attnsteer.edits import Mix, OwnValue, Segments
from attnsteer.processors import PAI, VHR, ConsistentSelfAttention, SoftPAG

SIZES = {
    "tokens": (1024, 4096, 16384, 65536),
    "variants": (1, 2, 4, 8, 16, 32, 64),
    "sites": (1, 2, 4, 8, 16, 24),
}
PLOTS = measure.ROOT / "benchmarks" / "plots"
PLAIN = "plain"
COLUMNS = (0, 1, 2, 3)
Run = Callable[[], Any]


# ---- one attention call ----------------------------------------------------------------------------------------------
def calls(rows: int, tokens: int, options: argparse.Namespace) -> dict[str, Run]:
    """The plain kernel, and the same call with each edit; random q, k and v."""
    device, dtype, heads, width = options.device, getattr(torch, options.dtype), options.heads, options.width
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, heads, tokens, width, generator=generator).to(device, dtype) for _ in range(3))
    kernel = torch.nn.functional.scaled_dot_product_attention
    site = Site("attn", "joint", 0, 0, heads, heads, width, ("image", "text"))
    spans = Spans(slice(0, tokens - 64), slice(tokens - 64, None))

    def call() -> AttentionCall:
        return AttentionCall(site, lambda q, k, v, mask=None: kernel(q, k, v, mask), q, k, v, spans=spans)

    strength = torch.linspace(0.1, 1.0, rows, device=device)[:, None].expand(rows, heads)
    mixed = (Mix(OwnValue(), strength),)
    lent = torch.arange(tokens // 4, device=device).expand(rows, 1, -1)
    joined = (Segments(tuple((max(row - 1, 0),) for row in range(rows)), strength, keys=lent),)
    capture = Capture(columns=COLUMNS, calls="mean")

    def captured() -> torch.Tensor:
        mine = call()
        capture.react(mine)
        return mine.output

    return {
        PLAIN: lambda: kernel(q, k, v),
        "SoftPAG": lambda: attnsteer.attend(call(), mixed),
        "Segments": lambda: attnsteer.attend(call(), joined),
        "Capture": captured,
    }


# ---- whole models ----------------------------------------------------------------------------------------------------
def pipeline_variants(options: argparse.Namespace) -> Callable[[int], dict[str, Run]]:
    """Attaching SoftPAG with as many strengths as rows, and a step of all of them."""
    pipe = models.build("world-sd3", options.device, options.dtype)

    def runs(rows: int) -> dict[str, Run]:
        variants = [SoftPAG(Where(layers=3), strength=(row + 1) / rows) for row in range(rows)]
        paint = models.painter(pipe, 64, 1, rows=rows)

        def step() -> None:
            with attnsteer.attach(pipe, variants=variants):
                paint()

        return {
            "attach to a pipeline": lambda: attnsteer.attach(pipe, variants=variants).detach(),
            "SoftPAG, a step": step,
        }

    return runs


def model_variants(options: argparse.Namespace) -> Callable[[int], dict[str, Run]]:
    """Attaching PAI and VHR in turn as rows, and two tokens of all of them."""
    teller = tellers.build("world-llava", options.device, options.dtype)

    def runs(rows: int) -> dict[str, Run]:
        variants = [PAI(alpha=(row + 1) / rows) if row % 2 else VHR(alpha=1.5 + row / rows) for row in range(rows)]
        inputs = {name: torch.cat([value] * rows) for name, value in teller.inputs.items()}

        def answer() -> None:
            with attnsteer.attach(teller.model, variants=variants):
                teller.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)

        return {
            "attach to a model": lambda: attnsteer.attach(teller.model, variants=variants).detach(),
            "VHR and PAI, two tokens": answer,
        }

    return runs


def steered_sites(options: argparse.Namespace) -> Callable[[int], dict[str, Run]]:
    """SD3's 24 layers, the first so many of them steered; the fork of SoftPAG is at the first in every case."""
    gpu = options.device == "cuda"
    pipe = models.build("sd3", options.device, options.dtype, 1.0 if gpu else 1 / 12)
    paint = models.painter(pipe, 1024 if gpu else 256, 2, rows=2)

    def steered(method: Any) -> Run:
        def run() -> None:
            with attnsteer.attach(pipe, method):
                paint()

        return run

    def runs(sites: int) -> dict[str, Run]:
        layers = list(range(sites))
        story = {"frames": 2, "rate": 0.25, "skip": (0.0, 0.0)}
        methods = {
            "SoftPAG": SoftPAG(Where(layers=layers), strength=0.5),
            "Segments": ConsistentSelfAttention(Where(layers=layers), **story),
            "Capture": Capture(Where(layers=layers), columns=COLUMNS, calls="mean"),
        }
        return {PLAIN: paint, **{name: steered(method) for name, method in methods.items()}}

    return runs


# ---- what is measured ------------------------------------------------------------------------------------------------
def sized(over: str, options: argparse.Namespace) -> Callable[[int], dict[str, Run]]:
    """For every size the curves and what to run."""
    if over == "tokens":
        return lambda size: calls(2, size, options)
    if over == "sites":
        return steered_sites(options)
    parts = (lambda size: calls(size, options.tokens, options), pipeline_variants(options), model_variants(options))
    return lambda size: {name: run for part in parts for name, run in part(size).items()}


def measured(over: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every curve at every size, in turns; ratios to plain at each size, or of the largest to the smallest."""
    sizes, runs = options.sizes or SIZES[over], sized(over, options)
    cases: dict[str, Run] = {}
    for size in sizes:
        cases |= {f"{name}, {size}": run for name, run in runs(size).items()}
    names = list(dict.fromkeys(name.rpartition(", ")[0] for name in cases))
    ratios = []
    if over == "variants":
        low, high = sizes[0], sizes[-1]
        aims = {name: None if name == PLAIN else high / low for name in names}
        ratios += [Ratio(f"{name}, {high}", f"{name}, {low}", most=most) for name, most in aims.items()]
    else:
        others = [(name, size) for name in names[1:] for size in sizes]
        ratios += [Ratio(f"{name}, {size}", f"{PLAIN}, {size}") for name, size in others]
    settings: dict[str, Any] = {"over": over, "sizes": list(sizes), "curves": names}
    if over != "sites":
        settings |= {"heads": options.heads, "head width": options.width}
        settings |= {"tokens": options.tokens} if over == "variants" else {"rows": 2}
    found = measure.report(f"scale-{over}", options, cases, ratios, settings)
    for name, points in plots.curves(found).items():
        print(f"{name}: time ~ {over} ** {plots.exponent(points):.2f}")
    if options.log is True:
        PLOTS.mkdir(exist_ok=True)
        plots.picture(found).save(PLOTS / f"scale-{over}-{options.device}.png", optimize=True)
    return found


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, repeats=3)
    add = parser.add_argument
    add("--over", choices=tuple(SIZES), action="append", help="what grows (default: all three)")
    add("--sizes", type=int, nargs="+", help="instead of the usual ones; with one --over")
    add("--tokens", type=int, default=1024, help="of the calls with many variants (default: %(default)s)")
    add("--heads", type=int, help="of the calls (default: 1 on a CPU, 24 on a GPU)")
    add("--width", type=int, help="of a head (default: 16 on a CPU, 64 on a GPU)")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.heads, options.width = options.heads or (24 if gpu else 1), options.width or (64 if gpu else 16)
    return [measured(over, options) for over in options.over or SIZES]


if __name__ == "__main__":
    main()
