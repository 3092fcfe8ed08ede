"""How well the picture models paint what is asked, as the judge sees it.

The judge is the vision tower of world-llava with a linear read-out fitted here on exact masks; its own error rate on
true scenes is part of the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attnsteer.world import sampling, text
from attnsteer.world.catalog import BACKGROUNDS, CATEGORIES, CORE, find
from attnsteer.world.evaluate.answers import UNSEEN, Answerer


class Judge:
    """Reads which categories a picture shows: a linear read-out of the vision tower's patches."""

    def __init__(self, folder: Path, count: int = 3000, device: str = "cpu") -> None:
        from attnsteer.world.train.data import patch_labels, pixels

        self.tower, self.device, self.pixels = Answerer(folder, device).model.model.vision_tower, device, pixels
        drawn = [sampling.sample((UNSEEN, 8, number)) for number in range(count)]
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
        real = [sampling.compose(sorted(names), colours[i % len(colours)], i) for i, (_, names) in enumerate(wanted)]
        truth = judge([scene.image() for scene in real])
        report[f"judge_found_{objects}"] = sum(
            len(set(s.categories) & found) for s, found in zip(real, truth, strict=True)
        ) / (objects * len(real))
    if file is not None:
        grid(sheets, len(CORE)).save(file)
    return report
