"""From candidate sets to mean scores: which pictures are missing, who makes them, in which batches.

Pictures are sorted by the first perturbed layer of their set, so that a batch forks late and in few places; batches are
dealt to the processes in turn. Every batch has the same number of rows (the last repeats one), so that a picture does
not depend on how many others were missing, but for rounding where a batch forks in several places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..errors import SteeringError
from .hunter import Heads
from .objectives import Objective
from .painter import Job, Painter
from .ranks import Ranks
from .selection import Head
from .store import Key, Scores, Store

Pair = tuple[str, int]
"""A prompt and the seed of its initial noise."""


class Scorer:
    """Scores candidate sets on pairs of prompt and seed.

    Args:
        painter: makes the pictures.
        objective: scores them.
        store: remembers the scores.
        order: for every head its place in the model.
        batch: rows of a batch.
        ranks: the processes.
        made: told how many pictures became known, and how many of them this process made.
        once: names this search, for objectives whose scores no other search may use.

    Attributes:
        pictures: how many pictures this process has made.
        found: how many scores were known before they were asked for.
    """

    def __init__(
        self,
        painter: Painter,
        objective: Objective,
        store: Store,
        order: Mapping[Head, int],
        batch: int,
        ranks: Ranks,
        made: Callable[[int, int], None],
        once: str = "",
    ):
        self.painter, self.objective, self.store, self.order = painter, objective, store, order
        self.batch, self.ranks, self.made = batch, ranks, made
        self.pictures, self.found = 0, 0
        self.settings = {"format": 1, **painter.settings, "objective": dict(objective.settings)}
        if not objective.reusable:
            self.settings["once"] = once
        ranks.agree(self.settings)
        self.run = store.begin(self.settings)

    def means(self, sets: Sequence[Heads], pairs: Sequence[Pair]) -> list[dict[str, float]]:
        """The mean of every named score over all pairs, for each set."""
        wanted = [[self._key(heads, pair) for pair in pairs] for heads in sets]
        jobs = list(dict.fromkeys(sorted((key for row in wanted for key in row), key=self._first)))
        size = min(self.batch, len(jobs))
        known = len(jobs) - len(self._missing(jobs))
        self.found += known
        self.made(known, 0)
        while missing := self._missing(jobs):
            batches = [missing[start : start + size] for start in range(0, len(missing), size)]
            for mine in batches[self.ranks.rank :: self.ranks.count]:
                self._score(mine, size)
            self.ranks.wait()
        return [_mean([self.store[key] for key in row]) for row in wanted]

    def each(self, heads: Heads, pairs: Sequence[Pair]) -> list[Scores]:
        """The scores of a set on each of the pairs, once they are known."""
        return [self.store[self._key(heads, pair)] for pair in pairs]

    def _missing(self, jobs: Sequence[Key]) -> list[Key]:
        """What no process has scored yet; all processes get the same answer."""
        self.store.reload()
        missing = [key for key in jobs if key not in self.store]
        self.ranks.wait()
        return missing

    def _score(self, keys: Sequence[Key], size: int) -> None:
        """Make one batch of pictures, score them and write the scores down."""
        filled = [*keys, *[keys[-1]] * (size - len(keys))]
        images = self.painter([Job(key.heads, key.prompt, key.seed) for key in filled])[: len(keys)]
        columns = self.objective(images, [key.prompt for key in keys])
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        self.store.add(list(zip(keys, rows, strict=True)))
        self.pictures += len(keys)
        self.made(len(keys) * self.ranks.count, len(keys))

    def _key(self, heads: Heads, pair: Pair) -> Key:
        """Heads in the order of the model; a method that does nothing (w = 0) paints the plain picture for any set."""
        acting = () if self.painter.processor.inert else heads
        return Key(self.run, tuple(sorted(acting, key=self.order.__getitem__)), *pair)

    def _first(self, key: Key) -> tuple[int, ...]:
        return tuple(self.order[head] for head in key.heads)


def _mean(rows: Sequence[Scores]) -> dict[str, float]:
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


def known_pairs(pairs: Any) -> list[Pair]:
    """Pairs as they were given, checked."""
    wanted = "give (prompt, seed) pairs, e.g. [('a dog and a car', 0)]"
    found: list[Pair] = []
    for item in _listed(pairs, wanted):
        prompt, seed = item if isinstance(item, (tuple, list)) and len(item) == 2 else (None, None)
        if not isinstance(prompt, str) or isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise SteeringError(f"{item!r} is no pair: {wanted}.")
        found.append((prompt, seed))
    if not found:
        raise SteeringError(f"There is nothing to search on: {wanted}.")
    if len(set(found)) < len(found):
        twice = next(pair for pair in found if found.count(pair) > 1)
        raise SteeringError(f"The pair {twice!r} is given twice: its picture would count twice.")
    return found


def _listed(pairs: Any, wanted: str) -> Iterator[Any]:
    if isinstance(pairs, (str, bytes)) or not hasattr(pairs, "__iter__"):
        raise SteeringError(f"pairs={pairs!r} is no list: {wanted}.")
    return iter(pairs)
