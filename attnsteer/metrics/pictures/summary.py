"""Values of pictures as one number with its interval, and what differs from another run at the same prompts and seeds.

A metric is the mean of all its values (of pictures, prompts or sets). For intervals prompts, or sets, are drawn with
all their values, as the pictures of one prompt are alike. Differences are of the values that both runs have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from ..ratios import Ratio, mean_of
from ..statistics import ratio_differences, ratio_intervals
from .measures import Key, Metric

EFFECT = ("value", "baseline", "delta", "low", "high", "positive", "p", "spread", "resolvable", "samples")


def summarised(metric: Metric, draws: int = 10_000, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """Plain values: the mean with its interval, what it is, and how many pictures, prompts and seeds it rests on."""
    drawn = ratio_intervals({"": _ratio(metric, list(metric.values))}, draws, level, seed)[""]
    shown = {one for members in metric.of.values() for one in members}
    return {
        **{name: getattr(drawn, name) for name in ("value", "low", "high", "spread", "samples")},
        "scale": metric.scale,
        "better": metric.better,
        "backbone": dict(metric.backbone),
        "values": len(metric.values),
        "images": len(shown),
        "prompts": len({one.prompt for one in shown}),
        "seeds": len({one.seed for one in shown}),
    }


def paired_keys(ours: Metric, theirs: Metric) -> list[Key]:
    """The values of both that are about the same prompts and seeds."""
    return [key for key in ours.values if key in theirs.values and _items(ours, key) == _items(theirs, key)]


def difference(
    ours: Metric, theirs: Metric, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> dict[str, Any] | None:
    """Plain values: the paired difference with its interval, the share of pairs that are better (ties half) and their
    number; None without pairs."""
    keys = paired_keys(ours, theirs)
    if not keys:
        return None
    mine, other = ({"": _ratio(metric, keys)} for metric in (ours, theirs))
    effect = asdict(ratio_differences(mine, other, draws, level, seed)[""])
    wins = win_rate([ours.values[key] for key in keys], [theirs.values[key] for key in keys], ours.better)
    return {**{name: effect[name] for name in EFFECT}, "win_rate": wins, "pairs": len(keys)}


def win_rate(ours: Sequence[float], theirs: Sequence[float], better: str = "higher") -> float:
    """The share of pairs in which the first is better, ties counting half.

    Raises:
        ValueError: no pairs, or not as many of both.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} values are no pairs.")
    sign = -1 if better == "lower" else 1
    return fmean(0.5 if a == b else float(sign * a > sign * b) for a, b in zip(ours, theirs, strict=True))


def records(metrics: Mapping[str, Metric]) -> list[dict[str, Any]]:
    """Every value as plain values."""
    return [
        {"metric": name, "of": cluster, "item": item, "value": value}
        for name, metric in metrics.items()
        for (cluster, item), value in metric.values.items()
    ]


def _ratio(metric: Metric, keys: Sequence[Key]) -> Ratio:
    return mean_of(metric.values[key] for key in keys).grouped([cluster for cluster, _ in keys])


def _items(metric: Metric, key: Key) -> set[Key]:
    return {(one.prompt, one.seed) for one in metric.of[key]}
