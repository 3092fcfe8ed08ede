"""Does SoftPAG help the embedded picture model? Two-object prompts, judged, plain against several settings.

    OMP_NUM_THREADS=2 python benchmarks/two_objects.py --log benchmarks/logs/two-objects.json

The judge (``attnsteer.world.judge``) was trained on rendered scenes alone. The prompts are pairs that no training scene
has. ``exact`` asks for each object once and no other; ``extra`` counts categories that the judge reads without being
asked for, a sign of clutter. Same prompts, same initial noise in every setting.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from speed.measure import environment

import attnsteer
from attnsteer import Where
from attnsteer.processors import SoftPAG
from attnsteer.world import assets
from attnsteer.world.evaluate.pictures import Wish, load, paint, wishes
from attnsteer.world.judge import Judge

SETTINGS = [None] + [SoftPAG(Where(layers=pair), strength=0.5, scale=2.0) for pair in ([1, 2], [2, 3], [3, 4], [4, 5])]


def score(pipe: Any, judge: Judge, wanted: list[Wish], guidance: float, method: Any) -> dict[str, float]:
    """Shares of pictures with both objects, with exactly those, and of objects found; unasked categories a picture."""
    with attnsteer.attach(pipe, method) if method else nullcontext():
        pictures = paint(pipe, [wish.prompt for wish in wanted], 16, guidance, seed=1000)
    pairs = [(wish.scene, seen) for wish, seen in zip(wanted, judge(pictures), strict=True)]
    names = [(set(asked.categories), set(seen.categories)) for asked, seen in pairs]
    return {
        "both": sum(asked <= found for asked, found in names) / len(names),
        "exact": sum(asked.counts == seen.counts for asked, seen in pairs) / len(pairs),
        "found": sum(len(asked & found) for asked, found in names) / sum(len(asked) for asked, _ in names),
        "extra": sum(len(found - asked) for asked, found in names) / len(names),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-category", type=int, default=4, help="prompts for each category (default: 4)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--log", type=Path, default=None, help="write everything as JSON")
    args = parser.parse_args()
    pipe, judge, wanted = load(assets.path("models/world-sd3")), Judge.load(), wishes("two", args.per_category)
    results = []
    for guidance in args.guidance:
        for method in SETTINGS:
            name = "plain" if method is None else f"SoftPAG layers {method.where.layers}"
            row = {"guidance": guidance, "method": name, **score(pipe, judge, wanted, guidance, method)}
            results.append(row)
            shown = "  ".join(f"{key} {row[key]:.3f}" for key in ("both", "exact", "found", "extra"))
            print(f"guidance {guidance:g}  {name:22s} {shown}  ({len(wanted)} pictures)", flush=True)
    if args.log:
        args.log.parent.mkdir(parents=True, exist_ok=True)
        args.log.write_text(json.dumps({**environment("cpu"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
