"""The tasks on real pictures: a folder of them with annotations in COCO's format, and POPE's question files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import SteeringError
from ..metrics import pope
from ..metrics.objects import annotated, image_id, present
from ..metrics.words import COCO
from .samples import FilePicture, Sample
from .tasks import DESCRIBE, Describe, Exists

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def describe(
    images: Path, instances: Path | None, captions: Path | None, prompt: str = DESCRIBE, max_new_tokens: int = 512
) -> Describe:
    """Descriptions of the pictures of a folder that the annotations know; groups are none, strata numbers of objects.

    Args:
        instances: categories of every picture; captions: what people said about them. Published numbers use both.

    Raises:
        SteeringError: there are no annotations, or none of the pictures is in them.
    """
    there = present(read(instances), read(captions), COCO)
    files = pictures(images)
    both = sorted((name for name in files if name in there), key=_by_number)
    if not both:
        raise SteeringError(f"None of the {len(files)} pictures of {str(images)!r} is in the annotations.")
    samples = [
        Sample(name, name, FilePicture(files[name]), prompt, tuple(sorted(there[name])), (), _stratum(len(there[name])))
        for name in both
    ]
    return Describe(samples, max_new_tokens)


def exists(images: Path, questions: Sequence[Path], instances: Path | None, seed: int = 0) -> Exists:
    """POPE's questions from its files, one for each split; without files, made from the annotations by its rules.

    A question that stands in several splits is asked once and counts in each.

    Raises:
        SteeringError: no questions, a line that is none, or a picture that is not there.
    """
    files = pictures(images)
    if questions:
        asked = {split: _questions(file) for file in questions for split in [_split(file)]}
        if len(asked) < len(questions):
            raise SteeringError(f"Two question files are of one split; there are {', '.join(map(str, questions))}.")
    else:
        objects = annotated(read(instances) or {}, COCO)
        known = {name: objects[name] for name in sorted(objects, key=_by_number) if name in files}
        asked = {split: pope.questions(known, split, None, seed) for split in pope.SPLITS}
    splits: dict[tuple[str, str, str], list[str]] = {}
    for split, lines in asked.items():
        for line in lines:
            splits.setdefault((image_id(line["image"]), line["text"], line["label"]), []).append(split)
    missing = sorted({name for name, _, _ in splits if name not in files})
    if missing:
        raise SteeringError(f"{len(missing)} pictures with questions are not in {str(images)!r}, e.g. {missing[0]}.")
    samples, number = [], dict.fromkeys((name for name, _, _ in splits), 0)
    shown = {name: FilePicture(files[name]) for name in number}
    for (name, text, label), groups in splits.items():
        number[name] += 1
        asked_in = tuple(dict.fromkeys(groups))
        samples.append(Sample(f"{name}-{number[name]}", name, shown[name], text, (label,), asked_in))
    return Exists(samples)


def pictures(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by the number in their names, or by name where there is none.

    Raises:
        SteeringError: there is no such folder, or two pictures have one number.
    """
    if not folder.is_dir():
        raise SteeringError(f"There is no folder {str(folder)!r} with pictures.")
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in SUFFIXES and found.setdefault(image_id(file.name), file) != file:
            raise SteeringError(
                f"{file.name} and {found[image_id(file.name)].name} are the same picture by their number."
            )
    return found


def read(file: Path | None) -> Any:
    """A JSON file, also gzipped; None for none.

    Raises:
        SteeringError: it is no JSON.
        OSError: it cannot be read.
    """
    if file is None:
        return None
    try:
        with (
            gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as opened
        ):
            return json.load(opened)
    except ValueError as error:
        raise SteeringError(f"{file} is no JSON: {error}.") from error


def _questions(file: Path) -> list[dict[str, str]]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            entry = {key: str(entry[key]) for key in ("image", "text", "label")}
        except (ValueError, KeyError, TypeError) as error:
            raise SteeringError(f"{file}, line {number}: wanted is an object with image, text and label.") from error
        if entry["label"] not in ("yes", "no"):
            raise SteeringError(f"{file}, line {number}: the label is {entry['label']!r}; allowed are yes and no.")
        found.append(entry)
    if not found:
        raise SteeringError(f"{file} holds no questions.")
    return found


def _split(file: Path) -> str:
    """The split that a file name says, as in coco_pope_adversarial.json; else its name."""
    return next((split for split in pope.SPLITS if split in file.stem.lower()), file.stem)


def _stratum(objects: int) -> str:
    return f"{objects} categories" if objects < 4 else "4 categories or more"


def _by_number(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (1 << 62, name)
