"""The pointing game on the embedded models: does a word's heat map point at the object that the word names?

    python benchmarks/pointing.py --log benchmarks/logs/pointing.json

Painters: prompts of two categories that no training scene has together; where the judge sees each once, its boxes are
the truth. Reader: unseen scenes, whose boxes are known; words of its descriptions, and the "Yes" to "Is there a ... in
the image?". A map hits where its highest token's centre lies in the word's box; wrong: in another object's box; heat:
the share of the map inside the box, which covers ``area`` of the picture. Everything by default: averages over the
layers, heads and steps that ``heat_maps`` and ``answer_maps`` read by themselves, and the same layer by layer.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from speed.measure import environment
from torch import Tensor

import attnsteer
from attnsteer import Where
from attnsteer.world import assets, text
from attnsteer.world.evaluate.answers import balanced
from attnsteer.world.evaluate.pictures import load, wishes
from attnsteer.world.judge import Judge
from attnsteer.world.scenes import SIZE, Box, Scene

PAINTERS = ("world-sd", "world-sd3", "world-flux")
BATCH = 8


class Case(NamedTuple):
    """A word's maps by layer ``(layers, h, w)``, its default map ``(h, w)``, its box and those of other objects."""

    layers: Tensor
    default: Tensor
    box: Box
    others: list[Box]


def boxes(scene: Scene, name: str) -> tuple[list[Box], list[Box]]:
    """Those of a category, and the others."""
    return [o.box for o in scene.objects if o.name == name], [o.box for o in scene.objects if o.name != name]


def painted(name: str, count: int, steps: int) -> tuple[list[Case], int]:
    """The words whose object the judge sees exactly once, and how many words there were."""
    pipe, judge, cases = load(assets.path(f"models/{name}")), Judge.load(), []
    call = assets.call(type(pipe).__name__)
    asked = wishes("two", 2)[:count]
    for first in range(0, len(asked), BATCH):
        some = asked[first : first + BATCH]
        words = [list(wish.scene.categories) for wish in some]
        seeds = [torch.Generator().manual_seed(first + i) for i in range(len(some))]
        negative = {"negative_prompt": [""] * len(some)} if "negative_prompt" in call else {}
        found: Any = attnsteer.heat_maps(
            pipe, [w.prompt for w in some], words, per="layer", generator=seeds, num_inference_steps=steps,
            **{**call, **negative},
        )  # fmt: skip
        for heat, scene in zip(found, judge([h.picture for h in found]), strict=True):
            for word in heat.words:
                own, others = boxes(scene, word)
                if len(own) == 1:
                    cases.append(Case(heat[word], heat.average()[word], own[0], others))
    return cases, 2 * len(asked)


def answered(first: int, count: int, question: str) -> tuple[list[Case], int]:
    """Objects that the answer names, of those that are there once; ``{}`` in the question asks for the first one."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, cases, asked = assets.path("models/world-llava"), [], 0
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    depth = model.config.text_config.num_hidden_layers
    for scene in map(balanced, range(first, first + count)):
        names = [n for n in scene.categories if len(boxes(scene, n)[0]) == 1]
        names = [n for n in names if n == scene.categories[0]] if "{}" in question else names
        asked += len(names)
        if not names:
            continue
        said = question.format(names[0])
        every = attnsteer.answer_maps(model, processor, scene.image(), said, per="layer", where=Where())
        for name in names:
            word = "Yes" if "{}" in question else name
            if re.search(rf"\b{word}\b", every.answer, re.IGNORECASE):
                maps = every.of(word)[word]
                (own,), others = boxes(scene, name)
                cases.append(Case(maps, maps[depth // 2 :].mean(0), own, others))  # the default, from one answer
    return cases, asked


def inside(point: tuple[float, float], box: Box) -> bool:
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]


def scores(maps: Sequence[Tensor], cases: Sequence[Case]) -> dict[str, float]:
    hits = wrong = 0
    heat = []
    for one, case in zip(maps, cases, strict=True):
        height, width = one.shape
        at = int(one.argmax())
        peak = ((at % width + 0.5) / width * SIZE, (at // width + 0.5) / height * SIZE)
        hits += inside(peak, case.box)
        wrong += any(inside(peak, box) for box in case.others)
        left, top, right, bottom = case.box
        wide = one.repeat_interleave(SIZE // height, 0).repeat_interleave(SIZE // width, 1)
        heat.append(float(wide[top:bottom, left:right].sum() / wide.sum()))
    return {"hits": hits, "wrong": wrong, "words": len(cases), "heat": sum(heat) / len(heat)}


def rows(what: str, cases: Sequence[Case], asked: int) -> Iterator[dict[str, Any]]:
    area = sum((c.box[2] - c.box[0]) * (c.box[3] - c.box[1]) for c in cases) / len(cases) / SIZE**2
    common = {"what": what, "asked": asked, "area": round(area, 4)}
    yield {**common, "layers": "default", **scores([c.default for c in cases], cases)}
    yield {**common, "layers": "all", **scores([c.layers.mean(0) for c in cases], cases)}
    for layer in range(len(cases[0].layers)):
        yield {**common, "layers": str(layer), **scores([c.layers[layer] for c in cases], cases)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="for each painter (default: 32)")
    parser.add_argument("--scenes", type=int, default=40, help="for the reader (default: 40)")
    parser.add_argument("--first-scene", type=int, default=100, help="its number (default: 100)")
    parser.add_argument("--num-steps", type=int, default=12, help="denoising steps (default: 12)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write everything as JSON")
    given = parser.parse_args()
    jobs = [(name, lambda name=name: painted(name, given.prompts, given.num_steps)) for name in PAINTERS]
    scenes = (given.first_scene, given.scenes)
    jobs += [
        ("world-llava, words of descriptions", lambda: answered(*scenes, text.DESCRIBE)),
        ("world-llava, yes", lambda: answered(*scenes, "Is there a {} in the image?")),
    ]
    results = []
    for what, job in jobs:
        cases, asked = job()
        for row in rows(what, cases, asked):
            results.append(row)
            print(f"{what:36} layers {row['layers']:8} {row['hits']:3} of {row['words']} hit, {row['wrong']} wrong, "
                  f"{row['heat']:.2f} of the heat on {row['area']:.2f} of the picture", flush=True)  # fmt: skip
        if given.log:
            given.log.parent.mkdir(parents=True, exist_ok=True)
            given.log.write_text(json.dumps({**environment("cpu"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
