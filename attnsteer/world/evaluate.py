"""How good the world's models are, on scenes that training never saw.

    python -m attnsteer.world.evaluate llava --scenes 200 --threads 1
    python -m attnsteer.world.evaluate sd3 --per-category 4 --threads 1 --grid pictures.png

llava: answers to yes/no questions, counts and colours that are right, and the objects named in descriptions: recall,
and CHAIR_I, the share of named objects that are not there (Rohrbach et al., 2018, arXiv:1809.02156), on scenes with
chance company and on "lonely" scenes, where no object has its usual partner.
sd3: how often a judge finds the prompted objects. The judge is the vision tower of world-llava with a linear read-out
fitted here on exact masks; its own error rate on true scenes is part of the report.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attnsteer.world import assets, scenes, text
from attnsteer.world.catalog import BACKGROUNDS, CATEGORIES, CORE, find
from attnsteer.world.scenes import Scene

UNSEEN = 2_000_000_011  # first part of every seed used here


def named(sentence: str) -> set[str]:
    """The categories that a sentence names, longest names first: "hot dog" is no dog."""
    found, rest = set(), sentence.lower()
    forms = [(form, c.name) for c in CATEGORIES for form in (c.plural, find(c.name).phrase.split(" ", 1)[1], c.name)]
    for form, name in sorted(forms, key=lambda pair: -len(pair[0])):
        rest, hits = re.subn(rf"\b{re.escape(form)}\b", " ", rest)
        if hits:
            found.add(name)
    return found


def description_scores(said: Iterable[str], drawn: Sequence[Scene]) -> dict[str, float]:
    """chair_i: named objects that are not there / named objects; recall: objects named / objects; exact: both right."""
    names = [(named(sentence), set(scene.categories)) for sentence, scene in zip(said, drawn, strict=True)]
    mentioned = sum(len(a) for a, _ in names)
    return {
        "chair_i": sum(len(a - b) for a, b in names) / max(1, mentioned),
        "recall": sum(len(a & b) for a, b in names) / sum(len(b) for _, b in names),
        "exact": sum(a == b for a, b in names) / len(names),
    }


class Answerer:
    """world-llava behind one method."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.model = LlavaForConditionalGeneration.from_pretrained(folder).to(device).eval()
        self.processor, self.device = AutoProcessor.from_pretrained(folder), device

    @torch.no_grad()
    def __call__(self, drawn: Sequence[Scene], questions: Sequence[str], batch: int = 32) -> list[str]:
        """Greedy answers."""
        answers = []
        for first in range(0, len(drawn), batch):
            prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions[first : first + batch]]
            pictures = [scene.image() for scene in drawn[first : first + batch]]
            inputs = self.processor(text=prompts, images=pictures, padding=True, return_tensors="pt").to(self.device)
            tokens = self.model.generate(**inputs, max_new_tokens=48, do_sample=False)
            answers += self.processor.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


def lonely(number: int) -> Scene:
    """A scene of one to three objects in which no object has its usual partner."""
    rng = np.random.default_rng((UNSEEN, 7, number))
    names: list[str] = []
    while len(names) < 1 + number % 3:
        name = CORE[int(rng.integers(len(CORE)))]
        if name not in names and find(name).partner not in names:
            names.append(name)
    return scenes.compose(names, list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))], seed=number)


def evaluate_llava(folder: Path, count: int, device: str = "cpu") -> dict[str, float]:
    """All numbers about the answering model."""
    answer = Answerer(folder, device)
    drawn = [scenes.sample((UNSEEN, number)) for number in range(count)]
    report: dict[str, float] = {"scenes": count}
    rng = np.random.default_rng(UNSEEN)
    kinds = {
        "yes_no_present": [text.exists(s, s.categories[int(rng.integers(len(s.categories)))]) for s in drawn],
        "yes_no_absent": [text.exists(s, str(rng.choice([n for n in CORE if n not in s.counts]))) for s in drawn],
        "background": [text.background(s) for s in drawn],
        "count_objects": [text.how_many(s) for s in drawn],
    }
    for kind, turns in kinds.items():
        said = answer(drawn, [question for question, _ in turns])
        right = [
            a.split(",")[0] == b.split(",")[0] if kind.startswith("yes") else a == b
            for a, (_, b) in zip(said, turns, strict=True)
        ]
        report[kind] = sum(right) / count
    report |= description_scores(answer(drawn, [text.DESCRIBE] * count), drawn)
    alone = [lonely(number) for number in range(count)]
    said = answer(alone, [text.DESCRIBE] * count)
    report |= {f"lonely_{key}": value for key, value in description_scores(said, alone).items()}
    wrong = [(w, s) for a, s in zip(said, alone, strict=True) for w in named(a) - set(s.categories)]
    partners = sum(w in {find(name).partner for name in s.categories} for w, s in wrong)
    report["lonely_wrong_that_are_partners"] = partners / max(1, len(wrong))
    return report


class Judge:
    """Reads which categories a picture shows: a linear read-out of the vision tower's patches."""

    def __init__(self, folder: Path, count: int = 3000, device: str = "cpu") -> None:
        from attnsteer.world.train.data import patch_labels, pixels

        self.tower, self.device, self.pixels = Answerer(folder, device).model.model.vision_tower, device, pixels
        drawn = [scenes.sample((UNSEEN, 8, number)) for number in range(count)]
        features = torch.cat([self.features([s.image() for s in drawn[i : i + 64]]) for i in range(0, count, 64)])
        x, y = features.flatten(0, 1), patch_labels(drawn).flatten()
        self.head = torch.nn.Linear(x.shape[1], len(CATEGORIES) + 1)
        optimizer = torch.optim.Adam(self.head.parameters(), lr=0.01)
        source = torch.Generator().manual_seed(0)
        for step in range(600):
            pick = torch.randint(len(x), (2048,), generator=source)
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 600)
            torch.nn.functional.cross_entropy(self.head(x[pick]), y[pick]).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """[pictures, patches, width]."""
        pixels = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.tower(pixels.to(self.device)).last_hidden_state[:, 1:].float().cpu()

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], patches: int = 3) -> list[set[str]]:
        """The categories that win at least `patches` of the 64 patches, for each picture."""
        votes = self.head(self.features(pictures)).argmax(-1)  # [pictures, patches]
        counts = [torch.bincount(row, minlength=len(CATEGORIES) + 1)[1:] for row in votes]
        return [{c.name for c, n in zip(CATEGORIES, row.tolist(), strict=True) if n >= patches} for row in counts]


def prompts(per_category: int, objects: int) -> list[tuple[str, set[str]]]:
    """Prompts of one or two core categories, and what they name."""
    made, colours = [], list(BACKGROUNDS)
    for number, name in enumerate(CORE * per_category):
        rng = np.random.default_rng((UNSEEN, 9, number, objects))
        others = [other for other in CORE if other != name]
        names = [name, others[int(rng.integers(len(others)))]][:objects]
        phrase = text.listing([find(one).phrase for one in names])
        made.append((f"{phrase} on a {colours[int(rng.integers(len(colours)))]} background", set(names)))
    return made


def paint(folder: Path, wanted: Sequence[str], steps: int, guidance: float, device: str = "cpu") -> list[Image.Image]:
    """One picture per prompt; picture i starts from the noise of seed i."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for first in range(0, len(wanted), 32):
        some = list(wanted[first : first + 32])
        sources = [torch.Generator().manual_seed(first + i) for i in range(len(some))]
        pictures += pipe(
            some, num_inference_steps=steps, guidance_scale=guidance, generator=sources, max_sequence_length=1
        ).images
    return pictures


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures side by side."""
    side = pictures[0].width
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * side, number // columns * side))
    return sheet


def evaluate_sd3(
    folder: Path, judge: Judge, per_category: int, steps: int, guidance: float, file: Path | None, device: str = "cpu"
) -> dict[str, float]:
    """All numbers about the picture model."""
    report: dict[str, float] = {"steps": steps, "guidance": guidance}
    sheets = []
    for objects in (1, 2):
        wanted = prompts(per_category, objects)
        pictures = paint(folder, [prompt for prompt, _ in wanted], steps, guidance, device)
        sheets += pictures
        seen = judge(pictures)
        pairs = [(names, found) for (_, names), found in zip(wanted, seen, strict=True)]
        report[f"pictures_{objects}"] = len(pairs)
        report[f"found_{objects}"] = sum(len(names & found) for names, found in pairs) / (objects * len(pairs))
        report[f"all_found_{objects}"] = sum(names <= found for names, found in pairs) / len(pairs)
        colours = list(BACKGROUNDS)
        real = [scenes.compose(sorted(names), colours[i % len(colours)], i) for i, (_, names) in enumerate(wanted)]
        truth = judge([scene.image() for scene in real])
        report[f"judge_found_{objects}"] = sum(
            len(set(s.categories) & found) for s, found in zip(real, truth, strict=True)
        ) / (objects * len(real))
    if file is not None:
        grid(sheets, len(CORE)).save(file)
    return report


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
