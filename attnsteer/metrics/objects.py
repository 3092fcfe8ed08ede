"""What is in the pictures: categories from COCO's annotation files, for CHAIR and for making POPE's questions.

    there = present(instances, captions, COCO)     # {image id: {"dog", "person"}}

CHAIR's ground truth of an image is the categories of its annotated objects and what people named when they described
it (about five captions each), read by the same ``Vocabulary`` as the captions to be judged: with another table or
lemmatiser the ground truth is another one. A file that ``write`` made says which was used, and is refused elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import SteeringError
from .words import LEMMATISER, TOKENISER, Vocabulary, names

Objects = dict[str, set[str]]
"""{image id as text: categories}."""


def image_id(value: Any) -> str:
    """The key of an image: its number, also from a file name.

    "COCO_val2014_000000310196.jpg", "000000310196" and 310196 are the same image, "310196". A name without a number
    at its end is its own key.
    """
    text = str(value).replace("\\", "/").rsplit("/", 1)[-1]
    stem = re.sub(r"\.(jpe?g|png|webp|bmp|gif)$", "", text, flags=re.IGNORECASE)
    last = stem.rsplit("_", 1)[-1]
    return str(int(last)) if last.isascii() and last.isdigit() else stem


def drawn(images: Iterable[Any], count: int, seed: int = 0) -> list[str]:
    """Images to describe: the same for the same seed, whatever order a folder lists them in.

    Raises:
        SteeringError: there are not so many.
    """
    known = sorted({image_id(image) for image in images}, key=lambda image: (len(image), image))
    if not 0 < count <= len(known):
        raise SteeringError(f"{count} images were asked for, and there are {len(known)}.")
    return random.Random(seed).sample(known, count)


def annotated(instances: Mapping[str, Any], vocabulary: Vocabulary | None = None) -> dict[str, list[str]]:
    """Different categories of every image of an instances file, in order of their annotations.

    Args:
        instances: with "images", "annotations" and "categories" of COCO's format.
        vocabulary: whose categories the names become; a name that it does not have stays what it is.

    Raises:
        SteeringError: a part is missing.
    """
    called = {kind["id"]: kind["name"] for kind in _part(instances, "categories")}
    if vocabulary is not None:
        called = {number: vocabulary.entries.get(name, name) for number, name in called.items()}
    found: dict[str, dict[str, None]] = {image_id(image["id"]): {} for image in _part(instances, "images")}
    for thing in _part(instances, "annotations"):
        try:
            found.setdefault(image_id(thing["image_id"]), {})[called[thing["category_id"]]] = None
        except KeyError as error:
            raise SteeringError(f"An annotation of the instances file has no or an unknown {error}.") from error
    return {image: list(kinds) for image, kinds in found.items()}


def present(instances: Mapping[str, Any] | None, captions: Mapping[str, Any] | None, vocabulary: Vocabulary) -> Objects:
    """CHAIR's ground truth: annotated categories and those that the images' own captions name.

    Args:
        instances, captions: of COCO's format; either may be missing, which is not the published metric.

    Raises:
        SteeringError: both are missing, or a part of one is.
    """
    if instances is None and captions is None:
        raise SteeringError("Neither instances nor captions: there is no ground truth.")
    found: Objects = {}
    if instances is not None:
        found = {image: set(kinds) for image, kinds in annotated(instances, vocabulary).items()}
    for said in _part(captions, "annotations") if captions is not None else ():
        found.setdefault(image_id(said["image_id"]), set()).update(names(vocabulary.mentions(said["caption"])))
    return found


def write(path: str | Path, objects: Objects, vocabulary: Vocabulary, sources: Iterable[str | Path] = ()) -> None:
    """Ground truth as JSON, with what it was made by; ``sources`` are the annotation files."""
    header = {**made_by(vocabulary), "sources": {Path(source).name: _digest(source) for source in sources}}
    content = {"header": header, "objects": {image: sorted(kinds) for image, kinds in objects.items()}}
    text = json.dumps(content, indent=None, separators=(",", ":"))
    with (gzip.open if str(path).endswith(".gz") else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)


def made_by(vocabulary: Vocabulary) -> dict[str, str]:
    """What names a way to count: lemmatiser, tokeniser, table and its digest."""
    return {
        "lemmatiser": LEMMATISER,
        "tokeniser": TOKENISER,
        "synonyms": vocabulary.name,
        "synonyms_digest": vocabulary.digest,
    }


def ready(content: Any, vocabulary: Vocabulary) -> Objects:
    """Ground truth from a file of ``write``, or from plain ``{image id: [category, ...]}``.

    Names become categories of the vocabulary where it has them.

    Raises:
        SteeringError: neither of these, or made with another lemmatiser, tokeniser or table.
    """
    if isinstance(content, dict) and {"header", "objects"} == set(content):
        wanted, header = made_by(vocabulary), content["header"]
        off = [key for key in wanted if key != "synonyms" and header.get(key) != wanted[key]]
        if off:
            said = [f"{key} is {header.get(key)!r} there and {wanted[key]!r} here" for key in off]
            raise SteeringError(f"This ground truth was read from captions in another way: {', '.join(said)}.")
        content = content["objects"]
    if not isinstance(content, dict) or not all(isinstance(kinds, list) for kinds in content.values()):
        raise SteeringError("Ground truth is an object {image id: [category, ...]}, as JSON.")
    return {image_id(image): {vocabulary.entries.get(kind, kind) for kind in kinds} for image, kinds in content.items()}


def _part(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    part = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(part, list):
        raise SteeringError(f"An annotation file of COCO has a list {name!r}: this one has none.")
    return part


def _digest(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
