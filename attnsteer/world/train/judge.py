"""Train the judge on rendered scenes of all categories, blurred, noisy and tinted a little, as painted pictures are.

Some objects are spoiled until they are none: jumbled, smeared, or noise. Nothing is to be seen there.

Loss: cross-entropy of every cell's category and, where objects are, of the frame, plus the distance of the box. At the
end the least number of cells and the least probability that make an object are chosen on validation scenes.

    python -m attnsteer.world.train judge --steps 2000 --threads 1 --float32
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from attnsteer.world import sampling
from attnsteer.world.catalog import CATEGORIES
from attnsteer.world.judge import CELL, GRID, UNIT, Judge, Network, Settings
from attnsteer.world.scenes import Scene
from attnsteer.world.train import loop
from attnsteer.world.train.data import pixels

COVERED = 0.25  # share of a cell that an object covers to own it; cells with less of one teach nothing
IGNORE = -100
CATEGORY = {category.name: index for index, category in enumerate(CATEGORIES)}
SPOILED = 0.15  # share of scenes with a spoiled object
STYLE = sampling.Style(rotate=0.3, occlude=0.25, frame=0.25, gradient=0.25)


def labels(drawn: Sequence[Scene], settings: Settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the cells of scenes show.

    Returns:
        category (0: none, IGNORE: too little) and frame, long [n, 16, 16]; distances to the left, top, right and bottom
        of the object's box, float [n, 4, 16, 16] in units.
    """
    category = np.zeros((len(drawn), GRID, GRID), np.int64)
    frame, sides = np.full_like(category, IGNORE), np.zeros((len(drawn), 4, GRID, GRID), np.float32)
    middle = np.arange(GRID) * CELL + CELL / 2
    for n, scene in enumerate(drawn):
        share = scene.masks().reshape(-1, GRID, CELL, GRID, CELL).mean((2, 4))
        category[n][share.max(0) > 0] = IGNORE
        for index, thing in enumerate(scene.objects):
            own = (share.argmax(0) == index) & (share[index] >= COVERED)
            category[n][own] = 1 + CATEGORY[thing.name]
            frame[n][own] = settings.frames.index(thing.frame)
            left, top, right, bottom = thing.box
            distances = (middle - left, middle[:, None] - top, right - middle, bottom - middle[:, None])
            for side, distance in enumerate(distances):
                sides[n, side][own] = np.broadcast_to(distance, (GRID, GRID))[own] / UNIT
    return torch.from_numpy(category), torch.from_numpy(frame), torch.from_numpy(sides)


def soften(pictures: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Pictures [n, 3, 64, 64] a little blurred, tinted and noisy, each in its own way (a quarter stay sharp)."""
    n = len(pictures)

    def draw(low: float, high: float, channels: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=source)

    spread = (draw(-0.3, 0.9).clamp(min=0.05) * torch.ones(1, 3, 1, 1)).reshape(-1, 1, 1, 1)  # pixels
    taps = torch.exp(-torch.arange(-2.0, 3.0).square() / (2 * spread.square()))
    taps = taps / taps.sum(-1, keepdim=True)  # [n * 3, 1, 1, 5]
    flat = F.pad(pictures.reshape(1, -1, *pictures.shape[2:]), (2, 2, 2, 2), mode="replicate")
    blurred = F.conv2d(F.conv2d(flat, taps, groups=3 * n), taps.mT, groups=3 * n).reshape(pictures.shape)
    tinted = blurred * draw(0.85, 1.12) + draw(-0.06, 0.06) + draw(-0.04, 0.04, 3)
    noise = torch.randn(pictures.shape, generator=source) * draw(-0.03, 0.07).clamp(min=0)
    return (tinted + noise).clamp(-1, 1)


def spoil(pictures: torch.Tensor, category: torch.Tensor, drawn: Sequence[Scene], source: torch.Generator) -> None:
    """In some pictures, make one object unrecognisable, in place, and label its cells as showing none."""
    for picture, label, scene in zip(pictures, category, drawn, strict=True):
        draw, index, way = torch.rand(3, generator=source).tolist()
        thing = scene.objects[int(index * len(scene.objects))]
        left, top, right, bottom = thing.box
        rows, columns = slice(top // CELL, -(-bottom // CELL)), slice(left // CELL, -(-right // CELL))
        one = 1 + CATEGORY[thing.name]
        if draw > SPOILED or not set(label[rows, columns].unique().tolist()) <= {0, IGNORE, one}:
            continue
        patch = picture[:, top:bottom, left:right]
        height, width = patch.shape[1] // CELL, patch.shape[2] // CELL
        if way < 0.5:  # blocks of 4 x 4 pixels in another order
            whole = patch[:, : height * CELL, : width * CELL]
            blocks = F.unfold(whole[None], CELL, stride=CELL)
            blocks = blocks[..., torch.randperm(height * width, generator=source)]
            whole.copy_(F.fold(blocks, whole.shape[1:], CELL, stride=CELL)[0])
        elif way < 0.85:  # hardly more than a few blots of its colours
            few = F.adaptive_avg_pool2d(patch, (max(2, height // 3), max(2, width // 3)))
            patch.copy_(F.interpolate(few[None], patch.shape[1:], mode="bilinear")[0])
        else:
            patch.copy_(torch.rand(patch.shape, generator=source) * 2 - 1)
        label[rows, columns] = torch.where(label[rows, columns] == one, 0, label[rows, columns])


def cell_loss(outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Cross-entropies of category and frame, and the error of the sides where objects are; all means over cells."""
    category, frame, sides = outputs
    there = (wanted[0] > 0)[:, None].expand_as(sides)
    frames = torch.where(wanted[0] > 0, wanted[1], IGNORE)
    weight = torch.ones(category.shape[1], device=category.device)
    weight[0] = 0.5  # half of all cells show none
    what = F.cross_entropy(category.float(), wanted[0], weight, ignore_index=IGNORE)
    framed = F.cross_entropy(frame.float(), frames, ignore_index=IGNORE)
    where = F.smooth_l1_loss(sides.float()[there], wanted[2][there], beta=0.1)
    return what + 0.3 * framed + 0.5 * where


def choose(judge: Judge, count: int = 400) -> Settings:
    """The settings with the fewest objects missed or invented on validation scenes, sharp and softened."""
    drawn = list(sampling.stream("validation", count, categories=judge.settings.categories, style=STYLE))
    softened = ((soften(pixels(drawn), loop.generator(0, 0)) + 1) * 127.5).round().to(torch.uint8)
    pictures = [scene.image() for scene in drawn]
    pictures += [Image.fromarray(picture) for picture in softened.permute(0, 2, 3, 1).numpy()]
    read = list(zip(*judge.cells(pictures)[1:], strict=True))
    found = []
    for cells, score, radius in product((6, 5, 4, 3), (0.7, 0.6, 0.5), (0.4, 0.5, 0.6, 0.7)):
        judge.settings = replace(judge.settings, cells=cells, score=score, radius=radius)
        seen = [Counter(thing.name for thing in judge.objects(*values)) for values in read]
        truth = [Counter(scene.counts) for scene in drawn * 2]
        wrong = sum((a - b).total() + (b - a).total() for a, b in zip(seen, truth, strict=True))
        found.append((wrong, judge.settings))
    return min(found, key=lambda pair: pair[0])[1]  # of equals the first, the strictest


def export(network: Network, options: argparse.Namespace) -> None:
    """Choose what makes an object, and write the folder."""
    judge = Judge(network, Settings(width=options.width), options.device)
    judge.settings = choose(judge, options.validation)
    judge.save(options.out)


def main(arguments: list[str] | None = None) -> None:
    """Train the judge."""
    parser = loop.parser("judge", __doc__, steps=2000, batch=64, rate=4e-3, out="assets/models/world-judge")
    parser.add_argument("--width", type=int, default=32, help="channels of the first layer (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=400, help="scenes to choose with (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = loop.prepare(options)
    settings = Settings(width=options.width)
    model = Network(settings).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(step: int) -> torch.Tensor:
        seeds = [(options.seed, 31, step, i) for i in range(options.batch)]
        drawn = [sampling.sample(s, categories=settings.categories, split="train", style=STYLE) for s in seeds]
        source, pictures, wanted = loop.generator(options.seed, step), pixels(drawn), labels(drawn, settings)
        spoil(pictures, wanted[0], drawn, source)
        pictures = soften(pictures, source).to(device).contiguous(memory_format=torch.channels_last)
        return cell_loss(model(pictures), [label.to(device) for label in wanted])

    loop.fit(
        model,
        loss,
        options,
        export=lambda mean: export(mean, options),
        blocks=("fine", "down", "coarse", "merge"),
        ema=0.99,
    )


if __name__ == "__main__":
    main()
