"""The algorithm of HeadHunter, and nothing else: it gets a function that scores candidate sets.

Paper: "Where and How to Perturb" (Ahn, Kang et al., NeurIPS 2025, arXiv 2506.10978), algorithm 1::

    S = []
    R times: s(h) = score(S + [h]) for every head h that is not in S;  append the k best to S, best first

There is no stopping rule, and candidates are scored one at a time on top of S: k heads are added in each round even
where the score falls. Ties go to the earlier layer, then to the earlier head. A candidate whose score is None failed a
threshold and is not taken; a round in which none passes ends the search, as all later rounds would repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import SteeringError
from .selection import Head

Heads = tuple[Head, ...]
Measure = Callable[[Sequence[Heads]], Sequence[float | None]]


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: from 1.
        chosen: what was added, best first.
        scores: of every candidate, on top of what the rounds before had chosen; None where a threshold failed.
    """

    number: int
    chosen: Heads
    scores: Mapping[Head, float | None]


def hunt(pool: Sequence[Head], measure: Measure, k: int, rounds: int) -> Iterator[Round]:
    """Search greedily, one round after another.

    Args:
        pool: all candidates, in the order of layers and heads.
        measure: from candidate sets to their scores; higher is better.
        k: heads that each round adds.
        rounds: how many rounds.
    """
    check(len(pool), k, rounds)
    chosen: Heads = ()
    left = list(pool)
    for number in range(1, rounds + 1):
        found = measure([(*chosen, head) for head in left])
        scores = dict(zip(left, found, strict=True))
        passed = [head for head in left if scores[head] is not None]
        # sorting is stable: equal scores stay in the order of the pool
        best = tuple(sorted(passed, key=lambda head: -(scores[head] or 0.0))[:k])
        yield Round(number, best, scores)
        if not best:
            return
        chosen += best
        left = [head for head in left if head not in best]


def generations(heads: int, pairs: int, k: int, rounds: int) -> int:
    """How many pictures a search makes: ``M sum_r (N - k (r - 1))``."""
    return pairs * sum(heads - k * done for done in range(rounds))


def check(heads: int, k: int, rounds: int) -> None:
    """Refuse numbers of heads and rounds that the pool cannot serve."""
    for name, value in (("k", k), ("rounds", rounds)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SteeringError(f"{name}={value!r} is out of range: allowed are ints from 1.")
    if k * rounds > heads:
        raise SteeringError(f"k={k} in each of {rounds} rounds are {k * rounds} heads, but there are only {heads}.")
