"""``attnsteer sites``: what there is to steer in a model, and what a configuration would do to it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from . import models
from .options import add_model, add_processors, command, processors


def add(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "sites",
        run,
        "List the attention sites of a model; with a processor or --explain also what it would do. Loads no weights.",
        [
            "sites world-sd3",
            "sites world-llava --processor VHR --param alpha=1.5",
            "sites stabilityai/stable-diffusion-3-medium-diffusers --explain my-steering/",
        ],
    )
    add_model(parser)
    add_processors(parser)
    parser.add_argument("--explain", dest="config", metavar="PATH", help="the same as --config")


def run(given: argparse.Namespace) -> int:
    from ..attach import sites

    wanted = processors(given)
    target, scheduler = models.shell(given.model)
    found = sites(target)
    explanation = None
    if wanted:
        from ..explain import explain

        explanation = explain(target, *wanted, scheduler=scheduler)
    if given.json:
        report: dict[str, Any] = {"model": given.model, "sites": [asdict(site) for site in found]}
        if explanation is not None:
            report["explanation"] = explanation.to_dict()
        print(json.dumps(report, indent=2, default=list))
    else:
        print(table(found))
        if explanation is not None:
            print(f"\n{explanation}")
    return 2 if explanation is not None and explanation.refused else 0


def table(found: list[Any]) -> str:
    """The sites as aligned columns."""
    rows = [("layer", "site", "kind", "heads", "kv heads", "head dim", "tokens")]
    for site in found:
        numbers = (str(site.heads), str(site.kv_heads), str(site.head_dim))
        rows.append((str(site.layer), site.name, site.kind, *numbers, " + ".join(site.order)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
