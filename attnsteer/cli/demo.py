"""``attnsteer demo``: the main job on the embedded models, with pictures, answers and times."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from ..chat import question_inputs
from . import models
from .generate import call_defaults
from .options import command, positive

BATCH = 16
"""Pictures to ask about at a time."""
PROMPTS = (
    "a dog and a car on a blue background",
    "a cat and a pizza on a green background",
    "a bird and a clock on a yellow background",
)


def add(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "demo",
        run,
        "Steer the embedded models: pictures with and without SoftPAG, answers with and without VHR.",
        ["demo", "demo --num-seeds 2 --out somewhere/"],
    )
    parser.add_argument("--num-seeds", type=positive, default=4, help="pictures for each prompt (default: 4)")
    parser.add_argument("--num-steps", type=positive, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--num-scenes", type=positive, default=64, help="pictures to ask about (default: 64)")
    parser.add_argument("--out", default="outputs/demo", metavar="FOLDER", help="for the PNGs (default: outputs/demo)")


def run(given: argparse.Namespace) -> int:
    from PIL import Image

    from .sheet import side_by_side

    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    say: Callable[[str], None] = (lambda text: None) if given.json else print
    report: dict[str, Any] = {"pictures": pictures(given, folder, say), "answers": answers(given, folder, say)}
    report["file"] = str(folder / "demo.png")
    side_by_side([Image.open(report[part]["file"]) for part in ("pictures", "answers")]).save(report["file"])
    say(f"{report['file']} shows both")
    if given.json:
        print(json.dumps(report, indent=2))
    return 0


# ---- pictures --------------------------------------------------------------------------------------------------------
def pictures(given: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Every prompt and seed, plain and with SoftPAG, on one sheet."""
    import torch

    from ..attach import steer
    from ..processors import SoftPAG
    from ..where import Where
    from .sheet import picture_sheet

    softpag = SoftPAG(Where(layers=[3, 4]), strength=0.5, scale=2.0)
    pipe, _ = models.load("world-sd3", given.device, given.dtype)
    pipe.set_progress_bar_config(disable=True)
    call = call_defaults("world-sd3", pipe, guidance=1.0)
    say(f"world-sd3: {len(PROMPTS)} prompts, {given.num_seeds} seeds, {given.num_steps} steps, {_brief(softpag)}")

    def paint(prompt: str, steered: bool) -> list[Any]:
        with steer(pipe, softpag) if steered else nullcontext():
            return pipe(
                [prompt] * given.num_seeds,
                num_inference_steps=given.num_steps,
                generator=[torch.Generator().manual_seed(given.seed + i) for i in range(given.num_seeds)],
                **call,
            ).images

    jobs = [(prompt, steered) for prompt in PROMPTS for steered in (False, True)]
    pipe([PROMPTS[0]], num_inference_steps=1, **call)  # the first call is slower
    rows, seconds = _timed(jobs, lambda job: paint(*job), "pictures", given.json)
    file = folder / "softpag.png"
    labels = [f"{'SoftPAG' if steered else 'plain'}: {prompt}" for prompt, steered in jobs]
    picture_sheet(rows, [f"seed {given.seed + i}" for i in range(given.num_seeds)], labels).save(file)
    return _result(file, softpag, seconds, len(PROMPTS) * given.num_seeds, "picture", say)


# ---- answers ---------------------------------------------------------------------------------------------------------
def answers(given: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Descriptions of unseen scenes, plain and with VHR: what they invent and what they miss, and some on a sheet."""
    from ..attach import steer
    from ..processors import VHR
    from ..world import text
    from ..world.evaluate.answers import description_scores, lonely, named

    vhr = VHR()
    model, processor = models.load("world-llava", given.device, given.dtype)
    scenes = [lonely(1000 * given.seed + number) for number in range(given.num_scenes)]
    say(f"world-llava: {len(scenes)} scenes without their usual company, {_brief(vhr)}")

    def describe(first: int, steered: bool) -> list[str]:
        pictures = [scene.image() for scene in scenes[first : first + BATCH]]
        inputs = question_inputs(processor, pictures, [text.DESCRIBE] * len(pictures)).to(model.device, model.dtype)
        with steer(model, vhr, processor=processor) if steered else nullcontext():
            tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        said = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [sentence.strip() for sentence in said]

    jobs = [(first, steered) for first in range(0, len(scenes), BATCH) for steered in (False, True)]
    describe(0, False)  # the first call is slower
    said, seconds = _timed(jobs, lambda job: describe(*job), "answers", given.json)
    plain, steered = (list(chain.from_iterable(said[start::2])) for start in (0, 1))
    scores = {"plain": description_scores(plain, scenes), "VHR": description_scores(steered, scenes)}
    for name, score in scores.items():
        wrong, found = 100 * score["chair_i"], 100 * score["recall"]
        say(f"  {name:5}  {wrong:.1f} % of the named objects are not there, {found:.1f} % of the objects are named")
    entries = [
        {
            "scene": text.describe(scene),
            "plain": one,
            "vhr": other,
            "invented": [sorted(named(sentence) - set(scene.categories)) for sentence in (one, other)],
        }
        for scene, one, other in zip(scenes, plain, steered, strict=True)
    ]
    file = folder / "vhr.png"
    _draw(file, scenes, entries)
    return {**_result(file, vhr, seconds, len(scenes), "answer", say), "scores": scores, "scenes": entries}


def _draw(file: Path, scenes: list[Any], entries: list[dict[str, Any]], limit: int = 6) -> None:
    """The first scenes about which either answer invents something, else the first of all; inventions are red."""
    from .sheet import answer_sheet

    chosen = [n for n, entry in enumerate(entries) if any(entry["invented"])] or list(range(len(entries)))
    shown = [(scenes[n].image(), [("plain", entries[n]["plain"]), ("VHR", entries[n]["vhr"])]) for n in chosen[:limit]]
    words = [" ".join(chain.from_iterable(entries[n]["invented"])).split() for n in chosen[:limit]]
    answer_sheet(shown, [{*some, *(word + "s" for word in some)} for some in words]).save(file)


# ---- both ------------------------------------------------------------------------------------------------------------
def _timed(
    jobs: list[tuple[Any, bool]], work: Callable[[tuple[Any, bool]], Any], what: str, silent: bool
) -> tuple[list[Any], dict[bool, float]]:
    """The results of all jobs in order, and the seconds of the plain and of the steered ones."""
    results, seconds = [], {False: 0.0, True: 0.0}
    for job in _progress(jobs, what, silent):
        start = time.perf_counter()
        results.append(work(job))
        seconds[job[1]] += time.perf_counter() - start
    return results, seconds


def _progress(jobs: list[Any], what: str, silent: bool) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(jobs, desc=what, disable=silent or not sys.stderr.isatty(), leave=False)


def _brief(processor: Any) -> str:
    parameters = processor.to_dict()["parameters"]
    return f"{type(processor).__name__}({', '.join(f'{k}={v}' for k, v in parameters.items())})"


def _result(
    file: Path, processor: Any, seconds: dict[bool, float], count: int, unit: str, say: Callable[[str], None]
) -> dict[str, Any]:
    plain, steered = seconds[False] / count, seconds[True] / count
    name = type(processor).__name__
    more = 100 * (steered / plain - 1)
    say(f"  plain {plain:.3f} s per {unit}, {name} {steered:.3f} s per {unit}: {more:+.0f} % time")
    say(f"  {file}")
    return {
        "file": str(file),
        "processor": processor.to_dict(),
        f"seconds_per_{unit}": {"plain": round(plain, 4), "steered": round(steered, 4)},
        "overhead": round(steered / plain - 1, 4),
    }
