"""From answers to numbers: every metric of every method, and its difference to the plain model on the same pictures.

Intervals come from a bootstrap over pictures: both methods of a difference have the same pictures in every draw. A
difference is marked where its interval does not hold 0, and only there. What the number of pictures could resolve is
beside it: an unmarked difference below that says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..metrics.pope import SPLITS
from ..metrics.statistics import RatioEffect, ratio_differences, ratio_intervals
from .answered import Answered
from .methods import Method, plain
from .samples import Sample
from .store import Entry
from .tasks import Task
from .verified import verified

DRAWS, LEVEL = 10_000, 0.95
ALL = "all"
"""The name of everything together."""

Results = dict[str, Any]


def results(comparison: Answered, model: str, seed: int = 0, draws: int = DRAWS) -> Results:
    """Everything that the report shows, as JSON values. The same answers and seed give the same values.

    Under "verified", where answers were asked for again, how many change (``verified``).

    Args:
        model: its name in the report.
        seed: of the bootstrap.
        draws: of the bootstrap.
    """
    again = verified(comparison)
    return {
        "model": model,
        "seed": seed,
        "draws": draws,
        "level": LEVEL,
        "methods": [
            {"label": m.label, "control_of": m.control_of, "processors": [plain(p) for p in m.processors]}
            for m in comparison.methods
        ],
        "tasks": {task.name: _task(comparison, task, seed, draws) for task in comparison.tasks},
        **({"verified": again} if again else {}),
    }


def grouped_samples(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Everything together, where a sample counts once for each of its groups, and then every group: POPE's splits in
    their order, others by name."""
    found = {group for sample in samples for group in sample.groups}
    names = sorted(found, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))
    everything = [sample for sample in samples for _ in sample.groups or ("",)]
    parts = {name: [sample for sample in samples if name in sample.groups] for name in names}
    return {ALL: everything} | (parts if len(parts) > 1 else {})


def _task(comparison: Answered, task: Task, seed: int, draws: int) -> Results:
    answers = comparison.complete(task)
    usable = [sample for sample in task.samples if sample.id in answers]
    groups = {
        name: _group(comparison.methods, task, samples, answers, seed, draws)
        for name, samples in grouped_samples(usable).items()
        if samples
    }
    return {
        "settings": {**task.settings, "max_new_tokens": task.max_new_tokens},
        "run": comparison.runs[task.name],
        "samples": len(usable),
        "left_out": len(task.samples) - len(usable),
        "metrics": [asdict(metric) for metric in task.metrics],
        "groups": groups,
    }


def _group(
    methods: Sequence[Method],
    task: Task,
    samples: Sequence[Sample],
    answers: Mapping[str, Sequence[Entry]],
    seed: int,
    draws: int,
) -> Results:
    counts = [[answers[sample.id][number]["counts"] for sample in samples] for number in range(len(methods))]
    names = [metric.name for metric in task.metrics]
    tables = [{k: v for k, v in task.ratios(samples, each).items() if k in names} for each in counts]
    found: Results = {}
    for method, table in zip(methods, tables, strict=True):
        intervals = ratio_intervals(table, draws, LEVEL, seed)
        values: Results = {
            name: {
                "value": _short(i.value),
                "low": _short(i.low),
                "high": _short(i.high),
                "numerator": _short(table[name].numerators.sum()),
                "denominator": _short(table[name].denominators.sum()),
            }
            for name, i in intervals.items()
        }
        if method is not methods[0]:
            for name, effect in ratio_differences(table, tables[0], draws, LEVEL, seed).items():
                values[name]["difference"] = _difference(effect)
        found[method.label] = values
    images = len({sample.image for sample in samples})
    return {"images": images, "samples": len(samples), "methods": found}


def _difference(effect: RatioEffect) -> Results:
    return {
        "value": _short(effect.delta),
        "low": _short(effect.low),
        "high": _short(effect.high),
        "p": _short(effect.p),
        "resolvable": _short(effect.resolvable),
        "marked": effect.low > 0 or effect.high < 0,
    }


def _short(value: float) -> float:
    """Without the digits in which processors differ."""
    return round(float(value), 10)
