"""Which picture of a folder shows which prompt: folders as ``attnsteer generate`` writes them, one folder a prompt, and
GenEval's.

    a-dog-and-a-cat-0.png                               generate, one picture; seed 0
    a-dog-and-a-cat-0-1-strength-0.5-seed-3.png         generate, several variants and seeds
    a-dog-0-1-consistentselfattention-2--a-cat.png      generate, the second picture of a story
    a dog and a cat/3.png                               one folder a prompt, named by it
    00042/metadata.jsonl, 00042/samples/0003.png        GenEval
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..compare.folders import SUFFIXES
from ..errors import SteeringError
from ..metrics import files
from ..metrics.pictures.measures import Shown
from .generate import file_name
from .several import slug, title


@dataclass(frozen=True)
class Asked:
    """A prompt, and the set of prompts about one subject that it belongs to, or ""."""

    prompt: str
    subject: str = ""


@dataclass(frozen=True)
class Found:
    """A picture file; ``request``: GenEval's metadata, where there is one."""

    shown: Shown
    file: Path
    variant: str = ""
    request: Any = None


@dataclass
class Folder:
    """The pictures of a folder by prompt, in the order of the prompts, and what did not fit."""

    pictures: dict[str, list[Found]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, found: Found) -> None:
        mine = self.pictures.setdefault(found.shown.prompt, [])
        if any(other.shown.seed == found.shown.seed for other in mine):
            self.problems.append(f"{found.file}: another picture has the same prompt and seed")
        else:
            mine.append(found)


def prompts(path: str) -> list[Asked]:
    """A prompt a line, or JSON lines with "prompt" and, where pictures of one subject make a set, "set".

    Raises:
        SteeringError: none, twice the same, or a line that is none.
    """
    text = files.text_of(path)
    if text.lstrip().startswith(("{", "[")):
        rows = files.rows(path)
        found = []
        for position, row in rows:
            try:
                found.append(Asked(files.string(row, ("prompt",)), str(row.get("set", ""))))
            except files.LineError as error:
                rows.drop(position, str(error))
        if rows.problems:
            raise SteeringError(rows.problems)
    else:
        found = [Asked(line.strip()) for line in text.splitlines() if line.strip()]
    names = [asked.prompt for asked in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not found or twice:
        raise SteeringError(f"{path} holds {f'twice the prompt {twice[0]!r}' if twice else 'no prompts'}.")
    return found


def read(folder: Path, asked: Sequence[Asked] | None, variant: str | None = None) -> Folder:
    """The pictures of a folder.

    Args:
        asked: the prompts; GenEval's folders bring their own, and None takes all of them.
        variant: which of the variants that ``generate`` wrote.

    Raises:
        SteeringError: no such folder, no pictures, or pictures of several variants.
    """
    if not folder.is_dir():
        raise SteeringError(f"There is no folder {str(folder)!r} with pictures.")
    if any(folder.glob("*/metadata.jsonl")):
        found = _geneval(folder, asked)
    elif asked is None:
        raise SteeringError(f"{str(folder)!r} does not say what its pictures show: give the prompts with --prompts.")
    else:
        found = _named(folder, asked, variant)
    if not found.pictures:
        raise SteeringError([f"{str(folder)!r} holds no picture of the prompts.", *found.problems[:3]])
    if asked is not None:
        missing = [each.prompt for each in asked if each.prompt not in found.pictures]
        found.problems += [f"{folder}: no picture of the prompt {prompt!r}" for prompt in missing]
        found.pictures = {each.prompt: found.pictures[each.prompt] for each in asked if each.prompt in found.pictures}
    return found


def _geneval(folder: Path, asked: Sequence[Asked] | None) -> Folder:
    found, subjects = Folder(), {each.prompt: each.subject for each in asked or ()}
    for place in sorted(folder.glob("*/metadata.jsonl")):
        try:
            request = json.loads(files.text_of(place).splitlines()[0])
            prompt = str(request["prompt"])
        except (ValueError, KeyError, IndexError, TypeError):
            found.problems.append(f"{place}: no JSON with a prompt in its first line")
            continue
        if asked is None or prompt in subjects:
            for file in _pictures(place.parent / "samples"):
                found.add(Found(_shown(prompt, file.stem, subjects.get(prompt, "")), file, request=request))
    return found


def _named(folder: Path, asked: Sequence[Asked], variant: str | None) -> Folder:
    found, known = Folder(), _by(file_name, asked)
    single = [each.prompt for each in asked if file_name(each.prompt) not in known]
    if single:
        found.problems.append(f"{single[0]!r} has the file names of another prompt: only folders tell them apart")
    inside = {place.name for place in folder.iterdir() if place.is_dir()}
    for each in asked:
        names = [each.prompt, *(name for name, other in known.items() if other is each)]
        for name in dict.fromkeys(name for name in names if name in inside):
            for file in _pictures(folder / name):
                found.add(Found(_shown(each.prompt, file.stem, each.subject), file))
    flat = _flat(_pictures(folder), known, found.problems)
    variants = list(dict.fromkeys(picture.variant for picture in flat))
    if variant is not None and slug(variant) not in variants:
        raise SteeringError(f"There is no variant {variant!r} in {str(folder)!r}; there are {', '.join(variants)}.")
    if variant is None and len(variants) > 1:
        there = ", ".join(name or "pictures without one" for name in variants)
        raise SteeringError(f"{str(folder)!r} holds several variants ({there}): choose one with --variant.")
    for picture in flat:
        if variant is None or picture.variant == slug(variant):
            found.add(picture)
    return found


def _flat(pictures: Sequence[Path], known: dict[str, Asked], problems: list[str]) -> list[Found]:
    """Pictures by the names that ``generate`` gives them; sheets are left out."""
    titles = _titles(list(known.values()))
    found, sheets, rest = [], set(), []
    for file in pictures:
        for name in known:
            tail = re.fullmatch(rf"{re.escape(name)}-((\d+)-\d+-.+)", file.stem)
            picture = _several(file, tail[1], name, known[name], titles) if tail else None
            if tail and picture:
                sheets.add(f"{name}-{tail[2]}")
                found.append(picture)
                break
        else:
            rest.append(file)
    for file in rest:
        name, _, seed = file.stem.rpartition("-")
        if file.stem in sheets:
            continue
        if name in known and seed.isdecimal():
            found.append(Found(_shown(known[name].prompt, seed, known[name].subject), file))
        else:
            problems.append(f"{file}: belongs to none of the prompts")
    return found


def _several(file: Path, tail: str, name: str, asked: Asked, titles: Callable[[int], dict[str, Asked]]) -> Found | None:
    """The picture whose file says behind its prompt: seed, number and name of a variant, and a seed or a title."""
    seed = re.fullmatch(r"\d+-\d+-(.+)-seed-(\d+)", tail)
    if seed:
        return Found(_shown(asked.prompt, seed[2], asked.subject), file, seed[1])
    for place in re.finditer(r"-(\d+)(?=-|$)", tail):
        variant = re.fullmatch(r"(\d+)-\d+-(.+)", tail[: place.start()])
        mine = titles(int(place[1])).get(tail[place.start(1) :]) if variant else None
        if variant and mine:
            own = str(int(variant[1]) + int(place[1]) - 1)
            return Found(Shown(mine.prompt, own, (mine.subject or name, variant[1])), file, variant[2])
    return None


def _titles(asked: Sequence[Asked]) -> Callable[[int], dict[str, Asked]]:
    """By its number in a story, the prompts by what names their pictures."""
    return cache(lambda number: _by(lambda prompt: slug(title(number, prompt)), asked))


def _by(name: Callable[[str], str], asked: Sequence[Asked]) -> dict[str, Asked]:
    """Prompts by the names that only one of them has."""
    names = [name(each.prompt) for each in asked]
    return {label: each for label, each in zip(names, asked, strict=True) if names.count(label) == 1}


def _shown(prompt: str, seed: str, subject: str) -> Shown:
    return Shown(prompt, seed, (subject, seed) if subject else ("", ""))


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
