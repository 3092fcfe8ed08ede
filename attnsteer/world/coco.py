"""Scenes as a data set in the format of COCO, with COCO's own category numbers, for tools that read it.

    coco.export("outputs/world", sampling.stream("test", 100), "test")

writes images/test_000000000001.png, ..., annotations/instances_test.json (boxes, areas, run-length masks),
annotations/captions_test.json (several captions a picture) and annotations/questions_test.jsonl (questions with true
answers; yes/no questions have the "label" of POPE's files too, Li et al., 2023, arXiv:2305.10355). Boxes and masks are
of what is visible: the pixels of an object that no other hides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from attnsteer._version import __version__
from attnsteer.world import text
from attnsteer.world.catalog import BY_NAME, CATEGORIES, CORE
from attnsteer.world.scenes import Scene

Entry = dict[str, Any]
CAPTIONS = 5  # of a picture at most; COCO has five


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a mask [height, width]: down the columns, zeros first (maybe none)."""
    runs = [(value, sum(1 for _ in run)) for value, run in groupby(mask.ravel(order="F").tolist())]
    return [0] * bool(runs[0][0]) + [length for _, length in runs]


def bounds(mask: np.ndarray) -> list[float]:
    """[left, top, width, height] of the pixels of a mask that has some."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    sides = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    return [float(side) for side in sides]


def instances(scene: Scene) -> list[Entry]:
    """One of COCO's annotations for each object that shows at least a pixel, without "id" and "image_id"."""
    return [
        {
            "category_id": BY_NAME[thing.name].coco,
            "bbox": bounds(mask),
            "area": float(mask.sum()),
            "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
            "iscrowd": 0,
        }
        for thing, mask in zip(scene.objects, scene.masks(), strict=True)
        if mask.any()
    ]


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Up to `CAPTIONS` different captions."""
    some = [text.caption(scene), text.describe(scene), *(text.caption(scene, rng) for _ in range(2 * CAPTIONS))]
    return list(dict.fromkeys(some))[:CAPTIONS]


def questions(scene: Scene, rng: np.random.Generator) -> Iterator[dict[str, str]]:
    """Is it there: every category of the scene and as many that are not; then two other questions."""
    absent = [name for name in CORE if name not in scene.counts]
    missing = [str(name) for name in rng.permutation(absent)[: len(scene.categories)]]
    for label, names in (("yes", scene.categories), ("no", missing)):
        for name in names:
            question, answer = text.exists(scene, name)
            yield {"text": question, "answer": answer, "label": label}
    for question, answer in (text.how_many(scene), text.background(scene)):
        yield {"text": question, "answer": answer}


def export(folder: str | Path, scenes: Iterable[Scene], split: str, seed: int = 0) -> dict[str, Any]:
    """Write pictures, annotations, captions and questions of `scenes` into `folder`.

    Args:
        split: a word for the names of the files.
        seed: decides wordings, and what absent things are asked about.
    Returns:
        the numbers of images, annotations, captions and questions, and the paths of their "files".
    """
    place = Path(folder)
    (place / "images").mkdir(parents=True, exist_ok=True)
    (place / "annotations").mkdir(exist_ok=True)
    images: list[Entry] = []
    objects: list[Entry] = []
    said: list[Entry] = []
    asked: list[Entry] = []
    for number, scene in enumerate(scenes, start=1):
        rng = np.random.default_rng((seed, number))
        name = f"{split}_{number:012d}.png"
        scene.image().save(place / "images" / name)
        images.append({"id": number, "file_name": name, "width": scene.size, "height": scene.size})
        objects += [{"image_id": number, **instance} for instance in instances(scene)]
        said += [{"image_id": number, "caption": caption} for caption in captions(scene, rng)]
        asked += [{"image": name, **question} for question in questions(scene, rng)]
    kinds = [{"id": c.coco, "name": c.name, "supercategory": c.kind} for c in CATEGORIES]
    info = {"description": "Scenes of attnsteer's small world", "version": __version__}
    about = {"info": info, "licenses": [], "images": images}
    files = {
        f"instances_{split}.json": json.dumps({**about, "annotations": _numbered(objects, "id"), "categories": kinds}),
        f"captions_{split}.json": json.dumps({**about, "annotations": _numbered(said, "id")}),
        f"questions_{split}.jsonl": "".join(json.dumps(q) + "\n" for q in _numbered(asked, "question_id")),
    }
    for name, content in files.items():
        (place / "annotations" / name).write_text(content, encoding="utf-8")
    counts = {"images": len(images), "annotations": len(objects), "captions": len(said), "questions": len(asked)}
    return {**counts, "files": [str(place / "annotations" / name) for name in files]}


def _numbered(entries: list[Entry], key: str) -> list[Entry]:
    return [{key: number, **entry} for number, entry in enumerate(entries, start=1)]
