"""What counting a file gives: ratios with their samples, sums, single records, and the lines that could not be used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import SteeringError
from .files import LineError, Rows
from .ratios import Ratio


@dataclass
class Scored:
    """Counts of one set of answers.

    Attributes:
        table: ratios with one sample for each of ``keys``; counts: integers, summed.
        records: what was counted for each caption, question or response, as plain values.
        numbers: values that are no ratios of sums.
        problems: lines that could not be used, and why.
    """

    table: dict[str, Ratio]
    keys: list[Hashable]
    counts: dict[str, int]
    records: list[dict[str, Any]]
    numbers: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def paired(ours: Scored, theirs: Scored) -> tuple[dict[str, Ratio], dict[str, Ratio], int]:
    """The ratios of both for the samples that both have, in one order, and how many samples only one has.

    Raises:
        SteeringError: they have none in common.
    """
    there = {key: number for number, key in enumerate(theirs.keys)}
    pairs = [(number, there[key]) for number, key in enumerate(ours.keys) if key in there]
    if not pairs:
        raise SteeringError("The two files have no sample in common: compare answers about the same images.")
    mine, other = ([pair[side] for pair in pairs] for side in (0, 1))
    single = len(ours.keys) + len(theirs.keys) - 2 * len(pairs)
    return _take(ours.table, mine), _take(theirs.table, other), single


def _take(table: Mapping[str, Ratio], places: Sequence[int]) -> dict[str, Ratio]:
    return {name: Ratio(ratio.numerators[places], ratio.denominators[places]) for name, ratio in table.items()}


def each(given: Rows, count: Callable[[dict[str, Any]], Any]) -> list[tuple[int, Any]]:
    """(position, what `count` makes of it) of every line that it can use; the others become problems."""
    found = []
    for position, row in given:
        try:
            found.append((position, count(row)))
        except LineError as error:
            given.drop(position, str(error))
    return found


def nothing(given: Rows) -> SteeringError:
    reasons = given.problems[:3] or [f"{given.path} is empty"]
    return SteeringError([f"No line of {given.path} can be used.", *reasons])
