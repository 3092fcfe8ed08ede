"""Where the plain model looks while it says the word that an example is about.

The word is the first made-up object, else the first object that is named, else the first word of the answer. Its map
is that of ``attnsteer.answer_maps``: the mean over all heads of the second half of the layers, without sinks.

Maps are kept in ``maps.json`` beside the answers, as numbers from 0 to 255 (the highest place), so that a report that
is written again from the same answers is the same, and needs no model.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import SteeringError
from ..heat import answer_maps
from ..heat.pictures import overlay
from ..hosts.vlm_grids import covered_area
from ..spans import find_each
from .answering import Answerer
from .files import put
from .samples import Sample
from .store import Entry, Key
from .tasks import marked

FILE = "maps.json"


@dataclass(frozen=True)
class Look:
    """One map, or why there is none.

    Attributes:
        word: what is said; heat: ``(h, w)`` from 0 to 255 over ``area`` of the picture (left, top, right, bottom).
        share: of the model's attention, what the picture gets.
        reason: why there is no map.
    """

    word: str
    heat: tuple[tuple[int, ...], ...] = ()
    area: tuple[int, ...] = ()
    share: float = 0.0
    reason: str = ""

    def over(self, picture: Any, side: int) -> Any:
        """The map over a PIL picture, its longer side in pixels."""
        import numpy as np

        seen = picture.crop(self.area)
        scale = side / max(seen.size)
        return overlay(np.array(self.heat), seen, (round(scale * seen.width), round(scale * seen.height)))


class Looks:
    """The maps of a folder.

    Args:
        folder: of the answers.
        answerer: whose maps are made where they are missing; None only reads.
    """

    def __init__(self, folder: Path, answerer: Answerer | None = None):
        self._file, self._answerer = folder / FILE, answerer
        self._known = _read(self._file)
        self._wanted: dict[Key, Look] = {}

    def of(self, key: Key, sample: Sample, entry: Entry) -> Look | None:
        """The map of an answer of the plain model; None for one that has no words.

        Args:
            key: what the answer is kept under.
        """
        place = shown_place(entry)
        if place is None:
            return None
        word = entry["output"][slice(*place)]
        found = self._known.get(key)
        if found is None or found.word != word:
            if self._answerer is None:
                return Look(word, reason="it was not made yet, and this report was written without the model")
            try:
                found = _made(self._answerer, sample, entry, place)
            except SteeringError as error:
                found = Look(word, reason=str(error))
            except Exception as error:  # the numbers must not wait for a picture; the next report tries again
                return Look(word, reason=f"{type(error).__name__}: {' '.join(str(error).split())}")
        self._wanted[key] = found
        return found

    def keep(self) -> None:
        """Write those that were asked for since the beginning, and no others."""
        if self._answerer is not None:
            lines = [{**key._asdict(), **asdict(look)} for key, look in sorted(self._wanted.items())]
            put(self._file, ("[" + ",\n".join(map(json.dumps, lines)) + "]\n").encode())


def shown_place(entry: Entry) -> tuple[int, int] | None:
    """Where the word of an answer is that its map is of, ``output[start:end]``; None where it has no words."""
    places = marked(entry["counts"])
    for start, end, _ in sorted(places, key=lambda place: not place[2]):  # stable: made-up ones, then the others
        return start, end
    first = re.search(r"\w+", entry["output"])
    return first.span() if first else None


def _made(answerer: Answerer, sample: Sample, entry: Entry, place: tuple[int, int]) -> Look:
    model, processor, picture = answerer.model, answerer.processor, sample.picture.open()
    limit = max(1, len(entry["tokens"]))
    said = answer_maps(model, processor, picture, sample.prompt, sinks="drop", max_new_tokens=limit)
    text, (start, end) = entry["output"], place
    if said.answer != text:
        raise SteeringError("asked alone, the model gives another answer")
    word = text[start:end]
    spelled = find_each(processor, said.ids.tolist(), word)
    before = len(re.findall(rf"(?<![0-9A-Za-z]){re.escape(word)}(?![0-9A-Za-z])", text[:start], re.IGNORECASE))
    heat = said.maps[list(spelled[before])].mean(0).double()
    most = float(heat.max())
    levels = (255 * heat / most if most > 0 else heat).round().int().tolist()
    area = tuple(round(end) for end in covered_area(processor, picture.size))
    return Look(word, tuple(map(tuple, levels)), area, round(float(heat.sum()), 4))


def _read(file: Path) -> dict[Key, Look]:
    """What was kept; nothing where the file is missing or of another make."""
    try:
        lines = json.loads(file.read_text(encoding="utf-8"))
        found = {}
        for line in lines:
            key = Key(*(line.pop(name) for name in Key._fields))
            heat, area = tuple(map(tuple, line.pop("heat"))), tuple(line.pop("area"))
            found[key] = Look(heat=heat, area=area, **line)
        return found
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}
