"""Scores as a table or as JSON: values with intervals, differences to another run, and the lines that were bad."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Run, command, finite, positive

if TYPE_CHECKING:
    from ..metrics.scored import Scored

PLAIN = ("length", "words")  # numbers of words; all other ratios are shares
SHOWN = 10  # bad lines


def benchmark(commands: Any, name: str, run: Run, help: str, examples: list[str]) -> argparse.ArgumentParser:
    """A command of ``score``, with what all of them can do."""
    parser = command(commands, name, run, help, examples)
    _add_options(parser)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("intervals and reports").add_argument
    add("--draws", type=positive, default=10_000, help="samples of the bootstrap (default: 10000)")
    add("--level", type=_level, default=0.95, help="of the intervals (default: 0.95)")
    add("--records", metavar="FILE", help="write what was counted for each caption, question or picture, as JSON lines")
    add("--strict", action="store_true", help="exit with 1 if a line could not be used or compared")


def _level(text: str) -> float:
    number = finite(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: allowed is more than 0 and less than 1")
    return number


def report(
    given: argparse.Namespace,
    settings: Mapping[str, Any],
    parts: Mapping[str, Scored],
    others: Mapping[str, Scored] | None = None,
    extra: Mapping[str, Any] | None = None,
    problems: Sequence[str] = (),
) -> int:
    """Print scores and bad lines; the exit code.

    Args:
        settings: what decides the numbers besides the answers.
        parts: what was counted, by name; others: the same parts of the run to compare with.
        extra: further numbers, shown as they are.
        problems: bad lines besides those of the parts.
    """
    both = [*parts.values(), *(others or {}).values()]
    bad = list(dict.fromkeys([*problems, *(problem for part in both for problem in part.problems)]))
    found = {name: _part(given, part, (others or {}).get(name), bad) for name, part in parts.items()}
    if given.records:
        rows = [{"part": name, **record} for name, part in parts.items() for record in part.records]
        Path(given.records).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if given.json:
        drawn = {"draws": given.draws, "level": given.level, "seed": given.seed}
        whole = {"benchmark": given.benchmark, "settings": dict(settings), "bootstrap": drawn, "parts": found}
        print(json.dumps({**whole, **(extra or {}), "bad_lines": len(bad), "problems": bad}, indent=2))
    else:
        _print(given, settings, found, extra or {})
    return complain(given, bad)


def complain(given: argparse.Namespace, bad: Sequence[str]) -> int:
    """Print what was wrong with the input; the exit code."""
    for problem in bad[:SHOWN]:
        print(f"attnsteer: {problem}", file=sys.stderr)
    if bad:
        more = f"; the first {SHOWN} are named above, --json has all" if len(bad) > SHOWN else ""
        print(f"attnsteer: {len(bad)} problems with the input{more}", file=sys.stderr)
    return 1 if bad and given.strict else 0


def _part(given: argparse.Namespace, part: Scored, other: Scored | None, bad: list[str]) -> dict[str, Any]:
    from ..metrics.scored import paired
    from ..metrics.statistics import ratio_differences, ratio_intervals

    drawn = {"draws": given.draws, "level": given.level, "seed": given.seed}
    intervals = ratio_intervals(part.table, **drawn)
    shown = ("value", "low", "high", "spread", "samples")
    metrics = {name: {key: asdict(found)[key] for key in shown} for name, found in intervals.items()}
    whole: dict[str, Any] = {"counts": part.counts, **part.numbers, "metrics": metrics}
    if other is not None:
        ours, theirs, single = paired(part, other)
        if single:
            bad.append(f"{single} samples are in one of the two runs only, and not compared")
        effects = ratio_differences(ours, theirs, **drawn)
        left_out = ("draws", "level", "seed")
        whole["differences"] = {
            name: {key: value for key, value in asdict(effect).items() if key not in left_out}
            for name, effect in effects.items()
        }
    return whole


def _print(
    given: argparse.Namespace,
    settings: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    extra: Mapping[str, Any],
) -> None:
    print(f"{given.benchmark}: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    for name, part in found.items():
        counts = ", ".join(f"{count} {unit.replace('_', ' ')}" for unit, count in part["counts"].items())
        print(f"\n{name}: {counts}" if len(found) > 1 else f"\n{counts}")
        for metric, row in part["metrics"].items():
            print(_line(metric, row, part.get("differences", {}).get(metric), given.level))
        for metric, value in part.items():
            if isinstance(value, float):
                print(f"  {metric:<17}{value:10.4f}")
    for name, value in extra.items():
        print(f"\n{name}: {_flat(value)}")


def _line(metric: str, row: Mapping[str, float], effect: Mapping[str, float] | None, level: float) -> str:
    scale, unit = (1, " ") if metric in PLAIN else (100, "%")
    value, low, high = (scale * row[key] for key in ("value", "low", "high"))
    text = f"  {metric:<17}{value:8.2f} {unit}  {100 * level:g} % [{low:.2f}, {high:.2f}]"
    if effect is None:
        return text
    delta, low, high, smallest = (scale * effect[key] for key in ("delta", "low", "high", "resolvable"))
    return f"{text}   {delta:+.2f} [{low:+.2f}, {high:+.2f}] p {effect['p']:.4f}, can show {smallest:.2f}"


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        if any(isinstance(part, Mapping) for part in value.values()):
            return "".join(f"\n  {name:<11}{_flat(part)}" for name, part in value.items())
        return ", ".join(f"{name} {_flat(part)}" for name, part in value.items())
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
