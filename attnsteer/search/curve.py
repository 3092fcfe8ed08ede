"""The held-out curve: score against number of heads, on prompts and seeds that the search never saw.

A search scores heads on the pairs that it selects them by, so its own scores flatter them. The curve paints the first
0, k, 2k, ... heads on other pairs, at the strength of the search or lower ones, and says with which error they differ
from none.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..errors import SteeringError
from ..plain import encode
from .headhunter import HeadHunter
from .painter import Painter
from .scorer import Pair, known_pairs
from .selection import Selection
from .store import Scores


@dataclass(frozen=True)
class Metric:
    """The mean over the pairs, its difference to no perturbed heads, and that difference's standard error."""

    mean: float
    delta: float
    error: float


@dataclass(frozen=True)
class Point:
    """One number of heads at one strength; ``score`` is the objective's, of the means (None below a threshold)."""

    heads: int
    strength: float
    score: float | None
    metrics: Mapping[str, Metric]


@dataclass(frozen=True)
class Curve:
    """Points by strength and number of heads, and what they were measured on."""

    points: tuple[Point, ...]
    pairs: tuple[Pair, ...]
    settings: Mapping[str, Any]

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write JSON."""
        Path(file).write_text(json.dumps({"format": 1, **asdict(self)}, indent=1) + "\n", encoding="utf-8")


def held_out(searched: Any, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, if a search on the pairs ``searched`` saw none of their prompts and none of their seeds."""
    found = known_pairs(pairs)
    prompts, seeds = {prompt for prompt, _ in searched}, {seed for _, seed in searched}
    for prompt, seed in found:
        if prompt in prompts:
            raise SteeringError(f"The search saw the prompt {prompt!r}: held-out prompts must be others.")
        if seed in seeds:
            raise SteeringError(f"The search saw the seed {seed}: held-out seeds must be others.")
    return found


def curve(
    hunter: HeadHunter,
    selection: Selection,
    pairs: Sequence[Pair],
    *,
    tops: Sequence[int] | None = None,
    strengths: Sequence[float] | None = None,
    call: Mapping[str, Any] | None = None,
) -> Curve:
    """Measure the first heads of a selection on pairs that the search never saw.

    Args:
        hunter: the search; its pipeline, objective, folder and settings are used.
        selection: what it found.
        pairs: held-out prompts and seeds.
        tops: numbers of heads (default: after each round); 0 is always among them.
        strengths: strengths of the method (default: the one of the search).
        call: arguments of the pipeline over those of the search, e.g. to turn classifier-free guidance on.

    Raises:
        SteeringError: a prompt or a seed that the search saw, or a number that there is not.
    """
    chosen = held_out([*selection.settings.get("pairs", ()), *hunter.pairs], pairs)
    after = [len(selection.prefix(number).heads) for number in range(1, len(selection.rounds) + 1)]
    counts = sorted({*(after if tops is None else tops)} - {0})
    wrong = [n for n in counts if isinstance(n, bool) or not isinstance(n, int) or not 0 < n <= len(selection.heads)]
    if wrong:
        raise SteeringError(f"tops: {wrong[0]!r} is out of range: the selection has {len(selection.heads)} heads.")
    painters = _painters(hunter, strengths, call)
    hunter.follow("held out", len(chosen) * (1 + len(counts) * len(painters)))
    sets = [selection.heads[:count] for count in counts]
    points = []
    with hunter.working():
        first = hunter.scorer(painters[0], hunter.objective)
        first.means([()], chosen)
        plain = first.each((), chosen)
        for painter in painters:
            scorer = hunter.scorer(painter, hunter.objective)
            scorer.means(sets, chosen)
            found = [(0, plain), *zip(counts, (scorer.each(heads, chosen) for heads in sets), strict=True)]
            points += [_point(hunter, painter, count, rows, plain) for count, rows in found]
    settings = {"k": hunter.k, "run": first.run, **first.settings}
    return Curve(tuple(points), tuple(chosen), settings)


def _painters(hunter: HeadHunter, strengths: Sequence[float] | None, call: Mapping[str, Any] | None) -> list[Painter]:
    own = hunter.painter
    merged = {**own.call, **(call or {})}
    encode(merged, "call")  # refuse now what a configuration cannot hold
    if strengths is None:
        return [Painter(own.pipe, own.processor, own.steps, merged)]
    if "strength" not in {field.name for field in fields(own.processor)}:
        raise SteeringError(f"{type(own.processor).__name__} has no strength: leave strengths out.")
    if not strengths:
        raise SteeringError("strengths=[] leaves nothing to measure: give at least one.")
    changes: list[dict[str, Any]] = [{"strength": value} for value in dict.fromkeys(strengths)]
    methods = [replace(own.processor, **change) for change in changes]
    return [Painter(own.pipe, method, own.steps, merged) for method in methods]


def _point(hunter: HeadHunter, painter: Painter, heads: int, rows: Sequence[Scores], plain: Sequence[Scores]) -> Point:
    metrics = {}
    for name in rows[0]:
        deltas = [row[name] - other[name] for row, other in zip(rows, plain, strict=True)]
        error = stdev(deltas) / math.sqrt(len(deltas)) if len(deltas) > 1 else 0.0
        metrics[name] = Metric(fmean(row[name] for row in rows), fmean(deltas), error)
    score = hunter.objective.rank({name: metric.mean for name, metric in metrics.items()})
    return Point(heads, float(getattr(painter.processor, "strength", 1.0)), score, metrics)
