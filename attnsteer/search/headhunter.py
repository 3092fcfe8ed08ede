"""``HeadHunter``: the search on a pipeline.

Paper: "Where and How to Perturb" (Ahn, Kang et al., NeurIPS 2025, arXiv 2506.10978); the algorithm is in ``hunter``.

Every candidate set is scored by its mean over (prompt, seed) pairs, with perturbation guidance on the set and
classifier-free guidance off. Paper: style on SD3-medium k=3, rounds=5, w=3, u=1, 5 pairs, 20 Euler steps; general
quality k=24, rounds=1, w=3, u=0.25, 20 pairs; FLUX.1-dev w=8, 15 steps, 512 px.

Cost: ``M sum_r (N - k (r - 1))`` pictures of ``steps`` forwards, and of as many shorter ones from the first perturbed
layer on. Candidates run as rows of one batch, sorted by that layer; those of one batch fork in groups
(``attnsteer.fork``). The first step's conditional forward is the same for all candidates of a pair and is computed once
for those of a batch (``attnsteer.hosts.twins``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from .._version import __version__
from ..attach import attach, sites
from ..errors import SteeringError
from ..processor import Processor
from ..site import Site
from ..where import Where
from .hunter import Heads, Round, check, generations, hunt
from .objectives import Given, Objective, WorldJudge, objective_of
from .painter import Painter
from .ranks import Ranks
from .scorer import Pair, Scorer, known_pairs
from .selection import Head, Selection, where_of
from .store import Store


@dataclass(frozen=True)
class Progress:
    """How far a search is: the round, pictures known and in all, and the seconds left (None: not known yet)."""

    what: str
    done: int
    total: int
    seconds_left: float | None


class HeadHunter:
    """A greedy search for the heads whose perturbation serves an objective best.

    Args:
        pipe: a Diffusers pipeline to which nothing is attached.
        objective: ``(images, prompts) -> scores`` or one of ``attnsteer.search.objectives``; None is the small world's
            judge.
        pairs: prompts with the seeds of their initial noise (one CPU generator each).
        k: heads that each round adds.
        rounds: how many rounds.
        strength: u of SoftPAG while searching; lower it afterwards.
        scale: w of SoftPAG.
        steps: denoising steps.
        batch: pictures made at once.
        where: layers and heads to search among (default: all), and the steps at which they are perturbed.
        processor: another method with head selection in place of SoftPAG; its own ``where`` is not used.
        call: further arguments of the pipeline, e.g. ``{"height": 512}``.
        out: folder for the scores and results. A search that finds its scores there goes on where it was; scores under
            other settings are left alone, and so are those of an objective whose content cannot be hashed
            (``attnsteer.search.objectives.Custom``). Without it nothing is written.
        progress: told about every batch.

    Attributes:
        pool: all candidates in the order of the model.
        history: the rounds so far.
        resumed: pictures whose scores were there already.

    Raises:
        SteeringError: whatever cannot be carried out, before anything is generated.
    """

    def __init__(
        self,
        pipe: Any,
        objective: Objective | Given | None = None,
        pairs: Sequence[Pair] = (),
        *,
        k: int = 3,
        rounds: int = 5,
        strength: float = 1.0,
        scale: float = 3.0,
        steps: int = 20,
        batch: int = 8,
        where: Where = Where(),  # noqa: B008 - frozen
        processor: Processor | None = None,
        call: Mapping[str, Any] | None = None,
        out: str | os.PathLike[str] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ):
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise SteeringError(f"batch={batch!r} is out of range: allowed are ints from 1.")
        self.pairs, self.k, self.rounds, self.batch = known_pairs(pairs), k, rounds, batch
        method = replace(processor or _softpag(strength, scale), where=where)
        self.painter = Painter(pipe, method, steps, call)
        self.objective = objective_of(WorldJudge() if objective is None else objective)
        self.pool = pool_of(pipe, method)
        check(len(self.pool), k, rounds)
        attach(pipe, replace(method, where=where_of(self.pool[:1], where.steps))).detach()  # refuse now
        self.out = Path(out) if out is not None else None
        self.history: list[Round] = []
        self.resumed = 0
        self._ranks, self._tell = Ranks(), progress
        if self._ranks.count > 1 and self.out is None:
            raise SteeringError("Several processes need a folder that they share: give out=.")
        self._meter = _Meter(0, "", self._tell)
        self._store: Store | None = None

    def run(self) -> Selection:
        """Search, or go on searching. With ``out``: heads.json after every round, and heatmap.png."""
        self.history, self.resumed = [], 0
        total = generations(len(self.pool), len(self.pairs), self.k, self.rounds)
        self._meter = _Meter(total, "round 1", self._tell)

        def measure(scorer: Scorer, sets: Sequence[Heads]) -> list[float | None]:
            self._meter.what = f"round {len(self.history) + 1} of {self.rounds}"
            means = scorer.means(sets, self.pairs)
            self.resumed = scorer.found
            self._meter.reached(len(sets) * len(self.pairs))
            return [self.objective.rank(row) for row in means]

        with self.working():
            scorer = self.scorer(self.painter, self.objective)
            for found in hunt(self.pool, partial(measure, scorer), self.k, self.rounds):
                self.history.append(found)
                self._save(scorer)
            return self._selection(scorer)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around work on the pipeline: no other search writes to the folder, and texts are encoded once."""
        if self._store is None:
            self._store = Store(self.out, self._ranks.rank)
        try:
            with self.painter.ready():
                yield
        finally:
            if self.out is not None:  # what is in memory only would be lost
                self._store.close()
                self._store = None

    def _selection(self, scorer: Scorer) -> Selection:
        """The rounds so far."""
        search = {"k": self.k, "heads": len(self.pool), "pairs": [list(pair) for pair in self.pairs]}
        settings = {"attnsteer": __version__, "run": scorer.run, **search, **scorer.settings}
        scores = tuple(tuple(found.scores[head] or 0.0 for head in found.chosen) for found in self.history)
        return Selection(tuple(found.chosen for found in self.history), scores, settings)

    def scorer(self, painter: Painter, objective: Objective) -> Scorer:
        """A scorer that shares the memory and the progress of this search; for use while it is ``working``."""
        assert self._store is not None
        order = {head: place for place, head in enumerate(self.pool)}
        return Scorer(
            painter,
            objective,
            self._store,
            order,
            self.batch,
            self._ranks,
            lambda n, own: self._meter.add(n, own),
            once="" if objective.reusable else self._once,
        )

    @cached_property
    def _once(self) -> str:
        """A name that no other search has, the same in all processes."""
        return str(self._ranks.gathered(uuid4().hex)[0])

    def follow(self, what: str, total: int) -> None:
        """Tell about other work from now on, of ``total`` pictures."""
        self._meter = _Meter(total, what, self._tell)

    @property
    def main(self) -> bool:
        """Whether this process writes the results (one of several does)."""
        return self._ranks.rank == 0

    def _save(self, scorer: Scorer) -> None:
        if self.out is not None and self.main:
            from .report import heat_map

            self._selection(scorer).save(self.out / "heads.json")
            heat_map(self.pool, self.history).save(self.out / "heatmap.png")


class _Meter:
    """Counts pictures and tells about them; the rate is that of the pictures made now, not of those found."""

    def __init__(self, total: int, what: str, tell: Callable[[Progress], None] | None):
        self.total, self.what, self.tell = total, what, tell
        self.made, self._base, self._in_part, self._start = 0, 0, 0, time.monotonic()

    def add(self, count: int, own: int) -> None:
        self.made += own
        self._in_part += count
        if self.tell is not None:
            done = min(self.total, self._base + self._in_part)
            rate = self.made * (count / own) / max(1e-9, time.monotonic() - self._start) if own else 0.0
            self.tell(Progress(self.what, done, self.total, (self.total - done) / rate if rate else None))

    def reached(self, part: int) -> None:
        """A part of the work is complete, whoever did it."""
        self._base, self._in_part = self._base + part, 0


def pool_of(pipe: Any, processor: Processor) -> list[Head]:
    """Every head that the processor's selection allows, in the order of the model."""
    there = sites(pipe)
    kinds = (*processor.kinds, "unknown") if processor.token_agnostic else processor.kinds
    chosen = processor.where.select(there, kinds)
    layers = [site.layer for site in chosen]

    def name(site: Site) -> int | str:
        """The number of the layer where that alone means this site, else the site's name."""
        alone = layers.count(site.layer) == 1 and list(Where(layers=site.layer).select(there, kinds)) == [site]
        return site.layer if alone else site.name

    return [Head(name(site), head) for site, heads in chosen.items() for head in heads]


def _softpag(strength: float, scale: float) -> Processor:
    from ..processors import get

    return get("SoftPAG")(strength=strength, scale=scale)
