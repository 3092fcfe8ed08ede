"""`python -m attnsteer.world.evaluate`: how good the world's models are, on scenes that training never saw.

python -m attnsteer.world.evaluate llava --scenes 200 --threads 1
python -m attnsteer.world.evaluate sd3 --per-category 4 --threads 1 --grid pictures.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from attnsteer.world import assets
from attnsteer.world.evaluate.answers import evaluate_llava
from attnsteer.world.evaluate.pictures import Judge, evaluate_sd3


def main(arguments: list[str] | None = None) -> int:
    """Print one JSON object with the numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m attnsteer.world.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=("llava", "sd3"))
    parser.add_argument("--folder", type=Path, help="model folder (default: the shipped one)")
    parser.add_argument("--scenes", type=int, default=200, help="llava: scenes of each kind (default: %(default)s)")
    parser.add_argument("--per-category", type=int, default=4, help="sd3: prompts per category (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="sd3: denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.0, help="sd3: guidance scale (default: %(default)s)")
    parser.add_argument("--grid", type=Path, help="sd3: write all pictures to this PNG")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own choice)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.model == "llava":
        folder = options.folder or assets.path("models/world-llava")
        report = evaluate_llava(folder, options.scenes, options.device)
    else:
        judge = Judge(assets.path("models/world-llava"), device=options.device)
        folder = options.folder or assets.path("models/world-sd3")
        report = evaluate_sd3(
            folder, judge, options.per_category, options.steps, options.guidance, options.grid, options.device
        )
    print(json.dumps({key: round(value, 4) for key, value in report.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
